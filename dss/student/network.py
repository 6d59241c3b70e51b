"""The T5 encoder-decoder (Raffel et al., 2020, section 2.1): one network for all sizes and kinds.

The layers of a stack lie in one array with a leading layer axis and are scanned, so that compile
time does not grow with depth. Dimensions: B batch, R rows, S source, T target, V vocabulary,
D model, H heads, K head size, L layers.

Parameters are a nested dict of float32 arrays; every layer's has the leading axis L:

    embedding [V, D]                    head [D, V]  (where the embeddings are not tied)
    encoder / relative_bias [buckets, H]
    encoder / norm [D]
    encoder / layers / attention_norm [L, D]     attention / query, key, value [L, D, H * K]
                                                 attention / out [L, H * K, D]
                       mlp_norm [L, D]           mlp / wi_0, (wi_1) [L, D, F]   mlp / wo [L, F, D]
    decoder / likewise, with cross_norm and cross / ... in each layer
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dss.student.config import T5Config

__all__ = [
    "T5",
    "Attention",
    "Layer",
    "Mlp",
    "Stack",
    "abstract_params",
    "bind",
    "init_params",
    "logical_axes",
    "num_parameters",
    "relative_buckets",
]

Params = dict[str, Any]
MASKED = -1e10  # the scores that must not count; T5X's value

AXES = {  # logical axes of each parameter; a layer's have "layers" before them
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads"),
    "key": ("embed", "heads"),
    "value": ("embed", "heads"),
    "out": ("heads", "embed"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "relative_bias": ("buckets", "heads"),
    "norm": ("embed",),
    "attention_norm": ("embed",),
    "cross_norm": ("embed",),
    "mlp_norm": ("embed",),
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * stddev)


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at `rate`, the rest scaled up; x itself without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def _keys(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    return [None] * n if key is None else list(jax.random.split(key, n))


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm without mean and bias; its statistics are float32."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype) * scale.astype(x.dtype)


def relative_buckets(
    distance: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the bucket of each distance, key position minus query position.

    Half of the buckets are single distances, the other half grow logarithmically up to
    `max_distance` (Raffel et al., 2020, section 2.1). Both directions share them if bidirectional.

    Args:
      distance: int array of any shape, numpy or traced.
      bidirectional: whether keys after the query have buckets of their own.
      buckets: number of buckets.
      max_distance: all distances from here on fall in the last bucket.
    """
    xp = jnp if isinstance(distance, jax.Array) else np
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = xp.where(distance > 0, buckets, 0)
        distance = abs(distance)
    else:
        distance = xp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = xp.log(xp.maximum(distance, 1).astype(np.float32) / exact) / np.log(
        np.float32(max_distance / exact)
    )
    far = xp.minimum(exact + (ratio * (buckets - exact)).astype(np.int32), buckets - 1)
    return offset + xp.where(distance < exact, distance, far)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array,
    dropout: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Returns softmax(query key^T + bias) value; T5 does not scale the scores.

    Args:
      query: [R, T, H, K].
      key: [R, S, H, K].
      value: [R, S, H, K].
      bias: [1, H, T, S] float32, or None.
      mask: [R, 1, T, S] bool, what may be attended to.
      dropout: applied to the weights.

    Returns:
      [R, T, H, K].
    """
    scores = jnp.einsum("rthk,rshk->rhts", query, key).astype(jnp.float32)
    if bias is not None:
        scores += bias
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1).astype(query.dtype)
    return jnp.einsum("rhts,rshk->rthk", dropout(weights), value)


class Attention(nnx.Module):
    """Multi-head attention without biases or scaling."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.config = config
        D, HK = config.d_model, config.num_heads * config.d_kv
        self.query = _normal(rngs, (D, HK), (D * config.d_kv) ** -0.5)
        self.key = _normal(rngs, (D, HK), D**-0.5)
        self.value = _normal(rngs, (D, HK), D**-0.5)
        self.out = _normal(rngs, (HK, D), HK**-0.5)

    def heads(self, x: jax.Array, kernel: nnx.Param) -> jax.Array:
        """Returns x [..., D] projected to [..., H, K]."""
        y = x @ kernel[...].astype(x.dtype)
        return y.reshape(*x.shape[:-1], self.config.num_heads, self.config.d_kv)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values of x [..., D], each [..., H, K]."""
        return self.heads(x, self.key), self.heads(x, self.value)

    def __call__(self, x, keys, values, bias, mask, dropout_key=None) -> jax.Array:
        """Returns what x [R, T, D] attends to, [R, T, D]; see `_attend`."""
        dropout = functools.partial(_dropout, rate=self.config.dropout_rate, key=dropout_key)
        y = _attend(self.heads(x, self.query), keys, values, bias, mask, dropout)
        return y.reshape(*x.shape[:-1], -1) @ self.out[...].astype(x.dtype)


class Mlp(nnx.Module):
    """The feed-forward layer, gated (Shazeer, 2020) or not."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.config = config
        D, F = config.d_model, config.d_ff
        self.wi_0 = _normal(rngs, (D, F), D**-0.5)
        if config.gated:
            self.wi_1 = _normal(rngs, (D, F), D**-0.5)
        self.wo = _normal(rngs, (F, D), F**-0.5)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Returns the layer's output for x [..., D], [..., D]."""
        hidden = ACTIVATIONS[self.config.activation](x @ self.wi_0[...].astype(x.dtype))
        if self.config.gated:
            hidden *= x @ self.wi_1[...].astype(x.dtype)
        hidden = _dropout(hidden, self.config.dropout_rate, dropout_key)
        return hidden @ self.wo[...].astype(x.dtype)


class Layer(nnx.Module):
    """A layer of either stack: self-attention, cross-attention (decoder only), feed-forward."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, *, decoder: bool):
        self.config, self.is_decoder = config, decoder
        self.attention_norm = nnx.Param(jnp.ones(config.d_model))
        self.attention = Attention(config, rngs)
        if decoder:
            self.cross_norm = nnx.Param(jnp.ones(config.d_model))
            self.cross = Attention(config, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.d_model))
        self.mlp = Mlp(config, rngs)

    def norm(self, x: jax.Array, scale: nnx.Param) -> jax.Array:
        """Returns x normalised before one of the sublayers."""
        return _rms_norm(x, scale[...], self.config.layer_norm_epsilon)

    def __call__(self, x, bias, mask, encoded=None, cross_mask=None, dropout_key=None):
        """Returns x [R, T, D] after the layer, [R, T, D]."""
        keys = iter(_keys(dropout_key, 6))

        def residual(y: jax.Array) -> jax.Array:
            return x + _dropout(y, self.config.dropout_rate, next(keys))

        y = self.norm(x, self.attention_norm)
        x = residual(self.attention(y, *self.attention.keys_values(y), bias, mask, next(keys)))
        if self.is_decoder:
            y = self.norm(x, self.cross_norm)
            attended = self.cross(y, *self.cross.keys_values(encoded), None, cross_mask, next(keys))
            x = residual(attended)
        return residual(self.mlp(self.norm(x, self.mlp_norm), next(keys)))


class Stack(nnx.Module):
    """The encoder or the decoder: scanned layers, a shared position bias, a final norm."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs, *, decoder: bool):
        self.config, self.is_decoder = config, decoder
        depth = config.num_decoder_layers if decoder else config.num_encoder_layers

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def create(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs, decoder=decoder)

        self.layers = create(rngs)
        self.relative_bias = _normal(
            rngs, (config.relative_buckets, config.num_heads), config.d_model**-0.5
        )
        self.norm = nnx.Param(jnp.ones(config.d_model))

    def bias(self, query_positions, key_positions) -> jax.Array:
        """Returns the position bias [1, H, T, S] for positions [T] and [S]."""
        buckets = relative_buckets(
            key_positions[None, :] - query_positions[:, None],
            bidirectional=not self.is_decoder,
            buckets=self.config.relative_buckets,
            max_distance=self.config.relative_max_distance,
        )
        return self.relative_bias[...][buckets].transpose(2, 0, 1)[None]

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Returns x [..., D] normalised after the last layer."""
        return _rms_norm(x, self.norm[...], self.config.layer_norm_epsilon)

    def split_layers(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Returns the definition of one layer and the parameters of all, for a scan."""
        return nnx.split(self.layers)

    def __call__(self, x, mask, encoded=None, cross_mask=None, dropout_key=None) -> jax.Array:
        """Returns x [R, T, D] after the stack, [R, T, D]."""
        rate = self.config.dropout_rate
        first, scanned, last = _keys(dropout_key, 3)
        positions = np.arange(x.shape[1])
        bias = self.bias(positions, positions)
        definition, params = self.split_layers()

        def layer(x: jax.Array, params_key) -> tuple[jax.Array, None]:
            params, key = params_key
            return nnx.merge(definition, params)(x, bias, mask, encoded, cross_mask, key), None

        layer = _remat(layer, self.config.remat)
        depth = jax.tree.leaves(params)[0].shape[0]
        keys = None if scanned is None else jax.random.split(scanned, depth)
        x, _ = jax.lax.scan(layer, _dropout(x, rate, first), (params, keys))
        return _dropout(self.final_norm(x), rate, last)


def _remat(layer: Callable, policy: str) -> Callable:
    if policy == "none":
        return layer
    saveable = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[policy]
    return jax.checkpoint(layer, policy=saveable, prevent_cse=False)


class T5(nnx.Module):
    """The student.

    Args:
      config: its shape.
      rngs: the stream `params` draws the parameters: T5's initialisation (Mesh TensorFlow's),
        normal with the inverse square root of the input width.
    """

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(rngs, (config.vocab_size, config.d_model), 1.0)
        self.encoder = Stack(config, rngs, decoder=False)
        self.decoder = Stack(config, rngs, decoder=True)
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.d_model, config.vocab_size), config.d_model**-0.5)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings of tokens [...], [..., D] in the compute dtype."""
        return self.embedding[...].astype(self.config.dtype)[tokens]

    def encode(
        self, inputs: jax.Array, segment_ids: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the encoded inputs.

        Args:
          inputs: [R, S] ids.
          segment_ids: [R, S], 0 for padding; a token sees its own segment only.
          dropout_key: None for no dropout.

        Returns:
          [R, S, D].
        """
        mask = _same_segment(segment_ids, segment_ids)
        return self.encoder(self.embed(inputs), mask, dropout_key=dropout_key)

    def decode(
        self,
        encoded: jax.Array,
        inputs: jax.Array,
        segment_ids: jax.Array,
        encoder_segment_ids: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the decoder's last hidden states, teacher-forced.

        Args:
          encoded: [R, S, D].
          inputs: [R, T] ids, the targets shifted right.
          segment_ids: [R, T].
          encoder_segment_ids: [R, S]; a segment reads the encoder's segment of the same number.
          dropout_key: None for no dropout.

        Returns:
          [R, T, D].
        """
        causal = np.tri(inputs.shape[1], dtype=bool)
        return self.decoder(
            self.embed(inputs),
            _same_segment(segment_ids, segment_ids) & causal,
            encoded,
            _same_segment(segment_ids, encoder_segment_ids),
            dropout_key,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits [..., V] float32 of hidden states [..., D]."""
        kernel = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        if self.config.scaled_logits:
            hidden = hidden * self.config.d_model**-0.5
        return (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)

    def __call__(
        self,
        encoder_inputs: jax.Array,
        decoder_inputs: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits [R, T, V] of every decoder slot.

        Without segment ids a row is one example: its encoder inputs that are not 0, and all of its
        decoder inputs. See `encode` and `decode` for the arguments.
        """
        if encoder_segment_ids is None:
            encoder_segment_ids = (encoder_inputs != 0).astype(jnp.int32)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_inputs)
        encoder_key, decoder_key = _keys(dropout_key, 2)
        encoded = self.encode(encoder_inputs, encoder_segment_ids, encoder_key)
        hidden = self.decode(
            encoded, decoder_inputs, decoder_segment_ids, encoder_segment_ids, decoder_key
        )
        return self.logits(hidden)


def _same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns [R, 1, T, S]: whether query and key are of one segment and no padding."""
    same = queries[:, :, None] == keys[:, None, :]
    return (same & (keys != 0)[:, None, :])[:, None]


@functools.lru_cache(maxsize=8)
def _abstract(config: T5Config) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: T5(config, nnx.Rngs(0))))


def init_params(config: T5Config, seed: int) -> Params:
    """Returns freshly drawn parameters."""
    create = jax.jit(lambda: nnx.to_pure_dict(nnx.state(T5(config, nnx.Rngs(seed)))))
    return create()


def abstract_params(config: T5Config) -> Params:
    """Returns the parameters' shapes, a tree of `jax.ShapeDtypeStruct`."""
    return nnx.to_pure_dict(_abstract(config)[1])


def bind(config: T5Config, params: Params) -> T5:
    """Returns the network with some parameters; cheap, also while tracing."""
    definition, state = _abstract(config)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(definition, state)


def logical_axes(config: T5Config) -> Params:
    """Returns each parameter's logical axes, a tuple with a name a dimension."""

    def axes(path: tuple, array: jax.ShapeDtypeStruct) -> tuple[str, ...]:
        names = AXES[path[-1].key]
        return ("layers", *names) if array.ndim > len(names) else names

    return jax.tree_util.tree_map_with_path(axes, abstract_params(config))


def num_parameters(config: T5Config) -> int:
    """Returns how many numbers the student holds."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))
