"""Decoding with a key-value cache: greedy, beam search, and the log-likelihood of given labels.

The encoder and the keys and values of cross-attention are computed once. Target positions are
decoded in stages. Each stage is a compiled loop that stops when all sequences are finished. Caches
are only as long as their stage needs, and finished sequences are dropped between stages.
Labels are chosen by `Predictor` in dss/evaluation/evaluator.py.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dss.student.config import T5Config
from dss.student.network import T5, Attention, Layer, bind
from dss.student.ops import additive_mask

__all__ = [
    "Beams",
    "Cache",
    "Greedy",
    "Source",
    "Stage",
    "best_continuations",
    "candidate_slots",
    "generate",
    "score_candidates",
]

START, EOS = 0, 1
NEVER = -1e9  # score of a hypothesis that must never be selected
CHUNK = 128  # token ids per chunk of the vocabulary; T5 vocabulary sizes are multiples of it
STAGE = 16  # positions of the first stage, enough for most labels; each later stage doubles them
MIN_BATCH = 16  # sequences; smaller batches are no faster, as reading the weights dominates
SLOT_MULTIPLE = 4  # decoder slots of candidates are padded to a multiple of this; few shapes
BATCH_PARTS = 8  # batches shrink by multiples of an eighth between stages; few shapes


class Cache(NamedTuple):
    """Keys and values of one decoder layer, [B, H, positions, K] each."""

    keys: jax.Array
    values: jax.Array


def _input_segments(inputs: jax.Array) -> jax.Array:
    """Returns segment ids [B, S]: 1 up to the last token that is not padding, then 0."""
    return jnp.cumsum(inputs[:, ::-1] != 0, axis=1)[:, ::-1].clip(max=1)


def _layers(model: T5) -> list[Layer]:
    """Returns the decoder's layers as a list.

    A scan over stacked layers would copy each layer's parameters and cache for every token.
    """
    definition, params = model.decoder.split_layers()
    depth = model.config.num_decoder_layers
    return [nnx.merge(definition, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(depth)]


def _project_heads(attention: Attention, x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """Returns the projection of x [B, S, D] by a kernel, [B, H, S, K]."""
    return attention.project(x, kernel).swapaxes(1, 2)


def _cross_cache(layer: Layer, encoded: jax.Array) -> Cache:
    cross = layer.cross
    kernels = (cross.key, cross.value)
    return Cache(*(_project_heads(cross, encoded, kernel) for kernel in kernels))


def _empty_caches(config: T5Config, batch: int, positions: int) -> list[Cache]:
    shape = (batch, config.num_heads, positions, config.d_kv)
    empty = functools.partial(jnp.zeros, shape, config.dtype)
    return [Cache(empty(), empty()) for _ in range(config.num_decoder_layers)]


class Source(NamedTuple):
    """Encoded inputs, as every decoding step reads them."""

    cross_caches: list[Cache]  # keys and values of the encoder's output, one cache per layer
    mask: jax.Array  # [B, 1, 1, S], additive mask of the inputs' padding


def _step(
    model: T5,
    layers: list[Layer],
    source: Source,
    tokens: jax.Array,
    t: jax.Array,
    caches: list[Cache],
    ancestors: jax.Array,
) -> tuple[jax.Array, list[Cache]]:
    """Decodes one position of N hypotheses per sequence.

    The N hypotheses of a sequence are queries of one attention over the cached positions of all N;
    `ancestors` masks the positions outside a hypothesis's past. Beam search therefore never
    reorders the caches.

    Args:
      model: the student.
      layers: the decoder's layers.
      source: the encoded inputs.
      tokens: ids at position t, [B, N].
      t: the position, [].
      caches: self-attention caches, one per layer, of P * N entries: N adjacent ones per position.
      ancestors: index of the hypothesis that wrote each past position, [B, N, T]; T >= P.

    Returns:
      Logits of the next token [B, N, V], and the caches with position t added.
    """
    decoder, (B, N, _) = model.decoder, ancestors.shape
    P = caches[0].keys.shape[2] // N
    positions = jnp.arange(P)
    bias = jnp.repeat(decoder.bias(t[None], positions), N, axis=-1)
    is_ancestor = ancestors[:, :, :P, None] == jnp.arange(N)  # [B, N, P, N]
    past = additive_mask((is_ancestor & (positions <= t)[:, None]).reshape(B, 1, N, P * N))

    def update_cache(layer: Layer, y: jax.Array, cache: Cache) -> Cache:
        kernels = (layer.attention.key, layer.attention.value)
        new = (_project_heads(layer.attention, y, kernel) for kernel in kernels)
        update = jax.lax.dynamic_update_slice_in_dim
        return Cache(*(update(c, n, t * N, 2) for c, n in zip(cache, new, strict=True)))

    def attend_to(attention: Attention, y: jax.Array, cache: Cache, bias, mask) -> jax.Array:
        query = _project_heads(attention, y, attention.query)
        heads = model.ops.attend(query, cache.keys, cache.values, bias, mask)
        return attention.combine(heads.swapaxes(1, 2))

    x, new_caches = model.embed(tokens), []
    for layer, cache, cross_cache in zip(layers, caches, source.cross_caches, strict=True):
        y = layer.norm(x, layer.attention_norm)
        new_caches.append(update_cache(layer, y, cache))
        x += attend_to(layer.attention, y, new_caches[-1], bias, past)
        y = layer.norm(x, layer.cross_norm)
        x += attend_to(layer.cross, y, cross_cache, None, source.mask)
        x += layer.mlp(layer.norm(x, layer.mlp_norm))
    return model.logits(decoder.final_norm(x)), new_caches


class Greedy(NamedTuple):
    """The state of greedy decoding."""

    t: jax.Array  # [], positions decoded
    input_index: jax.Array  # [B], index of each sequence's input
    tokens: jax.Array  # [B, 1, T]
    scores: jax.Array  # [B], summed log-probability
    active: jax.Array  # [B], whether the sequence is unfinished
    caches: list[Cache]

    @property
    def best(self) -> tuple[jax.Array, jax.Array]:
        """The outputs [B, T] and their scores [B]."""
        return self.tokens[:, 0], self.scores


class Beams(NamedTuple):
    """The state of a beam search with N beams per sequence."""

    t: jax.Array  # [], positions decoded
    input_index: jax.Array  # [B], index of each sequence's input
    tokens: jax.Array  # [B, N, T], running hypotheses
    scores: jax.Array  # [B, N], summed log-probability of running hypotheses
    ancestors: jax.Array  # [B, N, T], see `_step`
    done_tokens: jax.Array  # [B, N, T], finished hypotheses
    done_scores: jax.Array  # [B, N], mean log-probability per token; NEVER for an empty entry
    active: jax.Array  # [B], whether a running hypothesis can still beat a finished one
    caches: list[Cache]

    @property
    def best(self) -> tuple[jax.Array, jax.Array]:
        """The best finished hypotheses [B, T] and their scores [B]."""
        return self.done_tokens[:, 0], self.done_scores[:, 0]


def _positions(state: Greedy | Beams) -> int:
    """Returns the number of positions that the caches can store."""
    return state.caches[0].keys.shape[2] // state.tokens.shape[1]


def generate(
    config: T5Config,
    params: Any,
    inputs: jax.Array,
    *,
    max_length: int,
    num_beams: int = 1,
    start: int = START,
    stop: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Decodes the best output of each input.

    Beam search scores a finished hypothesis by its mean log-probability per token, EOS included. A
    sequence is finished when no running hypothesis can beat its worst finished one at the current
    length, or its best one at any length.

    Args:
      config: the student's configuration.
      params: the student's parameters.
      inputs: token ids, EOS included, padded with 0, [B, S].
      max_length: maximum output length in tokens, EOS included.
      num_beams: hypotheses per sequence; 1 is greedy decoding.
      start: decoder start id; tasks that share one encoder pass differ in it.
      stop: whether sequences end at EOS; False always decodes `max_length` tokens (benchmarks).

    Returns:
      Tokens [B, max_length] int32, EOS included, padded with 0, and their scores [B] float32: the
      summed log-probability (greedy) or its mean per token (beam search).
    """
    inputs = jnp.asarray(inputs)
    size, positions = len(inputs), min(STAGE, max_length)
    part = max(size // BATCH_PARTS, MIN_BATCH // 2)
    # Sequences sharded over several devices stay there: dropping some would move the others.
    can_shrink = len(inputs.devices()) == 1
    source, (state, outputs, num_active) = _first_stage(
        config,
        params,
        inputs,
        start,
        max_length=max_length,
        num_beams=num_beams,
        positions=positions,
        stop=stop,
    )
    while positions < max_length and (remaining := int(num_active)) > 0:
        positions = min(2 * positions, max_length)
        if can_shrink:
            size = min(size, max(-(-remaining // part) * part, MIN_BATCH))
        source, state = _resize(source, state, size=size, positions=positions)
        state, outputs, num_active = _next_stage(config, params, source, state, outputs, stop=stop)
    return outputs


class Stage(NamedTuple):
    """Result of a decoding stage."""

    state: Greedy | Beams
    outputs: tuple[jax.Array, jax.Array]  # tokens and scores so far, of all inputs
    num_active: jax.Array  # [], number of unfinished sequences


def _decode(
    model: T5,
    layers: list[Layer],
    source: Source,
    state: Greedy | Beams,
    outputs: tuple[jax.Array, jax.Array],
    start: jax.Array | int,
    stop: bool,
) -> Stage:
    """Decodes until the caches are full or all sequences are finished; `outputs` has all inputs."""
    step = _greedy_step if isinstance(state, Greedy) else _beam_step
    step = functools.partial(step, model, layers, source, start, stop)
    positions = _positions(state)
    state = jax.lax.while_loop(lambda s: (s.t < positions) & s.active.any(), step, state)
    tokens, scores = (
        x.at[state.input_index].set(y) for x, y in zip(outputs, state.best, strict=True)
    )
    return Stage(state, (tokens, scores), state.active.sum())


@functools.partial(
    jax.jit, static_argnames=("config", "max_length", "num_beams", "positions", "stop")
)
def _first_stage(
    config: T5Config,
    params: Any,
    inputs: jax.Array,
    start: jax.Array | int,
    *,
    max_length: int,
    num_beams: int,
    positions: int,
    stop: bool,
) -> tuple[Source, Stage]:
    """Encodes the inputs and decodes the first stage."""
    model = bind(config, params)
    layers, segments = _layers(model), _input_segments(inputs)
    encoded = model.encode(inputs, segments)
    cross_caches = [_cross_cache(layer, encoded) for layer in layers]
    source = Source(cross_caches, additive_mask((segments > 0)[:, None, None]))
    B, N, T = len(inputs), num_beams, max_length
    t, index, active = jnp.zeros((), jnp.int32), jnp.arange(B), jnp.ones(B, bool)
    tokens, caches = jnp.zeros((B, N, T), jnp.int32), _empty_caches(config, B, N * positions)
    outputs = tokens[:, 0], jnp.zeros(B, jnp.float32)
    state: Greedy | Beams
    if N == 1:
        state = Greedy(t, index, tokens, outputs[1], active, caches)
    else:
        # The beams start out equal: all but one are disabled.
        first = jnp.where(jnp.arange(N) == 0, 0.0, NEVER)
        scores, done_scores = jnp.broadcast_to(first, (B, N)), jnp.full((B, N), NEVER)
        state = Beams(t, index, tokens, scores, tokens, tokens, done_scores, active, caches)
    return source, _decode(model, layers, source, state, outputs, start, stop)


@functools.partial(
    jax.jit, static_argnames=("config", "stop"), donate_argnames=("state", "outputs")
)
def _next_stage(
    config: T5Config,
    params: Any,
    source: Source,
    state: Greedy | Beams,
    outputs: tuple[jax.Array, jax.Array],
    *,
    stop: bool,
) -> Stage:
    """Decodes up to the positions that the state's caches can store."""
    model = bind(config, params)
    return _decode(model, _layers(model), source, state, outputs, START, stop)


def _resize(
    source: Source, state: Greedy | Beams, *, size: int, positions: int
) -> tuple[Source, Greedy | Beams]:
    """Keeps `size` sequences, all unfinished ones among them, and grows caches to `positions`.

    The state's list of caches is emptied layer by layer, so that few caches exist twice at a time.
    """
    growth = (positions - _positions(state)) * state.tokens.shape[1]
    kept = None if size == len(state.input_index) else jnp.argsort(~state.active)[:size]
    old, state = state.caches, state._replace(caches=[])
    caches = [_select(old.pop(0), kept, growth) for _ in range(len(old))]
    source, state = _select((source, state), kept)
    return source, state._replace(caches=caches)


@functools.partial(jax.jit, static_argnames="growth")
def _select(tree: Any, indices: jax.Array | None, growth: int = 0) -> Any:
    """Returns some sequences (None: all) of a tree of arrays; pads caches by `growth` entries."""

    def select(x: jax.Array) -> jax.Array:
        x = x if indices is None or x.ndim == 0 else x[indices]
        return jnp.pad(x, ((0, 0), (0, 0), (0, growth), (0, 0))) if growth else x

    return jax.tree.map(select, tree)


def _greedy_step(
    model: T5,
    layers: list[Layer],
    source: Source,
    start: jax.Array | int,
    stop: bool,
    s: Greedy,
) -> Greedy:
    last = jnp.where(s.t > 0, s.tokens[:, :, jnp.maximum(s.t - 1, 0)], start)
    logits, caches = _step(model, layers, source, last, s.t, s.caches, jnp.zeros_like(s.tokens))
    logits = logits[:, 0]
    log_prob, token = model.ops.argmax(logits)
    log_prob -= jax.nn.logsumexp(logits, axis=-1)
    token, log_prob = jnp.where(s.active, token, 0), jnp.where(s.active, log_prob, 0.0)
    return s._replace(
        t=s.t + 1,
        tokens=s.tokens.at[:, 0, s.t].set(token),
        scores=s.scores + log_prob,
        active=s.active & ~(stop & (token == EOS)),
        caches=caches,
    )


def _gather_beams(array: jax.Array, beams: jax.Array) -> jax.Array:
    """Gathers the beams [B, M] of each sequence of an array [B, N, ...], [B, M, ...]."""
    index = beams.reshape(*beams.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def best_continuations(
    logits: jax.Array, scores: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the continuations with the highest log-probability.

    The M best continuations lie in the M chunks of the vocabulary with the highest maxima; only
    those chunks are searched.

    Args:
      logits: logits of the next token, [B, N, V].
      scores: summed log-probability of each hypothesis, [B, N].
      count: M, number of continuations.

    Returns:
      Scores, hypothesis indices and token ids, [B, M] each, best first.
    """
    B, _, V = logits.shape
    chunk = CHUNK if V % CHUNK == 0 else 1
    base = scores - jax.nn.logsumexp(logits, axis=-1)
    chunks = logits.reshape(B, -1, chunk)
    bases = jnp.repeat(base, V // chunk, axis=1)  # one per chunk
    best_chunks = jnp.sort(jax.lax.top_k(chunks.max(axis=-1) + bases, count)[1], axis=-1)
    totals = _gather_beams(chunks, best_chunks) + _gather_beams(bases, best_chunks)[..., None]
    best, index = jax.lax.top_k(totals.reshape(B, -1), count)
    flat = _gather_beams(best_chunks, index // chunk) * chunk + index % chunk
    return best, flat // V, (flat % V).astype(jnp.int32)


def _beam_step(
    model: T5,
    layers: list[Layer],
    source: Source,
    start: jax.Array | int,
    stop: bool,
    s: Beams,
) -> Beams:
    _, N, T = s.tokens.shape
    last = jnp.where(s.t > 0, s.tokens[:, :, jnp.maximum(s.t - 1, 0)], start)
    ancestors = s.ancestors.at[:, :, s.t].set(jnp.arange(N))
    logits, caches = _step(model, layers, source, last, s.t, s.caches, ancestors)
    # Each hypothesis has one EOS continuation: at least N of the 2 N best do not end here.
    scores, parents, ids = best_continuations(logits, s.scores, 2 * N)
    tokens = _gather_beams(s.tokens, parents).at[:, :, s.t].set(ids)
    ends = (stop & (ids == EOS)) | (s.t == T - 1)

    kept_scores, kept = jax.lax.top_k(jnp.where(ends, scores + NEVER, scores), N)

    # As in transformers, a hypothesis finishes only if its end is among the N best.
    finishes = ends & (jnp.arange(2 * N) < N) & s.active[:, None]
    finished = jnp.where(finishes, scores / (s.t + 1), NEVER)
    all_scores = jnp.concatenate([s.done_scores, finished], axis=1)
    done_scores, best = jax.lax.top_k(all_scores, N)
    done_tokens = _gather_beams(jnp.concatenate([s.done_tokens, tokens], axis=1), best)
    best_running = kept_scores[:, 0]
    return s._replace(
        t=s.t + 1,
        tokens=_gather_beams(tokens, kept),
        scores=kept_scores,
        ancestors=_gather_beams(ancestors, _gather_beams(parents, kept)),
        done_tokens=done_tokens,
        done_scores=done_scores,
        active=s.active
        & (best_running / (s.t + 1) > done_scores[:, -1])
        & (best_running / T > done_scores[:, 0]),
        caches=caches,
    )


@functools.partial(jax.jit, static_argnames=("config", "num_slots"))
def score_candidates(
    config: T5Config,
    params: Any,
    inputs: jax.Array,
    candidates: jax.Array,
    num_slots: int | None = None,
) -> jax.Array:
    """Returns the log-probability of each candidate output.

    Each input is encoded once. Its candidates are packed into one decoder sequence, one attention
    row per candidate, and share the slot of the start token.

    Args:
      config: the student's configuration.
      params: the student's parameters.
      inputs: token ids, EOS included, padded with 0, [B, S].
      candidates: token ids, EOS included, padded with 0, [B, C, T]; all zeros for no candidate.
      num_slots: number of decoder slots, see `candidate_slots`; None: enough for any C candidates
        of T tokens.

    Returns:
      Log-probabilities [B, C] float32; minus infinity for no candidate.
    """
    B, C, T = candidates.shape
    M = 1 + C * (T - 1) if num_slots is None else num_slots
    model = bind(config, params)
    segments = _input_segments(inputs)
    encoded = model.encode(inputs, segments)
    # The slot that predicts each token, [B, C, T]: one attention row per candidate.
    sizes = (candidates != 0).sum(axis=-1)[..., None]
    ends = 1 + jnp.cumsum((sizes - 1).clip(min=0), axis=1)
    t = jnp.arange(T)
    slots = jnp.where(t < sizes, jnp.where(t > 0, ends - sizes + t, 0), M)
    shifted = jnp.pad(candidates, ((0, 0), (0, 0), (1, 0)), constant_values=START)[:, :, :-1]
    batch = jnp.arange(B)[:, None, None]
    tokens = jnp.zeros((B, M), candidates.dtype).at[batch, slots].set(shifted, mode="drop")
    used = jnp.zeros((B, M), jnp.int32).at[batch, slots].set(1, mode="drop")
    logits = model.logits(model.decode(encoded, tokens, used, segments, slots))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_probs = logits[batch, slots, candidates] - log_z[batch, slots]
    scores = jnp.where(candidates != 0, log_probs, 0).sum(axis=-1)
    return jnp.where(sizes[..., 0] > 0, scores, -jnp.inf)


def candidate_slots(candidates: Sequence[Sequence[Sequence[int]]]) -> int:
    """Returns the number of decoder slots that `score_candidates` needs for these candidates.

    The candidates of an input share the first slot and EOS is not read, so a candidate of n tokens
    takes n - 1 more slots.

    Args:
      candidates: token ids, EOS included, of each candidate of each input.
    """
    most = max((1 + sum(len(ids) - 1 for ids in labels) for labels in candidates), default=1)
    return -(-most // SLOT_MULTIPLE) * SLOT_MULTIPLE
