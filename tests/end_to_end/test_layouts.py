"""The same training on one device, on meshes of eight, and on several real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dss.student.network import init_params
from tests.conftest import SHARED
from tests.end_to_end.layout_worker import (
    ONE,
    OPTIMIZERS,
    STUDENT,
    flat,
    is_trained,
)
from tests.end_to_end.runs import finish, finish_together, start_together

TOLERANCE = 1e-5
MOVEMENT = 1e-4  # of what training moved a parameter by; AdamW's sums of noise differ by 2e-5
SIMULATED = ("8x1:8:1", "4x2:4:2", "2x4:2:4", "1x8:1:8", "fsdp:4:2:fsdp")
PROCESSES = {2: ("two:2:1", "two_fsdp:2:1:fsdp"), 4: ("four:2:2",)}
LAYOUTS = [text.split(":")[0] for text in (*SIMULATED, *PROCESSES[2], *PROCESSES[4])]


EVERY = {1: (f"{ONE}:1:1", *SIMULATED), **PROCESSES}  # the layouts by the number of processes
PAIRS = [(layout, optimizer) for layout in LAYOUTS for optimizer in OPTIMIZERS]
SOME_PAIRS = [(ONE, optimizer) for optimizer in OPTIMIZERS]
SOME_PAIRS += [pair for pair in PAIRS if is_trained(*pair)]


def train_and_restore(out: Path, selection: str, processes: int) -> int:
    """Trains on layouts what was not trained, and returns how many checkpoints were restored."""
    worker = [sys.executable, "-m", "tests.end_to_end.layout_worker", out]
    devices = "1" if processes > 1 else "8"

    def work(env: dict[str, str]) -> subprocess.Popen:
        return subprocess.Popen(
            [*worker, devices, selection, *EVERY[processes]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | {"DSS_SHARED": str(SHARED), "JAX_PLATFORMS": "cpu"},
        )

    if processes == 1:
        said = finish(work(dict(os.environ)))
    else:
        said = finish_together(start_together(processes, work))
    return int(re.search(r"restored (\d+) bit by bit", said)[1])


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> Path:
    """What some pairs of a layout and an optimizer ended with."""
    out = tmp_path_factory.mktemp("layouts")
    for processes in (2, 1):
        train_and_restore(out, "some", processes)
    return out


@pytest.fixture(scope="module")
def all_trained(trained) -> Path:
    """What all pairs ended with."""
    for processes in EVERY:
        train_and_restore(trained, "all", processes)
    return trained


def test_checkpoints_of_one_device_and_of_others_are_restored_onto_processes(trained):
    """Once more for the processes, which now find the checkpoints of all layouts."""
    assert train_and_restore(trained, "some", 2) == len(SOME_PAIRS) == len(OPTIMIZERS) + 3


@pytest.mark.exhaustive
def test_every_checkpoint_is_restored_onto_every_layout(all_trained):
    for processes, layouts in EVERY.items():
        checkpoints = len(OPTIMIZERS) * (1 + len(LAYOUTS))
        assert train_and_restore(all_trained, "all", processes) == checkpoints * len(layouts)


@pytest.fixture(scope="module")
def initial() -> dict[str, np.ndarray]:
    """The parameters that every layout began with."""
    return {f".params{name}": array for name, array in flat(init_params(STUDENT, 0)).items()}


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        pytest.param(
            *pair, marks=() if pair in SOME_PAIRS else pytest.mark.exhaustive, id="-".join(pair)
        )
        for pair in PAIRS
    ],
)
def test_a_layout_changes_no_loss_no_parameter_and_no_statistic(
    request, initial, layout, optimizer
):
    trained = request.getfixturevalue(
        "trained" if (layout, optimizer) in SOME_PAIRS else "all_trained"
    )
    wanted = np.load(trained / f"one-{optimizer}.npz")
    got = np.load(trained / f"{layout}-{optimizer}.npz")
    np.testing.assert_allclose(got["losses"], wanted["losses"], rtol=TOLERANCE)
    for name in set(wanted) - {"losses"}:
        difference = np.linalg.norm(got[name] - wanted[name])
        assert difference <= TOLERANCE * np.linalg.norm(wanted[name]), name
    for name in initial:
        difference = got[name] - wanted[name]
        assert np.abs(difference).max() <= TOLERANCE, name
        moved = np.linalg.norm(wanted[name] - initial[name])
        assert np.linalg.norm(difference) <= MOVEMENT * moved, name


def test_adafactor_factors_every_matrix_of_the_student(trained):
    rows = [a for name, a in np.load(trained / "one-adafactor.npz").items() if ".v_row" in name]
    # The embedding, the head, an encoder's and a decoder's matrices.
    assert sum(array.shape[-1] > 1 for array in rows) == 2 + 7 + 11
