"""The token store: a tokenized split of a mixture, in memory-mapped arrays.

For every task of the mixture, a store has the token ids of all inputs and targets in flat arrays
with offsets, and the row of each example in the task. Training reads only token stores: no text, no
TensorFlow.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dss.data.rationales import ALL_RATIONALES, RationaleConfig
from dss.data.vocabulary import Vocabulary, cut, is_cut, round_trip
from dss.errors import DataError
from dss.mixtures.ledger import Ledger, make_ledger
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import Task, TaskRows, TextRow

__all__ = ["Ragged", "TaskTokens", "TokenStore", "cache_dir", "open_store", "tokenize"]

FORMAT = 6  # part of the cache key; increment it when the meaning of the arrays changes


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences of token ids: sequence i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # [all tokens] int32
    offsets: np.ndarray  # [N + 1] int64
    num_cut: int = 0  # number of truncated sequences

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], num_cut: int = 0) -> "Ragged":
        """Returns the sequences as one flat array."""
        offsets = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        tokens = np.fromiter((t for s in sequences for t in s), np.int32, offsets[-1])
        return cls(tokens, offsets, num_cut)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Lengths in tokens, [N] int64."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class TaskTokens:
    """The tokenized rows of a task: row i has input `inputs[i]` and target `targets[i]`."""

    inputs: Ragged
    targets: Ragged
    ledger: Ledger | None = None  # the outcomes of the file's rows; None without a file


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A tokenized split of a mixture.

    Attributes:
      tasks: the tokens of each task, in the mixture's order.
      rows: [N examples, K tasks] int32, the first row of each example in each task; -1 for none,
        such as for an unparsed rationale.
      counts: [N, K] int32, the number of adjacent rows of each example in each task; with several
        rationales, training uses them in turn.
      ids: [N], the ids of the examples.
    """

    tasks: tuple[TaskTokens, ...]
    rows: np.ndarray
    counts: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> tuple[int, int]:
        """The lengths of the longest input and target, in tokens."""
        inputs, targets = self._longest_of_tasks
        return max(inputs), max(targets)

    @property
    def longest_together(self) -> tuple[int, int]:
        """The length of the longest input, and an upper bound on the total length of an example's
        targets, in tokens.
        """
        inputs, targets = self._longest_of_tasks
        return max(inputs), sum(targets)

    @property
    def _longest_of_tasks(self) -> tuple[list[int], list[int]]:
        return (
            [int(t.inputs.lengths.max(initial=1)) for t in self.tasks],
            [int(t.targets.lengths.max(initial=1)) for t in self.tasks],
        )

    def lengths(self, tasks: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns the lengths of the inputs and targets of some sequences, in tokens, [n, 2]."""
        out = np.empty((len(tasks), 2), np.int64)
        for k, task in enumerate(self.tasks):
            indices = np.flatnonzero(tasks == k)
            for side, ragged in enumerate((task.inputs, task.targets)):
                first = ragged.offsets[rows[indices]]
                out[indices, side] = ragged.offsets[rows[indices] + 1] - first
        return out

    def ids_of(self, tasks: np.ndarray, rows: np.ndarray) -> list[str]:
        """Returns the ids of the examples of some sequences, without duplicates."""
        pairs = zip(tasks, rows, strict=True)
        first, end = self.rows, self.rows + self.counts
        examples = [np.flatnonzero((first[:, k] <= r) & (r < end[:, k]))[0] for k, r in pairs]
        return [self.ids[i] for i in dict.fromkeys(examples)]

    def save(self, path: Path) -> None:
        """Writes the store to the folder `path`, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
            folder = Path(temporary) / "store"
            folder.mkdir()
            for k, task in enumerate(self.tasks):
                for side in ("inputs", "targets"):
                    ragged = getattr(task, side)
                    np.save(folder / f"{k}-{side}-tokens.npy", ragged.tokens)
                    np.save(folder / f"{k}-{side}-offsets.npy", ragged.offsets)
            np.save(folder / "rows.npy", self.rows)
            np.save(folder / "counts.npy", self.counts)
            (folder / "ids.json").write_text(json.dumps(self.ids), encoding="utf-8")
            facts = [
                [t.inputs.num_cut, t.targets.num_cut, t.ledger and t.ledger.as_json()]
                for t in self.tasks
            ]
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            try:
                os.rename(folder, path)
            except OSError:
                if not path.is_dir():  # otherwise another process has written the same store
                    raise

    @classmethod
    def load(cls, path: Path) -> "TokenStore":
        """Opens the store in the folder `path`; its tokens are memory-mapped."""
        rows = np.load(path / "rows.npy")

        def ragged(name: str, num_cut: int) -> Ragged:
            tokens = np.load(path / f"{name}-tokens.npy", mmap_mode="r")
            return Ragged(tokens, np.load(path / f"{name}-offsets.npy"), num_cut)

        tasks = tuple(
            TaskTokens(
                ragged(f"{k}-inputs", inputs),
                ragged(f"{k}-targets", targets),
                ledger and Ledger(**ledger),
            )
            for k, (inputs, targets, ledger) in enumerate(
                json.loads((path / "facts.json").read_text("utf-8"))
            )
        )
        ids = tuple(json.loads((path / "ids.json").read_text("utf-8")))
        return cls(tasks, rows, np.load(path / "counts.npy"), ids)


def tokenize(
    rows_by_task: Sequence[Sequence[TextRow]],
    vocabulary: Vocabulary,
    *,
    inputs_length: int,
    targets_length: int,
) -> TokenStore:
    """Returns the store of text rows, joined across tasks by the ids of the rows.

    Args:
      rows_by_task: the rows of each task; rows of the same example are adjacent.
      vocabulary: the vocabulary that encodes the texts.
      inputs_length: the maximum input length in tokens, including EOS; longer inputs are truncated.
      targets_length: the maximum target length.
    """

    def ragged(texts: Sequence[str], length: int) -> Ragged:
        encoded = list(map(vocabulary.encode, texts))
        num_cut = sum(len(ids) >= length for ids in encoded)
        return Ragged.of([cut(ids, length) for ids in encoded], num_cut)

    index: dict[str, int] = {}
    for rows in rows_by_task:
        for row in rows:
            index.setdefault(row.id, len(index))
    table = np.full((len(index), len(rows_by_task)), -1, np.int32)
    counts = np.zeros_like(table)
    tasks = []
    for k, rows in enumerate(rows_by_task):
        for i, row in enumerate(rows):
            cell = index[row.id], k
            table[cell] = i - counts[cell]
            counts[cell] += 1
        tasks.append(
            TaskTokens(
                ragged([row.inputs for row in rows], inputs_length),
                ragged([row.targets for row in rows], targets_length),
            )
        )
    return TokenStore(tuple(tasks), table, counts, tuple(index))


def cache_dir() -> Path:
    """Returns the cache folder: DSS_CACHE, or `dss` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dss"
    return Path(os.environ.get("DSS_CACHE", default))


def _key(
    mixture: Mixture, split: str, vocabulary: Vocabulary, lengths: tuple[int, int], options: dict
) -> str:
    parts: list = [FORMAT, split, vocabulary.fingerprint, lengths, sorted(options.items())]
    for task in mixture.tasks:
        dataset = task.dataset
        files = dataset.files(split, task.teacher)
        hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
        held_out = not dataset.source.has("valid")
        parts.append([dataset.name, task.kind, task.teacher, task.prefix, hashes, held_out])
        parts.append(dataset.labels.closed)  # examples are checked against it when read
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_store(
    mixture: Mixture,
    split: str,
    vocabulary: Vocabulary,
    *,
    inputs_length: int,
    targets_length: int,
    fraction: float = 1.0,
    seed: int = 0,
    keep_unparsed: bool = False,
    rationales: RationaleConfig = ALL_RATIONALES,
) -> TokenStore:
    """Returns the token store of a mixture's split, from the cache if data and options are the
    same.

    Args:
      mixture: the mixture of the tasks.
      split: "train", "valid" or "test".
      vocabulary: the vocabulary that encodes the texts.
      inputs_length: the maximum input length in tokens.
      targets_length: the maximum target length in tokens.
      fraction: the fraction of the training examples to use, in (0, 1].
      seed: the seed of the subsample.
      keep_unparsed: whether to train on empty targets where parsing failed, as the reference
        implementation does.
      rationales: the selection of rationales in the training split.

    Raises:
      DataError: if a file is missing or malformed, or the split has no rows.
    """
    options: dict[str, Any] = {"fraction": fraction, "seed": seed, "keep_unparsed": keep_unparsed}
    key_options = options | dataclasses.asdict(rationales)
    key = _key(mixture, split, vocabulary, (inputs_length, targets_length), key_options)
    path = cache_dir() / "tokens" / f"{mixture.name}-{split}-{key}"
    if not path.is_dir():
        reads = [task.read(split, **options, rationales=rationales) for task in mixture.tasks]
        store = tokenize(
            [read.rows for read in reads],
            vocabulary,
            inputs_length=inputs_length,
            targets_length=targets_length,
        )
        limits = inputs_length, targets_length
        ledgers = [
            _ledger(task, split, read, tokens, vocabulary, limits, fraction)
            for task, read, tokens in zip(mixture.tasks, reads, store.tasks, strict=True)
        ]
        for task, read, ledger in zip(mixture.tasks, reads, ledgers, strict=True):
            # A validation split without rationales still has a label loss.
            if not read.rows and (split == "train" or not any(read.rows for read in reads)):
                raise DataError(
                    f"{task.name}: no {split} rows; of {ledger.rows:,} rows in the file: {ledger}"
                )
        pairs = zip(store.tasks, ledgers, strict=True)
        tasks = tuple(dataclasses.replace(tokens, ledger=ledger) for tokens, ledger in pairs)
        store = dataclasses.replace(store, tasks=tasks)
        store.save(path)
    return TokenStore.load(path)


def _ledger(
    task: Task,
    split: str,
    read: TaskRows,
    tokens: TaskTokens,
    vocabulary: Vocabulary,
    limits: tuple[int, int],
    fraction: float,
) -> Ledger:
    """Returns a task's ledger, with rows that are truncated or have an unwritable label."""
    at_limit = (tokens.inputs.lengths >= limits[0]) | (tokens.targets.lengths >= limits[1])

    truncated_rows = [
        row
        for row in (read.rows[i] for i in np.flatnonzero(at_limit))
        if is_cut(vocabulary, row.inputs, limits[0]) or is_cut(vocabulary, row.targets, limits[1])
    ]
    decoded: dict[str, str] = {}
    if task.kind == "label":
        labels = {row.targets.strip() for row in read.rows}
        decoded = {label: round_trip(vocabulary, label) for label in labels}
    return make_ledger(
        task,
        task.dataset,
        split,
        read,
        fraction=fraction,
        truncated={row.id for row in truncated_rows},
        unwritable={
            row.id for row in read.rows if (text := row.targets.strip()) != decoded.get(text, text)
        },
    )
