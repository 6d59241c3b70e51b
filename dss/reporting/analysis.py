"""Statistics of a report: means with confidence intervals, comparisons, points of equal accuracy.

Only finished runs count, each with its evaluation on one split; of identical runs only the first.
Values that were not measured are None.
"""

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from dss.evaluation.significance import mcnemar, paired_bootstrap, seeds_interval
from dss.reporting.collect import Collected, EvaluationRecord, RunRecord
from dss.reporting.naming import method_names, student_names

__all__ = [
    "RELEASED_TEACHERS",
    "Cell",
    "Comparison",
    "Group",
    "Reach",
    "Teacher",
    "analyse",
    "compare",
    "reach",
]

COVERED = 0.9  # fraction of the test examples that a teacher must have answered to be compared
RELEASED_TEACHERS = {"palm": 540e9, "gpt_neox": 20e9}  # parameters of the released data's teachers


@dataclasses.dataclass(frozen=True)
class Cell:
    """Repeats of one method, student and fraction of the data, one run per seed.

    Attributes:
      method: display name of the method.
      student: display name of the student.
      parameters: number of the student's parameters.
      fraction: fraction of the training examples, in (0, 1].
      examples: number of training examples, averaged over runs; None if not recorded.
      runs: the runs, ordered by seed.
      evaluations: evaluations of the runs, in the same order.
      mean: accuracy averaged over runs, in [0, 1].
      interval: 95% confidence interval of the mean; None if the runs have no test examples in
        common.
    """

    method: str
    student: str
    parameters: int
    fraction: float
    examples: float | None
    runs: tuple[RunRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    mean: float
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher's accuracy on the students' test examples that it has answered.

    Attributes:
      name: name of the teacher.
      value: accuracy, in [0, 1].
      interval: 95% confidence interval of the accuracy.
      examples: number of test examples that the teacher has answered.
      evaluated: number of test examples that the students were evaluated on.
      parameters: number of parameters; None if unknown.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    examples: int
    evaluated: int
    parameters: float | None

    @property
    def is_comparable(self) -> bool:
        """Whether the teacher has answered nearly all of the students' test examples."""
        return self.examples >= COVERED * self.evaluated


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of two cells on the same test examples.

    Attributes:
      first, second: the cells.
      examples: number of test examples that both were evaluated on.
      difference: accuracy of the first minus the second, in [-1, 1].
      interval: 95% confidence interval of the difference, over test examples only.
      p_values: (seed, p-value) of runs with the same seed, by McNemar's exact test.
    """

    first: Cell
    second: Cell
    examples: int
    difference: float
    interval: tuple[float, float]
    p_values: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Reach:
    """First point of a learning curve that reaches a target accuracy.

    Attributes:
      method: display name of the curve's method.
      axis: attribute of cells that the curve runs over, "examples" or "parameters".
      student: display name of the curve's student; None for a curve over students.
      target: cell or teacher whose accuracy is to be reached.
      reached: first measured cell that reaches the target; None if none does.
      best: measured cell with the highest accuracy.
      estimate: interpolated value of the axis at which the curve crosses the target; None if the
        first cell reaches it already, or none does.
      previous: measured cell before `reached`; None if `estimate` is None.
      comparison: comparison of `reached` with the target; None if the target is a teacher.
    """

    method: str
    axis: str
    student: str | None
    target: Cell | Teacher
    reached: Cell | None
    best: Cell
    estimate: float | None = None
    previous: Cell | None = None
    comparison: Comparison | None = None

    @property
    def value(self) -> float:
        """Accuracy of the target."""
        return self.target.mean if isinstance(self.target, Cell) else self.target.value


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one dataset with their statistics.

    Attributes:
      dataset: name of the dataset.
      split: split of the reported accuracies.
      runs: all runs, finished or not, ordered by method, size, fraction and seed.
      methods: display name of each run's method, by run name.
      students: display name of each run's student, by run name.
      cells: finished and evaluated runs by method, student and fraction.
      teachers: all teachers, ordered by name, including those that are not comparable.
      comparisons: comparisons of each two methods on the same student and fraction.
      data_reaches: fewest training examples that match finetuning on all data, or a teacher.
      size_reaches: smallest students that match the largest one's finetuning, or a teacher.
      majority: accuracy of always predicting the most frequent label; None without a closed set.
    """

    dataset: str
    split: str
    runs: tuple[RunRecord, ...]
    methods: Mapping[str, str]
    students: Mapping[str, str]
    cells: tuple[Cell, ...]
    teachers: tuple[Teacher, ...]
    comparisons: tuple[Comparison, ...]
    data_reaches: tuple[Reach, ...]
    size_reaches: tuple[Reach, ...]
    majority: float | None

    @property
    def comparable_teachers(self) -> list[Teacher]:
        """Teachers that students are compared with; see `Teacher.is_comparable`."""
        return [teacher for teacher in self.teachers if teacher.is_comparable]

    @property
    def method_order(self) -> list[str]:
        """Display names of the methods that have cells."""
        methods = {cell.method for cell in self.cells}
        return [m for m in dict.fromkeys(self.methods.values()) if m in methods]

    @property
    def student_order(self) -> list[str]:
        """Display names of the students that have cells, by rising size."""
        cells = sorted(self.cells, key=lambda c: (c.parameters, c.student))
        return list(dict.fromkeys(cell.student for cell in cells))


def analyse(
    collected: Collected,
    split: str = "test",
    teacher_sizes: Mapping[str, float] = RELEASED_TEACHERS,
) -> list[Group]:
    """Returns the statistics of each dataset's runs.

    Args:
      collected: the runs.
      split: split of the reported accuracies.
      teacher_sizes: number of parameters of each teacher where known, by teacher.
    """
    by_dataset: dict[str, list[RunRecord]] = collections.defaultdict(list)
    for run in collected.runs:
        by_dataset[run.dataset].append(run)
    return [_group(name, runs, split, teacher_sizes) for name, runs in sorted(by_dataset.items())]


def _group(
    dataset: str, runs: Sequence[RunRecord], split: str, teacher_sizes: Mapping[str, float]
) -> Group:
    methods, students = method_names(runs), student_names(runs)
    order = list(dict.fromkeys(methods.values()))
    runs = sorted(
        runs,
        key=lambda r: (
            order.index(methods[r.name]),
            r.parameters,
            r.experiment.data.fraction,
            r.experiment.seed,
        ),
    )
    cells = _cells(runs, methods, students, split)
    teachers = _teachers(runs, split, teacher_sizes)
    comparable = [teacher for teacher in teachers if teacher.is_comparable]
    majorities = [e.majority for run in runs if (e := run.evaluation(split)) and e.majority]
    return Group(
        dataset=dataset,
        split=split,
        runs=tuple(runs),
        methods=methods,
        students=students,
        cells=tuple(cells),
        teachers=tuple(teachers),
        comparisons=tuple(_comparisons(cells)),
        data_reaches=tuple(_data_reaches(cells, comparable)),
        size_reaches=tuple(_size_reaches(cells, comparable)),
        majority=majorities[0] if majorities else None,
    )


def _cells(
    runs: Sequence[RunRecord], methods: Mapping[str, str], students: Mapping[str, str], split: str
) -> list[Cell]:
    by_key: dict[tuple, dict[int, tuple[RunRecord, EvaluationRecord]]] = {}
    for run in runs:
        evaluation = run.evaluation(split)
        if not run.is_done or not evaluation or evaluation.metric != "accuracy":
            continue
        key = methods[run.name], students[run.name], run.parameters, run.experiment.data.fraction
        by_key.setdefault(key, {}).setdefault(run.experiment.seed, (run, evaluation))
    cells = []
    for key, by_seed in by_key.items():
        repeats = [by_seed[seed] for seed in sorted(by_seed)]
        evaluations = tuple(e for _, e in repeats)
        counts = [run.examples for run, _ in repeats if run.examples is not None]
        ids = _common_ids(evaluations)
        interval = (
            seeds_interval([[e.scores[i] for i in ids] for e in evaluations]) if ids else None
        )
        cells.append(
            Cell(
                *key,
                examples=statistics.fmean(counts) if counts else None,
                runs=tuple(run for run, _ in repeats),
                evaluations=evaluations,
                mean=statistics.fmean(e.value for e in evaluations),
                interval=interval,
            )
        )
    return cells


def _common_ids(evaluations: Sequence[EvaluationRecord]) -> list[str]:
    """Returns the ids of the examples that all evaluations have, with the same input and target."""
    first, *others = (e.hashes for e in evaluations)
    return [i for i, value in first.items() if all(o.get(i) == value for o in others)]


def _teachers(runs: Sequence[RunRecord], split: str, sizes: Mapping[str, float]) -> list[Teacher]:
    teachers: dict[str, Teacher] = {}
    for run in runs:
        evaluation = run.evaluation(split)
        if evaluation is None:
            continue
        for name, summary in evaluation.teachers.items():
            if summary["metric"] != "accuracy":
                continue
            if name not in teachers or teachers[name].examples < summary["examples"]:
                interval = summary["interval"]
                teachers[name] = Teacher(
                    name=name,
                    value=summary["value"],
                    interval=interval and (interval[0], interval[1]),
                    examples=summary["examples"],
                    evaluated=len(evaluation.scores),
                    parameters=sizes.get(name),
                )
    return [teachers[name] for name in sorted(teachers)]


def compare(first: Cell, second: Cell) -> Comparison | None:
    """Returns the comparison of two cells; None if they have no test examples in common."""
    ids = _common_ids([*first.evaluations, *second.evaluations])
    if not ids:
        return None
    means = [
        [statistics.fmean(e.scores[i] for e in cell.evaluations) for i in ids]
        for cell in (first, second)
    ]
    difference, low, high = paired_bootstrap(*means)
    seeds = {r.experiment.seed: e for r, e in zip(second.runs, second.evaluations, strict=True)}
    p_values = []
    for run, evaluation in zip(first.runs, first.evaluations, strict=True):
        other = seeds.get(run.experiment.seed)
        if other is not None:
            p = mcnemar([evaluation.scores[i] for i in ids], [other.scores[i] for i in ids])
            p_values.append((run.experiment.seed, p))
    return Comparison(first, second, len(ids), difference, (low, high), tuple(p_values))


def _comparisons(cells: Sequence[Cell]) -> list[Comparison]:
    by_student: dict[tuple, list[Cell]] = collections.defaultdict(list)
    for cell in cells:
        by_student[cell.parameters, cell.student, cell.fraction].append(cell)
    pairs = itertools.chain.from_iterable(
        itertools.combinations(by_student[key], 2) for key in sorted(by_student)
    )
    return [c for first, second in pairs if (c := compare(second, first))]


def reach(curve: Sequence[Cell], axis: str, target: Cell | Teacher) -> Reach:
    """Returns the first point of a method's learning curve that reaches a target's accuracy.

    Between measured points, accuracy is interpolated linearly over the logarithm of the axis.

    Args:
      curve: cells of one method, at least one, by rising `axis`.
      axis: attribute of cells that the curve runs over, "examples" or "parameters".
      target: cell or teacher whose accuracy is to be reached.
    """
    student = curve[0].student if axis == "examples" else None
    best = max(curve, key=lambda c: c.mean)
    result = Reach(curve[0].method, axis, student, target, None, best)
    index = next((i for i, c in enumerate(curve) if c.mean >= result.value), None)
    if index is None:
        return result
    comparison = compare(curve[index], target) if isinstance(target, Cell) else None
    result = dataclasses.replace(result, reached=curve[index], comparison=comparison)
    if index == 0:
        return result
    low, high = curve[index - 1], curve[index]
    weight = (result.value - low.mean) / (high.mean - low.mean)
    ends = [math.log(getattr(c, axis)) for c in (low, high)]
    estimate = math.exp(ends[0] + weight * (ends[1] - ends[0]))
    return dataclasses.replace(result, estimate=estimate, previous=low)


def _has_method(cell: Cell, prefix: str) -> bool:
    return cell.runs[0].method.startswith(prefix)


def _data_curves(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Returns the step-by-step cells of each (method, student), by rising number of examples."""
    curves: dict[tuple[str, str], list[Cell]] = collections.defaultdict(list)
    for cell in cells:
        if _has_method(cell, "step-by-step") and cell.examples:
            curves[cell.method, cell.student].append(cell)
    return {key: sorted(curve, key=lambda c: c.examples or 0) for key, curve in curves.items()}


def _full_finetuning(cells: Sequence[Cell]) -> Cell | None:
    """Returns the finetuning cell with the most data, and of several the most accurate one."""
    finetuning = [c for c in cells if _has_method(c, "finetuning")]
    return max(finetuning, key=lambda c: (c.fraction, c.mean), default=None)


def _data_reaches(cells: Sequence[Cell], teachers: Sequence[Teacher]) -> list[Reach]:
    out = []
    for (_, student), curve in _data_curves(cells).items():
        full = _full_finetuning([c for c in cells if c.student == student])
        targets: list[Cell | Teacher] = [full] if full and full.examples else []
        out += [reach(curve, "examples", target) for target in [*targets, *teachers]]
    return out


def _size_reaches(cells: Sequence[Cell], teachers: Sequence[Teacher]) -> list[Reach]:
    largest = max((c.parameters for c in cells), default=0)
    max_fraction = max((c.fraction for c in cells), default=0)
    curves: dict[str, dict[int, Cell]] = collections.defaultdict(dict)
    for cell in cells:
        if _has_method(cell, "step-by-step") and cell.fraction == max_fraction:
            other = curves[cell.method].get(cell.parameters)
            if other is None or other.mean < cell.mean:
                curves[cell.method][cell.parameters] = cell
    full = _full_finetuning([c for c in cells if c.parameters == largest])
    targets: list[Cell | Teacher] = [full] if full else []
    return [
        reach([by_size[size] for size in sorted(by_size)], "parameters", target)
        for by_size in curves.values()
        for target in [*targets, *teachers]
    ]
