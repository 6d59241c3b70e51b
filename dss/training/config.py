"""Configuration of the optimizer and of the training loop."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dss.errors import ConfigError
from dss.fields import check_at_least, check_rate, check_types

__all__ = ["OptimizerConfig", "TrainerConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyperparameters of the optimizer. The defaults are the reference's."""

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 5e-5  # peak
    schedule: Literal["linear", "constant", "cosine", "rsqrt"] = "linear"
    warmup_steps: int = 0  # linear warm-up from 0
    b1: float = 0.9  # AdamW
    b2: float = 0.999  # AdamW
    eps: float = 1e-8  # AdamW
    weight_decay: float = 0.0  # AdamW, decoupled, scaled by the learning rate
    decay_rate: float = 0.8  # Adafactor, exponent of the second-moment decay
    clip_global_norm: float | None = 1.0  # None: no clipping

    def __post_init__(self) -> None:
        check_types(self)
        if not self.learning_rate > 0:
            raise ConfigError(
                f"OptimizerConfig.learning_rate must be above 0, got {self.learning_rate}"
            )
        check_at_least(self, 0, "warmup_steps", "weight_decay", "clip_global_norm")
        check_rate(self, "b1", "b2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length of training, and the periods of evaluation and logging."""

    train_steps: int = 10_000  # optimizer steps
    eval_period: int = 250  # steps between evaluations; each is followed by a checkpoint
    log_period: int = 10  # steps between logged metrics
    patience: int | None = None  # evaluations without improvement before early stopping; None: off
    select_by: Literal["accuracy", "macro_f1", "balanced_accuracy", "loss"] = (
        "accuracy"  # validation metric of the best checkpoint and of patience
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "train_steps", "eval_period", "log_period", "patience")

    def logs_at(self, step: int) -> bool:
        """Returns whether the metrics of a step, counted from 1, are logged."""
        return step % self.log_period == 0 or step == self.train_steps

    def evaluates_at(self, step: int) -> bool:
        """Returns whether an evaluation follows a step, counted from 1."""
        return step % self.eval_period == 0 or step == self.train_steps

    def score_of(self, values: Mapping[str, Any]) -> float | None:
        """Returns the score of an evaluation by `select_by`; higher is better.

        "accuracy" is ROUGE-L if the student has rationales only. The loss is negated.

        Args:
          values: metrics by name, such as "valid/accuracy".

        Returns:
          The score; None if the metrics lack it.
        """
        if self.select_by == "loss":
            return -values["valid/loss"] if "valid/loss" in values else None
        names = ("accuracy", "rouge_l") if self.select_by == "accuracy" else (self.select_by,)
        return next((values[f"valid/{n}"] for n in names if f"valid/{n}" in values), None)

    def has_lost_patience(self, scores: Mapping[int, float]) -> bool:
        """Returns whether training stops early, given the scores of all evaluations by step."""
        if self.patience is None or not scores:
            return False
        best = max(scores, key=lambda step: (scores[step], -step))
        return sum(step > best for step in scores) >= self.patience
