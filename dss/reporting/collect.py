"""Reads run directories into records for a report. Computes no predictions, writes no files."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dss.config.experiment import Experiment
from dss.data.examples import hash_input, read_json_lines
from dss.errors import DssError
from dss.mixtures.ledger import Ledger
from dss.mixtures.methods import Method, read_name
from dss.paths import CONFIG_FILE, PREDICTIONS, check_no_pipes
from dss.runs.directory import CHECKPOINTS, load_run
from dss.runs.session import read_sessions
from dss.student.network import num_parameters
from dss.training.metrics import read_metrics

__all__ = ["SHOWN_EXAMPLES", "Collected", "EvaluationRecord", "RunRecord", "collect", "find_runs"]

SHOWN_EXAMPLES = 300  # examples of an evaluation whose texts are kept, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """An evaluation of a student on a split, as saved by `dss eval`.

    Attributes:
      mixture: name of the mixture that the student was evaluated on.
      split: "train", "valid" or "test".
      step: training step of the checkpoint.
      metric: "accuracy" or "rouge_l".
      scores: score of each prediction, in [0, 1], by example id.
      hashes: hash of each example's input and target, by example id.
      teachers: summary of each teacher's scores, by teacher; empty without teachers.
      majority: accuracy of always predicting the most frequent label of a closed set; None if
        labels are not a closed set.
      shown: an evenly spaced sample of at most `SHOWN_EXAMPLES` lines of the predictions file.
    """

    mixture: str
    split: str
    step: int
    metric: str
    scores: Mapping[str, float]
    hashes: Mapping[str, str]
    teachers: Mapping[str, Mapping[str, Any]]
    majority: float | None
    shown: Sequence[Mapping[str, Any]]

    @property
    def value(self) -> float:
        """Mean score, in [0, 1]."""
        return sum(self.scores.values()) / len(self.scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Contents of a run directory.

    Attributes:
      name: path of the run directory, as found from the folders that the user gave.
      experiment: the run's configuration.
      config_text: text of the configuration file.
      dataset: name of the dataset.
      method: display name of the training method.
      teacher: name of the teacher that the student is trained on; None without one.
      parameters: number of the student's parameters.
      metrics: lines of metrics.jsonl.
      speed: lines of speed.jsonl.
      sessions: lines of sessions.jsonl.
      evaluations: all saved evaluations, those on the test split first.
    """

    name: str
    experiment: Experiment
    config_text: str
    dataset: str
    method: str
    teacher: str | None
    parameters: int
    metrics: Sequence[Mapping[str, Any]]
    speed: Sequence[Mapping[str, Any]]
    sessions: Sequence[Mapping[str, Any]]
    evaluations: Sequence[EvaluationRecord]

    @property
    def step(self) -> int:
        """Last step in the metrics; 0 if there are none."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def is_imported(self) -> bool:
        """Whether the run is an imported checkpoint without training."""
        return not self.experiment.has_task

    @property
    def is_done(self) -> bool:
        """Whether training reached its last step, or was stopped early by patience."""
        trainer = self.experiment.trainer
        at_end = self.step >= trainer.train_steps
        if trainer.patience is not None and self.sessions:
            at_end = at_end or self.sessions[-1].get("outcome") == "done"
        return at_end and not self.failure and not self.is_imported

    @property
    def failure(self) -> str | None:
        """Error that ended the last session; None if it ended otherwise."""
        outcome = str(self.sessions[-1].get("outcome", "")) if self.sessions else ""
        return outcome.removeprefix("failed: ") if outcome.startswith("failed") else None

    @property
    def status(self) -> str:
        """Progress of the run, in words."""
        if self.is_imported:
            return "imported, not trained"
        progress = f"step {self.step:,} of {self.experiment.trainer.train_steps:,}"
        if self.failure:
            return f"failed at {progress}: {self.failure}"
        if self.is_done:
            return "done"
        return f"unfinished, {progress}" if self.metrics else "not started"

    @property
    def data(self) -> Mapping[str, Any] | None:
        """Statistics of the training data; None if no session recorded them."""
        return next((s["data"] for s in reversed(self.sessions) if "data" in s), None)

    @property
    def examples(self) -> int | None:
        """Number of training examples, including those that the method cannot use.

        So methods trained on the same fraction of the data have the same number.
        """
        if self.data is None:
            return None
        ledger = next((t["ledger"] for t in self.data["tasks"] if t.get("ledger")), None)
        return int(self.data["examples"]) if ledger is None else Ledger(**ledger).drawn

    @property
    def machine(self) -> Mapping[str, Any] | None:
        """Devices and versions of the last session; None if not recorded."""
        return next((s for s in reversed(self.sessions) if "device" in s), None)

    @property
    def seconds(self) -> tuple[float, bool] | None:
        """Total seconds of the sessions, and whether all are recorded; None without sessions.

        A killed session records no time.
        """
        if not self.sessions:
            return None
        ended = [float(s["seconds"]) for s in self.sessions if "seconds" in s]
        return sum(ended), len(ended) == sum("device" in s for s in self.sessions)

    def evaluation(self, split: str) -> EvaluationRecord | None:
        """Returns the evaluation to report for a split; None without one.

        That is the evaluation of the step with the best validation score, else of the last step
        evaluated. Scores on the split itself are not used for the choice.
        """
        mixture = self.experiment.mixture_name
        evaluations = [
            e for e in self.evaluations if e.split == split and mixture in (None, e.mixture)
        ]
        best = self.best_step
        return max(evaluations, key=lambda e: (e.step == best, e.step), default=None)

    @property
    def best_step(self) -> int | None:
        """Step with the best validation score, the earlier on a tie; None without validation."""
        trainer = self.experiment.trainer
        scores = {
            int(line["step"]): score
            for line in self.metrics
            if (score := trainer.score_of(line)) is not None
        }
        return max(scores, key=lambda step: (scores[step], -step), default=None)

    @property
    def best_valid(self) -> float | None:
        """Best validation accuracy, in [0, 1]; None without one."""
        values = [line["valid/accuracy"] for line in self.metrics if "valid/accuracy" in line]
        return max(values, default=None)


@dataclasses.dataclass(frozen=True)
class Collected:
    """Runs read from folders, and problems met.

    Attributes:
      runs: runs that could be read, in order of their paths.
      problems: (path, message) of each file, run or sweep entry that is excluded.
    """

    runs: Sequence[RunRecord]
    problems: Sequence[tuple[str, str]]


def find_runs(folders: Sequence[str]) -> list[epath.Path]:
    """Returns all run directories among folders and their subfolders, each once.

    Raises:
      DssError: if a folder does not exist, or there is no run directory.
    """
    runs: dict[str, epath.Path] = {}
    for folder in folders:
        path = epath.Path(folder).expanduser()
        if not path.is_dir():
            raise DssError(
                f"{folder}: no such folder; give run directories, or folders that contain them"
            )
        runs |= {str(run): run for run in _walk(path)}
    if not runs:
        raise DssError(
            f"{', '.join(folders)}: no run found: no folder with a {CONFIG_FILE}; "
            "give run directories, or folders above them"
        )
    return list(runs.values())


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    if (folder / CONFIG_FILE).is_file():
        yield folder
        return
    for path in sorted(folder.iterdir(), key=lambda p: _natural(p.name)):
        if path.is_dir() and path.name != CHECKPOINTS and not path.name.startswith("."):
            yield from _walk(path)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Returns a sort key that puts run-9 before run-10."""
    digits, parts = "", []
    for letter in name:
        if letter.isdecimal():
            digits += letter
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, letter))
    return (*parts, (int(digits), "")) if digits else tuple(parts)


def collect(folders: Sequence[str]) -> Collected:
    """Reads all run directories among folders and their subfolders.

    A run or an evaluation that cannot be read is recorded as a problem and skipped, and so is a
    run of a sweep without a run directory.

    Raises:
      DssError: if a folder does not exist, or there is no run directory.
    """
    runs: list[RunRecord] = []
    problems: list[tuple[str, str]] = []
    run_folders = find_runs(folders)
    for folder in run_folders:
        try:
            run = _read_run(folder, problems)
            _ = run.examples, run.machine  # raises here if sessions.jsonl has unexpected contents
            runs.append(run)
        except Exception as error:  # malformed files may raise any exception
            problems.append((str(folder), str(error) or type(error).__name__))
    parents = [*(epath.Path(f).expanduser() for f in folders), *(run.parent for run in run_folders)]
    for folder in {str(path): path for path in parents}.values():
        try:
            problems += _missing_runs(folder).items()
        except (DssError, OSError) as error:
            problems.append((str(folder), f"the sweep's status cannot be read: {error}"))
    for run in [run for run in runs if run.is_imported and not run.evaluations]:
        runs.remove(run)
        problems.append((run.name, "an imported checkpoint that was not evaluated"))
    problems += _changed_examples(runs)
    return Collected(runs, problems)


def _changed_examples(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Returns a problem for each run with examples that differ from another run's of the same id.

    The other run is the first one that was evaluated on the same dataset, split and metric.
    """
    out = []
    first: dict[tuple[str, str, str], tuple[str, EvaluationRecord]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            key = (run.dataset, evaluation.split, evaluation.metric)
            name, other = first.setdefault(key, (run.name, evaluation))
            differ = sum(
                evaluation.hashes[id_] != value
                for id_, value in other.hashes.items()
                if id_ in evaluation.hashes
            )
            if differ:
                out.append(
                    (
                        run.name,
                        f"{differ:,} of its {len(evaluation.hashes):,} {evaluation.split} examples "
                        f"have another input or target than those of the same id in {name}: the "
                        "data changed in between, or the targets are a teacher's labels; they are "
                        "excluded from comparisons",
                    )
                )
    return out


def _missing_runs(folder: epath.Path) -> dict[str, str]:
    """Returns the runs of a folder's sweeps that have no run directory, with the reason."""
    out = {}
    for path in sorted(folder.glob("sweep*.jsonl")):
        check_no_pipes(path)
        for line in read_metrics(path):
            run = folder / str(line.get("run"))
            if not (run / CONFIG_FILE).is_file():
                error = line.get("error")
                out[str(run)] = f"failed: {error}" if error else "a run of a sweep, not started"
    return out


def _read_run(folder: epath.Path, problems: list[tuple[str, str]]) -> RunRecord:
    run = load_run(folder)
    experiment, sessions = run.experiment, read_sessions(folder)
    evaluations = []
    if (folder / PREDICTIONS).is_dir():
        for path in sorted((folder / PREDICTIONS).glob("*.jsonl")):
            try:
                evaluations.append(_read_evaluation(path))
            except Exception as error:
                problems.append((str(path), str(error) or type(error).__name__))
    mixture = experiment.mixture_name or next((e.mixture for e in evaluations), "")
    dataset, method, teacher = _parse_mixture(mixture, _dataset_name(experiment, sessions))
    if experiment.method is not None:
        method, teacher = Method.parse(experiment.method).display_name, experiment.teacher
    return RunRecord(
        name=str(folder),
        experiment=experiment,
        config_text=(folder / CONFIG_FILE).read_text(encoding="utf-8"),
        dataset=dataset,
        method=method if experiment.has_task else "as imported",
        teacher=teacher,
        parameters=num_parameters(run.config),
        metrics=_read_numbers(folder / "metrics.jsonl"),
        speed=_read_numbers(folder / "speed.jsonl"),
        sessions=sessions,
        evaluations=sorted(evaluations, key=lambda e: (e.split != "test", e.step)),
    )


def _read_numbers(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file, checked to be numbers with a step."""
    lines = read_metrics(path)
    for number, line in enumerate(lines, 1):
        values = [line.get("step"), *line.values()]
        if not all(isinstance(value, int | float) for value in values):
            raise DssError(f"{path}:{number}: a line of metrics must have a step, and numbers only")
    return lines


def _dataset_name(experiment: Experiment, sessions: Sequence[Mapping[str, Any]]) -> str | None:
    for session in sessions:
        if "data" in session:
            return str(session["data"]["dataset"])
    if experiment.dataset_name is not None or experiment.data.dataset_path is None:
        return experiment.dataset_name
    return epath.Path(experiment.data.dataset_path).stem.replace("-", "_")


def _parse_mixture(name: str, dataset: str | None) -> tuple[str, str, str | None]:
    """Returns the parts of a mixture's name: dataset, display name of the method, teacher."""
    if dataset is None or not name.startswith(f"{dataset}_"):
        starts = (match.start() for match in re.finditer("_", name))
        dataset = next((name[:i] for i in starts if read_name(name[i + 1 :])), name)
    rest = name[len(dataset) + 1 :]
    parsed = read_name(rest)
    if parsed is None:
        return dataset, rest.replace("_", " ") or "unknown", None
    return dataset, parsed[0].display_name, parsed[1]


def _read_evaluation(path: epath.Path) -> EvaluationRecord:
    mixture, split, step = path.stem.rsplit("-", 2)
    with path.open(encoding="utf-8") as file:
        stride = -(-sum(1 for _ in file) // SHOWN_EXAMPLES) or 1
    scores: dict[str, float] = {}
    texts: dict[str, tuple[Any, Any]] = {}
    shown = []
    for number, (where, line) in enumerate(read_json_lines(path)):
        score = line.get("score")
        if not isinstance(score, int | float) or not math.isfinite(score) or "id" not in line:
            raise DssError(f"{where}: no id or no score; write the file again with `dss eval`")
        scores[str(line["id"])] = float(score)
        texts[str(line["id"])] = line.get("input"), line.get("target")
        if number % stride == 0:
            shown.append(line)
    if not scores:
        raise DssError(f"{path}: empty; write it again with `dss eval`")
    summary_file = path.with_suffix(".json")
    summary: dict[str, Any] = {}
    if summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    is_binary = set(scores.values()) <= {0.0, 1.0}
    metric = summary.get("metric") or ("accuracy" if is_binary else "rouge_l")
    if metric == "accuracy" and not is_binary:
        raise DssError(f"{path}: the metric is accuracy, but some scores are neither 0 nor 1")
    counts = [sum(row) for row in (summary.get("confusion") or {}).get("counts", ())]
    return EvaluationRecord(
        mixture=mixture,
        split=split,
        step=int(step),
        metric=metric,
        scores=scores,
        # Target rationales differ by teacher on the same data, so they are not hashed.
        hashes={
            id_: hash_input(json.dumps(pair if metric == "accuracy" else pair[:1]))
            for id_, pair in texts.items()
        },
        teachers=summary.get("teachers") or {},
        majority=max(counts) / sum(counts) if any(counts) else None,
        shown=shown,
    )
