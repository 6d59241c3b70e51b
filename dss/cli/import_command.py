"""`dss import`."""

import argparse

from dss.cli.checks import check_new_folder, check_source, check_vocabulary
from dss.cli.options import add_gin_options, gin_folders, prepare_jax

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "source",
        metavar="hf:PATH|t5x:PATH",
        help="a Hugging Face T5 folder or hub id; a T5X checkpoint, or a folder of several",
    )
    parser.add_argument("run", metavar="RUN", help="the run directory to create")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="a SentencePiece model or 'bytes', for a checkpoint without one, such as T5X's",
    )
    add_gin_options(parser)
    parser.epilog = (
        "To shard a checkpoint that is too large for one device over all devices: "
        "--gin_file=layouts/fsdp.gin, or another layout."
    )


def run(args: argparse.Namespace) -> int:
    """Imports a checkpoint, and prints the student's size."""
    search = gin_folders(args)
    check_source(args.source)
    check_new_folder(args.run, "import")
    if args.vocabulary is not None:
        check_vocabulary(args.vocabulary)

    import dataclasses

    from dss.config.gin_files import parse_gin

    experiment = parse_gin(args.gin_file, args.gin, search)

    from dss.parallel.processes import is_leader
    from dss.runs.start import import_checkpoint
    from dss.student.network import num_parameters

    prepare_jax(steps=False)
    experiment = dataclasses.replace(
        experiment,
        mixture=None,
        dataset=None,
        method=None,
        teacher=None,
        run_dir=args.run,
        initial_checkpoint=args.source,
        vocabulary=args.vocabulary or experiment.vocabulary,
    )
    imported = import_checkpoint(experiment)
    config = imported.config
    if not is_leader():
        return 0
    print(
        f"{imported.folder}: {num_parameters(config) / 1e6:.1f}M parameters, "
        f"{config.num_encoder_layers} + {config.num_decoder_layers} layers of {config.d_model}"
    )
    print(
        "to train it: dss train --gin_file=datasets/... --gin_file=methods/... "
        f"--gin.INITIAL_CHECKPOINT_PATH={imported.folder}"
    )
    return 0
