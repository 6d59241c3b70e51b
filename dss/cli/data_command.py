"""`dss data`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dss.cli.checks import check_output
from dss.cli.messages import in_flags
from dss.errors import DssError
from dss.paths import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from dss.data.prepare import Preparation

__all__ = ["add_arguments", "run"]

SHOWN_LABELS = 30  # rows of the table of labels
SHOWN_IDS = 5  # ids after a count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="CSV, TSV, XLSX, Parquet or JSON file (also .gz), folder of them, folder of "
        "`datasets`, or hf:ID",
    )
    columns = parser.add_argument_group("columns")
    columns.add_argument(
        "--input", metavar="NAME[,NAME]", help="columns of the input's text, joined as 'name: text'"
    )
    columns.add_argument(
        "--template", metavar="TEXT", help="input's text instead, such as '{subject}: {body}'"
    )
    columns.add_argument("--label", metavar="NAME", help="column of the label (default: none)")
    columns.add_argument("--id", metavar="NAME", help="column of ids (default: row numbers)")
    columns.add_argument("--sheet", metavar="NAME", help="sheet of an Excel file (default: first)")
    labels = parser.add_argument_group("labels")
    labels.add_argument(
        "--labels", metavar="A,B", help="closed set to declare (default: the labels, if few)"
    )
    labels.add_argument("--open", action="store_true", help="declare no closed set")
    labels.add_argument(
        "--merge-labels",
        action="store_true",
        help="write labels that differ only by case or whitespace in their most frequent spelling",
    )
    splits = parser.add_argument_group("splits")
    splits.add_argument("--split", metavar="NAME", help="column with train, valid or test")
    splits.add_argument(
        "--valid", type=float, default=0.1, metavar="F", help="fraction for validation (0.1)"
    )
    splits.add_argument("--test", type=float, default=0.1, metavar="F", help="for the test (0.1)")
    splits.add_argument(
        "--similar",
        type=float,
        default=0.85,
        metavar="F",
        help="similarity from which inputs stay in one split; 1: only equal ones (0.85)",
    )
    splits.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the splits (0)")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="student's SentencePiece model, or bytes, for lengths and characters",
    )
    parser.add_argument(
        "--inputs-length", type=int, default=512, metavar="N", help="longest input, tokens (512)"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="dataset's folder (default: the file's name beside it)"
    )
    parser.add_argument("--replace", action="store_true", help="overwrite the folder's examples")
    parser.add_argument("--dry-run", action="store_true", help="report only; write nothing")
    parser.add_argument("--json", metavar="FILE", help="file to write the report to")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    from dss.data.datasets import check_name, folder_of, name_of
    from dss.data.prepare import Columns, prepare
    from dss.data.vocabulary import load_vocabulary

    if args.json is not None:
        check_output("--json", args.json)
    if args.open and args.labels:
        raise DssError("--open and --labels exclude each other; give one")
    if args.input and args.template:
        raise DssError("--input and --template exclude each other; give one")
    if args.output is None and not args.dry_run and not Path(args.source).expanduser().is_file():
        if Path(args.source).expanduser().exists() or args.source.startswith("hf:"):
            raise DssError("--output: give the folder of the dataset to write")
        raise DssError(f"{args.source}: no such file or folder")
    folder = args.output or folder_of(args.source)
    if not args.dry_run:
        check_name(name_of(folder), "--output")
    declared = [label.strip() for label in args.labels.split(",")] if args.labels else None
    found = prepare(
        args.source,
        Columns(
            input=tuple(name.strip() for name in args.input.split(",")) if args.input else (),
            label=args.label,
            id=args.id,
            split=args.split,
            template=args.template,
        ),
        valid=args.valid,
        test=args.test,
        seed=args.seed,
        labels=() if args.open else declared,
        merge_labels=args.merge_labels,
        sheet=args.sheet,
        similar=args.similar,
        vocabulary=None if args.vocabulary is None else load_vocabulary(args.vocabulary),
        limit=args.inputs_length,
    )
    console = Console(highlight=False, soft_wrap=True)
    _print(console, found, has_labels=args.label is not None)
    if not args.dry_run:
        found.write(folder, replace=args.replace)
        console.print(f"{folder}: written", markup=False)
    if args.json is not None:
        write_whole(args.json, json.dumps(found.summary(), ensure_ascii=False, indent=1) + "\n")
    return 0


def _print(console: "Console", found: "Preparation", *, has_labels: bool) -> None:
    from rich.table import Table

    summary, sizes = found.summary(), found.split_sizes
    lines = [f"{len(found.rows):,} rows: " + ", ".join(f"{n:,} {s}" for s, n in sizes.items())]
    notes = (
        (found.empty_inputs, "without an input: written, and not trained on"),
        (found.unlabelled, "without a label: in train, for the rationale task only"),
        (found.duplicates, "with the input of an earlier row: in its split"),
        (found.conflicts, "whose input has several labels: correct them, or leave them out"),
    )
    for ids, note in notes:
        if ids:
            shown = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
            lines.append(f"{len(ids):,} {note} (rows {shown})")
    if found.empty_cells:
        cells = ", ".join(f"{n:,} in {name!r}" for name, n in found.empty_cells.items())
        lines.append(f"empty cells: {cells}")
    if found.near_duplicates:
        lines.append(f"{found.near_duplicates:,} similar to another row: in its split")
    lines += [in_flags(line, {"similar": "--similar"}) for line in found.uneven]
    lines += found.look_alikes
    if found.look_alikes:
        lines.append("  to give each one spelling: --merge-labels")
    lengths = ", ".join(f"{name} {n:,}" for name, n in summary["lengths"].items())
    lines.append(f"length of inputs in {summary['length_unit']}: {lengths}")
    if found.truncated:
        lines.append(f"{found.truncated:,} inputs longer than {found.limit} tokens will be cut")
    if found.unwritable:
        lost = ", ".join(f"{c!r} in {n:,} rows" for c, n in [*found.unwritable.items()][:10])
        whose = "T5's vocabulary" if found.limit is None else "the vocabulary"
        lines.append(
            f"{whose} cannot write {lost}; if they matter, take a student that reads bytes "
            "(ByT5) or mT5's vocabulary"
            + ("" if found.limit else "; --vocabulary checks all characters")
        )
    console.print("\n".join(lines), markup=False)
    if not has_labels:
        return
    table = Table("label", *sizes, "all")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = found.label_counts
    for label, by_split in [*counts.items()][:SHOWN_LABELS]:
        row = [*by_split.values(), sum(by_split.values())]
        table.add_row(label, *(f"{n:,}" for n in row))
    console.print(table, markup=False)
    if len(counts) > SHOWN_LABELS:
        console.print(f"and {len(counts) - SHOWN_LABELS:,} more labels")
    declared = f"{len(found.labels)} labels" if found.labels else "no closed set of labels"
    console.print(f"dataset.json declares {declared}" if found.labels else declared)
