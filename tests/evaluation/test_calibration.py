import dataclasses
import json

import numpy as np
import pytest
from scipy.special import softmax

from dss.errors import DataError, DssError
from dss.evaluation.calibration import (
    Calibration,
    TemperatureScaling,
    check_probabilities,
    check_threshold,
)
from dss.evaluation.evaluator import Answer
from dss.mixtures.methods import named_mixture
from dss.student.config import DecodingConfig


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


def _sampled(temperature, sizes, seed=0):
    """Returns probabilities at temperature 1, and labels that are drawn at another temperature."""
    rng = np.random.default_rng(seed)
    probabilities, correct = [], []
    for size in sizes:
        scores = rng.normal(scale=3, size=size)
        drawn = rng.choice(size, p=softmax(scores / temperature))
        probabilities.append(softmax(scores).tolist())
        correct.append([i == drawn for i in range(size)])
    return probabilities, correct


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_fitted_temperature_is_that_of_the_labels(temperature):
    probabilities, correct = _sampled(temperature, [2, 3, 4] * 2000)
    found = TemperatureScaling.fit(probabilities, correct, dataset="d", split="valid", step=7)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert (found.examples, found.step, found.split) == (6000, 7, "valid")
    assert found.nll_after <= found.nll_before + 1e-9
    chosen = [p[c.index(True)] for p, c in zip(probabilities, correct, strict=True)]
    assert found.nll_before == pytest.approx(-np.mean(np.log(chosen)))
    before = Calibration.of(probabilities, correct).expected_error
    assert found.expected_error_before == before
    if temperature != 1:
        assert found.expected_error_after < 0.02 < before


def test_a_student_without_errors_has_no_temperature_and_one_with_errors_only_the_highest():
    probabilities, correct = [[1.0, 0.0], [0.1, 0.9]], [[True, False], [False, True]]
    options = {"dataset": "d", "split": "valid", "step": 1}
    with pytest.raises(DssError, match="d: all 2 predictions of valid are correct, so that no"):
        TemperatureScaling.fit(probabilities, correct, **options)
    found = TemperatureScaling.fit(probabilities, correct[::-1], **options)
    assert found.temperature == pytest.approx(10, rel=1e-3)
    assert np.isfinite(found.nll_before)


def test_a_calibration_is_read_as_it_was_saved(tmp_path):
    path = tmp_path / "calibration.json"
    scaling = TemperatureScaling(1.5, "toy", "valid", 60, 24, 0.7, 0.6, 0.1, 0.05)
    scaling.save(path)
    assert TemperatureScaling.read(path) == scaling
    fields = dataclasses.asdict(scaling)
    for malformed in ([], {"temperature": 1.5}, *({**fields, "temperature": t} for t in (0, "2"))):
        path.write_text(json.dumps(malformed))
        with pytest.raises(DataError, match="malformed calibration; delete it"):
            TemperatureScaling.read(path)


def test_the_accuracy_of_what_is_kept_rises_with_the_threshold():
    confidence = np.linspace(0.5, 1, 101)
    answers = [Answer("yes", {"yes": p, "no": 1 - p}) for p in confidence]
    is_right = [i % 10 < 10 * p for i, p in enumerate(confidence)]  # calibrated
    accuracy, kept = [], []
    for threshold in (0.5, 0.7, 0.9):
        verdicts = [r for a, r in zip(answers, is_right, strict=True) if not a.is_below(threshold)]
        accuracy.append(np.mean(verdicts))
        kept.append(len(verdicts))
    assert kept == [101, 61, 21]
    assert accuracy == sorted(set(accuracy))
    assert Answer("generated").is_below(0.01)


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 80, float("nan")])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(DssError, match="give a probability greater than 0 and less than 1"):
        check_threshold(threshold)


def test_generated_labels_have_no_probabilities(toy):
    decoding = DecodingConfig()
    check_probabilities(named_mixture("toy_step_by_step_rules", [toy]), decoding)
    check_probabilities(named_mixture("cqa_finetune"), decoding)
    for mixture, changed, message in (
        ("svamp_finetune", {}, "svamp_finetune: an open set of labels has no probabilities; decl"),
        ("toy_single_target_rules", {}, "generate labels as text, which has no probabilities"),
        ("toy_finetune", {"closed": False}, "generated labels have no probabilities; leave it out"),
    ):
        with pytest.raises(DssError, match=message):
            check_probabilities(named_mixture(mixture, [toy]), DecodingConfig(**changed))
