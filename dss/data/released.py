"""Reads the data released with the paper, and parses its teachers' texts.

    <root>/<name>/<name>_{train,valid,test}.json      examples, JSON lines
    <root>/<name>/llm/<split>_CoT_<k>.json            PaLM's texts, in the order of k and the rows
    <root>/gpt-neox/<name>/<split>.json               GPT-NeoX's texts
    <root>/<name>/<name>_<split>.<teacher>.jsonl      outputs of your own teacher (`dss annotate`)

Parsers match fixed patterns only. They return rationale and label exactly as the released code
does, whitespace included, so that the two can be compared row by row.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from etils import epath

from dss.data.examples import (
    Example,
    TeacherOutput,
    parsed_status,
    read_json,
    read_json_lines,
    read_teacher_outputs,
    teacher_files,
)
from dss.data.labels import ANY_LABEL, Labels
from dss.errors import DataError

__all__ = ["RELEASED", "TEACHERS", "Format", "ReleasedSource", "cqa_choices"]

Parsed = tuple[str, str]  # rationale, label
Parser = Callable[[str], Parsed]

TEACHERS = ("palm", "gpt_neox")
BLANK = (" ", " ")
NLI_LABELS = ("entailment", "neutral", "contradiction")


def _two_parts(text: str, separator: str) -> Parsed | None:
    parts = text.split(separator)
    return (parts[0].rstrip(), parts[1]) if len(parts) == 2 else None


def _parse_choice(text: str) -> Parsed:
    """Parses `... So the answer is (d) math problem.`, then an invented `Q:`."""
    parts = _two_parts(text.split("Q:")[0].rstrip(), "So the answer is")
    if parts is None:
        return BLANK
    rationale, rest = parts
    after_letter = re.split(r"\(.\)", rest)[1:2]
    label = after_letter[0].strip() if after_letter else ""
    return rationale, label.removesuffix(".") if label else " "


def _parse_equation(text: str) -> Parsed:
    """Parses `... The answer is (84 / 2).`, then an invented `Q:`."""
    parts = _two_parts(text.split("Q:")[0].rstrip(), "The answer is")
    if parts is None:
        return BLANK
    equation = re.search(r"\(.*\)", parts[1])
    return parts[0], equation.group(0) if equation else " "


def _parse_esnli(text: str) -> Parsed:
    """Parses `<explanation>`, a line `Answer: <label>`, then an invented `Premise:`."""
    rationale = text.split("Answer:")[0].rstrip()
    answers = text.split("Answer: ")[1:2]
    return rationale, answers[0].split("Premise")[0].rstrip() if answers else " "


def _parse_anli(text: str, *separators: str) -> Parsed:
    """Parses `... So the answer is contradiction.`, then an invented `Premise:`."""
    text = text.split("Premise:")[0].rstrip()
    for separator in separators:
        parts = _two_parts(text, separator)
        if parts is not None:
            return parts[0], parts[1].lstrip()[:-1]
    return "", ""


def _parse_anli_palm(text: str) -> Parsed:
    return _parse_anli(text, "So the answer is")


def _parse_anli_gpt_neox(text: str) -> Parsed:
    return _parse_anli(text.lstrip(), "So the answer is", "The answer is")


def _after_whitespace(parse: Parser) -> Parser:
    """Returns a parser that first strips leading whitespace, as GPT-NeoX's texts need."""
    return lambda text: parse(text.lstrip())


def cqa_choices(text: str) -> tuple[str, ...]:
    """Returns the answers that a CQA input offers.

    >>> cqa_choices("Where?\\nAnswer Choices:\\n(a) here\\n(b) there")
    ('here', 'there')
    """
    return tuple(re.findall(r"^\([a-z]\) (.*)$", text.rpartition("Answer Choices:\n")[2], re.M))


def _text(row: Any, key: str | int) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key!r} is {row[key]!r}, not text")
    return row[key]


def _cqa_row(row: dict[str, Any]) -> tuple[str, str]:
    choices = [f"({letter}) {_text(row['choices'], i)}" for i, letter in enumerate("abcde")]
    question = "\n".join((_text(row, "question"), "Answer Choices:", *choices))
    return question, _text(row, "answer")


def _svamp_row(row: dict[str, Any]) -> tuple[str, str]:
    return _text(row, "input"), _text(row, "label")


def _asdiv_row(row: dict[str, Any]) -> tuple[str, str]:
    return f"{_text(row, 'Body')}\n{_text(row, 'Question')}", _text(row, "Answer").split(" ")[0]


def _nli_row(row: dict[str, Any]) -> tuple[str, str]:
    # Vocabularies encode the text </s> as the EOS id.
    label = dict(enumerate(NLI_LABELS))[row["label"]]
    return f"{_text(row, 'premise')}</s>{_text(row, 'hypothesis')}", label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The file format of one released dataset.

    Attributes:
      row: a function from a row of the file to (input, label).
      parsers: functions from a teacher's text to (rationale, label), by teacher.
      labels: the allowed labels, and the metric that compares predictions with them.
      candidates: a function from an input to the answers that it offers; None where inputs offer
        none.
    """

    row: Callable[[dict[str, Any]], tuple[str, str]]
    parsers: dict[str, Parser]
    labels: Labels = ANY_LABEL
    candidates: Callable[[str], tuple[str, ...]] | None = None


def _palm_and_gpt_neox(parse: Parser) -> dict[str, Parser]:
    return {"palm": parse, "gpt_neox": _after_whitespace(parse)}


# A new dataset also needs gin/datasets/NAME.gin, tasks/NAME.py and teacher/prompts/NAME.yaml.
RELEASED = {
    "cqa": Format(row=_cqa_row, parsers=_palm_and_gpt_neox(_parse_choice), candidates=cqa_choices),
    "svamp": Format(
        row=_svamp_row,
        parsers=_palm_and_gpt_neox(_parse_equation),
        labels=Labels(metric="equation"),
    ),
    "asdiv": Format(
        row=_asdiv_row,
        parsers=_palm_and_gpt_neox(_parse_equation),
        labels=Labels(metric="equation"),
    ),
    "esnli": Format(
        row=_nli_row, parsers=_palm_and_gpt_neox(_parse_esnli), labels=Labels(NLI_LABELS)
    ),
    "anli1": Format(
        row=_nli_row,
        parsers={"palm": _parse_anli_palm, "gpt_neox": _parse_anli_gpt_neox},
        labels=Labels(NLI_LABELS),
    ),
}


@dataclasses.dataclass(frozen=True)
class ReleasedSource:
    """Reads one dataset in the released layout.

    Attributes:
      root: the folder of all released datasets; None for the environment variable DSS_DATA_ROOT,
        or else the folder `data`.
      name: the name of the dataset, one of `RELEASED`.
    """

    root: epath.Path | None
    name: str
    remedy: ClassVar[str] = (
        "give the folder of the released data with `DataConfig.root` or the environment variable "
        "DSS_DATA_ROOT"
    )

    @property
    def teachers(self) -> tuple[str, ...]:
        """The released teachers, and those with files of outputs beside the examples."""
        files = [self._examples_file(split) for split in ("train", "valid", "test")]
        others = {teacher for file in files for teacher in teacher_files(file)}
        return (*TEACHERS, *sorted(others))

    def has(self, split: str, teacher: str | None = None) -> bool:
        """See `dss.data.datasets.Source.has`."""
        if teacher is None:
            return self._examples_file(split).is_file()
        return bool(self._teacher_files(split, teacher))

    def files(self, split: str, teacher: str | None = None) -> list[epath.Path]:
        """See `dss.data.datasets.Source.files`."""
        if teacher is None:
            return [self._examples_file(split)]
        examples = self._examples_file(split)
        if teacher == "palm":
            missing = self._root / self.name / "llm" / f"{split}_CoT_0.json"
        elif teacher == "gpt_neox":
            missing = self._root / "gpt-neox" / self.name / f"{split}.json"
        else:
            missing = examples.with_suffix(f".{teacher}.jsonl")
        return [examples, *(self._teacher_files(split, teacher) or [missing])]

    def examples(self, split: str) -> list[Example]:
        """Returns the examples of a split, in the order of the file.

        Raises:
          DataError: if the file is missing or a line is malformed.
        """
        out: list[Example] = []
        for where, row in read_json_lines(self._examples_file(split)):
            try:
                text, label = RELEASED[self.name].row(row)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise DataError(f"{where}: not a row of {self.name}: {error!r}") from None
            out.append(Example(f"{split}-{len(out)}", text, label))
        return out

    def outputs(self, split: str, teacher: str) -> list[TeacherOutput]:
        """Returns a teacher's outputs for a split; of a released teacher one per example, in order.

        Raises:
          DataError: if a file is missing or malformed, or the number of a released teacher's texts
            is not that of the examples.
        """
        if teacher not in TEACHERS:
            return read_teacher_outputs(self.files(split, teacher)[1], teacher)
        parse = RELEASED[self.name].parsers[teacher]
        _, *paths = self.files(split, teacher)
        texts = [text for path in paths for text in _read_texts(path)]
        count = sum(1 for _ in read_json_lines(self._examples_file(split)))
        if len(texts) != count:
            raise DataError(
                f"{paths[0].parent}: {len(texts)} texts of {teacher}, but {count} examples in "
                f"{self._examples_file(split)}; is a file missing?"
            )
        out: list[TeacherOutput] = []
        for i, text in enumerate(texts):
            rationale, label = parse(text)
            status = parsed_status(rationale, label)
            out.append(TeacherOutput(f"{split}-{i}", rationale, label, teacher, text, status))
        return out

    def groups(self, examples: Sequence[Example]) -> None:
        """Returns None: the reference implementation holds out single rows."""
        del examples

    @property
    def _root(self) -> epath.Path:
        return self.root or epath.Path(os.environ.get("DSS_DATA_ROOT", "data")).expanduser()

    def _examples_file(self, split: str) -> epath.Path:
        return self._root / self.name / f"{self.name}_{split}.json"

    def _teacher_files(self, split: str, teacher: str) -> list[epath.Path]:
        if teacher == "gpt_neox":
            path = self._root / "gpt-neox" / self.name / f"{split}.json"
            return [path] if path.is_file() else []
        if teacher != "palm":
            file = teacher_files(self._examples_file(split)).get(teacher)
            return [file] if file else []
        paths = (self._root / self.name / "llm").glob(f"{split}_CoT_*.json")
        numbered = [(re.fullmatch(r".*_CoT_(\d+)", path.stem), path) for path in paths]
        return [path for _, path in sorted((int(m[1]), path) for m, path in numbered if m)]


def _read_texts(path: epath.Path) -> list[str]:
    try:
        texts = read_json(str(path), path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: not a JSON list of strings")
    return texts
