"""Custom ops that are faster or smaller than Flax's or autodiff's.

Shapes are those of `dss.student.network`: G groups, N slots, R rows of S positions, K last axis.
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
    """Returns RMS norm of x [..., D], layer norm without mean and bias; float32 statistics.

    x is reshaped to [tokens, D], because XLA:CPU reduces arrays with a leading axis of 1, such as
    a single group, many times slower.
    """
    tokens = x.reshape(-1, x.shape[-1])
    wide = tokens.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return ((wide * inverse).astype(x.dtype) * scale.astype(x.dtype)).reshape(x.shape)


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
    shape = query.shape
    # The leading axes are merged into one, as in `rms_norm`.
    query, key, value, mask = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value, mask))
    bias = None if bias is None else bias.astype(jnp.float32)
    return _attend(query, key, value, bias, mask, rate, seed).reshape(shape)


def _scores(query, key, bias, mask) -> jax.Array:
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key).astype(jnp.float32) + mask
    return scores if bias is None else scores + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, bias, mask, rate, seed) -> jax.Array:
    # The output is divided by the sum, not the weights: fewer divisions, and XLA:CPU fuses the
    # softmax into one loop.
    scores = _scores(query, key, bias, mask)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = dropout(weights, rate, seed).astype(value.dtype)
    output = jnp.einsum("bhts,bhsk->bhtk", weights, value, preferred_element_type=jnp.float32)
    return (output / total).astype(value.dtype)


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
    # The sum over B is a product with ones, which is much faster on a CPU. HIGHEST keeps float32
    # precision on accelerators, whose default products round their inputs.
    ones = jnp.ones(len(wide), wide.dtype)
    dbias = jnp.tensordot(ones, wide, 1, precision=jax.lax.Precision.HIGHEST)
    return dquery, dkey, dvalue, dbias, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def transposed(x: jax.Array, dims: int, batch: int = 0) -> jax.Array:
    """Returns x [*B, *N, *I] transposed to [*B, *I, *N], as the left operand of a product.

    On a CPU the transpose is materialized by a call that XLA does not inline, because XLA:CPU's
    fast matrix products need it in memory. Otherwise XLA picks a slower product, lets the product
    copy its other operand, or fuses the transpose with the computation of x, which is several
    times slower.

    Args:
      x: array of any rank.
      dims: number of dimensions I.
      batch: number of dimensions B.
    """

    def swap(x: jax.Array) -> jax.Array:
        axes = list(range(x.ndim))
        return x.transpose(axes[:batch] + axes[x.ndim - dims :] + axes[batch : x.ndim - dims])

    def materialize(x: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(swap)(x)

    return jax.lax.platform_dependent(x, cpu=materialize, default=swap)


def linear(x: jax.Array, kernel: jax.Array, dims: int = 1) -> jax.Array:
    """Returns the product of x [..., *I] and kernel [*I, *O], [..., *O]; I are `dims` dimensions.

    The kernel's gradient is custom, to use `transposed`. `jax.checkpoint` policies cannot see
    products inside a custom gradient, so the result is named `PRODUCT` for them.
    """
    return checkpoint_name(_linear(x, kernel, dims), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, kernel: jax.Array, dims: int) -> jax.Array:
    inputs = tuple(range(x.ndim - dims, x.ndim))
    return jax.lax.dot_general(x, kernel, ((inputs, tuple(range(dims))), ((), ())))


def _linear_backward(dims, saved, g):
    x, kernel = saved
    outputs = kernel.ndim - dims
    g_axes, kernel_axes = tuple(range(g.ndim - outputs, g.ndim)), tuple(range(dims, kernel.ndim))
    dx = jax.lax.dot_general(g, kernel, ((g_axes, kernel_axes), ((), ())))
    return dx, jnp.tensordot(transposed(x, dims), g, x.ndim - dims)


_linear.defvjp(lambda x, kernel, dims: (_linear(x, kernel, dims), (x, kernel)), _linear_backward)


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
