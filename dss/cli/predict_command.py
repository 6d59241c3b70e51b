"""`dss predict`."""

import argparse
import codecs
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dss.cli.checks import check_input, check_output, check_run
from dss.cli.options import add_run_options, open_run, prepare_jax
from dss.errors import UserError
from dss.paths import create, is_stream

if TYPE_CHECKING:
    from dss.data.examples import Example

__all__ = ["add_arguments", "run"]

OWN = ("label", "rationale", "truncated")  # fields that a student fills
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
    parser.add_argument("--replace", action="store_true", help="an output that has more lines too")
    parser.add_argument("--rationale", action="store_true", help="write the rationale too")


def _read(source: str) -> Iterator[tuple["Example", dict[str, Any]]]:
    """Yields what is asked for and the fields of its row; of standard input as it comes."""
    from dss.data.examples import read_example, read_json_lines

    rows = _standard_input() if source == "-" else read_json_lines(Path(source))
    seen = set()
    for number, (where, row) in enumerate(rows):
        example = read_example(where, row, f"input-{number}")
        if example.id in seen:
            raise UserError(f"{where}: duplicate id {example.id!r}; ids must differ")
        seen.add(example.id)
        yield example, row


def _count(source: str, *, passes: int) -> int | None:
    """Returns the number of answers to a file's inputs; None for what can be read only once.

    Raises:
      UserError: if a row of the file is malformed.
    """
    is_file = source != "-" and Path(source).is_file()
    return passes * sum(1 for _ in _read(source)) if is_file else None


OTHER_KINDS = {  # what files of other kinds begin with
    b"\x1f\x8b": "compressed",
    b"\x28\xb5\x2f\xfd": "compressed",
    b"PK\x03\x04": "compressed, or a spreadsheet",
    b"PAR1": "a Parquet file",
}


def _standard_input() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where it stands, row) of lines that are JSON objects, JSON texts or plain texts."""
    from dss.data.examples import read_json
    from dss.paths import BYTE_ORDER_MARK

    lines = enumerate(sys.stdin.buffer, 1)
    first = list(itertools.islice(lines, 2))
    for begins, kind in OTHER_KINDS.items():
        if first and first[0][1].startswith(begins):
            raise UserError(
                f"standard input: {kind}; give JSON lines with an 'input', or the texts alone, one "
                "a line"
            )
    if len(first) == 2 and _is_table(*(content for _, content in first)):
        raise UserError(
            "standard input:1: the header of a table; give JSON lines with an 'input', or the "
            "texts alone, one a line"
        )
    for number, content in itertools.chain(first, lines):
        where = f"standard input:{number}"
        try:
            line = content.decode().strip().removeprefix(BYTE_ORDER_MARK).strip()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8") from None
        value: Any = line
        if not line:
            continue
        if line.startswith("{"):
            value = read_json(where, line)
        elif line[0] in '["':
            with contextlib.suppress(ValueError, RecursionError):  # a text that begins so
                value = json.loads(line)
        if isinstance(value, list):
            raise UserError(f"{where}: a JSON array; give one object with an 'input' a line")
        yield where, value if isinstance(value, dict) else {"input": value}


def _is_table(header: bytes, row: bytes) -> bool:
    """Returns whether two lines are a header of names and a row with as many separators."""
    for separator in b",;\t":
        cells = header.removeprefix(codecs.BOM_UTF8).strip().split(bytes([separator]))
        if len(cells) > 1 and row.count(separator) >= len(cells) - 1:
            return all(re.fullmatch(rb'"?[\w-]+"?', cell) for cell in cells)
    return False


@contextlib.contextmanager
def _opened(path: Path | None, *, replace: bool, count: Callable[[], int]) -> Iterator[IO[str]]:
    """Opens the output; a file is written beside, and replaced by no fewer lines.

    Raises:
      UserError: the file that is there has more lines.
    """
    if path is None:
        yield sys.stdout
        return
    if is_stream(path):
        with path.open("w", encoding="utf-8") as output:
            yield output
        return
    partial = path.with_name(path.name + ".partial")
    with create(partial) as output:
        yield output
    if not replace and path.exists():
        with path.open("rb") as file:
            before = sum(1 for _ in file)
        if before > count():
            raise UserError(
                f"{path}: kept, as it has {before:,} lines and these are {count():,}, which are in "
                f"{partial.name}; give another --output, or --replace"
            )
    partial.replace(path)


def _check_output(args: argparse.Namespace) -> None:
    """Raises UserError if the output could not be written, or is the input."""
    check_output("--output", str(args.output))
    if args.output.exists() and args.input != "-" and args.output.samefile(args.input):
        raise UserError(f"{args.output}: input and output are the same file")


def run(args: argparse.Namespace) -> int:
    """Writes one JSON line an input: its id, its row's other fields, label, rationale if asked."""
    check_run(args.run)
    if args.input != "-":
        args.input = os.path.expanduser(args.input)
        check_input(args.input)
    if args.output:
        args.output = args.output.expanduser()
        _check_output(args)

    from dss.cli.decode_progress import DecodeProgress
    from dss.data.vocabulary import is_cut
    from dss.evaluation.evaluator import DecodingProgress
    from dss.parallel.processes import is_leader
    from dss.runs.student import explain, label

    prepare_jax()
    found = open_run(args)
    experiment = found.experiment
    mixture = found.mixture(must_exist=False)
    progress = DecodingProgress()
    if is_leader():
        progress = DecodeProgress()
        progress.expect(_count(args.input, passes=1 + args.rationale))
    predictor, _ = found.predictor(args.checkpoint, progress)
    length = experiment.data.inputs_length
    examples = _read(args.input)
    count = cut = 0

    def predictions() -> Iterator[dict[str, Any]]:
        nonlocal count, cut
        while chunk := list(itertools.islice(examples, CHUNK)):
            texts = [example.input for example, _ in chunk]
            labels = label(predictor, mixture, texts, length)
            rationales = explain(predictor, mixture, texts, length) if args.rationale else None
            for i, (example, row) in enumerate(chunk):
                line: dict[str, Any] = {"id": example.id, "input": example.input}
                line |= {name: row[name] for name in row if name not in (*line, *OWN)}
                if "label" in row:
                    line.setdefault("gold", row["label"])
                line["label"] = labels[i]
                if rationales is not None:
                    line["rationale"] = rationales[i]
                count += 1
                if is_cut(predictor.vocabulary, mixture.tasks[0].prefix + example.input, length):
                    line["truncated"] = True
                    cut += 1
                yield line

    lines = predictions()
    first = list(itertools.islice(lines, 1))  # before anything is opened for writing
    path = args.output if is_leader() else Path(os.devnull)  # all predict, one writes
    with _opened(path, replace=args.replace, count=lambda: count) as output:
        for line in itertools.chain(first, lines):
            print(json.dumps(line, ensure_ascii=False), file=output, flush=True)
    if cut and is_leader():
        print(
            f"{cut:,} of {count:,} inputs ({cut / count:.1%}) are longer than {length} tokens and "
            "were cut; their rows say truncated",
            file=sys.stderr,
        )
    return 0
