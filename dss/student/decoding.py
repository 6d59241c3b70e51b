"""Decoding with a key-value cache: greedy, beam search, and the likelihood of given labels.

The encoder and the keys and values of the cross-attention are computed once. Target positions are
decoded in stages, each a loop in a program of its own that ends as soon as every row has ended: a
cache is no longer than its stage needs, and the next stage leaves out rows that have ended.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dss.student.config import T5Config
from dss.student.network import T5, Attention, Layer, bind
from dss.student.ops import additive_mask, attend

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
NEVER = -1e9  # the score of a hypothesis that must not win
CHUNK = 128  # ids whose best one is looked at first; T5 vocabularies are multiples of it
STAGE = 16  # positions of the first stage, in which most labels end; each one doubles them
LEAST = 16  # rows; fewer take as long, most of which reading the weights takes
SLOTS = 4  # labels take multiples of this, so that programs are of few sizes
PARTS = 8  # of a batch; rows are left out by them, so that programs are of few sizes


class Cache(NamedTuple):
    """Keys and values of one decoder layer, [B, H, positions, K] each."""

    keys: jax.Array
    values: jax.Array


def _input_segments(inputs: jax.Array) -> jax.Array:
    """Returns [B, S]: 1 up to each row's last token that is not padding, then 0."""
    return jnp.cumsum(inputs[:, ::-1] != 0, axis=1)[:, ::-1].clip(max=1)


def _layers(model: T5) -> list[Layer]:
    """Returns the decoder's layers one by one: a loop over tokens then finds each in its place,
    where a scan would copy its parameters and its cache for every token.
    """
    definition, params = model.decoder.split_layers()
    depth = model.config.num_decoder_layers
    return [nnx.merge(definition, jax.tree.map(lambda x, i=i: x[i], params)) for i in range(depth)]


def _heads(attention: Attention, x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """Returns x [B, S, D] through a kernel, [B, H, S, K]."""
    return attention.project(x, kernel).swapaxes(1, 2)


def _cross_cache(layer: Layer, encoded: jax.Array) -> Cache:
    cross = layer.cross
    return Cache(_heads(cross, encoded, cross.key), _heads(cross, encoded, cross.value))


def _empty_caches(config: T5Config, batch: int, positions: int) -> list[Cache]:
    shape = (batch, config.num_heads, positions, config.d_kv)
    empty = functools.partial(jnp.zeros, shape, config.dtype)
    return [Cache(empty(), empty()) for _ in range(config.num_decoder_layers)]


class Source(NamedTuple):
    """What decoding reads at every step."""

    crossed: list[Cache]  # of the encoder's output, a layer each
    mask: jax.Array  # [B, 1, 1, S], see `additive_mask`: the inputs that are no padding


def _step(
    model: T5,
    layers: list[Layer],
    source: Source,
    tokens: jax.Array,
    t: jax.Array,
    caches: list[Cache],
    ancestors: jax.Array,
) -> tuple[jax.Array, list[Cache]]:
    """Decodes one position of N hypotheses a row.

    The hypotheses of a row are the queries of one attention, over the same inputs and over the
    positions of all of them; which of these are a hypothesis's own past, `ancestors` says. So a
    search never moves what is cached.

    Args:
      model: the student.
      layers: of its decoder.
      source: the inputs.
      tokens: [B, N], the ids at position t.
      t: the position, [].
      caches: a layer each, of the positions before t: P * N, N neighbours for a position.
      ancestors: [B, N, T], the hypothesis that wrote each position of a hypothesis's past; T is at
        least P.

    Returns:
      Logits [B, N, V] of the next token and the caches with position t.
    """
    decoder, (B, N, _) = model.decoder, ancestors.shape
    P = caches[0].keys.shape[2] // N
    positions = jnp.arange(P)
    bias = jnp.repeat(decoder.bias(t[None], positions), N, axis=-1)
    own = ancestors[:, :, :P, None] == jnp.arange(N)  # [B, N, P, N]
    past = additive_mask((own & (positions <= t)[:, None]).reshape(B, 1, N, P * N))

    def cached(layer: Layer, y: jax.Array, cache: Cache) -> Cache:
        kernels = (layer.attention.key, layer.attention.value)
        new = (_heads(layer.attention, y, kernel) for kernel in kernels)
        update = jax.lax.dynamic_update_slice_in_dim
        return Cache(*(update(c, n, t * N, 2) for c, n in zip(cache, new, strict=True)))

    def look(attention: Attention, y: jax.Array, cache: Cache, bias, mask) -> jax.Array:
        query = _heads(attention, y, attention.query)
        found = attend(query, cache.keys, cache.values, bias, mask)
        return attention.combine(found.swapaxes(1, 2))

    x, out = model.embed(tokens), []
    for layer, cache, crossed in zip(layers, caches, source.crossed, strict=True):
        y = layer.norm(x, layer.attention_norm)
        out.append(cached(layer, y, cache))
        x += look(layer.attention, y, out[-1], bias, past)
        x += look(layer.cross, layer.norm(x, layer.cross_norm), crossed, None, source.mask)
        x += layer.mlp(layer.norm(x, layer.mlp_norm))
    return model.logits(decoder.final_norm(x)), out


class Greedy(NamedTuple):
    """The state of greedy decoding."""

    t: jax.Array  # [], tokens decoded
    row: jax.Array  # [B], which of the inputs this is
    tokens: jax.Array  # [B, 1, T]
    scores: jax.Array  # [B], their summed log-probability
    open: jax.Array  # [B], whether the output goes on
    caches: list[Cache]

    @property
    def best(self) -> tuple[jax.Array, jax.Array]:
        """The outputs [B, T] and their scores [B]."""
        return self.tokens[:, 0], self.scores


class Beams(NamedTuple):
    """The state of a beam search, N beams a row."""

    t: jax.Array  # [], tokens decoded
    row: jax.Array  # [B], which of the inputs this is
    tokens: jax.Array  # [B, N, T], running hypotheses
    scores: jax.Array  # [B, N], their summed log-probability
    ancestors: jax.Array  # [B, N, T], see `_step`
    done_tokens: jax.Array  # [B, N, T], finished hypotheses
    done_scores: jax.Array  # [B, N], their mean log-probability a token; NEVER where there is none
    open: jax.Array  # [B], whether a running hypothesis may still beat a finished one
    caches: list[Cache]

    @property
    def best(self) -> tuple[jax.Array, jax.Array]:
        """The best finished hypotheses [B, T] and their scores [B]."""
        return self.done_tokens[:, 0], self.done_scores[:, 0]


def _positions(state: Greedy | Beams) -> int:
    """Returns how many positions the caches have room for."""
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
    """Returns the best output of each input.

    Beam search scores a finished hypothesis by its mean log-probability a token, EOS counted, and
    ends for a row when no running hypothesis can beat its worst finished one at today's length, or
    its best one at any length.

    Args:
      config: the student's shape.
      params: its parameters.
      inputs: [B, S] ids, EOS included, then 0.
      max_length: longest output in tokens, EOS counted.
      num_beams: hypotheses a row; 1 is greedy.
      start: the id that outputs start from; a task that the decoder is told of has its own.
      stop: False to decode `max_length` tokens whatever they are (for measuring).

    Returns:
      Tokens [B, max_length] int32, EOS included and 0 after it, and their scores [B] float32: the
      sum of log-probabilities (greedy) or the mean a token (beams).
    """
    inputs = jnp.asarray(inputs)
    size, positions = len(inputs), min(STAGE, max_length)
    part = max(size // PARTS, LEAST // 2)
    alone = len(inputs.devices()) == 1  # of rows on several, each device keeps its share
    source, (state, found, left) = _first_stage(
        config,
        params,
        inputs,
        start,
        max_length=max_length,
        num_beams=num_beams,
        positions=positions,
        stop=stop,
    )
    while positions < max_length and (running := int(left)) > 0:
        positions = min(2 * positions, max_length)
        if alone:
            size = min(size, max(-(-running // part) * part, LEAST))
        source, state = _refit(source, state, size=size, positions=positions)
        state, found, left = _next_stage(config, params, source, state, found, stop=stop)
    return found


class Stage(NamedTuple):
    """What a stage ends with."""

    state: Greedy | Beams
    found: tuple[jax.Array, jax.Array]  # outputs so far and their scores, of all inputs
    left: jax.Array  # [], how many rows are open


def _decode(
    model: T5,
    layers: list[Layer],
    source: Source,
    state: Greedy | Beams,
    found: tuple[jax.Array, jax.Array],
    start: jax.Array | int,
    stop: bool,
) -> Stage:
    """Decodes until the caches are full or no row is open; `found` is of all inputs."""
    step = _greedy_step if isinstance(state, Greedy) else _beam_step
    step = functools.partial(step, model, layers, source, start, stop)
    positions = _positions(state)
    state = jax.lax.while_loop(lambda s: (s.t < positions) & s.open.any(), step, state)
    tokens, scores = (x.at[state.row].set(y) for x, y in zip(found, state.best, strict=True))
    return Stage(state, (tokens, scores), state.open.sum())


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
    """Returns the encoded inputs and what is decoded at the first positions."""
    model = bind(config, params)
    layers, segments = _layers(model), _input_segments(inputs)
    encoded = model.encode(inputs, segments)
    crossed = [_cross_cache(layer, encoded) for layer in layers]
    source = Source(crossed, additive_mask((segments > 0)[:, None, None]))
    B, N, T = len(inputs), num_beams, max_length
    t, row, opened = jnp.zeros((), jnp.int32), jnp.arange(B), jnp.ones(B, bool)
    tokens, caches = jnp.zeros((B, N, T), jnp.int32), _empty_caches(config, B, N * positions)
    found = tokens[:, 0], jnp.zeros(B, jnp.float32)
    state: Greedy | Beams
    if N == 1:
        state = Greedy(t, row, tokens, found[1], opened, caches)
    else:
        first = jnp.where(jnp.arange(N) == 0, 0.0, NEVER)  # the beams start equal: keep one
        scores, done_scores = jnp.broadcast_to(first, (B, N)), jnp.full((B, N), NEVER)
        state = Beams(t, row, tokens, scores, tokens, tokens, done_scores, opened, caches)
    return source, _decode(model, layers, source, state, found, start, stop)


@functools.partial(jax.jit, static_argnames=("config", "stop"), donate_argnames=("state", "found"))
def _next_stage(
    config: T5Config,
    params: Any,
    source: Source,
    state: Greedy | Beams,
    found: tuple[jax.Array, jax.Array],
    *,
    stop: bool,
) -> Stage:
    """Returns what is decoded up to the positions that a state has room for."""
    model = bind(config, params)
    return _decode(model, _layers(model), source, state, found, START, stop)


def _refit(
    source: Source, state: Greedy | Beams, *, size: int, positions: int
) -> tuple[Source, Greedy | Beams]:
    """Returns `size` of the rows, those that are open among them, with room for positions.

    The state's caches are taken from it, one layer after another: few are there twice.
    """
    more = (positions - _positions(state)) * state.tokens.shape[1]
    rows = None if size == len(state.row) else jnp.argsort(~state.open)[:size]
    old, state = state.caches, state._replace(caches=[])
    caches = [_taken(old.pop(0), rows, more) for _ in range(len(old))]
    source, state = _taken((source, state), rows)
    return source, state._replace(caches=caches)


@functools.partial(jax.jit, static_argnames="more")
def _taken(tree: Any, rows: jax.Array | None, more: int = 0) -> Any:
    """Returns some rows of a tree of arrays, or all, with `more` positions where it is a cache."""

    def taken(x: jax.Array) -> jax.Array:
        x = x if rows is None or x.ndim == 0 else x[rows]
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x

    return jax.tree.map(taken, tree)


def _argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the greatest of x [..., V] and where it is first: two reductions that a CPU does in
    vectors, which it cannot do with `argmax`.
    """
    best = x.max(axis=-1)
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return best, jnp.where(x == best[..., None], places, x.shape[-1] - 1).min(axis=-1)


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
    chosen, best = _argmax(logits)
    chosen -= jax.nn.logsumexp(logits, axis=-1)
    best, chosen = jnp.where(s.open, best, 0), jnp.where(s.open, chosen, 0.0)
    return s._replace(
        t=s.t + 1,
        tokens=s.tokens.at[:, 0, s.t].set(best),
        scores=s.scores + chosen,
        open=s.open & ~(stop & (best == EOS)),
        caches=caches,
    )


def _take(array: jax.Array, beams: jax.Array) -> jax.Array:
    """Returns [B, M, ...]: of each row of [B, N, ...] the beams [B, M]."""
    index = beams.reshape(*beams.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def best_continuations(
    logits: jax.Array, scores: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the continuations with the greatest log-probability.

    The best ones are among the chunks of the vocabulary with the greatest maxima, so that only
    those are searched.

    Args:
      logits: [B, N, V].
      scores: [B, N] of the hypotheses so far.
      count: M, how many are wanted.

    Returns:
      Scores, hypotheses and ids, [B, M] each, best first.
    """
    B, _, V = logits.shape
    chunk = CHUNK if V % CHUNK == 0 else 1
    base = scores - jax.nn.logsumexp(logits, axis=-1)
    chunks = logits.reshape(B, -1, chunk)
    bases = jnp.repeat(base, V // chunk, axis=1)  # of each chunk
    which = jnp.sort(jax.lax.top_k(chunks.max(axis=-1) + bases, count)[1], axis=-1)
    near = _take(chunks, which) + _take(bases, which)[..., None]
    best, index = jax.lax.top_k(near.reshape(B, -1), count)
    flat = _take(which, index // chunk) * chunk + index % chunk
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
    # 2 N continuations hold at least N that do not end here.
    scores, parents, ids = best_continuations(logits, s.scores, 2 * N)
    tokens = _take(s.tokens, parents).at[:, :, s.t].set(ids)
    ends = (stop & (ids == EOS)) | (s.t == T - 1)

    kept_scores, kept = jax.lax.top_k(jnp.where(ends, scores + NEVER, scores), N)

    # Only an end among the N best counts; the others stand by to continue.
    counts = ends & (jnp.arange(2 * N) < N) & s.open[:, None]
    finished = jnp.where(counts, scores / (s.t + 1), NEVER)
    all_scores = jnp.concatenate([s.done_scores, finished], axis=1)
    done_scores, best = jax.lax.top_k(all_scores, N)
    done_tokens = _take(jnp.concatenate([s.done_tokens, tokens], axis=1), best)
    best_running = kept_scores[:, 0]
    return s._replace(
        t=s.t + 1,
        tokens=_take(tokens, kept),
        scores=kept_scores,
        ancestors=_take(ancestors, _take(parents, kept)),
        done_tokens=done_tokens,
        done_scores=done_scores,
        open=s.open
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

    Each input is encoded once. Its candidates lie one after another in the decoder's slots, a row
    of self-attention each; the start token, from which all go on, is there once.

    Args:
      config: the student's shape.
      params: its parameters.
      inputs: [B, S] ids, EOS included, then 0.
      candidates: [B, C, T] ids, EOS included, then 0; a row of zeros is no candidate.
      num_slots: of the decoder, see `candidate_slots`; None for room for C candidates of T tokens.

    Returns:
      [B, C] float32; minus infinity where there is no candidate.
    """
    B, C, T = candidates.shape
    M = 1 + C * (T - 1) if num_slots is None else num_slots
    model = bind(config, params)
    segments = _input_segments(inputs)
    encoded = model.encode(inputs, segments)
    # The slot in which each token is predicted: a row of attention for each candidate.
    sizes = (candidates != 0).sum(axis=-1)[..., None]
    ends = 1 + jnp.cumsum((sizes - 1).clip(min=0), axis=1)
    t = jnp.arange(T)
    slots = jnp.where(t < sizes, jnp.where(t > 0, ends - sizes + t, 0), M)
    before = jnp.pad(candidates, ((0, 0), (0, 0), (1, 0)), constant_values=START)[:, :, :-1]
    row = jnp.arange(B)[:, None, None]
    tokens = jnp.zeros((B, M), candidates.dtype).at[row, slots].set(before, mode="drop")
    used = jnp.zeros((B, M), jnp.int32).at[row, slots].set(1, mode="drop")
    logits = model.logits(model.decode(encoded, tokens, used, segments, slots))
    chosen = logits[row, slots, candidates] - jax.nn.logsumexp(logits, axis=-1)[row, slots]
    scores = jnp.where(candidates != 0, chosen, 0).sum(axis=-1)
    return jnp.where(sizes[..., 0] > 0, scores, -jnp.inf)


def candidate_slots(candidates: Sequence[Sequence[Sequence[int]]]) -> int:
    """Returns how many slots of the decoder `score_candidates` needs for the candidates of inputs.

    Those of an input share the first one, and no EOS is read, so that a label of n tokens takes
    n - 1 more.

    Args:
      candidates: of each input, their ids, EOS included.
    """
    most = max((1 + sum(len(ids) - 1 for ids in offered) for offered in candidates), default=1)
    return -(-most // SLOTS) * SLOTS
