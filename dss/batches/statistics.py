"""Statistics of a dataset's splits and of a mixture's tasks."""

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
SHOWN = 3  # labels listed in a message


@dataclasses.dataclass(frozen=True)
class TeacherStatistics:
    """A teacher's outputs for a split.

    Attributes:
      statuses: the number of outputs by status; "missing" counts the examples without an output.
      judged: the number of examples with a gold label and an output that is not stale.
      correct: the number of judged examples whose teacher label is correct.
    """

    statuses: dict[str, int]
    judged: int
    correct: int

    @property
    def accuracy(self) -> float | None:
        """The teacher's accuracy on gold labels, in [0, 1]; None without judged examples."""
        return self.correct / self.judged if self.judged else None


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """The number of examples of a split, and the outputs of each teacher for it."""

    examples: int
    labelled: int  # examples with a gold label
    teachers: dict[str, TeacherStatistics]


def count_statuses(
    examples: Sequence[Example], outputs: Mapping[str, TeacherOutput]
) -> dict[str, int]:
    """Returns the number of examples by the status of their output, "missing" without one."""
    counts = collections.Counter(
        outputs[e.id].status if e.id in outputs else "missing" for e in examples
    )
    return {name: counts[name] for name in (*STATUSES, "stale", "missing") if counts[name]}


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
      dataset: the dataset.
      split: "train", "valid" or "test".
      teachers: the teachers with outputs for the split.
      fraction: the fraction of the training examples; see `Dataset.examples`.
      seed: the seed of the subsample.

    Raises:
      DataError: if a file is missing or malformed, or the split has no examples.
    """
    examples = dataset.examples(split, fraction=fraction, seed=seed)
    statistics = {}
    for teacher in teachers:
        outputs = dataset.outputs(split, teacher)
        verdicts = [
            dataset.labels.is_right(outputs[e.id].label or "", e.label)
            for e in examples
            if e.id in outputs and e.label is not None and outputs[e.id].status != "stale"
        ]
        statuses = count_statuses(examples, outputs)
        statistics[teacher] = TeacherStatistics(statuses, len(verdicts), sum(verdicts))
    return SplitStatistics(len(examples), sum(e.label is not None for e in examples), statistics)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Statistics of text lengths in tokens, including EOS.

    Attributes:
      percentiles: the 50th, 90th, 99th and 100th percentile of the lengths.
      total: the total number of tokens.
      truncated: the fraction of texts longer than the limit, in [0, 1].
    """

    percentiles: tuple[int, ...]
    total: int
    truncated: float

    @classmethod
    def of(cls, lengths: Sequence[int], limit: int) -> "Lengths":
        """Returns the statistics of lengths (at least one), given their limit."""
        array = np.asarray(lengths)
        ranks = np.percentile(array, PERCENTILES, method="inverted_cdf")
        return cls(tuple(int(r) for r in ranks), int(array.sum()), float((array > limit).mean()))


def measure_lengths(
    rows: Sequence[TextRow], vocabulary: Vocabulary, *, inputs_length: int, targets_length: int
) -> tuple[Lengths, Lengths]:
    """Returns the lengths of the inputs and of the targets of a task's rows, not truncated."""
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
    """Returns warnings about similar labels, labels that the metric cannot read, and labels and
    inputs that the vocabulary cannot represent.

    Args:
      mixture: the mixture to train on.
      vocabulary: the student's vocabulary.
      store: the mixture's training tokens.
      fraction: the fraction of the training examples in use; see `Dataset.examples`.
      seed: the seed of the subsample.
    """
    lines = []
    examples = []
    if mixture.tasks[0].kind != "rationale":
        examples = mixture.dataset.examples("train", fraction=fraction, seed=seed)
    lines += describe_look_alikes(e.label for e in examples if e.label is not None)
    distinct = sorted({e.label for e in examples if e.label is not None})
    metric = mixture.dataset.labels.metric
    unreadable = [label for label in distinct if not mixture.dataset.labels.is_readable(label)]
    if unreadable:
        shown = ", ".join(map(repr, unreadable[:SHOWN]))
        more = ", ..." if len(unreadable) > SHOWN else ""
        lines.append(
            f"the metric {metric!r} cannot read {len(unreadable)} of {len(distinct)} different "
            f"labels: {shown}{more}; a prediction matches such a label only with the same text"
        )
    changed = [(a, b) for a in distinct if (b := round_trip(vocabulary, a)) != a]
    if changed:
        shown = ", ".join(f"{a!r} (written as {b!r})" for a, b in changed[:SHOWN])
        more = ", ..." if len(changed) > SHOWN else ""
        lines.append(
            f"the vocabulary cannot represent {len(changed)} of {len(distinct)} different labels: "
            f"{shown}{more}; predictions are compared with the labels as it writes them"
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
