"""Confusion matrix of a closed set of labels."""

import dataclasses
from collections.abc import Sequence

__all__ = ["Confusion"]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Counts of predicted labels by target label.

    Attributes:
      labels: the closed set of L labels.
      counts: numbers of examples, [L, L + 1]: row i, column j counts targets i predicted as label
        j; the last column counts predictions outside the set.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def examples(self) -> tuple[int, ...]:
        """Number of examples of each target label."""
        return tuple(sum(row) for row in self.counts)

    @property
    def right(self) -> tuple[int, ...]:
        """Number of correct predictions for each target label."""
        return tuple(row[i] for i, row in enumerate(self.counts))

    @property
    def accuracies(self) -> tuple[float | None, ...]:
        """Accuracy on the examples of each target label, in [0, 1]; None if it has none."""
        pairs = zip(self.right, self.examples, strict=True)
        return tuple(right / examples if examples else None for right, examples in pairs)

    @classmethod
    def of(
        cls, labels: Sequence[str], targets: Sequence[str], predictions: Sequence[str]
    ) -> "Confusion":
        """Returns the confusion matrix of some predictions; targets outside the set are skipped.

        >>> Confusion.of(("no", "yes"), ["no", "yes", "yes"], ["no", "no", "maybe"]).counts
        ((1, 0, 0), (1, 0, 1))
        """
        index = {label.strip(): i for i, label in enumerate(labels)}
        counts = [[0] * (len(labels) + 1) for _ in labels]
        for target, prediction in zip(targets, predictions, strict=True):
            row = index.get(target.strip())
            if row is not None:
                counts[row][index.get(prediction.strip(), len(labels))] += 1
        return cls(tuple(labels), tuple(map(tuple, counts)))
