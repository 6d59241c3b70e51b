"""Texts of a report: the main result of each dataset, and the cells of tables."""

import dataclasses
from collections.abc import Sequence

from dss.reporting.analysis import Cell, Comparison, Group, Reach
from dss.reporting.collect import RunRecord
from dss.reporting.naming import count_text

__all__ = [
    "NOT_MEASURED",
    "NOT_RECORDED",
    "MainResult",
    "Tile",
    "duration",
    "interval_text",
    "main_result",
    "p_text",
    "percent",
    "points",
    "reach_row",
    "tiles",
    "time_text",
]

MINUS = "\N{MINUS SIGN}"
MAX_DETAILS = 5  # further results in sentences; the tables have all
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"


def percent(value: float | None) -> str:
    """Returns a proportion in [0, 1] as a percentage.

    >>> percent(0.8755), percent(None)
    ('87.5%', 'not measured')
    """
    return NOT_MEASURED if value is None else f"{value:.1%}"


def interval_text(interval: Sequence[float] | None) -> str:
    """Returns the text of a confidence interval of a proportion."""
    return NOT_MEASURED if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def points(difference: float) -> str:
    """Returns a difference of proportions in percentage points, with a typographic minus sign.

    >>> points(0.0312), points(-0.2).replace(MINUS, "minus ")
    ('+3.1', 'minus 20.0')
    """
    return f"{100 * difference:+.1f}".replace("-", MINUS)


def p_text(p: float) -> str:
    """Returns the text of a p-value.

    >>> p_text(0.03125), p_text(1e-9)
    ('0.031', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def duration(seconds: float) -> str:
    """Returns the text of a duration.

    >>> duration(42.4), duration(125), duration(7300)
    ('42 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


@dataclasses.dataclass(frozen=True)
class MainResult:
    """Main result of a dataset: how much data step-by-step needs to match finetuning.

    Attributes:
      headline: the result in one sentence.
      basis: the measurements that it is based on.
      details: further results, a sentence each.
      caveats: limits of the result, a sentence each.
    """

    headline: str
    basis: str
    details: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tile:
    """A key figure: value, label and note."""

    value: str
    label: str
    note: str


def _main_reach(group: Group) -> Reach | None:
    """Returns the result of the headline: the largest student's, with its most accurate method."""
    reaches = [r for r in group.data_reaches if isinstance(r.target, Cell)]
    order = group.student_order
    return max(reaches, key=lambda r: (order.index(r.student or ""), r.best.mean), default=None)


def main_result(group: Group) -> MainResult:
    """Returns the main result of a dataset."""
    main = _main_reach(group)
    if main is None:
        return MainResult("Nothing to compare yet.", _missing(group))
    full = main.target
    assert isinstance(full, Cell)
    method, baseline = _capitalize(main.method), f"{full.method} on {_data_text(full)} examples"
    setup = (
        f"{full.student} student; {full.method} has an accuracy of {percent(full.mean)} on "
        f"{group.split}. "
    )
    remarks = _details(group, main), _caveats(group, main, full)
    low = full.interval[0] if full.interval else full.mean
    if group.majority is not None and low <= group.majority:
        headline = (
            f"{baseline} is not significantly better than the most frequent label; {main.method} "
            f"has {percent(main.best.mean)} with {_count(main.best)} examples."
        )
        basis = (
            "Always predicting the most frequent label has an accuracy of "
            f"{percent(group.majority)}, so matching finetuning would mean little."
        )
        return MainResult(_capitalize(headline), setup + basis, *remarks)
    if main.reached is None:
        basis = (
            f"The best accuracy of {main.method} is {percent(main.best.mean)}, with "
            f"{_count(main.best)} examples."
        )
        return MainResult(f"{method} did not match {baseline}.", setup + basis, *remarks)
    if main.estimate is None or main.previous is None:
        percentage = _percentage(main.reached.examples, full.examples)
        headline = f"{method} matches {baseline} with {_count(main.reached)} or fewer{percentage}."
        basis = f"{_count(main.reached)} is the smallest number of examples measured."
    else:
        percentage = _percentage(main.estimate, full.examples)
        estimate = f"about {_round(main.estimate)}{percentage}"
        headline = f"{method} needs {estimate} to match {baseline}."
        basis = (
            f"Interpolated between the measured {_count(main.previous)} "
            f"({percent(main.previous.mean)}) and {_count(main.reached)} "
            f"({percent(main.reached.mean)})."
        )
    if main.comparison:
        basis += " " + _difference(main.comparison)
    return MainResult(headline, setup + basis, *remarks)


def _details(group: Group, main: Reach) -> tuple[str, ...]:
    out = []
    better, worse, total = 0, 0, 0
    for c in group.comparisons:
        if c.first.method == main.method and c.second.runs[0].method == "finetuning":
            total += 1
            better += c.interval[0] > 0
            worse += c.interval[1] < 0
    if total > 1:
        out.append(
            f"With the same student and data, {main.method} is better than finetuning in {better} "
            f"of {total} comparisons and worse in {worse or 'none'}, counting differences whose "
            "95% confidence interval over test examples excludes 0."
        )
    for r in group.data_reaches:
        if r.method == main.method and r is not main and isinstance(r.target, Cell):
            _, student, target, accuracy, needed, _ = reach_row(r)
            out.append(f"{student}, to match {target} ({accuracy}): {needed}.")
    return tuple(out[:MAX_DETAILS])


def _missing(group: Group) -> str:
    if not group.cells:
        return (
            f"No run of {group.dataset} is finished and evaluated on the {group.split} split. "
            f"Evaluate one with dss eval RUN --split={group.split}."
        )
    return (
        "The comparison needs finished and evaluated runs of finetuning and of step-by-step, with "
        "the same student and recorded numbers of training examples. Methods with evaluated runs: "
        f"{', '.join(group.method_order)}."
    )


def _caveats(group: Group, main: Reach, full: Cell) -> tuple[str, ...]:
    out = []
    seeds = min(len(c.runs) for c in (full, main.reached or main.best))
    if seeds == 1:
        out.append("Only one seed: the variance between seeds is unknown.")
    if seeds == 2:
        out.append("Only two seeds: the variance between seeds is poorly known.")
    if main.reached is not None:
        curve = [c for c in group.cells if (c.method, c.student) == (main.method, main.student)]
        larger = [c for c in curve if (c.examples or 0) > (main.reached.examples or 0)]
        if any(c.mean < main.value for c in larger):
            out.append("With more examples the accuracy falls below that of finetuning again.")
    return tuple(out)


def _difference(c: Comparison) -> str:
    low, high = c.interval
    return (
        f"At {_count(c.first)} examples the difference is {points(c.difference)} points (95% CI: "
        f"{points(low)} to {points(high)}) on the same {c.examples:,} test examples."
    )


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(cell: Cell) -> str:
    return NOT_RECORDED if cell.examples is None else f"{cell.examples:,.0f}"


def _data_text(cell: Cell) -> str:
    """Returns a cell's number of examples, after "all" if it is the whole dataset."""
    return f"all {_count(cell)}" if cell.fraction == 1 else _count(cell)


def _round(number: float) -> str:
    """Returns a number rounded to two significant digits, since it is interpolated."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _percentage(part: float | None, total: float | None) -> str:
    return f" ({part / total:.0%})" if part and total and part <= total else ""


def tiles(group: Group) -> list[Tile]:
    """Returns the key figures shown under the main result."""
    out = []
    for prefix in ("step-by-step", "finetuning"):
        cells = [c for c in group.cells if c.runs[0].method.startswith(prefix)]
        if cells:
            best = max(cells, key=lambda c: c.mean)
            note = f"{best.student} student, {_count(best)} examples"
            out.append(Tile(percent(best.mean), f"best {best.method}", note))
        else:
            out.append(Tile(NOT_MEASURED, prefix, "no finished and evaluated run"))
    for t in group.teachers:
        coverage = f"{t.examples:,} test examples"
        if t.examples < t.evaluated:
            coverage = f"{t.examples:,} of {t.evaluated:,} test examples"
        note = f"95% CI: {interval_text(t.interval)}, on {coverage}"
        if not t.is_comparable:
            note += ": too few to compare with"
        out.append(Tile(percent(t.value), f"teacher {t.name}", note))
    if not group.teachers:
        out.append(Tile(NOT_MEASURED, "teacher", f"no outputs for the {group.split} split"))
    if group.majority is not None:
        note = "predicted for every example"
        out.append(Tile(percent(group.majority), "most frequent label", note))
    return out


def reach_row(r: Reach) -> tuple[str, ...]:
    """Returns a table row: method, student or data, target, its accuracy, needed, measured."""
    is_size = r.axis == "parameters"
    setup = "largest training set" if is_size else f"{r.student} student"
    if not isinstance(r.target, Cell):
        target = f"teacher {r.target.name}"
    elif is_size:
        target = f"{r.target.method} of the {r.target.student} student"
    else:
        target = f"{r.target.method} on {_data_text(r.target)}"
    row = r.method, setup, target, percent(r.value)

    def name(cell: Cell) -> str:
        return f"{cell.student} student" if is_size else f"{_count(cell)} examples"

    if r.reached is None:
        return *row, "not reached", f"best: {percent(r.best.mean)} with {name(r.best)}"
    measured = f"{name(r.reached)}: {percent(r.reached.mean)}"
    if r.comparison:
        low, high = r.comparison.interval
        measured += f", {points(r.comparison.difference)} points ({points(low)} to {points(high)})"
    if r.estimate is None:
        least = "smallest measured" if is_size else "fewest measured"
        return *row, f"{name(r.reached)}, the {least}", measured
    if is_size:
        return *row, f"{name(r.reached)} (interpolated: {count_text(r.estimate)})", measured
    return *row, f"about {_round(r.estimate)} examples (interpolated)", measured


def time_text(run: RunRecord) -> str:
    """Returns the wall time of a run's sessions; "over" marks a sum without killed sessions."""
    if run.seconds is None:
        return NOT_RECORDED
    seconds, is_complete = run.seconds
    return duration(seconds) if is_complete else f"over {duration(seconds)}"
