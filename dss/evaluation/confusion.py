"""Which label of a closed set is taken for which."""

import dataclasses
from collections.abc import Sequence

__all__ = ["Confusion"]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Predictions counted by the right label.

    Attributes:
      labels: the closed set, L labels.
      counts: [L, L + 1]; row i, column j: examples of label i predicted as label j, in the last
        column as none of the labels.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def examples(self) -> tuple[int, ...]:
        """How many examples each label has."""
        return tuple(sum(row) for row in self.counts)

    @property
    def right(self) -> tuple[int, ...]:
        """How many of each label's examples are predicted as it."""
        return tuple(row[i] for i, row in enumerate(self.counts))

    @property
    def accuracies(self) -> tuple[float | None, ...]:
        """The accuracy on each label's examples, in [0, 1]; None where it has none."""
        pairs = zip(self.right, self.examples, strict=True)
        return tuple(right / examples if examples else None for right, examples in pairs)

    @classmethod
    def of(
        cls, labels: Sequence[str], targets: Sequence[str], predictions: Sequence[str]
    ) -> "Confusion":
        """Returns the counts of some predictions; a target that is none of the labels is left out.

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
