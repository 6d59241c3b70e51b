"""`dss export`."""

import argparse

from dss.cli.checks import check_new_folder, check_run
from dss.cli.options import prepare_jax
from dss.errors import DssError

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
    parser.add_argument(
        "--dataset_path", metavar="PATH", help="your data, if they have moved (for --quantization)"
    )
    parser.add_argument(
        "--data_root", metavar="DIR", help="folder of the released datasets, if it has moved"
    )
    parser.add_argument(
        "--quantization",
        metavar="FORM",
        help="of a ctranslate2 export: int8, int8_bfloat16, float16, ... (default: float32)",
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        metavar="F",
        help="fraction of validation labels that must equal the student's if quantized (0.99)",
    )
    parser.add_argument(
        "--examples", type=int, metavar="N", help="validation examples to compare at most (400)"
    )


def run(args: argparse.Namespace) -> int:
    """Exports a student, and prints the folder."""
    check_run(args.run)
    check_new_folder(args.folder, "export")
    checks = {"min_agreement": args.min_agreement, "examples": args.examples}
    checks = {name: value for name, value in checks.items() if value is not None}
    if checks and args.quantization is None:
        raise DssError("--min-agreement and --examples are for --quantization")

    from dss.export.export import Quantization, export
    from dss.runs.directory import load_run

    quantization = args.quantization and Quantization(form=args.quantization, **checks)

    prepare_jax(steps=False)
    moved = {"DataConfig.dataset_path": args.dataset_path, "DataConfig.root": args.data_root}
    flags = [f"{name}={value!r}" for name, value in moved.items() if value is not None]
    written = export(load_run(args.run, flags), args.to, args.folder, args.checkpoint, quantization)
    print(f"{written.path}: step {written.step}{written.note and f', {written.note}'}")
    return 0
