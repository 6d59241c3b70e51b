"""`dss import`."""

import argparse

from dss.cli.checks import check_new_folder, check_source, check_vocabulary
from dss.cli.options import add_gin_options, gin_folders, prepare_jax

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    parser.add_argument(
        "source",
        metavar="hf:PATH|t5x:PATH",
        help="a Hugging Face T5 folder or a hub's id; a T5X checkpoint, or the folder of several",
    )
    parser.add_argument("run", metavar="RUN", help="the run directory to make")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="where none lies with the checkpoint, as with T5X's; a SentencePiece model, or bytes",
    )
    add_gin_options(parser)
    parser.epilog = (
        "A checkpoint too large for one device: --gin_file=layouts/fsdp.gin, or another layout, "
        "splits it over all."
    )


def run(args: argparse.Namespace) -> int:
    """Imports, and says what was found."""
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
        run_dir=args.run,
        initial_checkpoint=args.source,
        vocabulary=args.vocabulary or experiment.vocabulary,
    )
    found = import_checkpoint(experiment)
    config = found.config
    if not is_leader():
        return 0
    print(
        f"{found.folder}: {num_parameters(config) / 1e6:.1f}M parameters, "
        f"{config.num_encoder_layers} + {config.num_decoder_layers} layers of {config.d_model}"
    )
    print(f"now: dss train --gin_file=recipes/... --gin.INITIAL_CHECKPOINT_PATH={found.folder}")
    return 0
