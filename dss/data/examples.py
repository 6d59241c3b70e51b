"""Examples and teacher outputs, and the JSON-lines files that hold them.

A line of examples is `{"id": ..., "input": ..., "label": ...}`; a line of a teacher's journal is
`{"id": ..., "rationale": ..., "label": ..., "raw": ..., "status": ...}`. Only `input`, and in a
journal `id`, must be there.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dss.errors import UserError

__all__ = [
    "STATUSES",
    "Example",
    "TeacherOutput",
    "parsed_status",
    "read_examples",
    "read_json_lines",
    "read_teacher_outputs",
]

STATUSES = ("ok", "unparsed", "refused", "error")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a dataset; its label is None where nobody gave one."""

    id: str
    input: str
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class TeacherOutput:
    """What a teacher wrote for an example.

    Attributes:
      id: the example's.
      rationale: the parsed reasoning; blank where there is none.
      label: the parsed label; blank or None where there is none.
      teacher: the teacher's name.
      raw: the text as the teacher wrote it.
      status: "ok", "unparsed" (rationale or label is missing), "refused" or "error".
    """

    id: str
    rationale: str
    label: str | None
    teacher: str
    raw: str
    status: str

    @property
    def has_rationale(self) -> bool:
        """Whether there is a rationale to learn from."""
        return self.status in ("ok", "unparsed") and bool(self.rationale.strip())

    @property
    def has_label(self) -> bool:
        """Whether there is a label to learn from."""
        return self.status in ("ok", "unparsed") and bool((self.label or "").strip())


def parsed_status(rationale: str, label: str | None) -> str:
    """Returns "ok" where both parts have text, else "unparsed"."""
    return "ok" if rationale.strip() and (label or "").strip() else "unparsed"


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`file:line`, object) for each line that is not blank.

    Raises:
      UserError: the file is missing, is no UTF-8, or a line is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON: {error.msg}") from None
                if not isinstance(value, dict):
                    raise UserError(f"{where}: a {type(value).__name__}, not a JSON object")
                yield where, value
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _text(where: str, value: dict[str, Any], key: str, default: str | None = None) -> str:
    text = value.get(key, default)
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        found = "is missing" if text is None else f"is a {type(text).__name__}"
        raise UserError(f"{where}: {key!r} {found}; it should be text")
    return str(text)


def read_examples(path: Path, split: str, labels: Sequence[str] = ()) -> list[Example]:
    """Returns the examples of a JSON-lines file; one without an id is `<split>-<position>`.

    Args:
      path: the file.
      split: for the ids.
      labels: the closed set of labels; empty where it is open.

    Raises:
      UserError: see `read_json_lines`; a missing input, an id that came before, or a label outside
        the closed set.
    """
    out: dict[str, Example] = {}
    for where, value in read_json_lines(path):
        id_ = _text(where, value, "id", f"{split}-{len(out)}")
        if id_ in out:
            raise UserError(f"{where}: id {id_!r} came before; ids must differ")
        label = None if value.get("label") is None else _text(where, value, "label")
        if labels and label is not None and label not in labels:
            raise UserError(f"{where}: label {label!r} is none of {', '.join(labels)}")
        out[id_] = Example(id_, _text(where, value, "input"), label)
    return list(out.values())


def read_teacher_outputs(path: Path, teacher: str) -> list[TeacherOutput]:
    """Returns the outputs of a teacher's journal; of several for an example the last counts.

    Raises:
      UserError: see `read_json_lines`; a missing id or an unknown status.
    """
    out: dict[str, TeacherOutput] = {}
    for where, value in read_json_lines(path):
        id_ = _text(where, value, "id")
        rationale = _text(where, value, "rationale", "")
        label = None if value.get("label") is None else _text(where, value, "label")
        status = _text(where, value, "status", parsed_status(rationale, label))
        if status not in STATUSES:
            raise UserError(f"{where}: status {status!r} is none of {', '.join(STATUSES)}")
        raw = _text(where, value, "raw", "")
        out[id_] = TeacherOutput(id_, rationale, label, teacher, raw, status)
    return list(out.values())
