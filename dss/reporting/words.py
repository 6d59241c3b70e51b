"""What numbers say, in words: the answers that stand first, and the cells of the tables."""

import dataclasses
from collections.abc import Sequence

from dss.reporting.analysis import Cell, Comparison, Group, Reach
from dss.reporting.collect import RunRecord
from dss.reporting.naming import count_text

__all__ = [
    "NOT_MEASURED",
    "NOT_RECORDED",
    "Answer",
    "Tile",
    "answer",
    "duration",
    "interval_text",
    "p_text",
    "percent",
    "points",
    "reach_row",
    "tiles",
    "time_text",
]

MINUS = "\N{MINUS SIGN}"
MOST_ALSO = 5  # further sentences; tables have the rest
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"


def percent(value: float | None) -> str:
    """Returns a share in [0, 1].

    >>> percent(0.8755), percent(None)
    ('87.5%', 'not measured')
    """
    return NOT_MEASURED if value is None else f"{value:.1%}"


def interval_text(interval: Sequence[float] | None) -> str:
    """Returns a 95% interval of a share."""
    return NOT_MEASURED if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def points(difference: float) -> str:
    """Returns a difference of shares in percentage points, with a true minus.

    >>> points(0.0312), points(-0.2).replace(MINUS, "minus ")
    ('+3.1', 'minus 20.0')
    """
    return f"{100 * difference:+.1f}".replace("-", MINUS)


def p_text(p: float) -> str:
    """Returns a p-value.

    >>> p_text(0.03125), p_text(1e-9)
    ('0.031', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def duration(seconds: float) -> str:
    """Returns a time.

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
class Answer:
    """The answer to whether the method helped: one sentence, what it rests on, what else there is
    to say, and what to doubt.
    """

    headline: str
    basis: str
    also: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tile:
    """A number with what it is."""

    value: str
    label: str
    note: str


def _main_reach(group: Group) -> Reach | None:
    """Returns the answer that stands first: of the largest student, of the method that is best."""
    found = [r for r in group.data_reaches if isinstance(r.target, Cell)]
    order = group.student_order
    return max(found, key=lambda r: (order.index(r.student or ""), r.best.mean), default=None)


def answer(group: Group) -> Answer:
    """Returns what to say first about a dataset."""
    main = _main_reach(group)
    if main is None:
        return Answer("Nothing to compare yet.", _missing(group))
    full = main.target
    assert isinstance(full, Cell)
    method, rest = _capital(main.method), f"{full.method} on {_all(full)} examples"
    against = f"{full.student} student; {full.method} has {percent(full.mean)} on {group.split}. "
    rest_of_it = _also(group, main), _doubts(group, main, full)
    low = full.interval[0] if full.interval else full.mean
    if group.majority is not None and low <= group.majority:
        headline = (
            f"{rest} is not surely better than the most frequent label; {main.method} has "
            f"{percent(main.best.mean)} with {_count(main.best)}."
        )
        basis = (
            f"Always saying the most frequent label has {percent(group.majority)}, so to match "
            "finetuning would say little."
        )
        return Answer(_capital(headline), against + basis, *rest_of_it)
    if main.at is None:
        basis = f"At best it has {percent(main.best.mean)}, with {_count(main.best)} examples."
        return Answer(f"{method} did not match {rest}, here.", against + basis, *rest_of_it)
    if main.estimate is None or main.before is None:
        share = _share(main.at.examples, full.examples)
        headline = f"{method} matches {rest} with {_count(main.at)} or fewer{share}."
        basis = f"{_count(main.at)} is the least that was trained with."
    else:
        share = _share(main.estimate, full.examples)
        about = f"about {_round(main.estimate)}{share}"
        headline = f"{method} needs {about} to match {rest}."
        basis = (
            f"Interpolated between the measured {_count(main.before)} "
            f"({percent(main.before.mean)}) and {_count(main.at)} ({percent(main.at.mean)})."
        )
    if main.comparison:
        basis += " " + _compared(main.comparison)
    return Answer(headline, against + basis, *rest_of_it)


def _also(group: Group, main: Reach) -> tuple[str, ...]:
    out = []
    ahead, behind, places = 0, 0, 0
    for c in group.comparisons:
        if c.first.method == main.method and c.second.runs[0].method == "finetuning":
            places += 1
            ahead += c.interval[0] > 0
            behind += c.interval[1] < 0
    if places > 1:
        out.append(
            f"On the same student and data, {main.method} is ahead of finetuning in {ahead} of "
            f"{places} comparisons and behind in {behind or 'none'}, by the 95% interval over the "
            "test examples."
        )
    for r in group.data_reaches:
        if r.method == main.method and r is not main and isinstance(r.target, Cell):
            _, on, target, accuracy, took, _ = reach_row(r)
            out.append(f"{on}, to match {target} ({accuracy}): {took}.")
    return tuple(out[:MOST_ALSO])


def _missing(group: Group) -> str:
    if not group.cells:
        return (
            f"No run of {group.dataset} is finished and evaluated on the {group.split} split: "
            f"dss eval RUN --split={group.split} evaluates one."
        )
    return (
        "It takes finished and evaluated runs of finetuning and of step-by-step, on the same "
        f"student, whose training examples are recorded. Here: {', '.join(group.method_order)}."
    )


def _doubts(group: Group, main: Reach, full: Cell) -> tuple[str, ...]:
    out = []
    seeds = min(len(c.runs) for c in (full, main.at or main.best))
    if seeds < 3:
        of = "one seed" if seeds == 1 else "two seeds"
        out.append(f"It rests on {of}: what another seed would give is hardly known.")
    if main.at is not None:
        line = [c for c in group.cells if (c.method, c.student) == (main.method, main.student)]
        later = [c for c in line if (c.examples or 0) > (main.at.examples or 0)]
        if any(c.mean < main.value for c in later):
            out.append("With more examples than that it falls below again: the line is not steady.")
    return tuple(out)


def _compared(c: Comparison) -> str:
    low, high = c.interval
    return (
        f"At {_count(c.first)} examples the difference is {points(c.difference)} points (95%: "
        f"{points(low)} to {points(high)}) on the same {c.examples:,} test examples."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(cell: Cell) -> str:
    return NOT_RECORDED if cell.examples is None else f"{cell.examples:,.0f}"


def _all(cell: Cell) -> str:
    """Returns how many examples a cell has, and whether these are all that there are."""
    return f"all {_count(cell)}" if cell.fraction == 1 else _count(cell)


def _round(number: float) -> str:
    """Returns a number with no more digits than an interpolation deserves."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _share(part: float | None, total: float | None) -> str:
    return f" ({part / total:.0%})" if part and total and part <= total else ""


def tiles(group: Group) -> list[Tile]:
    """Returns the few numbers that stand under the answer."""
    out = []
    for prefix in ("step-by-step", "finetuning"):
        cells = [c for c in group.cells if c.runs[0].method.startswith(prefix)]
        if cells:
            best = max(cells, key=lambda c: c.mean)
            note = f"{best.student} student, {_count(best)} examples"
            out.append(Tile(percent(best.mean), f"{best.method}, at best", note))
        else:
            out.append(Tile(NOT_MEASURED, prefix, "no finished and evaluated run"))
    for t in group.teachers:
        of = f"{t.examples:,} test examples"
        if t.examples < t.judged:
            of = f"{t.examples:,} of {t.judged:,} test examples"
        note = f"95%: {interval_text(t.interval)}, on {of}"
        if not t.is_comparable:
            note += ": too few to compare with"
        out.append(Tile(percent(t.value), f"teacher {t.name}", note))
    if not group.teachers:
        out.append(Tile(NOT_MEASURED, "teacher", f"none wrote about the {group.split} split"))
    if group.majority is not None:
        out.append(Tile(percent(group.majority), "most frequent label", "said always"))
    return out


def reach_row(r: Reach) -> tuple[str, ...]:
    """Returns a row: method, on what, what to match, its accuracy, what it takes, what was seen."""
    is_size = r.what == "parameters"
    on = "the most data" if is_size else f"{r.student} student"
    if not isinstance(r.target, Cell):
        target = f"teacher {r.target.name}"
    elif is_size:
        target = f"{r.target.method} of the {r.target.student} student"
    else:
        target = f"{r.target.method} on {_all(r.target)}"
    row = r.method, on, target, percent(r.value)

    def name(cell: Cell) -> str:
        return f"{cell.student} student" if is_size else f"{_count(cell)} examples"

    if r.at is None:
        return *row, "not reached, here", f"{name(r.best)}, at best: {percent(r.best.mean)}"
    seen = f"{name(r.at)}: {percent(r.at.mean)}"
    if r.comparison:
        low, high = r.comparison.interval
        seen += f", {points(r.comparison.difference)} points ({points(low)} to {points(high)})"
    if r.estimate is None:
        least = "the smallest trained" if is_size else "the fewest trained with"
        return *row, f"{name(r.at)}, {least}", seen
    if is_size:
        return *row, f"{name(r.at)} (interpolated: {count_text(r.estimate)})", seen
    return *row, f"about {_round(r.estimate)} examples (interpolated)", seen


def time_text(run: RunRecord) -> str:
    """Returns how long a run took."""
    if run.seconds is None:
        return NOT_RECORDED
    seconds, is_all = run.seconds
    return duration(seconds) if is_all else f"over {duration(seconds)}"
