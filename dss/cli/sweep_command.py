"""`dss sweep`."""

import argparse
import shlex
from typing import TYPE_CHECKING

from dss.cli.checks import check_flags
from dss.cli.options import add_gin_options, gin_folders
from dss.errors import DssError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dss.sweeps.runner import Outcome

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_gin_options(parser)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="execute only the I-th of N parts, counted from 0, such as in an array job",
    )
    parser.add_argument(
        "--print-commands",
        action="store_true",
        help="print a shell command for each run instead of executing it",
    )
    parser.epilog = (
        "dss sweep --gin_file=runs/sweep.gin --gin.DATASET=cqa --gin.DATA_ROOT=DIR "
        "--gin.VOCABULARY=FILE --gin.MODEL_DIR=runs/cqa-sweep. The same command resumes an "
        "interrupted sweep, and repeats failed runs."
    )


def run(args: argparse.Namespace) -> int:
    """Executes a sweep; returns 1 if a run failed, or 128 + the number of a signal."""
    part = _part(args.shard) if args.shard else None
    search = gin_folders(args)
    check_flags(args.gin, trains=True)

    from dss.cli.sweep_progress import SweepLines
    from dss.parallel.processes import has_others
    from dss.sweeps.runner import run_sweep
    from dss.sweeps.sweep import plan_sweep

    if has_others():
        raise DssError(
            "a sweep runs in one process, but JAX's or Slurm's environment variables are set for "
            "several; start the commands of --print-commands, or a --shard in each array job"
        )
    sweep = plan_sweep(args.gin_file, args.gin, search)
    if part is not None:
        sweep = sweep.select_part(*part)
    if args.print_commands:
        for sweep_run in sweep.runs:
            print(" && ".join(shlex.join(["dss", *command]) for command in sweep_run.commands))
        return 0
    if not sweep.runs:
        print("no runs in this part: there are more parts than runs")
        return 0
    outcomes, stopped_by = run_sweep(sweep, SweepLines(len(sweep.runs)))
    return _print_outcomes(outcomes, stopped_by)


def _part(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise DssError(f"--shard={text}: give it as I/N with I from 0 to N - 1, such as 0/4")
    return int(i), int(n)


def _print_outcomes(outcomes: "Sequence[Outcome]", stopped_by: int | None) -> int:
    """Prints the table, the failed runs and the number of missing ones; returns the exit status."""
    if any(outcome.status == "done" for outcome in outcomes):
        _print_table(outcomes)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    missing = sum(outcome.status == "missing" for outcome in outcomes)
    for outcome in failed:
        print(f"FAILED {outcome.run.name}: {outcome.error}; log: {outcome.log}")
    if failed:
        print(f"{len(failed)} of {len(outcomes)} runs failed; the same command repeats them")
    if stopped_by is not None:
        print(f"{missing} of {len(outcomes)} runs are not done; the same command resumes the sweep")
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
    columns = ("method", "student", "examples", "seeds", "mean", "95% interval")
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
