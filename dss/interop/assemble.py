"""Builds the student's parameters from another framework's tensors, one tensor at a time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dss.errors import UserError
from dss.student.config import T5Config
from dss.student.network import abstract_params

__all__ = ["Name", "Read", "assemble"]

Name = Callable[[tuple[str, ...], int | None], tuple[str, bool]]
"""Maps a parameter's path and layer (None outside layers) to its tensor, and if transposed."""

Read = Callable[[str], np.ndarray]
"""Returns a tensor by name; raises KeyError where there is none."""


def assemble(config: T5Config, read: Read, name: Name, where: str) -> Any:
    """Returns parameters as `dss.student.network` lays them out.

    Args:
      config: the student's shape.
      read: the tensors.
      name: how they are called.
      where: the file or folder, for errors.

    Raises:
      UserError: a tensor is missing or of another shape.
    """

    def tensor(source: str, transposed: bool, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = read(source)
        except KeyError:
            raise UserError(f"{where}: no tensor {source!r}; is it a T5 of this kind?") from None
        array = np.asarray(array).astype(np.float32, copy=False)
        array = array.T if transposed else array
        if array.shape != shape:
            raise UserError(
                f"{where}: a checkpoint of another size: {source} is {array.shape}, "
                f"the student's is {shape}"
            )
        return array

    def leaf(path: tuple, abstract: jax.ShapeDtypeStruct) -> np.ndarray:
        names = tuple(p.key for p in path)
        if "layers" not in names:
            return tensor(*name(names, None), abstract.shape)
        out = np.empty(abstract.shape, np.float32)
        for i in range(len(out)):
            out[i] = tensor(*name(names, i), abstract.shape[1:])
        return out

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))
