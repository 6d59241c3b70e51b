"""Folders and files on this machine or in a bucket, such as `gs://bucket/folder`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from dss.errors import UserError

__all__ = [
    "BYTE_ORDER_MARK",
    "absolute",
    "check_no_pipes",
    "create",
    "in_bucket",
    "replacing",
    "write_whole",
]

BYTE_ORDER_MARK = "\ufeff"  # Excel and Notepad write it at the start of a text file


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path names something in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a path that means the same in any working folder; `~` is the user's home."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().resolve()


def check_no_pipes(path: epath.PathLike) -> None:
    """Checks that a path on this machine is no named pipe, and a folder there holds none.

    To read one is to wait for ever, in libraries that nothing interrupts.

    Raises:
      UserError: names the pipe.
    """
    if in_bucket(path):
        return
    for found in (Path(path), *Path(path).rglob("*")):
        if found.is_fifo():
            raise UserError(f"{found}: a named pipe, not a file; move it away")


def create(path: Path, *, binary: bool = False) -> IO[Any]:
    """Opens a new file in place of what has its name; a symlink is removed, not followed.

    Args:
      path: on this machine.
      binary: for bytes, not UTF-8 text.
    """
    path.unlink(missing_ok=True)
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
    """Writes a file, whole or not at all; half characters become question marks."""
    content = text.encode(errors="replace")
    if in_bucket(path):  # where an object appears when it is whole
        epath.Path(path).write_bytes(content)
        return
    with replacing(Path(path), binary=True) as file:
        file.write(content)
