"""`dss sweep` in processes of its own: killed, stopped, and with a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.conftest import STUDENT
from tests.end_to_end.runs import (
    MAIN,
    assert_same_training,
    finish,
    metrics_lines,
    start,
    wait_for,
)

COMMON = "\n".join(line for line in STUDENT.splitlines() if not line.startswith(("Exp", "T5")))
SHAPE = "\n".join(line for line in STUDENT.splitlines() if line.startswith(("Exp", "T5")))


@pytest.fixture
def sweep(toy_folder, tmp_path):
    """Starts `dss sweep` of two methods on the toy data."""
    (tmp_path / "student.gin").write_text(SHAPE)
    (tmp_path / "common.gin").write_text(COMMON)
    (tmp_path / "bad.gin").write_text("LEARNING_RATE = 1e18")

    def sweep(folder: str, *flags: str) -> subprocess.Popen:
        return start(
            "sweep",
            "--gin_file=runs/sweep.gin",
            "--gin_file=common.gin",
            f"--gin.MODEL_DIR={folder}",
            f"--gin.DATASET_PATH={toy_folder}",
            "--gin.DATASET_LABELS=('yes', 'no')",
            "--gin.STUDENTS=('student.gin',)",
            "--gin.FRACTIONS=(0.5,)",
            "--gin.SEEDS=(1,)",
            "--gin.TRAIN_STEPS=400",
            "--gin.EVAL_PERIOD=100",
            *flags,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    return sweep


def child_of(process: subprocess.Popen) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (child,) = children.read_text().split()
    return int(child)


@pytest.fixture
def runs(tmp_path):
    """The folders of the sweep's two runs."""
    methods = ("finetune", "step_by_step")
    return [tmp_path / "sweep" / f"{method}-student-0.5-s1" for method in methods]


def kill_alone(process) -> None:
    """Kills a sweep but not its command, which ends by itself: it saves first."""
    child = Path(f"/proc/{child_of(process)}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while child.exists():
        time.sleep(0.05)


def test_a_sweep_killed_does_what_is_missing(sweep, runs, tmp_path):
    process = sweep("sweep")
    wait_for(lambda: metrics_lines(runs[0]) >= 3, process)
    kill_alone(process)
    assert not (runs[0] / "predictions").exists()
    said = finish(sweep("sweep"))
    assert "[2/2] step_by_step-student-0.5-s1: accuracy " in said
    lines = [json.loads(line) for line in (tmp_path / "sweep/sweep.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "done"]
    assert [line["examples"] for line in lines] == [20, 20]


@pytest.mark.exhaustive
def test_a_sweep_killed_and_stopped_ends_as_its_commands_do(sweep, runs, tmp_path):
    first, second = runs

    # Killed while the first run trains, its command too.
    process = sweep("sweep")
    wait_for(lambda: metrics_lines(first) >= 3, process)
    child = child_of(process)
    process.send_signal(signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    process.communicate()
    assert not (first / "predictions").exists()

    # Killed alone, while the second trains.
    process = sweep("sweep")
    wait_for(lambda: metrics_lines(second) >= 3, process)
    kill_alone(process)
    evaluated = (first / "predictions" / "test.json").stat().st_mtime_ns
    assert not (second / "predictions").exists()

    # Stopped while the second goes on.
    process = sweep("sweep")
    before = metrics_lines(second)
    wait_for(lambda: metrics_lines(second) > before, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, 128 + signal.SIGTERM)
    assert "2 runs, 1 of them already done" in said
    assert "1 of 2 runs are not done; the same command resumes the sweep" in said

    said = finish(sweep("sweep"))
    assert "2 runs, 1 of them already done" in said
    assert "[2/2] step_by_step-student-0.5-s1: accuracy " in said
    assert (first / "predictions" / "test.json").stat().st_mtime_ns == evaluated

    # The printed commands do the same.
    commands = finish(sweep("by hand's", "--print-commands"))
    script = "set -e\n" + f'dss() {{ "{sys.executable}" -c "{MAIN}" "$@"; }}\n' + commands
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    for run in (first, second):
        other = tmp_path / "by hand's" / run.name
        assert_same_training(run, other)
        for file in (run / "predictions").iterdir():
            assert file.read_text() == (other / "predictions" / file.name).read_text()
    said = finish(sweep("by hand's"))
    assert "2 runs, 2 of them already done" in said


def test_a_run_that_fails_is_shown_and_the_others_are_done(sweep, tmp_path):
    methods = "--gin.METHODS=('finetune+bad.gin', 'finetune')"
    said = finish(sweep("sweep", methods, "--gin.TRAIN_STEPS=60"), status=1)
    name = "finetune_bad-student-0.5-s1"
    assert f"[1/2] {name}: FAILED: dss train: step " in said
    assert "[2/2] finetune-student-0.5-s1: accuracy " in said
    last = said.strip().splitlines()[-2:]
    assert last[0].startswith(f"FAILED {name}: dss train: step ")
    assert "the loss is nan" in last[0]
    assert last[0].endswith(f"log: sweep/logs/{name}.log")
    assert last[1] == "1 of 2 runs failed; the same command repeats them"
    rows = [line.split() for line in said.splitlines() if line.startswith("  finetune")]
    assert [row[3] for row in rows] == ["0/1", "1/1"]
