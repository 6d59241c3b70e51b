"""The log of a run's sessions: RUN/sessions.jsonl.

A session is one invocation of `dss train`; a run that was interrupted and resumed has several. A
session writes one line at its start and one at its end; a killed session has no end line. Reports
read the log, and resuming compares its hashes of data files.
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
    """Returns the devices and library versions of this process, as a JSON value."""
    versions = {"dss": __version__, "python": platform.python_version()}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": versions | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def describe_data(mixture: Mixture, store: TokenStore) -> dict[str, Any]:
    """Returns statistics of a mixture's training data as a JSON value.

    Args:
      mixture: the mixture to train on.
      store: the token store of its training split.
    """
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
    """Returns the hash of every data file that a run reads, by "<split> <file name>".

    Args:
      mixtures: the mixture that is read of each split, by the split.
    """
    out = {}
    for split, mixture in mixtures.items():
        for teacher in {task.teacher for task in mixture.tasks}:
            for file in mixture.dataset.files(split, teacher):
                out[f"{split} {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return dict(sorted(out.items()))


def changed_files(folder: epath.Path, files: Mapping[str, str]) -> list[str]:
    """Returns the names of the files that have changed since the last session of a run.

    Args:
      folder: the run directory.
      files: the current hashes, from `hash_files`.
    """
    before = None
    for line in read_sessions(folder):
        before = line.get("data", {}).get("files", before)
    if before is None:  # an older run without recorded files
        return []
    return sorted(name for name in before.keys() | files if before.get(name) != files.get(name))


def read_sessions(folder: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's sessions.jsonl, without an incomplete last one."""
    return read_metrics(folder / SESSIONS_FILE)


def _usage(task: Task) -> dict[str, Any] | None:
    """Returns the tokens and cost that `dss annotate` recorded for a teacher's training outputs;
    None without a record.
    """
    if task.teacher is None:
        return None
    outputs = task.dataset.files("train", task.teacher)[-1]
    path = outputs.with_suffix(".usage.json")
    check_no_pipes(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # training does not need the record
        return None


class Session:
    """Writes the two lines of a session, in process 0: one at `begin`, one at exit.

    Attributes:
      outcome: the outcome of the session in words; an exception replaces it.
    """

    outcome: str = "done"

    def __init__(self):
        self._path: epath.Path | None = None
        self._started = time.monotonic()

    def begin(self, folder: epath.Path, step: int, facts: dict[str, Any]) -> None:
        """Writes the first line of the session.

        Args:
          folder: the run directory.
          step: the step that training starts or resumes from.
          facts: more fields of the line, as JSON values.
        """
        if is_leader():
            self._path = folder / SESSIONS_FILE
            self._append({"event": "begin", "step": step, **facts})

    def _append(self, line: dict[str, Any]) -> None:
        assert self._path is not None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # Buckets cannot append, so the file is rewritten, without an incomplete last line.
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
            message = next(iter(str(error).splitlines()), "")
            self.outcome = f"failed: {message or type(error).__name__}"
        seconds = round(time.monotonic() - self._started, 1)
        try:
            self._append({"event": "end", "outcome": self.outcome, "seconds": seconds})
        except OSError:  # such as a full disk, which `error` already reports
            if error is None:
                raise
