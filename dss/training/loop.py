"""The training loop: steps, evaluation, checkpoints, and what to do when told to stop."""

import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from dss.errors import UserError
from dss.parallel.processes import StopSignal
from dss.training.checkpoints import Checkpoints
from dss.training.config import TrainerConfig
from dss.training.metrics import MetricsWriter
from dss.training.step import TrainState

__all__ = ["Progress", "train"]


class Progress:
    """What the loop tells as it goes; the base class says nothing."""

    def say(self, line: str) -> None:
        """Called with what the user should know, such as what became of the file's rows."""

    def update(self, step: int, values: dict[str, float]) -> None:
        """Called at each logged step, with the metrics and, if any step since the last call did not
        compile, `examples_per_second` of those steps.
        """

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Called after each evaluation."""

    def finished(self, data_wait: float) -> None:
        """Called after the last step, with the fraction of step time that was spent on waiting for
        batches.
        """

    def close(self) -> None:
        """Called at the end, however it came."""


def _numbers(metrics: dict[str, jax.Array], task_names: tuple[str, ...]) -> dict[str, float]:
    """Returns a step's metrics by the names they are logged under."""
    host = jax.tree.map(np.asarray, metrics)
    values = {"train/loss": float(host["loss"]), "train/grad_norm": float(host["grad_norm"])}
    for name, loss in zip(task_names, host["task_loss"], strict=True):
        values[f"train/{name}_loss"] = float(loss)
    if "rates" in host:  # of two tasks, label and rationale, at alpha and 1 - alpha
        values["train/alpha"] = float(host["rates"][0])
    return values


def train(
    state: TrainState,
    *,
    config: TrainerConfig,
    train_step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    batches: Iterator[dict[str, jax.Array]],
    num_shapes: int,
    task_names: tuple[str, ...],
    examples_per_step: int,
    evaluate: Callable[[TrainState], dict[str, float]],
    score: str,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    progress: Progress,
    stop: StopSignal,
    row_ids: Callable[[int], list[str]],
    earlier_scores: Mapping[int, float],
) -> TrainState:
    """Trains from the state's step to the end, to the end of patience, or until a stop signal.

    Args:
      state: where to start; its memory is taken.
      config: how long and how often.
      train_step: from `make_train_step`.
      batches: the batches from the state's step on, on the mesh.
      num_shapes: the number of shapes that batches can have, each compiled when it first comes.
      task_names: names of the mixture's tasks, for the metrics.
      examples_per_step: for the rate shown.
      evaluate: returns validation metrics.
      score: which of them decides the best checkpoint; higher is better.
      checkpoints: where states are saved, after each evaluation, at the end and on a stop signal.
      metrics: where numbers are written.
      progress: told of each logged step and evaluation.
      stop: an open `StopSignal`.
      row_ids: returns the ids of the examples of a step, counted from 0.
      earlier_scores: of the evaluations up to the state's step, by their step.

    Returns:
      The last state. It is saved, whole on disk.

    Raises:
      UserError: a loss or a gradient is not finite; nothing is saved after it, what was saved
        before stays.
    """
    step = int(state.step)
    shapes: set[tuple] = set()
    counted, clock = 0, time.monotonic()  # since the last logged step, but for compiling steps
    waited = spent = 0.0  # seconds of all steps that did not compile
    pending: list[dict[str, jax.Array]] = []  # of the last steps, not looked at yet

    def check_finite() -> None:
        """Raises if the parameters of any step so far may hold what is no number."""
        for i, values in enumerate(pending, start=step - len(pending)):
            for what, name in (("loss", "loss"), ("gradient's norm", "grad_norm")):
                if not np.isfinite(values[name]):
                    said = f"step {i + 1}: the {what} is {values[name]}"
                    raise _not_finite(said, ", ".join(row_ids(i)), checkpoints)
        pending.clear()

    scores = dict(earlier_scores)
    done = config.has_lost_patience(scores)
    while step < config.train_steps and not done and not stop.before(step):
        began = time.monotonic()
        batch = next(batches)
        waiting = time.monotonic() - began
        shape = tuple(array.shape for array in batch.values())
        compiles = shape not in shapes
        if compiles:
            shapes.add(shape)
            jax.block_until_ready(state)  # so that the steps before are not timed with this one
            progress.say(f"step {step + 1}: compiling shape {len(shapes)} of {num_shapes}")
            paused = time.monotonic()
        state, values = train_step(state, batch)
        step += 1
        pending.append(values)
        if compiles:
            jax.block_until_ready(values)
            clock += time.monotonic() - paused
        else:
            counted += 1
        last = step == config.train_steps
        if step % config.log_period == 0 or last:
            check_finite()
            numbers = _numbers(values, task_names)
            metrics.write(step, numbers)
            speed = {}
            if counted:
                rate = counted * examples_per_step / (time.monotonic() - clock)
                speed = {"examples_per_second": rate}
                metrics.write_speed(step, speed)
            progress.update(step, numbers | speed)
            counted, clock = 0, time.monotonic()
        if not compiles:
            waited, spent = waited + waiting, spent + time.monotonic() - began
        if step % config.eval_period == 0 or last:
            check_finite()
            paused = time.monotonic()
            if len(scores) == len(earlier_scores):
                progress.say(f"step {step}: evaluating, which compiles the first time")
            numbers = evaluate(state)
            if not np.isfinite(numbers["valid/loss"]):
                said = f"step {step}: the validation loss is {numbers['valid/loss']}"
                raise _not_finite(said, None, checkpoints)
            metrics.write(step, numbers)
            progress.evaluated(step, numbers)
            metrics.sync()
            checkpoints.save(state, numbers[score])
            scores[step] = numbers[score]
            done = config.has_lost_patience(scores)
            clock += time.monotonic() - paused
    if spent:
        progress.finished(waited / spent)
    check_finite()
    metrics.sync()
    checkpoints.save(state)
    checkpoints.wait()
    return state


def _not_finite(what: str, ids: str | None, checkpoints: Checkpoints) -> UserError:
    checkpoints.wait()
    saved = checkpoints.latest
    where = "no checkpoint was saved yet" if saved is None else f"step {saved} is saved"
    return UserError(
        f"{what}; {where}; try a lower learning rate, or float32 if the student computes in "
        f"bfloat16{'' if ids is None else f'; the examples of that step: {ids}'}"
    )
