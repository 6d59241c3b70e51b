"""Label probabilities: calibration error, Brier score, temperature scaling, and their checks.

Nothing here imports JAX, so that commands can check their options at once.
"""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
from etils import epath
from scipy.special import log_softmax, logsumexp, softmax

from dss.data.examples import read_json_file
from dss.errors import ConfigError, DataError, DssError
from dss.fields import check_types
from dss.mixtures.methods import Mixture
from dss.paths import write_whole
from dss.student.config import DecodingConfig

__all__ = [
    "Calibration",
    "ReliabilityBin",
    "TemperatureScaling",
    "check_probabilities",
    "check_threshold",
]

BINS = 10
MAX_TEMPERATURE = 10.0  # the fitted temperature is in [1 / MAX_TEMPERATURE, MAX_TEMPERATURE]


def check_probabilities(mixture: Mixture, decoding: DecodingConfig) -> None:
    """Checks that a mixture's students choose among labels, so that labels have probabilities.

    Raises:
      DssError: if they generate labels as text.
    """
    if mixture.tasks[0].kind != "label":
        raise DssError(
            f"{mixture.name}: its students generate labels as text, which has no probabilities; "
            "train one with METHOD finetune or step_by_step"
        )
    if not decoding.closed:
        raise ConfigError(
            "`DecodingConfig.closed=False`: generated labels have no probabilities; leave it out"
        )
    if not mixture.dataset.candidates and not mixture.dataset.labels.closed:
        raise ConfigError(
            f"{mixture.name}: an open set of labels has no probabilities; declare the labels with "
            "`DataConfig.labels`"
        )


def check_threshold(threshold: float) -> None:
    """Checks that a threshold of probabilities is between 0 and 1, both excluded.

    Raises:
      ConfigError: if it is not.
    """
    if not 0 < threshold < 1:
        raise ConfigError(
            f"`threshold={threshold}`: give a probability greater than 0 and less than 1"
        )


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


@dataclasses.dataclass(frozen=True)
class TemperatureScaling:
    """A temperature that calibrates label probabilities (Guo et al., 2017).

    The probabilities of a student's candidate labels are the softmax of their scores divided by the
    temperature: above 1 it makes an overconfident student less confident. The most probable label
    stays the same.

    Attributes:
      temperature: the temperature, positive.
      dataset: name of the dataset that it was fitted to.
      split: split that it was fitted to.
      step: training step of the checkpoint.
      examples: number of examples.
      nll_before: mean negative log-likelihood of the correct label at temperature 1, in nats.
      nll_after: mean negative log-likelihood of the correct label at `temperature`.
      expected_error_before: expected calibration error at temperature 1, see `Calibration`.
      expected_error_after: expected calibration error at `temperature`.
    """

    temperature: float
    dataset: str
    split: str
    step: int
    examples: int
    nll_before: float
    nll_after: float
    expected_error_before: float
    expected_error_after: float

    @classmethod
    def fit(
        cls,
        probabilities: Sequence[Sequence[float]],
        correct: Sequence[Sequence[bool]],
        *,
        dataset: str,
        split: str,
        step: int,
    ) -> "TemperatureScaling":
        """Returns the temperature with the least negative log-likelihood of the correct labels.

        Args:
          probabilities: each example's probability of each of its candidates, at temperature 1.
          correct: whether each candidate is correct, in the same layout; one of each example is.
          dataset: name of the dataset.
          split: split of the examples.
          step: training step of the checkpoint.

        Raises:
          DssError: if all predictions are correct: the lower the temperature, the less the negative
            log-likelihood.
        """
        from scipy.optimize import minimize_scalar  # a slow import that evaluation does not need

        sizes = [len(row) for row in probabilities]
        if all(c[int(np.argmax(p))] for p, c in zip(probabilities, correct, strict=True)):
            raise DssError(
                f"{dataset}: all {len(sizes)} predictions of {split} are correct, so that no "
                f"temperature can be fitted; add examples to {split}"
            )
        scores = np.full((len(sizes), max(sizes)), -np.inf)
        is_correct = np.zeros(scores.shape, bool)
        for i, size in enumerate(sizes):
            scores[i, :size] = np.log(np.maximum(probabilities[i], np.finfo(np.float64).tiny))
            is_correct[i, :size] = correct[i]

        def nll(log_temperature: float) -> float:
            log_probabilities = log_softmax(scores / math.exp(log_temperature), axis=1)
            of_correct = np.where(is_correct, log_probabilities, -np.inf)
            return -float(logsumexp(of_correct, axis=1).mean())

        bound = math.log(MAX_TEMPERATURE)
        found = float(minimize_scalar(nll, bounds=(-bound, bound), method="bounded").x)
        scaled = softmax(scores / math.exp(found), axis=1).tolist()
        after = [row[:size] for row, size in zip(scaled, sizes, strict=True)]
        return cls(
            temperature=math.exp(found),
            dataset=dataset,
            split=split,
            step=step,
            examples=len(sizes),
            nll_before=nll(0.0),
            nll_after=nll(found),
            expected_error_before=Calibration.of(probabilities, correct).expected_error,
            expected_error_after=Calibration.of(after, correct).expected_error,
        )

    @classmethod
    def read(cls, path: epath.PathLike) -> "TemperatureScaling":
        """Reads a file of `save`.

        Raises:
          DataError: if the file is malformed.
        """
        value = read_json_file(path)
        try:
            scaling = cls(**value)
            check_types(scaling)
        except (TypeError, ConfigError):
            scaling = None
        if scaling is None or not 0 < scaling.temperature < math.inf:
            raise DataError(f"{path}: malformed calibration; delete it and calibrate again")
        return scaling

    def save(self, path: epath.PathLike) -> None:
        """Writes a JSON file atomically."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
