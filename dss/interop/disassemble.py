"""Splits a student's parameters into another framework's tensors, one at a time."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from dss.interop.assemble import Name
from dss.student.config import T5Config
from dss.student.network import abstract_params

__all__ = ["Leaf", "Params", "disassemble", "placeholders"]

Leaf = tuple[str, ...]
"""A parameter's path in the student, such as ("encoder", "layers", "mlp", "wo")."""

Params = Mapping[Leaf, np.ndarray]
"""Parameters, or arrays of the optimizer's state for each, by path; may be read lazily."""


def placeholders(config: T5Config) -> dict[Leaf, np.ndarray]:
    """Returns zeros in the parameters' shapes, in the student's order, that use no memory."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {
        tuple(p.key for p in path): np.broadcast_to(np.zeros((), x.dtype), x.shape)
        for path, x in leaves
    }


def disassemble(config: T5Config, params: Params, name: Name) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) pairs, parameter by parameter; the inverse of `assemble`.

    Args:
      config: the student's configuration.
      params: the parameters; each is read once, when its tensors are next.
      name: the mapping from parameters to tensor names.
    """
    for path in placeholders(config):
        array = params[path]
        for layer in range(len(array)) if "layers" in path else [None]:
            tensor_name, transposed = name(path, layer)
            tensor = array if layer is None else array[layer]
            yield tensor_name, tensor.T if transposed else tensor
