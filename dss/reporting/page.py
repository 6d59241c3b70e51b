"""Writes the report: a self-contained HTML file, and a folder with its figures."""

import dataclasses
import datetime
import difflib
import importlib.resources
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dss import __version__
from dss.errors import DssError, missing_package
from dss.evaluation.significance import wilson_interval
from dss.mixtures.ledger import Ledger
from dss.paths import write_whole
from dss.reporting.analysis import RELEASED_TEACHERS, Cell, Group, analyse, compare
from dss.reporting.collect import Collected, EvaluationRecord, RunRecord
from dss.reporting.figures import Figure, draw_figures, safe_name, save_figures
from dss.reporting.words import (
    NOT_MEASURED,
    NOT_RECORDED,
    interval_text,
    main_result,
    p_text,
    percent,
    points,
    reach_row,
    tiles,
    time_text,
)

__all__ = ["figures_folder", "write_report"]

TEMPLATE = importlib.resources.files("dss.reporting") / "report.html"
SHOWN_PREDICTIONS = 20_000  # predictions on the page, at most
UNFOLDED_ROWS = 24  # rows of a table that are always visible; the others can be unfolded
MIN_EXAMPLES = 20  # predictions of each shown run, at least; it limits the number of runs
SHOWN_STATUS = 240  # characters of a run's status
SHOWN_TEXT = 1_500  # characters of a text; longer texts are truncated with a note


def figures_folder(page: Path) -> Path:
    """Returns the folder for the figures of a page."""
    return page.with_name(f"{page.stem}-figures")


def write_report(
    collected: Collected,
    page: Path,
    *,
    split: str = "test",
    teacher_sizes: Mapping[str, float] = RELEASED_TEACHERS,
    command: str = "dss report",
) -> list[Group]:
    """Writes the report and the folder of its figures.

    Args:
      collected: the runs.
      page: path of the HTML file.
      split: split of the reported accuracies.
      teacher_sizes: number of parameters of each teacher where known, by teacher.
      command: command line shown at the end of the page.

    Returns:
      The statistics of each dataset's runs.

    Raises:
      DssError: if a package of the extra `report` is not installed, or the page is a folder.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise missing_package("the report", "jinja2", "report") from None
    if page.is_dir():
        raise DssError(f"{page}: a folder; give the name of a file, such as {page / 'report.html'}")
    groups = analyse(collected, split, teacher_sizes)
    figures = {group.dataset: draw_figures(group) for group in groups}
    folder = figures_folder(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    save_figures([figure for drawn in figures.values() for figure in drawn], folder)
    predictions = _predictions(groups)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        title=_title(groups),
        date=datetime.date.today().strftime("%d %B %Y").lstrip("0"),
        version=__version__,
        command=command,
        runs=len(collected.runs),
        problems=collected.problems,
        groups=[_group(group, figures[group.dataset]) for group in groups],
        predictions=_script_json(predictions),
        predictions_note=_predictions_note(predictions),
        folder=folder.name,
        unfolded=UNFOLDED_ROWS,
        not_measured=NOT_MEASURED,
        not_recorded=NOT_RECORDED,
    )
    write_whole(page, text)
    return groups


def _title(groups: Sequence[Group]) -> str:
    names = [group.dataset for group in groups]
    return names[0] if len(names) == 1 else f"{len(names)} datasets"


def _script_json(value: Any) -> str:
    """Returns JSON for a script element; "<" is escaped, since it could end the element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _group(group: Group, figures: Sequence[Figure]) -> dict[str, Any]:
    """Returns the template's values for a dataset."""
    drawn = [
        {
            "kind": figure.kind,
            "title": figure.title,
            "name": figure.name,
            "svg": _inline(figure),
            "columns": figure.columns,
            "rows": [[_cell(v) for v in row] for row in figure.rows],
        }
        for figure in figures
    ]
    return {
        "id": safe_name(group.dataset),
        "name": group.dataset,
        "split": group.split,
        "result": main_result(group),
        "tiles": tiles(group),
        "figures": {k: [f for f in drawn if f["kind"] == k] for k in ("data", "size", "curves")},
        "reaches": [reach_row(r) for r in (*group.data_reaches, *group.size_reaches)],
        "comparisons": list(_comparison_rows(group)),
        "runs": list(_run_rows(group)),
        "folder": _folder(group.runs),
        "data": list(_data_rows(group)),
        "versions": _versions(group.runs),
        "configs": list(_configs(group.runs)),
        "repeat": _repeat_commands(group.runs[0]),
        "unfinished": sum(not (r.is_done or r.is_imported) for r in group.runs),
        "unmeasured": sum(r.is_done and not r.evaluation(group.split) for r in group.runs),
    }


def _inline(figure: Figure) -> str:
    """Returns a figure's SVG for the page: scalable, and with ids that are unique on the page."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # not scoped to the figure
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg)
    prefix = figure.name.replace(".", "-")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return ""
    return f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{value}"


def _comparison_rows(group: Group) -> Iterator[tuple[str, ...]]:
    for c in group.comparisons:
        examples = NOT_RECORDED if c.first.examples is None else f"{c.first.examples:,.0f}"
        p_values = ", ".join(p_text(p) for _, p in c.p_values) or "no seed in common"
        yield (
            f"{c.first.method} vs. {c.second.method}",
            c.first.student,
            examples,
            f"{percent(c.first.mean)} and {percent(c.second.mean)}",
            f"{points(c.difference)} ({points(c.interval[0])} to {points(c.interval[1])})",
            p_values,
            f"{c.examples:,}",
        )


def _run_rows(group: Group) -> Iterator[tuple[str | tuple[str, ...], ...]]:
    """Yields a row for each run; a cell is a text, or (text, second line, problem)."""
    differences, folder = _differences_to_finetuning(group), _folder(group.runs)
    for run in group.runs:
        evaluation, machine = run.evaluation(group.split), run.machine
        problem = "" if run.is_done else run.status[:SHOWN_STATUS]
        accuracy = percent(evaluation.value if evaluation else None)
        if evaluation and evaluation.metric != "accuracy":
            accuracy = f"ROUGE-L {accuracy}"
        interval = _run_interval(evaluation) or f"validation: {percent(run.best_valid)}"
        yield (
            (group.methods[run.name], run.name.removeprefix(folder), problem),
            group.students[run.name],
            NOT_RECORDED if run.examples is None else f"{run.examples:,}",
            str(run.experiment.seed),
            (accuracy, interval, ""),
            differences.get(run.name, NOT_MEASURED),
            f"{run.step:,}",
            time_text(run),
            NOT_RECORDED if machine is None else _device(machine),
            _teacher_cost(run),
        )


def _folder(runs: Sequence[RunRecord]) -> str:
    """Returns the common parent folder of several runs with a final slash; "" without one."""
    parts = zip(*(run.name.split("/")[:-1] for run in runs), strict=False)
    common = [same[0] for same in itertools.takewhile(lambda part: len(set(part)) == 1, parts)]
    return "/".join([*common, ""]) if any(common) and len(runs) > 1 else ""


def _run_interval(evaluation: EvaluationRecord | None) -> str:
    if evaluation is None or evaluation.metric != "accuracy":
        return ""
    right = round(sum(evaluation.scores.values()))
    interval = wilson_interval(right, len(evaluation.scores))
    return interval_text(interval)


def _device(machine: Mapping[str, Any]) -> str:
    processes = machine.get("processes", 1)
    text = f"{machine['devices']} {machine['device']}"
    return text if processes == 1 else f"{text}, {processes} processes"


def _differences_to_finetuning(group: Group) -> dict[str, str]:
    """Returns each run's difference to finetuning of the same student, data and seed, with p."""
    finetuned = {
        (c.student, c.fraction, run.experiment.seed): _single_run(c, i)
        for c in reversed(group.cells)
        if c.runs[0].method == "finetuning"
        for i, run in enumerate(c.runs)
    }
    out: dict[str, str] = {}
    for cell in group.cells:
        for i, run in enumerate(cell.runs):
            other = finetuned.get((cell.student, cell.fraction, run.experiment.seed))
            comparison = compare(_single_run(cell, i), other) if other else None
            if other and other.runs[0].name == run.name:
                out[run.name] = "baseline"
            elif comparison:
                p = p_text(comparison.p_values[0][1])
                out[run.name] = f"{points(comparison.difference)}, p {p if '<' in p else f'= {p}'}"
    return out


def _single_run(cell: Cell, i: int) -> Cell:
    """Returns the cell of a single run of a cell."""
    return dataclasses.replace(cell, runs=(cell.runs[i],), evaluations=(cell.evaluations[i],))


def _teacher_cost(run: RunRecord) -> str:
    """Returns the tokens and cost of the teachers' outputs that a run is trained on."""
    if run.data is None:
        return NOT_RECORDED
    by_teacher = {t["teacher"]: t for t in run.data["tasks"] if t["teacher"] is not None}
    parts = []
    for teacher, task in by_teacher.items():
        usage = task.get("usage")
        if not usage or not usage["outputs"]:
            parts.append(f"{teacher}: {NOT_RECORDED}")
            continue
        fraction = min(1, task["examples"] / usage["outputs"])
        tokens = fraction * (usage["prompt_tokens"] + usage["completion_tokens"])
        cost = NOT_RECORDED
        if usage.get("cost") is not None:
            cost = f"{fraction * usage['cost']:,.2f} {usage.get('currency') or ''}".strip()
        parts.append(f"{teacher}: {tokens:,.0f}, cost {cost}")
    return "; ".join(parts) or "none used"


def _fates(task: dict[str, Any]) -> str:
    """Returns the counts of a task's rows by fate, or of outputs by status in older runs."""
    if task.get("ledger") is not None:
        return str(Ledger(**task["ledger"]))
    statuses = task.get("statuses", {})
    return ", ".join(f"{count:,} {status}" for status, count in statuses.items()) or "not recorded"


def _data_rows(group: Group) -> Iterator[tuple[str, ...]]:
    """Yields a row for each task that runs are trained on, without duplicates."""
    seen = set()
    for run in group.runs:
        if run.data is None or run.examples is None:
            continue
        total, experiment = run.examples, run.experiment
        for task in run.data["tasks"]:
            name = {"label": "label", "rationale": "rationale"}.get(task["kind"], "single target")
            count = int(task["examples"])
            row = (
                group.methods[run.name],
                f"{experiment.data.fraction:.0%}",
                f"{name}, {'gold' if task['teacher'] is None else task['teacher']}",
                f"{count:,} of {total:,}",
                f"{total - count:,} ({(total - count) / max(total, 1):.1%})",
                _fates(task),
                f"{task['input_tokens'] / max(count, 1):,.1f}",
                f"{task['target_tokens'] / max(count, 1):,.1f}",
                f"{task['cut_inputs']:,} and {task['cut_targets']:,}",
            )
            if row[:5] not in seen:  # seeds draw other examples, of other lengths
                seen.add(row[:5])
                yield row


def _versions(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    by_name: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in (run.machine or {}).get("versions", {}).items():
            by_name.setdefault(name, {})[str(version)] = None
    return [(name, ", ".join(versions)) for name, versions in by_name.items()]


def _configs(runs: Sequence[RunRecord]) -> Iterator[dict[str, str]]:
    """Yields each run's configuration: the first in full, of the others the lines that differ."""
    first = runs[0].config_text.splitlines()
    for run in runs:
        lines = run.config_text.splitlines()
        if run is runs[0]:
            yield {"name": run.name, "text": run.config_text}
            continue
        changed = [
            line[2:] for line in difflib.ndiff(first, lines) if line.startswith("+ ") and line[2:]
        ]
        yield {"name": run.name, "text": "\n".join(changed)}


def _repeat_commands(run: RunRecord) -> list[str]:
    """Returns the commands that repeat a run."""
    new = f"{run.name}-again"
    flags = [f"--gin_file={run.name}/config.gin", f"--gin.Experiment.run_dir={new}"]
    vocabulary = run.experiment.vocabulary
    if vocabulary not in (None, "bytes"):
        flags.append(f"--gin.Experiment.vocabulary={run.name}/{vocabulary}")
    return [shlex.join(["dss", "train", *flags]), shlex.join(["dss", "eval", new])]


def _truncate(text: Any) -> str | None:
    if text is None:
        return None
    text = str(text)
    if len(text) <= SHOWN_TEXT:
        return text
    return f"{text[:SHOWN_TEXT]}… ({len(text) - SHOWN_TEXT:,} more characters)"


def _predictions(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the predictions for the page's script; examples of several runs are stored once.

    {"examples": [[id, input, gold, [[teacher, label, rationale], ...]], ...],
     "runs": [{"name", "label", "answers": [[example, prediction, score, rationale], ...]}, ...],
     "of": number of all predictions, "cut": number of runs without predictions on the page}
    """
    evaluated = [
        (group, run, evaluation)
        for group in groups
        for run in group.runs
        if (evaluation := run.evaluation(group.split))
    ]
    evaluated.sort(key=lambda item: (item[0].dataset, -item[2].value))
    kept = evaluated[: SHOWN_PREDICTIONS // MIN_EXAMPLES]
    limit = SHOWN_PREDICTIONS // max(len(kept), 1)
    examples: dict[tuple, int] = {}
    texts: list[list[Any]] = []
    runs = []
    for group, run, evaluation in kept:
        stride = -(-len(evaluation.shown) // limit) or 1
        answers = []
        for line in evaluation.shown[::stride]:
            key = group.dataset, str(line["id"]), line.get("input"), line.get("target")
            if key not in examples:
                examples[key] = len(texts)
                texts.append([_truncate(v) for v in key[1:]] + [_teacher_texts(line)])
            prediction = _truncate(line.get("prediction"))
            rationale = _truncate(line.get("rationale"))
            answers.append([examples[key], prediction, line["score"], rationale])
        accuracy = f"{evaluation.metric.replace('_', '-')} {percent(evaluation.value)}"
        label = f"{group.methods[run.name]}, {group.students[run.name]}"
        if run.examples is not None:
            label += f", {run.examples:,} examples"
        label = f"{label}, seed {run.experiment.seed}: {accuracy}"
        if len(groups) > 1:
            label = f"{group.dataset}: {label}"
        runs.append(
            {"name": run.name, "label": label, "metric": evaluation.metric, "answers": answers}
        )
    total = sum(len(e.scores) for _, _, e in evaluated)
    return {"examples": texts, "runs": runs, "of": total, "cut": len(evaluated) - len(kept)}


def _teacher_texts(line: Mapping[str, Any]) -> list[list[str | None]]:
    outputs = line.get("teachers")
    if not isinstance(outputs, dict):
        return []
    return [
        [name, _truncate(output.get("label")), _truncate(output.get("rationale"))]
        for name, output in outputs.items()
        if isinstance(output, dict)
    ]


def _predictions_note(predictions: Mapping[str, Any]) -> str:
    """Returns a sentence with the number of predictions on the page and in all."""
    count = sum(len(run["answers"]) for run in predictions["runs"])
    if count == predictions["of"]:
        return f"All {count:,} predictions."
    text = f"{count:,} of {predictions['of']:,} predictions, evenly spaced in each run's file"
    if predictions["cut"]:
        text += f"; none of {predictions['cut']:,} further runs"
    return text + ". All are in the folder predictions of each run directory."
