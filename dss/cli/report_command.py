"""The command `dss report`."""

import argparse
import re
import shlex
from pathlib import Path

from dss.cli.checks import check_folders
from dss.cli.options import quiet_tpu
from dss.errors import DssError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="run directories, or folders that contain them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="HTML file to write (default: report.html); figures and their data go to "
        "a folder beside it (report-figures/ for report.html)",
    )
    parser.add_argument("--split", default="test", help="split: train, valid or test (default)")
    parser.add_argument(
        "--teacher-size",
        action="append",
        default=[],
        metavar="TEACHER=PARAMETERS",
        help="number of parameters of a teacher, such as llama=70B; those of PaLM and GPT-NeoX "
        "are known",
    )


def _teacher_size(text: str) -> tuple[str, float]:
    """Parses TEACHER=PARAMETERS into the teacher's name in mixtures and a number of parameters.

    >>> _teacher_size("gpt-oss=20B"), _teacher_size("mine=350M")
    (('gpt_oss', 20000000000.0), ('mine', 350000000.0))
    """
    match = re.fullmatch(r"(.+)=(\d+\.?\d*)([MB])", text)
    if not match or not float(match[2]):
        raise DssError(
            f"--teacher-size={text}: give a teacher and its parameters, such as llama=70B"
        )
    name = re.sub(r"\W", "_", match[1], flags=re.ASCII)
    return name, float(match[2]) * {"M": 1e6, "B": 1e9}[match[3]]


def run(args: argparse.Namespace) -> int:
    """Writes the report, and prints the main result of each dataset."""
    check_folders(args.runs)
    sizes = dict(map(_teacher_size, args.teacher_size))
    if args.output.is_dir():
        raise DssError(
            f"{args.output}: a folder; give the name of a file, such as "
            f"{args.output / 'report.html'}"
        )

    import jax

    from dss.reporting.analysis import RELEASED_TEACHERS
    from dss.reporting.collect import collect
    from dss.reporting.page import figures_folder, write_report
    from dss.reporting.words import main_result

    quiet_tpu()
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by a training run
    collected = collect(args.runs)
    if not collected.runs and collected.problems:
        path, problem = collected.problems[0]
        raise DssError(f"{', '.join(args.runs)}: no readable run: {path}: {problem}")
    options = [f"--teacher-size={text}" for text in args.teacher_size]
    if args.split != "test":
        options.append(f"--split={args.split}")
    groups = write_report(
        collected,
        args.output,
        split=args.split,
        teacher_sizes=RELEASED_TEACHERS | sizes,
        command=shlex.join(["dss", "report", *args.runs, *options, "-o", str(args.output)]),
    )
    for path, problem in collected.problems:
        print(f"excluded: {path}: {problem}")
    for group in groups:
        result = main_result(group)
        print(f"{group.dataset}: {result.headline} {result.basis}")
    print(f"{len(collected.runs)} runs: {args.output}; figures: {figures_folder(args.output)}")
    return 0
