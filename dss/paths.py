"""Paths of local files and of objects in a bucket, such as `gs://bucket/folder`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from etils import epath

from dss.errors import DssError, unknown_name

__all__ = [
    "BYTE_ORDER_MARK",
    "CONFIG_FILE",
    "PREDICTIONS",
    "absolute",
    "check_no_pipes",
    "create",
    "find_gin_file",
    "gin_root",
    "in_bucket",
    "is_stream",
    "replacing",
    "write_whole",
]

BYTE_ORDER_MARK = "\ufeff"  # Excel and Notepad write it at the start of a text file
CONFIG_FILE = "config.gin"  # configuration in a run directory
PREDICTIONS = "predictions"  # folder of evaluations in a run directory


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket, that is a URL."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path, with `~` as the home directory; paths in a bucket are unchanged."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().resolve()


def gin_root() -> Path:
    """Returns the folder of the gin files that dss includes, installed or in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "gin"


def find_gin_file(file: str, folders: Sequence[str]) -> str:
    """Returns the path of a gin file.

    Args:
      file: path of the file, or its path relative to one of the folders or to `gin_root()`.
      folders: search paths, in order, before `gin_root()`.

    Raises:
      DssError: if no such file exists.
    """
    root = gin_root()
    for path in (epath.Path(file), *(epath.Path(folder) / file for folder in (*folders, root))):
        if path.expanduser().is_file():
            return str(path.expanduser())
    known = [path.relative_to(root).as_posix() for path in root.rglob("*.gin")]
    raise unknown_name("gin file", file, known)


def is_stream(path: epath.PathLike) -> bool:
    """Returns whether a path is written in place: a device, a pipe or /dev/stdout."""
    if in_bucket(path):
        return False
    path = Path(path)
    is_system = path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))
    return path.exists() and (is_system or not path.is_file())


def check_no_pipes(path: epath.PathLike, *, below: bool = True) -> None:
    """Checks that a local path is not a named pipe, and that a local folder contains none.

    Libraries that open a named pipe would block forever and could not be interrupted.

    Args:
      path: a file or folder.
      below: whether to include subfolders of the folder.

    Raises:
      DssError: if there is a named pipe.
    """
    if in_bucket(path):
        return
    if (pipe := next(_pipes(os.fspath(path), below), None)) is not None:
        raise DssError(f"{pipe}: a named pipe, not a file; delete it")


def _pipes(path: str, below: bool) -> Iterator[str]:
    if not os.path.isdir(path):
        if Path(path).is_fifo():
            yield path
        return
    # Files may disappear while another process writes to the folder.
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _pipes(entry.path, below) if below else ()
            elif not entry.is_file() and Path(entry.path).is_fifo():
                yield entry.path


def create(path: Path, *, binary: bool = False) -> IO[Any]:
    """Opens a new file for writing, and deletes an existing one; symlinks are not followed.

    Args:
      path: a local path.
      binary: whether to write bytes instead of UTF-8 text.
    """
    while True:
        path.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # another process created it in between
            return path.open("xb") if binary else path.open("x", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens `<path>.partial` for writing; it replaces `path` after it is flushed to disk.

    Args:
      path: a local path.
      binary: whether to write bytes instead of UTF-8 text.
    """
    partial = path.with_name(path.name + ".partial")
    with create(partial, binary=binary) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a text file atomically, in UTF-8. Streams such as /dev/stdout are written directly.

    Characters that UTF-8 cannot encode (unpaired surrogates) become question marks.
    """
    content = text.encode(errors="replace")
    if in_bucket(path) or is_stream(path):  # writes to a bucket are atomic
        epath.Path(path).write_bytes(content)
        return
    with replacing(Path(path), binary=True) as file:
        file.write(content)
