"""A table's columns to the folder of a dataset: inputs, labels, splits, and a report of all rows.

No row is left out: rows without an input or a label are written, counted here and in the ledger of
`dss inspect`, and not trained on.
"""

import collections
import dataclasses
import json
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dss.data.grouped_splits import SIMILAR, SPLITS, draw_splits, group_similar
from dss.data.labels import describe_look_alikes, fold, read_label
from dss.data.tables import cell_text, read_tables
from dss.data.vocabulary import EOS_TEXT, Vocabulary, round_trip
from dss.errors import DataError, unknown_name
from dss.paths import write_whole

if TYPE_CHECKING:
    import pandas

__all__ = ["Columns", "Preparation", "Row", "prepare", "read_inputs"]

DATASET_FILE = "dataset.json"
MOST_LABELS = 100  # of a closed set that is declared unasked
ROWS_PER_LABEL = 5  # at least, on average, of such a set
UNEVEN = 0.5  # size of a split, over what was asked, below which it is reported
T5_LACKS = "{}<~^\\\n"  # characters that T5's vocabulary cannot write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that make examples.

    Attributes:
      input: the columns of the input's text.
      label: the column of the label; None for unlabelled data.
      id: the column of ids; None: the number of the row.
      split: the column with train, valid or test; None to draw splits.
      template: the input's text with the columns' names in braces, such as "{subject}: {body}";
        None: the text of a single column, or `name: text` of each of several.
    """

    input: tuple[str, ...]
    label: str | None = None
    id: str | None = None
    split: str | None = None
    template: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """An example made from a row of a table."""

    id: str
    input: str
    label: str | None
    split: str


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The examples of a table, and what there is to know about them.

    Attributes:
      rows: the examples, in the table's order.
      labels: the closed set of labels that `dataset.json` declares; empty for none.
      empty_inputs: ids of rows without an input.
      empty_cells: number of empty cells of each of several input columns.
      unlabelled: ids of rows without a label; empty for data without a label column.
      duplicates: ids of rows whose input an earlier row has.
      conflicts: ids of rows whose input occurs with several labels.
      near_duplicates: number of rows whose input is similar, but not equal, to another's.
      uneven: a line for each split that is much smaller than asked, because equal and similar
        inputs stay together.
      look_alikes: a line for each group of labels that differ only by case or whitespace.
      tokens: number of tokens of each input, [rows]; words without a vocabulary.
      limit: the longest input in tokens; None without a vocabulary.
      unwritable: number of rows for each character that the vocabulary cannot write.
    """

    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    empty_inputs: tuple[str, ...]
    empty_cells: Mapping[str, int]
    unlabelled: tuple[str, ...]
    duplicates: tuple[str, ...]
    conflicts: tuple[str, ...]
    near_duplicates: int
    uneven: tuple[str, ...]
    look_alikes: tuple[str, ...]
    tokens: tuple[int, ...]
    limit: int | None
    unwritable: Mapping[str, int]

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """The number of rows of each label in each split, the most frequent label first."""
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for row in self.rows:
            if row.label is not None:
                counts[row.label][row.split] += 1
        ordered = sorted(counts, key=lambda label: (-counts[label].total(), label))
        return {label: {split: counts[label][split] for split in SPLITS} for label in ordered}

    @property
    def split_sizes(self) -> dict[str, int]:
        """The number of rows of each split."""
        sizes = collections.Counter(row.split for row in self.rows)
        return {split: sizes[split] for split in SPLITS}

    @property
    def truncated(self) -> int:
        """The number of inputs longer than the limit."""
        return 0 if self.limit is None else sum(n > self.limit for n in self.tokens)

    def summary(self) -> dict[str, Any]:
        """Returns the report as a JSON value."""
        lengths = np.quantile(self.tokens, (0.5, 0.9, 0.99, 1)).astype(int).tolist()
        return {
            "rows": len(self.rows),
            "splits": self.split_sizes,
            "labels": list(self.labels),
            "label_counts": self.label_counts,
            "empty_inputs": list(self.empty_inputs),
            "empty_cells": dict(self.empty_cells),
            "unlabelled": list(self.unlabelled),
            "duplicates": list(self.duplicates),
            "conflicts": list(self.conflicts),
            "near_duplicates": self.near_duplicates,
            "uneven": list(self.uneven),
            "look_alikes": list(self.look_alikes),
            "length_unit": "words" if self.limit is None else "tokens",
            "lengths": dict(zip(("median", "p90", "p99", "longest"), lengths, strict=True)),
            "truncated": self.truncated,
            "unwritable": dict(self.unwritable),
        }

    def write(self, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Writes `train.jsonl`, `valid.jsonl`, `test.jsonl` and, for a closed set, `dataset.json`.

        Args:
          folder: the folder of the dataset.
          replace: whether to overwrite its files; outputs of teachers are kept.

        Raises:
          DataError: if one of the files exists with other content, and `replace` is False.
        """
        folder = Path(folder)
        texts = self._texts()
        differing = [
            name
            for name, text in texts.items()
            if (folder / name).exists() and (folder / name).read_bytes() != text.encode()
        ]
        if differing and not replace:
            raise DataError(
                f"{folder}: has another {', '.join(differing)}; give another folder, or overwrite "
                "with `replace`"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if text:
                write_whole(folder / name, text)
            else:
                (folder / name).unlink(missing_ok=True)

    def _texts(self) -> dict[str, str]:
        """Returns the text of each file of the dataset's folder; "" for no file."""
        lines: dict[str, list[str]] = {split: [] for split in SPLITS}
        for row in self.rows:
            value = {"id": row.id, "input": row.input}
            if row.label is not None:
                value["label"] = row.label
            lines[row.split].append(json.dumps(value, ensure_ascii=False) + "\n")
        declared = json.dumps({"labels": self.labels}, ensure_ascii=False) + "\n"
        return {
            **{f"{split}.jsonl": "".join(lines[split]) for split in SPLITS},
            DATASET_FILE: declared if self.labels else "",
        }


def prepare(
    source: Any,
    columns: Columns,
    *,
    valid: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    merge_labels: bool = False,
    sheet: str | None = None,
    similar: float = SIMILAR,
    vocabulary: Vocabulary | None = None,
    limit: int = 512,
) -> Preparation:
    """Returns the examples of a table, and their report.

    Splits are drawn with the shares of the labels in each; equal and similar inputs stay in one
    split, and rows without a label go to train.

    Args:
      source: the table, see `read_tables`; tables that are split already keep their splits.
      columns: the columns that make examples.
      valid: fraction of the rows for validation, in [0, 1).
      test: fraction of the rows for the test, in [0, 1).
      seed: seed of the splits.
      labels: the closed set of labels, declared in `dataset.json`; empty for an open set; None to
        declare the labels found if they are few.
      merge_labels: whether labels that differ only by case or whitespace become the most frequent
        of them.
      sheet: the sheet of an Excel file; None for the first.
      similar: fraction of the pieces of 5 characters of two inputs that must be equal for them to
        stay in one split, in (0, 1]; 1 for equal inputs only.
      vocabulary: the student's vocabulary, for lengths and characters; None: T5's characters, and
        lengths in words.
      limit: the student's longest input in tokens.

    Raises:
      DataError: if a column does not exist, ids repeat, a label is outside the set, or the table
        cannot be read.
    """
    for name, share in (("valid", valid), ("test", test)):
        if not 0 <= share < 1:
            raise DataError(f"`{name}={share:g}`: give a fraction of at least 0 and below 1")
    if not 0 < similar <= 1:
        raise DataError(f"`similar={similar:g}`: give a fraction above 0, at most 1")
    if valid + test >= 1:
        raise DataError(f"`valid={valid:g}` and `test={test:g}` leave no rows for train")
    tables = read_tables(source, sheet=sheet)
    made = [(split, *row) for split, table in tables.items() for row in _rows(table, columns)]
    ids = [_id(columns, split, number, text) for split, number, text, *_ in made]
    _check_ids(columns, ids)
    inputs = [text for *_, text, _, _ in made]
    found = [read_label(label) for *_, label, _ in made]
    look_alikes = tuple(describe_look_alikes(label for label in found if label))
    if merge_labels:
        found, look_alikes = _merged(found), ()
    closed = _closed(found) if labels is None else tuple(labels)
    for id_, label in zip(ids, found, strict=True):
        if labels and label is not None and label not in closed:
            raise DataError(f"row {id_}: label {label!r} is not one of {', '.join(closed)}")
    uneven: tuple[str, ...] = ()
    groups, near = group_similar(inputs, similar)
    if "" in tables and columns.split is None:
        splits = draw_splits(groups, found, {"valid": valid, "test": test}, seed, columns.label)
        largest = max(collections.Counter(groups).values())
        uneven = _uneven(splits, {"valid": valid, "test": test}, largest, similar)
    else:
        splits = [split or given for split, *_, given in made]
    rows = tuple(map(Row, ids, inputs, found, splits))
    first: dict[str, str] = {}
    by_input: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        first.setdefault(row.input, row.id)
        if row.label is not None:
            by_input[row.input].add(row.label)
    filled = [row for row in rows if row.input]
    return Preparation(
        rows=rows,
        labels=closed,
        empty_inputs=tuple(row.id for row in rows if not row.input),
        empty_cells=_empty_cells(tables.values(), columns),
        unlabelled=tuple(row.id for row in rows if row.label is None) if columns.label else (),
        duplicates=tuple(row.id for row in filled if first[row.input] != row.id),
        conflicts=tuple(row.id for row in filled if len(by_input[row.input]) > 1),
        near_duplicates=near,
        uneven=uneven,
        look_alikes=look_alikes,
        tokens=tuple(_length(row.input, vocabulary) for row in filled) or (0,),
        limit=limit if vocabulary else None,
        unwritable=_unwritable(inputs, vocabulary),
    )


def read_inputs(source: Any, columns: Columns) -> list[tuple[str, dict[str, Any]]]:
    """Returns the text to predict for each row of a table, and the row's cells as JSON values.

    Args:
      source: the table, see `read_tables`.
      columns: the columns of the input; without any, the column `input`.

    Raises:
      DataError: if a column does not exist, or the table cannot be read.
    """
    tables = read_tables(source)
    if len(tables) > 1:
        raise DataError(f"{source}: has several splits; give one file")
    (table,) = tables.values()
    if not columns.input and columns.template is None and "input" in table.columns:
        columns = dataclasses.replace(columns, input=("input",))
    rows = _rows(table, columns)
    names = [str(name) for name in table.columns]
    return [
        (text, {n: _json_value(cell) for n, cell in zip(names, cells, strict=True)})
        for cells, (_, _, text, *_) in zip(table.itertuples(index=False), rows, strict=True)
    ]


def _json_value(cell: Any) -> Any:
    """Returns a cell as a JSON value: numbers and booleans as they are, other cells as text."""
    if isinstance(cell, int | float) and cell == cell:
        return cell
    try:
        return cell_text(cell) or None
    except DataError:  # a list or an object
        return str(cell)


def _length(text: str, vocabulary: Vocabulary | None) -> int:
    return len(text.split()) if vocabulary is None else len(vocabulary.encode(text)) + 1


def _rows(table: "pandas.DataFrame", columns: Columns) -> list[tuple[int, str, str, str, str]]:
    """Returns the number, id, input, label and split of each row of a table."""
    known = [str(name) for name in table.columns]
    if not columns.input and columns.template is None:
        raise DataError(f"no columns: give `input`; the table has {', '.join(known)}")
    wanted = [*columns.input, columns.label, columns.id, columns.split, *_fields(columns.template)]
    for name in wanted:
        if name is not None and name not in known:
            raise unknown_name("column", name, known, DataError)
    twice = [name for name, count in collections.Counter(known).items() if count > 1]
    if twice:
        raise DataError(f"two columns are called {twice[0]!r}; rename one")
    table = table.set_axis(known, axis="columns")
    out = []
    for number, cells in enumerate(table.to_dict("records"), 1):
        try:
            texts = {name: cell_text(cells[name]) for name in wanted if name is not None}
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
        id_, label, split = (
            texts[name] if name is not None else ""
            for name in (columns.id, columns.label, columns.split)
        )
        if columns.split is not None and split not in SPLITS:
            raise DataError(
                f"row {number}: split {split!r} in column {columns.split!r} is not one of "
                f"{', '.join(SPLITS)}"
            )
        out.append((number, id_, _input_text(texts, columns), label, split))
    return out


def _empty_cells(tables: Iterable["pandas.DataFrame"], columns: Columns) -> dict[str, int]:
    names = dict.fromkeys([*columns.input, *_fields(columns.template)])
    if len(names) < 2:
        return {}
    cells = ((name, cell) for table in tables for name in names for cell in table[name])
    counts = collections.Counter(name for name, cell in cells if not cell_text(cell).strip())
    return {name: counts[name] for name in names if counts[name]}


def _fields(template: str | None) -> list[str]:
    if template is None:
        return []
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"`template` {template!r}: {error}") from None
    for _, field, form, conversion in parts:
        if form or conversion or not field:
            raise DataError(f"`template` {template!r}: give only names of columns in braces")
    fields = [str(field) for _, field, _, _ in parts]
    if not fields:
        raise DataError(f"`template` {template!r}: names no column in braces, such as {{body}}")
    return fields


def _input_text(texts: Mapping[str, str], columns: Columns) -> str:
    if not any(texts[name].strip() for name in columns.input or _fields(columns.template)):
        return ""
    if columns.template is not None:
        return columns.template.format_map(texts).strip()
    if len(columns.input) == 1:
        return texts[columns.input[0]].strip()
    parts = (f"{name}: {texts[name].strip()}" for name in columns.input if texts[name].strip())
    return " ".join(parts)


def _id(columns: Columns, split: str, number: int, id_: str) -> str:
    if columns.id is not None:
        return id_
    return f"{split}-{number}" if split else str(number)


def _check_ids(columns: Columns, ids: Sequence[str]) -> None:
    repeated = [id_ for id_, count in collections.Counter(ids).items() if count > 1 or not id_]
    if repeated:
        raise DataError(
            f"column {columns.id!r}: {repeated[0]!r} is the id of several rows; choose another "
            "column, or none to number the rows"
            if repeated[0]
            else f"column {columns.id!r}: a row has no id; choose another column, or none"
        )


def _merged(labels: Sequence[str | None]) -> list[str | None]:
    """Returns labels in the most frequent spelling of those that differ by case or whitespace."""
    counts = collections.Counter(label for label in labels if label is not None)
    spelling: dict[str, str] = {}
    for label, _ in counts.most_common():
        spelling.setdefault(fold(label), label)
    return [None if label is None else spelling[fold(label)] for label in labels]


def _closed(labels: Sequence[str | None]) -> tuple[str, ...]:
    """Returns the distinct labels if they are few, the most frequent first; else none."""
    counts = collections.Counter(label for label in labels if label is not None)
    few = 1 < len(counts) <= min(MOST_LABELS, counts.total() / ROWS_PER_LABEL)
    return tuple(sorted(counts, key=lambda label: (-counts[label], label))) if few else ()


def _uneven(
    splits: Sequence[str], shares: Mapping[str, float], largest: int, similar: float
) -> tuple[str, ...]:
    """Returns a line for each split that is much smaller than asked.

    Args:
      splits: the split of each row.
      shares: the fraction of the rows that each split was asked to have.
      largest: number of rows of the largest group.
      similar: similarity from which inputs stay together.
    """
    kind, hint = "equal", ""
    if similar < 1:
        kind, hint = "similar", "; `similar=1` keeps only equal ones so"
    sizes, out = collections.Counter(splits), []
    for split, share in shares.items():
        wanted = share * len(splits)
        if wanted >= 1 and sizes[split] < UNEVEN * wanted and largest > 1:
            out.append(
                f"{split} has {sizes[split]:,} rows instead of about {wanted:,.0f}: up to "
                f"{largest:,} {kind} inputs stay together{hint}"
            )
    return tuple(out)


def _unwritable(texts: Sequence[str], vocabulary: Vocabulary | None) -> dict[str, int]:
    """Returns the number of texts with each character that a vocabulary cannot write."""
    counts = collections.Counter(c for text in texts for c in set(text.replace(EOS_TEXT, "")))
    if vocabulary is None:
        lost = [c for c in counts if c in T5_LACKS]
    else:
        # Between letters: a decoder strips whitespace at the ends.
        lost = [c for c in counts if c != " " and round_trip(vocabulary, f"a{c}b") != f"a{c}b"]
    return {c: counts[c] for c in sorted(lost, key=lambda c: (-counts[c], c))}
