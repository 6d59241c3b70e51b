"""`dss eval`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from dss.cli.checks import check_flags, check_output, check_run
from dss.cli.options import add_run_options, open_run, prepare_jax
from dss.cli.tables import make_console, make_table
from dss.paths import PREDICTIONS, write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from dss.evaluation.calibration import Calibration
    from dss.evaluation.confusion import Confusion
    from dss.evaluation.evaluator import Scored
    from dss.evaluation.rationales import RationaleQuality

__all__ = ["add_arguments", "run"]

MATRIX_LABELS = 10  # a closed set of more is shown without its confusion matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_run_options(parser)
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument(
        "--rationales", action="store_true", help="have rationales written too, and judge them"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there too")


def run(args: argparse.Namespace) -> int:
    """Prints how good the answers are; writes them into the run directory."""
    check_run(args.run)
    # A sweep has the summary written among the predictions, a folder that evaluating makes.
    if args.json and Path(args.json).parent != Path(args.run, PREDICTIONS):
        check_output("--json", args.json)
    data = {"DATA_ROOT": args.data_root, "DATASET_PATH": args.dataset_path}
    check_flags([f"{name}={path}" for name, path in data.items() if path is not None])

    from dss.cli.decode_progress import DecodeProgress
    from dss.evaluation.evaluator import DecodingProgress
    from dss.parallel.processes import is_leader
    from dss.runs.student import evaluate

    prepare_jax()
    found = open_run(args)
    result = evaluate(
        found,
        split=args.split,
        checkpoint=args.checkpoint,
        rationales=args.rationales,
        progress=DecodeProgress() if is_leader() else DecodingProgress(),
    )
    if not is_leader():
        return 0
    path = result.save(found.folder / PREDICTIONS)
    console = make_console()
    where = f"{result.mixture} {result.split}, step {result.step}"
    console.print(f"{where}: {_describe(result.scored)}", markup=False)
    for name, teacher in result.teachers.items():
        line = f"teacher {name}: {_describe(teacher.scored)}, p = {teacher.p_value:.3g} (McNemar)"
        console.print(line, markup=False)
    if result.confusion:
        _print_confusion(console, result.confusion)
    if result.calibration:
        _print_calibration(console, result.calibration)
    if result.quality:
        _print_rationales(console, result.quality)
    console.print(f"predictions: {path}", markup=False)
    if args.json:
        # Whole or not at all: a sweep takes one that is there as the run's end.
        write_whole(epath.Path(args.json).expanduser(), json.dumps(result.summary()) + "\n")
    return 0


def _describe(scored: "Scored") -> str:
    text = f"{scored.metric.replace('_', ' ')} {scored.value:.2%}"
    if scored.interval:
        low, high = scored.interval
        right, total = int(sum(scored.verdicts)), len(scored.verdicts)
        text += f" (95%: {low:.2%} to {high:.2%}; {right} of {total})"
    return text


def _print_confusion(console: "Console", confusion: "Confusion") -> None:
    from rich.markup import escape

    from dss.evaluation.significance import wilson_interval

    matrix = len(confusion.labels) <= MATRIX_LABELS
    # Who chooses among the labels never says anything else.
    predicted = [*confusion.labels, "else"][: None if any(r[-1] for r in confusion.counts) else -1]
    headings = [escape(f"-> {label}") for label in predicted] if matrix else []
    columns = ("right label", "examples", "accuracy", "95%", *headings)
    table = make_table("by label", *columns, texts=1)
    rows = zip(confusion.labels, confusion.counts, confusion.examples, confusion.right, strict=True)
    for label, counts, examples, right in rows:
        cells = ["", ""]
        if examples:
            low, high = wilson_interval(right, examples)
            cells = [f"{right / examples:.1%}", f"{low:.1%} to {high:.1%}"]
        cells += [str(counts[j]) for j in range(len(headings))]
        table.add_row(escape(label), str(examples), *cells)
    console.print(table)


def _print_calibration(console: "Console", calibration: "Calibration") -> None:
    title = (
        f"calibration: expected error {calibration.expected_error:.1%}, "
        f"Brier score {calibration.brier:.3f} (0 to 2)"
    )
    table = make_table(title, "mean confidence", "accuracy", "examples", texts=0)
    for bin_ in calibration.bins:
        table.add_row(f"{bin_.confidence:.1%}", f"{bin_.accuracy:.1%}", str(bin_.examples))
    console.print(table)


def _print_rationales(console: "Console", quality: "RationaleQuality") -> None:
    line = f"rationales: {quality.examples}"
    if quality.rouge_l is not None:
        line += f", ROUGE-L {quality.rouge_l:.1%} against {quality.referenced} of the teacher's"
    line += f"; {quality.concluding} conclude a label"
    if quality.concluding:
        predicted, right = quality.predicted, quality.right
        line += (
            f": {predicted} ({predicted / quality.concluding:.1%}) the predicted one, "
            f"{right} ({right / quality.concluding:.1%}) the right one"
        )
    console.print(line, markup=False)
