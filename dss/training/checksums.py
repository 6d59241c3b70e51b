"""Checksums of arrays, which detect corrupt checkpoints and do not depend on the sharding.

A checkpoint may be written with one sharding and read with another, so checksums of files would not
do. The checksum of an array is the sum, modulo 2^32, of the bits of each element times an odd
number derived from its index: every single flipped bit changes it, and so do swapped elements.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dss.errors import CheckpointError

__all__ = ["check_sums", "checksum", "checksums", "path_names"]

MAX_BLOCKS = 128  # blocks in which a device sums its shard
HOST_BLOCK = 2**20  # elements of a host array that are summed at once


def path_names(path: tuple) -> tuple[str, ...]:
    """Returns the keys along a path in a tree, such as ("encoder", "layers", "mlp_norm")."""
    keys = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return tuple(map(str, keys))


def checksums(tree: Any) -> dict[str, int]:
    """Returns the checksums of a tree of device arrays, by path, with keys joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [array for _, array in leaves]
    sums = _checksums(arrays, tuple(array.sharding for array in arrays))
    names = ["/".join(path_names(path)) for path, _ in leaves]
    return dict(zip(names, map(int, sums), strict=True))


def check_sums(path: Any, sums: dict[str, int], saved: dict[str, int] | None) -> None:
    """Checks that checksums equal the saved ones.

    Args:
      path: path of the arrays, for the error message.
      sums: checksums of the arrays that were read, by name.
      saved: checksums at the time of saving, by name; None if none were saved.

    Raises:
      CheckpointError: if a checksum differs or was not saved.
    """
    for name, value in sums.items():
        if (saved or {}).get(name) != value:
            raise CheckpointError(
                f"{path}: corrupt checkpoint: {name} differs from what was saved; use another "
                "checkpoint"
            )


@functools.partial(jax.jit, static_argnums=1)
def _checksums(arrays: list[jax.Array], shardings: tuple[Sharding, ...]) -> list[jax.Array]:
    return [_checksum(array, sharding) for array, sharding in zip(arrays, shardings, strict=True)]


def _checksum(x: jax.Array, sharding: Sharding) -> jax.Array:
    """Returns the checksum of x; each device sums its own shard."""
    if not isinstance(sharding, NamedSharding):
        return _shard_sum(x, (0,) * x.ndim, x.shape)
    mesh_axes = {axis: names for axis, names in enumerate(sharding.spec) if names is not None}

    def local_sum(shard: jax.Array) -> jax.Array:
        starts = [
            jax.lax.axis_index(mesh_axes[axis]).astype(jnp.uint32) * size
            if axis in mesh_axes
            else 0
            for axis, size in enumerate(shard.shape)
        ]
        return jax.lax.psum(_shard_sum(shard, starts, x.shape), tuple(mesh_axes.values()))

    return jax.shard_map(
        local_sum,
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=PartitionSpec(),
        check_vma=False,
    )(x)


def _shard_sum(shard: jax.Array, starts: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    """Returns the weighted sum over a shard of an array.

    The sum is taken in blocks, because XLA:CPU materializes its operand.

    Args:
      shard: part of the array.
      starts: index of the shard's first element in the array, one number per axis.
      shape: shape of the whole array.
    """
    if not shape:
        shard, starts, shape = shard[None], (0,), (1,)
    blocks = math.gcd(len(shard), MAX_BLOCKS)
    rows = len(shard) // blocks

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(shard, i * rows, rows)
        bits = jax.lax.bitcast_convert_type(block, f"uint{8 * block.dtype.itemsize}")
        index = jnp.zeros(block.shape, jnp.uint32)
        for axis, size in enumerate(shape):
            start = starts[axis] + (i * rows if axis == 0 else 0)
            offset = jax.lax.broadcasted_iota(jnp.uint32, block.shape, axis)
            index = index * np.uint32(size) + offset + jnp.asarray(start, jnp.uint32)
        return total + jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((), jnp.uint32))


def checksum(array: np.ndarray) -> int:
    """Returns the checksum of a host array."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.itemsize}")
    total = 0
    for start in range(0, bits.size, HOST_BLOCK):
        block = bits[start : start + HOST_BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size).astype(np.uint32)
        total += int((block * (2 * index + 1)).sum(dtype=np.uint32))
    return total % 2**32
