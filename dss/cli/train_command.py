"""`dss train`."""

import argparse

from dss.cli.checks import check_flags
from dss.cli.options import add_gin_options, gin_folders, prepare_jax

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_gin_options(parser)
    parser.add_argument(
        "--resume",
        choices=("never", "auto", "must"),
        default="auto",
        help="auto (default): resume the run in MODEL_DIR if there is one; must: fail if there is "
        "none; never: fail if there is one",
    )
    parser.add_argument(
        "--changed-data",
        choices=("refuse", "accept"),
        default="refuse",
        help="whether to resume a run whose data files have changed (default: refuse)",
    )
    parser.epilog = (
        "dss train --gin_file=students/tiny.gin --gin_file=datasets/svamp.gin "
        "--gin_file=methods/step_by_step.gin "
        "--gin.MODEL_DIR=runs/svamp --gin.DATA_ROOT=DIR --gin.VOCABULARY=FILE"
    )


def run(args: argparse.Namespace) -> int:
    """Trains a student; returns the exit status, 128 + the number of a signal that ended it."""
    search = gin_folders(args)
    check_flags(args.gin, trains=True)

    from dss.config.gin_files import parse_gin

    experiment = parse_gin(args.gin_file, args.gin, search)

    from dss.cli.progress import display_for
    from dss.cli.train_progress import TrainProgress
    from dss.parallel.processes import is_leader
    from dss.runs.train import run_experiment
    from dss.training.loop import Progress

    prepare_jax()
    progress = Progress()
    if is_leader():
        display = display_for("step", experiment.trainer.train_steps)
        progress = TrainProgress(display, experiment.batch_size)
    try:
        accept = args.changed_data == "accept"
        result = run_experiment(experiment, progress, args.resume, accept_changed_data=accept)
    finally:
        progress.close()
    if not is_leader():
        return 0 if result.stopped_by is None else 128 + result.stopped_by
    if result.stopped_by is not None:
        print(f"{result.stopped_by.name}: saved at step {result.step}; the same command resumes")
        return 128 + result.stopped_by
    print(
        f"{experiment.run_dir}: step {result.step} done; best checkpoint: step {result.best_step}"
    )
    print(f"next: dss eval {experiment.run_dir}")
    return 0
