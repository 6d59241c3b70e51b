"""The student that a run begins with: from scratch, or from a checkpoint of any kind."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from etils import epath

from dss.config.experiment import Experiment
from dss.data.vocabulary import BYTES, T5_VOCABULARY, load_vocabulary
from dss.errors import UserError
from dss.interop import huggingface, t5x_checkpoint
from dss.parallel.mesh import make_mesh
from dss.parallel.processes import all_agree, is_leader
from dss.runs.directory import (
    CHECKPOINTS,
    VOCABULARY_FILE,
    Run,
    is_run,
    load_run,
    run_folder,
    save_run,
    student_shardings,
)
from dss.student.config import T5Config
from dss.training.checkpoints import Checkpoints, largest_part
from dss.training.step import init_state

__all__ = [
    "check_size",
    "check_vocabulary",
    "create_run",
    "describe_initial",
    "import_checkpoint",
    "read_initial",
]


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
    source, student = experiment.initial_checkpoint, experiment.config
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
    if is_run(source):
        run = load_run(source)
        run = Run(run.folder, dataclasses.replace(run.experiment, mesh=mesh_config))
        return run.config, lambda: run.predictor("best")[0].params, run.vocabulary_source
    t5x = source.startswith("t5x:")
    if not t5x and not source.startswith("hf:"):  # T5X's own INITIAL_CHECKPOINT_PATH
        t5x = t5x_checkpoint.is_checkpoint(source)
    module: Any = t5x_checkpoint if t5x else huggingface
    folder = module.resolve(source)
    config = module.read_config(folder)
    if t5x and experiment.config is not None:
        untold = {name: getattr(experiment.config, name) for name in t5x_checkpoint.UNTOLD}
        config = dataclasses.replace(config, **untold)
    vocabulary = huggingface.find_vocabulary(folder) if module is huggingface else None

    def load() -> Any:
        shardings = student_shardings(config, make_mesh(mesh_config), mesh_config)
        return module.load_params(folder, config, shardings)

    return config, load, vocabulary


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


def check_vocabulary(source: str, student: T5Config) -> None:
    """Raises the user's error where a vocabulary, a path or "bytes", is not a student's."""
    vocabulary = load_vocabulary(source)
    if vocabulary.size > student.vocab_size:
        raise UserError(
            f"{source}: wrong vocabulary: it has {vocabulary.size} ids and the student "
            f"{student.vocab_size} embeddings; give the one that the checkpoint was trained with"
        )


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
