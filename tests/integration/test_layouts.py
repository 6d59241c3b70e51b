"""The same training on one device, on meshes of eight, and on several real processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.integration.layout_worker import OPTIMIZERS
from tests.integration.runs import finish, finish_together, start_together

TOLERANCE = 1e-5
SIMULATED = ("8x1:8:1", "4x2:4:2", "2x4:2:4", "1x8:1:8", "fsdp:4:2:fsdp")
PROCESSES = {2: "two:2:1", 4: "four:2:2"}


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

    for count, layout in PROCESSES.items():
        finish_together(start_together(count, lambda env, layout=layout: work(1, layout, env=env)))
    said = finish(work(8, "one:1:1", *SIMULATED, env=dict(os.environ)))
    checkpoints = len(OPTIMIZERS) * (1 + len(SIMULATED) + len(PROCESSES))
    assert f"restored {checkpoints * (1 + len(SIMULATED))} bit by bit" in said
    # Once more for the processes, which now find the checkpoints of all.
    for count, layout in PROCESSES.items():
        said = finish_together(
            start_together(count, lambda env, layout=layout: work(1, layout, env=env))
        )
        assert f"restored {checkpoints} bit by bit" in said
    return out


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "layout", [text.split(":")[0] for text in (*SIMULATED, *PROCESSES.values())]
)
def test_a_layout_changes_no_loss_and_no_parameter(trained, layout, optimizer):
    wanted = np.load(trained / f"one-{optimizer}.npz")
    got = np.load(trained / f"{layout}-{optimizer}.npz")
    np.testing.assert_allclose(got["losses"], wanted["losses"], rtol=TOLERANCE)
    for name in wanted:
        if name.startswith(".params"):
            difference = got[name] - wanted[name]
            assert np.linalg.norm(difference) <= TOLERANCE * np.linalg.norm(wanted[name]), name
            if optimizer == "adamw":
                assert np.abs(difference).max() <= TOLERANCE, name
            else:
                # An entry whose gradient is 0 but for rounding moves by its sign.
                assert (np.abs(difference) > TOLERANCE).mean() <= TOLERANCE, name
