"""`dss predict`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dss.cli.options import add_run_options, open_run, prepare_jax

if TYPE_CHECKING:
    from dss.data.examples import Example

__all__ = ["add_arguments", "run"]

CHUNK = 1024  # inputs read before their predictions are written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_run_options(parser)
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="JSON lines with an 'input', or - (default) for standard input: JSON or plain lines",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--rationale", action="store_true", help="write the rationale too")


def _read(source: str) -> Iterator["Example"]:
    """Yields what is asked for; of standard input as it comes."""
    from dss.data.examples import Example, read_example, read_json, stream_examples
    from dss.errors import UserError
    from dss.paths import BYTE_ORDER_MARK

    if source != "-":
        yield from stream_examples(Path(source), "input")
        return
    for number, content in enumerate(sys.stdin.buffer):
        where, id_ = f"standard input:{number + 1}", f"input-{number}"
        try:
            line = content.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8") from None
        if number == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.startswith("{"):
            yield read_example(where, read_json(where, line), id_)
        elif line:
            yield Example(id_, line)


def run(args: argparse.Namespace) -> int:
    """Writes one JSON line an input: id, input, label and, if asked for, rationale."""
    import itertools

    from dss.errors import UserError
    from dss.runs import explain, label, use_data
    from dss.training.processes import is_leader

    prepare_jax()
    found = open_run(args)
    experiment = found.experiment
    use_data(experiment.data, must_exist=False)
    mixture = found.mixture()
    if (
        args.output
        and args.output.exists()
        and args.input != "-"
        and args.output.samefile(args.input)
    ):
        raise UserError(f"{args.output}: input and output are the same file")
    predictor, _ = found.predictor(args.checkpoint)
    length = experiment.data.inputs_length
    examples = _read(args.input)

    def predictions() -> Iterator[dict[str, str]]:
        while chunk := list(itertools.islice(examples, CHUNK)):
            texts = [example.input for example in chunk]
            labels = label(predictor, mixture, texts, length)
            rationales = explain(predictor, mixture, texts, length) if args.rationale else None
            for i, example in enumerate(chunk):
                line = {"id": example.id, "input": example.input, "label": labels[i]}
                yield line | ({"rationale": rationales[i]} if rationales is not None else {})

    lines = predictions()
    first = list(itertools.islice(lines, 1))  # before an earlier output is written over
    path = args.output if is_leader() else Path(os.devnull)  # all predict, one writes
    output = path.open("w", encoding="utf-8") if path else sys.stdout
    try:
        for line in itertools.chain(first, lines):
            print(json.dumps(line, ensure_ascii=False), file=output, flush=True)
    finally:
        if path:
            output.close()
    return 0
