"""Examples and teacher outputs, and the JSON-lines files that hold them.

A line of examples is `{"id": ..., "input": ..., "label": ...}`; a line of a teacher's journal is
`{"id": ..., "rationale": ..., "label": ..., "raw": ..., "status": ...}`, with `vote` and `samples`
where the teacher was sampled several times, and `input_hash`, which detects outputs for an input
that has changed since. Only `input` is required in examples, and `id` in a journal.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from dss.data.labels import ANY_LABEL, Labels, read_label
from dss.errors import DataError
from dss.paths import BYTE_ORDER_MARK

__all__ = [
    "STATUSES",
    "Example",
    "TeacherOutput",
    "check_kind",
    "hash_input",
    "parsed_status",
    "read_example",
    "read_json",
    "read_json_file",
    "read_json_lines",
    "read_teacher_outputs",
    "stream_examples",
    "teacher_files",
]

STATUSES = ("ok", "unparsed", "refused", "error")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a dataset; its label is None if it is unlabeled."""

    id: str
    input: str
    label: str | None = None


def hash_input(text: str) -> str:
    """Returns the hash of an input, 16 hexadecimal digits; teacher outputs store it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class TeacherOutput:
    """A teacher's output for an example.

    Attributes:
      id: the id of the example.
      rationale: the parsed rationale; blank if there is none.
      label: the parsed label; blank or None if there is none.
      teacher: the name of the teacher.
      raw: the text that the teacher generated.
      status: "ok", "unparsed" (rationale or label is missing), "refused", "error", or "stale"
        (written for an input that has changed since).
      agreement: fraction of the teacher's samples that have the label, in [0, 1]; None for a
        single sample.
      samples: the teacher's samples in their order; empty for a single one.
      input_hash: `hash_input` of the input that it was written for; None if the file has none.
    """

    id: str
    rationale: str
    label: str | None
    teacher: str
    raw: str
    status: str
    agreement: float | None = None
    samples: "tuple[TeacherOutput, ...]" = ()
    input_hash: str | None = None

    def for_input(self, text: str) -> "TeacherOutput":
        """Returns this output, or if it is for another input a "stale" one without its parts."""
        if self.input_hash is None or self.input_hash == hash_input(text):
            return self
        return dataclasses.replace(self, rationale="", label=None, status="stale", samples=())

    @property
    def has_rationale(self) -> bool:
        """Whether there is a rationale to train on."""
        return self.status == "ok" and bool(self.rationale.strip())

    @property
    def has_label(self) -> bool:
        """Whether there is a label to train on."""
        return self.status == "ok" and read_label(self.label) is not None


def parsed_status(rationale: str, label: str | None) -> str:
    """Returns "ok" if neither rationale nor label is blank, else "unparsed"."""
    return "ok" if rationale.strip() and read_label(label) else "unparsed"


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed; write null for a missing value")


DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def read_json(where: str, text: str) -> Any:
    """Returns the value of a JSON text.

    Args:
      where: the file, or file and line, for messages.
      text: the JSON text.

    Raises:
      DataError: if the text is not JSON, or holds NaN or infinity.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # NaN, a number too long, nested too deeply
        raise DataError(f"{where}: not JSON that can be read: {error}") from None


def read_json_file(path: epath.PathLike) -> Any:
    """Returns the value of a JSON file.

    Raises:
      DataError: if the file is not UTF-8 or not JSON, see `read_json`.
    """
    try:
        text = epath.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    return read_json(str(path), text.removeprefix(BYTE_ORDER_MARK))


OTHER_KINDS = {
    ".csv": "a table",
    ".tsv": "a table",
    ".xlsx": "a spreadsheet",
    ".xls": "a spreadsheet",
    ".parquet": "a Parquet file",
    ".gz": "compressed",
    ".zip": "compressed",
    ".zst": "compressed",
}


def check_kind(path: epath.Path) -> None:
    """Checks that a file's extension is not that of another format than JSON lines.

    Raises:
      DataError: if it is.
    """
    kind = OTHER_KINDS.get(path.suffix.lower())
    if kind is not None:
        raise DataError(
            f"{path}: {kind}, not JSON lines; make a dataset of its columns with `dss data`, or in "
            "Python with `dss.Dataset.from_files`"
        )


def read_json_lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`file:line`, object) for each line that is not blank.

    Raises:
      DataError: if the file is missing, of another format or not UTF-8, or a line is not a JSON
        object.
    """
    check_kind(path)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                value = read_json(where, line)
                if isinstance(value, list):
                    raise DataError(
                        f"{where}: a JSON array, not JSON lines; write one object per line"
                    )
                if not isinstance(value, dict):
                    raise DataError(f"{where}: a {type(value).__name__}, not a JSON object")
                yield where, value
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None


def _text(where: str, value: dict[str, Any], key: str, default: str | None = None) -> str:
    text = default if value.get(key) is None else value[key]
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        problem = "is missing" if text is None else f"is a {type(text).__name__}"
        raise DataError(f"{where}: {key!r} {problem}; it must be text")
    if isinstance(text, float) and text.is_integer() and abs(text) < 2**53:
        text = int(text)  # tables with empty cells store whole numbers as floats
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {key!r} holds half of a surrogate pair; the text was cut inside a character"
        ) from None
    return str(text)


def read_example(
    where: str, value: dict[str, Any], default_id: str, labels: Labels = ANY_LABEL
) -> Example:
    """Returns the example of a JSON object.

    Args:
      where: the file and line, for messages.
      value: the JSON object.
      default_id: the id of an object without one.
      labels: the allowed labels.

    Raises:
      DataError: if the input is missing, a field is not text, or the label is outside the closed
        set.
    """
    label = read_label(None if value.get("label") is None else _text(where, value, "label"))
    if label is not None:
        labels.check(where, label)
    return Example(_text(where, value, "id", default_id), _text(where, value, "input"), label)


def stream_examples(path: epath.Path, split: str, labels: Labels = ANY_LABEL) -> Iterator[Example]:
    """Yields the examples of a JSON-lines file; the default id is `<split>-<position>`.

    Args:
      path: the file.
      split: the name of the split, for default ids.
      labels: the allowed labels.

    Raises:
      DataError: if an id repeats; also see `read_json_lines` and `read_example`.
    """
    ids: set[str] = set()
    for where, value in read_json_lines(path):
        example = read_example(where, value, f"{split}-{len(ids)}", labels)
        if example.id in ids:
            raise DataError(f"{where}: duplicate id {example.id!r}; ids must differ")
        ids.add(example.id)
        yield example


def teacher_files(examples: epath.Path) -> dict[str, epath.Path]:
    """Returns the files of teacher outputs beside a file of examples, by teacher.

    Their names are `<stem of the examples' file>.<teacher>.jsonl`. The teacher `gpt-4o` is called
    `gpt_4o`, as in the names of tasks and mixtures.

    Raises:
      DataError: if two files are of the same teacher.
    """
    out: dict[str, epath.Path] = {}
    for path in sorted(examples.parent.glob(f"{examples.stem}.*.jsonl")):
        name = path.name.removeprefix(f"{examples.stem}.").removesuffix(".jsonl")
        teacher = re.sub(r"\W", "_", name, flags=re.ASCII)
        if out.setdefault(teacher, path) != path:
            raise DataError(
                f"{out[teacher]}, {path.name}: both are outputs of teacher {teacher!r}; rename one"
            )
    return out


def read_teacher_outputs(path: epath.Path, teacher: str) -> list[TeacherOutput]:
    """Returns the outputs of a teacher's journal, the last one of each example.

    Raises:
      DataError: if an id is missing, a status is unknown, or a vote or samples are malformed; also
        see `read_json_lines`.
    """
    out: dict[str, TeacherOutput] = {}
    for where, value in read_json_lines(path):
        id_ = _text(where, value, "id")
        samples = value.get("samples") or []
        if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
            raise DataError(f"{where}: 'samples' is not a list of JSON objects")
        out[id_] = dataclasses.replace(
            _teacher_output(where, value, id_, teacher),
            agreement=_fraction(where, value, "vote"),
            samples=tuple(_teacher_output(where, sample, id_, teacher) for sample in samples),
            input_hash=_text(where, value, "input_hash", "") or None,
        )
    return list(out.values())


def _teacher_output(where: str, value: dict[str, Any], id_: str, teacher: str) -> TeacherOutput:
    rationale = _text(where, value, "rationale", "")
    label = read_label(None if value.get("label") is None else _text(where, value, "label"))
    # Without a raw text nothing was parsed, so a line with one of the two parts is complete.
    complete = value.get("raw") is None and bool(rationale.strip() or label)
    status = _text(where, value, "status", "ok" if complete else parsed_status(rationale, label))
    if status not in STATUSES:
        raise DataError(f"{where}: status {status!r} is not one of {', '.join(STATUSES)}")
    return TeacherOutput(id_, rationale, label, teacher, _text(where, value, "raw", ""), status)


def _fraction(where: str, value: dict[str, Any], key: str) -> float | None:
    fraction = value.get(key)
    if fraction is None:
        return None
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not is_number or not 0 <= fraction <= 1:
        raise DataError(f"{where}: {key!r} is {fraction!r}; it must be a number between 0 and 1")
    return float(fraction)
