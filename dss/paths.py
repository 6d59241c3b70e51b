"""Folders and files on this machine or in a bucket, such as `gs://bucket/folder`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from etils import epath

from dss.errors import UserError, unknown_name

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
CONFIG_FILE = "config.gin"  # of a run directory
PREDICTIONS = "predictions"  # folder of a run directory


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path names something in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a path that means the same in any working folder; `~` is the user's home."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().resolve()


def gin_root() -> Path:
    """Returns the folder of the gin files that come with dss, installed or in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "gin"


def find_gin_file(file: str, folders: Sequence[str]) -> str:
    """Returns the path of a gin file.

    Args:
      file: its path, or its path in one of the folders or in `gin_root`.
      folders: where it is looked for too.

    Raises:
      UserError: if it is in none of them.
    """
    root = gin_root()
    for path in (epath.Path(file), *(epath.Path(folder) / file for folder in (*folders, root))):
        if path.expanduser().is_file():
            return str(path.expanduser())
    have = [path.relative_to(root).as_posix() for path in root.rglob("*.gin")]
    raise unknown_name("gin file", file, have)


def is_stream(path: epath.PathLike) -> bool:
    """Returns whether a path is written to and not replaced: a device, a pipe, /dev/stdout."""
    if in_bucket(path):
        return False
    path = Path(path)
    system = path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))
    return path.exists() and (system or not path.is_file())


def check_no_pipes(path: epath.PathLike, *, below: bool = True) -> None:
    """Checks that a path on this machine is no named pipe, and a folder there holds none.

    Reading one would wait for ever, in libraries that nothing interrupts.

    Args:
      path: the file or folder.
      below: whether folders in the folder are looked at too.

    Raises:
      UserError: if there is one.
    """
    if in_bucket(path):
        return
    if (found := next(_pipes(os.fspath(path), below), None)) is not None:
        raise UserError(f"{found}: a named pipe, not a file; delete it")


def _pipes(path: str, below: bool) -> Iterator[str]:
    if not os.path.isdir(path):
        if Path(path).is_fifo():
            yield path
        return
    # Another process may be saving there: what has gone meanwhile is no pipe.
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _pipes(entry.path, below) if below else ()
            elif not entry.is_file() and Path(entry.path).is_fifo():
                yield entry.path


def create(path: Path, *, binary: bool = False) -> IO[Any]:
    """Opens a new file in place of what has its name; a symlink is removed, not followed.

    Args:
      path: on this machine.
      binary: for bytes, not UTF-8 text.
    """
    while True:
        path.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # another process's, at the same moment
            return path.open("xb") if binary else path.open("x", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens `<path>.partial`, which replaces `path` once all is written and on the disk.

    Args:
      path: on this machine.
      binary: for bytes, not UTF-8 text.
    """
    partial = path.with_name(path.name + ".partial")
    with create(partial, binary=binary) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a file, whole or not at all; half characters become question marks.

    A stream, such as /dev/stdout, is written to.
    """
    content = text.encode(errors="replace")
    if in_bucket(path) or is_stream(path):  # in a bucket an object appears when it is whole
        epath.Path(path).write_bytes(content)
        return
    with replacing(Path(path), binary=True) as file:
        file.write(content)
