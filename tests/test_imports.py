"""The rooms of the package and their floors: a room imports rooms on lower floors only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import dss

PACKAGE = Path(dss.__file__).parent
FLOORS = (
    {"errors", "testing", "__init__"},
    {"fields", "paths"},
    {"data"},
    {"teacher", "mixtures", "student"},
    {"batches", "parallel"},
    {"training", "evaluation"},
    {"config", "interop"},
    {"runs"},
    {"export", "integrations", "planning", "sweeps", "quickstart"},
    {"reporting", "api"},
    {"serving"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIGHT = {"student", "parallel", "training"}  # start fast, and without TensorFlow
LIGHT_LIBRARIES = {"jax", "flax", "optax", "orbax", "numpy", "etils", "tensorboardX", "safetensors"}


def room_of(module: str) -> str:
    """Returns the room of `dss.room.module`; that of `dss` itself is its `__init__`."""
    return [*module.split("."), "__init__"][1]


def imports() -> Iterator[tuple[str, str]]:
    """Yields each module's room with the modules that it imports, wherever in the file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((room, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None, f"{file}: a relative import"
                names = [f"dss.{a.name}" for a in node.names] if node.module == "dss" else []
                yield from ((room, name) for name in names or [node.module])


def test_a_room_imports_rooms_on_lower_floors_only():
    ours = {(r, room_of(m)) for r, m in imports() if m.split(".")[0] == "dss"}
    ours = {(a, b if b in FLOOR else "__init__") for a, b in ours}
    ours = {(a, b) for a, b in ours if a != "__init__"}  # which names what is public
    assert len(ours) > 50
    assert {a for a, _ in ours} <= {*FLOOR}, "a room without a floor"
    assert not {(a, b) for a, b in ours if a != b and FLOOR[b] >= FLOOR[a]}


def test_the_student_and_its_training_import_few_libraries():
    theirs = {m.split(".")[0] for r, m in imports() if r in LIGHT} - {
        "dss",
        *sys.stdlib_module_names,
    }
    assert "flax" in theirs
    assert theirs <= LIGHT_LIBRARIES
