"""Checksums of arrays: whether what is read is what was saved, however either lies on a mesh.

Files are written by one layout and read by another, so that no file's checksum would tell of an
array. A checksum here is the sum, modulo 2^32, of each number's bits times an odd number that
tells its place: any one flipped bit changes it, and so do numbers that change places.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dss.errors import UserError

__all__ = ["check_sums", "checksum", "checksums", "path_names"]

PIECE = 2**20  # numbers of an array on the host that are summed at once


def path_names(path: tuple) -> tuple[str, ...]:
    """Returns the names along a path in a tree, such as ("encoder", "layers", "mlp_norm")."""
    keys = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return tuple(map(str, keys))


def checksums(tree: Any) -> dict[str, int]:
    """Returns the checksum of each array of a tree on devices, by its path's names, with "/"."""
    found = jax.tree_util.tree_leaves_with_path(_checksums(tree))
    return {"/".join(path_names(path)): int(value) for path, value in found}


def check_sums(where: Any, found: dict[str, int], saved: dict[str, int] | None) -> None:
    """Raises UserError, with the array's name, where a checksum is not the one that was saved."""
    for name, value in found.items():
        if (saved or {}).get(name) != value:
            raise UserError(
                f"{where}: damaged: {name} is not what was saved; take another checkpoint"
            )


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def checksum(array: np.ndarray) -> int:
    """Returns the checksum of an array on the host."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.itemsize}")
    total = 0
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE].astype(np.uint32)
        place = np.arange(start, start + piece.size).astype(np.uint32)
        total += int((piece * (2 * place + 1)).sum(dtype=np.uint32))
    return total % 2**32
