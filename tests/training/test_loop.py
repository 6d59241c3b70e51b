"""Non-finite metrics, early stopping and the reported throughput; see also tests/end_to_end."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dss.batches.batch import Batch
from dss.batches.packing import PackedShape, RowWidths
from dss.errors import ConfigError, DssError
from dss.training import loop
from dss.training.checkpoints import Checkpoints
from dss.training.config import TrainerConfig
from dss.training.loop import Progress
from dss.training.metrics import MetricsWriter
from dss.training.step import TrainState


class Clock:
    """A clock that is advanced explicitly."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Recorded(Progress):
    """Records progress callbacks."""

    def __init__(self):
        self.lines: list[str] = []
        self.rates: dict[int, float | None] = {}

    def say(self, line):
        self.lines.append(line)

    def update(self, step, values):
        self.rates[step] = values.get("examples_per_second")


class StopAt:
    """A stop signal before a step."""

    def __init__(self, step: int):
        self.step = step

    def before(self, step: int) -> bool:
        return step >= self.step


def batch_of(slots: int) -> Batch:
    return Batch.abstract(PackedShape(slots, slots, 1, 1, RowWidths(slots, slots, slots)), 1)


def run(
    folder,
    bad: dict[int, str],
    stop: int = 100,
    start: int = 0,
    scores=None,
    progress=None,
    batches=None,
    clock=None,
    **options: Any,
) -> None:
    """Trains 10 steps, with NaN metrics at the `bad` ones; writes the steps of all checkpoints.

    Evaluations have the `scores`, by step, as the metric of `TrainerConfig.select_by`.
    """

    shapes = set()

    def train_step(state: TrainState, batch):
        step = int(state.step) + 1
        if clock is not None:
            clock.now += 2 if batch.shapes in shapes else 100
            shapes.add(batch.shapes)
        values = {"loss": jnp.ones(()), "grad_norm": jnp.ones(()), "task_loss": jnp.ones(1)}
        if step in bad:
            values[bad[step]] = jnp.asarray(np.nan)
        return TrainState(jnp.asarray(step), state.params, state.opt_state), values

    def evaluate(state: TrainState) -> dict[str, float]:
        if clock is not None:
            clock.now += 50
        score = scores[int(state.step)] if scores else 0.5
        return {"valid/loss": 1.0, "valid/accuracy": 0.5, f"valid/{config.select_by}": score}

    progress, config = progress or Progress(), TrainerConfig(train_steps=10, **options)
    checkpoints, metrics = Checkpoints(folder / "checkpoints"), MetricsWriter(folder, start)
    sign = -1 if config.select_by == "loss" else 1
    try:
        timer = loop.Clock(2, 2, progress)
        hooks = (
            timer,
            loop.FiniteGuard(
                config, lambda step: [f"row-{step}-{i}" for i in range(2)], checkpoints
            ),
            loop.Log(config, ("label",), metrics, timer, progress),
            loop.Validation(
                config,
                evaluate,
                {k: sign * v for k, v in (scores or {}).items() if k <= start},
                checkpoints=checkpoints,
                metrics=metrics,
                clock=timer,
                progress=progress,
            ),
        )
        state = loop.train(
            TrainState(jnp.asarray(start), {"w": jnp.ones(3)}, {}),
            train_step,
            timer.timed(iter(batches or [batch_of(8)] * 10)),
            num_steps=10,
            hooks=hooks,
            stop=StopAt(stop),
        )
        checkpoints.save(state)
    finally:
        checkpoints.wait()
        (folder / "steps").write_text(" ".join(map(str, checkpoints.steps)))
        (folder / "best").write_text(str(checkpoints.best))
        checkpoints.close()


def saved(folder) -> str:
    return (folder / "steps").read_text()


def test_checkpoints_are_saved_at_evaluations_and_at_the_end(tmp_path):
    run(tmp_path, {}, eval_period=4, log_period=10)
    assert saved(tmp_path) == "4 8 10"


def test_a_run_without_improvement_stops_early(tmp_path):
    scores = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.9}
    options = {"scores": scores, "eval_period": 2, "log_period": 10, "patience": 2}
    run(tmp_path, {}, **options)
    assert saved(tmp_path) == "4 6 8"  # the best and the latest two
    run(tmp_path, {}, start=8, **options)  # resuming does not continue it
    assert saved(tmp_path) == "4 6 8"
    run(tmp_path / "other", {}, **options | {"patience": 3})
    assert saved(tmp_path / "other").endswith(" 10")
    better = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.4, 10: 0.5}  # always improving
    run(tmp_path / "better", {}, **options | {"patience": 1, "scores": better})
    assert saved(tmp_path / "better").endswith(" 10")


@pytest.mark.parametrize(
    ("select_by", "scores"),
    [
        ("macro_f1", {2: 0.7, 4: 0.9, 6: 0.8, 8: 0.6, 10: 1.0}),
        ("loss", {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.9, 10: 0.1}),
    ],
)
def test_the_selected_metric_decides_the_best_checkpoint_and_early_stopping(
    tmp_path, select_by, scores
):
    options = {"eval_period": 2, "log_period": 10, "patience": 2, "select_by": select_by}
    for start in (0, 8):  # resuming changes nothing
        run(tmp_path, {}, start=start, scores=scores, **options)
        assert (saved(tmp_path), (tmp_path / "best").read_text()) == ("4 6 8", "4")


def test_the_score_of_an_evaluation_is_higher_for_better_ones():
    values = {"step": 2, "valid/loss": 1.5, "valid/accuracy": 0.5, "valid/macro_f1": 0.25}
    assert TrainerConfig().score_of(values) == 0.5
    assert TrainerConfig(select_by="macro_f1").score_of(values) == 0.25
    assert TrainerConfig(select_by="loss").score_of(values) == -1.5
    assert TrainerConfig(select_by="balanced_accuracy").score_of(values) is None
    assert TrainerConfig().score_of({"valid/rouge_l": 0.75, "valid/loss": 1.0}) == 0.75
    training = {"step": 2, "train/loss": 1.0}
    assert {TrainerConfig(select_by=s).score_of(training) for s in ("accuracy", "loss")} == {None}


def test_an_unknown_selection_is_one_line():
    with pytest.raises(ConfigError) as error:
        TrainerConfig(select_by="f1")
    assert str(error.value) == (
        "TrainerConfig.select_by must be one of 'accuracy', 'macro_f1', 'balanced_accuracy', "
        "'loss', got 'f1'"
    )


def test_the_throughput_excludes_compilation_and_evaluation(tmp_path, monkeypatch):
    clock, progress = Clock(), Recorded()
    monkeypatch.setattr("dss.training.loop.time", clock)
    narrow, wide = batch_of(8), batch_of(16)
    batches = [narrow] * 6 + [wide] * 4
    periods = {"log_period": 2, "eval_period": 3}
    run(tmp_path, {}, progress=progress, batches=batches, clock=clock, **periods)
    assert progress.rates == dict.fromkeys((2, 4, 6, 8, 10), 1.0)  # 2 examples in 2 seconds
    assert progress.lines == [
        "step 1: compiling shape 1 of 2",
        "step 3: evaluating; the first time this compiles",
        "step 7: compiling shape 2 of 2",
    ]


def test_there_is_no_throughput_if_every_step_compiled(tmp_path):
    progress = Recorded()
    run(tmp_path, {}, stop=1, progress=progress, log_period=1)
    assert progress.rates == {1: None}


@pytest.mark.parametrize(("metric", "name"), [("loss", "loss"), ("grad_norm", "gradient norm")])
def test_a_non_finite_step_is_reported_and_not_evaluated_or_saved(tmp_path, metric, name):
    with pytest.raises(DssError) as error:
        run(tmp_path, {7: metric}, eval_period=4, log_period=10)
    message = str(error.value)
    assert message.startswith(f"step 7: the {name} is nan; the last checkpoint is step 4; ")
    assert message.endswith("; the examples of that step: row-6-0, row-6-1")
    assert saved(tmp_path) == "4"


def test_nothing_is_saved_on_a_stop_signal_after_a_non_finite_step(tmp_path):
    with pytest.raises(DssError, match="step 2: the loss is nan; no checkpoint was saved yet"):
        run(tmp_path, {2: "loss"}, stop=3, eval_period=8, log_period=10)
    assert saved(tmp_path) == ""


def test_the_wait_for_batches_is_a_fraction_of_whole_steps_without_evaluation(
    tmp_path, monkeypatch
):
    """A step of 2 seconds after a wait of 2, and a log that waits 4 for the device."""
    clock = Clock()
    monkeypatch.setattr("dss.training.loop.time", clock)
    waits = []

    class Slow(Recorded):
        def update(self, step, values):
            clock.now += 4

        def finished(self, data_wait):
            waits.append(data_wait)

    def batches():
        for _ in range(10):
            clock.now += 2
            yield batch_of(8)

    run(tmp_path, {}, progress=Slow(), batches=batches(), clock=clock, log_period=1, eval_period=2)
    assert waits == [pytest.approx(2 / (2 + 2 + 4))]
