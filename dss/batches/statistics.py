"""What a dataset's splits and a mixture's tasks hold, in numbers."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dss.batches.store import TokenStore
from dss.data.datasets import Dataset
from dss.data.examples import STATUSES, Example, TeacherOutput
from dss.data.labels import describe_look_alikes
from dss.data.vocabulary import UNK, Vocabulary, round_trip
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import TextRow

__all__ = [
    "Lengths",
    "SplitStatistics",
    "TeacherStatistics",
    "count_statuses",
    "describe_labels",
    "measure_lengths",
    "measure_split",
]

PERCENTILES = (50, 90, 99, 100)
SHOWN = 3  # labels named in a line


@dataclasses.dataclass(frozen=True)
class TeacherStatistics:
    """A teacher's outputs for a split.

    Attributes:
      statuses: how many outputs have each status, and "missing": examples without an output.
      judged: examples that have a gold label and an output that is not stale.
      correct: those of them whose label is right.
    """

    statuses: dict[str, int]
    judged: int
    correct: int

    @property
    def accuracy(self) -> float | None:
        """The teacher's accuracy against gold, in [0, 1]; None where nothing can be judged."""
        return self.correct / self.judged if self.judged else None


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """A split: its examples, how many have a gold label, and what each teacher wrote."""

    examples: int
    labelled: int
    teachers: dict[str, TeacherStatistics]


def count_statuses(
    examples: Sequence[Example], outputs: Mapping[str, TeacherOutput]
) -> dict[str, int]:
    """Returns how many examples have an output of each status, "missing" for those without one."""
    found = collections.Counter(
        outputs[e.id].status if e.id in outputs else "missing" for e in examples
    )
    return {name: found[name] for name in (*STATUSES, "stale", "missing") if found[name]}


def measure_split(
    dataset: Dataset,
    split: str,
    teachers: Sequence[str],
    *,
    fraction: float = 1.0,
    seed: int = 0,
) -> SplitStatistics:
    """Returns the statistics of a split.

    Args:
      dataset: which.
      split: "train", "valid" or "test".
      teachers: those that have outputs for it.
      fraction: of the training examples; see `Dataset.examples`.
      seed: of the subsample.

    Raises:
      UserError: see `Dataset.examples`.
    """
    examples = dataset.examples(split, fraction=fraction, seed=seed)
    found = {}
    for teacher in teachers:
        outputs = dataset.outputs(split, teacher)
        verdicts = [
            dataset.labels.is_right(outputs[e.id].label or "", e.label)
            for e in examples
            if e.id in outputs and e.label is not None and outputs[e.id].status != "stale"
        ]
        statuses = count_statuses(examples, outputs)
        found[teacher] = TeacherStatistics(statuses, len(verdicts), sum(verdicts))
    return SplitStatistics(len(examples), sum(e.label is not None for e in examples), found)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of some texts in tokens, EOS counted.

    Attributes:
      percentiles: the lengths at 50, 90, 99 and 100 percent.
      total: tokens in all.
      truncated: the share of texts that are longer than the limit, in [0, 1].
    """

    percentiles: tuple[int, ...]
    total: int
    truncated: float

    @classmethod
    def of(cls, lengths: Sequence[int], limit: int) -> "Lengths":
        """Returns the statistics of some lengths (at least one) under a limit."""
        array = np.asarray(lengths)
        ranks = np.percentile(array, PERCENTILES, method="inverted_cdf")
        return cls(tuple(int(r) for r in ranks), int(array.sum()), float((array > limit).mean()))


def measure_lengths(
    rows: Sequence[TextRow], vocabulary: Vocabulary, *, inputs_length: int, targets_length: int
) -> tuple[Lengths, Lengths]:
    """Returns the lengths of the inputs and of the targets of a task's rows, before cutting."""
    inputs = [len(vocabulary.encode(row.inputs)) + 1 for row in rows]
    targets = [len(vocabulary.encode(row.targets)) + 1 for row in rows]
    return Lengths.of(inputs, inputs_length), Lengths.of(targets, targets_length)


def describe_labels(
    mixture: Mixture,
    vocabulary: Vocabulary,
    store: TokenStore,
    *,
    fraction: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Returns lines about labels that look alike, and about what of labels and inputs the
    vocabulary cannot write; often none.

    Args:
      mixture: the mixture that is trained on.
      vocabulary: the student's vocabulary.
      store: the mixture's training tokens.
      fraction: the part of the training examples that is used; see `Dataset.examples`.
      seed: the seed of the subsample.
    """
    lines = []
    examples = []
    if mixture.tasks[0].kind != "rationale":
        examples = mixture.dataset.examples("train", fraction=fraction, seed=seed)
    lines += describe_look_alikes(e.label for e in examples if e.label is not None)
    distinct = sorted({e.label for e in examples if e.label is not None})
    metric = mixture.dataset.labels.metric
    unread = [label for label in distinct if not mixture.dataset.labels.is_readable(label)]
    if unread:
        shown = ", ".join(map(repr, unread[:SHOWN])) + (", ..." if len(unread) > SHOWN else "")
        lines.append(
            f"the metric {metric!r} cannot read {len(unread)} of {len(distinct)} different labels: "
            f"{shown}; each is right against the same text alone"
        )
    changed = [(a, b) for a in distinct if (b := round_trip(vocabulary, a)) != a]
    if changed:
        shown = ", ".join(f"{a!r} (written as {b!r})" for a, b in changed[:SHOWN])
        more = ", ..." if len(changed) > SHOWN else ""
        lines.append(
            f"the vocabulary cannot write {len(changed)} of {len(distinct)} different labels: "
            f"{shown}{more}; predictions are compared with what it writes"
        )
    inputs = [task.inputs.tokens for task in store.tasks]
    total = sum(map(len, inputs))
    unknown = sum(int(np.count_nonzero(tokens == UNK)) for tokens in inputs)
    if unknown:
        lines.append(
            f"the vocabulary has no token for {unknown:,} of {total:,} input tokens "
            f"({unknown / total:.2%}); characters such as {{ < ~ and those of most scripts "
            "are not in T5's"
        )
    return lines
