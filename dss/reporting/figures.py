"""Figures of a report: each drawn once, as SVG for the page and as SVG, PNG and CSV in a folder.

Methods differ in colour, in lightness, in marker and in line, so that a print in grey tells them
apart, and so does who sees fewer colours.
"""

import csv
import dataclasses
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dss.errors import missing_package
from dss.reporting.analysis import Cell, Group
from dss.reporting.collect import RunRecord
from dss.reporting.naming import count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Figure", "draw_figures", "safe_name", "save_figures"]

# Colour, marker, line of each method in turn; neighbours differ in lightness too.
STYLES = (
    ("#d55e00", "s", (0, (5, 2))),
    ("#0b3c6f", "^", "-"),
    ("#56b4e9", "o", (0, (1, 1.5))),
    ("#117733", "D", (0, (6, 2, 1, 2))),
    ("#cc79a7", "v", (0, (3, 1, 1, 1, 1, 1))),
    ("#000000", "P", (0, (2, 2))),
    ("#e69f00", "X", (0, (8, 2))),
)
QUIET = "#5a5a5a"
LEGEND_WIDTH = 46  # characters of two labels beside each other
SIZE = (4.7, 3.8)  # inches: its text is still legible on a phone's page
PIXELS_PER_INCH = 200
STYLE: Any = {
    "font.size": 10.5,
    "font.family": ["sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": "#1c1c1c",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e4df",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.9,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, and it can be searched
    "text.parse_math": False,  # a name may have a dollar
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
      name: of its files.
      kind: "data", "size" or "curves".
      title: says what it shows.
      svg: for the page; without a network, a script or an outer font.
      png: its bytes.
      columns: names of its numbers.
      rows: the numbers.
    """

    name: str
    kind: str
    title: str
    svg: str
    png: bytes
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def safe_name(text: str) -> str:
    """Returns a text as the name of a file.

    >>> safe_name("0.12M from flan/t5")
    '0.12M-from-flan-t5'
    """
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "unnamed"


def draw_figures(group: Group) -> list[Figure]:
    """Returns the figures of a dataset's runs; those that nothing was measured for are left out.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise missing_package("the report", "matplotlib", "report") from None
    methods = dict.fromkeys(group.methods.values())
    styles = {m: STYLES[i % len(STYLES)] for i, m in enumerate(methods)}
    figures = []
    with matplotlib.rc_context(STYLE):
        for student in group.student_order:
            cells = [c for c in group.cells if c.student == student and c.examples]
            if cells:
                figures.append(_draw_data(group, student, cells, styles))
        most = max((c.fraction for c in group.cells), default=0)
        full = [c for c in group.cells if c.fraction == most]
        if len({c.parameters for c in full}) > 1:
            figures.append(_draw_size(group, full, styles))
        for student in dict.fromkeys(group.students.values()):
            figure = _draw_curves(group, student, styles)
            figures += [figure] if figure else []
    return figures


def _finish(
    draw: Callable[[Any], None],
    group: Group,
    name: str,
    kind: str,
    title: str,
    numbers: tuple[tuple[str, ...], Sequence[tuple]],
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Returns a figure that `draw` draws on an empty one."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    name = f"{safe_name(group.dataset)}-{name}"
    canvas = Canvas(figsize=size, layout="constrained")
    draw(canvas)
    svg, png = io.StringIO(), io.BytesIO()
    # Ids are hashes: with a salt of its own no figure of a page has another's.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": "dss report"})
    FigureCanvasAgg(canvas)
    canvas.savefig(png, format="png", dpi=PIXELS_PER_INCH)
    columns, rows = numbers
    return Figure(name, kind, title, svg.getvalue(), png.getvalue(), columns, tuple(rows))


CELL_COLUMNS = (
    "method", "student", "parameters", "fraction", "examples", "seeds", "accuracy", "low95",
    "high95", "accuracy_by_seed",
)  # fmt: skip


def _cell_rows(group: Group, cells: Sequence[Cell]) -> list[tuple]:
    rows: list[tuple] = []
    for c in cells:
        low, high = c.interval or (None, None)
        by_seed = " ".join(
            f"{r.experiment.seed}:{e.value:.4f}" for r, e in zip(c.runs, c.evaluations, strict=True)
        )
        place = (c.method, c.student, c.parameters, c.fraction, c.examples, len(c.runs))
        rows.append((*place, c.mean, low, high, by_seed))
    for t in group.comparable_teachers:
        low, high = t.interval or (None, None)
        rows.append((f"teacher {t.name}", "", t.parameters, "", "", "", t.value, low, high, ""))
    if group.majority is not None:
        label = "always the most frequent label"
        rows.append((label, "", "", "", "", "", group.majority, "", "", ""))
    return rows


def _draw_lines(
    axes: "Axes", group: Group, cells: Sequence[Cell], x: str, styles: Mapping[str, tuple]
) -> None:
    """Draws a line a method with intervals and seeds over an attribute of the cells."""
    methods = [m for m in group.method_order if any(c.method == m for c in cells)]
    for k, method in enumerate(methods):
        colour, marker, dashes = styles[method]
        shift = 1.018 ** (k - (len(methods) - 1) / 2)  # so that intervals do not hide each other
        line = sorted((c for c in cells if c.method == method), key=lambda c: getattr(c, x))
        at = [getattr(c, x) * shift for c in line]
        means = [100 * c.mean for c in line]
        for place, c in zip(at, line, strict=True):
            if c.interval:
                axes.plot([place] * 2, [100 * v for v in c.interval], color=colour, lw=1.1)
            seeds = [100 * e.value for e in c.evaluations]
            axes.scatter(
                [place * 1.03] * len(seeds), seeds, s=13, marker=marker, facecolors="none",
                edgecolors=colour, linewidths=0.8, zorder=3,
            )  # fmt: skip
        axes.plot(
            at, means, color=colour, marker=marker, markersize=6.5, linestyle=dashes, label=method,
            markeredgecolor="white", markeredgewidth=0.7, zorder=4,
        )  # fmt: skip


def _accuracy_axis(axes: "Axes", group: Group, cells: Sequence[Cell]) -> None:
    """Draws teachers and the most frequent label as lines, and labels the axis."""
    shown = [v for c in cells for v in (c.interval or (c.mean,))]
    shown += [e.value for c in cells for e in c.evaluations]
    references = []
    for k, t in enumerate(group.comparable_teachers):
        size = f" ({count_text(t.parameters)})" if t.parameters else ""
        name = f"teacher {t.name}{size}: {t.value:.1%}"
        references.append((t.value, name, "-" if k == 0 else (0, (10, 2 * k))))
    if group.majority is not None:
        name = f"most frequent: {group.majority:.1%}"
        references.append((group.majority, name, (0, (1, 2))))
    for value, name, dashes in references:
        axes.axhline(100 * value, color="#1c1c1c", lw=1, linestyle=dashes, zorder=2, label=name)
        shown.append(value)
    room = 0.06 * (max(shown) - min(shown)) + 0.01
    axes.set_ylim(100 * (min(shown) - room), 100 * (max(shown) + room))
    axes.set_ylabel(f"accuracy on the {group.split} split, %")


def _log_axis(axes: "Axes", values: Sequence[float], text: Callable[[float], str]) -> None:
    axes.set_xscale("log")
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value > 1.15 * ticks[-1]:
            ticks.append(value)
    axes.set_xticks(ticks, [text(v) for v in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(values) / 1.15, max(values) * 1.15)


def _legend(canvas: Any, labels: Sequence[str], **options: Any) -> None:
    """Puts the legend under the figure, in two columns where the labels are short."""
    rows = -(-len(labels) // 2)
    sides = [max(map(len, side), default=0) for side in (labels[:rows], labels[rows:])]
    columns = 1 if sum(sides) > LEGEND_WIDTH else 2
    canvas.legend(loc="outside lower left", ncols=columns, handlelength=3, fontsize=9.5, **options)


def _draw_data(group: Group, student: str, cells: list[Cell], styles: Mapping) -> Figure:
    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        _draw_lines(axes, group, cells, "examples", styles)
        _accuracy_axis(axes, group, cells)
        _log_axis(axes, [c.examples or 1 for c in cells], lambda v: f"{v:,.0f}")
        axes.set_xlabel("training examples (logarithmic)")
        _legend(canvas, axes.get_legend_handles_labels()[1])

    title = f"Accuracy by training examples, {student} student"
    name = f"accuracy-by-examples-{safe_name(student)}"
    return _finish(draw, group, name, "data", title, (CELL_COLUMNS, _cell_rows(group, cells)))


def _draw_size(group: Group, cells: list[Cell], styles: Mapping) -> Figure:
    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        _draw_lines(axes, group, cells, "parameters", styles)
        _accuracy_axis(axes, group, cells)
        _log_axis(axes, [c.parameters for c in cells], count_text)
        axes.set_xlabel("parameters of the student (logarithmic)")
        _legend(canvas, axes.get_legend_handles_labels()[1])

    examples = max((c.examples for c in cells if c.examples), default=None)
    on = "the most data" if examples is None else f"{examples:,.0f} training examples"
    title = f"Accuracy by student size, {on}"
    numbers = (CELL_COLUMNS, _cell_rows(group, cells))
    return _finish(draw, group, "accuracy-by-size", "size", title, numbers)


LOSSES = {
    "label": "loss of the label task",
    "rationale": "loss of the rationale task",
    "rationale_then_label": "loss of rationale then label",
}


def _curve(runs: Sequence[RunRecord], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and the mean over the runs that have a value there."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            if name in line:
                values.setdefault(line["step"], []).append(line[name])
    steps = sorted(values)
    return steps, [statistics.fmean(values[s]) for s in steps]


def _draw_curves(group: Group, student: str, styles: Mapping) -> Figure | None:
    runs = [r for r in group.runs if group.students[r.name] == student and r.metrics]
    most = max((r.experiment.data.fraction for r in runs), default=0)
    runs = [r for r in runs if r.experiment.data.fraction == most]
    kinds = [
        k for k in LOSSES if any(f"train/{k}_loss" in line for r in runs for line in r.metrics)
    ]
    if not kinds:
        return None
    methods = [m for m in styles if any(group.methods[r.name] == m for r in runs)]
    by_method = {m: [r for r in runs if group.methods[r.name] == m] for m in methods}
    curves = {
        (kind, method, split): _curve(by_method[method], f"{split}/{kind}_loss")
        for kind in kinds
        for method in methods
        for split in ("train", "valid")
    }

    def draw(canvas: Any) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import LogLocator, NullLocator

        panels = canvas.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for method in methods:
                colour, marker, dashes = styles[method]
                axes.plot(*curves[kind, method, "train"], color=colour, linestyle=dashes, lw=1.3)
                axes.plot(
                    *curves[kind, method, "valid"], color=colour, linestyle="none", marker=marker,
                    markersize=6, markeredgecolor="white", markeredgewidth=0.6,
                )  # fmt: skip
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("step")
            axes.set_title(LOSSES[kind], fontsize=10, loc="left")
        panels[0].set_ylabel("loss, nats a token (log)")
        handles = [
            Line2D([], [], color=c, linestyle=d, marker=m, label=method)
            for method, (c, m, d) in ((method, styles[method]) for method in methods)
        ]
        _legend(canvas, methods, handles=handles)

    title = f"Losses, {student} student, the most data"
    columns = ("method", "task", "split", "step", "loss", "runs")
    rows = [
        (method, kind, split, step, loss, len(by_method[method]))
        for (kind, method, split), curve in curves.items()
        for step, loss in zip(*curve, strict=True)
    ]
    name = f"losses-{safe_name(student)}"
    return _finish(draw, group, name, "curves", title, (columns, rows))


def save_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Writes every figure as SVG and PNG, and its numbers as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(figure.png)
        with (folder / f"{figure.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(figure.columns)
            writer.writerows([_no_formula(cell) for cell in row] for row in figure.rows)


def _no_formula(cell: Any) -> Any:
    """Returns a cell that a spreadsheet does not compute: a run may be named `=1+1`."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell
