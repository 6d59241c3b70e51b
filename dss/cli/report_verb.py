"""`dss report`."""

import argparse
import shlex
from pathlib import Path

from dss.cli.options import quiet_tpu

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="run directories, or folders that hold them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default: report.html); figures and numbers go to FILE-figures beside it",
    )
    parser.add_argument("--split", default="test", help="train, valid or test (default)")


def run(args: argparse.Namespace) -> int:
    """Writes the report, and prints its answers."""
    import jax

    from dss.reporting.collect import collect
    from dss.reporting.page import figures_folder, write_report
    from dss.reporting.words import answer

    quiet_tpu()
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be training
    collected = collect(args.runs)
    command = shlex.join(["dss", "report", *args.runs, "-o", str(args.output)])
    groups = write_report(collected, args.output, split=args.split, command=command)
    for where, why in collected.problems:
        print(f"left out: {where}: {why}")
    for group in groups:
        said = answer(group)
        print(f"{group.dataset}: {said.headline} {said.basis}")
    print(f"{len(collected.runs)} runs: {args.output}; figures: {figures_folder(args.output)}")
    return 0
