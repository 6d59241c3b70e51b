"""What methods and students are called: by what they have in common, and by what they differ in."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dss.config.experiment import Experiment
from dss.mixtures.methods import Method
from dss.reporting.collect import RunRecord

__all__ = ["count_text", "method_names", "student_names"]

# What may differ between runs that are repeats of each other.
IGNORED = {
    "mixture", "teacher", "run_dir", "student", "initial_checkpoint", "vocabulary", "seed",
    "microbatches", "remat", "eval_examples", "mesh", "decoding",
    "data.root", "data.dataset_path", "data.fraction",
    "trainer.eval_period", "trainer.log_period",
}  # fmt: skip
NEARLY = 1.1  # numbers within this ratio are one setting: steps of the same compute differ a little
ORDER = [method.display_name for method in Method]


def count_text(number: float) -> str:
    """Returns a number of parameters.

    >>> count_text(120_640), count_text(77e6), count_text(2.85e9), count_text(540e9)
    ('0.121M', '77M', '2.85B', '540B')
    """
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _beginning(run: RunRecord) -> str:
    source = run.experiment.initial_checkpoint
    return "scratch" if source is None else epath.Path(source.removeprefix("hf:")).name


def student_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Returns a name of each run's student, by the run's name: its size and, where students of
    one size began from different checkpoints, that.
    """
    beginnings: dict[str, set[str]] = collections.defaultdict(set)
    for run in runs:
        beginnings[count_text(run.parameters)].add(_beginning(run))
    out = {}
    for run in runs:
        size = count_text(run.parameters)
        several = len(beginnings[size]) > 1
        out[run.name] = f"{size} from {_beginning(run)}" if several else size
    return out


def _settings(experiment: Experiment) -> dict[str, Any]:
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
    """Returns a name of each run's method, by the run's name.

    Where runs of one method, student and fraction differ in more than their seed, they are no
    repeats of each other: the names say what they differ in.
    """
    teachers = {run.teacher for run in runs if run.teacher}
    groups: dict[tuple[str, str | None], list[RunRecord]] = collections.defaultdict(list)
    for run in runs:
        groups[run.method, run.teacher if len(teachers) > 1 else None].append(run)
    names = {}
    for (method, teacher), group in groups.items():
        settings = {run.name: _settings(run.experiment) for run in group}
        varying = _varying(group, settings)
        labels = {f: _labels([settings[run.name][f] for run in group]) for f in varying}
        for run in group:
            parts = [_say(f, labels[f][repr(settings[run.name][f])]) for f in varying]
            said = ", ".join([teacher, *parts] if teacher else parts)
            names[run.name] = f"{method} ({said})" if said else method
    first = {run.name: run.method for run in runs}
    rank = {m: i for i, m in enumerate(ORDER)}
    order = sorted(names, key=lambda run: (rank.get(first[run], len(rank)), names[run]))
    return {run: names[run] for run in order}


def _varying(group: Sequence[RunRecord], settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    repeats: dict[Any, list[RunRecord]] = collections.defaultdict(list)
    for run in group:
        repeats[run.parameters, _beginning(run), run.experiment.data.fraction].append(run)
    varying: dict[str, None] = {}
    for same in repeats.values():
        for field in settings[same[0].name]:
            labels = _labels([settings[run.name][field] for run in same])
            if len(set(labels.values())) > 1:
                varying[field] = None
    return list(varying)


def _labels(values: Sequence[Any]) -> dict[str, str]:
    """Returns what to call each value, by its repr; numbers that are nearly the same alike."""
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


def _say(field: str, label: str) -> str:
    name = field.rpartition(".")[2]
    return f"{label} steps" if name == "train_steps" else f"{name.replace('_', ' ')} {label}"
