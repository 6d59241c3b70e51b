"""Training a student: everything of a run is put together here."""

import dataclasses
import functools
import json
import signal
from typing import Any, Literal

import jax

from dss.batches.batches import (
    Batches,
    Order,
    iterate,
    paired_order,
    sampled_order,
    sequential_order,
)
from dss.batches.statistics import describe_labels
from dss.batches.store import TokenStore, open_store
from dss.config.data import open_mixture, resolve
from dss.config.experiment import Experiment
from dss.config.gin_files import gin_name
from dss.data.vocabulary import Vocabulary, load_vocabulary
from dss.errors import UserError
from dss.evaluation.evaluator import (
    Predictor,
    Scored,
    evaluation_set,
    metric_name,
    token_metrics,
)
from dss.mixtures.methods import Mixture
from dss.parallel.mesh import make_mesh, put_batch
from dss.parallel.processes import StopSignal, all_agree, is_leader, leaders_text
from dss.paths import CONFIG_FILE
from dss.runs.directory import CHECKPOINTS, Run, load_run, run_folder, save_run
from dss.runs.session import (
    Session,
    changed_files,
    describe_data,
    describe_machine,
    hash_files,
)
from dss.runs.start import check_size, create_run, read_initial
from dss.student.config import T5Config
from dss.student.network import abstract_params, init_params
from dss.training.checkpoints import Checkpoints, abstract_like, largest_part
from dss.training.loop import Progress, train
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
    "abstract_state",
    "check_same",
    "run_experiment",
    "split_store",
    "training_batches",
    "training_order",
    "training_store",
]

Resume = Literal["never", "auto", "must"]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int  # the last step that was done
    stopped_by: signal.Signals | None  # the signal that ended it early
    best_step: int | None  # the checkpoint with the best score


def abstract_state(config: T5Config, optimizer: Any, shardings: TrainState) -> TrainState:
    """Returns the shapes and shardings of a training state."""
    state = jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params(config))
    return abstract_like(state, shardings)


def _open_run(experiment: Experiment, resume: Resume) -> tuple[Run, Any | None]:
    """Returns the run, new or begun before, and a new one's parameters if it has some already.

    Raises:
      UserError: the run directory is another experiment's, or not as `resume` wants it.
    """
    folder = run_folder(experiment)
    run = load_run(folder) if (folder / CONFIG_FILE).is_file() else None
    if run is None or not run.has_checkpoint:  # whatever it was, nothing of it would be lost
        if resume == "must":
            raise UserError(f"{folder}: no run to resume: it has no checkpoint")
        return create_run(experiment)
    if resume == "never":
        raise UserError(
            f"{folder}: holds a run with checkpoints; use a new MODEL_DIR, or resume this one"
        )
    if not run.experiment.has_task:
        raise UserError(f"{folder}: holds an imported checkpoint; train in another MODEL_DIR")
    check_same(run, experiment)
    # Where the data lie and the mesh may change.
    settled = dataclasses.replace(run.experiment, data=experiment.data, mesh=experiment.mesh)
    return save_run(folder, settled), None


def _differences(prefix: str, before: Any, now: Any, may_change: tuple[str, ...]) -> list[str]:
    """Returns a phrase for each field that differs, of nested configurations too."""
    out = []
    for field in dataclasses.fields(before):
        a, b = getattr(before, field.name), getattr(now, field.name)
        if field.name in may_change or a == b:
            continue
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            out += _differences(f"{prefix}{field.name}.", a, b, ())
        else:
            out.append(f"{gin_name(prefix + field.name)} was {a!r} and is {b!r}")
    return out


def check_same(run: Run, now: Experiment) -> None:
    """Raises the user's error where a run is not of the experiment that would continue it."""
    before = run.experiment
    if before.mixture is not None:  # written before runs kept dataset and method
        named = resolve(dataclasses.replace(before, data=now.data))
        before = dataclasses.replace(
            before,
            mixture=None,
            dataset=named.dataset,
            method=named.method,
            teacher=named.teacher,
        )
    now = resolve(now)
    check_size(str(run.folder), run.config, now.student)
    settled = ("run_dir", "student", "vocabulary", "data", "mesh")
    differs = _differences("", before, now, settled)
    if now.student is not None:
        wanted = now.settle(now.student)
        differs += [
            f"{gin_name(f'student.{name}')} was {getattr(run.config, name)!r} and is "
            f"{getattr(wanted, name)!r}"
            for name in ("dtype", "remat")
            if getattr(run.config, name) != getattr(wanted, name)
        ]
    if now.vocabulary is not None:
        vocabularies = load_vocabulary(run.vocabulary_source), load_vocabulary(now.vocabulary)
        if vocabularies[0].fingerprint != vocabularies[1].fingerprint:
            raise UserError(f"{now.vocabulary}: wrong vocabulary: {run.folder} began with another")
    data = now.data
    if set(data.labels) == set(before.data.labels):  # their order is the run's
        data = dataclasses.replace(data, labels=before.data.labels)
    differs += _differences("data.", before.data, data, ("root", "dataset_path"))
    if differs:
        raise UserError(
            f"{run.folder}: the run of another experiment: {'; '.join(differs)}; "
            "use a new MODEL_DIR"
        )


def split_store(
    experiment: Experiment, mixture: Mixture, split: str, vocabulary: Vocabulary
) -> TokenStore:
    """Returns the tokens that an experiment reads of a split; see `open_store`."""
    data = experiment.data
    return open_store(
        mixture,
        split,
        vocabulary,
        inputs_length=data.inputs_length,
        targets_length=data.targets_length,
        fraction=data.fraction,
        seed=experiment.seed,
        keep_unparsed=data.keep_unparsed,
        rationales=experiment.rationales,
    )


def training_store(experiment: Experiment) -> TokenStore:
    """Returns the tokens that an experiment trains on."""
    assert experiment.vocabulary is not None
    vocabulary = load_vocabulary(experiment.vocabulary)
    return split_store(experiment, open_mixture(experiment), "train", vocabulary)


def training_order(experiment: Experiment, store: TokenStore, rates: tuple[float, ...]) -> Order:
    """Returns which sequences each step of an experiment has."""
    if experiment.data.batches == "paired":
        return paired_order(store, experiment.batch_size, experiment.seed)
    return sampled_order(store, experiment.batch_size, experiment.seed, rates)


def training_batches(
    experiment: Experiment,
    mixture: Mixture,
    store: TokenStore,
    groups: int,
    starts: tuple[int, ...] | None = None,
) -> Batches:
    """Returns the training batches of an experiment, in some number of groups.

    What the outputs start from is the mixture's `start_ids`.
    """
    return Batches(
        store,
        training_order(experiment, store, mixture.rates),
        num_steps=experiment.trainer.train_steps,
        packed=experiment.data.packed,
        groups=groups,
        starts=starts,
    )


def _start_ids(
    mixture: Mixture, vocabulary: Vocabulary, config: T5Config
) -> tuple[int, ...] | None:
    starts = mixture.start_ids(vocabulary)
    if starts is not None and max(starts) >= config.vocab_size:
        raise UserError(
            f"DataConfig.one_encoder_pass: {mixture.tasks[-1].name} starts from the id "
            f"{max(starts)} past the vocabulary, and the student has {config.vocab_size} "
            "embeddings; train one with more, or without it"
        )
    return starts


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


# Where things lie may differ from machine to machine.
PLACES = ("run_dir", "vocabulary", "initial_checkpoint", "data.root", "data.dataset_path")


def _check_processes_agree(mine: dict[str, str]) -> None:
    """Raises the user's error in every process where one was given other arguments or data."""
    mine = {name: value for name, value in mine.items() if name not in PLACES}
    leaders = json.loads(leaders_text(json.dumps(mine)))
    differs = [
        f"{name} = {leaders.get(name)} and this one {mine.get(name)}"
        for name in leaders | mine
        if leaders.get(name) != mine.get(name)
    ]
    if all_agree(not differs):
        return
    what = f"process 0 has {'; '.join(differs)}" if differs else "another process has other values"
    raise UserError(f"the processes of a run need the same arguments and data: {what}")


def _values(name: str, value: Any) -> dict[str, str]:
    """Returns each value of nested configurations as it is written, by its name."""
    if not dataclasses.is_dataclass(value):
        return {name: repr(value)}
    out: dict[str, str] = {}
    for field in dataclasses.fields(value):
        out |= _values(f"{name}.{field.name}".strip("."), getattr(value, field.name))
    return out


def _changed_files(run: Run, files: dict[str, str], *, accept: bool) -> list[str]:
    """Returns the names of the files that have changed since a run began or went on.

    Raises:
      UserError: some have, and they are not accepted.
    """
    changed = changed_files(run.folder, files) if run.has_checkpoint else []
    if changed and not accept:
        raise UserError(
            f"{run.folder}: its data have changed since: {', '.join(changed)}; use a new "
            "MODEL_DIR, or go on with what is there now with --changed-data=accept"
        )
    return changed


def run_experiment(
    experiment: Experiment,
    progress: Progress | None = None,
    resume: Resume = "auto",
    *,
    accept_changed_data: bool = False,
) -> Result:
    """Trains a student, from the start or from where its run directory got to.

    Args:
      experiment: what to do.
      progress: told of every logged step and evaluation.
      resume: whether the run directory may, must or must never hold a run already.
      accept_changed_data: goes on though files that the run read have changed; it is recorded.

    Raises:
      UserError: see `dss.errors`.
    """
    with Session() as session:
        result = _run(
            experiment,
            progress or Progress(),
            resume,
            session,
            accept_changed_data=accept_changed_data,
        )
        if result.stopped_by is not None:
            session.outcome = f"stopped by {result.stopped_by.name} at step {result.step}"
    return result


def _earlier_scores(run: Run, score: str, start: int) -> dict[int, float]:
    """Returns a run's evaluations up to a step, by their step, as process 0 reads them; none
    where nothing ends by patience.
    """
    if run.experiment.trainer.patience is None:
        return {}
    lines = read_metrics(run.folder / "metrics.jsonl") if is_leader() else []
    found = [(x["step"], x[score]) for x in lines if score in x and x["step"] <= start]
    return dict(json.loads(leaders_text(json.dumps(found))))


MANY_EPOCHS = 50


def _describe_length(experiment: Experiment, store: TokenStore) -> str:
    """Returns how often a run sees its examples, with advice where that is very often."""
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
            f"; that is often: --gin.TRAIN_STEPS={fewer} are {MANY_EPOCHS}, and "
            "--gin.TrainerConfig.patience=8 ends a run that gets no better"
        )
    return line


def _run(
    experiment: Experiment,
    progress: Progress,
    resume: Resume,
    session: Session,
    *,
    accept_changed_data: bool,
) -> Result:
    # Data and student.
    experiment = resolve(experiment)
    mixture = open_mixture(experiment)
    progress.say(f"reading {mixture.name}")
    valid_mixture = mixture.available("valid")
    files = hash_files({"train": mixture, "valid": valid_mixture})
    accepted = {"--changed-data=accept": repr(accept_changed_data)}
    _check_processes_agree(_values("", experiment) | files | accepted)
    run, initial = _open_run(experiment, resume)
    changed = _changed_files(run, files, accept=accept_changed_data)
    experiment, config = run.experiment, run.config
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
    valid_store = split_store(experiment, valid_mixture, "valid", vocabulary)
    starts, valid_starts = (_start_ids(m, vocabulary, config) for m in (mixture, valid_mixture))

    # Mesh, optimizer and the two compiled steps.
    mesh = make_mesh(experiment.mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.trainer.train_steps)
    shardings = state_shardings(config, optimizer, mesh, experiment.mesh)
    train_step = make_train_step(
        config,
        optimizer,
        _loss_config(experiment, mixture),
        mesh=mesh,
        shardings=shardings,
        microbatches=experiment.microbatches,
        grad_dtype=experiment.grad_dtype,
        seed=experiment.seed,
    )
    valid_loss = LossConfig(num_tasks=len(valid_mixture.tasks), rates=None)
    eval_step = make_eval_step(config, valid_loss, mesh=mesh, shardings=shardings)

    # The state: (1) a checkpoint of this run, (2) the initial checkpoint, (3) fresh parameters.
    abstract = abstract_state(config, optimizer, shardings)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, largest=largest_part(abstract))
    if checkpoints.latest is not None:
        state, damaged = checkpoints.restore_newest(abstract)
        for step, why in damaged.items():
            progress.say(
                f"checkpoint {step} cannot be read ({why}); it is set aside as {step}.damaged, and "
                f"step {int(state.step)} taken"
            )
    else:
        params = initial
        if params is None:  # a new run's, or one's whose checkpoints are all damaged
            source = dataclasses.replace(experiment, vocabulary=run.vocabulary_source)
            params = read_initial(source)[2]
        if params is None:
            params = init_params(config, experiment.seed, shardings.params)
        state = place_state(params, optimizer, shardings)
    start = int(state.step)
    facts = {**describe_machine(), "data": {**describe_data(mixture, store), "files": files}}
    if changed:
        facts["changed_data"] = changed
    session.begin(run.folder, start, facts)

    # Batches, and what an evaluation does.
    shards = mesh.shape["data"] * experiment.microbatches
    batches = training_batches(experiment, mixture, store, shards, starts)
    valid_batches = Batches(
        valid_store,
        sequential_order(valid_store, experiment.batch_size),
        num_steps=-(-len(valid_store) // experiment.batch_size),
        packed=experiment.data.packed,
        groups=mesh.shape["data"],
        starts=valid_starts,
    )
    put = functools.partial(put_batch, mesh)

    def row_ids(step: int) -> list[str]:
        tasks, rows, _ = batches.order(step)
        return store.ids_of(tasks, rows)

    examples = evaluation_set(
        mixture, "valid", fraction=experiment.data.fraction, seed=experiment.seed
    )[: experiment.eval_examples]

    def evaluate(state: TrainState) -> dict[str, float]:
        predictor = Predictor(config, state.params, vocabulary, mesh, experiment.decoding)
        values = token_metrics(
            eval_step,
            state.params,
            map(put, map(valid_batches.__getitem__, range(len(valid_batches)))),
            valid_mixture.short_names,
            valid_mixture.rates,
            "valid",
        )
        predictions = predictor.predict(mixture, examples, experiment.data.inputs_length)
        scored = Scored.of(mixture, examples, predictions, vocabulary)
        return values | {f"valid/{scored.metric}": scored.value}

    # The loop.
    score = f"valid/{metric_name(mixture)}"
    earlier_scores = _earlier_scores(run, score, start)
    metrics = MetricsWriter(run.folder, start)
    try:
        with StopSignal() as stop:
            state = train(
                state,
                config=experiment.trainer,
                train_step=train_step,
                batches=map(put, iterate(batches, start)),
                num_shapes=len(batches.shapes),
                task_names=mixture.short_names,
                examples_per_step=experiment.batch_size,
                evaluate=evaluate,
                score=score,
                checkpoints=checkpoints,
                metrics=metrics,
                progress=progress,
                stop=stop,
                row_ids=row_ids,
                earlier_scores=earlier_scores,
            )
        result = Result(int(state.step), stop.received, checkpoints.best)
    except BaseException:
        if jax.process_count() == 1:  # else closing would wait for others, which wait elsewhere
            checkpoints.close()
        raise
    finally:
        metrics.close()
    checkpoints.close()
    return result
