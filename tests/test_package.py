import ast
import importlib
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator

import pytest

import dss
from tests.conftest import ROOT
from tests.end_to_end.runs import TENSORFLOW_MODULES

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(dss.__path__, "dss.")
    if not m.ispkg and "configs" not in m.name
)
NEEDS_T5X = "dss.integrations.t5x"
# The distributions of modules that have another name.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}
# The extras whose packages a file or folder of dss may import; all others have install_requires.
EXTRAS = {
    "cli/annotate_command.py": {"teacher"},
    "data/grouped_splits.py": {"tables"},
    "data/prepare.py": {"tables"},
    "data/tables.py": {"tables"},
    "export": {"export"},
    "integrations": {"seqio", "tfds"},
    "interop": {"export"},
    "quickstart.py": {"report"},
    "reporting": {"report"},
    "cli/serve_command.py": {"serve"},
    "serving": {"serve"},
    "teacher": {"teacher", "beam"},
}
NOT_ON_THE_INDEX = {"t5x"}  # docs/t5x.md has how to install it
WITHOUT_PRIVATE_NAMES = {("training/checkpoints.py", "orbax.checkpoint._src.serialization")}


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


def normalised(requirement: str) -> str:
    """Returns the distribution of a requirement, with its name as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture
def required(monkeypatch) -> dict[str, set[str]]:
    """The distributions that setup.py names: those of each extra, and under "" the others."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    everything = {"": given["install_requires"], **given["extras_require"]}
    return {extra: {*map(normalised, lines)} for extra, lines in everything.items()}


def imported() -> Iterator[tuple[str, str]]:
    """Yields each file of dss with the modules of other packages that it imports."""
    for path in sorted((ROOT / "dss").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                if name.partition(".")[0] not in {"dss", *sys.stdlib_module_names}:
                    yield path.relative_to(ROOT / "dss").as_posix(), name


def test_setup_names_every_package_that_is_imported(required):
    undeclared = set()
    for file, module in imported():
        extras = {
            e for place, of in EXTRAS.items() if f"{file}/".startswith(f"{place}/") for e in of
        }
        package = module.partition(".")[0]
        allowed = set().union(*(required[extra] for extra in {"", *extras}))
        if normalised(DISTRIBUTIONS.get(package, package)) not in allowed | NOT_ON_THE_INDEX:
            undeclared.add((file, package))
    assert not undeclared


def test_private_modules_of_other_packages_are_imported_where_there_is_no_public_name():
    private = {(f, m) for f, m in imported() if any(p.startswith("_") for p in m.split("."))}
    assert private == WITHOUT_PRIVATE_NAMES


def test_an_installation_without_extras_brings_no_tensorflow(required):
    heavy = {"tensorflow", "tensorflow-datasets", "seqio", "clu", "t5", "torch"}
    assert not heavy & required[""]
    assert required["seqio"] >= {"tensorflow", "tensorflow-datasets", "seqio", "clu"}
    assert required["tfds"] >= required["beam"] | {"tensorflow", "tensorflow-datasets"}
    assert required["test"] >= required["tfds"] | required["seqio"] | required["gcs"]


def test_without_tensorflow_all_but_the_integrations_is_imported():
    names = [n for n in MODULES if not n.startswith(("dss.integrations.", "dss.tasks."))]
    code = f"""
import importlib, sys
from dss.errors import DssError
sys.modules.update(dict.fromkeys({TENSORFLOW_MODULES}))  # as if they were not installed
for name in {names}: importlib.import_module(name)
for name in ("dss.integrations.seqio_tasks", "dss.integrations.step_by_step", "{NEEDS_T5X}"):
    try: importlib.import_module(name)
    except DssError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the SeqIO integration needs seqio (not installed): pip install 'dss[seqio]'",
        "the TFDS builder needs tensorflow_datasets (not installed): pip install 'dss[tfds]'",
        "the SeqIO integration needs seqio (not installed): pip install 'dss[seqio]'",
    ]


@pytest.mark.parametrize("extra", ["beam", "tfds"])
def test_the_extras_with_beam_can_write_tfrecords(monkeypatch, required, extra):
    assert required[extra] >= {"apache-beam", "google-crc32c"}
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
    assert (site / "dss" / "py.typed").is_file()
    assert width == "2048"
    dss_command = tmp_path / "venv" / "bin" / "dss"
    done = subprocess.run([dss_command, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"dss {dss.__version__}"
