"""Run directories: a student with its configuration, vocabulary and checkpoints, whole by itself.

config.gin            the configuration, complete
vocabulary.model      the SentencePiece model (none for bytes)
checkpoints/          Orbax: the latest two and the best
metrics.jsonl         what was computed: losses, accuracy
speed.jsonl           what the clock said
sessions.jsonl        what each session began with and how it ended
tensorboard/          both, for TensorBoard
predictions/          of `dss eval`
"""

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from dss.config import load_config, save_config
from dss.data.registry import register, set_data_root
from dss.data.tasks import Mixture, Task, extract_rationale, get_mixture
from dss.data.vocabulary import BYTES, T5_VOCABULARY, encode_example, load_vocabulary
from dss.errors import UserError
from dss.evaluation.evaluator import (
    DecodingProgress,
    EvaluationExample,
    Predictor,
    evaluation_set,
    metric_name,
)
from dss.evaluation.result import Evaluation
from dss.evaluation.teachers import read_teachers
from dss.experiment import DataConfig, Experiment
from dss.interop import huggingface, t5x_checkpoint
from dss.paths import CONFIG_FILE, absolute, check_no_pipes
from dss.student.config import T5Config
from dss.student.network import abstract_params, logical_axes
from dss.training.checkpoints import Checkpoints, abstract_like, largest_part
from dss.training.mesh import MeshConfig, make_mesh, param_shardings
from dss.training.processes import all_agree, is_leader, wait_for_all
from dss.training.step import init_state

__all__ = [
    "CHECKPOINTS",
    "Evaluation",
    "Run",
    "check_size",
    "check_vocabulary",
    "create_run",
    "describe_initial",
    "evaluate",
    "explain",
    "import_checkpoint",
    "label",
    "load_run",
    "open_student",
    "read_initial",
    "run_folder",
    "save_run",
    "use_data",
]

VOCABULARY_FILE = "vocabulary.model"
CHECKPOINTS = "checkpoints"


def use_data(config: DataConfig, *, must_exist: bool = True) -> str | None:
    """Makes the datasets known that a configuration names; returns the name of the user's own.

    Args:
      config: names them.
      must_exist: False for predicting, which reads no data.

    Raises:
      UserError: they are not where the configuration says.
    """
    if config.root is not None:
        if must_exist and not epath.Path(config.root).expanduser().is_dir():
            raise UserError(f"DATA_ROOT {config.root}: no such folder")
        set_data_root(config.root)
    if config.dataset_path is None:
        return None
    path = epath.Path(config.dataset_path).expanduser()
    name = absolute(path).stem.replace("-", "_")
    return register(
        name, path, labels=config.labels, metric=config.metric, must_exist=must_exist
    ).name


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory that has a checkpoint."""

    folder: epath.Path
    experiment: Experiment

    @property
    def config(self) -> T5Config:
        """The student's shape."""
        assert self.experiment.student is not None
        return self.experiment.student

    @property
    def vocabulary_source(self) -> str:
        """The run's vocabulary, a path or "bytes"."""
        source = self.experiment.vocabulary
        return BYTES if source == BYTES else str(self.folder / VOCABULARY_FILE)

    @property
    def has_checkpoint(self) -> bool:
        """Whether any step was saved."""
        folder = self.folder / CHECKPOINTS
        return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())

    def mixture(self) -> Mixture:
        """Returns the mixture that the student learnt; its data must be known, see `use_data`.

        Raises:
          UserError: the run has none, or there is no such mixture.
        """
        experiment = self.experiment
        if experiment.mixture is None:
            raise UserError(
                f"{self.folder}: no mixture; say with --mixture what the student predicts"
            )
        one_input = experiment.data.one_encoder_pass
        return get_mixture(experiment.mixture, experiment.alpha, one_input=one_input)

    def checkpoints(self) -> Checkpoints:
        """Returns the run's checkpoints, for reading."""
        return Checkpoints(self.folder / CHECKPOINTS, read_only=True)

    def predictor(
        self, which: str = "best", progress: DecodingProgress | None = None
    ) -> tuple[Predictor, int]:
        """Returns the student of a checkpoint, and the checkpoint's step.

        Args:
          which: the checkpoint "best", "latest" or a step.
          progress: the callbacks for its batches; None for none.

        Raises:
          UserError: there is no such checkpoint, or it is of another size.
        """
        mesh = make_mesh(self.experiment.mesh)
        shardings = _shardings(self.config, mesh, self.experiment.mesh)
        checkpoints = self.checkpoints()
        step = checkpoints.find(which)
        abstract = abstract_like(abstract_params(self.config), shardings)
        params = checkpoints.restore_params(step, abstract)
        checkpoints.close()
        vocabulary = load_vocabulary(self.vocabulary_source)
        decoding, progress = self.experiment.decoding, progress or DecodingProgress()
        return Predictor(self.config, params, vocabulary, mesh, decoding, progress), step


def _shardings(config: T5Config, mesh: Mesh, mesh_config: MeshConfig) -> Any:
    shapes = abstract_params(config)
    return param_shardings(mesh, mesh_config, logical_axes(config), shapes)


def load_run(folder: str | epath.Path, flags: Sequence[str] = ()) -> Run:
    """Returns a run directory's run.

    Args:
      folder: the run directory.
      flags: `NAME=VALUE` of gin values to read differently.

    Raises:
      UserError: if it is none, its configuration names no student, or a file is a named pipe.
    """
    folder = epath.Path(folder).expanduser()
    check_no_pipes(folder, below=False)
    experiment = load_config(folder, flags)
    if experiment.student is None:
        raise UserError(f"{folder}: no run: its {CONFIG_FILE} names no student")
    return Run(folder, experiment)


def open_student(source: str, flags: Sequence[str] = ()) -> Run:
    """Returns the run of a student, wherever it lies.

    Args:
      source: a run directory; or what INITIAL_CHECKPOINT_PATH can be, such as `hf:FOLDER` of
        `dss export`, which is made a run in a folder that is there as long as this process. An
        exported student's own config.gin says what it learnt.
      flags: `NAME=VALUE` of gin values to read differently.

    Raises:
      UserError: there is no student, or no vocabulary beside it.
    """
    if _is_run(source):
        return load_run(source, flags)
    folder = epath.Path(tempfile.mkdtemp(prefix="dss-student-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    experiment = Experiment()
    if source.startswith("hf:") and (exported := _exported(source)) is not None:
        experiment = load_config(exported)
    run = import_checkpoint(
        dataclasses.replace(
            experiment,
            run_dir=str(folder),
            initial_checkpoint=source,
            student=None,
            vocabulary=None,
        )
    )
    return load_run(run.folder, flags)


def _exported(source: str) -> epath.Path | None:
    folder = epath.Path(source.removeprefix("hf:")).expanduser()
    return folder if (folder / CONFIG_FILE).is_file() else None


def create_run(experiment: Experiment) -> tuple[Run, Any | None]:
    """Makes the run directory of an experiment, and settles what the experiment left open.

    Returns:
      The run and, where it begins from a checkpoint, the parameters.

    Raises:
      UserError: see `read_initial`.
    """
    student, source, params = read_initial(experiment)
    folder = run_folder(experiment)
    if source != BYTES:
        if is_leader():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / VOCABULARY_FILE).write_bytes(epath.Path(source).expanduser().read_bytes())
        source = VOCABULARY_FILE
    experiment = dataclasses.replace(experiment, student=student, vocabulary=source)
    return save_run(folder, experiment), params


def check_vocabulary(source: str, student: T5Config) -> None:
    """Raises the user's error where a vocabulary, a path or "bytes", is not a student's."""
    vocabulary = load_vocabulary(source)
    if vocabulary.size > student.vocab_size:
        raise UserError(
            f"{source}: wrong vocabulary: it has {vocabulary.size} ids and the student "
            f"{student.vocab_size} embeddings; give the one that the checkpoint was trained with"
        )


def save_run(folder: epath.Path, experiment: Experiment) -> Run:
    """Writes a run directory's configuration, from which the run is found from any folder.

    Of several processes the leader writes, and the others wait until it has.

    Raises:
      UserError: another process cannot see it.
    """
    paths = {n: getattr(experiment.data, n) for n in ("root", "dataset_path")}
    settled: dict[str, Any] = {n: str(absolute(p)) for n, p in paths.items() if p is not None}
    data = dataclasses.replace(experiment.data, **settled)
    experiment = dataclasses.replace(experiment, data=data)
    if is_leader():
        folder.mkdir(parents=True, exist_ok=True)
        save_config(experiment, folder)
    wait_for_all(CONFIG_FILE)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: process 0 has written its {CONFIG_FILE} and process {jax.process_index()} "
            "does not see it; MODEL_DIR must be a folder that all processes share"
        )
    return Run(folder, experiment)


def run_folder(experiment: Experiment) -> epath.Path:
    """Returns the run directory that an experiment names.

    Raises:
      UserError: it names none.
    """
    if experiment.run_dir is None:
        raise UserError("no run directory: give --gin.MODEL_DIR=FOLDER")
    return epath.Path(experiment.run_dir).expanduser()


def read_initial(experiment: Experiment) -> tuple[T5Config, str, Any | None]:
    """Returns the student's shape, its vocabulary and, from a checkpoint, its parameters.

    The parameters lie on the experiment's mesh, and are read last, for they may be large.

    Raises:
      UserError: something is missing, the checkpoint is not of the student's size, or the
        vocabulary is not the student's.
    """
    student, vocabulary, load = _open_initial(experiment)
    return student, vocabulary, load() if load else None


def describe_initial(experiment: Experiment) -> tuple[T5Config, str]:
    """Returns the student's shape and its vocabulary, which fit; no parameters are read.

    Raises:
      UserError: see `read_initial`.
    """
    return _open_initial(experiment)[:2]


def _open_initial(experiment: Experiment) -> tuple[T5Config, str, Callable[[], Any] | None]:
    """Returns the student's shape, its vocabulary and what reads its parameters, if anything."""
    source, student = experiment.initial_checkpoint, experiment.student
    load = beside = None
    if source is not None:
        found, load, beside = _open_checkpoint(source, experiment)
        check_size(source, found, student)
        dtype, remat = (student.dtype, student.remat) if student else (found.dtype, found.remat)
        student = dataclasses.replace(found, dtype=dtype, remat=remat)
    if student is None:
        raise UserError(
            "no student: give --gin_file=students/SIZE.gin to train from scratch, or "
            "--gin.INITIAL_CHECKPOINT_PATH=hf:FOLDER (or t5x:FOLDER)"
        )
    vocabulary = experiment.vocabulary or beside
    if vocabulary is None:
        raise UserError(
            "no vocabulary: give --gin.VOCABULARY=FILE (of `dss import`: --vocabulary=FILE), a "
            f"SentencePiece model such as T5's, {T5_VOCABULARY}, or bytes; in a Hugging Face "
            "folder spiece.model is read, tokenizer.json is not"
        )
    check_vocabulary(vocabulary, student)
    return experiment.settle(student), vocabulary, load


def _open_checkpoint(
    source: str, experiment: Experiment
) -> tuple[T5Config, Callable[[], Any], str | None]:
    """Returns a checkpoint's shape, what reads its parameters, and the vocabulary beside it."""
    mesh_config = experiment.mesh
    if _is_run(source):
        run = load_run(source)
        run = Run(run.folder, dataclasses.replace(run.experiment, mesh=mesh_config))
        return run.config, lambda: run.predictor("best")[0].params, run.vocabulary_source
    t5x = source.startswith("t5x:")
    if not t5x and not source.startswith("hf:"):  # T5X's own INITIAL_CHECKPOINT_PATH
        t5x = t5x_checkpoint.is_checkpoint(source)
    module: Any = t5x_checkpoint if t5x else huggingface
    folder = module.resolve(source)
    config = module.read_config(folder)
    if t5x and experiment.student is not None:
        untold = {name: getattr(experiment.student, name) for name in t5x_checkpoint.UNTOLD}
        config = dataclasses.replace(config, **untold)
    vocabulary = huggingface.find_vocabulary(folder) if module is huggingface else None

    def load() -> Any:
        shardings = _shardings(config, make_mesh(mesh_config), mesh_config)
        return module.load_params(folder, config, shardings)

    return config, load, vocabulary


def _is_run(source: str) -> bool:
    if source.startswith(("hf:", "t5x:")):
        return False
    return (epath.Path(source).expanduser() / CONFIG_FILE).is_file()


SHAPE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_encoder_layers",
    "num_decoder_layers",
    "activation",
    "gated",
    "tied_embeddings",
    "scaled_logits",
    "relative_buckets",
    "relative_max_distance",
)


def check_size(source: str, found: T5Config, student: T5Config | None) -> None:
    """Raises the user's error where a checkpoint's shape is not the student's."""
    differs = [n for n in SHAPE if student and getattr(found, n) != getattr(student, n)]
    if differs:
        parts = [f"{n} {getattr(found, n)}, not {getattr(student, n)}" for n in differs]
        raise UserError(
            f"{source}: a checkpoint of another size than the student: {'; '.join(parts)}; leave "
            "the students/ gin file out to take the checkpoint's"
        )


def evaluate(
    run: Run,
    *,
    split: str = "test",
    which: str = "best",
    rationales: bool = False,
    progress: DecodingProgress | None = None,
) -> Evaluation:
    """Evaluates a run's student on a split of its mixture.

    Args:
      run: the run.
      split: "train", "valid" or "test".
      which: the checkpoint "best", "latest" or a step.
      rationales: has the student write its rationales too, and judges them.
      progress: the callbacks for its answers and rationales; None for none.

    Raises:
      UserError: no checkpoint, no such split, no labels in it, or no rationales learnt.
    """
    experiment = run.experiment
    use_data(experiment.data)
    mixture = run.mixture()
    if rationales:
        _rationale_task(mixture)
        if metric_name(mixture) != "accuracy":
            raise UserError(f"{mixture.name}: it predicts rationales; leave --rationales out")
    examples = evaluation_set(
        mixture, split, fraction=experiment.data.fraction, seed=experiment.seed
    )
    teachers = read_teachers(mixture, split)
    progress = progress or DecodingProgress()
    progress.expect((1 + rationales) * len(examples))
    predictor, step = run.predictor(which, progress)
    inputs_length = experiment.data.inputs_length
    answers = predictor.answer(mixture, examples, inputs_length)
    written = None
    if rationales:
        written = explain(predictor, mixture, [e.text for e in examples], inputs_length)
    vocabulary = predictor.vocabulary
    return Evaluation.of(
        mixture, split, step, examples, answers, teachers, written, vocabulary=vocabulary
    )


def _rationale_task(mixture: Mixture) -> Task:
    task = next((task for task in mixture.tasks if task.kind != "label"), None)
    if task is None:
        raise UserError(
            f"{mixture.name}: its students learn no rationales; train one on a step_by_step mixture"
        )
    return task


def explain(
    predictor: Predictor, mixture: Mixture, texts: Sequence[str], inputs_length: int
) -> list[str]:
    """Returns the rationale that a student writes for each input.

    Raises:
      UserError: the mixture that it learnt has no rationales.
    """
    task = _rationale_task(mixture)
    inputs = [encode_example(predictor.vocabulary, task.prefix + t, inputs_length) for t in texts]
    length, start = predictor.decoding.rationale_length, task.start_id(predictor.vocabulary)
    written = predictor.generate(inputs, max_length=length, start=start)
    return [extract_rationale(t) for t in written] if task.kind != "rationale" else written


def label(
    predictor: Predictor, mixture: Mixture, texts: Sequence[str], inputs_length: int
) -> list[str]:
    """Returns the label that a student predicts for each input."""
    examples = [EvaluationExample(str(i), text, "") for i, text in enumerate(texts)]
    return predictor.predict(mixture, examples, inputs_length)


def import_checkpoint(experiment: Experiment) -> Run:
    """Makes a run directory, at step 0, of the checkpoint that the experiment begins from.

    Raises:
      UserError: the folder holds something, or the checkpoint cannot be read.
    """
    folder = run_folder(experiment)
    if not all_agree(not folder.exists() or not any(folder.iterdir())):  # before one writes
        raise UserError(f"{folder}: not empty; import into a new folder")
    run, params = create_run(experiment)
    checkpoints = Checkpoints(folder / CHECKPOINTS, largest=largest_part(params), frozen=True)
    checkpoints.save(init_state(params, optax.identity()))
    checkpoints.close()
    return run
