"""How far a measured score can be trusted, and whether two runs differ by more than chance.

Scores of two runs are paired: both are of the same test examples, in the same order.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["mcnemar", "paired_bootstrap", "wilson_interval"]

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution
CHUNK = 2**22  # numbers drawn at once


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95% score interval of a proportion (Wilson, 1927).

    Unlike the normal interval it holds near 0 and 1 and for few examples.

    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is no proportion")
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * (p * (1 - p) / total + z2 / (4 * total**2)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"not scores of the same examples: shapes {a.shape} and {b.shape}")
    return a, b


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the two-sided exact p-value that two runs are equally accurate (McNemar, 1947).

    Only the examples count that exactly one run has right: were the runs equally good, each of
    these would be either's with probability 1/2.

    >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])  # six to none: 2 / 2**6
    0.03125
    >>> mcnemar([1, 0, 1], [0, 1, 1])
    1.0

    Args:
      first: verdicts [N], each 0 or 1.
      second: of the other run.

    Raises:
      ValueError: a verdict that is neither, none at all, or lengths that differ.
    """
    a, b = _paired(first, second)
    if not np.isin([a, b], (0, 1)).all():
        raise ValueError("McNemar's test is of verdicts that are 0 or 1; bootstrap other scores")
    fewer, more = sorted((int((a > b).sum()), int((a < b).sum())))
    n = fewer + more
    ways = total = 1  # of n throws of a coin: with k heads, with k or fewer
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns how much better the first run is, and the 95% interval of that (Efron, 1979).

    The examples are drawn with replacement, both runs' scores together; the interval holds the
    middle 95% of the differences of means.

    >>> difference, low, high = paired_bootstrap([1, 1, 1, 0] * 25, [1, 0, 0, 0] * 25)
    >>> difference, round(low, 2), round(high, 2)
    (0.5, 0.4, 0.6)

    Args:
      first: scores [N].
      second: of the other run.
      resamples: how often the N examples are drawn.
      seed: of the draws.

    Returns:
      The mean of `first` minus that of `second`, and the ends of its interval.

    Raises:
      ValueError: no score, or lengths that differ.
    """
    a, b = _paired(first, second)
    # How often each different value is drawn is multinomial; verdicts have three, not N.
    values, counts = np.unique(a - b, return_counts=True)
    n, rows = len(a), max(1, CHUNK // len(values))
    rng = np.random.default_rng(seed)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [rng.multinomial(n, counts / n, size=size) @ values / n for size in sizes]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(a.mean() - b.mean()), float(low), float(high)
