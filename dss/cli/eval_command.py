"""The command `dss eval`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from dss.cli.checks import check_flags, check_output, check_run, check_run_probabilities
from dss.cli.options import add_run_options, open_run, prepare_jax
from dss.cli.tables import make_console, make_table
from dss.paths import PREDICTIONS, write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from dss.evaluation.calibration import Calibration, TemperatureScaling
    from dss.evaluation.classes import ClassMetrics
    from dss.evaluation.confusion import Confusion
    from dss.evaluation.evaluator import Scored
    from dss.evaluation.rationales import RationaleQuality

__all__ = ["add_arguments", "run"]

TABLE_CLASSES = 20  # classes of which a table is printed, at most
MATRIX_LABELS = 10  # labels of a closed set whose confusion matrix is printed, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run_options(parser)
    parser.add_argument("--split", default="test", help="split: train, valid or test (default)")
    parser.add_argument(
        "--rationales",
        action="store_true",
        help="also generate and score rationales",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first fit the temperature of label probabilities to valid, and save it with the run",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the metrics to FILE")


def run(args: argparse.Namespace) -> int:
    """Evaluates a student, prints the metrics, and writes predictions into the run directory."""
    check_run(args.run)
    # A sweep writes FILE into the run's predictions folder, which is created below.
    if args.json and Path(args.json).parent != Path(args.run, PREDICTIONS):
        check_output("--json", args.json)
    data = {"DATA_ROOT": args.data_root, "DATASET_PATH": args.dataset_path}
    check_flags([f"{name}={path}" for name, path in data.items() if path is not None])
    if args.calibrate:
        check_run_probabilities(args)

    from dss.cli.decode_progress import DecodeProgress
    from dss.evaluation.evaluator import DecodingProgress
    from dss.parallel.processes import is_leader
    from dss.runs.student import calibrate, evaluate

    prepare_jax()
    student_run = open_run(args)
    progress = DecodeProgress if is_leader() else DecodingProgress
    scaling = None
    if args.calibrate:
        scaling = calibrate(student_run, checkpoint=args.checkpoint, progress=progress())
    result = evaluate(
        student_run,
        split=args.split,
        checkpoint=args.checkpoint,
        rationales=args.rationales,
        progress=progress(),
    )
    if not is_leader():
        return 0
    path = result.save(student_run.folder / PREDICTIONS)
    console = make_console()
    title = f"{result.mixture} {result.split}, step {result.step}"
    console.print(f"{title}: {_describe(result.scored)}", markup=False)
    for name, teacher in result.teachers.items():
        line = f"teacher {name}: {_describe(teacher.scored)}, p = {teacher.p_value:.3g} (McNemar)"
        console.print(line, markup=False)
    if result.classes:
        _print_classes(console, result.classes, result.confusion)
    if scaling:
        _print_scaling(console, scaling)
    if result.calibration:
        _print_calibration(console, result.calibration, result.temperature)
    if result.quality:
        _print_rationales(console, result.quality)
    console.print(f"predictions: {path}", markup=False)
    if args.json:
        # Written atomically: a sweep takes an existing file as a completed run.
        write_whole(epath.Path(args.json).expanduser(), json.dumps(result.summary()) + "\n")
    return 0


def _describe(scored: "Scored") -> str:
    text = f"{scored.metric.replace('_', ' ')} {scored.value:.2%}"
    if scored.interval:
        low, high = scored.interval
        correct, total = int(sum(scored.verdicts)), len(scored.verdicts)
        text += f" (95% CI: {low:.2%} to {high:.2%}; {correct} of {total})"
    return text


def _print_classes(
    console: "Console", classes: "ClassMetrics", confusion: "Confusion | None"
) -> None:
    from rich.markup import escape

    from dss.evaluation.significance import wilson_interval

    line = (
        f"macro F1 {classes.macro_f1:.2%}, weighted F1 {classes.weighted_f1:.2%}, balanced "
        f"accuracy {classes.balanced_accuracy:.2%}; most frequent label "
        f"{classes.majority.label!r}: {classes.majority_accuracy:.2%}"
    )
    console.print(line, markup=False)
    if len(classes.by_class) > TABLE_CLASSES:
        return
    headings: list[str] = []
    matrix: dict[str, tuple[int, ...]] = {}
    if confusion is not None and len(confusion.labels) <= MATRIX_LABELS:
        matrix = dict(zip(confusion.labels, confusion.counts, strict=True))
        # Only generated text can be outside the set, so the column "other" is often empty.
        has_other = any(row[-1] for row in confusion.counts)
        headings = [f"-> {n}" for n in [*confusion.labels, *(["other"] if has_other else [])]]
    title = "by label (-> predicted label)" if headings else "by label"
    columns = ("label", "examples", "recall", "95% CI", "precision", "F1")
    table = make_table(title, *columns, *map(escape, headings), texts=1)
    for one in classes.by_class:
        cells = ["", ""]
        if one.support:
            low, high = wilson_interval(one.correct, one.support)
            cells = [f"{one.recall:.1%}", f"{low:.1%} to {high:.1%}"]
        cells.append(f"{one.precision:.1%}" if one.predicted else "")
        cells.append(f"{one.f1:.1%}" if one.support or one.predicted else "")
        cells += [str(count) for count in matrix.get(one.label, ())[: len(headings)]]
        table.add_row(escape(one.label), str(one.support), *cells)
    console.print(table)


def _print_scaling(console: "Console", scaling: "TemperatureScaling") -> None:
    console.print(
        f"calibrated on {scaling.examples} examples of {scaling.split}: temperature "
        f"{scaling.temperature:.3f}, negative log-likelihood {scaling.nll_before:.3f} -> "
        f"{scaling.nll_after:.3f}, expected calibration error {scaling.expected_error_before:.1%} "
        f"-> {scaling.expected_error_after:.1%}",
        markup=False,
    )


def _print_calibration(console: "Console", calibration: "Calibration", temperature: float) -> None:
    title = (
        f"expected calibration error {calibration.expected_error:.1%}, "
        f"Brier score {calibration.brier:.3f} (0 to 2)"
    )
    if temperature != 1:
        title += f", temperature {temperature:.3f}"
    table = make_table(title, "mean confidence", "accuracy", "examples", texts=0)
    for bin_ in calibration.bins:
        table.add_row(f"{bin_.confidence:.1%}", f"{bin_.accuracy:.1%}", str(bin_.examples))
    console.print(table)


def _print_rationales(console: "Console", quality: "RationaleQuality") -> None:
    line = f"rationales: {quality.examples}"
    if quality.rouge_l is not None:
        line += f", ROUGE-L {quality.rouge_l:.1%} against {quality.referenced} of the teacher's"
    line += f"; {quality.concluding} conclude with a label"
    if quality.concluding:
        predicted, correct = quality.predicted, quality.right
        line += (
            f": {predicted} ({predicted / quality.concluding:.1%}) with the predicted one, "
            f"{correct} ({correct / quality.concluding:.1%}) with the correct one"
        )
    console.print(line, markup=False)
