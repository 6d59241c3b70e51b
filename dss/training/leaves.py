"""The arrays of a checkpoint, read one at a time."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError

from dss.errors import UserError, first_line
from dss.paths import check_no_pipes
from dss.training.checksums import check_sums, checksum, path_names

__all__ = ["Leaves", "is_passing", "reading"]

PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED")


class Leaves(Mapping[tuple[str, ...], np.ndarray]):
    """A folder that Orbax wrote, as a mapping from paths in its tree to arrays.

    An array is read whenever it is asked for, and not kept, so that a student needs no more memory
    than its largest parameter; it raises UserError if it is not what was saved. A folder that is
    not there has no arrays.

    Args:
      folder: an item of a checkpoint, such as `<run>/checkpoints/<step>/params`.
    """

    def __init__(self, folder: epath.Path):
        check_no_pipes(folder)
        self._folder, self._handler = folder, ocp.PyTreeCheckpointHandler()
        with reading(folder):
            metadata: Any = self._handler.metadata(folder) if folder.is_dir() else None
        tree = metadata.tree if metadata else {}
        self._checksums = metadata.custom_metadata if metadata else {}
        found, self._tree = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        self._metadata = [metadata for _, metadata in found]
        self._index = {path_names(path): i for i, (path, _) in enumerate(found)}

    def __getitem__(self, path: tuple[str, ...]) -> np.ndarray:
        i, others = self._index[path], [ocp.PLACEHOLDER] * len(self._metadata)
        wanted = np.broadcast_to(np.zeros((), self._metadata[i].dtype), self._metadata[i].shape)
        item = jax.tree.unflatten(self._tree, [*others[:i], wanted, *others[i + 1 :]])
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args)
        with reading(self._folder):
            array = jax.tree.leaves(self._handler.restore(self._folder, args=args))[i]
        check_sums(self._folder, {"/".join(path): checksum(array)}, self._checksums)
        return array

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """Raises the user's error where damaged files of a checkpoint make Orbax raise another.

    What keeps from reading and is not in the files, such as a bucket out of reach, stays.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_passing(error):
            raise
        raise UserError(f"{folder}: cannot be read: {first_line(error)}") from error


def is_passing(error: Exception) -> bool:
    """Returns whether an error is of the machine or the network, and the files may be whole."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, (MemoryError, JaxRuntimeError)) or any(
        status in str(error) for status in PASSING
    )
