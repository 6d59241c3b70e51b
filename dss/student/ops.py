"""The operations of the network: plain, for XLA to fuse and autodiff to differentiate.

A CPU computes some of them in its own way, see dss/student/cpu.py; `Ops` has those that the network
calls. Shapes are those of `dss.student.network`: G groups, N slots, R rows of S positions, K last
axis.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

__all__ = [
    "PRODUCT",
    "Ops",
    "Rows",
    "additive_mask",
    "argmax",
    "attend",
    "dropout",
    "dropout_seeds",
    "from_rows",
    "linear",
    "product_of_transpose",
    "rms_norm",
    "to_rows",
]

MASKED = -1e10  # added to masked attention scores; T5X's value
PRODUCT = "product"  # checkpoint name of the output of `linear`, for `jax.checkpoint_policies`


def _random_bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 random bits of a shape, a function of the seed [2] uint32.

    Hashes each element's index with the seed: two rounds of a 32-bit mixer, Wellons' lowbias32.
    This is cheaper to run and to compile than a cryptographic generator, and cheap enough to
    rematerialize dropout masks in the backward pass. The seed is added first, because scans hoist
    subexpressions that do not depend on it out of their loop and keep them as arrays.
    """
    strides = np.cumprod((1, *shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)
    offsets = (np.arange(n, dtype=np.uint32) * by for n, by in zip(shape, strides, strict=True))
    x = functools.reduce(jnp.add, np.ix_(*offsets), seed[0])
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B) + seed[1]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _drop(x: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    keep = _random_bits(seed, x.shape) >= np.uint32(round(rate * 2**32))
    return x * (keep.astype(x.dtype) * (1 / (1 - rate)))


# Dropout is linear: its gradient is dropout of the gradient with the same mask.
_drop.defvjp(
    lambda x, rate, seed: (_drop(x, rate, seed), seed),
    lambda rate, seed, g: (_drop(g, rate, seed), None),
)


def dropout(x: jax.Array, rate: float, seed: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at `rate` and the rest scaled up; x if there is no seed."""
    return x if seed is None or rate == 0 else _drop(x, rate, seed)


def dropout_seeds(seed: jax.Array | None, *shape: int) -> jax.Array | None:
    """Returns dropout seeds [*shape, 2] drawn from one seed [2] uint32; None if that is None."""
    return None if seed is None else _random_bits(seed, (*shape, 2))


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # saves only its inputs
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Returns RMS norm of x [..., D], layer norm without mean and bias; float32 statistics."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)


def additive_mask(visible: jax.Array) -> jax.Array:
    """Returns the float32 mask that `attend` adds to scores: 0 where `visible`, else `MASKED`."""
    return jnp.where(visible, 0.0, MASKED)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rate: float = 0.0,
    seed: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(query key^T + bias + mask) value, [..., H, T, K].

    T5 does not scale the scores. The weights, [..., H, T, S], are rematerialized in the backward
    pass (Dao et al., 2022, FlashAttention, section 3.1).

    Args:
      query: queries, [..., H, T, K].
      key: keys, [..., H, S, K].
      value: values, [..., H, S, K].
      bias: position bias [H, T, S], or None.
      mask: additive mask, [..., 1, T, S].
      rate: dropout rate of the weights.
      seed: dropout seed [2]; None for no dropout.
    """
    return _attend(query, key, value, bias, mask, rate, seed)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=5)
def _attend(query, key, value, bias, mask, rate, seed) -> jax.Array:
    scores = jnp.einsum("...htk,...hsk->...hts", query, key).astype(jnp.float32) + mask
    if bias is not None:
        scores += bias.astype(jnp.float32)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, seed).astype(value.dtype)
    return jnp.einsum("...hts,...hsk->...htk", weights, value)


def linear(x: jax.Array, kernel: jax.Array, dims: int = 1) -> jax.Array:
    """Returns the product of x [..., *I] and kernel [*I, *O], [..., *O]; I are `dims` dimensions.

    The result is named `PRODUCT` for `jax.checkpoint` policies.
    """
    return checkpoint_name(jnp.tensordot(x, kernel, dims), PRODUCT)


def product_of_transpose(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x^T y [I, O], float32, of x [N, I] and y [N, O]: the gradient of a kernel [I, O]."""
    return jnp.tensordot(x, y, (0, 0), preferred_element_type=jnp.float32)


def argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the maximum of x [..., V] over the last axis and its first index."""
    return x.max(axis=-1), jnp.argmax(x, axis=-1)


@dataclasses.dataclass(frozen=True)
class Ops:
    """The operations that a platform may compute in its own way; by default the plain ones."""

    rms_norm: Callable[..., jax.Array] = rms_norm
    attend: Callable[..., jax.Array] = attend
    linear: Callable[..., jax.Array] = linear
    product_of_transpose: Callable[..., jax.Array] = product_of_transpose
    argmax: Callable[..., tuple[jax.Array, jax.Array]] = argmax


class Rows(NamedTuple):
    """Layout of packed tokens in attention rows.

    Only attention mixes tokens, so tokens are packed without padding into flat slots, [G, N], of G
    independent groups. Attention gathers them into R rows of S positions and gathers its output
    back into slots; each gather is the other's gradient.

    Attributes:
      slots: slot that each row position reads, [G, R, S] int32; N for none.
      positions: row and position in it that read each slot, [G, N, 2] int32; (R, 0) for none.
    """

    slots: jax.Array
    positions: jax.Array

    @classmethod
    def of(cls, slots: jax.Array, num_slots: int) -> "Rows":
        """Returns the layout of rows that read `slots` [G, R, S] out of `num_slots`.

        Several positions may read a slot only if they compute the same value and no gradient is
        taken.
        """
        _, R, S = slots.shape

        def invert(slots: jax.Array) -> jax.Array:
            none = jnp.array([[R, 0]], jnp.int32)
            positions = jnp.stack(jnp.meshgrid(jnp.arange(R), jnp.arange(S), indexing="ij"), -1)
            inverse = jnp.broadcast_to(none, (num_slots, 2))
            return inverse.at[slots].set(positions.astype(jnp.int32), mode="drop")

        return cls(slots, jax.vmap(invert)(slots))


@jax.custom_vjp
def _gather_rows(x: jax.Array, rows: Rows) -> jax.Array:
    n = x.ndim
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(*range(2, n - 1), n),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    sizes = (1, 1, *x.shape[2:])
    return jax.lax.gather(x, rows.slots[..., None], numbers, sizes, mode="fill", fill_value=0)


@jax.custom_vjp
def _gather_slots(y: jax.Array, rows: Rows) -> jax.Array:
    n = y.ndim
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(2, n - 1)),
        collapsed_slice_dims=(1, n - 2),
        start_index_map=(1, n - 2),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    sizes = (1, 1, *y.shape[2:-2], 1, y.shape[-1])
    return jax.lax.gather(y, rows.positions, numbers, sizes, mode="fill", fill_value=0)


_gather_rows.defvjp(
    lambda x, rows: (_gather_rows(x, rows), rows),
    lambda rows, g: (_gather_slots(g, rows), None),
)
_gather_slots.defvjp(
    lambda y, rows: (_gather_slots(y, rows), rows),
    lambda rows, g: (_gather_rows(g, rows), None),
)


def to_rows(x: jax.Array, rows: Rows | None) -> jax.Array:
    """Returns x [G, N, ..., K] in rows, [G, R, ..., S, K]; if `rows` is None, one per group."""
    return jnp.moveaxis(x, 1, -2)[:, None] if rows is None else _gather_rows(x, rows)


def from_rows(y: jax.Array, rows: Rows | None) -> jax.Array:
    """Returns y [G, R, ..., S, K] in slots, [G, N, ..., K]; the inverse of `to_rows`."""
    return jnp.moveaxis(y[:, 0], -2, 1) if rows is None else _gather_slots(y, rows)
