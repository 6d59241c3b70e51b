"""`dss predict`."""

import argparse
import codecs
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dss.cli.checks import check_input, check_output, check_run, check_run_probabilities
from dss.cli.options import add_run_options, open_run, prepare_jax
from dss.errors import DssError, first_line
from dss.paths import create, is_stream, write_whole

if TYPE_CHECKING:
    from dss.data.examples import Example

__all__ = ["add_arguments", "run"]

# Fields that predictions set, whatever an input row has in them.
PREDICTED = ("label", "probabilities", "abstained", "rationale", "truncated", "empty")
DIGITS = 6  # decimal places of probabilities
CHUNK = 1024  # inputs that are read and predicted together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_run_options(parser)
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="JSON lines with an 'input', a table (CSV, TSV, XLSX, Parquet), or - (default) for "
        "standard input: JSON or plain lines",
    )
    parser.add_argument(
        "--columns", metavar="NAME[,NAME]", help="columns of a table's input, as in dss data"
    )
    parser.add_argument(
        "--template", metavar="TEXT", help="input's text of a table, such as '{subject}: {body}'"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the output file, JSON lines or by its extension a table (default: standard output)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace the output even if it has more lines"
    )
    parser.add_argument("--rationale", action="store_true", help="predict rationales too")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="write the probability of each label of a closed set",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="mark rows whose highest probability is below P as abstained",
    )


Table = list[tuple[str, dict[str, Any]]]  # the text to predict, and the cells, of each row


def _table(args: argparse.Namespace) -> Table | None:
    """Returns the rows of a table; None for another input."""
    from dss.data.tables import is_table

    if args.columns and args.template:
        raise DssError("--columns and --template exclude each other; give one")
    if args.input == "-" or not (args.columns or args.template or is_table(args.input)):
        if args.columns or args.template:
            raise DssError("--columns and --template are for a table; give it with --input")
        return None
    from dss.data.prepare import Columns, read_inputs

    args.options["input"] = "--columns"  # in messages about columns
    names = tuple(name.strip() for name in args.columns.split(",")) if args.columns else ()
    return read_inputs(args.input, Columns(input=names, template=args.template))


def _read(source: str, table: Table | None) -> Iterator[tuple["Example", dict[str, Any]]]:
    """Yields each input and the fields of its row; standard input is streamed."""
    from dss.data.examples import Example, read_example, read_json_lines

    if table is not None:
        for number, (text, cells) in enumerate(table, 1):
            yield Example(f"row-{number}", text), cells
        return
    rows = _standard_input() if source == "-" else read_json_lines(Path(source))
    seen = set()
    for number, (location, row) in enumerate(rows):
        example = read_example(location, row, f"input-{number}")
        if example.id in seen:
            raise DssError(f"{location}: duplicate id {example.id!r}; ids must differ")
        seen.add(example.id)
        yield example, row


def _count(source: str, table: Table | None, *, passes: int) -> int | None:
    """Returns the number of texts to decode for a file; None for a source that is read only once.

    Args:
      source: the file, or "-" for standard input.
      table: the rows of a table; None for another input.
      passes: the number of texts to decode for each input.

    Raises:
      DssError: if a row of the file is malformed.
    """
    is_file = source != "-" and Path(source).is_file()
    return passes * sum(1 for _ in _read(source, table)) if is_file else None


OTHER_FORMATS = {  # the first bytes of other file formats
    b"\x1f\x8b": "compressed",
    b"\x28\xb5\x2f\xfd": "compressed",
    b"PK\x03\x04": "compressed, or a spreadsheet",
    b"PAR1": "a Parquet file",
}


def _standard_input() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the location and the row of each line, a JSON object, a JSON string or plain text."""
    from dss.data.examples import read_json
    from dss.paths import BYTE_ORDER_MARK

    lines = enumerate(sys.stdin.buffer, 1)
    first = list(itertools.islice(lines, 2))
    for prefix, name in OTHER_FORMATS.items():
        if first and first[0][1].startswith(prefix):
            raise DssError(
                f"standard input: {name}; give JSON lines with an 'input', or plain text, one "
                "input per line"
            )
    if len(first) == 2 and _is_table(*(content for _, content in first)):
        raise DssError(
            "standard input:1: the header of a table; give JSON lines with an 'input', or plain "
            "text, one input per line"
        )
    for number, content in itertools.chain(first, lines):
        location = f"standard input:{number}"
        try:
            line = content.decode().strip().removeprefix(BYTE_ORDER_MARK).strip()
        except UnicodeDecodeError:
            raise DssError(f"{location}: not UTF-8") from None
        value: Any = line
        if not line:
            continue
        if line.startswith("{"):
            value = read_json(location, line)
        elif line[0] in '["':
            with contextlib.suppress(ValueError, RecursionError):  # plain text
                value = json.loads(line)
        if isinstance(value, list):
            raise DssError(f"{location}: a JSON array; give one object with an 'input' per line")
        yield location, value if isinstance(value, dict) else {"input": value}


def _is_table(header: bytes, row: bytes) -> bool:
    """Returns whether two lines are a table: a header, and a row with at least as many cells."""
    for separator in b",;\t":
        cells = header.removeprefix(codecs.BOM_UTF8).strip().split(bytes([separator]))
        if len(cells) > 1 and row.count(separator) >= len(cells) - 1:
            return all(re.fullmatch(rb'"?[\w-]+"?', cell) for cell in cells)
    return False


@contextlib.contextmanager
def _opened(path: Path | None, *, replace: bool, count: Callable[[], int]) -> Iterator[IO[str]]:
    """Opens the output. An existing file is replaced at the end, unless it has more lines.

    Args:
      path: the output file; None for standard output.
      replace: whether to replace a file with more lines too.
      count: a function that returns the number of lines written.

    Raises:
      DssError: if the existing file has more lines and `replace` is False.
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
            raise DssError(
                f"{path}: not replaced: it has {before:,} lines, and the {count():,} predictions "
                f"are in {partial.name}; give another --output, or --replace"
            )
    partial.replace(path)


def _is_table_file(path: Path | None) -> bool:
    from dss.data.tables import TABLES, extension_of

    return path is not None and extension_of(path) in TABLES


def _existing_rows(path: Path) -> int:
    """Returns the number of rows of a table that exists.

    Raises:
      DssError: if the file is not such a table.
    """
    from dss.data.tables import read_tables

    try:
        (table,) = read_tables(path, may_be_empty=True).values()
    except DssError as error:
        raise DssError(f"{error}; give another --output, or --replace") from None
    return len(table)


def _write_table(path: Path, lines: list[dict[str, Any]], existing: int) -> None:
    """Writes predictions as a table, with one column for the probability of each label.

    Args:
      path: the file.
      lines: the lines of JSON output.
      existing: number of rows of the file that may not be lost.

    Raises:
      DssError: if the file has more rows, or cannot hold the predictions; they are in another file
        then.
    """
    from dss.data.tables import write_table

    rows = []
    for line in lines:
        row: dict[str, Any] = {}
        for name, value in line.items():
            if name.endswith("probabilities") and isinstance(value, dict):
                row |= {_free(f"probability {label}", line): p for label, p in value.items()}
            else:
                row[name] = value
        rows.append(row)
    beside, problem = path.with_name(f"{path.name}.jsonl"), None
    if existing > len(lines):
        problem = f"not replaced: it has {existing:,} rows, the predictions {len(lines):,}"
    else:
        try:
            write_table(path, rows)
        except Exception as error:  # of many kinds, by format; the predictions must not be lost
            problem = f"cannot be written: {first_line(error)}"
    if problem is not None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(beside, text)
        raise DssError(f"{path}: {problem}; the predictions are in {beside}")


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Returns the name of a column of predictions that no column of the input has.

    >>> _free("label", {"label": "bug"})
    'predicted_label'
    """
    while name in taken:
        name = f"predicted_{name}"
    return name


def _check_output(args: argparse.Namespace) -> None:
    """Raises DssError if the output cannot be written, or is the input."""
    if args.output.suffix.lower() == ".xls":
        raise DssError(f"{args.output}: the format of old Excel files; give a .xlsx file")
    check_output("--output", str(args.output))
    if args.output.exists() and args.input != "-" and args.output.samefile(args.input):
        raise DssError(f"{args.output}: input and output are the same file")


def run(args: argparse.Namespace) -> int:
    """Writes a JSON line per input: its id, the other fields of its row, and the prediction."""
    check_run(args.run)
    if args.input != "-":
        args.input = os.path.expanduser(args.input)
        check_input(args.input)
    if args.output:
        args.output = args.output.expanduser()
        _check_output(args)
    if args.threshold is not None:
        from dss.evaluation.calibration import check_threshold

        check_threshold(args.threshold)
    if args.probabilities or args.threshold is not None:
        check_run_probabilities(args)

    table = _table(args)
    existing = 0
    if _is_table_file(args.output) and args.output.exists() and not args.replace:
        existing = _existing_rows(args.output)

    from dss.cli.decode_progress import DecodeProgress
    from dss.data.vocabulary import is_cut
    from dss.evaluation.evaluator import DecodingProgress
    from dss.parallel.processes import is_leader
    from dss.runs.student import answer, explain

    prepare_jax()
    opened = open_run(args)
    experiment = opened.experiment
    mixture = opened.mixture(must_exist=False)
    progress = DecodingProgress()
    if is_leader():
        progress = DecodeProgress()
        progress.expect(_count(args.input, table, passes=1 + args.rationale))
    predictor, _ = opened.predictor(args.checkpoint, progress)
    length = experiment.data.inputs_length
    examples = _read(args.input, table)
    count = truncated = abstained = empty = 0

    def predictions() -> Iterator[dict[str, Any]]:
        nonlocal count, truncated, abstained, empty
        while chunk := list(itertools.islice(examples, CHUNK)):
            texts = [example.input for example, _ in chunk]
            answers = answer(predictor, mixture, texts, length)
            rationales = explain(predictor, mixture, texts, length) if args.rationale else None
            for i, (example, row) in enumerate(chunk):
                found: dict[str, Any] = {"label": answers[i].text}
                if args.probabilities:
                    probabilities = answers[i].probabilities
                    found["probabilities"] = {k: round(p, DIGITS) for k, p in probabilities.items()}
                if args.threshold is not None:
                    found["abstained"] = answers[i].is_below(args.threshold)
                    abstained += found["abstained"]
                if rationales is not None:
                    found["rationale"] = rationales[i]
                count += 1
                if is_cut(predictor.vocabulary, mixture.tasks[0].prefix + example.input, length):
                    found["truncated"] = True
                    truncated += 1
                if not example.input.strip():
                    found["empty"] = True
                    empty += 1
                if table is not None:  # the cells are kept as they are
                    yield row | {_free(name, row): value for name, value in found.items()}
                    continue
                line: dict[str, Any] = {"id": example.id, "input": example.input}
                line |= {name: row[name] for name in row if name not in (*line, *PREDICTED)}
                if "label" in row:
                    line.setdefault("gold", row["label"])
                yield line | found

    lines = predictions()
    first = list(itertools.islice(lines, 1))  # errors come before the output is opened
    path = args.output if is_leader() else Path(os.devnull)  # all processes predict, one writes
    if _is_table_file(args.output):
        rows = list(itertools.chain(first, lines))
        if is_leader():
            _write_table(args.output, rows, existing)
    else:
        with _opened(path, replace=args.replace, count=lambda: count) as output:
            for line in itertools.chain(first, lines):
                print(json.dumps(line, ensure_ascii=False), file=output, flush=True)
    if empty and is_leader():
        print(
            f"{empty:,} of {count:,} inputs are empty: their labels mean nothing; their rows have "
            "the field empty",
            file=sys.stderr,
        )
    if truncated and is_leader():
        print(
            f"{truncated:,} of {count:,} inputs ({truncated / count:.1%}) are longer than {length} "
            "tokens and were truncated; their rows have the field truncated",
            file=sys.stderr,
        )
    if args.threshold is not None and is_leader():
        print(
            f"abstained on {abstained:,} of {count:,} inputs ({abstained / max(count, 1):.1%}): "
            f"their highest probability is below {args.threshold}",
            file=sys.stderr,
        )
    return 0
