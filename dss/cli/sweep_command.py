"""`dss sweep`."""

import argparse
import shlex
from typing import TYPE_CHECKING

from dss.cli.checks import check_flags
from dss.cli.options import add_gin_options, gin_folders
from dss.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dss.sweeps.runner import Outcome

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_gin_options(parser)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="do the runs of the I-th of N parts, counted from 0, such as an array job's",
    )
    parser.add_argument(
        "--print-commands",
        action="store_true",
        help="print a line of shell for each run, and run nothing",
    )
    parser.epilog = (
        "dss sweep --gin_file=runs/sweep.gin --gin.DATASET=cqa --gin.DATA_ROOT=DIR "
        "--gin.VOCABULARY=FILE --gin.MODEL_DIR=runs/cqa-sweep. The same command goes on where it "
        "was stopped, and tries again what failed."
    )


def run(args: argparse.Namespace) -> int:
    """Does a sweep; returns 1 if a run failed, 128 + the signal's number where one stopped it."""
    part = _part(args.shard) if args.shard else None
    search = gin_folders(args)
    check_flags(args.gin, trains=True)

    from dss.cli.sweep_progress import SweepLines
    from dss.parallel.processes import has_others
    from dss.sweeps.runner import run_sweep
    from dss.sweeps.sweep import plan_sweep

    if has_others():
        raise UserError(
            "one process does a sweep, and JAX's variables or Slurm tell of several; start the "
            "lines of --print-commands, or a --shard in each job of an array"
        )
    sweep = plan_sweep(args.gin_file, args.gin, search)
    if part is not None:
        sweep = sweep.select_part(*part)
    if args.print_commands:
        for one in sweep.runs:
            print(" && ".join(shlex.join(["dss", *command]) for command in one.commands))
        return 0
    if not sweep.runs:
        print("no run is left for this part")
        return 0
    outcomes, stopped_by = run_sweep(sweep, SweepLines(len(sweep.runs)))
    return _say_all(outcomes, stopped_by)


def _part(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard={text}: give it as I/N with I from 0 to N - 1, such as 0/4")
    return int(i), int(n)


def _say_all(outcomes: "Sequence[Outcome]", stopped_by: int | None) -> int:
    """Prints the table and what is missing or failed; returns the exit status."""
    if any(outcome.status == "done" for outcome in outcomes):
        _print_table(outcomes)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    missing = sum(outcome.status == "missing" for outcome in outcomes)
    for outcome in failed:
        print(f"FAILED {outcome.run.name}: {outcome.error}; log: {outcome.log}")
    if failed:
        print(f"{len(failed)} of {len(outcomes)} runs failed; the same command tries them again")
    if stopped_by is not None:
        print(f"{missing} of {len(outcomes)} runs are not done; the same command goes on")
        return 128 + stopped_by
    return int(bool(failed))


def _print_table(outcomes: "Sequence[Outcome]") -> None:
    from dss.cli.tables import make_console, make_table
    from dss.evaluation.significance import seeds_interval

    groups: dict[tuple[str, str, int], list[Outcome]] = {}
    for outcome in outcomes:
        run = outcome.run
        groups.setdefault((run.method, run.student, run.examples), []).append(outcome)
    metric = next(outcome.summary["metric"] for outcome in outcomes if outcome.summary)
    columns = ("method", "student", "examples", "seeds", "mean", "95%")
    title = f"{metric.replace('_', ' ')} on {outcomes[0].run.split}, mean over seeds"
    table = make_table(title, *columns)
    for (method, student, examples), group in groups.items():
        scores = [outcome.scores for outcome in group if outcome.status == "done"]
        cells = ["", ""]
        if scores:
            mean = sum(map(sum, scores)) / sum(map(len, scores))
            cells = [f"{mean:.1%}", "examples differ"]
            if len(set(map(len, scores))) == 1:
                low, high = seeds_interval(scores)
                cells[1] = f"{low:.1%} to {high:.1%}"
        table.add_row(method, student, f"{examples:,}", f"{len(scores)}/{len(group)}", *cells)
    make_console().print(table)
