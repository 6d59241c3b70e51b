"""The loss of distilling step-by-step: a weighted sum of the tasks' mean losses per target token.

    L = sum_k rate_k * (1 / N_k) * sum over the target tokens of task k of cross entropy

With two tasks at rates alpha and 1 - alpha this is the reference's
`alpha * L_label + (1 - alpha) * L_rationale` (Hsieh et al., 2023, section 3.2, equation 3, in its
weighted form). N_k counts target tokens, EOS included, over the global batch, independently of
sharding, packing and microbatching. The rates are those of the mixture, see `make_mixture` in
dss/mixtures/methods.py, or move from step to step (`ALPHA_END`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dss.student.cpu import ops_for

__all__ = [
    "LossConfig",
    "cross_entropy",
    "head_loss",
    "head_scores",
    "mixture_loss",
    "task_sums",
    "token_counts",
    "token_weights",
]

CHUNK_SLOTS = 1024  # target slots per device whose logits exist at the same time
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of a mixture.

    Attributes:
      num_tasks: K, number of tasks of the mixture.
      rates: rate of each task in the first step; None if sequences are sampled by rate, so that
        all tokens of a batch have the same weight.
      last_rates: rates of the last step, approached linearly; None for constant rates.
      num_steps: number of training steps.
      label_smoothing: weight of the uniform distribution.
      z_loss: weight of (log Z)^2.
    """

    num_tasks: int
    rates: tuple[float, ...] | None
    last_rates: tuple[float, ...] | None = None
    num_steps: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def rates_at(self, step: jax.Array) -> jax.Array | None:
        """Returns the rates of a step (from 0), [K] float32; None if `rates` is None."""
        if self.rates is None:
            return None
        first = jnp.array(self.rates, jnp.float32)
        if self.last_rates is None:
            return first
        progress = step / max(self.num_steps - 1, 1)
        return (1 - progress) * first + progress * jnp.array(self.last_rates, jnp.float32)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Returns the cross entropy of each target token, [...] float32.

        -(1 - s) * log p(target) - s * mean over V of log p + z_loss * (log Z)^2

    Args:
      logits: logits, [..., V] float32.
      targets: target token ids, [...].
      label_smoothing: s, weight of the uniform distribution, in [0, 1).
      z_loss: weight of (log Z)^2, which keeps the log normaliser near 0 (Shazeer et al., 2018, mesh
        TensorFlow).
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - target_logits
    if label_smoothing:
        loss += label_smoothing * (target_logits - logits.mean(axis=-1))
    if z_loss:
        loss += z_loss * log_z**2
    return loss


def task_sums(per_token: jax.Array, task_ids: jax.Array, num_tasks: int) -> jax.Array:
    """Returns the sums of a value over the target tokens of each task, [K].

    Args:
      per_token: value of each token, of any shape.
      task_ids: task of each token, of the same shape: 1 + k for task k, 0 for padding.
      num_tasks: K, number of tasks.
    """
    return jnp.stack(
        [jnp.sum(jnp.where(task_ids == k + 1, per_token, 0)) for k in range(num_tasks)]
    )


def token_counts(task_ids: jax.Array, num_tasks: int) -> jax.Array:
    """Returns N_k, the number of target tokens of each task, [K] float32."""
    return task_sums(jnp.ones(task_ids.shape, jnp.float32), task_ids, num_tasks)


def token_weights(counts: jax.Array, rates: jax.Array | tuple[float, ...] | None) -> jax.Array:
    """Returns the weight of a target token of each task in the loss, [K].

    The weight is `rate_k / N_k`, or 1 / sum of N_k if `rates` is None (sequences are sampled by
    rate, which weights them already).

    Args:
      counts: N_k, number of target tokens of each task, [K].
      rates: rate of each task, [K], or None.
    """
    if rates is None:
        return jnp.ones_like(counts) / jnp.maximum(counts.sum(), 1)
    return jnp.asarray(rates, jnp.float32) / jnp.maximum(counts, 1)


def mixture_loss(
    sums: jax.Array, counts: jax.Array, rates: jax.Array | tuple[float, ...] | None
) -> jax.Array:
    """Returns the loss [], given each task's summed cross entropy [K] and token count [K]."""
    return jnp.sum(token_weights(counts, rates) * sums)


def _chunks(hidden: jax.Array, targets: jax.Array, task_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Splits all slots into n chunks of C slots of nearly equal size: [n, C, D], [n, C], [n, C].

    The last chunk is padded with slots of task id 0.
    """
    n = -(-targets.size // CHUNK_SLOTS)
    size = -(-targets.size // n)

    def split(array: jax.Array) -> jax.Array:
        flat = array.reshape(targets.size, *array.shape[targets.ndim :])
        padding = [(0, n * size - targets.size)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(n, size, *flat.shape[1:])

    return split(hidden), split(targets), split(task_ids)


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the logits [C, V] float32 of hidden states [C, D]."""
    return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)


def _token_losses(config: LossConfig, targets: jax.Array, logits: jax.Array) -> jax.Array:
    return cross_entropy(
        logits, targets, label_smoothing=config.label_smoothing, z_loss=config.z_loss
    )


def _on_shards(mesh: Mesh, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable:
    """Returns a function that runs on each `data` shard separately; other axes stay automatic.

    Sums over chunks stay local until `psum`. XLA's partitioner would sum over the shards after
    every chunk.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=inputs,
        out_specs=outputs,
        axis_names={"data"},
        check_vma=False,
    )


def head_scores(
    config: LossConfig,
    mesh: Mesh,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    task_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns each task's summed cross entropy and number of correct tokens, by argmax.

    Args:
      config: the loss.
      mesh: mesh whose `data` axis G is sharded over.
      hidden: input of the LM head, [G, M, D].
      kernel: the LM head, [D, V].
      targets: target token ids, [G, M].
      task_ids: 1 + k for tokens of task k, 0 for padding, [G, M].

    Returns:
      Sums and correct counts, [K] float32 each.
    """

    def shard(kernel, hidden, targets, task_ids):
        def add(total, chunk):
            hidden, targets, task_ids = chunk
            logits = _logits(hidden, kernel)
            losses = _token_losses(config, targets, logits)
            correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
            sums = [task_sums(x, task_ids, config.num_tasks) for x in (losses, correct)]
            return jax.tree.map(jnp.add, total, sums), None

        zeros = [jnp.zeros(config.num_tasks)] * 2
        total, _ = jax.lax.scan(add, zeros, _chunks(hidden, targets, task_ids))
        return tuple(jax.lax.psum(total, "data"))

    run = _on_shards(mesh, shard, (REPLICATED, SHARDED, SHARDED, SHARDED), (REPLICATED, REPLICATED))
    return run(kernel.astype(hidden.dtype), hidden, targets, task_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_loss(
    config: LossConfig,
    mesh: Mesh,
    hidden: jax.Array,
    kernel: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    task_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted loss and each task's summed cross entropy, in chunks of slots.

    All logits, [G, M, V], would be the largest array of a step. Because token weights are known
    beforehand, the forward pass computes logits, losses and gradients chunk by chunk and discards
    each chunk's logits; the backward pass only scales the gradients by the cotangent of the loss.
    The matrix products are the same as without chunks. The kernel's gradient is summed over chunks
    in float32.

    Args:
      config: the loss.
      mesh: mesh whose `data` axis G is sharded over.
      hidden: input of the LM head, [G, M, D].
      kernel: the LM head, [D, V].
      weights: weight of a token of each task, [K], see `token_weights`; not differentiated.
      targets: target token ids, [G, M].
      task_ids: 1 + k for tokens of task k, 0 for padding, [G, M].

    Returns:
      The loss [], the weighted sum of the tasks' sums, and these sums [K], float32. Only the loss
      is differentiable.
    """
    return _head_forward(config, mesh, hidden, kernel, weights, targets, task_ids)[0]


def _head_forward(config, mesh, hidden, kernel, weights, targets, task_ids):
    dtype, kernel_dtype, ops = hidden.dtype, kernel.dtype, ops_for(mesh)

    def shard(kernel, weights, hidden, targets, task_ids):
        def add(total, chunk):
            hidden, targets, task_ids = chunk
            logits = _logits(hidden, kernel)
            losses, vjp = jax.vjp(functools.partial(_token_losses, config, targets), logits)
            sums = task_sums(losses, task_ids, config.num_tasks)
            (d_logits,) = vjp(jnp.concatenate([jnp.zeros(1), weights])[task_ids])
            d_logits = d_logits.astype(dtype)
            d_hidden = jnp.dot(d_logits, kernel.T)
            d_kernel = ops.product_of_transpose(hidden, d_logits)
            return jax.tree.map(jnp.add, total, (sums, d_kernel)), d_hidden

        zeros = jnp.zeros(config.num_tasks), jnp.zeros(kernel.shape, jnp.float32)
        chunks = _chunks(hidden, targets, task_ids)
        (sums, d_kernel), d_hidden = jax.lax.scan(add, zeros, chunks)
        d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
        return jax.lax.psum(sums, "data"), d_hidden, d_kernel.astype(kernel_dtype)[None]

    inputs = (REPLICATED, REPLICATED, SHARDED, SHARDED, SHARDED)
    run = _on_shards(mesh, shard, inputs, (REPLICATED, SHARDED, SHARDED))
    sums, d_hidden, d_kernels = run(kernel.astype(dtype), weights, hidden, targets, task_ids)
    # Summed outside of shard_map, in the kernel's dtype, so that XLA can use a reduce-scatter.
    d_kernel = jax.lax.reduce_sum(d_kernels, (0,))
    return (jnp.sum(weights * sums), sums), (d_hidden, d_kernel)


def _head_backward(config, mesh, saved, cotangents):
    d_loss, _ = cotangents
    d_hidden, d_kernel = (d_loss.astype(d.dtype) * d for d in saved)
    return d_hidden, d_kernel, None, None, None


head_loss.defvjp(_head_forward, _head_backward)
