"""The arrays of a checkpoint, each read when accessed."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError

from dss.errors import CheckpointError, DssError, first_line
from dss.paths import check_no_pipes
from dss.training.checksums import check_sums, checksum, path_names

__all__ = ["Leaves", "is_transient", "reading"]

TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED")


class Leaves(Mapping[tuple[str, ...], np.ndarray]):
    """An item of an Orbax checkpoint, as a mapping from paths in its tree to host arrays.

    An array is read and checked at each access and is not cached, so that memory is bounded by the
    largest parameter. A folder that does not exist has no arrays.

    Args:
      folder: folder of the item, such as `<run>/checkpoints/<step>/params`.

    Raises:
      CheckpointError: if the folder or, at access, an array is corrupt.
    """

    def __init__(self, folder: epath.Path):
        check_no_pipes(folder)
        self._folder, self._handler = folder, ocp.PyTreeCheckpointHandler()
        with reading(folder):
            metadata: Any = self._handler.metadata(folder) if folder.is_dir() else None
        tree = metadata.tree if metadata else {}
        self._checksums = metadata.custom_metadata if metadata else {}
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        self._metadata = [metadata for _, metadata in leaves]
        self._index = {path_names(path): i for i, (path, _) in enumerate(leaves)}

    def __getitem__(self, path: tuple[str, ...]) -> np.ndarray:
        i, targets = self._index[path], [ocp.PLACEHOLDER] * len(self._metadata)
        # Orbax skips placeholders; a broadcast zero gives dtype and shape without their memory.
        target = np.broadcast_to(np.zeros((), self._metadata[i].dtype), self._metadata[i].shape)
        item = jax.tree.unflatten(self._tree, [*targets[:i], target, *targets[i + 1 :]])
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
    """Turns exceptions that corrupt files make Orbax raise into DssError.

    Transient errors, such as an unreachable bucket, are not changed.

    Args:
      folder: folder that is read, for the error message.

    Raises:
      CheckpointError: if the folder cannot be read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DssError) or is_transient(error):
            raise
        raise CheckpointError(f"{folder}: cannot be read: {first_line(error)}") from error


def is_transient(error: Exception) -> bool:
    """Returns whether the machine or the network causes an error, so that files may be intact."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, (MemoryError, JaxRuntimeError)) or any(
        status in str(error) for status in TRANSIENT
    )
