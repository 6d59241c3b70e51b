"""Confidence intervals of scores, and significance tests of the difference between two runs.

Tests of two runs are paired: both runs are scored on the same test examples, in the same order.
"""

from collections.abc import Sequence

import numpy as np
import scipy.special

__all__ = ["mcnemar", "paired_bootstrap", "seeds_interval", "wilson_interval"]

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution
CHUNK = 2**22  # random numbers drawn at once, to bound memory


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95% confidence interval of a proportion: the score interval of Wilson (1927).

    Unlike the normal approximation it is valid near 0 and 1 and for few examples.

    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"not a proportion: {correct} of {total}")
    return _score_interval(correct / total, total, Z95)


def _score_interval(p: float, total: float, z: float) -> tuple[float, float]:
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (p * (1 - p) / total + z**2 / (4 * total**2)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def seeds_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the 95% confidence interval of a method's mean score, over seeds and test examples.

    There are two sources of variance: training seeds and test examples. The squared standard error
    of the mean is the variance of the seeds' means divided by the number of seeds, plus the
    variance of the examples' scores (averaged over seeds) divided by the number of examples. The
    quantile is that of Student's t with Satterthwaite's degrees of freedom (1946). The interval is
    Wilson's, at the number of examples for which a proportion has this standard error. With one
    seed only the variance of test examples is covered: the interval of 0/1 scores is that of
    `wilson_interval`.

    >>> [round(x, 3) for x in seeds_interval([[1] * 90 + [0] * 10])]
    [0.826, 0.945]
    >>> [round(x, 2) for x in seeds_interval([[1] * 90 + [0] * 10, [1] * 80 + [0] * 20] * 2)]
    [0.74, 0.92]

    Args:
      scores: scores of the same N examples for each seed, [seeds][N], in [0, 1].

    Raises:
      ValueError: if there are no scores, or if seeds have different numbers of them.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores must have the shape [seeds, examples], got {table.shape}")
    seeds, total = table.shape
    mean = float(table.mean())
    by_seed = float(table.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    by_example = float(table.mean(0).var()) / total
    error = by_seed + by_example
    if not error:
        return _score_interval(mean, total, Z95)
    z = Z95
    if by_seed:
        terms = by_seed**2 / (seeds - 1) + by_example**2 / max(total - 1, 1)
        z = float(scipy.special.stdtrit(error**2 / terms, 0.975))
    return _score_interval(mean, max(mean * (1 - mean) / error, 1e-9), z)


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"not scores of the same examples: shapes {a.shape} and {b.shape}")
    return a, b


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the two-sided p-value of McNemar's exact test that two runs are equally accurate.

    Only discordant examples count: those that exactly one run predicts correctly. Under the null
    hypothesis each of them is either run's with probability 1/2 (McNemar, 1947).

    >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])  # six to none: 2 / 2**6
    0.03125
    >>> mcnemar([1, 0, 1], [0, 1, 1])
    1.0

    Args:
      first: scores of the first run, [N], each 0 or 1.
      second: scores of the second run on the same examples.

    Raises:
      ValueError: if a score is neither 0 nor 1, there are no scores, or the lengths differ.
    """
    a, b = _paired(first, second)
    if not np.isin([a, b], (0, 1)).all():
        raise ValueError(
            "McNemar's test needs scores that are 0 or 1; use paired_bootstrap for others"
        )
    fewer, more = sorted((int((a > b).sum()), int((a < b).sum())))
    n = fewer + more
    binomial = cumulative = 1  # n choose k, and its sum over 0 to k: exact integers
    for k in range(fewer):
        binomial = binomial * (n - k) // (k + 1)
        cumulative += binomial
    return min(1.0, 2 * cumulative / 2**n)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns the difference of two runs' mean scores, and its 95% bootstrap confidence interval.

    Examples are resampled with replacement, both runs' scores together (Efron, 1979). The interval
    is the middle 95% of the resampled differences.

    >>> difference, low, high = paired_bootstrap([1, 1, 1, 0] * 25, [1, 0, 0, 0] * 25)
    >>> difference, round(low, 2), round(high, 2)
    (0.5, 0.4, 0.6)

    Args:
      first: scores of the first run, [N].
      second: scores of the second run on the same examples.
      resamples: number of bootstrap samples.
      seed: random seed of the resampling.

    Returns:
      The mean of `first` minus the mean of `second`, and both ends of the interval.

    Raises:
      ValueError: if there are no scores, or the lengths differ.
    """
    a, b = _paired(first, second)
    # Counts of each distinct difference in a sample are multinomial, so that 0/1 scores need three
    # counts a sample instead of N indices.
    values, counts = np.unique(a - b, return_counts=True)
    n, chunk = len(a), max(1, CHUNK // len(values))
    rng = np.random.default_rng(seed)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    means = [rng.multinomial(n, counts / n, size=size) @ values / n for size in sizes]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(a.mean() - b.mean()), float(low), float(high)
