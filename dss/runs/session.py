"""What each session of `dss train` on a run began with and how it ended: RUN/sessions.jsonl.

A session is one process (or several as one) from its start to its end; a run that was stopped and
continued has several. One line is written as it begins, one as it ends; who is killed leaves the
second out. Reports are made of it; nothing that trains reads it.
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from etils import epath

from dss import __version__
from dss.batches.store import TokenStore
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import Task
from dss.parallel.processes import is_leader
from dss.paths import check_no_pipes, write_whole
from dss.training.metrics import read_metrics

__all__ = [
    "SESSIONS_FILE",
    "Session",
    "changed_files",
    "describe_data",
    "describe_machine",
    "hash_files",
    "read_sessions",
]

SESSIONS_FILE = "sessions.jsonl"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_machine() -> dict[str, Any]:
    """Returns the devices and versions that this process trains with, for JSON."""
    versions = {"dss": __version__, "python": platform.python_version()}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": versions | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def describe_data(mixture: Mixture, store: TokenStore) -> dict[str, Any]:
    """Returns what a mixture trains on, in numbers, for JSON; `store` holds its tokens."""
    tasks = [
        {
            "kind": task.kind,
            "teacher": task.teacher,
            "examples": len(tokens.inputs),
            "input_tokens": int(tokens.inputs.offsets[-1]),
            "target_tokens": int(tokens.targets.offsets[-1]),
            "cut_inputs": tokens.inputs.num_cut,
            "cut_targets": tokens.targets.num_cut,
            "ledger": tokens.ledger and tokens.ledger.as_json(),
            "usage": _usage(task),
        }
        for task, tokens in zip(mixture.tasks, store.tasks, strict=True)
    ]
    return {"dataset": mixture.dataset.name, "examples": len(store), "tasks": tasks}


def hash_files(mixtures: Mapping[str, Mixture]) -> dict[str, str]:
    """Returns the hash of every file that a run reads, by "<split> <file's name>".

    Args:
      mixtures: what is read of each split.
    """
    out = {}
    for split, mixture in mixtures.items():
        for teacher in {task.teacher for task in mixture.tasks}:
            for file in mixture.dataset.files(split, teacher):
                out[f"{split} {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return dict(sorted(out.items()))


def changed_files(folder: epath.Path, files: Mapping[str, str]) -> list[str]:
    """Returns the names of the files that are not as the last session of a run read them.

    Args:
      folder: the run directory.
      files: what `hash_files` returns now.
    """
    before = None
    for line in read_sessions(folder):
        before = line.get("data", {}).get("files", before)
    if before is None:  # a run that began before files were recorded
        return []
    return sorted(name for name in before.keys() | files if before.get(name) != files.get(name))


def read_sessions(folder: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's sessions.jsonl, without one that was cut short."""
    return read_metrics(folder / SESSIONS_FILE)


def _usage(task: Task) -> dict[str, Any] | None:
    """Returns what `dss annotate` said that a teacher's training outputs took; None where nothing
    says it.
    """
    if task.teacher is None:
        return None
    outputs = task.dataset.files("train", task.teacher)[-1]
    path = outputs.with_suffix(".usage.json")
    check_no_pipes(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # it is no reason not to train
        return None


class Session:
    """Writes a session's two lines, the leader's alone: the first at `begin`, the second at exit.

    Attributes:
      outcome: how it ended, in words, where it raises nothing.
    """

    outcome: str = "done"

    def __init__(self):
        self._path: epath.Path | None = None
        self._started = time.monotonic()

    def begin(self, folder: epath.Path, step: int, facts: dict[str, Any]) -> None:
        """Writes what the session begins with.

        Args:
          folder: the run directory.
          step: that it goes on from.
          facts: for JSON.
        """
        if is_leader():
            self._path = folder / SESSIONS_FILE
            self._append({"event": "begin", "step": step, **facts})

    def _append(self, line: dict[str, Any]) -> None:
        assert self._path is not None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # A bucket cannot append; of a line that a kill cut short nothing is kept.
        before = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        text = before[: before.rfind("\n") + 1] + json.dumps({"time": now, **line}) + "\n"
        write_whole(self._path, text)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if self._path is None:
            return
        if error is not None:
            said = next(iter(str(error).splitlines()), "")
            self.outcome = f"failed: {said or type(error).__name__}"
        seconds = round(time.monotonic() - self._started, 1)
        try:
            self._append({"event": "end", "outcome": self.outcome, "seconds": seconds})
        except OSError:  # such as a full disk, of which `error` tells
            if error is None:
                raise
