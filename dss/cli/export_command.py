"""`dss export`."""

import argparse

from dss.cli.checks import check_new_folder, check_run
from dss.cli.options import prepare_jax

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("run", metavar="RUN", help="a run directory of `dss train` or `dss import`")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="hf: a Hugging Face directory, with tokenizer and model card; t5x: a T5X checkpoint; "
        "ctranslate2: a CTranslate2 model",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder to write, new or empty")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="STEP",
        help="the checkpoint to export: best (default), latest or a step",
    )


def run(args: argparse.Namespace) -> int:
    """Exports a student, and prints the folder."""
    check_run(args.run)
    check_new_folder(args.folder, "export")

    from dss.export.export import export
    from dss.runs.directory import load_run

    prepare_jax(steps=False)
    written = export(load_run(args.run), args.to, args.folder, args.checkpoint)
    print(f"{written.path}: step {written.step}{written.note and f', {written.note}'}")
    return 0
