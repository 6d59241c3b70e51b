"""Evaluation and prediction with a trained student."""

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Sequence

from etils import epath

from dss.config.experiment import Experiment
from dss.config.gin_files import load_config
from dss.data.vocabulary import encode_example
from dss.errors import DssError
from dss.evaluation.evaluator import (
    DecodingProgress,
    EvaluationExample,
    Predictor,
    evaluation_set,
    metric_name,
)
from dss.evaluation.result import Evaluation
from dss.evaluation.teachers import read_teachers
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import Task, extract_rationale
from dss.paths import CONFIG_FILE
from dss.runs.directory import Run, is_run, load_run
from dss.runs.start import import_checkpoint

__all__ = [
    "evaluate",
    "explain",
    "label",
    "open_student",
]


def open_student(source: str, flags: Sequence[str] = ()) -> Run:
    """Opens the run of a student, importing a checkpoint of another format first.

    Args:
      source: a run directory, or a checkpoint as in INITIAL_CHECKPOINT_PATH, such as `hf:FOLDER`
        of `dss export`. A checkpoint is imported into a temporary folder, with the mixture of its
        config.gin if it is an exported student.
      flags: `NAME=VALUE` of gin values to override.

    Raises:
      DssError: if the source has no student, or no vocabulary.
    """
    if is_run(source):
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


def evaluate(
    run: Run,
    *,
    split: str = "test",
    checkpoint: str = "best",
    rationales: bool = False,
    progress: DecodingProgress | None = None,
) -> Evaluation:
    """Evaluates a run's student on a split of its mixture.

    Args:
      run: the run.
      split: "train", "valid" or "test".
      checkpoint: "best", "latest" or a step.
      rationales: whether to generate and score rationales too.
      progress: the callbacks for decoded answers and rationales; None for none.

    Raises:
      DssError: if the run has no such checkpoint, the split is missing or has no labels, or
        rationales are requested and the student was not trained to generate them.
    """
    experiment = run.experiment
    mixture = run.mixture()
    if rationales:
        _rationale_task(mixture)
        if metric_name(mixture) != "accuracy":
            raise DssError(
                f"{mixture.name}: its predictions are rationales; leave `rationales` out"
            )
    examples = evaluation_set(
        mixture, split, fraction=experiment.data.fraction, seed=experiment.seed
    )
    teachers = read_teachers(mixture, split)
    progress = progress or DecodingProgress()
    progress.expect((1 + rationales) * len(examples))
    predictor, step = run.predictor(checkpoint, progress)
    inputs_length = experiment.data.inputs_length
    answers = predictor.answer(mixture, examples, inputs_length)
    explanations = None
    if rationales:
        explanations = explain(predictor, mixture, [e.text for e in examples], inputs_length)
    vocabulary = predictor.vocabulary
    return Evaluation.of(
        mixture, split, step, examples, answers, teachers, explanations, vocabulary=vocabulary
    )


def explain(
    predictor: Predictor, mixture: Mixture, texts: Sequence[str], inputs_length: int
) -> list[str]:
    """Returns the rationale that a student generates for each input.

    Raises:
      DssError: if the mixture has no task with rationales.
    """
    task = _rationale_task(mixture)
    inputs = [encode_example(predictor.vocabulary, task.prefix + t, inputs_length) for t in texts]
    length, start = predictor.decoding.rationale_length, task.start_id(predictor.vocabulary)
    outputs = predictor.generate(inputs, max_length=length, start=start)
    return [extract_rationale(t) for t in outputs] if task.kind != "rationale" else outputs


def _rationale_task(mixture: Mixture) -> Task:
    task = next((task for task in mixture.tasks if task.kind != "label"), None)
    if task is None:
        raise DssError(
            f"{mixture.name}: its students generate no rationales; train one with METHOD "
            "step_by_step"
        )
    return task


def label(
    predictor: Predictor, mixture: Mixture, texts: Sequence[str], inputs_length: int
) -> list[str]:
    """Returns the label that a student predicts for each input."""
    examples = [EvaluationExample(str(i), text, "") for i, text in enumerate(texts)]
    return predictor.predict(mixture, examples, inputs_length)
