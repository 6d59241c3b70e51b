"""Training of a student, from its configuration to its last checkpoint.

`run_experiment` calls the other functions of this module: for the data, the jitted steps, the
initial state, validation, and the training loop with its hooks.
"""

import dataclasses
import json
import signal
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from dss.batches.batches import Batches, iterate
from dss.batches.order import sequential_order
from dss.batches.statistics import describe_labels
from dss.batches.store import TokenStore
from dss.config.data import open_mixture, resolve
from dss.config.experiment import Experiment
from dss.data.vocabulary import Vocabulary, load_vocabulary
from dss.errors import ConfigError
from dss.evaluation.classes import ClassMetrics
from dss.evaluation.evaluator import (
    Predictor,
    Scored,
    evaluation_set,
    has_classes,
    predicted_labels,
    token_metrics,
)
from dss.mixtures.methods import Mixture
from dss.parallel.mesh import make_mesh, put_batch
from dss.parallel.processes import StopSignal, is_leader, leaders_text
from dss.runs.data import split_store, start_ids, training_batches
from dss.runs.directory import CHECKPOINTS, Run
from dss.runs.resume import (
    Resume,
    changed_since,
    check_processes_agree,
    describe_values,
    open_run,
    with_recorded_teacher,
)
from dss.runs.session import (
    Session,
    describe_data,
    describe_machine,
    hash_files,
)
from dss.runs.start import read_initial
from dss.student.config import T5Config
from dss.student.network import abstract_params, init_params
from dss.training.checkpoints import Checkpoints, abstract_like, largest_part
from dss.training.loop import Clock, FiniteGuard, Log, Progress, Validation, train
from dss.training.loss import LossConfig
from dss.training.metrics import MetricsWriter, read_metrics
from dss.training.optimizer import make_optimizer
from dss.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    place_state,
    state_shardings,
)

__all__ = [
    "Result",
    "RunData",
    "Steps",
    "abstract_state",
    "build_steps",
    "initial_state",
    "load_data",
    "make_validation",
    "run_experiment",
]

MANY_EPOCHS = 50
BY_CLASS = ("macro_f1", "balanced_accuracy")  # values of `TrainerConfig.select_by`


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    step: int  # the last step that was completed
    stopped_by: signal.Signals | None  # the signal that ended it early
    best_step: int | None  # the checkpoint with the best score


@dataclasses.dataclass(frozen=True)
class RunData:
    """The tokenized data of a run."""

    mixture: Mixture
    valid_mixture: Mixture  # the tasks with a validation split
    vocabulary: Vocabulary
    store: TokenStore
    valid_store: TokenStore
    starts: tuple[int, ...] | None  # the decoder's start id of each task, see `start_ids`
    valid_starts: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Steps:
    """The mesh of a run, its optimizer and its jitted steps."""

    mesh: Mesh
    shardings: TrainState
    optimizer: optax.GradientTransformation
    train: Callable[..., Any]  # see `make_train_step`
    evaluate: Callable[..., Any]  # see `make_eval_step`


def run_experiment(
    experiment: Experiment,
    progress: Progress | None = None,
    resume: Resume = "auto",
    *,
    accept_changed_data: bool = False,
) -> Result:
    """Trains a student, from the latest checkpoint of its run directory if there is one.

    Args:
      experiment: the experiment.
      progress: the callbacks that show progress; None for none.
      resume: "auto" to resume a run if there is one, "must" to require one, "never" to fail on one.
      accept_changed_data: whether to resume even if data files have changed.

    Raises:
      DssError: if the experiment or its data are invalid, the run cannot be resumed as `resume`
        requires, or a loss is not finite.
    """
    progress = progress or Progress()
    with Session() as session:
        experiment = resolve(with_recorded_teacher(experiment))
        mixture = open_mixture(experiment)
        _check_selection(experiment, mixture)
        progress.say(f"reading {mixture.name}")
        files = hash_files({"train": mixture, "valid": mixture.available("valid")})
        accepted = {"accept_changed_data": repr(accept_changed_data)}
        check_processes_agree(describe_values("", experiment) | files | accepted)
        run, initial = open_run(experiment, resume)
        changed = changed_since(run, files, accept=accept_changed_data)

        data = load_data(run, mixture, progress)
        steps = build_steps(run, data)
        abstract = abstract_state(run.config, steps.optimizer, steps.shardings)
        checkpoints = Checkpoints(run.folder / CHECKPOINTS, largest=largest_part(abstract))
        state = initial_state(run, steps, checkpoints, abstract, initial, progress)

        statistics = {**describe_data(mixture, data.store), "files": files}
        facts = {**describe_machine(), "data": statistics}
        if changed:
            facts["changed_data"] = changed
        session.begin(run.folder, int(state.step), facts)
        result = _fit(run, data, steps, state, checkpoints, progress)
        if result.stopped_by is not None:
            session.outcome = f"stopped by {result.stopped_by.name} at step {result.step}"
    return result


def _check_selection(experiment: Experiment, mixture: Mixture) -> None:
    """Checks that validation measures the metric that selects the best checkpoint.

    Raises:
      ConfigError: if it is a metric by class, and the mixture's predictions have no classes.
    """
    select_by = experiment.trainer.select_by
    if select_by in BY_CLASS and not has_classes(mixture):
        kind = mixture.tasks[0].kind
        scored = "rationales" if kind == "rationale" else "equations"
        raise ConfigError(
            f"`TrainerConfig.select_by={select_by!r}` needs labels that are classes, but students "
            f"of {mixture.name} predict {scored}; give 'accuracy' or 'loss'"
        )


def load_data(run: Run, mixture: Mixture, progress: Progress) -> RunData:
    """Returns the tokenized data of a run, and reports the ledger of its rows.

    Args:
      run: the run.
      mixture: the mixture to train on.
      progress: the callbacks for the report.

    Raises:
      DssError: if data are missing or malformed, or labels of a closed set have the same tokens.
    """
    experiment = run.experiment
    vocabulary = load_vocabulary(run.vocabulary_source)
    mixture.dataset.labels.check_distinct(vocabulary)
    store = split_store(experiment, mixture, "train", vocabulary)
    for task, tokens in zip(mixture.tasks, store.tasks, strict=True):
        if tokens.ledger is not None:
            progress.say(f"{task.name}: {tokens.ledger.rows:,} rows: {tokens.ledger}")
    for line in describe_labels(
        mixture, vocabulary, store, fraction=experiment.data.fraction, seed=experiment.seed
    ):
        progress.say(line)
    progress.say(_describe_length(experiment, store))
    valid_mixture = mixture.available("valid")
    valid_store = split_store(experiment, valid_mixture, "valid", vocabulary)
    starts, valid_starts = (start_ids(m, vocabulary, run.config) for m in (mixture, valid_mixture))
    return RunData(mixture, valid_mixture, vocabulary, store, valid_store, starts, valid_starts)


def _describe_length(experiment: Experiment, store: TokenStore) -> str:
    """Returns the number of epochs of a run in words, with advice above `MANY_EPOCHS`."""
    paired = experiment.data.batches == "paired"
    count = len(store) if paired else sum(len(task.inputs) for task in store.tasks)
    steps, size = experiment.trainer.train_steps, experiment.batch_size
    epochs = steps * size / count
    line = (
        f"{steps:,} steps of {size:,} are {epochs:,.1f} epochs of {count:,} "
        f"{'examples' if paired else 'sequences'}"
    )
    if epochs > MANY_EPOCHS and experiment.trainer.patience is None:
        fewer = max(1, round(MANY_EPOCHS * count / size))
        line += (
            f"; this is many: `TrainerConfig.train_steps={fewer}` gives {MANY_EPOCHS}, and "
            "`TrainerConfig.patience=8` ends a run that no longer improves"
        )
    return line


def build_steps(run: Run, data: RunData) -> Steps:
    """Returns the mesh, the optimizer and the jitted train and eval steps of a run."""
    experiment, config = run.experiment, run.config
    mesh = make_mesh(experiment.mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.trainer.train_steps)
    shardings = state_shardings(config, optimizer, mesh, experiment.mesh)
    train_step = make_train_step(
        config,
        optimizer,
        _loss_config(experiment, data.mixture),
        mesh=mesh,
        shardings=shardings,
        microbatches=experiment.microbatches,
        grad_dtype=experiment.grad_dtype,
        seed=experiment.seed,
    )
    valid_loss = LossConfig(num_tasks=len(data.valid_mixture.tasks), rates=None)
    eval_step = make_eval_step(config, valid_loss, mesh=mesh, shardings=shardings)
    return Steps(mesh, shardings, optimizer, train_step, eval_step)


def _loss_config(experiment: Experiment, mixture: Mixture) -> LossConfig:
    end = experiment.alpha_end
    last = (end, 1 - end) if end is not None and len(mixture.tasks) == 2 else None
    paired = experiment.data.batches == "paired"
    return LossConfig(
        num_tasks=len(mixture.tasks),
        rates=mixture.rates if paired else None,
        last_rates=last,
        num_steps=experiment.trainer.train_steps,
        label_smoothing=experiment.label_smoothing,
        z_loss=experiment.z_loss,
    )


def abstract_state(config: T5Config, optimizer: Any, shardings: TrainState) -> TrainState:
    """Returns the shapes and shardings of a training state."""
    state = jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params(config))
    return abstract_like(state, shardings)


def initial_state(
    run: Run,
    steps: Steps,
    checkpoints: Checkpoints,
    abstract: TrainState,
    initial: Any | None,
    progress: Progress,
) -> TrainState:
    """Returns the state to start training from: the latest readable checkpoint of the run, the
    parameters of its initial checkpoint, or random parameters.

    Args:
      run: the run.
      steps: the mesh and the shardings.
      checkpoints: the checkpoints of the run.
      abstract: the shapes and shardings of the state.
      initial: the parameters of the initial checkpoint, if they are already read.
      progress: the callbacks that report corrupt checkpoints.
    """
    experiment = run.experiment
    if checkpoints.latest is not None:
        state, corrupt = checkpoints.restore_newest(abstract)
        for step, reason in corrupt.items():
            progress.say(
                f"checkpoint {step} cannot be read ({reason}); it is quarantined as "
                f"{step}.damaged, and training resumes from step {int(state.step)}"
            )
        return state
    params = initial
    if params is None:  # a new run, or a run with only corrupt checkpoints
        source = dataclasses.replace(experiment, vocabulary=run.vocabulary_source)
        params = read_initial(source)[2]
    if params is None:
        params = init_params(run.config, experiment.seed, steps.shardings.params)
    return place_state(params, steps.optimizer, steps.shardings)


def make_validation(
    run: Run, data: RunData, steps: Steps
) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function from a state to its validation metrics, such as loss and accuracy."""
    experiment, mixture = run.experiment, data.mixture
    batches = Batches(
        data.valid_store,
        sequential_order(data.valid_store, experiment.batch_size),
        num_steps=-(-len(data.valid_store) // experiment.batch_size),
        packed=experiment.data.packed,
        groups=steps.mesh.shape["data"],
        starts=data.valid_starts,
    )
    examples = evaluation_set(
        mixture, "valid", fraction=experiment.data.fraction, seed=experiment.seed
    )[: experiment.eval_examples]

    def evaluate(state: TrainState) -> dict[str, float]:
        values = token_metrics(
            steps.evaluate,
            state.params,
            (put_batch(steps.mesh, batches[i]) for i in range(len(batches))),
            data.valid_mixture.short_names,
            data.valid_mixture.rates,
            "valid",
        )
        predictor = Predictor(
            config=run.config,
            params=state.params,
            mesh=steps.mesh,
            vocabulary=data.vocabulary,
            decoding=experiment.decoding,
        )
        predictions = predictor.predict(mixture, examples, experiment.data.inputs_length)
        scored = Scored.of(mixture, examples, predictions, data.vocabulary)
        values[f"valid/{scored.metric}"] = scored.value
        select_by = experiment.trainer.select_by
        if select_by in BY_CLASS:  # without these, metrics.jsonl has accuracy alone
            predicted = predicted_labels(mixture, examples, predictions, scored, data.vocabulary)
            targets = [example.target for example in examples]
            classes = ClassMetrics.of(mixture.dataset.labels.closed, targets, predicted)
            values[f"valid/{select_by}"] = getattr(classes, select_by)
        return values

    return evaluate


def _earlier_scores(run: Run, start: int) -> dict[int, float]:
    """Returns the scores of a run's evaluations up to a step, by step, as read by process 0; an
    empty dictionary if the run has no `patience`.
    """
    config = run.experiment.trainer
    if config.patience is None:
        return {}
    lines = read_metrics(run.folder / "metrics.jsonl") if is_leader() else []
    scores = [
        (line["step"], score)
        for line in lines
        if line["step"] <= start and (score := config.score_of(line)) is not None
    ]
    return dict(json.loads(leaders_text(json.dumps(scores))))


def _fit(
    run: Run,
    data: RunData,
    steps: Steps,
    state: TrainState,
    checkpoints: Checkpoints,
    progress: Progress,
) -> Result:
    """Trains a state to the end of its run, saves it and closes `checkpoints`."""
    experiment, config, start = run.experiment, run.experiment.trainer, int(state.step)
    groups = steps.mesh.shape["data"] * experiment.microbatches
    batches = training_batches(experiment, data.mixture, data.store, groups, data.starts)

    def row_ids(step: int) -> list[str]:
        tasks, rows, _ = batches.order(step)
        return data.store.ids_of(tasks, rows)

    metrics = MetricsWriter(run.folder, start)
    clock = Clock(experiment.batch_size, len(batches.shapes), progress)
    hooks = (
        clock,
        FiniteGuard(config, row_ids, checkpoints),
        Log(config, data.mixture.short_names, metrics, clock, progress),
        Validation(
            config,
            make_validation(run, data, steps),
            _earlier_scores(run, start),
            checkpoints=checkpoints,
            metrics=metrics,
            clock=clock,
            progress=progress,
        ),
    )
    try:
        with StopSignal() as stop:
            state = train(
                state,
                steps.train,
                clock.timed(put_batch(steps.mesh, b) for b in iterate(batches, start)),
                num_steps=config.train_steps,
                hooks=hooks,
                stop=stop,
            )
            metrics.sync()
            checkpoints.save(state)
            checkpoints.wait()
        result = Result(int(state.step), stop.received, checkpoints.best)
    except BaseException:
        if jax.process_count() == 1:  # closing is a barrier, which other processes may not reach
            checkpoints.close()
        raise
    finally:
        metrics.close()
    checkpoints.close()
    return result
