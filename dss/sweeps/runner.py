"""Executes a sweep: one run after another, each command in a separate process.

Separate processes release all memory, of accelerators too, and isolate failures; compiled programs
are reused from the cache of dss. A run is done when the summary of its evaluation exists. All other
state is in the run directories, so an interrupted sweep can resume anywhere.

sweep.jsonl           one line per run: its method, student, size and seed, status, and accuracy or
                      error
sweep-1-of-4.jsonl    the same for one part of a sweep
logs/NAME.log         the output of a run's commands
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import dss
from dss.batches.store import cache_dir
from dss.errors import DssError
from dss.paths import in_bucket, write_whole
from dss.sweeps.sweep import Sweep, SweepRun

__all__ = ["Outcome", "SweepProgress", "read_outcome", "run_sweep"]

WAIT = 0.5  # seconds between attempts to lock a run that another process executes
TAIL = 65536  # bytes at the end of a log that are searched for an error message


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run of a sweep.

    Attributes:
      run: the run.
      status: "done", "failed" or "missing".
      summary: the summary of the evaluation of a run that is done; see `Evaluation.summary`.
      error: the error message of a failed run, one line.
      log: the log of a failed run's commands.
    """

    run: SweepRun
    status: Literal["done", "failed", "missing"] = "missing"
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    log: Path | None = None

    @property
    def predictions(self) -> Path:
        """The predictions file of a run that is done."""
        name = f"{self.summary['mixture']}-{self.summary['split']}-{self.summary['step']}.jsonl"
        return self.run.result.parent / name

    @property
    def scores(self) -> list[float]:
        """The scores of the test examples of a run that is done."""
        lines = self.predictions.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["score"] for line in lines]

    def line(self) -> dict[str, Any]:
        """Returns the line of sweep.jsonl as a JSON value."""
        run, experiment = self.run, self.run.experiment
        return {
            "run": run.name,
            "method": run.method,
            "student": run.student,
            "examples": run.examples,
            "fraction": experiment.data.fraction,
            "seed": experiment.seed,
            "steps": experiment.trainer.train_steps,
            "status": self.status,
            "split": run.split,
            **{name: self.summary.get(name) for name in ("metric", "value", "interval")},
            "error": self.error,
        }


class SweepProgress:
    """Callbacks that show a sweep's progress; the base class ignores all events."""

    def began(self, done: int) -> None:
        """Called at the start of the sweep, with the number of runs that are already done."""

    def started(self, number: int, run: SweepRun, log: Path) -> None:
        """Called at the start of a run, with its number, from 1, and its log."""

    def waiting(self, run: SweepRun) -> None:
        """Called if another process is executing a run."""

    def ended(self, number: int, outcome: Outcome, seconds: float, left: float | None) -> None:
        """Called at the end of a run.

        Args:
          number: the number of the run, from 1.
          outcome: the outcome of the run.
          seconds: the duration of the run in this process.
          left: the estimated seconds until the sweep is done; None if unknown.
        """


def read_outcome(run: SweepRun) -> Outcome:
    """Returns the outcome of a run from its directory: done or, without a valid result, missing."""
    try:
        summary = json.loads(run.result.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Outcome(run)
    is_valid = isinstance(summary, dict) and {"mixture", "split", "step", "metric"} <= {*summary}
    outcome = Outcome(run, "done", summary) if is_valid else Outcome(run)
    return outcome if is_valid and outcome.predictions.is_file() else Outcome(run)


def run_sweep(sweep: Sweep, progress: SweepProgress) -> tuple[list[Outcome], signal.Signals | None]:
    """Executes the runs of a sweep that are not done.

    Args:
      sweep: the sweep.
      progress: the callbacks that show progress.

    Returns:
      The outcome of every run, in order, and the signal that interrupted the sweep, if any.

    Raises:
      DssError: if the sweep's folder cannot be written.
    """
    outcomes = {run.name: read_outcome(run) for run in sweep.runs}
    clock = _Clock()
    _write_status(sweep, list(outcomes.values()))
    progress.began(sum(outcome.status == "done" for outcome in outcomes.values()))
    with _Children() as children:
        for number, run in enumerate(sweep.runs, start=1):
            if outcomes[run.name].status == "done":
                continue
            began = time.monotonic()
            outcome = _execute(sweep, run, number, children, progress)
            if children.stopped_by is not None and outcome.status != "done":
                break
            seconds = time.monotonic() - began
            outcomes[run.name] = outcome
            clock.add(run, seconds)
            _write_status(sweep, list(outcomes.values()))
            left = clock.left([o.run for o in outcomes.values() if o.status == "missing"])
            progress.ended(number, outcome, seconds, left)
            if children.stopped_by is not None:
                break
    return list(outcomes.values()), children.stopped_by


def _execute(
    sweep: Sweep, run: SweepRun, number: int, children: "_Children", progress: SweepProgress
) -> Outcome:
    path = _log_path(sweep, run)
    with _locked_log(path, run, children, progress) as log:
        outcome = read_outcome(run)
        if outcome.status == "done" or children.stopped_by is not None:
            return outcome
        progress.started(number, run, path)
        for command in run.commands:
            begin = path.stat().st_size
            status = children.run(command, log)
            if status != 0 or children.stopped_by is not None:
                break
        outcome = read_outcome(run)
        if outcome.status == "done":
            return outcome
        error = _describe_failure(command[0], status, path, begin)
        return Outcome(run, "failed", error=error, log=path)


def _log_path(sweep: Sweep, run: SweepRun) -> Path:
    """Returns the path of a run's log: in the sweep's folder or, for a bucket, in the cache."""
    if in_bucket(sweep.folder):
        name = os.fspath(sweep.folder).replace("://", "-").replace("/", "-")
        return cache_dir() / "sweeps" / name / f"{run.name}.log"
    return Path(sweep.folder) / "logs" / f"{run.name}.log"


@contextlib.contextmanager
def _locked_log(
    path: Path, run: SweepRun, children: "_Children", progress: SweepProgress
) -> Iterator[IO[bytes]]:
    """Opens and locks the log of a run, waiting for other processes that execute the run.

    Child processes inherit the lock, so it also covers a command that outlives its sweep.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        is_waiting = False
        while children.stopped_by is None:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_waiting:
                    progress.waiting(run)
                is_waiting = True
                time.sleep(WAIT)
        yield log


class _Children:
    """Runs `dss` commands one at a time.

    At SIGTERM or SIGINT the current command gets SIGTERM, so that it saves and exits; at a second
    signal, SIGKILL.
    """

    def __init__(self):
        self.stopped_by: signal.Signals | None = None
        self._child: subprocess.Popen | None = None
        self._previous: dict[int, Any] = {}
        root = str(Path(dss.__file__).parent.parent)
        path = os.environ.get("PYTHONPATH")
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, *([path] if path else [])]),
            "PYTHONUNBUFFERED": "1",
        }

    def __enter__(self) -> "_Children":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        is_repeated = self.stopped_by is not None
        self.stopped_by = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL if is_repeated else signal.SIGTERM)

    def run(self, command: Sequence[str], log: IO[bytes]) -> int:
        """Runs a command to its end; returns its exit status.

        Args:
          command: the arguments of `dss`.
          log: the file for the output.
        """
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dss.cli.child", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C reaches the child only through `_receive`, once
        )
        self._child = process
        if self.stopped_by is not None:  # a signal came before `_child` was set
            process.terminate()
        try:
            return process.wait()
        finally:
            self._child = None
            assert process.stdin is not None
            process.stdin.close()


def _describe_failure(command: str, status: int, path: Path, begin: int) -> str:
    """Returns the error message of a failed command, one line.

    Args:
      command: the name of the command.
      status: the exit status; negative for a signal.
      path: the log.
      begin: the position of the command's output in the log, in bytes.
    """
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"dss {command}: ended by {name}{hint}"
    with path.open("rb") as log:
        log.seek(max(begin, path.stat().st_size - TAIL))
        text = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith(f"dss {command}: ")]
    last_line = lines[-1] if lines else f"exit status {status}"
    return (messages or [f"dss {command}: {last_line}"])[-1]


class _Clock:
    """Estimates the duration of runs from finished runs of the same method and student."""

    def __init__(self):
        self._durations: list[tuple[SweepRun, float]] = []

    def add(self, run: SweepRun, seconds: float) -> None:
        self._durations.append((run, seconds))

    def left(self, runs: Sequence[SweepRun]) -> float | None:
        """Returns the estimated seconds that runs will take; None if no run is finished."""
        if not self._durations:
            return None
        return sum(map(self._estimate, runs))

    def _estimate(self, run: SweepRun) -> float:
        def durations(*same: str) -> list[float]:
            return [
                seconds
                for other, seconds in self._durations
                if all(getattr(other, name) == getattr(run, name) for name in same)
            ]

        return statistics.mean(
            durations("method", "student") or durations("student") or durations()
        )


def _write_status(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Writes sweep.jsonl, atomically."""
    part = "" if sweep.part is None else f"-{sweep.part[0]}-of-{sweep.part[1]}"
    path = sweep.folder / f"sweep{part}.jsonl"
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(outcome.line()) + "\n" for outcome in outcomes))
    except OSError as error:
        raise DssError(f"{path}: cannot be written: {error.strerror or error}") from error
