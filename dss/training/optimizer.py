"""Optimizers and learning-rate schedules: the reference's AdamW and T5X's Adafactor."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dss.training.config import OptimizerConfig

__all__ = ["make_optimizer", "make_schedule"]

STACKS = ("encoder", "decoder")  # parameter groups with stacked "layers"


def make_schedule(config: OptimizerConfig, train_steps: int) -> optax.Schedule:
    """Returns the learning rate schedule: linear warm-up, then decay.

    `linear` and `cosine` decay to 0 at `train_steps`; `rsqrt` decays as 1 / sqrt(step) after the
    warm-up (Raffel et al., 2020, section 3.1.2); `constant` does not decay.

    Args:
      config: hyperparameters of the optimizer.
      train_steps: number of training steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(train_steps - warmup, 1)
    decay = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
        "rsqrt": lambda: lambda step: peak * (max(warmup, 1) / (step + max(warmup, 1))) ** 0.5,
    }[config.schedule]()
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def _over_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation that applies `inner` to each layer of stacked parameters."""

    def update(updates, state, params=None):
        return jax.vmap(inner.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(inner.init), update)


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Adafactor (Shazeer and Stern, 2018) with T5X's hyperparameters.

    Factoring, update clipping and parameter scale are per matrix, so Adafactor is mapped over the
    layer axis of stacked layers.
    """

    def adafactor() -> optax.GradientTransformation:
        return optax.adafactor(
            schedule,
            decay_rate=config.decay_rate,
            multiply_by_parameter_scale=True,
            clipping_threshold=1.0,
            momentum=None,
        )

    def group(path: tuple[Any, ...], _: jax.Array) -> str:
        names = [getattr(p, "key", str(p)) for p in path]
        return names[0] if names[0] in STACKS and "layers" in names else "rest"

    return optax.partition(
        {"rest": adafactor()} | {stack: _over_layers(adafactor()) for stack in STACKS},
        lambda params: jax.tree_util.tree_map_with_path(group, params),
    )


def _clip(limit: float) -> optax.GradientTransformation:
    """Returns clipping of the gradients by global norm.

    The gradients are multiplied by one factor, which XLA fuses into AdamW. It does not fuse the
    division of optax's `clip_by_global_norm`, whose result AdamW reads twice.
    """

    def clip(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        factor = limit / jnp.maximum(optax.tree.norm(updates), limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def make_optimizer(config: OptimizerConfig, train_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by global norm, then AdamW or Adafactor with a schedule."""
    schedule = make_schedule(config, train_steps)
    if config.name == "adafactor":
        optimizer = _adafactor(config, schedule)
    else:
        optimizer = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        )
    if config.clip_global_norm is None:
        return optimizer
    return optax.chain(_clip(config.clip_global_norm), optimizer)
