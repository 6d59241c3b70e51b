"""A trained student at work: evaluation, labels and rationales."""

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Sequence

from etils import epath

from dss.config.experiment import Experiment
from dss.config.gin_files import load_config
from dss.data.vocabulary import encode_example
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
    """Returns the run of a student, wherever it lies.

    Args:
      source: a run directory; or what INITIAL_CHECKPOINT_PATH can be, such as `hf:FOLDER` of
        `dss export`, which is made a run in a folder that is there as long as this process. An
        exported student's own config.gin says what it learnt.
      flags: `NAME=VALUE` of gin values to read differently.

    Raises:
      UserError: there is no student, or no vocabulary beside it.
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


def _rationale_task(mixture: Mixture) -> Task:
    task = next((task for task in mixture.tasks if task.kind != "label"), None)
    if task is None:
        raise UserError(
            f"{mixture.name}: its students learn no rationales; train one on a step_by_step mixture"
        )
    return task


def label(
    predictor: Predictor, mixture: Mixture, texts: Sequence[str], inputs_length: int
) -> list[str]:
    """Returns the label that a student predicts for each input."""
    examples = [EvaluationExample(str(i), text, "") for i, text in enumerate(texts)]
    return predictor.predict(mixture, examples, inputs_length)
