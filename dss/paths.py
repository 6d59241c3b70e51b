"""Folders and files on this machine or in a bucket, such as `gs://bucket/folder`."""

import os

from etils import epath

__all__ = ["BYTE_ORDER_MARK", "absolute", "in_bucket"]

BYTE_ORDER_MARK = "\ufeff"  # Excel and Notepad write it at the start of a text file


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path names something in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns a path that means the same in any working folder; `~` is the user's home."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.expanduser().resolve()
