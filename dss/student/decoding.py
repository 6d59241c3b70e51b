"""Decoding with a key-value cache: greedy, beam search, and the likelihood of given labels.

The encoder and the keys and values of the cross-attention are computed once. The loop over target
positions ends as soon as every row has ended.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dss.student.config import T5Config
from dss.student.network import T5, attend, bind

__all__ = ["Beams", "Cache", "generate", "score_candidates"]

START, EOS = 0, 1
NEVER = -1e9  # the score of a hypothesis that must not win


class Cache(NamedTuple):
    """Keys and values of the decoder's layers, [L, B, H, positions, K] each."""

    keys: jax.Array
    values: jax.Array


def _input_segments(inputs: jax.Array) -> jax.Array:
    """Returns [B, S]: 1 up to each row's last token that is not padding, then 0."""
    return jnp.cumsum(inputs[:, ::-1] != 0, axis=1)[:, ::-1].clip(max=1)


def _cross_cache(model: T5, encoded: jax.Array) -> Cache:
    definition, params = model.decoder.split_layers()

    def layer(_, params: nnx.State) -> tuple[None, Cache]:
        cross = nnx.merge(definition, params).cross
        sides = (cross.project(encoded, kernel) for kernel in (cross.key, cross.value))
        return None, Cache(*(side.swapaxes(1, 2) for side in sides))

    return jax.lax.scan(layer, None, params)[1]


def _empty_cache(config: T5Config, rows: int, length: int) -> Cache:
    shape = (config.num_decoder_layers, rows, config.num_heads, length, config.d_kv)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _step(
    model: T5, tokens: jax.Array, t: jax.Array, cache: Cache, cross: Cache, mask: jax.Array
) -> tuple[jax.Array, Cache]:
    """Decodes one position.

    Args:
      model: the student.
      tokens: [B], the ids at position t.
      t: the position, [].
      cache: of the positions before t.
      cross: of the encoder's output.
      mask: [B, 1, 1, S] bool, the inputs that are no padding.

    Returns:
      Logits [B, V] of the next token and the cache with position t.
    """
    decoder, length = model.decoder, cache.keys.shape[3]
    positions = jnp.arange(length)
    bias = decoder.bias(t[None], positions)
    past = (positions <= t)[None, None]
    definition, params = decoder.split_layers()

    def layer(x: jax.Array, inputs) -> tuple[jax.Array, Cache]:
        params, cached, crossed = inputs
        block = nnx.merge(definition, params)
        own, over = block.attention, block.cross
        y = block.norm(x, block.attention_norm)
        new = [own.project(y, kernel).swapaxes(1, 2) for kernel in (own.key, own.value)]
        cached = Cache(
            *(
                jax.lax.dynamic_update_slice_in_dim(c, n, t, 2)
                for c, n in zip(cached, new, strict=True)
            )
        )
        query = own.project(y, own.query).swapaxes(1, 2)
        x += own.combine(attend(query, cached.keys, cached.values, bias, past).swapaxes(1, 2))
        query = over.project(block.norm(x, block.cross_norm), over.query).swapaxes(1, 2)
        x += over.combine(attend(query, crossed.keys, crossed.values, None, mask).swapaxes(1, 2))
        x += block.mlp(block.norm(x, block.mlp_norm))
        return x, cached

    x, cache = jax.lax.scan(layer, model.embed(tokens)[:, None], (params, cache, cross))
    return model.logits(decoder.final_norm(x))[:, 0], cache


@functools.partial(jax.jit, static_argnames=("config", "max_length", "num_beams", "stop"))
def generate(
    config: T5Config,
    params: Any,
    inputs: jax.Array,
    *,
    max_length: int,
    num_beams: int = 1,
    stop: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Returns the best output of each input.

    Beam search scores a finished hypothesis by its mean log-probability a token, EOS counted, and
    ends for a row when no running hypothesis can beat its worst finished one at today's length.

    Args:
      config: the student's shape.
      params: its parameters.
      inputs: [B, S] ids, EOS included, then 0.
      max_length: longest output in tokens, EOS counted.
      num_beams: hypotheses a row; 1 is greedy.
      stop: False to decode `max_length` tokens whatever they are (for measuring).

    Returns:
      Tokens [B, max_length] int32, EOS included and 0 after it, and their scores [B] float32: the
      sum of log-probabilities (greedy) or the mean a token (beams).
    """
    model = bind(config, params)
    segments = _input_segments(inputs)
    encoded = model.encode(inputs, segments)
    mask = (segments > 0)[:, None, None]
    cross = _cross_cache(model, encoded)
    if num_beams == 1:
        return _greedy(model, cross, mask, max_length, stop)
    repeat = functools.partial(jnp.repeat, repeats=num_beams)
    cross = Cache(repeat(cross.keys, axis=1), repeat(cross.values, axis=1))
    return _beam_search(model, cross, repeat(mask, axis=0), max_length, num_beams, stop)


def _greedy(
    model: T5, cross: Cache, mask: jax.Array, max_length: int, stop: bool
) -> tuple[jax.Array, jax.Array]:
    rows = mask.shape[0]

    def running(state) -> jax.Array:
        t, _, _, ended, _, _ = state
        return (t < max_length) & ~(stop & ended.all())

    def step(state):
        t, tokens, last, ended, scores, cache = state
        logits, cache = _step(model, last, t, cache, cross, mask)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        chosen = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        best, chosen = jnp.where(ended, 0, best), jnp.where(ended, 0.0, chosen)
        tokens = tokens.at[:, t].set(best)
        ended |= stop & (best == EOS)
        return t + 1, tokens, best, ended, scores + chosen, cache

    state = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((rows, max_length), jnp.int32),
        jnp.full(rows, START, jnp.int32),
        jnp.zeros(rows, bool),
        jnp.zeros(rows, jnp.float32),
        _empty_cache(model.config, rows, max_length),
    )
    _, tokens, _, _, scores, _ = jax.lax.while_loop(running, step, state)
    return tokens, scores


class Beams(NamedTuple):
    """The state of a beam search, N beams a row."""

    t: jax.Array  # [], tokens decoded
    tokens: jax.Array  # [B, N, T], running hypotheses
    scores: jax.Array  # [B, N], their summed log-probability
    cache: Cache  # of the running hypotheses, [L, B * N, H, T, K]
    done_tokens: jax.Array  # [B, N, T], finished hypotheses
    done_scores: jax.Array  # [B, N], their mean log-probability a token; NEVER where there is none
    open: jax.Array  # [B], whether a running hypothesis may still beat a finished one


def _take(array: jax.Array, beams: jax.Array) -> jax.Array:
    """Returns [B, M, ...]: of each row of [B, N, ...] the beams [B, M]."""
    index = beams.reshape(*beams.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def _beam_search(
    model: T5, cross: Cache, mask: jax.Array, max_length: int, num_beams: int, stop: bool
) -> tuple[jax.Array, jax.Array]:
    N, B = num_beams, mask.shape[0] // num_beams

    def running(s: Beams) -> jax.Array:
        return (s.t < max_length) & s.open.any()

    def step(s: Beams) -> Beams:
        last = jnp.where(s.t > 0, s.tokens[:, :, jnp.maximum(s.t - 1, 0)], START)
        logits, cache = _step(model, last.reshape(-1), s.t, s.cache, cross, mask)
        log_probs = jax.nn.log_softmax(logits).reshape(B, N, -1) + s.scores[:, :, None]
        V = log_probs.shape[-1]
        # 2 N continuations hold at least N that do not end here.
        scores, index = jax.lax.top_k(log_probs.reshape(B, -1), 2 * N)
        parents, ids = index // V, (index % V).astype(jnp.int32)
        tokens = _take(s.tokens, parents).at[:, :, s.t].set(ids)
        ends = (stop & (ids == EOS)) | (s.t == max_length - 1)

        kept_scores, kept = jax.lax.top_k(jnp.where(ends, scores + NEVER, scores), N)
        flat = (jnp.arange(B)[:, None] * N + _take(parents, kept)).reshape(-1)
        cache = Cache(*(c[:, flat] for c in cache))

        # Only an end among the N best counts; the others stand by to continue.
        counts = ends & (jnp.arange(2 * N) < N) & s.open[:, None]
        finished = jnp.where(counts, scores / (s.t + 1), NEVER)
        all_scores = jnp.concatenate([s.done_scores, finished], axis=1)
        done_scores, best = jax.lax.top_k(all_scores, N)
        done_tokens = _take(jnp.concatenate([s.done_tokens, tokens], axis=1), best)
        worst = done_scores.min(axis=1)
        still = s.open & (kept_scores[:, 0] / (s.t + 1) > worst)
        return Beams(
            s.t + 1, _take(tokens, kept), kept_scores, cache, done_tokens, done_scores, still
        )

    zeros = jnp.zeros((B, N, max_length), jnp.int32)
    first = jnp.where(jnp.arange(N) == 0, 0.0, NEVER)  # the beams start equal: keep one
    end = jax.lax.while_loop(
        running,
        step,
        Beams(
            jnp.zeros((), jnp.int32),
            zeros,
            jnp.broadcast_to(first, (B, N)),
            _empty_cache(model.config, B * N, max_length),
            zeros,
            jnp.full((B, N), NEVER),
            jnp.ones(B, bool),
        ),
    )
    return end.done_tokens[:, 0], end.done_scores[:, 0]


@functools.partial(jax.jit, static_argnames="config")
def score_candidates(
    config: T5Config, params: Any, inputs: jax.Array, candidates: jax.Array
) -> jax.Array:
    """Returns the log-probability of each candidate output; each input is encoded once.

    Args:
      config: the student's shape.
      params: its parameters.
      inputs: [B, S] ids, EOS included, then 0.
      candidates: [B, C, T] ids, EOS included, then 0; a row of zeros is no candidate.

    Returns:
      [B, C] float32; minus infinity where there is no candidate.
    """
    B, C, T = candidates.shape
    model = bind(config, params)
    segments = _input_segments(inputs)
    encoded = jnp.repeat(model.encode(inputs, segments), C, axis=0)
    targets = candidates.reshape(B * C, T)
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    hidden = model.decode(encoded, shifted, jnp.ones_like(targets), jnp.repeat(segments, C, axis=0))
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    scores = jnp.sum(jnp.where(targets != 0, chosen, 0), axis=-1)
    return jnp.where((targets != 0).any(axis=-1), scores, -jnp.inf).reshape(B, C)
