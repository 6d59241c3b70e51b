"""The ledger: how many rows of a data file a task uses, and why it skips the others.

Each row has one outcome (`fate`), so the counts add up to the number of rows.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dss.data.datasets import Dataset
from dss.data.examples import STATUSES
from dss.data.rationales import REASONS
from dss.mixtures.tasks import EMPTY_INPUT, MISSING, NO_LABEL, OUTSIDE, Task, TaskRows, TextRow

__all__ = ["LEFT_OUT", "USED", "Ledger", "make_ledger"]

USED = (
    "trained",
    "truncated",  # trained, truncated to the maximum length
    "unwritable",  # trained, though the vocabulary cannot represent the label exactly
    "duplicate",  # trained, and an earlier row has the same input and target
    "conflicting duplicate",  # trained, and an earlier row has the same input and another label
)
LEFT_OUT = (
    *(NO_LABEL, OUTSIDE, EMPTY_INPUT),
    *(MISSING, *(status for status in STATUSES if status != "ok"), "stale"),
    *REASONS,
    "in another split",  # held out for validation; or, of a held-out split, trained on
    "not in TRAIN_FRACTION",
)
NOT_DRAWN = (EMPTY_INPUT, "in another split", "not in TRAIN_FRACTION")
SHOWN = 3  # ids listed


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The outcome counts of a file's rows in one task.

    Attributes:
      rows: the number of rows in the file.
      fates: the number of rows with each outcome, in the order of `USED` and `LEFT_OUT`, without
        zeros.
      strays: the number of teacher outputs whose id no row has.
      stray_ids: the first few of these ids.
    """

    rows: int
    fates: Mapping[str, int]
    strays: int = 0
    stray_ids: Sequence[str] = ()

    @property
    def drawn(self) -> int:
        """The number of rows with an input in the split's fraction, used by the task or not.

        >>> Ledger(10, {"trained": 6, "no label": 1, "empty input": 1, "in another split": 2}).drawn
        7
        """
        return self.rows - sum(self.fates.get(fate, 0) for fate in NOT_DRAWN)

    def as_json(self) -> dict[str, Any]:
        """Returns the ledger as a JSON value; `Ledger(**value)` restores it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Returns the ledger as one line, without the name of its task."""
        parts = [f"{count:,} {fate}" for fate, count in self.fates.items()]
        if self.strays:
            names = ", ".join(map(repr, self.stray_ids))
            more = ", ..." if self.strays > len(self.stray_ids) else ""
            parts.append(f"and {self.strays:,} outputs for no row ({names}{more})")
        return ", ".join(parts)


def make_ledger(
    task: Task,
    dataset: Dataset,
    split: str,
    read: TaskRows,
    *,
    fraction: float = 1.0,
    truncated: Collection[str] = (),
    unwritable: Collection[str] = (),
) -> Ledger:
    """Returns the ledger of the file of a split.

    Args:
      task: the task that reads the file.
      dataset: the dataset of the task.
      split: "train", "valid" or "test".
      read: the rows of the split in the task.
      fraction: the fraction of the training examples in use; see `Dataset.examples`.
      truncated: the ids of the examples with a truncated row.
      unwritable: the ids of the examples whose label the vocabulary cannot represent exactly.
    """
    ids = [example.id for example in dataset.source.examples(dataset.source_split(split))]
    fates = _fates_of_rows(read.rows, truncated, unwritable, labels=task.kind != "rationale")
    counts = collections.Counter({**fates, **read.left_out}.values())
    drawn = dataset.count_drawn(split, len(ids), fraction=fraction)
    counts["not in TRAIN_FRACTION"] = len(ids) - drawn
    counts["in another split"] = drawn - len(fates) - len(read.left_out)
    outputs = dataset.outputs(split, task.teacher) if task.teacher else {}
    known = set(ids)
    strays = [id_ for id_ in outputs if id_ not in known]
    return Ledger(
        rows=len(ids),
        fates={fate: counts[fate] for fate in (*USED, *LEFT_OUT) if counts[fate]},
        strays=len(strays),
        stray_ids=tuple(strays[:SHOWN]),
    )


def _fates_of_rows(
    rows: Sequence[TextRow],
    truncated: Collection[str],
    unwritable: Collection[str],
    *,
    labels: bool,
) -> dict[str, str]:
    """Returns the outcome of each example with a row, by its id."""
    first: dict[str, TextRow] = {}
    fates: dict[str, str] = {}
    for row in rows:
        earlier = first.setdefault(" ".join(row.inputs.split()), row)
        if earlier.id != row.id and earlier.targets == row.targets:
            fate = "duplicate"
        elif earlier.id != row.id and labels:
            fate = "conflicting duplicate"
        elif row.id in unwritable:
            fate = "unwritable"
        else:
            fate = "truncated" if row.id in truncated else "trained"
        fates.setdefault(row.id, fate)
    return fates
