"""The arrays of a checkpoint, read one at a time."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dss.training.checksums import check_sums, checksum, path_names

__all__ = ["Leaves"]


class Leaves(Mapping[tuple[str, ...], np.ndarray]):
    """A folder that Orbax wrote, as a mapping from paths in its tree to arrays.

    An array is read whenever it is asked for, and not kept, so that a student needs no more memory
    than its largest parameter; it raises UserError if it is not what was saved. A folder that is
    not there has no arrays.

    Args:
      folder: an item of a checkpoint, such as `<run>/checkpoints/<step>/params`.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._handler = folder, ocp.PyTreeCheckpointHandler()
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
        array = jax.tree.leaves(self._handler.restore(self._folder, args=args))[i]
        check_sums(self._folder, {"/".join(path): checksum(array)}, self._checksums)
        return array

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
