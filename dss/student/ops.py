"""What of the network a library or autodiff alone would make slower or larger.

Shapes as in `dss.student.network`: G groups, N slots, R rows of S places, K the last axis.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

__all__ = [
    "PRODUCT",
    "Rows",
    "add_bias",
    "dropout",
    "dropout_seeds",
    "from_rows",
    "linear",
    "rms_norm",
    "to_rows",
    "transposed",
]

PRODUCT = "product"  # the name of what `linear` returns, for `jax.checkpoint_policies`


def _keep(seed: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Returns bools of some shape, each False with probability `rate`; a function of the seed.

    Each element's place is hashed with the seed (two rounds of a 32-bit mixer, Wellons' lowbias32):
    less work than a cryptographic generator, and so cheap that the backward pass draws the same
    mask again instead of keeping it.

    Args:
      seed: [2] uint32.
      shape: of the mask.
      rate: in [0, 1).
    """
    strides = np.cumprod((1, *shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)
    place = functools.reduce(
        jnp.add,
        (jax.lax.broadcasted_iota(jnp.uint32, shape, d) * n for d, n in enumerate(strides)),
    )
    x = place + seed[0]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B) + seed[1]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return (x ^ (x >> 16)) >= np.uint32(round(rate * 2**32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _drop(x: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    return jnp.where(_keep(seed, x.shape, rate), x * (1 / (1 - rate)), 0)


# Dropout is linear: its gradient is the same dropout of the gradient.
_drop.defvjp(
    lambda x, rate, seed: (_drop(x, rate, seed), seed),
    lambda rate, seed, g: (_drop(g, rate, seed), None),
)


def dropout(x: jax.Array, rate: float, seed: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at `rate`, the rest scaled up; x itself without a seed."""
    return x if seed is None or rate == 0 else _drop(x, rate, seed)


def dropout_seeds(key: jax.Array | None, *shape: int) -> jax.Array | None:
    """Returns [*shape, 2] seeds of dropout; none without a key."""
    return None if key is None else jax.random.bits(key, (*shape, 2), jnp.uint32)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # keeps x alone
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm without mean and bias; its statistics are float32.

    It looks at x [..., D] as one list of tokens: a CPU adds up arrays with a first axis of one, as
    the groups of one device are, many times as slowly.
    """
    tokens = x.reshape(-1, x.shape[-1])
    wide = tokens.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return ((wide * inverse).astype(x.dtype) * scale.astype(x.dtype)).reshape(x.shape)


@jax.custom_vjp
def add_bias(scores: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns scores [B, H, T, S] plus a bias [H, T, S] of all B.

    The bias's gradient, a sum over B, is a product with ones, which takes a CPU a small part of the
    time. It is as precise as the sum on what would multiply float32 in fewer bits.
    """
    return scores + bias


def _add_bias_backward(_, g):
    ones = jnp.ones(len(g), g.dtype)
    return g, jnp.tensordot(ones, g, 1, precision=jax.lax.Precision.HIGHEST)


add_bias.defvjp(lambda scores, bias: (scores + bias, None), _add_bias_backward)


def transposed(x: jax.Array, dims: int) -> jax.Array:
    """Returns x [*N, *I] as [*I, *N], where I are `dims` dimensions, to multiply from the left.

    A CPU's product reads it only so. Left to itself XLA writes it out in one loop with what makes
    x, which takes four to seven times as long, or has the product copy all of its other operand; a
    call it keeps as it is.
    """

    def swap(x: jax.Array) -> jax.Array:
        return x.transpose(*range(x.ndim - dims, x.ndim), *range(x.ndim - dims))

    def written(x: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(swap)(x)

    return jax.lax.platform_dependent(x, cpu=written, default=swap)


def linear(x: jax.Array, kernel: jax.Array, dims: int = 1) -> jax.Array:
    """Returns x [..., *I] times kernel [*I, *O], [..., *O], where I are `dims` dimensions.

    The kernel's gradient is written out for the sake of `transposed`. Policies of `jax.checkpoint`
    do not look into a written gradient; they know the result by its name, `PRODUCT`.
    """
    return checkpoint_name(_linear(x, kernel, dims), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, kernel: jax.Array, dims: int) -> jax.Array:
    inputs = tuple(range(x.ndim - dims, x.ndim))
    return jax.lax.dot_general(x, kernel, ((inputs, tuple(range(dims))), ((), ())))


def _linear_backward(dims, saved, g):
    x, kernel = saved
    outputs = kernel.ndim - dims
    ours, theirs = tuple(range(g.ndim - outputs, g.ndim)), tuple(range(dims, kernel.ndim))
    rows = tuple(range(x.ndim - dims))
    dx = jax.lax.dot_general(g, kernel, ((ours, theirs), ((), ())))
    return dx, jnp.tensordot(transposed(x, dims), g, len(rows))


_linear.defvjp(lambda x, kernel, dims: (_linear(x, kernel, dims), (x, kernel)), _linear_backward)


class Rows(NamedTuple):
    """Where attention finds the tokens of flat sequences.

    Everything but attention looks at a token alone, so tokens lie in flat slots, [G, N], one
    sequence after another without padding, in G groups that know nothing of each other. Attention
    lays them out in R rows of S, and its result back, by two gathers that are each other's
    gradient.

    Attributes:
      slots: [G, R, S] int32, the slot that each place of a row reads; N for none.
      places: [G, N, 2] int32, the row and the place in it that read a slot; R, 0 for none.
    """

    slots: jax.Array
    places: jax.Array

    @classmethod
    def of(cls, slots: jax.Array, num_slots: int) -> "Rows":
        """Returns the rows that read some slots, each at most once, out of `num_slots`."""
        _, R, S = slots.shape

        def invert(slots: jax.Array) -> jax.Array:
            none = jnp.array([[R, 0]], jnp.int32)
            places = jnp.stack(jnp.meshgrid(jnp.arange(R), jnp.arange(S), indexing="ij"), -1)
            inverse = jnp.broadcast_to(none, (num_slots, 2))
            return inverse.at[slots].set(places.astype(jnp.int32), mode="drop")

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
    return jax.lax.gather(y, rows.places, numbers, sizes, mode="fill", fill_value=0)


_gather_rows.defvjp(
    lambda x, rows: (_gather_rows(x, rows), rows),
    lambda rows, g: (_gather_slots(g, rows), None),
)
_gather_slots.defvjp(
    lambda y, rows: (_gather_slots(y, rows), rows),
    lambda rows, g: (_gather_rows(g, rows), None),
)


def to_rows(x: jax.Array, rows: Rows | None) -> jax.Array:
    """Returns x [G, N, ..., K] in rows, [G, R, ..., S, K]; without `rows` a group is one row."""
    return jnp.moveaxis(x, 1, -2)[:, None] if rows is None else _gather_rows(x, rows)


def from_rows(y: jax.Array, rows: Rows | None) -> jax.Array:
    """Returns y [G, R, ..., S, K] in slots again, [G, N, ..., K]."""
    return jnp.moveaxis(y[:, 0], -2, 1) if rows is None else _gather_slots(y, rows)
