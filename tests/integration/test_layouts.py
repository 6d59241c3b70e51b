"""The same training on one device, on meshes of eight, and on several real processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dss.student.network import init_params
from tests.integration.layout_worker import OPTIMIZERS, STUDENT, flat
from tests.integration.runs import finish, finish_together, start_together

TOLERANCE = 1e-5
MOVEMENT = 1e-4  # of what training moved a parameter by; AdamW's sums of noise differ by 2e-5
SIMULATED = ("8x1:8:1", "4x2:4:2", "2x4:2:4", "1x8:1:8", "fsdp:4:2:fsdp")
PROCESSES = {2: ("two:2:1", "two_fsdp:2:1:fsdp"), 4: ("four:2:2",)}
LAYOUTS = [text.split(":")[0] for text in (*SIMULATED, *PROCESSES[2], *PROCESSES[4])]


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory) -> Path:
    """What every layout ended with; each restored the checkpoints of those before it."""
    out = tmp_path_factory.mktemp("layouts")

    def work(devices: int, *layouts: str, env: dict[str, str]) -> subprocess.Popen:
        worker = [sys.executable, "-m", "tests.integration.layout_worker"]
        return subprocess.Popen(
            [*worker, out, str(devices), *layouts],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | {"DSS_SHARED": str(shared), "JAX_PLATFORMS": "cpu"},
        )

    def work_together(count: int) -> str:
        return finish_together(
            start_together(count, lambda env: work(1, *PROCESSES[count], env=env))
        )

    for count in PROCESSES:
        work_together(count)
    said = finish(work(8, "one:1:1", *SIMULATED, env=dict(os.environ)))
    checkpoints = len(OPTIMIZERS) * (1 + len(LAYOUTS))
    assert f"restored {checkpoints * (1 + len(SIMULATED))} bit by bit" in said
    # Once more for the processes, which now find the checkpoints of all.
    for count, layouts in PROCESSES.items():
        assert f"restored {checkpoints * len(layouts)} bit by bit" in work_together(count)
    return out


@pytest.fixture(scope="module")
def initial() -> dict[str, np.ndarray]:
    """The parameters that every layout began with."""
    return {f".params{name}": array for name, array in flat(init_params(STUDENT, 0)).items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_no_loss_no_parameter_and_no_statistic(
    trained, initial, layout, optimizer
):
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
