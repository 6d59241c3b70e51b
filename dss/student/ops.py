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
    "additive_mask",
    "attend",
    "dropout",
    "dropout_seeds",
    "from_rows",
    "linear",
    "rms_norm",
    "to_rows",
    "transposed",
]

MASKED = -1e10  # added to scores that must not count; T5X's value
PRODUCT = "product"  # the name of what `linear` returns, for `jax.checkpoint_policies`


def _bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns random bits of some shape, uint32; a function of the seed, [2] uint32.

    Each element's place is hashed with the seed (two rounds of a 32-bit mixer, Wellons' lowbias32):
    less work than a cryptographic generator, to run and to compile, and so cheap that the backward
    pass draws dropout's mask again instead of keeping it. The seed comes first: a scan takes out of
    its loop, and keeps as an array of that shape, what does not depend on it.
    """
    strides = np.cumprod((1, *shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)
    steps = (np.arange(n, dtype=np.uint32) * by for n, by in zip(shape, strides, strict=True))
    x = functools.reduce(jnp.add, np.ix_(*steps), seed[0])
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B) + seed[1]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _drop(x: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    keep = _bits(seed, x.shape) >= np.uint32(round(rate * 2**32))
    return x * (keep.astype(x.dtype) * (1 / (1 - rate)))


# Dropout is linear: its gradient is the same dropout of the gradient.
_drop.defvjp(
    lambda x, rate, seed: (_drop(x, rate, seed), seed),
    lambda rate, seed, g: (_drop(g, rate, seed), None),
)


def dropout(x: jax.Array, rate: float, seed: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at `rate`, the rest scaled up; x itself without a seed."""
    return x if seed is None or rate == 0 else _drop(x, rate, seed)


def dropout_seeds(seed: jax.Array | None, *shape: int) -> jax.Array | None:
    """Returns [*shape, 2] seeds of dropout drawn from one, [2] uint32; none from none."""
    return None if seed is None else _bits(seed, (*shape, 2))


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


def additive_mask(seen: jax.Array) -> jax.Array:
    """Returns what `attend` adds to scores, float32, for bools: what may be attended to."""
    return jnp.where(seen, 0.0, MASKED)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    rate: float = 0.0,
    seed: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(query key^T + bias + mask) value; T5 does not scale the scores.

    Nothing of T x S is kept for the backward pass, which computes the weights again (Dao et al.,
    2022, FlashAttention, section 3.1).

    Args:
      query: [..., H, T, K].
      key: [..., H, S, K].
      value: [..., H, S, K].
      bias: [H, T, S], or None.
      mask: [..., 1, T, S], see `additive_mask`.
      rate: of dropout of the weights.
      seed: [2], or None for no dropout.

    Returns:
      [..., H, T, K].
    """
    shape = query.shape
    # One axis before the heads, see `rms_norm`.
    query, key, value, mask = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value, mask))
    bias = None if bias is None else bias.astype(jnp.float32)
    return _attend(query, key, value, bias, mask, rate, seed).reshape(shape)


def _scores(query, key, bias, mask) -> jax.Array:
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key).astype(jnp.float32) + mask
    return scores if bias is None else scores + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, bias, mask, rate, seed) -> jax.Array:
    # Divided by the sum at the end: less to divide, and a CPU does all of it in one loop.
    scores = _scores(query, key, bias, mask)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = dropout(weights, rate, seed).astype(value.dtype)
    found = jnp.einsum("bhts,bhsk->bhtk", weights, value, preferred_element_type=jnp.float32)
    return (found / total).astype(value.dtype)


def _attend_forward(query, key, value, bias, mask, rate, seed):
    saved = query, key, value, bias, mask, seed
    return _attend(query, key, value, bias, mask, rate, seed), saved


def _attend_backward(rate, saved, g):
    query, key, value, bias, mask, seed = saved
    weights = jax.nn.softmax(_scores(query, key, bias, mask), axis=-1)
    dropped = dropout(weights, rate, seed).astype(g.dtype)
    dvalue = transposed(dropped, 1, batch=2) @ g
    dweights = jnp.einsum("bhtk,bhsk->bhts", g, value).astype(jnp.float32)
    dweights = dropout(dweights, rate, seed)
    wide = weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True))
    dscores = wide.astype(g.dtype)
    dquery = jnp.einsum("bhts,bhsk->bhtk", dscores, key)
    dkey = transposed(dscores, 1, batch=2) @ query
    if bias is None:
        return dquery, dkey, dvalue, None, None, None
    # The sum over B is a product with ones, which takes a CPU a small part of the time. It is as
    # precise as the sum on what would multiply float32 in fewer bits.
    ones = jnp.ones(len(wide), wide.dtype)
    dbias = jnp.tensordot(ones, wide, 1, precision=jax.lax.Precision.HIGHEST)
    return dquery, dkey, dvalue, dbias, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def transposed(x: jax.Array, dims: int, batch: int = 0) -> jax.Array:
    """Returns x [*B, *N, *I] as [*B, *I, *N], where I are `dims` dimensions and B are `batch`, to
    multiply from the left.

    A CPU's fast products read it only so. Left to itself XLA takes a slower one, has the product
    copy all of its other operand, or writes x out in one loop with what makes it, which takes four
    to seven times as long; a call it keeps as it is.
    """

    def swap(x: jax.Array) -> jax.Array:
        axes = list(range(x.ndim))
        return x.transpose(axes[:batch] + axes[x.ndim - dims :] + axes[batch : x.ndim - dims])

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
        """Returns the rows that read some slots out of `num_slots`.

        Each is read at most once, or from places that hold the same, and then has no gradient.
        """
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
