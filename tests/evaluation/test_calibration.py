import numpy as np
import pytest

from dss.evaluation.calibration import Calibration


def _answers(confidence, is_right):
    """Returns probabilities and correctness of two candidates for each example, likeliest first."""
    return [(c, 1 - c) for c in confidence], [(r, not r) for r in is_right]


def test_bins_have_equal_counts_and_the_error_is_their_mean_gap():
    confidence = [0.9, 0.55, 0.8, 0.65, 0.7, 0.95, 0.6]
    is_right = [True, False, True, True, False, True, False]
    found = Calibration.of(*_answers(confidence, is_right), bins=3)
    assert [b.examples for b in found.bins] == [2, 2, 3]
    wanted = [(0.575, 0.0), (0.675, 0.5), ((0.8 + 0.9 + 0.95) / 3, 1.0)]
    for bin_, (mean, accuracy) in zip(found.bins, wanted, strict=True):
        assert (bin_.confidence, bin_.accuracy) == pytest.approx((mean, accuracy))
    gaps = [abs(a - c) for c, a in wanted]
    assert found.expected_error == pytest.approx(np.average(gaps, weights=[2, 2, 3]))
    # With two candidates each of them is off by as much.
    wanted = 2 * np.mean([(c - r) ** 2 for c, r in zip(confidence, is_right, strict=True)])
    assert found.brier == pytest.approx(wanted)


def test_equal_confidences_stay_together():
    """If split, guesses could fall into bins by correctness and have a large calibration error."""
    is_right = [True] * 50 + [False] * 50
    found = Calibration.of([(0.5, 0.5)] * 100, [(r, not r) for r in is_right])
    assert [b.examples for b in found.bins] == [100]
    assert found.expected_error == 0
    mixed = Calibration.of(*_answers([0.5] * 5 + [0.9] * 5, [True] * 10), bins=3)
    assert [b.examples for b in mixed.bins] == [5, 5]


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20000)
    is_right = rng.random(20000) < confidence
    calibrated = Calibration.of(*_answers(confidence, is_right))
    assert calibrated.expected_error < 0.01
    assert len(calibrated.bins) == 10
    overconfident = Calibration.of(*_answers(np.sqrt(confidence), is_right))
    gap = np.mean(np.sqrt(confidence) - confidence)
    assert overconfident.expected_error == pytest.approx(gap, 0.1)
    assert overconfident.brier > calibrated.brier


def test_no_candidate_may_be_correct_and_few_examples_make_few_bins():
    found = Calibration.of([(0.5, 0.3, 0.2), (1.0,)], [(False, False, False), (True,)])
    assert len(found.bins) == 2
    assert found.brier == pytest.approx((0.25 + 0.09 + 0.04) / 2)
    with pytest.raises(ValueError, match="no probabilities"):
        Calibration.of([], [])
