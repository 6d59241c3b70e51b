"""Options that several commands share."""

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
    "run_flags",
]


def add_gin_options(parser: argparse.ArgumentParser) -> None:
    """Adds --gin_file, --gin_search_paths and --gin.NAME=VALUE."""
    parser.set_defaults(takes_gin=True)
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; repeatable, later files override earlier ones",
    )
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIRS",
        help="more folders to search for gin files, separated by commas",
    )
    parser.add_argument_group(
        "configuration", "--gin.NAME=VALUE sets a macro or a field, such as --gin.BATCH_SIZE=32"
    )


def gin_folders(args: argparse.Namespace) -> list[str]:
    """Returns the folders of --gin_search_paths, and checks that all gin files exist.

    Raises:
      DssError: if a gin file does not exist; files and folders in buckets are not checked.
    """
    folders = [folder for folder in args.gin_search_paths.split(",") if folder]
    if not any(map(in_bucket, (*args.gin_file, *folders))):
        for file in args.gin_file:
            find_gin_file(file, folders)
    return folders


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select a student: the run directory, the checkpoint and so on."""
    parser.set_defaults(takes_gin=True)
    parser.add_argument("run", metavar="RUN", help="a run directory of `dss train` or `dss import`")
    parser.add_argument(
        "--checkpoint", default="best", metavar="STEP", help="best (default), latest or a step"
    )
    parser.add_argument(
        "--mixture", metavar="NAME", help="a mixture instead of the one that the run trained on"
    )
    parser.add_argument(
        "--data_root", metavar="DIR", help="the folder of the released datasets, if it has moved"
    )
    parser.add_argument(
        "--dataset_path", metavar="PATH", help="your JSON lines, if they have moved"
    )
    parser.add_argument(
        "--num_beams", type=int, metavar="N", help="the number of beams; 1 is greedy decoding"
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="generate the label freely, even with a closed label set",
    )


def run_flags(args: argparse.Namespace) -> list[str]:
    """Returns the `NAME=VALUE` of gin values that the options of `add_run_options` override."""
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
    return flags


def open_run(args: argparse.Namespace):
    """Opens the run that the options select."""
    from dss.runs.directory import load_run

    return load_run(args.run, run_flags(args))


def prepare_jax(*, steps: bool = True) -> None:
    """Configures JAX: compilation cache, memory allocation, library logs, distributed processes.

    Args:
      steps: whether to keep freed memory for the next training step; False returns it to the
        system at once.

    Raises:
      DssError: if the processes of the environment's variables cannot be joined.
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
    # Orbax also raises the errors that it and its event loop log.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    join_processes()


def quiet_tpu() -> None:
    """Without a TPU, keeps libtpu from searching for one, which prints long warnings, and from
    locking out other processes.
    """
    from dss.parallel.devices import has_tpu

    if not has_tpu():
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
