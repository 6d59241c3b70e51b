import itertools

import numpy as np
import pytest

from dss.evaluation.significance import mcnemar, paired_bootstrap, wilson_interval


def test_wilson_interval():
    low, high = wilson_interval(0, 50)
    assert low == 0
    assert 0.06 < high < 0.08
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(1, 0)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (3, 0), (2, 5), (4, 4), (9, 1)])
def test_mcnemar_is_the_fraction_of_coin_tosses_at_least_as_unequal(only_first, only_second):
    first = [1] * only_first + [0] * only_second + [1, 0]
    second = [0] * only_first + [1] * only_second + [1, 0]
    n = only_first + only_second
    heads = [sum(throws) for throws in itertools.product((0, 1), repeat=n)]
    wanted = np.mean([abs(h - n / 2) >= abs(only_first - n / 2) for h in heads])
    assert mcnemar(first, second) == pytest.approx(wanted)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_of_many_examples_does_not_overflow():
    assert mcnemar([1] * 6000 + [0] * 5800, [0] * 6000 + [1] * 5800) == pytest.approx(
        0.067, abs=1e-3
    )
    assert mcnemar([1.0] * 9000, [0.0] * 9000) == 0.0  # smaller than the smallest float


def test_the_bootstrap_interval_equals_that_of_resampling_examples():
    rng = np.random.default_rng(1)
    first, second = rng.random(300), rng.random(300) ** 2
    difference, low, high = paired_bootstrap(first, second, seed=3)
    assert difference == pytest.approx(first.mean() - second.mean())
    drawn = rng.integers(300, size=(10000, 300))
    wanted = np.quantile((first - second)[drawn].mean(axis=1), (0.025, 0.975))
    np.testing.assert_allclose((low, high), wanted, atol=5e-3)
    assert paired_bootstrap(first, second, seed=3) == (difference, low, high)
    assert paired_bootstrap(first, first) == (0.0, 0.0, 0.0)


def test_the_bootstrap_interval_covers_the_true_difference_19_times_of_20():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        shared = rng.random(200)
        first, second = shared < 0.7, (shared + 0.3 * rng.random(200)) % 1 < 0.6
        _, low, high = paired_bootstrap(first, second, resamples=1000)
        held += low <= 0.1 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_unpaired_scores_are_rejected():
    for test in (mcnemar, paired_bootstrap):
        for first, second in (([], []), ([1], [1, 0]), ([[1]], [[1]])):
            with pytest.raises(ValueError, match="same examples"):
                test(first, second)
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5], [1])
