"""Figures of a report: SVG for the page, and SVG, PNG and CSV (the plotted numbers) in a folder.

Methods differ in colour, lightness, marker and line style, so that they can be told apart in
greyscale and with colour blindness.
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

# Colour, marker and line style of successive methods; neighbours also differ in lightness.
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
LEGEND_WIDTH = 46  # characters of two labels that fit side by side
SIZE = (4.7, 3.8)  # inches; small enough for the text to be legible on a phone
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
    "svg.fonttype": "none",  # text as text: smaller files, and searchable
    "text.parse_math": False,  # names may contain dollar signs
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure with its numbers.

    Attributes:
      name: name of the figure's files, without suffix.
      kind: "data" (accuracy by examples), "size" (accuracy by parameters) or "curves" (losses).
      title: caption of the figure.
      svg: SVG text, without scripts or external resources.
      png: contents of the PNG file.
      columns: column names of the plotted numbers.
      rows: the plotted numbers.
    """

    name: str
    kind: str
    title: str
    svg: str
    png: bytes
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def safe_name(text: str) -> str:
    """Returns a text with characters that are safe in file names.

    >>> safe_name("0.12M from flan/t5")
    '0.12M-from-flan-t5'
    """
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "unnamed"


def draw_figures(group: Group) -> list[Figure]:
    """Returns the figures of a dataset's runs, except those without measurements.

    Raises:
      DssError: if matplotlib is not installed.
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
        max_fraction = max((c.fraction for c in group.cells), default=0)
        full = [c for c in group.cells if c.fraction == max_fraction]
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
    """Returns the figure that a function draws.

    Args:
      draw: function that draws on an empty matplotlib figure.
      group: runs of the dataset.
      name: name of the figure's files, without the dataset.
      kind: kind of figure; see `Figure`.
      title: caption of the figure.
      numbers: column names and rows of the plotted numbers.
      size: width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    name = f"{safe_name(group.dataset)}-{name}"
    canvas = Canvas(figsize=size, layout="constrained")
    draw(canvas)
    svg, png = io.StringIO(), io.BytesIO()
    # SVG ids are hashes. A salt for each figure keeps them unique on the page.
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
        key = (c.method, c.student, c.parameters, c.fraction, c.examples, len(c.runs))
        rows.append((*key, c.mean, low, high, by_seed))
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
    """Draws each method's accuracy over an attribute `x` of the cells, with intervals and seeds."""
    methods = [m for m in group.method_order if any(c.method == m for c in cells)]
    for k, method in enumerate(methods):
        colour, marker, dashes = styles[method]
        shift = 1.018 ** (k - (len(methods) - 1) / 2)  # keeps intervals of methods from overlapping
        line = sorted((c for c in cells if c.method == method), key=lambda c: getattr(c, x))
        xs = [getattr(c, x) * shift for c in line]
        means = [100 * c.mean for c in line]
        for x_value, c in zip(xs, line, strict=True):
            if c.interval:
                axes.plot([x_value] * 2, [100 * v for v in c.interval], color=colour, lw=1.1)
            seeds = [100 * e.value for e in c.evaluations]
            axes.scatter(
                [x_value * 1.03] * len(seeds), seeds, s=13, marker=marker, facecolors="none",
                edgecolors=colour, linewidths=0.8, zorder=3,
            )  # fmt: skip
        axes.plot(
            xs, means, color=colour, marker=marker, markersize=6.5, linestyle=dashes, label=method,
            markeredgecolor="white", markeredgewidth=0.7, zorder=4,
        )  # fmt: skip


def _accuracy_axis(axes: "Axes", group: Group, cells: Sequence[Cell]) -> None:
    """Draws accuracies of teachers and of the most frequent label as lines, and labels the axis."""
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
    margin = 0.06 * (max(shown) - min(shown)) + 0.01
    axes.set_ylim(100 * (min(shown) - margin), 100 * (max(shown) + margin))
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
    """Puts the legend below the figure, in two columns if the labels are short."""
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
    data = "largest training set" if examples is None else f"{examples:,.0f} training examples"
    title = f"Accuracy by student size, {data}"
    numbers = (CELL_COLUMNS, _cell_rows(group, cells))
    return _finish(draw, group, "accuracy-by-size", "size", title, numbers)


LOSSES = {
    "label": "loss of the label task",
    "rationale": "loss of the rationale task",
    "rationale_then_label": "loss of rationale then label",
}


def _curve(runs: Sequence[RunRecord], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps of a metric and its mean over the runs that logged it at each step."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            if name in line:
                values.setdefault(line["step"], []).append(line[name])
    steps = sorted(values)
    return steps, [statistics.fmean(values[s]) for s in steps]


def _draw_curves(group: Group, student: str, styles: Mapping) -> Figure | None:
    runs = [r for r in group.runs if group.students[r.name] == student and r.metrics]
    max_fraction = max((r.experiment.data.fraction for r in runs), default=0)
    runs = [r for r in runs if r.experiment.data.fraction == max_fraction]
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
        panels[0].set_ylabel("loss, nats per token (log)")
        handles = [
            Line2D([], [], color=c, linestyle=d, marker=m, label=method)
            for method, (c, m, d) in ((method, styles[method]) for method in methods)
        ]
        _legend(canvas, methods, handles=handles)

    title = f"Losses, {student} student, largest training set"
    columns = ("method", "task", "split", "step", "loss", "runs")
    rows = [
        (method, kind, split, step, loss, len(by_method[method]))
        for (kind, method, split), curve in curves.items()
        for step, loss in zip(*curve, strict=True)
    ]
    name = f"losses-{safe_name(student)}"
    return _finish(draw, group, name, "curves", title, (columns, rows))


def save_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Writes each figure as SVG and PNG, and its numbers as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(figure.png)
        with (folder / f"{figure.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(figure.columns)
            writer.writerows([_no_formula(cell) for cell in row] for row in figure.rows)


def _no_formula(cell: Any) -> Any:
    """Returns a cell that no spreadsheet evaluates as a formula, even if a run is named `=1+1`."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell
