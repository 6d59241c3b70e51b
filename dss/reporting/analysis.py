"""From runs to what a report says: means with intervals, comparisons, and the answers.

Only finished runs count, each with its evaluation on one split; of two runs that differ in nothing
the first. What was not measured is None.
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

COVERED = 0.9  # of the students' test examples, that a teacher compared with them has answered
RELEASED_TEACHERS = {"palm": 540e9, "gpt_neox": 20e9}  # parameters of the released data's teachers


@dataclasses.dataclass(frozen=True)
class Cell:
    """The repeats of one method on one student and one share of the data.

    Attributes:
      method: its name.
      student: its name.
      parameters: of the student.
      fraction: of the training examples, (0, 1].
      examples: training examples, the mean over the repeats; None where not recorded.
      runs: one a seed, by seed.
      evaluations: theirs.
      mean: accuracy, in [0, 1].
      interval: its 95% interval; None where the runs were not judged on the same examples.
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
    """A teacher's accuracy on those of the students' test examples that it has answered.

    Attributes:
      name: its name.
      value: accuracy, in [0, 1].
      interval: its 95% interval.
      examples: test examples that it has answered.
      judged: test examples that the students were judged on.
      parameters: its parameters; None where they are unknown.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    examples: int
    judged: int
    parameters: float | None

    @property
    def is_comparable(self) -> bool:
        """Whether its accuracy is of nearly the same examples as the students'."""
        return self.examples >= COVERED * self.judged


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two cells on the same test examples.

    Attributes:
      first, second: the cells.
      examples: test examples that both were judged on.
      difference: first minus second, in [-1, 1].
      interval: of the difference, 95%, over the test examples alone.
      p_values: (seed, p) of the runs with the same seed, by McNemar's exact test.
    """

    first: Cell
    second: Cell
    examples: int
    difference: float
    interval: tuple[float, float]
    p_values: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Reach:
    """Where a line of measured points first is as high as a target.

    Attributes:
      method: whose line it is.
      what: "examples" or "parameters".
      student: of the line of examples; None for a line of students.
      target: what is to be reached.
      at: the first measured cell that reaches it; None where none does.
      best: the highest cell.
      estimate: where the line between this cell and the one before crosses the target; None where
        the first cell reaches it already, or none does.
      before: the cell before.
      comparison: of the cell with the target, where that is a cell.
    """

    method: str
    what: str
    student: str | None
    target: Cell | Teacher
    at: Cell | None
    best: Cell
    estimate: float | None = None
    before: Cell | None = None
    comparison: Comparison | None = None

    @property
    def value(self) -> float:
        """The target's accuracy."""
        return self.target.mean if isinstance(self.target, Cell) else self.target.value


@dataclasses.dataclass(frozen=True)
class Group:
    """All about one dataset.

    Attributes:
      dataset: its name.
      split: that accuracies are of.
      runs: all of them, finished or not; by method, size, fraction and seed.
      methods: each run's, by its name.
      students: each run's, by its name.
      cells: what figures show, by method, student and fraction.
      teachers: by name, those that answered few examples too.
      comparisons: of every two methods on one student and fraction.
      data_reaches: the least data that matches finetuning on all, or a teacher.
      size_reaches: the smallest student that does.
      majority: accuracy of always saying the most frequent label of a closed set.
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
        """The teachers that students are compared with."""
        return [teacher for teacher in self.teachers if teacher.is_comparable]

    @property
    def method_order(self) -> list[str]:
        """The methods that have cells, each once."""
        have = {cell.method for cell in self.cells}
        return [m for m in dict.fromkeys(self.methods.values()) if m in have]

    @property
    def student_order(self) -> list[str]:
        """The students that have cells, the smallest first."""
        cells = sorted(self.cells, key=lambda c: (c.parameters, c.student))
        return list(dict.fromkeys(cell.student for cell in cells))


def analyse(
    collected: Collected,
    split: str = "test",
    teacher_sizes: Mapping[str, float] = RELEASED_TEACHERS,
) -> list[Group]:
    """Returns what there is to say, a group a dataset.

    Args:
      collected: the runs.
      split: that accuracies are of.
      teacher_sizes: parameters of the teachers whose are known, by name.
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
    shares = [e.majority for run in runs if (e := run.evaluation(split)) and e.majority]
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
        majority=shares[0] if shares else None,
    )


def _cells(
    runs: Sequence[RunRecord], methods: Mapping[str, str], students: Mapping[str, str], split: str
) -> list[Cell]:
    found: dict[tuple, dict[int, tuple[RunRecord, EvaluationRecord]]] = {}
    for run in runs:
        evaluation = run.evaluation(split)
        if not run.is_done or not evaluation or evaluation.metric != "accuracy":
            continue
        key = methods[run.name], students[run.name], run.parameters, run.experiment.data.fraction
        found.setdefault(key, {}).setdefault(run.experiment.seed, (run, evaluation))
    cells = []
    for key in found:
        repeats = [found[key][seed] for seed in sorted(found[key])]
        evaluations = tuple(e for _, e in repeats)
        counts = [run.examples for run, _ in repeats if run.examples is not None]
        ids = _shared(evaluations)
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


def _shared(evaluations: Sequence[EvaluationRecord]) -> list[str]:
    """Returns the ids of the examples that all were judged on, with one input and target."""
    first, *others = (e.judged for e in evaluations)
    return [i for i, judged in first.items() if all(o.get(i) == judged for o in others)]


def _teachers(runs: Sequence[RunRecord], split: str, sizes: Mapping[str, float]) -> list[Teacher]:
    found: dict[str, Teacher] = {}
    for run in runs:
        evaluation = run.evaluation(split)
        if evaluation is None:
            continue
        for name, said in evaluation.teachers.items():
            if said["metric"] != "accuracy":
                continue
            if name not in found or found[name].examples < said["examples"]:
                found[name] = Teacher(
                    name=name,
                    value=said["value"],
                    interval=said["interval"] and (said["interval"][0], said["interval"][1]),
                    examples=said["examples"],
                    judged=len(evaluation.scores),
                    parameters=sizes.get(name),
                )
    return [found[name] for name in sorted(found)]


def compare(first: Cell, second: Cell) -> Comparison | None:
    """Returns how two cells differ on the test examples that both were judged on; None where there
    is no such example.
    """
    ids = _shared([*first.evaluations, *second.evaluations])
    if not ids:
        return None
    means = [
        [statistics.fmean(e.scores[i] for e in cell.evaluations) for i in ids]
        for cell in (first, second)
    ]
    difference, low, high = paired_bootstrap(*means)
    seeds = {r.experiment.seed: e for r, e in zip(second.runs, second.evaluations, strict=True)}
    p_values = []
    for run, mine in zip(first.runs, first.evaluations, strict=True):
        other = seeds.get(run.experiment.seed)
        if other is not None:
            p = mcnemar([mine.scores[i] for i in ids], [other.scores[i] for i in ids])
            p_values.append((run.experiment.seed, p))
    return Comparison(first, second, len(ids), difference, (low, high), tuple(p_values))


def _comparisons(cells: Sequence[Cell]) -> list[Comparison]:
    places: dict[tuple, list[Cell]] = collections.defaultdict(list)
    for cell in cells:
        places[cell.parameters, cell.student, cell.fraction].append(cell)
    pairs = itertools.chain.from_iterable(
        itertools.combinations(places[place], 2) for place in sorted(places)
    )
    return [c for first, second in pairs if (c := compare(second, first))]


def reach(line: Sequence[Cell], what: str, target: Cell | Teacher) -> Reach:
    """Returns where a method's line first is as high as a target.

    Between two measured points the line is straight over the logarithm of what it runs over.

    Args:
      line: cells of one method, at least one, in rising order of `what`.
      what: "examples" or "parameters".
      target: to be reached.
    """
    student = line[0].student if what == "examples" else None
    best = max(line, key=lambda c: c.mean)
    found = Reach(line[0].method, what, student, target, None, best)
    at = next((i for i, c in enumerate(line) if c.mean >= found.value), None)
    if at is None:
        return found
    comparison = compare(line[at], target) if isinstance(target, Cell) else None
    found = dataclasses.replace(found, at=line[at], comparison=comparison)
    if at == 0:
        return found
    low, high = line[at - 1], line[at]
    share = (found.value - low.mean) / (high.mean - low.mean)
    ends = [math.log(getattr(c, what)) for c in (low, high)]
    estimate = math.exp(ends[0] + share * (ends[1] - ends[0]))
    return dataclasses.replace(found, estimate=estimate, before=low)


def _is(cell: Cell, method: str) -> bool:
    return cell.runs[0].method.startswith(method)


def _lines(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Returns the step-by-step cells of each method and student, with rising examples."""
    lines: dict[tuple[str, str], list[Cell]] = collections.defaultdict(list)
    for cell in cells:
        if _is(cell, "step-by-step") and cell.examples:
            lines[cell.method, cell.student].append(cell)
    return {key: sorted(line, key=lambda c: c.examples or 0) for key, line in lines.items()}


def _full_finetuning(cells: Sequence[Cell]) -> Cell | None:
    """Returns the better finetuning on the most data."""
    found = [c for c in cells if _is(c, "finetuning")]
    return max(found, key=lambda c: (c.fraction, c.mean), default=None)


def _data_reaches(cells: Sequence[Cell], teachers: Sequence[Teacher]) -> list[Reach]:
    out = []
    for (_, student), line in _lines(cells).items():
        full = _full_finetuning([c for c in cells if c.student == student])
        targets: list[Cell | Teacher] = [full] if full and full.examples else []
        out += [reach(line, "examples", target) for target in [*targets, *teachers]]
    return out


def _size_reaches(cells: Sequence[Cell], teachers: Sequence[Teacher]) -> list[Reach]:
    largest = max((c.parameters for c in cells), default=0)
    most = max((c.fraction for c in cells), default=0)
    lines: dict[str, dict[int, Cell]] = collections.defaultdict(dict)
    for cell in cells:
        if _is(cell, "step-by-step") and cell.fraction == most:
            known = lines[cell.method].get(cell.parameters)
            if known is None or known.mean < cell.mean:
                lines[cell.method][cell.parameters] = cell
    full = _full_finetuning([c for c in cells if c.parameters == largest])
    targets: list[Cell | Teacher] = [full] if full else []
    return [
        reach([by_size[size] for size in sorted(by_size)], "parameters", target)
        for by_size in lines.values()
        for target in [*targets, *teachers]
    ]
