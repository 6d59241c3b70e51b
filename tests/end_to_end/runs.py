"""Whole processes of `dss`, commands within this one, and what two runs have in common."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dss.cli.main import main
from dss.runs.directory import load_run

MAIN = "from dss.cli.main import main; raise SystemExit(main())"
TENSORFLOW_MODULES = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "clu")
# Of several processes, those that survive another end after 30 s without a sign of it; here 10.
ONE_OF_SEVERAL_MAIN = f"""
import dss.parallel.processes
dss.parallel.processes.HEARTBEAT = 10
{MAIN}
"""
SLOW = """
import time, dss.runs.train
put = dss.runs.train.put_batch
dss.runs.train.put_batch = lambda *args: (time.sleep(0.1), put(*args))[1]
"""
SLOW_MAIN = SLOW + ONE_OF_SEVERAL_MAIN
JUMPING_CLOCK_MAIN = f"""
import time
now, monotonic = time.time, time.monotonic
time.time = lambda: now() + (0, 86400, -86400)[int(4 * monotonic()) % 3]
{MAIN}
"""


def start(*args, code: str = MAIN, **kwargs) -> subprocess.Popen:
    """Starts a `dss` command."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen, status: int = 0, stdin: str | None = None) -> str:
    """Waits for a process, checks its exit status and returns what it printed."""
    out, err = process.communicate(stdin, timeout=900)
    assert process.returncode == status, out + err
    return out + err


def call_apart(*args, status: int = 0, stdin: bytes = b"") -> tuple[str, str]:
    """Runs a `dss` command in this process, checks its status and returns its output and errors.

    It takes a fraction of a process's time, for what needs none of its own: no signal, no other
    number of devices.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert main([str(arg) for arg in args]) == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def call(*args, status: int = 0, stdin: bytes = b"") -> str:
    """Runs a `dss` command as `call_apart` does; returns its output and errors as one text."""
    return "".join(call_apart(*args, status=status, stdin=stdin))


def finish_together(processes: list[subprocess.Popen], status: int = 0) -> str:
    """Waits for processes that train as one; returns what the leader, the first, printed."""
    return [finish(process, status) for process in processes][0]  # noqa: RUF015 all must finish


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until something is so, or the process has ended."""
    deadline = time.monotonic() + 600
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start_together(count: int, start_one: Callable[..., subprocess.Popen]) -> list:
    """Starts processes that train as one; `start_one` takes the keyword `env`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        start_one(env=os.environ | variables | {"JAX_PROCESS_ID": str(i)}) for i in range(count)
    ]


def metrics_lines(run: Path) -> int:
    """Returns how many lines of metrics a run has written."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def is_saving(run: Path) -> bool:
    """Returns whether a checkpoint is being written."""
    folder = run / "checkpoints"
    return any(folder.glob("*tmp*")) if folder.exists() else False


def assert_same_training(got: Path, wanted: Path) -> None:
    """Checks that two runs wrote the same metrics and ended with the same bits."""
    assert (got / "metrics.jsonl").read_text() == (wanted / "metrics.jsonl").read_text()
    params = [load_run(run).predictor("latest")[0].params for run in (got, wanted)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def assert_same_run(got: Path, wanted: Path) -> None:
    """Checks that two runs did the same and kept the same checkpoints."""
    assert_same_training(got, wanted)
    steps = [load_run(run).checkpoints().steps for run in (got, wanted)]
    assert steps[0] == steps[1]
