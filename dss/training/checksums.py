"""Checksums of arrays: whether what is read is what was saved, however either lies on a mesh.

Files are written by one layout and read by another, so that no file's checksum would tell of an
array. A checksum here is the sum, modulo 2^32, of each number's bits times an odd number that
tells its place: any one flipped bit changes it, and so do numbers that change places.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dss.errors import UserError

__all__ = ["check_sums", "checksum", "checksums", "path_names"]

BLOCKS = 128  # of an array on a device, at most
PIECE = 2**20  # numbers of an array on the host that are summed at once


def path_names(path: tuple) -> tuple[str, ...]:
    """Returns the names along a path in a tree, such as ("encoder", "layers", "mlp_norm")."""
    keys = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return tuple(map(str, keys))


def checksums(tree: Any) -> dict[str, int]:
    """Returns the checksum of each array of a tree on devices, by its path's names, with "/"."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [array for _, array in found]
    sums = _checksums(arrays, tuple(array.sharding for array in arrays))
    names = ["/".join(path_names(path)) for path, _ in found]
    return dict(zip(names, map(int, sums), strict=True))


def check_sums(where: Any, found: dict[str, int], saved: dict[str, int] | None) -> None:
    """Raises UserError, with the array's name, where a checksum is not the one that was saved."""
    for name, value in found.items():
        if (saved or {}).get(name) != value:
            raise UserError(
                f"{where}: damaged: {name} is not what was saved; take another checkpoint"
            )


@functools.partial(jax.jit, static_argnums=1)
def _checksums(arrays: list[jax.Array], shardings: tuple[Sharding, ...]) -> list[jax.Array]:
    return [_checksum(*both) for both in zip(arrays, shardings, strict=True)]


def _checksum(x: jax.Array, sharding: Sharding) -> jax.Array:
    """Each device sums its own part of x."""
    if not isinstance(sharding, NamedSharding):
        return _sum(x, (0,) * x.ndim, x.shape)
    split = {axis: names for axis, names in enumerate(sharding.spec) if names is not None}

    def local(part: jax.Array) -> jax.Array:
        starts = [
            jax.lax.axis_index(split[axis]).astype(jnp.uint32) * size if axis in split else 0
            for axis, size in enumerate(part.shape)
        ]
        return jax.lax.psum(_sum(part, starts, x.shape), tuple(split.values()))

    whole = PartitionSpec()
    return jax.shard_map(
        local, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=whole, check_vma=False
    )(x)


def _sum(part: jax.Array, starts: Sequence[Any], shape: Sequence[int]) -> jax.Array:
    """Returns the sum over a part of an array of some shape, given where the part starts.

    It goes through the part in blocks: a CPU writes down all that it will sum.
    """
    if not shape:
        part, starts, shape = part[None], (0,), (1,)
    blocks = math.gcd(len(part), BLOCKS)
    rows = len(part) // blocks

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(part, i * rows, rows)
        bits = jax.lax.bitcast_convert_type(block, f"uint{8 * block.dtype.itemsize}")
        place = jnp.zeros(block.shape, jnp.uint32)
        for axis, size in enumerate(shape):
            start = starts[axis] + (i * rows if axis == 0 else 0)
            along = jax.lax.broadcasted_iota(jnp.uint32, block.shape, axis)
            place = place * np.uint32(size) + along + jnp.asarray(start, jnp.uint32)
        return total + jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros((), jnp.uint32))


def checksum(array: np.ndarray) -> int:
    """Returns the checksum of an array on the host."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.itemsize}")
    total = 0
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE].astype(np.uint32)
        place = np.arange(start, start + piece.size).astype(np.uint32)
        total += int((piece * (2 * place + 1)).sum(dtype=np.uint32))
    return total % 2**32
