"""The T5 encoder-decoder (Raffel et al., 2020, section 2.1), in all its sizes and variants.

The layers of a stack are stacked arrays with a leading layer axis and are scanned, so compile time
does not grow with depth. Dimensions: B batch, G groups, N encoder slots, M decoder slots, R rows,
S source, T target, V vocabulary, D model, H heads, K head size, F feed-forward, L layers.

Parameters are a nested dict of float32 arrays; those of layers have a leading axis L:

    embedding [V, D]                    head [D, V]  (if embeddings are not tied)
    encoder / relative_bias [buckets, H]
    encoder / norm [D]
    encoder / layers / attention_norm [L, D]     attention / query, key, value [L, D, H * K]
                                                 attention / out [L, H * K, D]
                       mlp_norm [L, D]           mlp / wi_0, (wi_1) [L, D, F]   mlp / wo [L, F, D]
    decoder / likewise, with cross_norm and cross / ... in each layer
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dss.student.config import AXES, T5Config
from dss.student.cpu import ops_for
from dss.student.ops import (
    PRODUCT,
    Ops,
    Rows,
    additive_mask,
    dropout,
    dropout_seeds,
    from_rows,
    to_rows,
)

__all__ = [
    "T5",
    "Attention",
    "CrossInputs",
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

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * stddev)


def _seeds(seed: jax.Array | None, n: int) -> list[jax.Array | None]:
    seeds = dropout_seeds(seed, n)
    return [None] * n if seeds is None else list(seeds)


def relative_buckets(
    distance: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the relative position bucket of each distance.

    Half of the buckets hold one distance each; the other half grow logarithmically up to
    `max_distance` (Raffel et al., 2020, section 2.1). If bidirectional, each direction has half of
    the buckets.

    Args:
      distance: key position minus query position, an int array of any shape, numpy or traced.
      bidirectional: whether keys after the query have separate buckets.
      buckets: number of buckets.
      max_distance: distance from which on all distances share the last bucket.
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


class Attention(nnx.Module):
    """Multi-head attention without bias terms or scaling of the scores."""

    def __init__(self, config: T5Config, ops: Ops, rngs: nnx.Rngs):
        self.config, self.ops = config, ops
        D, HK = config.d_model, config.num_heads * config.d_kv
        self.query = _normal(rngs, (D, HK), (D * config.d_kv) ** -0.5)
        self.key = _normal(rngs, (D, HK), D**-0.5)
        self.value = _normal(rngs, (D, HK), D**-0.5)
        self.out = _normal(rngs, (HK, D), HK**-0.5)

    def project(self, x: jax.Array, kernel: nnx.Param) -> jax.Array:
        """Returns the projection of x [G, N, D] by a kernel, split into heads, [G, N, H, K]."""
        H, K = self.config.num_heads, self.config.d_kv
        return self.ops.linear(x, kernel[...].astype(x.dtype).reshape(-1, H, K))

    def combine(self, y: jax.Array) -> jax.Array:
        """Returns the output projection of the heads' outputs y [G, N, H, K], [G, N, D]."""
        H, K = self.config.num_heads, self.config.d_kv
        return self.ops.linear(y, self.out[...].astype(y.dtype).reshape(H, K, -1), 2)

    def __call__(self, x, rows, encoded, encoded_rows, bias, mask, seed=None) -> jax.Array:
        """Returns the attention output, [G, M, D].

        Args:
          x: input of the queries, [G, M, D].
          rows: layout of x in attention rows; None: one row per group.
          encoded: input of the keys and values, [G, N, D]: x, or the encoder's output.
          encoded_rows: layout of `encoded` in attention rows; None: one row per group.
          bias: position bias [H, T, S], or None.
          mask: additive mask, [G, R, 1, T, S].
          seed: dropout seed [2], or None.
        """
        query = to_rows(self.project(x, self.query), rows)
        key = to_rows(self.project(encoded, self.key), encoded_rows)
        value = to_rows(self.project(encoded, self.value), encoded_rows)
        y = self.ops.attend(query, key, value, bias, mask, self.config.dropout_rate, seed)
        return self.combine(from_rows(y, rows))


class Mlp(nnx.Module):
    """The feed-forward layer, with or without a gate (Shazeer, 2020)."""

    def __init__(self, config: T5Config, ops: Ops, rngs: nnx.Rngs):
        self.config, self.ops = config, ops
        D, F = config.d_model, config.d_ff
        self.wi_0 = _normal(rngs, (D, F), D**-0.5)
        if config.gated:
            self.wi_1 = _normal(rngs, (D, F), D**-0.5)
        self.wo = _normal(rngs, (F, D), F**-0.5)

    def __call__(self, x: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Returns the output [..., D] for x [..., D]."""
        kernels = [self.wi_0, self.wi_1] if self.config.gated else [self.wi_0]
        inner = [self.ops.linear(x, kernel[...].astype(x.dtype)) for kernel in kernels]

        # The hidden activations [..., F] are rematerialized; only `inner` is saved.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def finish(inner: list[jax.Array], wo: jax.Array, seed: jax.Array | None) -> jax.Array:
            hidden = ACTIVATIONS[self.config.activation](inner[0])
            for gate in inner[1:]:
                hidden *= gate
            return self.ops.linear(dropout(hidden, self.config.dropout_rate, seed), wo)

        return finish(inner, self.wo[...].astype(x.dtype), seed)


class CrossInputs(NamedTuple):
    """What the cross-attention of a decoder layer reads."""

    query_rows: Rows | None  # layout of the decoder's residual stream; None: one row per group
    encoded: jax.Array  # [G, N, D], the encoder's output
    encoded_rows: Rows | None  # layout of the encoder's output
    mask: jax.Array  # [G, Q, 1, T, C], additive


# The dropout seeds of a layer, in their order: inside each sublayer, and of its output.
DECODER_SEEDS = ("attention_inner", "attention", "cross_inner", "cross", "mlp_inner", "mlp")
ENCODER_SEEDS = ("attention_inner", "attention", "mlp_inner", "mlp")


class Layer(nnx.Module):
    """A layer of either stack: self-attention, cross-attention (decoder only), feed-forward."""

    def __init__(self, config: T5Config, ops: Ops, rngs: nnx.Rngs, *, decoder: bool):
        self.config, self.ops, self.is_decoder = config, ops, decoder
        self.attention_norm = nnx.Param(jnp.ones(config.d_model))
        self.attention = Attention(config, ops, rngs)
        if decoder:
            self.cross_norm = nnx.Param(jnp.ones(config.d_model))
            self.cross = Attention(config, ops, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.d_model))
        self.mlp = Mlp(config, ops, rngs)

    def norm(self, x: jax.Array, scale: nnx.Param) -> jax.Array:
        """Returns x after the norm of a sublayer."""
        return self.ops.rms_norm(x, scale[...], self.config.layer_norm_epsilon)

    def __call__(
        self, x, rows, bias, mask, cross: CrossInputs | None = None, seeds=None
    ) -> jax.Array:
        """Returns the layer's output, [G, N, D].

        Args:
          x: the residual stream, [G, N, D].
          rows: layout of x in attention rows; None: one row per group.
          bias: position bias of self-attention, [H, S, S].
          mask: additive mask of self-attention, [G, R, 1, S, S].
          cross: inputs of cross-attention; None in the encoder.
          seeds: dropout seeds [6, 2], or None.
        """
        names = DECODER_SEEDS if self.is_decoder else ENCODER_SEEDS
        seed = dict(zip(names, [None] * 6 if seeds is None else seeds, strict=False))

        def residual(y: jax.Array, name: str) -> jax.Array:
            return x + dropout(y, self.config.dropout_rate, seed[name])

        y = self.norm(x, self.attention_norm)
        y = self.attention(y, rows, y, rows, bias, mask, seed["attention_inner"])
        x = residual(y, "attention")
        if cross is not None:
            y = self.norm(x, self.cross_norm)
            y = self.cross(
                y,
                cross.query_rows,
                cross.encoded,
                cross.encoded_rows,
                None,
                cross.mask,
                seed["cross_inner"],
            )
            x = residual(y, "cross")
        return residual(self.mlp(self.norm(x, self.mlp_norm), seed["mlp_inner"]), "mlp")


class Stack(nnx.Module):
    """The encoder or the decoder: scanned layers, a shared position bias and a final norm."""

    def __init__(self, config: T5Config, ops: Ops, rngs: nnx.Rngs, *, decoder: bool):
        self.config, self.ops, self.is_decoder = config, ops, decoder
        depth = config.num_decoder_layers if decoder else config.num_encoder_layers

        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def create(rngs: nnx.Rngs) -> Layer:
            return Layer(config, ops, rngs, decoder=decoder)

        self.layers = create(rngs)
        self.relative_bias = _normal(
            rngs, (config.relative_buckets, config.num_heads), config.d_model**-0.5
        )
        self.norm = nnx.Param(jnp.ones(config.d_model))

    def bias(self, query_positions, key_positions) -> jax.Array:
        """Returns the position bias [H, T, S] of query positions [T] and key positions [S]."""
        buckets = relative_buckets(
            key_positions[None, :] - query_positions[:, None],
            bidirectional=not self.is_decoder,
            buckets=self.config.relative_buckets,
            max_distance=self.config.relative_max_distance,
        )
        return self.relative_bias[...][buckets].transpose(2, 0, 1)

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Returns x [..., D] after the stack's final norm."""
        return self.ops.rms_norm(x, self.norm[...], self.config.layer_norm_epsilon)

    def split_layers(self) -> tuple[nnx.GraphDef, nnx.State]:
        """Returns the graph definition of one layer and the stacked parameters of all layers."""
        return nnx.split(self.layers)

    def __call__(
        self, x, rows, mask, cross: CrossInputs | None = None, dropout_seed=None
    ) -> jax.Array:
        """Returns the stack's output [G, N, D] for x [G, N, D]; arguments as of `Layer`."""
        rate = self.config.dropout_rate
        input_seed, layers_seed, output_seed = _seeds(dropout_seed, 3)
        positions = np.arange(mask.shape[-1])
        bias = self.bias(positions, positions)
        definition, params = self.split_layers()

        def layer(x: jax.Array, params_seeds) -> tuple[jax.Array, None]:
            params, seeds = params_seeds
            return nnx.merge(definition, params)(x, rows, bias, mask, cross, seeds), None

        layer = _remat(layer, self.config.remat)
        depth = jax.tree.leaves(params)[0].shape[0]
        x = dropout(x, rate, input_seed)
        x, _ = jax.lax.scan(layer, x, (params, dropout_seeds(layers_seed, depth, 6)))
        return dropout(self.final_norm(x), rate, output_seed)


def _remat(layer: Callable, policy: str) -> Callable:
    if policy == "none":
        return layer
    saveable = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    }[policy]
    return jax.checkpoint(layer, policy=saveable, prevent_cse=False)


class T5(nnx.Module):
    """The T5 student.

    Parameters are initialised as in Mesh TensorFlow's T5: kernels are normally distributed with a
    standard deviation of 1 / sqrt(input width), query kernels also times 1 / sqrt(K).

    Args:
      config: sizes and variant.
      ops: the platform's operations, see `ops_for`.
      rngs: random streams; parameters are drawn from `params`.
    """

    def __init__(self, config: T5Config, ops: Ops, rngs: nnx.Rngs):
        self.config, self.ops = config, ops
        self.embedding = _normal(rngs, (config.vocab_size, config.d_model), 1.0)
        self.encoder = Stack(config, ops, rngs, decoder=False)
        self.decoder = Stack(config, ops, rngs, decoder=True)
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.d_model, config.vocab_size), config.d_model**-0.5)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings [..., D] of tokens [...], in the compute dtype."""
        return self.embedding[...].astype(self.config.dtype)[tokens]

    def encode(
        self,
        inputs: jax.Array,
        segment_ids: jax.Array,
        row_slots: jax.Array | None = None,
        dropout_seed: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the encoder's output, [G, N, D].

        Args:
          inputs: token ids, [G, N].
          segment_ids: segment of each token, 0 for padding, [G, N]; attention stays in a segment.
          row_slots: slots of each attention row, [G, R, S], see `Rows`; None: one row per group.
          dropout_seed: uint32 [2]; None for no dropout.
        """
        rows = None if row_slots is None else Rows.of(row_slots, inputs.shape[1])
        segments = _in_rows(segment_ids, rows)
        mask = additive_mask(_same_segment(segments, segments))
        return self.encoder(self.embed(inputs), rows, mask, dropout_seed=dropout_seed)

    def decode(
        self,
        encoded: jax.Array,
        inputs: jax.Array,
        segment_ids: jax.Array,
        encoder_segment_ids: jax.Array,
        row_slots: jax.Array | None = None,
        cross_slots: jax.Array | None = None,
        dropout_seed: jax.Array | None = None,
        reads: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the decoder's last hidden states with teacher forcing, [G, M, D].

        Args:
          encoded: the encoder's output, [G, N, D].
          inputs: target token ids, shifted right, [G, M].
          segment_ids: segment of each decoder token, 0 for padding, [G, M].
          encoder_segment_ids: segment of each encoder token, 0 for padding, [G, N].
          row_slots: decoder slots of each self-attention row, [G, Q, T]; None: one row per group.
          cross_slots: encoder slots that each of these rows attends to, [G, Q, C]; None: one
            cross-attention row per group.
          dropout_seed: uint32 [2]; None for no dropout.
          reads: encoder segment that each token attends to, [G, M]; None: `segment_ids`.
        """
        rows = None if row_slots is None else Rows.of(row_slots, inputs.shape[1])
        query_rows, encoded_rows = None, None
        if cross_slots is not None:
            query_rows, encoded_rows = rows, Rows.of(cross_slots, encoded.shape[1])
        segments = _in_rows(segment_ids, rows)
        causal = np.tri(segments.shape[-1], dtype=bool)
        read_segments = _in_rows(segment_ids if reads is None else reads, query_rows)
        cross_mask = _same_segment(read_segments, _in_rows(encoder_segment_ids, encoded_rows))
        return self.decoder(
            self.embed(inputs),
            rows,
            additive_mask(_same_segment(segments, segments) & causal),
            CrossInputs(query_rows, encoded, encoded_rows, additive_mask(cross_mask)),
            dropout_seed,
        )

    def head_inputs(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the factors of the logits of hidden states [..., D]: x [..., D] and the LM head.

        x is `hidden`, scaled if the student has `scaled_logits`. The LM head [D, V] has its
        parameter's dtype.
        """
        kernel = self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        scale = self.config.d_model**-0.5 if self.config.scaled_logits else 1
        return hidden * scale, kernel

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits [..., V] float32 of hidden states [..., D]."""
        x, kernel = self.head_inputs(hidden)
        return self.ops.linear(x, kernel.astype(x.dtype)).astype(jnp.float32)

    def hidden(
        self,
        encoder_inputs: jax.Array,
        decoder_inputs: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        dropout_seed: jax.Array | None = None,
        row_slots: tuple[jax.Array | None, ...] = (None, None, None),
        reads: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the decoder's last hidden states, [G, M, D].

        Args:
          encoder_inputs: token ids, [G, N].
          decoder_inputs: target token ids, shifted right, [G, M].
          encoder_segment_ids: segment of each encoder token, [G, N]; None: 1 for nonzero ids.
          decoder_segment_ids: segment of each decoder token, [G, M]; None: 1 for all.
          dropout_seed: uint32 [2]; None for no dropout.
          row_slots: slots of encoder, decoder and cross-attention rows, see `encode` and `decode`.
          reads: encoder segment that each decoder token attends to, see `decode`.
        """
        if encoder_segment_ids is None:
            encoder_segment_ids = (encoder_inputs != 0).astype(jnp.int32)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_inputs)
        encoder_seed, decoder_seed = _seeds(dropout_seed, 2)
        encoder_slots, decoder_slots, cross_slots = row_slots
        encoded = self.encode(encoder_inputs, encoder_segment_ids, encoder_slots, encoder_seed)
        return self.decode(
            encoded,
            decoder_inputs,
            decoder_segment_ids,
            encoder_segment_ids,
            decoder_slots,
            cross_slots,
            decoder_seed,
            reads,
        )

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        """Returns the logits [G, M, V] of all decoder slots; arguments as of `hidden`."""
        return self.logits(self.hidden(*args, **options))


def _in_rows(segment_ids: jax.Array, rows: Rows | None) -> jax.Array:
    """Returns segment ids [G, N] in rows, [G, R, S]; 0 at positions without a slot."""
    return to_rows(segment_ids[..., None], rows)[..., 0]


def _same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns whether query and key are of one segment and not padding, [G, R, 1, T, S]."""
    same = queries[..., :, None] == keys[..., None, :]
    return (same & (keys != 0)[..., None, :])[..., None, :, :]


@functools.lru_cache(maxsize=8)
def _abstract(config: T5Config, ops: Ops) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: T5(config, ops, nnx.Rngs(0))))


def init_params(config: T5Config, seed: int, shardings: Any = None) -> Params:
    """Returns randomly initialised parameters; each device draws only its own shards."""
    draw = jax.jit(_draw_params, static_argnums=0, out_shardings=shardings)
    return draw(config, jax.random.key(seed))


def _draw_params(config: T5Config, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(T5(config, Ops(), nnx.Rngs(key))))


def abstract_params(config: T5Config) -> Params:
    """Returns the parameters' shapes and dtypes, a tree of `jax.ShapeDtypeStruct`."""
    return nnx.to_pure_dict(_abstract(config, Ops())[1])


def bind(config: T5Config, params: Params, ops: Ops | None = None) -> T5:
    """Returns the network with the given parameters; cheap, also while tracing.

    Args:
      config: the student's configuration.
      params: the parameters.
      ops: the operations; None: those for the default devices, see `ops_for`.
    """
    definition, state = _abstract(config, ops_for() if ops is None else ops)
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(definition, state)


def logical_axes(config: T5Config) -> Params:
    """Returns the tree of the parameters' logical axes, tuples with one name per dimension."""

    def axes(path: tuple, array: jax.ShapeDtypeStruct) -> tuple[str, ...]:
        names = AXES[path[-1].key]
        return ("layers", *names) if array.ndim > len(names) else names

    return jax.tree_util.tree_map_with_path(axes, abstract_params(config))


def num_parameters(config: T5Config) -> int:
    """Returns the number of parameters."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))
