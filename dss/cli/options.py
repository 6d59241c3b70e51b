"""Options that several verbs share."""

import argparse
import os

from dss.paths import find_gin_file, in_bucket

__all__ = [
    "add_gin_options",
    "add_run_options",
    "gin_folders",
    "open_run",
    "prepare_jax",
    "quiet_tpu",
]


def add_gin_options(parser: argparse.ArgumentParser) -> None:
    """Adds --gin_file, --gin_search_paths and --gin.NAME=VALUE."""
    parser.set_defaults(takes_gin=True)
    parser.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="read in order; repeatable"
    )
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIRS",
        help="where gin files are looked for too, separated by commas",
    )
    parser.add_argument_group(
        "configuration", "--gin.NAME=VALUE sets a macro or a field, such as --gin.BATCH_SIZE=32"
    )


def gin_folders(args: argparse.Namespace) -> list[str]:
    """Returns the folders of --gin_search_paths, having checked that all gin files exist.

    Raises:
      UserError: if one does not; files and folders in a bucket are left to the reading.
    """
    folders = [folder for folder in args.gin_search_paths.split(",") if folder]
    if not any(map(in_bucket, (*args.gin_file, *folders))):
        for file in args.gin_file:
            find_gin_file(file, folders)
    return folders


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which student: a run directory and a checkpoint in it."""
    parser.set_defaults(takes_gin=True)
    parser.add_argument("run", metavar="RUN", help="a run directory of `dss train` or `dss import`")
    parser.add_argument(
        "--checkpoint", default="best", metavar="STEP", help="best (default), latest or a step"
    )
    parser.add_argument(
        "--mixture", metavar="NAME", help="in place of the mixture that the run was trained on"
    )
    parser.add_argument("--data_root", metavar="DIR", help="where the released datasets are now")
    parser.add_argument("--dataset_path", metavar="PATH", help="where your JSON lines are now")
    parser.add_argument("--num_beams", type=int, metavar="N", help="beam search; 1 is greedy")
    parser.add_argument(
        "--generate",
        action="store_true",
        help="write the label out, even where it can be chosen among the possible ones",
    )


def open_run(args: argparse.Namespace):
    """Returns the run that the options name."""
    from dss.runs.directory import load_run

    flags = list(args.gin)
    for name, value in (
        ("Experiment.mixture", args.mixture),
        ("DataConfig.root", args.data_root),
        ("DataConfig.dataset_path", args.dataset_path),
        ("DecodingConfig.num_beams", args.num_beams),
        ("DecodingConfig.closed", False if args.generate else None),
    ):
        if value is not None:
            flags.append(f"{name}={value!r}")
    return load_run(args.run, flags)


def prepare_jax(*, steps: bool = True) -> None:
    """Keeps compiled programs between runs, in the cache folder of dss, and memory between steps;
    quiets the libraries; joins the processes that the environment tells of.

    Args:
      steps: whether there will be steps; else memory is given back as soon as it is free.

    Raises:
      UserError: see `join_processes`.
    """
    import logging

    import jax
    from absl import logging as absl_logging

    from dss.batches.store import cache_dir
    from dss.parallel.memory import keep_freed_memory, return_freed_memory
    from dss.parallel.processes import join_processes

    (keep_freed_memory if steps else return_freed_memory)()
    quiet_tpu()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    # What Orbax and its event loop log as an error Orbax raises too.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    join_processes()


def quiet_tpu() -> None:
    """Has libtpu, where there is no TPU, neither look for one, saying so at length, nor keep other
    processes from loading it.
    """
    from dss.parallel.devices import has_tpu

    if not has_tpu():
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
