"""What run directories hold, read for a report. Nothing here computes; nothing is written."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dss.config.experiment import Experiment
from dss.data.examples import hash_input, read_json_lines
from dss.errors import UserError
from dss.mixtures.ledger import Ledger
from dss.mixtures.methods import Method, read_name
from dss.paths import CONFIG_FILE, PREDICTIONS, check_no_pipes
from dss.runs.directory import CHECKPOINTS, load_run
from dss.runs.session import read_sessions
from dss.student.network import num_parameters
from dss.training.metrics import read_metrics

__all__ = ["SHOWN_EXAMPLES", "Collected", "EvaluationRecord", "RunRecord", "collect", "find_runs"]

SHOWN_EXAMPLES = 300  # of an evaluation, whose texts are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """A student's answers to a split, as `dss eval` left them.

    Attributes:
      mixture: the name of what it was judged on.
      split: "train", "valid" or "test".
      step: of the checkpoint.
      metric: "accuracy" or "rouge_l".
      scores: of each answer, by the example's id, in [0, 1].
      judged: a hash of each example's input and target, by its id.
      teachers: what `dss eval` measured of each; empty where it measured none.
      majority: the share of the most frequent label of a closed set; None for others.
      shown: every so many lines, at most `SHOWN_EXAMPLES`, with all their texts.
    """

    mixture: str
    split: str
    step: int
    metric: str
    scores: Mapping[str, float]
    judged: Mapping[str, str]
    teachers: Mapping[str, Mapping[str, Any]]
    majority: float | None
    shown: Sequence[Mapping[str, Any]]

    @property
    def value(self) -> float:
        """The mean score."""
        return sum(self.scores.values()) / len(self.scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run directory's contents.

    Attributes:
      name: where it lies, from what the user named.
      experiment: its configuration.
      config_text: the same, as its file has it.
      dataset: the name of what it learns from.
      method: how it learns, in words.
      teacher: whose outputs it learns from; None for none.
      parameters: of its student.
      metrics: the lines of metrics.jsonl.
      speed: the lines of speed.jsonl.
      sessions: the lines of sessions.jsonl.
      evaluations: all that were kept, those on the test split first.
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
        """The last step that was logged."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def is_imported(self) -> bool:
        """Whether it holds a checkpoint that was never trained here."""
        return not self.experiment.has_task

    @property
    def is_done(self) -> bool:
        """Whether it was trained to its last step, or to the end of its patience."""
        trainer = self.experiment.trainer
        at_end = self.step >= trainer.train_steps
        if trainer.patience is not None and self.sessions:
            at_end = at_end or self.sessions[-1].get("outcome") == "done"
        return at_end and not self.failure and not self.is_imported

    @property
    def failure(self) -> str | None:
        """What ended its last session, where that was no signal and not the end."""
        outcome = str(self.sessions[-1].get("outcome", "")) if self.sessions else ""
        return outcome.removeprefix("failed: ") if outcome.startswith("failed") else None

    @property
    def status(self) -> str:
        """How far it got, in words."""
        if self.is_imported:
            return "imported, not trained"
        of = f"step {self.step:,} of {self.experiment.trainer.train_steps:,}"
        if self.failure:
            return f"failed at {of}: {self.failure}"
        if self.is_done:
            return "done"
        return f"unfinished, {of}" if self.metrics else "not begun"

    @property
    def data(self) -> Mapping[str, Any] | None:
        """What it trains on, in numbers; None where its sessions did not say."""
        return next((s["data"] for s in reversed(self.sessions) if "data" in s), None)

    @property
    def examples(self) -> int | None:
        """How many training examples it has, those that its method cannot use included: methods
        on one fraction of the data have the same.
        """
        if self.data is None:
            return None
        ledger = next((t["ledger"] for t in self.data["tasks"] if t.get("ledger")), None)
        return int(self.data["examples"]) if ledger is None else Ledger(**ledger).drawn

    @property
    def machine(self) -> Mapping[str, Any] | None:
        """Devices and versions of its last session."""
        return next((s for s in reversed(self.sessions) if "device" in s), None)

    @property
    def seconds(self) -> tuple[float, bool] | None:
        """How long its sessions took, and whether that is all: who is killed says nothing."""
        if not self.sessions:
            return None
        ended = [float(s["seconds"]) for s in self.sessions if "seconds" in s]
        return sum(ended), len(ended) == sum("device" in s for s in self.sessions)

    def evaluation(self, split: str) -> EvaluationRecord | None:
        """Returns the evaluation that counts: of the step that validation chose or, where that
        was not evaluated, of the last one. What the split itself scores has no say.
        """
        mixture = self.experiment.mixture_name
        found = [e for e in self.evaluations if e.split == split and mixture in (None, e.mixture)]
        best = self.best_step
        return max(found, key=lambda e: (e.step == best, e.step), default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best score on validation."""
        for name in ("valid/accuracy", "valid/rouge_l"):
            lines = [line for line in self.metrics if name in line]
            if lines:
                return int(max(lines, key=lambda line: (line[name], line["step"]))["step"])
        return None

    @property
    def best_valid(self) -> float | None:
        """The best accuracy on validation, in [0, 1]."""
        values = [line["valid/accuracy"] for line in self.metrics if "valid/accuracy" in line]
        return max(values, default=None)


@dataclasses.dataclass(frozen=True)
class Collected:
    """All that was found.

    Attributes:
      runs: the runs, by name.
      problems: (where, what is wrong) of what could not be read and is left out.
    """

    runs: Sequence[RunRecord]
    problems: Sequence[tuple[str, str]]


def find_runs(folders: Sequence[str]) -> list[epath.Path]:
    """Returns the run directories that are, or lie in, some folders.

    Raises:
      UserError: a folder is not there, or there is no run.
    """
    found: dict[str, epath.Path] = {}
    for folder in folders:
        path = epath.Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"{folder}: no such folder; give run directories or folders of them")
        found |= {str(run): run for run in _walk(path)}
    if not found:
        raise UserError(
            f"{', '.join(folders)}: no run found: no folder with a {CONFIG_FILE}; "
            "give what --gin.MODEL_DIR was, or a folder above it"
        )
    return list(found.values())


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    if (folder / CONFIG_FILE).is_file():
        yield folder
        return
    for path in sorted(folder.iterdir(), key=lambda p: _natural(p.name)):
        if path.is_dir() and path.name != CHECKPOINTS and not path.name.startswith("."):
            yield from _walk(path)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Returns what sorts run-9 before run-10."""
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
    """Reads all run directories that are, or lie in, some folders.

    A run or an evaluation that cannot be read becomes a problem, and the others are read on; so
    does a sweep's run that has not begun.

    Raises:
      UserError: see `find_runs`.
    """
    runs: list[RunRecord] = []
    problems: list[tuple[str, str]] = []
    found = find_runs(folders)
    for folder in found:
        try:
            run = _read_run(folder, problems)
            _ = run.examples, run.machine  # of what its sessions recorded
            runs.append(run)
        except Exception as error:  # whatever its files make of the code that reads them
            problems.append((str(folder), str(error) or type(error).__name__))
    above = [*(epath.Path(f).expanduser() for f in folders), *(run.parent for run in found)]
    for folder in {str(path): path for path in above}.values():
        try:
            problems += _not_begun(folder).items()
        except (UserError, OSError) as error:
            problems.append((str(folder), f"the sweep's status cannot be read: {error}"))
    for run in [run for run in runs if run.is_imported and not run.evaluations]:
        runs.remove(run)
        problems.append((run.name, "an imported checkpoint that was not evaluated; left out"))
    problems += _judged_otherwise(runs)
    return Collected(runs, problems)


def _judged_otherwise(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Returns the runs whose test examples are not the first such run's though their ids are."""
    out = []
    first: dict[tuple[str, str, str], tuple[str, EvaluationRecord]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            key = (run.dataset, evaluation.split, evaluation.metric)
            name, other = first.setdefault(key, (run.name, evaluation))
            differ = sum(
                evaluation.judged[id_] != judged
                for id_, judged in other.judged.items()
                if id_ in evaluation.judged
            )
            if differ:
                out.append(
                    (
                        run.name,
                        f"{differ:,} of its {len(evaluation.judged):,} {evaluation.split} examples "
                        f"have the ids of {name}'s and another input or target: the data changed "
                        "in between, or a teacher's labels are judged by; they are left out of "
                        "comparisons",
                    )
                )
    return out


def _not_begun(folder: epath.Path) -> dict[str, str]:
    """Returns those runs of the sweeps in a folder that have no run directory, and why."""
    out = {}
    for path in sorted(folder.glob("sweep*.jsonl")):
        check_no_pipes(path)
        for line in read_metrics(path):
            run = folder / str(line.get("run"))
            if not (run / CONFIG_FILE).is_file():
                error = line.get("error")
                out[str(run)] = f"failed: {error}" if error else "of the sweep, and not begun"
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
    """Returns the lines of a metrics file, each of numbers and of a step."""
    lines = read_metrics(path)
    for number, line in enumerate(lines, 1):
        values = [line.get("step"), *line.values()]
        if not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{path}:{number}: a line of metrics has a step, and numbers")
    return lines


def _dataset_name(experiment: Experiment, sessions: Sequence[Mapping[str, Any]]) -> str | None:
    for session in sessions:
        if "data" in session:
            return str(session["data"]["dataset"])
    if experiment.dataset_name is not None or experiment.data.dataset_path is None:
        return experiment.dataset_name
    return epath.Path(experiment.data.dataset_path).stem.replace("-", "_")


def _parse_mixture(name: str, dataset: str | None) -> tuple[str, str, str | None]:
    """Returns the parts of a mixture's name: dataset, method in words, teacher."""
    if dataset is None or not name.startswith(f"{dataset}_"):
        starts = (match.start() for match in re.finditer("_", name))
        dataset = next((name[:i] for i in starts if read_name(name[i + 1 :])), name)
    rest = name[len(dataset) + 1 :]
    found = read_name(rest)
    if found is None:
        return dataset, rest.replace("_", " ") or "unknown", None
    return dataset, found[0].display_name, found[1]


def _read_evaluation(path: epath.Path) -> EvaluationRecord:
    mixture, split, step = path.stem.rsplit("-", 2)
    with path.open(encoding="utf-8") as file:
        stride = -(-sum(1 for _ in file) // SHOWN_EXAMPLES) or 1
    scores: dict[str, float] = {}
    judged: dict[str, tuple[Any, Any]] = {}
    shown = []
    for number, (where, line) in enumerate(read_json_lines(path)):
        score = line.get("score")
        if not isinstance(score, int | float) or not math.isfinite(score) or "id" not in line:
            raise UserError(f"{where}: no id and score; `dss eval` writes the file again")
        scores[str(line["id"])] = float(score)
        judged[str(line["id"])] = line.get("input"), line.get("target")
        if number % stride == 0:
            shown.append(line)
    if not scores:
        raise UserError(f"{path}: empty; `dss eval` writes it again")
    summary = path.with_suffix(".json")
    said = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    metric = said.get("metric") or ("accuracy" if set(scores.values()) <= {0.0, 1.0} else "rouge_l")
    if metric == "accuracy" and not set(scores.values()) <= {0.0, 1.0}:
        raise UserError(f"{path}: scores of an accuracy that are neither 0 nor 1")
    counts = [sum(row) for row in (said.get("confusion") or {}).get("counts", ())]
    return EvaluationRecord(
        mixture=mixture,
        split=split,
        step=int(step),
        metric=metric,
        scores=scores,
        # A rationale to resemble is a teacher's own, and no sign of other data.
        judged={
            id_: hash_input(json.dumps(pair if metric == "accuracy" else pair[:1]))
            for id_, pair in judged.items()
        },
        teachers=said.get("teachers") or {},
        majority=max(counts) / sum(counts) if any(counts) else None,
        shown=shown,
    )
