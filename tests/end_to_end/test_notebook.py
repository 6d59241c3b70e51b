"""The quickstart, and the notebook, executed on its runs and on an exported student."""

import importlib.util
import json
import os
import re
from importlib.machinery import ModuleSpec
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import dss.quickstart
from tests.conftest import ROOT
from tests.end_to_end.runs import MAIN, call, finish, start

SHORT_QUICKSTART = f"import dss.quickstart; dss.quickstart.STEPS = 20\n{MAIN}"
NOTEBOOK = ROOT / "notebooks" / "evaluation.ipynb"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder with a small quickstart in it, and what that printed."""
    folder = tmp_path_factory.mktemp("notebook")
    options = (f"--output={folder / 'quickstart'}", "--sizes", "60", "120", "--seeds", "1")
    env = os.environ | {"COLUMNS": "120"}
    return folder, finish(start("quickstart", *options, code=SHORT_QUICKSTART, env=env))


@pytest.fixture(scope="module")
def quickstart(shown):
    return shown[0]


def test_the_quickstart_trains_compares_and_draws(shown, tmp_path):
    output, said = shown[0] / "quickstart", shown[1]
    assert dss.quickstart.STEPS == 400
    assert "The data are synthetic" in said
    assert re.search(r"^\[\d/6\] 120 examples, seed 0, step by step, 20 steps: ", said, re.M)
    assert re.findall(r"^\[(\d)/6\] ", said, re.M) == list("123456")
    results = json.loads((output / "results.json").read_text())
    assert len(results) == 6
    assert (output / "accuracy.png").stat().st_size > 5000
    assert (output / "accuracy.svg").exists()
    page = tmp_path / "report.html"
    assert f"6 runs: {page}" in call("report", output, "-o", page)
    assert "finetuning (20 steps)" in page.read_text()
    train, test = (
        {json.loads(line)["input"] for line in (output / "timeline" / f).open()}
        for f in ("train.jsonl", "test.jsonl")
    )
    pairs = [
        {frozenset(text.split()[i] for i in (1, 4)) for text in side} for side in (train, test)
    ]
    assert not pairs[0] & pairs[1]


def execute(folder, **settings):
    """Executes the notebook in a folder, some of its settings replaced; returns what it printed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in settings.items():
        (cell,) = (c for c in notebook.cells if re.search(rf"^{name} = ", c.source, re.MULTILINE))
        cell.source = re.sub(
            rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE
        )
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output["text"] for output in outputs if output.output_type == "stream")
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    return text, figures


@pytest.fixture(scope="module")
def executed(quickstart):
    """What the notebook prints and draws of the quickstart's runs."""
    return execute(quickstart)


def test_it_runs_on_the_quickstarts_runs(executed):
    text, figures = executed
    assert "step-by-step-60-0: 0." in text
    assert len(re.findall(r"accuracy [\d.]+% \(95%", text)) == 2
    assert "teacher rules: 100.0%" in text
    assert re.search(r"difference [+-][\d.]+% \(95% CI: .*\), p = ", text)
    assert "ROUGE-L" in text
    assert len(figures) == 2


def test_it_runs_on_exported_students(quickstart, executed):
    runs = quickstart / "quickstart" / "runs"
    for name, run in (("ours", "step-by-step-60-0"), ("other", "finetune-60-0")):
        call("export", runs / run, quickstart / name, "--to=hf")
    exported, _ = execute(
        quickstart,
        OURS=str(quickstart / "ours"),
        OTHER=f"hf:{quickstart / 'other'}",
        DATA=str(quickstart / "quickstart" / "timeline"),
    )
    found = re.findall(r"accuracy [\d.]+% \(95%", executed[0])
    assert re.findall(r"accuracy [\d.]+% \(95%", exported) == found


def run_cell(first_line: str) -> list[str]:
    """Runs the cell that begins so, without a kernel; returns what `%pip` was called with."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (source,) = (cell.source for cell in cells if cell.source.startswith(first_line))
    calls = []

    class Shell:
        def run_line_magic(self, name, line):
            calls.append(f"{name} {line}")

    code = TransformerManager().transform_cell(source)
    exec(code, {"get_ipython": Shell, "Path": Path})
    return calls


@pytest.mark.parametrize("spec", [None, ModuleSpec("dss", None)], ids=["no dss", "a bare folder"])
def test_it_installs_dss_where_it_is_missing(tmp_path, monkeypatch, capsys, spec):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=rf"repository is not in {tmp_path}/dss: put it"):
        run_cell("SOURCE")
    (tmp_path / "dss").mkdir()
    (tmp_path / "dss" / "setup.py").touch()
    assert run_cell("SOURCE") == ['pip install --quiet "{SOURCE}"']
    assert "restart the session" in capsys.readouterr().out


def test_where_dss_is_installed_it_installs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cell("SOURCE") == []
    assert capsys.readouterr().out == ""


def test_without_runs_it_says_where_to_get_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no students in .*: run `!dss quickstart "):
        run_cell("RUNS")


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
