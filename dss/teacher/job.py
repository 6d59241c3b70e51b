"""An annotation put together: which examples, which prompt and teacher, and where it is kept."""

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
from dss.errors import UserError
from dss.paths import check_no_pipes, in_bucket, write_whole
from dss.teacher.journal import Journal
from dss.teacher.outputs import Annotation, annotations, write_jsonl, write_parquet
from dss.teacher.prices import Price, total_cost
from dss.teacher.prompt import load_prompt, with_labels
from dss.teacher.request import Teacher, Writer, file_name

__all__ = ["Job", "dataset_job", "file_job"]

JOURNAL_FILE = "journal.sqlite"
LONGEST_NAME = 128  # characters; a file's name may have 255, of which the examples' are some
PROMPT_OF = {"asdiv": "svamp"}  # of datasets that have none of their own name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A teacher's work on one file of examples.

    Attributes:
      source: the file that holds the examples.
      stem: of the names of the files that are written.
      folder: where they are written.
      name: of the teacher, in the names of files and mixtures.
      writer: of the requests.
      rows: the examples, where they are read already; None streams them from `source`.
    """

    source: Path
    stem: str
    folder: Path
    name: str
    writer: Writer
    rows: tuple[Example, ...] | None = None

    @property
    def journal_path(self) -> Path:
        """The journal, one for all that is annotated in a folder."""
        return self.folder / JOURNAL_FILE

    def file(self, suffix: str) -> Path:
        """Returns the file for this teacher's outputs with a suffix, such as "jsonl"."""
        return self.folder / f"{self.stem}.{self.name}.{suffix}"

    def examples(self) -> Iterator[Example]:
        """Yields the examples in their order.

        Raises:
          UserError: see `stream_examples`.
        """
        if self.rows is not None:
            yield from self.rows
        else:
            # The ids that training gives to examples without one: the split's, by the file's name.
            ends = (split for split in SPLITS if f"-{self.source.stem}".endswith(f"-{split}"))
            split = next(ends, "train")
            yield from stream_examples(self.source, split, self.writer.prompt.labels)

    def check(
        self,
        journal: Journal,
        *,
        parquet: bool = False,
        replace: bool = False,
        most_requests: int | None = None,
    ) -> int:
        """Returns how many examples there are, when all is fit to be asked about.

        Args:
          journal: of the folder.
          parquet: a Parquet file will be written too.
          replace: files that are there may be written over, whatever is lost.
          most_requests: how many may be sent; None for any number.

        Raises:
          UserError: no examples, one that is malformed or, in hint mode, has no label; a file of
            somebody else where something would be written; or more answers in the outputs that
            would be lost than requests that may be sent.
        """
        ids = set()
        for example in self.examples():
            ids.add(example.id)
            if self.writer.teacher.hinted and example.label is None:
                self.writer.requests(example)  # says so
        if not ids:
            raise UserError(f"{self.source}: no examples")
        self._check_own(journal, parquet=parquet, replace=replace)
        if not replace:
            lost = self._lost(journal)
            few = most_requests is not None and len(lost) > most_requests
            if few or lost - ids:  # as no answer can come for these
                raise UserError(self._would_lose(len(lost)))
        return len(ids)

    def export(
        self, journal: Journal, *, parquet: bool = False, replace: bool = False
    ) -> collections.Counter[str] | None:
        """Writes what the journal holds as the JSON lines that training reads.

        In a folder that is not the source's, the examples are written beside it, with the source's
        dataset.json, so that DATASET_PATH may name them. Nothing is written where nothing has
        changed since, or where the journal has nothing and there is a file.

        Args:
          journal: open for writing.
          parquet: also write a Parquet file with examples and outputs.
          replace: write also where answers that are in the file would be lost.

        Returns:
          How many lines have each status; None where nothing was written.

        Raises:
          UserError: a file of somebody else is there, or one with answers that would be lost.
        """
        self._check_own(journal, parquet=parquet, replace=replace)
        copy, table, target = self._copy, self.file("parquet"), self.file("jsonl")
        has_any = next(self._found(journal), None) is not None
        if has_any and not replace and (lost := self._lost(journal)):
            raise UserError(self._would_lose(len(lost)))
        fingerprint = self._fingerprint(journal)

        def claim(path: Path) -> None:
            """Says whose the file will be, for a process that is killed when it has written it."""
            if journal.export_of(path) is None:
                journal.set_export(path, ":".join([*self._owner, ""]))

        def is_current(path: Path) -> bool:
            return path.is_file() and journal.export_of(path) == fingerprint

        counts: collections.Counter[str] = collections.Counter()

        def lines() -> Iterator[dict[str, Any]]:
            for annotation in self._found(journal):
                counts[annotation.status] += 1
                yield annotation.line(self.name)

        declared, there = self._declarations
        if copy is not None and declared.is_file() and not there.exists():
            write_whole(there, declared.read_text(encoding="utf-8"))
        if copy is not None and not is_current(copy):
            claim(copy)
            write_jsonl(copy, (dataclasses.asdict(example) for example in self.examples()))
            journal.set_export(copy, fingerprint)
        if parquet and has_any and not is_current(table):
            claim(table)
            write_parquet(table, self._found(journal), self.name)
            journal.set_export(table, fingerprint)
        if is_current(target) or (target.exists() and not has_any):
            return None
        claim(target)
        write_jsonl(target, lines())
        journal.set_export(target, fingerprint)
        return counts

    def save_usage(self, journal: Journal, price: Price | None) -> None:
        """Writes how many tokens the outputs took and what they cost, beside the JSON lines.

        A run that learns from them records it. What a price said before stays where no token has
        come since and none is given now.
        """
        target, outputs = self.file("usage.json"), self.file("jsonl")
        if not outputs.is_file():
            return
        sent, batch = (journal.usage(self.writer.teacher, batch=b) for b in (False, True))
        with outputs.open("rb") as file:
            facts: dict[str, Any] = {"outputs": sum(1 for _ in file)}
        for name in ("prompt", "cached", "completion"):
            facts[f"{name}_tokens"] = getattr(sent, name) + getattr(batch, name)
        before = None
        check_no_pipes(target)
        with contextlib.suppress(OSError, ValueError, RecursionError):  # none, or a broken one
            before = json.loads(target.read_text(encoding="utf-8"))
        if price is None and isinstance(before, dict) and facts.items() <= before.items():
            return
        facts |= {"cost": total_cost(price, sent, batch), "currency": price and price.currency}
        write_jsonl(target, [facts])

    @property
    def _copy(self) -> Path | None:
        """Where the examples are written too; None where the source is in the folder."""
        is_there = self.source.parent.resolve() == self.folder.resolve()
        return None if is_there else self.folder / f"{self.stem}.jsonl"

    @property
    def _declarations(self) -> tuple[Path, Path]:
        """The dataset.json of the source's folder, and of the outputs'."""
        return self.source.parent / DATASET_FILE, self.folder / DATASET_FILE

    def _found(self, journal: Journal) -> Iterator[Annotation]:
        return annotations(journal, self.writer, self.examples())

    def _lost(self, journal: Journal) -> set[str]:
        """Returns the ids whose line in the outputs that are there is "ok" and would be no more."""
        path = self.file("jsonl")
        if not path.is_file():
            return set()
        lines = read_json_lines(epath.Path(path))  # without their texts, which may be long
        is_ok = {str(line.get("id")): line.get("status", "ok") == "ok" for _, line in lines}
        now = {a.example.id for a in self._found(journal) if a.is_ok}
        return {id_ for id_, before in is_ok.items() if before} - now

    def _would_lose(self, count: int) -> str:
        return (
            f"{self.file('jsonl')}: kept as it was: {count} of its ok lines have no answer to what "
            "is asked now (the prompt, the parameters, the model or the examples have changed); "
            "ask for all of them, give the teacher another --name, or write over them with "
            "--replace"
        )

    def _check_own(self, journal: Journal, *, parquet: bool, replace: bool) -> None:
        """Raises the user's error where a file to be written is another's than this job's."""
        if replace:
            return
        copy, target = self._copy, self.file("jsonl")
        declared, there = self._declarations
        both = copy is not None and declared.is_file() and there.is_file()
        if both and declared.read_bytes() != there.read_bytes():
            raise UserError(f"{there}: differs from {declared}; make them the same")
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
                why = f"and {self.journal_path.name} beside it did not write it"
            elif ":" in exported and exported.split(":")[: len(owner)] != [*owner]:
                why = "from another file of examples or another model"
            else:
                continue
            other = "name another folder with --output" if path == copy else "use another --name"
            raise UserError(f"{path}: is there already, {why}; {other}, or --replace it")

    @property
    def _owner(self) -> tuple[str, str]:
        """Hashes of which examples the outputs are for, and of whose they are."""
        source = os.path.relpath(self.source.resolve(), self.folder.resolve())
        return _short_hash(source), _short_hash(self.writer.teacher.model)

    def _fingerprint(self, journal: Journal) -> str:
        """Returns a hash of all that an export is made of, after those of its owner."""
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
    path: Path, prompt: str, teacher: Teacher, *, output: Path | None, name: str | None
) -> Job:
    """Returns the job of a file of JSON lines; its labels may be declared beside it, see
    `read_declared`.

    Args:
      path: of the file.
      prompt: a name or a file, see `load_prompt`.
      teacher: who is asked.
      output: the folder to write to; None for the file's own.
      name: of the teacher in the names of files and mixtures; None for the model's.

    Raises:
      UserError: something of it is missing or wrong.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; give one of its files, such as {path / 'train.jsonl'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = load_prompt(prompt)
    labels = read_declared(path, found.labels, where=f"prompt {found.name}")
    return Job(
        source=path,
        stem=path.stem,
        folder=output or path.parent,
        name=_name(name, teacher),
        writer=Writer(with_labels(found, labels), teacher),
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
    """Returns the job of a split of a released dataset; the prompt's default is the dataset's.

    Raises:
      UserError: something of it is missing or wrong.
    """
    if dataset.source_split(split) != split:
        raise UserError(
            f"{dataset.name} has no file for {split}: it is a tenth of train; annotate --split "
            "train"
        )
    (file,) = dataset.files(split)
    if in_bucket(file):
        raise UserError(f"{file}: in a bucket; annotate a copy on this machine")
    source = Path(file)
    return Job(
        source=source,
        stem=source.stem if output is None else split,
        folder=output or source.parent,
        name=_name(name, teacher),
        writer=Writer(load_prompt(prompt or PROMPT_OF.get(dataset.name, dataset.name)), teacher),
        rows=tuple(dataset.source.examples(split)),
    )


def _name(name: str | None, teacher: Teacher) -> str:
    if name is not None and file_name(name) != name:
        raise UserError(f"--name {name!r}: use letters, digits, '_', '-' and '.'")
    name = file_name(teacher.model) if name is None else name
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"{name[:20]}...: {len(name)} characters are too many for a file's name; give a "
            "shorter one with --name"
        )
    return name
