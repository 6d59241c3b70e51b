"""The loss of distilling step-by-step: a weighted sum of each task's mean over target tokens.

    L = sum_k rate_k * (1 / N_k) * sum over the target tokens of task k of cross entropy

With two tasks at rates alpha and 1 - alpha this is the reference's
`alpha * L_label + (1 - alpha) * L_rationale` (Hsieh et al., 2023, section 3.2, equation 3, in its
weighted form). N_k counts target tokens, EOS included, over the whole global batch, whatever the
sharding, packing or microbatching.
"""

import jax
import jax.numpy as jnp

__all__ = ["cross_entropy", "mixture_loss", "task_sums", "token_counts", "token_weights"]


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


def token_weights(counts: jax.Array, rates: tuple[float, ...] | None) -> jax.Array:
    """Returns what one target token of each task weighs in the loss, [K].

    `rate_k / N_k`; with `rates` None (sequences sampled by rate, which are weighted already) one
    over the number of all target tokens. A task that has no token weighs nothing.
    """
    if rates is None:
        return jnp.ones_like(counts) / jnp.maximum(counts.sum(), 1)
    return jnp.array(rates, jnp.float32) / jnp.maximum(counts, 1)


def mixture_loss(sums: jax.Array, counts: jax.Array, rates: tuple[float, ...] | None) -> jax.Array:
    """Returns the loss, [], from each task's summed cross entropy and token count, both [K]."""
    return jnp.sum(token_weights(counts, rates) * sums)
