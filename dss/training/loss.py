"""The loss of distilling step-by-step: a weighted sum of each task's mean over target tokens.

    L = sum_k rate_k * (1 / N_k) * sum over the target tokens of task k of cross entropy

With two tasks at rates alpha and 1 - alpha this is the reference's
`alpha * L_label + (1 - alpha) * L_rationale` (Hsieh et al., 2023, section 3.2, equation 3, in its
weighted form). N_k counts target tokens, EOS included, over the whole global batch, whatever the
sharding, packing or microbatching.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dss.student.ops import transposed

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

CHUNK_SLOTS = 1024  # target slots of a device whose logits exist at a time
WHOLE, SHARD = PartitionSpec(), PartitionSpec("data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of a mixture.

    Attributes:
      num_tasks: K, how many tasks the batch's task ids tell apart.
      rates: each task's rate; None if sequences were sampled by rate, so that each token of the
        batch weighs the same.
      last_rates: to which the rates move linearly from step to step; None if they stay.
      num_steps: the last of so many steps has `last_rates`, the first `rates`.
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
        """Returns the rates of a step, counted from 0, [K] float32; None if there are none."""
        if self.rates is None:
            return None
        first = jnp.array(self.rates, jnp.float32)
        if self.last_rates is None:
            return first
        done = step / max(self.num_steps - 1, 1)
        return (1 - done) * first + done * jnp.array(self.last_rates, jnp.float32)


def cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Returns the cross entropy of each target token.

        -(1 - s) * log p(target) - s * mean over V of log p + z_loss * (log Z)^2

    Args:
      logits: [..., V] float32.
      targets: [...] ids in [0, V).
      label_smoothing: s, in [0, 1): the weight of the uniform distribution.
      z_loss: keeps the normaliser log Z near 0 (Shazeer et al., 2018, mesh TensorFlow).

    Returns:
      [...] float32.
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
    """Returns the sum of a value over each task's target tokens.

    Args:
      per_token: [R, T].
      task_ids: [R, T], 0 for padding, 1 + k for task k.
      num_tasks: K.

    Returns:
      [K], in the dtype of `per_token`.
    """
    return jnp.stack(
        [jnp.sum(jnp.where(task_ids == k + 1, per_token, 0)) for k in range(num_tasks)]
    )


def token_counts(task_ids: jax.Array, num_tasks: int) -> jax.Array:
    """Returns N_k, the number of each task's target tokens, [K] float32."""
    return task_sums(jnp.ones(task_ids.shape, jnp.float32), task_ids, num_tasks)


def token_weights(counts: jax.Array, rates: jax.Array | tuple[float, ...] | None) -> jax.Array:
    """Returns what one target token of each task weighs in the loss, [K].

    `rate_k / N_k`; with `rates` None (sequences sampled by rate, which are weighted already) one
    over the number of all target tokens. A task that has no token weighs nothing.
    """
    if rates is None:
        return jnp.ones_like(counts) / jnp.maximum(counts.sum(), 1)
    return jnp.asarray(rates, jnp.float32) / jnp.maximum(counts, 1)


def mixture_loss(
    sums: jax.Array, counts: jax.Array, rates: jax.Array | tuple[float, ...] | None
) -> jax.Array:
    """Returns the loss, [], from each task's summed cross entropy and token count, both [K]."""
    return jnp.sum(token_weights(counts, rates) * sums)


def _chunks(hidden: jax.Array, targets: jax.Array, task_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the slots in n chunks of C, as even as they can be: [n, C, D], [n, C] and [n, C].

    What fills the last chunk is of no task.
    """
    n = -(-targets.size // CHUNK_SLOTS)
    size = -(-targets.size // n)

    def split(array: jax.Array) -> jax.Array:
        flat = array.reshape(targets.size, *array.shape[targets.ndim :])
        fill = [(0, n * size - targets.size)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, fill).reshape(n, size, *flat.shape[1:])

    return split(hidden), split(targets), split(task_ids)


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the logits [C, V] float32 of hidden states [C, D]."""
    return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)


def _token_losses(config: LossConfig, targets: jax.Array, logits: jax.Array) -> jax.Array:
    return cross_entropy(
        logits, targets, label_smoothing=config.label_smoothing, z_loss=config.z_loss
    )


def _on_shards(mesh: Mesh, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable:
    """Returns a function that each shard of `data` runs by itself.

    What it adds up over chunks stays on its shard until it says `psum`; left to the partitioner,
    the sum over the shards would be taken again after every chunk. Other axes stay automatic.
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
    """Returns each task's summed cross entropy, and how many targets were the most likely token.

    Args:
      config: the loss.
      mesh: G is split over its `data`.
      hidden: [G, M, D], what the head multiplies.
      kernel: [D, V], the head.
      targets: [G, M] ids in [0, V).
      task_ids: [G, M], see `task_sums`.

    Returns:
      [K] and [K], float32.
    """

    def shard(kernel, hidden, targets, task_ids):
        def add(total, chunk):
            hidden, targets, task_ids = chunk
            logits = _logits(hidden, kernel)
            losses = _token_losses(config, targets, logits)
            correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
            part = [task_sums(x, task_ids, config.num_tasks) for x in (losses, correct)]
            return jax.tree.map(jnp.add, total, part), None

        zeros = [jnp.zeros(config.num_tasks)] * 2
        total, _ = jax.lax.scan(add, zeros, _chunks(hidden, targets, task_ids))
        return tuple(jax.lax.psum(total, "data"))

    run = _on_shards(mesh, shard, (WHOLE, SHARD, SHARD, SHARD), (WHOLE, WHOLE))
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
    """Returns the weighted loss and each task's summed cross entropy, without all the logits.

    The logits, [G, M, V], would be the largest array of a step. A token's weight is known
    beforehand, so its part of the gradient is too, but for the factor that comes from after the
    loss: each chunk of slots takes its logits, its losses and its gradients in one go, and its
    logits are gone. The products are those of the plain form; the gradient of the kernel is
    added up over chunks in float32.

    Args:
      config: the loss.
      mesh: G is split over its `data`.
      hidden: [G, M, D], what the head multiplies.
      kernel: [D, V], the head.
      weights: [K], what a token of each task weighs, see `token_weights`; no gradient.
      targets: [G, M] ids in [0, V).
      task_ids: [G, M], see `task_sums`.

    Returns:
      The sum over tasks of weight times sum, [], and the sums, [K], float32; only the first has a
      gradient.
    """
    return _head_forward(config, mesh, hidden, kernel, weights, targets, task_ids)[0]


def _head_forward(config, mesh, hidden, kernel, weights, targets, task_ids):
    dtype, kernel_dtype = hidden.dtype, kernel.dtype

    def shard(kernel, weights, hidden, targets, task_ids):
        def add(total, chunk):
            hidden, targets, task_ids = chunk
            logits = _logits(hidden, kernel)
            losses, back = jax.vjp(functools.partial(_token_losses, config, targets), logits)
            sums = task_sums(losses, task_ids, config.num_tasks)
            (d_logits,) = back(jnp.concatenate([jnp.zeros(1), weights])[task_ids])
            d_logits = d_logits.astype(dtype)
            d_hidden = jnp.dot(d_logits, kernel.T)
            d_kernel = jnp.dot(transposed(hidden, 1), d_logits, preferred_element_type=jnp.float32)
            return jax.tree.map(jnp.add, total, (sums, d_kernel)), d_hidden

        zeros = jnp.zeros(config.num_tasks), jnp.zeros(kernel.shape, jnp.float32)
        chunks = _chunks(hidden, targets, task_ids)
        (sums, d_kernel), d_hidden = jax.lax.scan(add, zeros, chunks)
        d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
        return jax.lax.psum(sums, "data"), d_hidden, d_kernel.astype(kernel_dtype)[None]

    run = _on_shards(mesh, shard, (WHOLE, WHOLE, SHARD, SHARD, SHARD), (WHOLE, SHARD, SHARD))
    sums, d_hidden, d_kernels = run(kernel.astype(dtype), weights, hidden, targets, task_ids)
    # Added up here, in the kernel's dtype, so that the partitioner can scatter what it adds up.
    d_kernel = jax.lax.reduce_sum(d_kernels, (0,))
    return (jnp.sum(weights * sums), sums), (d_hidden, d_kernel)


def _head_backward(config, mesh, saved, cotangents):
    d_loss, _ = cotangents
    d_hidden, d_kernel = (d_loss.astype(d.dtype) * d for d in saved)
    return d_hidden, d_kernel, None, None, None


head_loss.defvjp(_head_forward, _head_backward)
