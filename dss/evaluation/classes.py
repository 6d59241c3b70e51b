"""Scores by class: precision, recall and F1 of each label, and their means."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

__all__ = ["ClassMetrics", "ClassScore"]


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """Counts of a class, with its precision, recall and F1. A ratio of 0/0 is 0.

    Attributes:
      label: label of the class.
      support: number of examples whose target is the label.
      predicted: number of predictions of the label.
      correct: number of these predictions whose target is the label.
    """

    label: str
    support: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float:
        """Fraction of the label's predictions that are correct; 0 if it is never predicted."""
        return self.correct / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """Fraction of the label's examples that are predicted correctly; 0 without examples."""
        return self.correct / max(1, self.support)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 2 correct / (support + predicted)."""
        return 2 * self.correct / max(1, self.support + self.predicted)


@dataclasses.dataclass(frozen=True)
class ClassMetrics:
    """Scores of each class, and their means over classes.

    Attributes:
      by_class: scores of each class.
    """

    by_class: tuple[ClassScore, ...]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(c.support for c in self.by_class)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have examples or predictions, in [0, 1]."""
        scores = [c.f1 for c in self.by_class if c.support or c.predicted]
        return sum(scores) / len(scores)

    @property
    def weighted_f1(self) -> float:
        """Mean F1 of the classes, weighted by their support, in [0, 1]."""
        return sum(c.support * c.f1 for c in self.by_class) / self.examples

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have examples, in [0, 1]."""
        recalls = [c.recall for c in self.by_class if c.support]
        return sum(recalls) / len(recalls)

    @property
    def majority(self) -> ClassScore:
        """Class with the most examples; the first on a tie."""
        return max(self.by_class, key=lambda c: c.support)

    @property
    def majority_accuracy(self) -> float:
        """Accuracy of always predicting the most frequent label, in [0, 1]."""
        return self.majority.support / self.examples

    @classmethod
    def of(
        cls, closed: Sequence[str], targets: Sequence[str], predictions: Sequence[str]
    ) -> "ClassMetrics":
        """Returns the scores by class of some predictions.

        The classes are the closed set, then the other targets in alphabetical order. A prediction
        of another text counts against the recall of its target's class only.

        >>> metrics = ClassMetrics.of((), ["no", "yes", "yes"], ["no", "no", "maybe"])
        >>> [(c.label, c.precision, c.recall) for c in metrics.by_class]
        [('no', 0.5, 1.0), ('yes', 0.0, 0.0)]
        >>> metrics.balanced_accuracy
        0.5

        Args:
          closed: the closed set of labels; empty if any text is allowed.
          targets: the N target labels.
          predictions: the N predicted labels.

        Raises:
          ValueError: if there are no predictions.
        """
        if not predictions:
            raise ValueError("no predictions to score")
        targets, predictions = ([text.strip() for text in t] for t in (targets, predictions))
        labels = dict.fromkeys([*map(str.strip, closed), *sorted(set(targets))])
        support, predicted = collections.Counter(targets), collections.Counter(predictions)
        pairs = zip(targets, predictions, strict=True)
        correct = collections.Counter(target for target, text in pairs if target == text)
        return cls(tuple(ClassScore(n, support[n], predicted[n], correct[n]) for n in labels))

    def summary(self) -> dict[str, Any]:
        """Returns the metrics as JSON-serializable values."""
        return {
            "macro_f1": self.macro_f1,
            "weighted_f1": self.weighted_f1,
            "balanced_accuracy": self.balanced_accuracy,
            "majority": {"label": self.majority.label, "accuracy": self.majority_accuracy},
            "by_class": [
                {
                    "label": c.label,
                    "precision": c.precision,
                    "recall": c.recall,
                    "f1": c.f1,
                    "support": c.support,
                }
                for c in self.by_class
            ],
        }
