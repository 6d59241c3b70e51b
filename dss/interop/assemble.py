"""Builds the student's parameters from another framework's tensors, on the mesh, piece by piece."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dss.errors import UserError
from dss.parallel.processes import all_agree
from dss.student.config import T5Config
from dss.student.network import abstract_params

__all__ = ["Name", "Tensors", "assemble"]

Name = Callable[[tuple[str, ...], int | None], tuple[str, bool]]
"""Maps a parameter's path and layer (None outside layers) to its tensor, and if transposed."""


class Tensors(Protocol):
    """The tensors of a checkpoint."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape; raises KeyError where there is none of that name."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a tensor, read from no more than it takes."""


def assemble(
    config: T5Config, tensors: Tensors, name: Name, where: str, shardings: Any = None
) -> Any:
    """Returns parameters as `dss.student.network` lays them out, float32.

    A parameter that holds a tensor of each layer is made where it is to lie, and the layers are
    put into it one after another, so that a host holds its part of one tensor at a time besides
    what lies on its devices. Every process reads its own part.

    Args:
      config: the student's shape.
      tensors: where to read.
      name: how they are called.
      where: the file or folder, for errors.
      shardings: where the parameters are to lie; None: on the first device.

    Raises:
      UserError: in any process a tensor is missing, of another shape, or holds what is no number.
    """

    def tensor(
        source: str, transposed: bool, shape: tuple[int, ...], sharding: Sharding
    ) -> jax.Array:
        try:
            found = tensors.shape(source)
        except KeyError:
            raise UserError(f"{where}: no tensor {source!r}; is it a T5 of this kind?") from None
        if (found[::-1] if transposed else found) != shape:
            raise UserError(
                f"{where}: a checkpoint of another size: {source} is {found}, "
                f"the student's is {shape[::-1] if transposed else shape}"
            )
        parts: dict[str, np.ndarray] = {}  # devices that hold the same part share what was read

        def part(index: Any) -> np.ndarray:  # a slice for each dimension
            if (key := str(index)) not in parts:
                read = tensors.read(source, index[::-1] if transposed else index)
                read = _checked(np.asarray(read), source, where)
                parts[key] = read.T if transposed else read
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, part)

    def leaf(path: tuple, abstract: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        names = tuple(p.key for p in path)
        if "layers" not in names:
            return tensor(*name(names, None), abstract.shape, sharding)
        stack = jax.jit(functools.partial(jnp.zeros, abstract.shape), out_shardings=sharding)()
        put = jax.jit(_put, donate_argnums=0, out_shardings=sharding)
        for i in range(len(stack)):
            layer = tensor(*name(names, i), abstract.shape[1:], _of_a_layer(sharding))
            # Waited for, so that the host holds no more than one layer.
            stack = put(stack, layer, i).block_until_ready()
        return stack

    shapes = abstract_params(config)
    if shardings is None:
        device = jax.local_devices()[0]
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
    params, error = None, None
    try:
        params = jax.tree_util.tree_map_with_path(leaf, shapes, shardings)
    except UserError as caught:
        error = caught
    if not all_agree(error is None):
        raise error or UserError(f"{where}: another process cannot read it")
    return params


def _checked(part: np.ndarray, source: str, where: str) -> np.ndarray:
    """Returns a part of a tensor, float32; raises the user's error if a parameter cannot be so."""
    if not jnp.issubdtype(part.dtype, jnp.floating):
        raise UserError(
            f"{where}: {source} is of {part.dtype}; parameters are of a floating-point type, such "
            "as float32 or bfloat16"
        )
    part = part.astype(np.float32, copy=False)
    # The ends tell of every number that is not finite, and take no memory.
    if not (np.isfinite(part.min()) and np.isfinite(part.max())):
        raise UserError(f"{where}: {source} holds numbers that are not finite (NaN or infinite)")
    return part


def _of_a_layer(sharding: Sharding) -> Sharding:
    """Returns how one layer of a stack lies that lies so."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _put(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    """Returns the stack [L, ...] with its layer i; it takes the stack's memory."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
