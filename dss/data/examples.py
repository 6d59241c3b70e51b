"""Examples and teacher outputs, and the JSON-lines files that hold them.

A line of examples is `{"id": ..., "input": ..., "label": ...}`; a line of a teacher's journal is
`{"id": ..., "rationale": ..., "label": ..., "raw": ..., "status": ...}`, with `vote` and `samples`
where the teacher was asked several times, and `input_hash`, by which outputs for an input that has
changed since are known. Only `input`, and in a journal `id`, must be there.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from dss.data.labels import ANY_LABEL, Labels, read_label
from dss.errors import UserError
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
    """One example of a dataset; its label is None where nobody gave one."""

    id: str
    input: str
    label: str | None = None


def hash_input(text: str) -> str:
    """Returns the hash of an input that a teacher's output for it keeps, 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class TeacherOutput:
    """What a teacher wrote for an example.

    Attributes:
      id: the example's.
      rationale: the parsed reasoning; blank where there is none.
      label: the parsed label; blank or None where there is none.
      teacher: the teacher's name.
      raw: the text as the teacher wrote it.
      status: "ok", "unparsed" (rationale or label is missing), "refused" or "error"; or "stale",
        if it was written for another input than the one that has its id now.
      agreement: the share of the teacher's samples that have the label, in [0, 1]; None where it
        was asked once.
      samples: all that it wrote where it was asked several times, in that order.
      input_hash: `hash_input` of what it was written for; None where its line does not say.
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
        """Returns the output as one for this input: itself, or "stale" and without its parts."""
        if self.input_hash is None or self.input_hash == hash_input(text):
            return self
        return dataclasses.replace(self, rationale="", label=None, status="stale", samples=())

    @property
    def has_rationale(self) -> bool:
        """Whether there is a rationale to learn from."""
        return self.status == "ok" and bool(self.rationale.strip())

    @property
    def has_label(self) -> bool:
        """Whether there is a label to learn from."""
        return self.status == "ok" and read_label(self.label) is not None


def parsed_status(rationale: str, label: str | None) -> str:
    """Returns "ok" where both parts have text, else "unparsed"."""
    return "ok" if rationale.strip() and read_label(label) else "unparsed"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}; where there is no value write null")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def read_json(where: str, text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
      UserError: names `where` it stands; it is not JSON, or holds NaN or infinity.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # NaN, a number too long, nested too deeply
        raise UserError(f"{where}: not JSON that can be read: {error}") from None


def read_json_file(path: epath.PathLike) -> Any:
    """Returns the value of a JSON file.

    Raises:
      UserError: if it is no UTF-8, or see `read_json`.
    """
    try:
        text = epath.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
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
    """Raises the user's error where a file's name says that it holds no JSON lines."""
    kind = OTHER_KINDS.get(path.suffix.lower())
    if kind is not None:
        raise UserError(
            f"{path}: {kind}, not JSON lines; write it as lines of "
            '{"id": ..., "input": ..., "label": ...}, such as with pandas: '
            "table.rename(columns={...}).to_json('train.jsonl', orient='records', lines=True)"
        )


def read_json_lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`file:line`, object) for each line that is not blank.

    Raises:
      UserError: the file is missing, of another kind, is no UTF-8, or a line is not a JSON object.
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
                    raise UserError(f"{where}: a JSON array, not JSON lines: one object a line")
                if not isinstance(value, dict):
                    raise UserError(f"{where}: a {type(value).__name__}, not a JSON object")
                yield where, value
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _text(where: str, value: dict[str, Any], key: str, default: str | None = None) -> str:
    text = default if value.get(key) is None else value[key]
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        found = "is missing" if text is None else f"is a {type(text).__name__}"
        raise UserError(f"{where}: {key!r} {found}; it should be text")
    if isinstance(text, float) and text.is_integer() and abs(text) < 2**53:
        text = int(text)  # a table with an empty cell writes its whole numbers so
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half a character: it was cut in two") from None
    return str(text)


def read_example(
    where: str, value: dict[str, Any], default_id: str, labels: Labels = ANY_LABEL
) -> Example:
    """Returns the example of a JSON object.

    Args:
      where: it stands, for errors.
      value: the object.
      default_id: its id where it has none.
      labels: the labels that there may be.

    Raises:
      UserError: a missing input, something that is no text, or a label outside the closed set.
    """
    label = read_label(None if value.get("label") is None else _text(where, value, "label"))
    if label is not None:
        labels.check(where, label)
    return Example(_text(where, value, "id", default_id), _text(where, value, "input"), label)


def stream_examples(path: epath.Path, split: str, labels: Labels = ANY_LABEL) -> Iterator[Example]:
    """Yields the examples of a JSON-lines file; one without an id is `<split>-<position>`.

    Args:
      path: the file.
      split: for the ids.
      labels: the labels that there may be.

    Raises:
      UserError: see `read_json_lines` and `read_example`; an id that came before.
    """
    ids: set[str] = set()
    for where, value in read_json_lines(path):
        example = read_example(where, value, f"{split}-{len(ids)}", labels)
        if example.id in ids:
            raise UserError(f"{where}: id {example.id!r} came before; ids must differ")
        ids.add(example.id)
        yield example


def teacher_files(examples: epath.Path) -> dict[str, epath.Path]:
    """Returns the teachers' outputs that lie next to a file of examples, by teacher.

    They are named `<name of the file>.<teacher>.jsonl`; the teacher `gpt-4o` is called `gpt_4o`, as
    in the names of tasks and mixtures.

    Raises:
      UserError: two of them have one name.
    """
    out: dict[str, epath.Path] = {}
    for path in sorted(examples.parent.glob(f"{examples.stem}.*.jsonl")):
        name = path.name.removeprefix(f"{examples.stem}.").removesuffix(".jsonl")
        teacher = re.sub(r"\W", "_", name, flags=re.ASCII)
        if out.setdefault(teacher, path) != path:
            raise UserError(f"{out[teacher]}, {path.name}: both are of {teacher!r}; rename one")
    return out


def read_teacher_outputs(path: epath.Path, teacher: str) -> list[TeacherOutput]:
    """Returns the outputs of a teacher's journal; of several for an example the last counts.

    Raises:
      UserError: see `read_json_lines`; a missing id, an unknown status, or a vote or samples that
        are none.
    """
    out: dict[str, TeacherOutput] = {}
    for where, value in read_json_lines(path):
        id_ = _text(where, value, "id")
        samples = value.get("samples") or []
        if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
            raise UserError(f"{where}: 'samples' is no list of JSON objects")
        out[id_] = dataclasses.replace(
            _teacher_output(where, value, id_, teacher),
            agreement=_share(where, value, "vote"),
            samples=tuple(_teacher_output(where, sample, id_, teacher) for sample in samples),
            input_hash=_text(where, value, "input_hash", "") or None,
        )
    return list(out.values())


def _teacher_output(where: str, value: dict[str, Any], id_: str, teacher: str) -> TeacherOutput:
    rationale = _text(where, value, "rationale", "")
    label = read_label(None if value.get("label") is None else _text(where, value, "label"))
    # Parts that were written down as such, not parsed from a text, are whole where one is there.
    whole = value.get("raw") is None and bool(rationale.strip() or label)
    status = _text(where, value, "status", "ok" if whole else parsed_status(rationale, label))
    if status not in STATUSES:
        raise UserError(f"{where}: status {status!r} is none of {', '.join(STATUSES)}")
    return TeacherOutput(id_, rationale, label, teacher, _text(where, value, "raw", ""), status)


def _share(where: str, value: dict[str, Any], key: str) -> float | None:
    share = value.get(key)
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise UserError(f"{where}: {key!r} is {share!r}; it should be a share between 0 and 1")
    return float(share)
