"""The ledger: what became of every row of a file that a task reads.

Each row has one fate, and their counts add up to the file's rows. So a row is trained on, or it is
counted with the reason.
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
    "truncated",  # trained, cut to the limit of length
    "unwritable",  # trained, as what the vocabulary makes of the label
    "duplicate",  # trained, and an earlier row has the same input and target
    "conflicting duplicate",  # trained, and an earlier row has the same input and another label
)
LEFT_OUT = (
    *(NO_LABEL, OUTSIDE, EMPTY_INPUT),
    *(MISSING, *(status for status in STATUSES if status != "ok"), "stale"),
    *REASONS,
    "in another split",  # held out for validation, or trained on where the split is that one
    "not in TRAIN_FRACTION",
)
NOT_DRAWN = (EMPTY_INPUT, "in another split", "not in TRAIN_FRACTION")
SHOWN = 3  # ids named


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The fates of a file's rows in one task.

    Attributes:
      rows: how many rows the file has.
      fates: how many rows have each fate, in the order of `USED` and `LEFT_OUT`; those that none
        has are not there.
      strays: how many outputs of the teacher are for no row of the file.
      stray_ids: the first of their ids.
    """

    rows: int
    fates: Mapping[str, int]
    strays: int = 0
    stray_ids: Sequence[str] = ()

    @property
    def drawn(self) -> int:
        """How many rows with an input the split's fraction has, whatever tasks can use of them.

        >>> Ledger(10, {"trained": 6, "no label": 1, "empty input": 1, "in another split": 2}).drawn
        7
        """
        return self.rows - sum(self.fates.get(fate, 0) for fate in NOT_DRAWN)

    def as_json(self) -> dict[str, Any]:
        """Returns the ledger for JSON; `Ledger(**value)` reads it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Returns the ledger as a line without the name of its task."""
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
    """Returns what became of each row of the file that holds a split.

    Args:
      task: that read it.
      dataset: of the task.
      split: "train", "valid" or "test".
      read: what the task read.
      fraction: the part of the training examples that was used; see `Dataset.examples`.
      truncated: ids of the examples whose row was cut.
      unwritable: ids of the examples whose label the vocabulary cannot write.
    """
    ids = [example.id for example in dataset.source.examples(dataset.source_split(split))]
    fates = _fates_of_rows(read.rows, truncated, unwritable, labels=task.kind != "rationale")
    found = collections.Counter({**fates, **read.left_out}.values())
    drawn = dataset.count_drawn(split, len(ids), fraction=fraction)
    found["not in TRAIN_FRACTION"] = len(ids) - drawn
    found["in another split"] = drawn - len(fates) - len(read.left_out)
    outputs = dataset.outputs(split, task.teacher) if task.teacher else {}
    known = set(ids)
    strays = [id_ for id_ in outputs if id_ not in known]
    return Ledger(
        rows=len(ids),
        fates={fate: found[fate] for fate in (*USED, *LEFT_OUT) if found[fate]},
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
    """Returns the fate of each example that has a row, by its id."""
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
