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
from dss.evaluation.calibration import TemperatureScaling, check_probabilities
from dss.evaluation.evaluator import (
    Answer,
    DecodingProgress,
    Engine,
    EvaluationExample,
    evaluation_set,
    metric_name,
)
from dss.evaluation.result import Evaluation, candidate_probabilities
from dss.evaluation.teachers import read_teachers
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import Task, extract_rationale
from dss.parallel.processes import is_leader, wait_for_all
from dss.paths import CONFIG_FILE
from dss.runs.directory import CALIBRATION_FILE, Run, is_run, load_run
from dss.runs.start import import_checkpoint

__all__ = [
    "answer",
    "calibrate",
    "evaluate",
    "explain",
    "open_student",
]

MIN_EXAMPLES = 20  # examples that a temperature is fitted to, at least


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
        mixture,
        split,
        step,
        examples,
        answers,
        teachers,
        explanations,
        vocabulary=vocabulary,
        temperature=predictor.temperature,
    )


def calibrate(
    run: Run, *, checkpoint: str = "best", progress: DecodingProgress | None = None
) -> TemperatureScaling:
    """Fits the temperature of a run's label probabilities to the validation split, and saves it.

    Predictors of the run apply it to the same checkpoint and dataset. Examples whose label is not
    among their possible labels are left out.

    Args:
      run: the run.
      checkpoint: "best", "latest" or a step.
      progress: the callbacks for decoded answers; None for none.

    Raises:
      DssError: if the student does not choose among labels, there are too few examples, or the run
        has no such checkpoint.
    """
    experiment, mixture = run.experiment, run.mixture()
    check_probabilities(mixture, experiment.decoding)
    dataset, split = mixture.dataset, "valid"
    examples = [
        e
        for e in evaluation_set(
            mixture, split, fraction=experiment.data.fraction, seed=experiment.seed
        )
        if any(dataset.labels.is_right(label, e.target) for label in dataset.choices(e.text))
    ]
    if len(examples) < MIN_EXAMPLES:
        raise DssError(
            f"{mixture.name}: {split} has {len(examples)} labeled examples, and calibration needs "
            f"at least {MIN_EXAMPLES}; add some"
        )
    progress = progress or DecodingProgress()
    progress.expect(len(examples))
    predictor, step = run.predictor(checkpoint, progress)
    predictor = dataclasses.replace(predictor, temperature=1.0)
    answers = predictor.answer(mixture, examples, experiment.data.inputs_length)
    probabilities, correct = candidate_probabilities(mixture, examples, answers)
    scaling = TemperatureScaling.fit(
        probabilities, correct, dataset=dataset.name, split=split, step=step
    )
    if is_leader():
        scaling.save(run.folder / CALIBRATION_FILE)
    wait_for_all(CALIBRATION_FILE)
    return scaling


def explain(
    predictor: Engine, mixture: Mixture, texts: Sequence[str], inputs_length: int
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


def answer(
    predictor: Engine, mixture: Mixture, texts: Sequence[str], inputs_length: int
) -> list[Answer]:
    """Returns a student's prediction for each input; see `Engine.answer`."""
    examples = [EvaluationExample(str(i), text, "") for i, text in enumerate(texts)]
    return predictor.answer(mixture, examples, inputs_length)
