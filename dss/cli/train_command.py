"""`dss train`."""

import argparse

from dss.cli.checks import check_flags
from dss.cli.options import add_gin_options, gin_folders, prepare_jax

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_gin_options(parser)
    parser.add_argument(
        "--resume",
        choices=("never", "auto", "must"),
        default="auto",
        help="whether MODEL_DIR may (auto, the default), must or must never hold a run already",
    )
    parser.add_argument(
        "--changed-data",
        choices=("refuse", "accept"),
        default="refuse",
        help="whether a run may go on (no, the default) after the files that it reads have changed",
    )
    parser.epilog = (
        "dss train --gin_file=students/tiny.gin --gin_file=datasets/svamp.gin "
        "--gin_file=methods/step_by_step.gin "
        "--gin.MODEL_DIR=runs/svamp --gin.DATA_ROOT=DIR --gin.VOCABULARY=FILE"
    )


def run(args: argparse.Namespace) -> int:
    """Trains; returns the exit status, 128 + the signal's number where one ended it."""
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
        print(f"{result.stopped_by.name}: saved at step {result.step}; same command to go on")
        return 128 + result.stopped_by
    print(
        f"{experiment.run_dir}: step {result.step} done; best checkpoint: step {result.best_step}"
    )
    print(f"now: dss eval {experiment.run_dir}")
    return 0
