import ast
import importlib
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import venv

import pytest

import dss
from tests.conftest import ROOT

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(dss.__path__, "dss.")
    if not m.ispkg and "configs" not in m.name
)
NEEDS_T5X = "dss.integrations.t5x"


@pytest.mark.parametrize("name", MODULES)
def test_all_names_every_public_thing_and_nothing_else(name):
    path = ROOT / (name.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}
    if name == NEEDS_T5X:
        (listed,) = (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        )
    else:
        listed = importlib.import_module(name).__all__
        assert all(hasattr(importlib.import_module(name), item) for item in listed)
    assert public <= set(listed)
    assert listed == sorted(
        listed, key=lambda item: (not item.isupper(), not item[0].isupper(), item)
    )


@pytest.mark.parametrize("extra", ["beam", "tfds"])
def test_the_extras_with_beam_can_write_tfrecords(monkeypatch, extra):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    names = {re.match(r"[\w-]+", text)[0] for text in given["extras_require"][extra]}
    assert names >= {"apache-beam", "google-crc32c"}
    tfrecordio = importlib.import_module("apache_beam.io.tfrecordio")
    for other in ("snappy", "crcmod"):
        monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setattr(tfrecordio._default_crc32c_fn, "fn", None, raising=False)
    assert tfrecordio._default_crc32c_fn(b"123456789") == 0xE3069283


@pytest.mark.slow
def test_a_wheel_works_from_any_directory(tmp_path):
    """The wheel alone is installed; its dependencies are those of this environment."""
    source = tmp_path / "source"  # building leaves files in its folder, and takes those it finds
    keep_out = shutil.ignore_patterns(".*", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=keep_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    build.append(source)
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(packages + "\n")
    code = (
        "import dss, dss.config.gin_files as c, dss.tasks; print(dss.__file__);"
        "print(c.parse_gin(['students/xl.gin', 'datasets/cqa.gin']).student.d_model)"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    file, width = done.stdout.split()
    assert file.startswith(str(site))
    assert width == "2048"
    dss_command = tmp_path / "venv" / "bin" / "dss"
    done = subprocess.run([dss_command, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"dss {dss.__version__}"
