"""Doing a sweep: its runs one after another, each command in a process of its own.

A process gives its memory, an accelerator's too, back when it ends, and what breaks in it breaks
nothing else; compiled programs are found again in the cache of dss. A run is done when the summary
of its evaluation is there. Everything else of the state is in the run directories, so a sweep goes
on wherever it was killed.

sweep.jsonl           a line for each run: what was varied, its status, its accuracy or its error
sweep-1-of-4.jsonl    the same of a part
logs/NAME.log         what the run's commands printed
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
from dss.errors import UserError
from dss.paths import in_bucket, write_whole
from dss.sweeps.sweep import Sweep, SweepRun

__all__ = ["Outcome", "SweepProgress", "read_outcome", "run_sweep"]

WAIT = 0.5  # seconds between looks at a run that another process is at
TAIL = 65536  # bytes of a log in which its error is looked for


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far a run is.

    Attributes:
      run: which one.
      status: "done", "failed" or "missing".
      summary: of its evaluation, when it is done; see `Evaluation.summary`.
      error: in a line, when it failed.
      log: what its commands printed, if they ran.
    """

    run: SweepRun
    status: Literal["done", "failed", "missing"] = "missing"
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    log: Path | None = None

    @property
    def predictions(self) -> Path:
        """The file of predictions of a run that is done."""
        name = f"{self.summary['mixture']}-{self.summary['split']}-{self.summary['step']}.jsonl"
        return self.run.result.parent / name

    @property
    def scores(self) -> list[float]:
        """The score of every example of a run that is done."""
        lines = self.predictions.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["score"] for line in lines]

    def line(self) -> dict[str, Any]:
        """Returns it for JSON."""
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
    """Is told how a sweep gets on; this one says nothing."""

    def began(self, done: int) -> None:
        """The sweep begins; some of its runs were done before."""

    def started(self, number: int, run: SweepRun, log: Path) -> None:
        """A run is trained from here on; `number` counts from 1."""

    def waiting(self, run: SweepRun) -> None:
        """Another process is at a run."""

    def ended(self, number: int, outcome: Outcome, seconds: float, left: float | None) -> None:
        """A run has ended.

        Args:
          number: of the run, from 1.
          outcome: how.
          seconds: that it took here.
          left: seconds until the sweep is done, as far as was measured.
        """


def read_outcome(run: SweepRun) -> Outcome:
    """Returns how far a run is, as its directory says: done or, without a whole result, missing."""
    try:
        summary = json.loads(run.result.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Outcome(run)
    is_whole = isinstance(summary, dict) and {"mixture", "split", "step", "metric"} <= {*summary}
    outcome = Outcome(run, "done", summary) if is_whole else Outcome(run)
    return outcome if is_whole and outcome.predictions.is_file() else Outcome(run)


def run_sweep(sweep: Sweep, progress: SweepProgress) -> tuple[list[Outcome], signal.Signals | None]:
    """Does what is missing of a sweep.

    Args:
      sweep: its runs.
      progress: told of each.

    Returns:
      How every run ended, in order, and the signal that stopped the sweep if one did.

    Raises:
      UserError: the sweep's folder cannot be written.
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
            outcome = _do(sweep, run, number, children, progress)
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


def _do(
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
    """Returns where a run's log is: in the sweep's folder, but on this machine."""
    if in_bucket(sweep.folder):
        name = os.fspath(sweep.folder).replace("://", "-").replace("/", "-")
        return cache_dir() / "sweeps" / name / f"{run.name}.log"
    return Path(sweep.folder) / "logs" / f"{run.name}.log"


@contextlib.contextmanager
def _locked_log(
    path: Path, run: SweepRun, children: "_Children", progress: SweepProgress
) -> Iterator[IO[bytes]]:
    """Opens a run's log, which nobody else writes then.

    The lock is the open file's: a command that outlives its sweep for a moment has it too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        told = False
        while children.stopped_by is None:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    progress.waiting(run)
                told = True
                time.sleep(WAIT)
        yield log


class _Children:
    """Runs `dss` commands one at a time; SIGTERM and SIGINT have the one that runs save and end."""

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
        again = self.stopped_by is not None
        self.stopped_by = signal.Signals(number)
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def run(self, command: Sequence[str], log: IO[bytes]) -> int:
        """Runs the command of some arguments to its end; returns its exit status."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dss.cli.child", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # the terminal's Ctrl-C is ours to pass on, once
        )
        self._child = process
        if self.stopped_by is not None:  # since it was last looked at
            process.terminate()
        try:
            return process.wait()
        finally:
            self._child = None
            assert process.stdin is not None
            process.stdin.close()


def _describe_failure(verb: str, status: int, path: Path, begin: int) -> str:
    """Returns in a line why a command failed, whose output begins somewhere in a log."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"dss {verb}: ended by {name}{hint}"
    with path.open("rb") as log:
        log.seek(max(begin, path.stat().st_size - TAIL))
        text = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(f"dss {verb}: ")]
    return (said or [f"dss {verb}: {lines[-1]}" if lines else f"dss {verb}: status {status}"])[-1]


class _Clock:
    """Guesses how long runs will take by how long those like them took."""

    def __init__(self):
        self._taken: list[tuple[SweepRun, float]] = []

    def add(self, run: SweepRun, seconds: float) -> None:
        self._taken.append((run, seconds))

    def left(self, runs: Sequence[SweepRun]) -> float | None:
        """Returns the seconds that runs will take; None before any was timed."""
        if not self._taken:
            return None
        return sum(map(self._guess, runs))

    def _guess(self, run: SweepRun) -> float:
        def like(*names: str) -> list[float]:
            return [
                seconds
                for other, seconds in self._taken
                if all(getattr(other, name) == getattr(run, name) for name in names)
            ]

        return statistics.mean(like("method", "student") or like("student") or like())


def _write_status(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Writes the sweep's table for programs, whole or not at all."""
    part = "" if sweep.part is None else f"-{sweep.part[0]}-of-{sweep.part[1]}"
    path = sweep.folder / f"sweep{part}.jsonl"
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(outcome.line()) + "\n" for outcome in outcomes))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
