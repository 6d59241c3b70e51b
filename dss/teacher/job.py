"""Annotation jobs: examples, prompt, teacher, and the files that are written."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from dss import __version__
from dss.data.datasets import DATASET_FILE, SPLITS, Dataset, read_declared
from dss.data.examples import Example, read_json_lines, stream_examples
from dss.data.labels import ANY_LABEL, Labels
from dss.data.released import RELEASED
from dss.errors import TeacherError
from dss.paths import check_no_pipes, in_bucket, write_whole
from dss.teacher.journal import Journal
from dss.teacher.outputs import Annotation, annotations, write_jsonl, write_parquet
from dss.teacher.prices import Price, total_cost
from dss.teacher.prompt import load_prompt, with_labels
from dss.teacher.request import Teacher, Writer, file_name

__all__ = ["Job", "dataset_job", "file_job"]

JOURNAL_FILE = "journal.sqlite"
LONGEST_NAME = 128  # characters; a file name of 255 also contains the examples' name
PROMPT_OF = {"asdiv": "svamp"}  # prompts of datasets without one of the same name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The annotation of one file of examples by one teacher.

    Attributes:
      source: file of the examples.
      stem: first part of the output files' names.
      folder: output folder.
      name: name of the teacher in file names and mixtures.
      writer: builder of the requests.
      rows: examples, if they are in memory; None to stream them from `source`.
    """

    source: Path
    stem: str
    folder: Path
    name: str
    writer: Writer
    rows: tuple[Example, ...] | None = None

    @property
    def journal_path(self) -> Path:
        """Path of the journal, which all jobs of the folder share."""
        return self.folder / JOURNAL_FILE

    def file(self, suffix: str) -> Path:
        """Returns the path of this teacher's output file with a suffix, such as "jsonl"."""
        return self.folder / f"{self.stem}.{self.name}.{suffix}"

    def examples(self) -> Iterator[Example]:
        """Yields the examples in the order of the file.

        Raises:
          TeacherError: if an example is malformed; see `stream_examples`.
        """
        if self.rows is not None:
            yield from self.rows
        else:
            # The file's name gives the split, and with it the ids that training gives to examples
            # without an id.
            splits = (split for split in SPLITS if f"-{self.source.stem}".endswith(f"-{split}"))
            split = next(splits, "train")
            yield from stream_examples(self.source, split, self.writer.prompt.labels)

    def check(
        self,
        journal: Journal,
        *,
        parquet: bool = False,
        replace: bool = False,
        most_requests: int | None = None,
    ) -> int:
        """Checks the examples and the output files before any request is sent.

        Args:
          journal: journal of the folder.
          parquet: whether a Parquet file will be written too.
          replace: whether existing files may be overwritten, even if answers are lost.
          most_requests: maximum requests of the run; None for unlimited.

        Returns:
          Number of examples.

        Raises:
          TeacherError: if there are no examples; one is malformed or, in hint mode, has no label;
            an output file exists that this job did not write; or the run would lose answers in the
            outputs.
        """
        ids = set()
        for example in self.examples():
            ids.add(example.id)
            if self.writer.teacher.hinted and example.label is None:
                self.writer.requests(example)  # raises the error
        if not ids:
            raise TeacherError(f"{self.source}: no examples")
        self._check_ownership(journal, parquet=parquet, replace=replace)
        if not replace:
            lost = self._lost_ids(journal)
            exceeds_limit = most_requests is not None and len(lost) > most_requests
            if exceeds_limit or lost - ids:  # no request is sent for ids without an example
                raise TeacherError(self._loss_message(len(lost)))
        return len(ids)

    def export(
        self, journal: Journal, *, parquet: bool = False, replace: bool = False
    ) -> collections.Counter[str] | None:
        """Writes the journal's answers as the JSON lines that training reads.

        If the output folder is not the source's, the examples and the source's dataset.json are
        copied into it, so that DATASET_PATH may name it. Files that are up to date are not written
        again, and an existing file is not replaced if the journal has no answers.

        Args:
          journal: journal open for writing.
          parquet: whether to write a Parquet file of examples and outputs too.
          replace: whether existing files may be overwritten, even if answers are lost.

        Returns:
          Number of lines by status; None if no lines were written.

        Raises:
          TeacherError: if a file exists that this job did not write, or answers would be lost.
        """
        self._check_ownership(journal, parquet=parquet, replace=replace)
        copy, table, target = self._copy, self.file("parquet"), self.file("jsonl")
        has_answers = next(self._annotations(journal), None) is not None
        if has_answers and not replace and (lost := self._lost_ids(journal)):
            raise TeacherError(self._loss_message(len(lost)))
        fingerprint = self._fingerprint(journal)

        def claim(path: Path) -> None:
            """Records the owner before the file is written, in case the process is killed then."""
            if journal.export_of(path) is None:
                journal.set_export(path, ":".join([*self._owner, ""]))

        def is_current(path: Path) -> bool:
            return path.is_file() and journal.export_of(path) == fingerprint

        counts: collections.Counter[str] = collections.Counter()

        def lines() -> Iterator[dict[str, Any]]:
            for annotation in self._annotations(journal):
                counts[annotation.status] += 1
                yield annotation.line(self.name)

        declared, declared_copy = self._declarations
        if copy is not None and declared.is_file() and not declared_copy.exists():
            write_whole(declared_copy, declared.read_text(encoding="utf-8"))
        if copy is not None and not is_current(copy):
            claim(copy)
            write_jsonl(copy, (dataclasses.asdict(example) for example in self.examples()))
            journal.set_export(copy, fingerprint)
        if parquet and has_answers and not is_current(table):
            claim(table)
            write_parquet(table, self._annotations(journal), self.name)
            journal.set_export(table, fingerprint)
        if is_current(target) or (target.exists() and not has_answers):
            return None
        claim(target)
        write_jsonl(target, lines())
        journal.set_export(target, fingerprint)
        return counts

    def save_usage(self, journal: Journal, price: Price | None) -> None:
        """Writes the tokens and the cost of the outputs beside the JSON lines.

        Training records them with a run. Without a price, a cost in the file is kept as long as the
        tokens are the same.
        """
        target, outputs = self.file("usage.json"), self.file("jsonl")
        if not outputs.is_file():
            return
        teacher = self.writer.teacher
        sent, batch = journal.usage(teacher), journal.usage(teacher, batch=True)
        with outputs.open("rb") as file:
            facts: dict[str, Any] = {"outputs": sum(1 for _ in file)}
        for name in ("prompt", "cached", "completion"):
            facts[f"{name}_tokens"] = getattr(sent, name) + getattr(batch, name)
        earlier = None
        check_no_pipes(target)
        with contextlib.suppress(OSError, ValueError, RecursionError):  # a missing or invalid file
            earlier = json.loads(target.read_text(encoding="utf-8"))
        if price is None and isinstance(earlier, dict) and facts.items() <= earlier.items():
            return
        facts |= {"cost": total_cost(price, sent, batch), "currency": price and price.currency}
        write_jsonl(target, [facts])

    @property
    def _copy(self) -> Path | None:
        """Path of the examples' copy; None if the source is in the output folder."""
        is_in_folder = self.source.parent.resolve() == self.folder.resolve()
        return None if is_in_folder else self.folder / f"{self.stem}.jsonl"

    @property
    def _declarations(self) -> tuple[Path, Path]:
        """Paths of dataset.json in the source's folder and in the output folder."""
        return self.source.parent / DATASET_FILE, self.folder / DATASET_FILE

    def _annotations(self, journal: Journal) -> Iterator[Annotation]:
        return annotations(journal, self.writer, self.examples())

    def _lost_ids(self, journal: Journal) -> set[str]:
        """Returns the ids with an "ok" line in the existing outputs, but not in a new export."""
        path = self.file("jsonl")
        if not path.is_file():
            return set()
        # Only ids and statuses are kept in memory, as the texts may be long.
        lines = read_json_lines(epath.Path(path))
        was_ok = {str(line.get("id")): line.get("status", "ok") == "ok" for _, line in lines}
        now_ok = {a.example.id for a in self._annotations(journal) if a.is_ok}
        return {id_ for id_, is_ok in was_ok.items() if is_ok} - now_ok

    def _loss_message(self, count: int) -> str:
        return (
            f"{self.file('jsonl')}: not overwritten: {count} of its ok lines have no answer to the "
            "current requests (the prompt, the parameters, the model or the examples have "
            "changed); send all requests, give the teacher another `name`, or overwrite the file "
            "with `replace`"
        )

    def _check_ownership(self, journal: Journal, *, parquet: bool, replace: bool) -> None:
        """Raises TeacherError if a file to be written exists and belongs to another job."""
        if replace:
            return
        copy, target = self._copy, self.file("jsonl")
        declared, declared_copy = self._declarations
        both_exist = copy is not None and declared.is_file() and declared_copy.is_file()
        if both_exist and declared.read_bytes() != declared_copy.read_bytes():
            raise TeacherError(f"{declared_copy}: differs from {declared}; make them the same")
        table = self.file("parquet") if parquet else None
        source, model = self._owner
        for path, owner in (
            (copy, (source,)),
            (target, (source, model)),
            (table, (source, model)),
        ):
            if path is None or not path.exists():
                continue
            exported = journal.export_of(path)
            if exported is None:
                problem = f"exists, but {self.journal_path.name} beside it has no record of it"
            elif ":" in exported and exported.split(":")[: len(owner)] != [*owner]:
                problem = "exists, from another file of examples or another model"
            else:
                continue
            remedy = "give another folder with `output`" if path == copy else "use another `name`"
            raise TeacherError(f"{path}: {problem}; {remedy}, or overwrite it with `replace`")

    @property
    def _owner(self) -> tuple[str, str]:
        """Hashes of the source's path and of the model, which identify the outputs' owner."""
        source = os.path.relpath(self.source.resolve(), self.folder.resolve())
        return _short_hash(source), _short_hash(self.writer.teacher.model)

    def _fingerprint(self, journal: Journal) -> str:
        """Returns the owner's hashes, and a hash of everything that an export depends on."""
        stat = self.source.stat()
        parts = [
            *(self.writer.prompt.source, dataclasses.asdict(self.writer.teacher), __version__),
            *(str(self.source.resolve()), stat.st_size, stat.st_mtime_ns, journal.last_attempt()),
        ]
        content = json.dumps(parts, sort_keys=True)
        return ":".join([*self._owner, hashlib.sha256(content.encode()).hexdigest()])


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def file_job(
    path: Path,
    prompt: str,
    teacher: Teacher,
    *,
    output: Path | None,
    name: str | None,
    labels: Labels = ANY_LABEL,
) -> Job:
    """Returns the job for a file of JSON lines.

    The labels may be declared beside the file; see `read_declared`.

    Args:
      path: file of the examples.
      prompt: name of a shipped prompt or path of a YAML file; see `load_prompt`.
      teacher: model to query.
      output: output folder; None for the file's folder.
      name: name of the teacher in file names and mixtures; None for the model's name.
      labels: labels in place of the prompt's and the declared ones; an open set for these.

    Raises:
      TeacherError: if the file, the prompt, the labels or the name is missing or invalid.
    """
    if path.is_dir():
        raise TeacherError(
            f"{path}: a folder; give one of its files, such as {path / 'train.jsonl'}"
        )
    if not path.is_file():
        raise TeacherError(f"{path}: no such file")
    loaded = load_prompt(prompt)
    if not labels.closed:
        labels = read_declared(path, loaded.labels, where=f"prompt {loaded.name}")
    return Job(
        source=path,
        stem=path.stem,
        folder=output or path.parent,
        name=_teacher_name(name, teacher),
        writer=Writer(with_labels(loaded, labels), teacher),
    )


def dataset_job(
    dataset: Dataset,
    split: str,
    prompt: str | None,
    teacher: Teacher,
    *,
    output: Path | None,
    name: str | None,
) -> Job:
    """Returns the job for a split of a dataset; the default prompt is that of a released dataset.

    Raises:
      TeacherError: if the split's file, the prompt or the name is missing or invalid.
    """
    if dataset.source_split(split) != split:
        raise TeacherError(
            f"{dataset.name} has no file for {split}: it is a tenth of train; annotate "
            "`split=train`"
        )
    (file,) = dataset.files(split)
    if in_bucket(file):
        raise TeacherError(f"{file}: in a bucket; annotate a local copy")
    source = Path(file)
    if dataset.name not in RELEASED:
        if prompt is None:
            raise TeacherError("no prompt: give the name of a shipped one, or a YAML file")
        return file_job(source, prompt, teacher, output=output, name=name, labels=dataset.labels)
    return Job(
        source=source,
        stem=source.stem if output is None else split,
        folder=output or source.parent,
        name=_teacher_name(name, teacher),
        writer=Writer(load_prompt(prompt or PROMPT_OF.get(dataset.name, dataset.name)), teacher),
        rows=tuple(dataset.source.examples(split)),
    )


def _teacher_name(name: str | None, teacher: Teacher) -> str:
    if name is not None and file_name(name) != name:
        raise TeacherError(f"`name={name}`: use letters, digits, '_', '-' and '.'")
    name = file_name(teacher.model) if name is None else name
    if len(name) > LONGEST_NAME:
        raise TeacherError(
            f"{name[:20]}...: {len(name)} characters are too many for a file name; give a shorter "
            "one with `name`"
        )
    return name
