"""Optimizers and learning-rate schedules: the reference's AdamW and T5X's Adafactor."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dss.training.config import OptimizerConfig

__all__ = ["make_optimizer", "make_schedule"]

STACKS = ("encoder", "decoder")  # parameter groups whose "layers" have a leading layer axis


def make_schedule(config: OptimizerConfig, train_steps: int) -> optax.Schedule:
    """Returns the learning rate by step, from 0: warm-up, then the schedule down to 0 (or not).

    Args:
      config: `linear` and `cosine` fall to 0 at `train_steps`; `rsqrt` falls as 1 / sqrt(step)
        after the warm-up (Raffel et al., 2020, section 3.1.2), `constant` stays.
      train_steps: length of the run in steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(train_steps - warmup, 1)
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
        "rsqrt": lambda: lambda step: peak * (max(warmup, 1) / (step + max(warmup, 1))) ** 0.5,
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _over_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner` applied to each layer of stacked parameters as if it stood alone."""

    def update(updates, state, params=None):
        return jax.vmap(inner.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(inner.init), update)


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Adafactor (Shazeer and Stern, 2018) as T5X sets it, layer by layer.

    Factoring, the update's clipping and the parameter scale are all per matrix, so the stacked
    layers are mapped over.
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
    """Returns clipping by global norm as one factor of the gradients.

    optax's divides them: that XLA writes out first, because AdamW reads it twice.
    """

    def clip(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        factor = limit / jnp.maximum(optax.tree.norm(updates), limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def make_optimizer(config: OptimizerConfig, train_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by global norm, then AdamW or Adafactor on the schedule."""
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
