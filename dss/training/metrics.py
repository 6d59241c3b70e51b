"""Writes the metrics of a run as JSON lines and to TensorBoard.

`metrics.jsonl` has computed metrics; its lines are the same whether or not the run was interrupted.
`speed.jsonl` has timings, which are not reproducible.
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

from dss.errors import DssError
from dss.parallel.processes import is_leader
from dss.paths import in_bucket, write_whole

__all__ = ["MetricsWriter", "read_metrics"]

NAMES = ("metrics", "speed")


def read_metrics(path: epath.PathLike) -> list[dict]:
    """Returns the lines of a metrics file, without an incomplete last line.

    Args:
      path: the file; no lines if it does not exist.

    Raises:
      DssError: if a line is not a JSON object.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except (ValueError, RecursionError) as error:
        raise DssError(f"{path}: cannot be read: {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise DssError(f"{path}: a line is not a JSON object")
    return lines


def _truncate(path: Path, step: int) -> None:
    """Atomically drops the lines after a step."""
    if not path.exists():
        return
    lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    write_whole(path, "".join(lines))


@contextlib.contextmanager
def _hide_modules(*modules: str) -> Iterator[None]:
    """Makes imports of optional modules fail.

    tensorboardX imports PyTorch and Google's storage client if they are installed, which takes
    seconds at the start of every run, for features that are not used here.
    """
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class _TensorBoard:
    """Synchronous writer of TensorBoard event files.

    tensorboardX's own writer uses a thread. If the disk is full, the thread dies and the program
    hangs.

    Args:
      folder: folder of the event files.
      step: first step of this run; TensorBoard hides earlier events from this step on.
    """

    def __init__(self, folder: Path, step: int):
        with _hide_modules("torch", "google.cloud.storage"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step by name."""
        for name, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class MetricsWriter:
    """Writes the metrics of a new or resumed run, in the leader process only.

    Buckets do not support appending: if the run directory is in one, files are written locally and
    uploaded at each `sync`.

    Args:
      folder: the run directory.
      step: step that the run starts after; later lines, from before an interruption, are dropped.
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
                remote = self._bucket / f"{name}.jsonl"
                if remote.exists():
                    Path(folder, remote.name).write_bytes(remote.read_bytes())
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            path = self._folder / f"{name}.jsonl"
            _truncate(path, step)
            self._files[name] = path.open("a", encoding="utf-8")
        self._board = _TensorBoard(self._folder / "tensorboard", step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the computed metrics of a step to `metrics.jsonl` and TensorBoard."""
        self._append("metrics", step, values)

    def write_speed(self, step: int, values: dict[str, float]) -> None:
        """Writes the timings of a step to `speed.jsonl` and TensorBoard."""
        self._append("speed", step, values)

    def _append(self, name: str, step: int, values: dict[str, float]) -> None:
        if not self._files:
            return
        self._files[name].write(json.dumps({"step": step, **values}) + "\n")
        self._files[name].flush()
        self._board.write(step, values)

    def sync(self) -> None:
        """Uploads the files if the run directory is in a bucket. Called before each checkpoint."""
        if self._bucket is None:
            return
        for file in self._folder.rglob("*"):
            if file.is_file():
                remote = self._bucket / file.relative_to(self._folder).as_posix()
                remote.parent.mkdir(parents=True, exist_ok=True)
                remote.write_bytes(file.read_bytes())

    def close(self) -> None:
        """Uploads the files to a bucket, if any, and closes them."""
        if not self._files:
            return
        self.sync()
        for file in self._files.values():
            file.close()
        self._board.close()
        if self._bucket is not None:
            self._copy.cleanup()
