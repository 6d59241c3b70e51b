"""The public functions `annotate`, `train` and `load`, and the class of a trained student.

`import dss` exports these names; see docs/python.md for examples. The command line calls the same
library functions.
"""

import collections
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dss.config.experiment import Experiment
from dss.data.datasets import Dataset
from dss.errors import ConfigError, DataError, DssError
from dss.paths import CONFIG_FILE

if TYPE_CHECKING:
    from dss.evaluation.evaluator import Predictor
    from dss.evaluation.result import Evaluation
    from dss.mixtures.methods import Mixture
    from dss.runs.directory import Run
    from dss.training.loop import Progress

__all__ = ["Annotation", "Prediction", "Student", "annotate", "load", "train"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A student's answer to an input.

    Attributes:
      label: the label.
      probabilities: the probability of each possible label, summing to 1; empty if the dataset has
        no closed label set.
      rationale: the rationale; None if none was requested.
      truncated: whether the input was longer than the student's maximum input length.
      abstained: whether the highest probability is below the threshold; False without a threshold.
    """

    label: str
    probabilities: Mapping[str, float]
    rationale: str | None = None
    truncated: bool = False
    abstained: bool = False


def _texts(inputs: str | Sequence[str]) -> list[str]:
    """Returns inputs as a list.

    Raises:
      DataError: if they are not texts.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"inputs: give a text or a list of texts, not {str(inputs)[:80]!r}")
    return list(texts)


def _quiet() -> None:
    """Silences what Orbax logs about its own options."""
    logging.getLogger("absl").setLevel(logging.ERROR)


class Student:
    """A trained student, from `load` or `train`.

    Attributes:
      run: the run directory, with the experiment and the checkpoints.
      checkpoint: "best", "latest" or a step.
    """

    def __init__(self, run: "Run", checkpoint: str = "best"):
        """Opens the student of a run; parameters are read at the first prediction."""
        self.run, self.checkpoint = run, checkpoint

    def __repr__(self) -> str:
        return f"Student({str(self.run.folder)!r}, checkpoint={self.checkpoint!r})"

    @property
    def experiment(self) -> Experiment:
        """The configuration that the student was trained with."""
        return self.run.experiment

    @functools.cached_property
    def _mixture(self) -> "Mixture":
        return self.run.mixture(must_exist=False)

    @functools.cached_property
    def _predictor(self) -> "Predictor":
        return self.run.predictor(self.checkpoint)[0]

    def predict(
        self,
        inputs: str | Sequence[str],
        *,
        rationales: bool = False,
        threshold: float | None = None,
    ) -> list[Prediction]:
        """Returns a prediction for each input.

        Args:
          inputs: the texts, without the prefix `predict: `; a single text counts as a list of one.
          rationales: whether to generate a rationale for each input.
          threshold: the probability below which a prediction is marked `abstained`; None for none.

        Raises:
          DssError: if the student was not trained on a task, rationales are requested and it was
            not trained to generate them, or a threshold is given and its labels have no
            probabilities.
        """
        from dss.data.vocabulary import is_cut
        from dss.evaluation.calibration import check_probabilities, check_threshold
        from dss.runs.student import answer

        texts = _texts(inputs)
        if threshold is not None:
            check_threshold(threshold)
            check_probabilities(self._mixture, self.experiment.decoding)
        mixture, predictor = self._mixture, self._predictor
        length = self.experiment.data.inputs_length
        answers = answer(predictor, mixture, texts, length)
        explanations = self.explain(texts) if rationales else [None] * len(texts)
        prefix = mixture.tasks[0].prefix
        return [
            Prediction(
                label=given.text,
                probabilities=given.probabilities,
                rationale=rationale,
                truncated=is_cut(predictor.vocabulary, prefix + text, length),
                abstained=threshold is not None and given.is_below(threshold),
            )
            for given, rationale, text in zip(answers, explanations, texts, strict=True)
        ]

    def explain(self, inputs: str | Sequence[str]) -> list[str]:
        """Returns the rationale that the student generates for each input.

        Args:
          inputs: the texts, without a prefix; a single text counts as a list of one.

        Raises:
          DssError: if the student was not trained to generate rationales.
        """
        from dss.runs.student import explain

        texts = _texts(inputs)
        length = self.experiment.data.inputs_length
        return explain(self._predictor, self._mixture, texts, length)

    def evaluate(self, split: str = "test", *, rationales: bool = False) -> "Evaluation":
        """Evaluates the student on a split of its dataset; returns predictions and scores.

        Args:
          split: "train", "valid" or "test".
          rationales: whether to generate and score rationales too.

        Raises:
          DssError: if the split is missing or has no labels, or rationales are requested and the
            student was not trained to generate them.
        """
        from dss.runs.student import evaluate

        return evaluate(self.run, split=split, checkpoint=self.checkpoint, rationales=rationales)

    def export(
        self, folder: str | os.PathLike[str], to: Literal["hf", "t5x", "ctranslate2"] = "hf"
    ) -> Path:
        """Exports the student to the format of another library, and returns the folder.

        Args:
          folder: a new folder.
          to: "hf" for transformers, "t5x", or "ctranslate2".

        Raises:
          DssError: if the folder is not empty, the format cannot represent the student, or the
            exported student's logits differ.
        """
        from dss.export.export import export

        return export(self.run, to, str(folder), self.checkpoint).path


def load(
    source: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    dataset: Dataset | str | None = None,
    method: str | None = None,
) -> Student:
    """Returns a trained student.

    Args:
      source: a run directory, a folder of `dss export`, "hf:FOLDER", "hf:NAME" on the hub, or
        "t5x:FOLDER".
      checkpoint: "best", "latest" or a step of a run directory.
      dataset: the dataset to predict for: of an imported checkpoint, or of a run whose data have
        moved; None for the dataset of the run.
      method: the training method, see `dss.Method`; None for the run's, and "finetune" for an
        imported checkpoint.

    Raises:
      DssError: if the source has no student, or no vocabulary.
    """
    from dss.runs.directory import Run
    from dss.runs.student import open_student

    _quiet()
    path = os.fspath(source)
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / f).is_file() for f in (CONFIG_FILE, "config.json")):
        raise DssError(f"{path}: no run, export or checkpoint: no {CONFIG_FILE}, no config.json")
    if (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        path = f"hf:{path}"  # an export in Hugging Face format, with its run's configuration
    run = open_student(path)
    changes: dict[str, Any] = {} if dataset is None else {"dataset": dataset}
    if method is not None or (dataset is not None and not run.experiment.has_task):
        changes |= {"method": method or "finetune", "mixture": None}
    run = Run(run.folder, dataclasses.replace(run.experiment, **changes))
    return Student(run, checkpoint)


def train(
    experiment: Experiment,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    progress: "Progress | None" = None,
    resume: Literal["never", "auto", "must"] = "auto",
) -> Student:
    """Trains a student, and returns it with its best checkpoint.

    If the run directory has an unfinished run of the same experiment, training resumes.

    Args:
      experiment: the dataset, the method, the student and the hyperparameters.
      run_dir: the run directory; None for `experiment.run_dir`.
      progress: the callbacks for steps and evaluations; None for none.
      resume: "auto" to resume a run if there is one, "must" to require one, "never" to fail on one.

    Raises:
      DssError: if the experiment is incomplete or inconsistent.
      KeyboardInterrupt: if training was interrupted by a signal; the last step is saved.
    """
    from dss.runs.directory import load_run, run_folder
    from dss.runs.train import run_experiment

    _quiet()
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"experiment: give a dss.Experiment, not {type(experiment).__name__}")
    if run_dir is not None:
        experiment = dataclasses.replace(experiment, run_dir=os.fspath(run_dir))
    result = run_experiment(experiment, progress, resume)
    if result.stopped_by is not None:
        raise KeyboardInterrupt(f"{result.stopped_by.name}: saved at step {result.step}")
    return Student(load_run(run_folder(experiment)))


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The outcome of `annotate`.

    Attributes:
      teacher: the teacher's name, for `Experiment.teacher`.
      path: the file with the teacher's outputs, a JSON line for each example.
      counts: the number of outputs by status: "ok", "unparsed", "refused", "error".
      cost: the cost of all requests to this teacher so far; None without prices.
      stopped: the reason for stopping early; None if all examples were annotated.
    """

    teacher: str
    path: Path
    counts: Mapping[str, int]
    cost: float | None
    stopped: str | None


def annotate(
    dataset: Dataset,
    *,
    model: str,
    prompt: str | None = None,
    split: str = "train",
    base_url: str | None = None,
    api: Literal["chat", "completions"] = "chat",
    key_env: str = "OPENAI_API_KEY",
    parameters: Mapping[str, Any] | None = None,
    samples: int = 1,
    name: str | None = None,
    output: str | os.PathLike[str] | None = None,
    prices: str | os.PathLike[str] | None = None,
    max_cost: float | None = None,
    max_requests: int | None = None,
    concurrency: int = 64,
    replace: bool = False,
) -> Annotation:
    """Requests a label and a rationale from a teacher for every example that has none yet.

    Answers are journaled as they arrive: after an interruption the same call resumes, without
    repeating paid requests.

    Args:
      dataset: the dataset.
      model: the model's name at the endpoint.
      prompt: the name of a prompt of dss, or a YAML file; None for the prompt of a released
        dataset.
      split: "train", "valid" or "test".
      base_url: an OpenAI-compatible endpoint, up to its version; None for the environment variable
        OPENAI_BASE_URL, or else OpenAI's.
      api: "chat" or "completions".
      key_env: the environment variable with the API key.
      parameters: parameters of every request; they override the prompt's, and the value None
        removes one.
      samples: the number of answers for each example.
      name: the teacher's name in files and methods; None for the model's.
      output: the folder to write to; None for the folder of the examples.
      prices: a YAML file with the model's price.
      max_cost: the limit on the cost of all requests to this teacher, earlier calls included.
      max_requests: the limit on the requests of this call.
      concurrency: the limit on concurrent requests.
      replace: whether to overwrite outputs even if answers are lost.

    Raises:
      DssError: if an argument, an example or the key is invalid, or the endpoint rejects requests.
    """
    from dss.teacher.annotate import Limits
    from dss.teacher.ask import ask, open_journal
    from dss.teacher.client import Client, api_key, default_url
    from dss.teacher.job import dataset_job
    from dss.teacher.prices import load_price
    from dss.teacher.request import Teacher

    if not isinstance(dataset, Dataset):
        raise ConfigError(
            "dataset: give dss.Dataset.from_files(PATH) or dss.Dataset.released(NAME)"
        )
    teacher = Teacher(
        model=model,
        base_url=default_url() if base_url is None else base_url,
        api=api,
        parameters=dict(parameters or {}),
        samples=samples,
    )
    folder = None if output is None else Path(output)
    job = dataset_job(dataset, split, prompt, teacher, output=folder, name=name)
    price = None if prices is None else load_price(Path(prices), model)
    limits = Limits(concurrency=concurrency, max_requests=max_requests, max_cost=max_cost)
    client = Client(teacher, api_key(key_env, teacher.base_url), limits.timeout)
    with open_journal(job) as journal:

        def export() -> Mapping[str, int] | None:
            counts = job.export(journal, replace=replace)
            job.save_usage(journal, price)
            return counts

        state = ask(
            job,
            journal,
            client,
            limits,
            price=price,
            export=export,
            replace=replace,
        )
        counts = export()
    return Annotation(
        teacher=re.sub(r"\W", "_", job.name, flags=re.ASCII),
        path=job.file("jsonl"),
        counts=_count(job.file("jsonl")) if counts is None else counts,
        cost=state.cost,
        stopped=state.stopped,
    )


def _count(path: Path) -> Mapping[str, int]:
    """Returns the number of outputs in a file by their status."""
    from etils import epath

    from dss.data.examples import read_json_lines

    if not path.is_file():
        return collections.Counter()
    rows = read_json_lines(epath.Path(path))
    return collections.Counter(str(row.get("status", "ok")) for _, row in rows)
