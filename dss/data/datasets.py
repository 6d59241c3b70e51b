"""Datasets: the released ones under the data root, and the user's own files."""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from etils import epath

from dss.data.examples import (
    Example,
    TeacherOutput,
    check_kind,
    read_json_file,
    read_teacher_outputs,
    stream_examples,
    teacher_files,
)
from dss.data.grouped_splits import SPLITS
from dss.data.labels import ANY_LABEL, Labels
from dss.data.metrics import METRICS
from dss.data.prepare import DATASET_FILE, Columns, prepare
from dss.data.released import RELEASED, ReleasedSource
from dss.data.splits import hold_out, subsample
from dss.data.tables import HUB, is_table
from dss.errors import DataError, unknown_name
from dss.paths import absolute, check_no_pipes

__all__ = [
    "DATASET_FILE",
    "SPLITS",
    "Dataset",
    "JsonlSource",
    "Source",
    "check_name",
    "folder_of",
    "name_of",
    "read_declared",
]


def name_of(path: epath.PathLike) -> str:
    """Returns the name of the dataset in a folder or file.

    >>> name_of("data/my-tickets.jsonl")
    'my_tickets'
    """
    return str(absolute(path).stem).replace("-", "_")


class Source(Protocol):
    """Reads the examples of a dataset and its teachers' outputs."""

    remedy: ClassVar[str]  # advice in the error for a missing file

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers."""

    def has(self, split: str, teacher: str | None = None) -> bool:
        """Returns whether a split, or a teacher's outputs for it, exist."""

    def files(self, split: str, teacher: str | None = None) -> list[epath.Path]:
        """Returns the files of a split, and of a teacher's outputs for it, existing or not."""

    def examples(self, split: str) -> list[Example]:
        """Returns the examples of a split."""

    def outputs(self, split: str, teacher: str) -> list[TeacherOutput]:
        """Returns a teacher's outputs for a split, at most one per example."""

    def groups(self, examples: Sequence[Example]) -> Sequence[str] | None:
        """Returns the group of each example, or None for no groups.

        Where a validation split is held out, all examples of a group stay in one split.
        """


@dataclasses.dataclass(frozen=True)
class JsonlSource:
    """A user's own JSON-lines files.

    Attributes:
      path: a folder with `train.jsonl` and optionally `valid.jsonl` and `test.jsonl`; or one file,
        the training split. A teacher's outputs are beside the examples, in
        `<stem of the file>.<teacher>.jsonl`.
        In the names of tasks and mixtures the teacher `gpt-4o` is `gpt_4o`.
      labels: the allowed gold labels.
    """

    path: epath.Path
    labels: Labels = ANY_LABEL
    remedy: ClassVar[str] = "create it, or choose a split and a teacher that exist"

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers with outputs for any split."""
        return tuple(sorted({t for split in SPLITS for t in teacher_files(self._file(split))}))

    def has(self, split: str, teacher: str | None = None) -> bool:
        """See `Source.has`."""
        return bool(self.files(split, teacher)[-1].is_file())

    def files(self, split: str, teacher: str | None = None) -> list[epath.Path]:
        """See `Source.files`."""
        file = self._file(split)
        if teacher is None:
            return [file]
        return [file, teacher_files(file).get(teacher, file.with_suffix(f".{teacher}.jsonl"))]

    def examples(self, split: str) -> list[Example]:
        """See `Source.examples`."""
        return list(stream_examples(self._file(split), split, self.labels))

    def outputs(self, split: str, teacher: str) -> list[TeacherOutput]:
        """See `Source.outputs`."""
        return read_teacher_outputs(self.files(split, teacher)[1], teacher)

    def groups(self, examples: Sequence[Example]) -> Sequence[str]:
        """Returns the inputs with whitespace normalised: equal inputs stay in one split."""
        return [" ".join(example.input.split()) for example in examples]

    def _file(self, split: str) -> epath.Path:
        if self.path.is_dir():
            return self.path / f"{split}.jsonl"
        # The other splits of a single file have the split's name after its own.
        return (
            self.path
            if split == "train"
            else self.path.with_name(f"{self.path.stem}-{split}.jsonl")
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset: its name, its files and its labels.

    Attributes:
      name: the dataset's name, the first part of its tasks' names.
      source: the reader of the dataset's files.
      labels: the allowed labels, and the metric that compares predictions with them.
      candidates: a function from an input to the answers that it offers; None where inputs offer
        none.
    """

    name: str
    source: Source
    labels: Labels = ANY_LABEL
    candidates: Callable[[str], tuple[str, ...]] | None = None

    @classmethod
    def released(cls, name: str, root: str | epath.Path | None = None) -> "Dataset":
        """Returns one of the datasets that Hsieh et al. (2023) released.

        Args:
          name: the name of the dataset, one of `RELEASED`.
          root: the folder of the released datasets; None for the environment variable
            DSS_DATA_ROOT, or else the folder `data`, resolved when files are read.

        Raises:
          DataError: if no released dataset has this name.
        """
        if name not in RELEASED:
            raise unknown_name("dataset", name, RELEASED, DataError)
        form = RELEASED[name]
        source = ReleasedSource(None if root is None else epath.Path(root).expanduser(), name)
        return cls(name, source, form.labels, form.candidates)

    @classmethod
    def from_files(
        cls,
        path: Any,
        *,
        name: str | None = None,
        labels: Sequence[str] | str = (),
        metric: str = "text",
        must_exist: bool = True,
        input: str | Sequence[str] = (),
        label: str | None = None,
        id: str | None = None,
        template: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> "Dataset":
        """Returns a dataset of a user's own files.

        Args:
          path: a folder or a file of JSON lines, see `JsonlSource`; or a table with the columns
            `input` and `label`, see `read_tables`, from which the folder is written.
          name: the name of the dataset in SeqIO's names: letters, digits and underscores; None for
            `name_of` the path, which runs use.
          labels: the closed set of labels, among which predictions are chosen, or one text with
            commas between them; empty for the set that `dataset.json` declares, see
            `read_declared`.
          metric: the metric of the labels, "text" or "equation".
          must_exist: False where only names and labels are needed, as for prediction: the path may
            be missing and `dataset.json` is not read.
          input: the columns of a table's inputs.
          label: the column of a table's labels; None for unlabelled data.
          id: the column of a table's ids; None: the numbers of its rows.
          template: an input's text with columns in braces, see `Columns`.
          folder: the folder to write for a table; None: that of the file's name beside it.
          options: other arguments of `prepare`, such as `valid`, `seed` or `merge_labels`.

        Raises:
          DataError: if the name is invalid or that of a released dataset, the path does not exist,
            the metric is unknown, `dataset.json` contradicts the arguments, or a table lacks a
            column.
        """
        if input or template is not None:
            columns = Columns(
                input=tuple(map(str, input if isinstance(input, list | tuple) else [input])),
                label=label,
                id=id,
                template=template,
            )
            path = _write_table(path, columns, folder, labels, options)
        elif label is not None or id is not None or folder is not None or options:
            raise DataError(f"{path}: columns and options of a table need `input`")
        elif must_exist and is_table(path):
            source = path if isinstance(path, str | os.PathLike) else "a DataFrame"
            raise DataError(
                f"{source}: a table; give `input`, its columns of the inputs, or make a dataset of "
                "it with `dss data`"
            )
        path = epath.Path(path).expanduser()
        name = name_of(path) if name is None else name
        labels = labels.split(",") if isinstance(labels, str) else labels
        if len({*labels}) < len(labels):
            raise DataError(f"labels: {', '.join(labels)}: one is given twice")
        if must_exist and path.is_file():
            check_kind(path)
        check_name(name)
        if must_exist and not path.exists():
            raise DataError(f"{path}: no such file or folder; dataset {name!r} needs it")
        allowed = Labels(tuple(labels), metric)
        if must_exist:  # a trained student keeps the labels of its training
            allowed = read_declared(path, allowed, where="the configuration")
        return cls(name, JsonlSource(path, allowed), allowed)

    def choices(self, text: str) -> tuple[str, ...]:
        """Returns the possible labels of an input; empty where any text is allowed."""
        return self.candidates(text) if self.candidates else self.labels.closed

    def source_split(self, split: str) -> str:
        """Returns the split whose files hold `split`: "train" for "valid" without a file.

        Raises:
          DataError: if the split is unknown.
        """
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS, DataError)
        return "train" if split == "valid" and not self.source.has("valid") else split

    def has(self, split: str, teacher: str | None = None) -> bool:
        """Returns whether a split, or a teacher's outputs for it, exist."""
        return self.source.has(self.source_split(split), teacher)

    def files(self, split: str, teacher: str | None = None) -> list[epath.Path]:
        """Returns the files of a split, and of a teacher's outputs for it.

        Raises:
          DataError: if a file is missing or is a named pipe.
        """
        files = self.source.files(self.source_split(split), teacher)
        for file in files:
            check_no_pipes(file)
            if not file.is_file():
                raise DataError(
                    f"{file}: no such file; dataset {self.name!r} needs it for {split}: "
                    f"{self.source.remedy}"
                )
        return files

    def examples(self, split: str, *, fraction: float = 1.0, seed: int = 0) -> list[Example]:
        """Returns the examples of a split.

        Args:
          split: "train", "valid" or "test". Without a validation file a tenth of train is held
            out: the same rows as in the reference implementation; in a user's own data equal
            inputs stay in one split.
          fraction: fraction of the training file to use, in (0, 1]; a validation split that is
            held out is a tenth of that fraction.
          seed: seed of the subsample.

        Raises:
          DataError: if a file is missing or malformed, the split is empty, or a label is outside
            the closed set.
        """
        file = self.files(split)[0]
        examples = self.source.examples(self.source_split(split))
        if self._is_subsampled(split):
            rows = subsample(len(examples), fraction, seed)
            if not self.source.has("valid"):
                train, valid = hold_out(rows, self.source.groups(examples))
                rows = train if split == "train" else valid
            examples = [examples[i] for i in rows]
        if not examples:
            raise DataError(f"{file}: no examples for the {split} split of {self.name!r}")
        return examples

    def count_drawn(self, split: str, total: int, *, fraction: float = 1.0) -> int:
        """Returns how many of the `total` rows of a split's file a fraction keeps."""
        return len(subsample(total, fraction, 0)) if self._is_subsampled(split) else total

    def _is_subsampled(self, split: str) -> bool:
        return split == "train" or self.source_split(split) != split

    def outputs(self, split: str, teacher: str) -> dict[str, TeacherOutput]:
        """Returns a teacher's outputs for all rows of the file that holds a split, by example id.

        Outputs for an input that has changed since are "stale"; see `TeacherOutput.for_input`.

        Raises:
          DataError: if a file is missing or malformed.
        """
        self.files(split, teacher)
        split = self.source_split(split)
        outputs = {o.id: o for o in self.source.outputs(split, teacher)}
        if any(output.input_hash for output in outputs.values()):
            for example in self.source.examples(split):
                if example.id in outputs:
                    outputs[example.id] = outputs[example.id].for_input(example.input)
        return outputs


def _write_table(
    source: Any,
    columns: Columns,
    folder: str | os.PathLike[str] | None,
    labels: Sequence[str] | str,
    options: dict[str, Any],
) -> epath.Path:
    """Writes the folder of a dataset from a table, and returns it."""
    if folder is None:
        is_path = isinstance(source, str | os.PathLike)
        is_hub = str(source).startswith(HUB)
        if is_path and not is_hub and not Path(source).expanduser().exists():
            raise DataError(f"{source}: no such file or folder")
        if not is_path or not Path(source).expanduser().is_file():
            raise DataError("`folder`: give the folder of the dataset to write")
        folder = folder_of(source)
    check_name(name_of(folder), "`folder`")
    unknown = {*options} - {*inspect.signature(prepare).parameters, "replace"}
    if unknown:
        raise DataError(f"from_files: unknown argument {min(unknown)!r}")
    declared = labels.split(",") if isinstance(labels, str) else list(labels)
    replace = options.pop("replace", False)
    prepare(source, columns, labels=declared or None, **options).write(folder, replace=replace)
    return epath.Path(folder)


def check_name(name: str, remedy: str = "") -> None:
    """Checks the name of a dataset of a user's own.

    Args:
      name: the name.
      remedy: what gives another name, for the message; empty for the folder's.

    Raises:
      DataError: if it is that of a released dataset, or has other characters than letters, digits
        and underscores.
    """
    hint = f"; give another with {remedy}" if remedy else ""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise DataError(f"dataset name {name!r}: use letters, digits and underscores{hint}")
    if name in RELEASED:
        raise DataError(
            f"dataset name {name!r} is that of a released dataset{hint or '; choose another'}"
        )


def folder_of(file: str | os.PathLike[str]) -> Path:
    """Returns the default folder of a table's dataset: the file's name without extensions.

    >>> folder_of("data/tickets.csv.gz").name
    'tickets'
    """
    path = Path(file).expanduser()
    return path.with_name(path.name.split(".")[0])


def read_declared(path: str | epath.Path, given: Labels = ANY_LABEL, *, where: str) -> Labels:
    """Returns the given labels, completed with those that the data's `dataset.json` declares.

    A file `dataset.json` beside the examples declares the closed set, the metric or both, such as
    {"labels": ["billing", "bug"], "metric": "text"}, for every command that is not given them.

    Args:
      path: the folder of the examples, or one of its files.
      given: labels of a configuration or prompt; an open set and the metric "text" are not given.
      where: name of that configuration or prompt, for messages.

    Raises:
      DataError: if the file is malformed or contradicts the given labels.
    """
    path = epath.Path(path).expanduser()
    file = (path.parent if path.is_file() else path) / DATASET_FILE
    if not file.is_file():
        return given
    value = read_json_file(file)
    if not isinstance(value, dict) or not {*value} <= {"labels", "metric"}:
        raise DataError(
            f"{file}: must be a JSON object with 'labels', 'metric' or both, and no other keys; "
            "rename the file if it is not meant for dss"
        )
    labels, metric = value.get("labels", []), value.get("metric", given.metric)
    if not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise DataError(f"{file}: 'labels' must be a list of strings that are not blank")
    if metric not in [*METRICS]:
        raise DataError(f"{file}: 'metric' must be one of {', '.join(METRICS)}, got {metric!r}")
    declared = Labels(tuple(labels), metric)
    repeated = [label for label in declared.closed if declared.closed.count(label) > 1]
    if repeated:
        raise DataError(f"{file}: duplicate label {repeated[0]!r}")
    remedy = "remove one of them, or make them equal"
    if given.closed and declared.closed and set(given.closed) != set(declared.closed):
        raise DataError(
            f"{file}: its labels are {', '.join(declared.closed)}, but {where} has "
            f"{', '.join(given.closed)}; {remedy}"
        )
    if given.metric not in ("text", declared.metric):
        raise DataError(
            f"{file}: its metric is {declared.metric}, but {where} has {given.metric}; {remedy}"
        )
    return dataclasses.replace(declared, closed=given.closed or declared.closed)
