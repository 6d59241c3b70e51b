"""The training loop and its hooks: timing, finite checks, metrics, validation."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from dss.batches.batch import Batch
from dss.errors import DssError
from dss.parallel.processes import StopSignal
from dss.training.checkpoints import Checkpoints
from dss.training.config import TrainerConfig
from dss.training.metrics import MetricsWriter
from dss.training.step import Metrics, TrainState

__all__ = ["Clock", "FiniteGuard", "Hook", "Log", "Progress", "Validation", "train"]


class Progress:
    """Callbacks that show a run's progress; the base class ignores all events."""

    def say(self, line: str) -> None:
        """Called with a message for the user, such as the ledger of a file's rows."""

    def update(self, step: int, values: dict[str, float]) -> None:
        """Called at each logged step with its metrics. `examples_per_second` covers the steps since
        the last call that did not compile, and is missing if all compiled.
        """

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Called after each evaluation, with its metrics."""

    def finished(self, data_wait: float) -> None:
        """Called after the last step with the fraction of step time spent waiting for batches."""

    def close(self) -> None:
        """Called at the end of the run, whether it succeeded or not."""


class Hook:
    """Callbacks around each training step; the base class ignores all events.

    The loop calls hooks in the order of its argument. `step` is the number of complete steps.
    """

    is_over: bool = False  # whether to end training before its last step

    def before_step(self, step: int, state: TrainState, batch: Batch) -> None:
        """Called before each step with its batch."""

    def after_step(self, step: int, state: TrainState, values: dict[str, jax.Array]) -> None:
        """Called after each step is dispatched, with its metrics, which may still be computing."""

    def finish(self, step: int) -> None:
        """Called after the last step."""


class Clock(Hook):
    """Measures throughput and the wait for batches, without the steps that compile.

    Args:
      examples: the number of examples in a step.
      num_shapes: the number of batch shapes, each compiled when it first occurs.
      progress: the callbacks for compilation and for the wait at the end.
    """

    def __init__(self, examples: int, num_shapes: int, progress: Progress):
        self._examples, self._num_shapes, self._progress = examples, num_shapes, progress
        self._shapes: set[tuple] = set()
        self._compiles = False
        self._counted = 0  # steps since the last call of `throughput`
        self._since: float | None = None  # time of that call, or of the first batch
        self._is_open = False  # whether a step that did not compile is not counted yet
        self._began = self._paused = self._wait = self._excluded = 0.0
        self._waited = self._spent = 0.0  # seconds, over all steps that did not compile

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches, and measures the wait for each."""
        while True:
            self._close_step()
            self._began = time.monotonic()
            self._since = self._began if self._since is None else self._since
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait = time.monotonic() - self._began
            yield batch

    def before_step(self, step: int, state: TrainState, batch: Batch) -> None:
        """Reports the compilation of a new shape."""
        shape = batch.shapes
        self._compiles = shape not in self._shapes
        if self._compiles:
            self._shapes.add(shape)
            jax.block_until_ready(state)  # earlier steps must not count as compilation time
            count, total = len(self._shapes), self._num_shapes
            of_total = f" of {total}" if count <= total else ", a rare one"
            self._progress.say(f"step {step + 1}: compiling shape {count}{of_total}")
            self._paused = time.monotonic()

    def after_step(self, step: int, state: TrainState, values: dict[str, jax.Array]) -> None:
        """Counts the step."""
        if self._compiles:
            jax.block_until_ready(values)
            self._exclude(time.monotonic() - self._paused)
        else:
            self._counted += 1
            self._is_open = True

    def _close_step(self) -> None:
        """Adds the last step's time, which logging is part of and evaluation is not."""
        if self._is_open:
            self._waited += self._wait
            self._spent += time.monotonic() - self._began - self._excluded
        self._is_open, self._excluded = False, 0.0

    def _exclude(self, seconds: float) -> None:
        assert self._since is not None  # a batch came first
        self._excluded += seconds
        self._since += seconds

    def throughput(self) -> float | None:
        """Returns the examples per second since the last call; None if every step compiled."""
        now = time.monotonic()
        assert self._since is not None
        counted, seconds = self._counted, now - self._since
        self._counted, self._since = 0, now
        return counted * self._examples / seconds if counted else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from the throughput."""
        began = time.monotonic()
        yield
        self._exclude(time.monotonic() - began)

    def finish(self, step: int) -> None:
        """Reports the wait for batches."""
        self._close_step()
        if self._spent:
            self._progress.finished(self._waited / self._spent)


class FiniteGuard(Hook):
    """Raises if a loss or gradient norm is not finite, before the next checkpoint is saved.

    Values are transferred from the device at logged and evaluated steps, not at every step.

    Args:
      config: the periods of logging and evaluation.
      row_ids: a function from a step, counted from 0, to the ids of its examples.
      checkpoints: the checkpoints of the run, for the error message.
    """

    def __init__(
        self,
        config: TrainerConfig,
        row_ids: Callable[[int], list[str]],
        checkpoints: Checkpoints,
    ):
        self._config, self._row_ids, self._checkpoints = config, row_ids, checkpoints
        self._pending: list[dict[str, jax.Array]] = []  # the metrics of the unchecked steps

    def after_step(self, step: int, state: TrainState, values: dict[str, jax.Array]) -> None:
        """Checks all steps since the last check, if this one is logged or evaluated."""
        self._pending.append(values)
        if self._config.logs_at(step) or self._config.evaluates_at(step):
            self.finish(step)

    def finish(self, step: int) -> None:
        """Raises if any step since the last check had a non-finite loss or gradient norm.

        Raises:
          DssError: if so, with the step and the ids of its examples.
        """
        for i, values in enumerate(self._pending, start=step - len(self._pending)):
            for label, name in (("loss", "loss"), ("gradient norm", "grad_norm")):
                if not np.isfinite(values[name]):
                    fault = f"step {i + 1}: the {label} is {values[name]}"
                    raise _not_finite(fault, self._checkpoints, ", ".join(self._row_ids(i)))
        self._pending.clear()


class Log(Hook):
    """Writes training metrics and the throughput.

    Args:
      config: the period of logging.
      task_names: the names of the mixture's tasks.
      metrics: the writer of the metrics files.
      clock: the source of the throughput.
      progress: the callbacks for logged steps.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task_names: tuple[str, ...],
        metrics: MetricsWriter,
        clock: Clock,
        progress: Progress,
    ):
        self._config, self._task_names = config, task_names
        self._metrics, self._clock, self._progress = metrics, clock, progress

    def after_step(self, step: int, state: TrainState, values: dict[str, jax.Array]) -> None:
        """Writes the metrics of a logged step."""
        if not self._config.logs_at(step):
            return
        numbers = _numbers(values, self._task_names)
        self._metrics.write(step, numbers)
        speed = {}
        if (rate := self._clock.throughput()) is not None:
            speed = {"examples_per_second": rate}
            self._metrics.write_speed(step, speed)
        self._progress.update(step, numbers | speed)


class Validation(Hook):
    """Evaluates, saves a checkpoint with its score, and stops training early without improvement.

    Args:
      config: the period of evaluation, the patience, and the metric that selects the best
        checkpoint.
      evaluate: a function from a state to its validation metrics.
      earlier_scores: the scores of earlier evaluations by step, see `TrainerConfig.score_of`.
      checkpoints: the checkpoints of the run.
      metrics: the writer of the metrics files.
      clock: the clock, paused during evaluations.
      progress: the callbacks for evaluations.
    """

    def __init__(
        self,
        config: TrainerConfig,
        evaluate: Callable[[TrainState], dict[str, float]],
        earlier_scores: Mapping[int, float],
        *,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        clock: Clock,
        progress: Progress,
    ):
        self._config, self._evaluate = config, evaluate
        self._checkpoints, self._metrics = checkpoints, metrics
        self._clock, self._progress = clock, progress
        self._scores = dict(earlier_scores)
        self._is_first = True

    @property
    def is_over(self) -> bool:  # type: ignore[override]
        """Whether the last `patience` evaluations brought no improvement."""
        return self._config.has_lost_patience(self._scores)

    def after_step(self, step: int, state: TrainState, values: dict[str, jax.Array]) -> None:
        """Evaluates and saves the state at every evaluation step.

        Raises:
          DssError: if the validation loss is not finite.
        """
        if not self._config.evaluates_at(step):
            return
        with self._clock.paused():
            if self._is_first:
                self._progress.say(f"step {step}: evaluating; the first time this compiles")
            self._is_first = False
            numbers = self._evaluate(state)
            if not np.isfinite(loss := numbers["valid/loss"]):
                raise _not_finite(f"step {step}: the validation loss is {loss}", self._checkpoints)
            self._metrics.write(step, numbers)
            self._progress.evaluated(step, numbers)
            self._metrics.sync()
            score = self._config.score_of(numbers)
            assert score is not None, f"no {self._config.select_by} in the validation metrics"
            self._scores[step] = score
            self._checkpoints.save(state, score)


def _numbers(metrics: dict[str, jax.Array], task_names: tuple[str, ...]) -> dict[str, float]:
    """Returns the metrics of a step as floats, by their names in the log."""
    host = jax.tree.map(np.asarray, metrics)
    values = {"train/loss": float(host["loss"]), "train/grad_norm": float(host["grad_norm"])}
    for name, loss in zip(task_names, host["task_loss"], strict=True):
        values[f"train/{name}_loss"] = float(loss)
    if "rates" in host:  # alpha and 1 - alpha
        values["train/alpha"] = float(host["rates"][0])
    return values


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    *,
    num_steps: int,
    hooks: Sequence[Hook],
    stop: StopSignal,
) -> TrainState:
    """Trains from the state's step to the last one, or until a hook or a signal ends training.

    Args:
      state: the initial state; it is donated.
      train_step: the jitted train step, from `make_train_step`.
      batches: the batches from the state's step on, sharded over the mesh.
      num_steps: the total number of steps of the run.
      hooks: the hooks, in the order in which they are called.
      stop: an open `StopSignal`.

    Returns:
      The state after the last step.
    """
    step = int(state.step)
    while step < num_steps and not any(hook.is_over for hook in hooks) and not stop.before(step):
        batch = next(batches)
        for hook in hooks:
            hook.before_step(step, state, batch)
        state, values = train_step(state, batch)
        step += 1
        for hook in hooks:
            hook.after_step(step, state, values)
    for hook in hooks:
        hook.finish(step)
    return state


def _not_finite(fault: str, checkpoints: Checkpoints, ids: str | None = None) -> DssError:
    """Returns the error for a non-finite number, with the last checkpoint and possible remedies.

    Args:
      fault: the step and the number, in words.
      checkpoints: the checkpoints of the run.
      ids: the ids of the step's examples; None to omit them.
    """
    checkpoints.wait()
    latest = checkpoints.latest
    saved = (
        "no checkpoint was saved yet" if latest is None else f"the last checkpoint is step {latest}"
    )
    return DssError(
        f"{fault}; {saved}; try a lower learning rate, or float32 if the student computes in "
        f"bfloat16{'' if ids is None else f'; the examples of that step: {ids}'}"
    )
