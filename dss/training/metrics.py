"""Where a run's numbers go: JSON lines that a restart continues exactly, TensorBoard, and speed.

`metrics.jsonl` holds what the run computed, the same lines whether or not it was interrupted.
`speed.jsonl` holds what the clock said, which no restart can repeat.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dss.errors import UserError
from dss.parallel.processes import is_leader
from dss.paths import in_bucket, write_whole

__all__ = ["MetricsWriter", "read_metrics"]

NAMES = ("metrics", "speed")


def read_metrics(path: epath.PathLike) -> list[dict]:
    """Returns the lines of a metrics file; an unfinished last line is left out.

    Raises:
      UserError: a line is no JSON object.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path}: a line is no JSON object")
    return lines


def _cut(path: Path, step: int) -> None:
    """Drops the lines after a step, all of them or none."""
    if not path.exists():
        return
    lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    write_whole(path, "".join(lines))


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Makes optional modules look uninstalled while a library that tries to import them is loaded.

    tensorboardX imports PyTorch and Google's storage client where they are installed: 3 s at the
    start of every run, for features that a run directory does not use.
    """
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class _Board:
    """Event files of TensorBoard, written at once.

    The library's own writer hands events to a thread; if the disk is full that thread ends, and
    the program waits for it for ever.

    Args:
      folder: of the event files.
      step: events from it on, of a run that was killed, are hidden.
    """

    def __init__(self, folder: Path, step: int):
        with _without("torch", "google.cloud.storage"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends values under their names."""
        for name, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class MetricsWriter:
    """Writes the metrics of a run that starts or continues after a step; the leader's alone.

    A run directory in a bucket, which cannot append, has its files written anew at each `sync`.

    Args:
      folder: the run directory.
      step: the step that the run continues from; later lines, of a run that was killed, are cut.
    """

    def __init__(self, folder: epath.PathLike, step: int):
        self._files = {}
        self._bucket: epath.Path | None = None
        if not is_leader():
            return
        if in_bucket(folder):
            self._bucket = epath.Path(folder)
            self._copy = tempfile.TemporaryDirectory(prefix="dss-metrics-")
            folder = self._copy.name
            for name in NAMES:
                there = self._bucket / f"{name}.jsonl"
                if there.exists():
                    Path(folder, there.name).write_bytes(there.read_bytes())
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            path = self._folder / f"{name}.jsonl"
            _cut(path, step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = _Board(self._folder / "tensorboard", step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of computed metrics; the same names on TensorBoard."""
        self._append("metrics", step, values)

    def write_speed(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of clock readings; the same names on TensorBoard."""
        self._append("speed", step, values)

    def _append(self, name: str, step: int, values: dict[str, float]) -> None:
        if not self._files:
            return
        self._files[name].write(json.dumps({"step": step, **values}) + "\n")
        self._files[name].flush()
        self._board.write(step, values)

    def sync(self) -> None:
        """Has everything where it belongs: called before a checkpoint that goes on from here."""
        if self._bucket is None:
            return
        for file in self._folder.rglob("*"):
            if file.is_file():
                there = self._bucket / file.relative_to(self._folder).as_posix()
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(file.read_bytes())

    def close(self) -> None:
        """Closes the files."""
        if not self._files:
            return
        self.sync()
        for file in self._files.values():
            file.close()
        self._board.close()
        if self._bucket is not None:
            self._copy.cleanup()
