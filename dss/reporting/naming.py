"""Display names of methods and students: a common name and the hyperparameters that differ."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dss.config.experiment import Experiment
from dss.mixtures.methods import Method
from dss.reporting.collect import RunRecord

__all__ = ["count_text", "method_names", "student_names"]

# Configuration fields that may differ between repeats, or that group runs elsewhere in the report.
IGNORED = {
    "mixture", "dataset", "method", "teacher", "run_dir", "student", "initial_checkpoint",
      "vocabulary", "seed",
    "microbatches", "remat", "eval_examples", "mesh", "decoding",
    "data.root", "data.dataset_path", "data.fraction",
    "trainer.eval_period", "trainer.log_period",
}  # fmt: skip
NEARLY = 1.1  # numbers within this ratio count as equal: equal compute gives unequal steps
ORDER = [method.display_name for method in Method]


def count_text(number: float) -> str:
    """Returns a number of parameters in short form.

    >>> count_text(120_640), count_text(77e6), count_text(2.85e9), count_text(540e9)
    ('0.121M', '77M', '2.85B', '540B')
    """
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _initialization(run: RunRecord) -> str:
    """Returns the name of a student's initial checkpoint, or "scratch"."""
    source = run.experiment.initial_checkpoint
    return "scratch" if source is None else epath.Path(source.removeprefix("hf:")).name


def student_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Returns the display name of each run's student, by run name.

    That is its number of parameters, with the initial checkpoint if students of one size have
    different ones.
    """
    initializations: dict[str, set[str]] = collections.defaultdict(set)
    for run in runs:
        initializations[count_text(run.parameters)].add(_initialization(run))
    out = {}
    for run in runs:
        size = count_text(run.parameters)
        several = len(initializations[size]) > 1
        out[run.name] = f"{size} from {_initialization(run)}" if several else size
    return out


def _hyperparameters(experiment: Experiment) -> dict[str, Any]:
    """Returns the configuration fields that distinguish methods, such as `trainer.train_steps`."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        if field.name in IGNORED:
            continue
        if dataclasses.is_dataclass(value):
            inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            inner = {f"{field.name}.{name}": v for name, v in inner.items()}
            out |= {name: v for name, v in inner.items() if name not in IGNORED}
        else:
            out[field.name] = value
    return out


def method_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Returns the display name of each run's method, by run name, ordered by method.

    Runs of the same method, student and fraction of the data are repeats if only their seeds
    differ. Otherwise their names include the hyperparameters that differ.
    """
    teachers = {run.teacher for run in runs if run.teacher}
    groups: dict[tuple[str, str | None], list[RunRecord]] = collections.defaultdict(list)
    for run in runs:
        groups[run.method, run.teacher if len(teachers) > 1 else None].append(run)
    names = {}
    for (method, teacher), group in groups.items():
        values = {run.name: _hyperparameters(run.experiment) for run in group}
        varying = _varying_fields(group, values)
        labels = {f: _labels([values[run.name][f] for run in group]) for f in varying}
        for run in group:
            parts = [_field_text(f, labels[f][repr(values[run.name][f])]) for f in varying]
            details = ", ".join([teacher, *parts] if teacher else parts)
            names[run.name] = f"{method} ({details})" if details else method
    methods = {run.name: run.method for run in runs}
    rank = {m: i for i, m in enumerate(ORDER)}
    order = sorted(names, key=lambda run: (rank.get(methods[run], len(rank)), names[run]))
    return {run: names[run] for run in order}


def _varying_fields(
    group: Sequence[RunRecord], values: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Returns the fields that differ between runs of the same student and fraction of the data.

    Args:
      group: runs of one method.
      values: hyperparameters of each run, by run name.
    """
    repeats: dict[Any, list[RunRecord]] = collections.defaultdict(list)
    for run in group:
        repeats[run.parameters, _initialization(run), run.experiment.data.fraction].append(run)
    varying: dict[str, None] = {}
    for same in repeats.values():
        for field in values[same[0].name]:
            labels = _labels([values[run.name][field] for run in same])
            if len(set(labels.values())) > 1:
                varying[field] = None
    return list(varying)


def _labels(values: Sequence[Any]) -> dict[str, str]:
    """Returns a label for each value, by its repr; nearly equal numbers have the same label."""
    distinct = {repr(v): v for v in values}
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct.values()):
        return {r: str(v) for r, v in distinct.items()}
    groups: list[list[float]] = []
    for value in sorted(distinct.values()):
        if groups and groups[-1][0] > 0 and value <= NEARLY * groups[-1][0]:
            groups[-1].append(value)
        else:
            groups.append([value])
    return {
        repr(v): f"{'about ' if len(group) > 1 else ''}{group[0]:,}"
        for group in groups
        for v in group
    }


def _field_text(field: str, label: str) -> str:
    name = field.rpartition(".")[2]
    return f"{label} steps" if name == "train_steps" else f"{name.replace('_', ' ')} {label}"
