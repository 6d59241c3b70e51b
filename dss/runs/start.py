"""The initial student of a run: randomly initialised, or from a checkpoint of any format."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from etils import epath

from dss.config.experiment import Experiment
from dss.data.vocabulary import BYTES, T5_VOCABULARY, load_vocabulary
from dss.errors import DssError
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
    """Creates the run directory of an experiment, with the student and vocabulary resolved.

    Returns:
      The run and, with an initial checkpoint, the parameters.

    Raises:
      DssError: if the student, its vocabulary or the initial checkpoint is missing or invalid.
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
    """Returns the student's configuration, its vocabulary and, with an initial checkpoint, its
    parameters, sharded over the experiment's mesh.

    Raises:
      DssError: if the student or its vocabulary is missing, the checkpoint's shape is not the
        student's, or the vocabulary is too large for the student.
    """
    student, vocabulary, load = _open_initial(experiment)
    return student, vocabulary, load() if load else None


def describe_initial(experiment: Experiment) -> tuple[T5Config, str]:
    """Returns the student's configuration and its vocabulary, checked, without its parameters.

    Raises:
      DssError: as for `read_initial`.
    """
    return _open_initial(experiment)[:2]


def _open_initial(experiment: Experiment) -> tuple[T5Config, str, Callable[[], Any] | None]:
    """Returns the student's configuration, its vocabulary and a function that reads its parameters,
    None without an initial checkpoint.
    """
    source, student = experiment.initial_checkpoint, experiment.config
    load = own_vocabulary = None
    if source is not None:
        config, load, own_vocabulary = _open_checkpoint(source, experiment)
        check_size(source, config, student)
        dtype, remat = (student.dtype, student.remat) if student else (config.dtype, config.remat)
        student = dataclasses.replace(config, dtype=dtype, remat=remat)
    if student is None:
        raise DssError(
            "no student: give `Experiment.student` to train from scratch, or "
            "`Experiment.initial_checkpoint=hf:FOLDER` (or t5x:FOLDER)"
        )
    vocabulary = experiment.vocabulary or own_vocabulary
    if vocabulary is None:
        raise DssError(
            "no vocabulary: give `Experiment.vocabulary`, a SentencePiece model such as T5's, "
            f"{T5_VOCABULARY}, or bytes; a Hugging Face folder may hold a spiece.model or a "
            "tokenizer.json"
        )
    check_vocabulary(vocabulary, student)
    return experiment.resolve_student(student), vocabulary, load


def _open_checkpoint(
    source: str, experiment: Experiment
) -> tuple[T5Config, Callable[[], Any], str | None]:
    """Returns a checkpoint's configuration, a function that reads its parameters, and the path of
    its vocabulary, if it has one.
    """
    mesh_config = experiment.mesh
    if is_run(source):
        run = load_run(source)
        run = Run(run.folder, dataclasses.replace(run.experiment, mesh=mesh_config))
        return run.config, lambda: run.predictor("best")[0].params, run.vocabulary_source
    is_t5x = source.startswith("t5x:")
    if not is_t5x and not source.startswith("hf:"):  # INITIAL_CHECKPOINT_PATH of T5X's gin files
        is_t5x = t5x_checkpoint.is_checkpoint(source)
    module: Any = t5x_checkpoint if is_t5x else huggingface
    folder = module.resolve(source)
    config = module.read_config(folder)
    if is_t5x and experiment.config is not None:
        missing = {name: getattr(experiment.config, name) for name in t5x_checkpoint.NOT_STORED}
        config = dataclasses.replace(config, **missing)
    vocabulary = None
    if module is huggingface and experiment.vocabulary is None:
        vocabulary = huggingface.find_vocabulary(folder)

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


def check_size(source: str, checkpoint: T5Config, student: T5Config | None) -> None:
    """Checks that a checkpoint has the student's shape.

    Args:
      source: the checkpoint's name, for the error message.
      checkpoint: the configuration of the checkpoint.
      student: the configuration of the student; None for that of the checkpoint.

    Raises:
      DssError: if the shapes differ.
    """
    differs = [n for n in SHAPE if student and getattr(checkpoint, n) != getattr(student, n)]
    if differs:
        parts = [f"{n} {getattr(checkpoint, n)}, not {getattr(student, n)}" for n in differs]
        raise DssError(
            f"{source}: a checkpoint of another size than the student: {'; '.join(parts)}; leave "
            "the students/ gin file out to use the checkpoint's size"
        )


def check_vocabulary(source: str, student: T5Config) -> None:
    """Checks that the student has an embedding for every id of a vocabulary.

    Args:
      source: the path of the vocabulary, or "bytes".
      student: the configuration of the student.

    Raises:
      DssError: if it has too few.
    """
    vocabulary = load_vocabulary(source)
    if vocabulary.size > student.vocab_size:
        raise DssError(
            f"{source}: wrong vocabulary: it has {vocabulary.size} ids and the student "
            f"{student.vocab_size} embeddings; give the one that the checkpoint was trained with"
        )


def import_checkpoint(experiment: Experiment) -> Run:
    """Creates a run directory, at step 0, from the experiment's initial checkpoint.

    Raises:
      DssError: if the folder is not empty, or the checkpoint cannot be read.
    """
    folder = run_folder(experiment)
    # All processes check before one of them writes.
    if not all_agree(not folder.exists() or not any(folder.iterdir())):
        raise DssError(f"{folder}: not empty; import into a new folder")
    run, params = create_run(experiment)
    checkpoints = Checkpoints(folder / CHECKPOINTS, largest=largest_part(params), frozen=True)
    checkpoints.save(init_state(params, optax.identity()))
    checkpoints.close()
    return run
