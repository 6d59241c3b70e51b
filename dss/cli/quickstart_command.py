"""`dss quickstart`."""

import argparse
from pathlib import Path

from dss.cli.options import prepare_jax
from dss.errors import DssError

__all__ = ["add_arguments", "run"]

NOTE = """\
The data are synthetic: questions about which of two invented people lived first. Their rationales
carry knowledge that the labels do not: they show how the method works, not how much it gains on
your task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="the folder for data, runs and results (default: quickstart)",
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[250, 500, 1000],
        metavar="N",
        help="numbers of training examples (default: 250 500 1000)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of seeds for each method and size (default: 3)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains the students, prints a table and saves a figure."""
    if args.seeds < 1:
        raise DssError(f"--seeds {args.seeds}: give at least 1")
    if args.output.exists() and not args.output.is_dir():
        raise DssError(f"--output {args.output}: a file; give a folder")

    from rich.console import Console
    from rich.table import Table

    from dss.quickstart import METHODS, TRAIN, draw, run_quickstart, summarize

    if not all(50 <= size <= TRAIN for size in args.sizes):
        raise DssError(f"--sizes {' '.join(map(str, args.sizes))}: give numbers from 50 to {TRAIN}")
    print(NOTE + "\n", flush=True)
    sizes = sorted(set(args.sizes))
    outcomes = run_quickstart(args.output, sizes=sizes, seeds=args.seeds, prepare=prepare_jax)

    summary = summarize(outcomes)
    table = Table(title=f"test accuracy, mean ± standard deviation of {args.seeds} seeds")
    table.add_column("examples", justify="right")
    for method in METHODS:
        table.add_column(method, justify="right")
    for size in sizes:
        cells = (summary[method, size] for method in METHODS)
        table.add_row(str(size), *(f"{mean:.1%} ± {spread:.1%}" for mean, spread in cells))
    Console().print(table)
    try:
        draw(outcomes, args.output / "accuracy.png")
        print(f"figure: {args.output / 'accuracy.png'} (and .svg)")
    except ModuleNotFoundError:
        print("no figure: matplotlib is missing; pip install 'dss[report]', then repeat this")
    print(f"numbers: {args.output / 'results.json'}; runs: {args.output / 'runs'}")
    print(f"a page of results: dss report {args.output / 'runs'}")
    return 0
