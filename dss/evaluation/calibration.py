"""Whether a student is right as often as the probability of its answer says."""

import dataclasses
from collections.abc import Sequence

import numpy as np

__all__ = ["Calibration", "ReliabilityBin"]

BINS = 10


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Examples that were answered with like confidence.

    Attributes:
      examples: how many.
      confidence: mean probability of the answer, in [0, 1].
      accuracy: the share that was right, in [0, 1].
    """

    examples: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How far probabilities can be taken at their word.

    Attributes:
      bins: of equal counts as far as equal confidences, which stay together, let them be; from the
        least confident to the most.
      expected_error: sum over bins of their share times |accuracy - confidence|, in [0, 1] (Naeini
        et al., 2015). Few examples make it larger than it would be for many.
      brier: mean over examples of the sum over candidates of (probability - 1 if right, else 0)
        squared, in [0, 2] (Brier, 1950).
    """

    bins: tuple[ReliabilityBin, ...]
    expected_error: float
    brier: float

    @classmethod
    def of(
        cls,
        probabilities: Sequence[Sequence[float]],
        right: Sequence[Sequence[bool]],
        *,
        bins: int = BINS,
    ) -> "Calibration":
        """Returns the calibration of some answers; the answer is the most likely candidate.

        >>> Calibration.of([[0.9, 0.1], [0.6, 0.4]], [[True, False], [False, True]], bins=1)
        Calibration(bins=(ReliabilityBin(examples=2, confidence=0.75, accuracy=0.5),), \
expected_error=0.25, brier=0.37)

        Args:
          probabilities: of each example's candidates.
          right: whether each of them is right.
          bins: how many at most.

        Raises:
          ValueError: there is no example.
        """
        if not probabilities:
            raise ValueError("no probabilities to calibrate")
        chosen = [int(np.argmax(p)) for p in probabilities]
        confidence = np.array([p[c] for p, c in zip(probabilities, chosen, strict=True)])
        hits = np.array([r[c] for r, c in zip(right, chosen, strict=True)], np.float64)
        pairs = zip(probabilities, right, strict=True)
        brier = np.mean([np.square(np.subtract(p, r, dtype=np.float64)).sum() for p, r in pairs])

        order = np.argsort(confidence, kind="stable")
        confidence, hits = confidence[order], hits[order]
        starts = np.arange(min(bins, len(order))) * len(order) // min(bins, len(order))
        starts = np.unique(np.searchsorted(confidence, confidence[starts]))
        parts = zip(np.split(confidence, starts[1:]), np.split(hits, starts[1:]), strict=True)
        found = tuple(ReliabilityBin(len(c), float(c.mean()), float(h.mean())) for c, h in parts)
        error = sum(b.examples * abs(b.accuracy - b.confidence) for b in found) / len(order)
        return cls(found, float(error), float(brier))
