"""The operations of the network for XLA:CPU: the same values, written for its compiler.

XLA:CPU fuses softmax and transposes badly, and reduces some shapes slowly; these forms avoid that.
The plain ones in dss/student/ops.py define all arguments.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh

from dss.student.ops import PRODUCT, Ops, dropout

__all__ = [
    "COMPILER_OPTIONS",
    "CPU",
    "argmax",
    "attend",
    "linear",
    "ops_for",
    "product_of_transpose",
    "rms_norm",
    "transposed",
]

COMPILER_OPTIONS = {"xla_backend_optimization_level": 2}  # 3 compiles longer to no faster code


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # saves only its inputs
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Returns RMS norm of x [..., D].

    x is reshaped to [tokens, D], because XLA:CPU reduces arrays with a leading axis of 1, such as
    a single group, many times slower.
    """
    tokens = x.reshape(-1, x.shape[-1])
    wide = tokens.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return ((wide * inverse).astype(x.dtype) * scale.astype(x.dtype)).reshape(x.shape)


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

    The weights are rematerialized in the backward pass. The leading axes are merged into one, as in
    `rms_norm`.
    """
    shape = query.shape
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
    # The sum over B is a product with ones, which is much faster than a reduction.
    dbias = jnp.tensordot(jnp.ones(len(wide), wide.dtype), wide, 1)
    return dquery, dkey, dvalue, dbias, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def transposed(x: jax.Array, dims: int, batch: int = 0) -> jax.Array:
    """Returns x [*B, *N, *I] transposed to [*B, *I, *N], as the left operand of a product.

    The transpose is materialized by a call that XLA does not inline, because XLA:CPU's fast matrix
    products need it in memory. Otherwise XLA picks a slower product, lets the product copy its
    other operand, or fuses the transpose with the computation of x, which is several times slower.

    Args:
      x: array of any rank.
      dims: number of dimensions I.
      batch: number of dimensions B.
    """

    def swap(x: jax.Array) -> jax.Array:
        axes = list(range(x.ndim))
        return x.transpose(axes[:batch] + axes[x.ndim - dims :] + axes[batch : x.ndim - dims])

    with set_xla_metadata(inlineable="false"):
        return jax.jit(swap)(x)


def linear(x: jax.Array, kernel: jax.Array, dims: int = 1) -> jax.Array:
    """Returns the product of x [..., *I] and kernel [*I, *O], [..., *O]; I are `dims` dimensions.

    The kernel's gradient is custom, to use `transposed`.
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


def product_of_transpose(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x^T y [I, O], float32, of x [N, I] and y [N, O]."""
    return jnp.dot(transposed(x, 1), y, preferred_element_type=jnp.float32)


def argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the maximum of x [..., V] over the last axis and its first index.

    XLA:CPU vectorizes these two reductions, but not `jax.numpy.argmax`.
    """
    best = x.max(axis=-1)
    indices = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return best, jnp.where(x == best[..., None], indices, x.shape[-1] - 1).min(axis=-1)


PLAIN = Ops()
CPU = Ops(
    rms_norm=rms_norm,
    attend=attend,
    linear=linear,
    product_of_transpose=product_of_transpose,
    argmax=argmax,
)


def ops_for(mesh: Mesh | None = None) -> Ops:
    """Returns the operations for the platform of a mesh; None: for the default devices."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return CPU if platform == "cpu" else PLAIN
