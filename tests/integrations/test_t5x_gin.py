"""Parses the gin files for T5X, with stubs of T5X where it is not installed."""

import ast
import importlib.util
import json
import subprocess
import sys

import pytest

from dss.paths import gin_root
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

T5X_MACROS = {
    "CHECKPOINT_PATH",
    "EVAL_OUTPUT_DIR",
    "INFER_OUTPUT_DIR",
    "SPLIT",
}  # not in `dss train`


def macros_of(file: str) -> dict[str, str]:
    lines = (gin_root() / file).read_text().splitlines()
    pairs = [line.partition(" = ") for line in lines if line[:1].isupper()]
    return {name: value for name, _, value in pairs if name.isupper()}


@pytest.fixture(scope="module")
def parsed(small_root):
    """The rows that `parse_t5x_gin` prints."""
    command = [sys.executable, "-m", "tests.integrations.parse_t5x_gin", str(small_root)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("mode", ["train", "eval", "infer"])
def test_every_dataset_method_and_variant_is_read_with_all_macros_bound(mode, parsed):
    rows = [row for row in parsed if row["mode"] == mode]
    paths = [
        path
        for folder in ("datasets", "methods", "variants")
        for path in sorted((gin_root() / folder).glob("*.gin"))
    ]
    assert [row["file"] for row in rows] == [path.stem for path in paths]
    assert all("model" in row["given"] for row in rows)
    known = set(macros_of("runs/train.gin")) | T5X_MACROS
    for row, path in zip(rows, paths, strict=True):
        assert set(row["macros"]) <= known
        for name, value in macros_of(f"{path.parent.name}/{path.name}").items():
            if path.parent.name != "variants":
                assert row["macros"][name] == ast.literal_eval(value.partition("#")[0].strip())


@pytest.mark.parametrize("name", ["train", "eval", "infer"])
def test_a_file_opens_with_its_purpose_and_command(name):
    lines = (gin_root() / "t5x" / f"{name}.gin").read_text().splitlines()
    assert lines[0].startswith("# Purpose:")
    assert lines[1].startswith(f"# Command:  python -m t5x.{name} ")


@pytest.mark.skipif(importlib.util.find_spec("t5x") is not None, reason="T5X is installed")
def test_without_t5x_the_plug_in_raises_a_one_line_install_hint():
    with pytest.raises(ImportError, match="pip install") as error:
        importlib.import_module("dss.integrations.t5x")
    assert "\n" not in str(error.value)
