"""Calibration of label probabilities: reliability bins, calibration error, Brier score."""

import dataclasses
from collections.abc import Sequence

import numpy as np

__all__ = ["Calibration", "ReliabilityBin"]

BINS = 10


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Bin of a reliability diagram: examples predicted with similar confidence.

    Attributes:
      examples: number of examples.
      confidence: mean probability of the predicted label, in [0, 1].
      accuracy: accuracy of the predicted label, in [0, 1].
    """

    examples: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Agreement between the probabilities of labels and their accuracy.

    Attributes:
      bins: reliability bins, by rising confidence. They have equal numbers of examples, except that
        examples of equal confidence are never split.
      expected_error: expected calibration error: the mean of |accuracy - confidence| over bins,
        weighted by their examples, in [0, 1] (Naeini et al., 2015). Few examples bias it upwards.
      brier: Brier score: mean over examples of the squared differences between each candidate's
        probability and 1 (correct) or 0, summed over candidates, in [0, 2] (Brier, 1950).
    """

    bins: tuple[ReliabilityBin, ...]
    expected_error: float
    brier: float

    @classmethod
    def of(
        cls,
        probabilities: Sequence[Sequence[float]],
        correct: Sequence[Sequence[bool]],
        *,
        bins: int = BINS,
    ) -> "Calibration":
        """Returns the calibration of label probabilities; each prediction is the likeliest label.

        >>> Calibration.of([[0.9, 0.1], [0.6, 0.4]], [[True, False], [False, True]], bins=1)
        Calibration(bins=(ReliabilityBin(examples=2, confidence=0.75, accuracy=0.5),), \
expected_error=0.25, brier=0.37)

        Args:
          probabilities: each example's probability of each of its candidates.
          correct: whether each candidate is correct, in the same layout.
          bins: maximum number of bins.

        Raises:
          ValueError: if there are no examples.
        """
        if not probabilities:
            raise ValueError("no probabilities to calibrate")
        chosen = [int(np.argmax(p)) for p in probabilities]
        confidence = np.array([p[c] for p, c in zip(probabilities, chosen, strict=True)])
        hits = np.array([o[c] for o, c in zip(correct, chosen, strict=True)], np.float64)
        pairs = zip(probabilities, correct, strict=True)
        brier = np.mean([np.square(np.subtract(p, o, dtype=np.float64)).sum() for p, o in pairs])

        order = np.argsort(confidence, kind="stable")
        confidence, hits = confidence[order], hits[order]
        starts = np.arange(min(bins, len(order))) * len(order) // min(bins, len(order))
        starts = np.unique(np.searchsorted(confidence, confidence[starts]))
        parts = zip(np.split(confidence, starts[1:]), np.split(hits, starts[1:]), strict=True)
        reliability = tuple(
            ReliabilityBin(len(c), float(c.mean()), float(h.mean())) for c, h in parts
        )
        error = sum(b.examples * abs(b.accuracy - b.confidence) for b in reliability) / len(order)
        return cls(reliability, float(error), float(brier))
