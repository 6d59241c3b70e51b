"""Builds a student's sharded parameters from another framework's tensors, layer by layer."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dss.errors import CheckpointError, DssError
from dss.parallel.processes import all_agree
from dss.student.config import T5Config
from dss.student.network import abstract_params

__all__ = ["Name", "Tensors", "assemble"]

Name = Callable[[tuple[str, ...], int | None], tuple[str, bool]]
"""Maps a parameter's path and layer (None outside layers) to (tensor name, is transposed)."""


class Tensors(Protocol):
    """Interface of a checkpoint's tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; raises KeyError if there is none of that name."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor, without reading the rest of it."""


def assemble(
    config: T5Config, tensors: Tensors, name: Name, where: str, shardings: Any = None
) -> Any:
    """Returns parameters in the layout of `dss.student.network`, float32.

    A parameter that stacks all layers is allocated on its devices, and the layers are written into
    it one at a time, so that a host holds its part of one tensor besides its devices' arrays. Every
    process reads only its own part.

    Args:
      config: the student's configuration.
      tensors: the checkpoint's tensors.
      name: the mapping from parameters to tensor names.
      where: the file or folder, for messages.
      shardings: the shardings of the parameters; None for the first device.

    Raises:
      CheckpointError: if, in any process, a tensor is missing, has another shape, is not of a
        floating-point type, or holds non-finite values.
    """

    def tensor(
        source: str, transposed: bool, shape: tuple[int, ...], sharding: Sharding
    ) -> jax.Array:
        try:
            source_shape = tensors.shape(source)
        except KeyError:
            raise CheckpointError(
                f"{where}: no tensor {source!r}; is it a T5 with the student's configuration?"
            ) from None
        if (source_shape[::-1] if transposed else source_shape) != shape:
            raise CheckpointError(
                f"{where}: a checkpoint of another size: the shape of {source} is {source_shape}, "
                f"the student's is {shape[::-1] if transposed else shape}"
            )
        parts: dict[str, np.ndarray] = {}  # each slice is read once for all devices that hold it

        def part(index: Any) -> np.ndarray:  # a slice for each dimension
            if (key := str(index)) not in parts:
                values = tensors.read(source, index[::-1] if transposed else index)
                values = _as_float32(np.asarray(values), source, where)
                parts[key] = values.T if transposed else values
            return parts[key]

        return jax.make_array_from_callback(shape, sharding, part)

    def leaf(path: tuple, abstract: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        names = tuple(p.key for p in path)
        if "layers" not in names:
            return tensor(*name(names, None), abstract.shape, sharding)
        stack = jax.jit(functools.partial(jnp.zeros, abstract.shape), out_shardings=sharding)()
        set_layer = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)
        for i in range(len(stack)):
            layer = tensor(*name(names, i), abstract.shape[1:], _layer_sharding(sharding))
            # Blocks, so that the host holds one layer at a time.
            stack = set_layer(stack, layer, i).block_until_ready()
        return stack

    shapes = abstract_params(config)
    if shardings is None:
        device = jax.local_devices()[0]
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), shapes)
    params, error = None, None
    try:
        params = jax.tree_util.tree_map_with_path(leaf, shapes, shardings)
    except DssError as caught:
        error = caught
    if not all_agree(error is None):
        raise error or CheckpointError(f"{where}: another process could not read the checkpoint")
    return params


def _as_float32(part: np.ndarray, source: str, where: str) -> np.ndarray:
    """Returns a part of a tensor in float32.

    Raises:
      CheckpointError: if its type is not floating-point or it holds non-finite values.
    """
    if not jnp.issubdtype(part.dtype, jnp.floating):
        raise CheckpointError(
            f"{where}: {source} has type {part.dtype}; parameters must have a floating-point type, "
            "such as float32 or bfloat16"
        )
    part = part.astype(np.float32, copy=False)
    # The minimum or maximum is non-finite if any value is; this needs no array of flags.
    if not (np.isfinite(part.min()) and np.isfinite(part.max())):
        raise CheckpointError(f"{where}: {source} holds non-finite values (NaN or infinity)")
    return part


def _layer_sharding(sharding: Sharding) -> Sharding:
    """Returns the sharding of one layer, given the sharding of its stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _set_layer(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    """Returns the stack [L, ...] with layer i replaced; `stack` is donated."""
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
