"""How far a measured score can be trusted, and whether two runs differ by more than chance.

Scores of two runs are paired: both are of the same test examples, in the same order.
"""

from collections.abc import Sequence

import numpy as np
import scipy.special

__all__ = ["mcnemar", "paired_bootstrap", "seeds_interval", "wilson_interval"]

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
    return _score_interval(correct / total, total, Z95)


def _score_interval(p: float, total: float, z: float) -> tuple[float, float]:
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (p * (1 - p) / total + z**2 / (4 * total**2)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def seeds_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the 95% interval of a method's mean score, over training seeds and test examples.

    Two things vary: another seed trains another student, and another test set has other examples.
    The squared error of the mean is the variance between the seeds' means, over their number, plus
    that of the examples' scores, each the mean over seeds, over theirs; Student's t has the degrees
    of freedom of that sum (Satterthwaite, 1946). The interval is Wilson's, for as many examples as
    have this error. Of one seed nothing is known but the examples: it is `wilson_interval`.

    >>> [round(x, 3) for x in seeds_interval([[1] * 90 + [0] * 10])]
    [0.826, 0.945]
    >>> [round(x, 2) for x in seeds_interval([[1] * 90 + [0] * 10, [1] * 80 + [0] * 20] * 2)]
    [0.74, 0.92]

    Args:
      scores: [seeds][N], in [0, 1], of the same N examples.

    Raises:
      ValueError: no score, or not as many of each seed.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"not the scores of some seeds on the same examples: shape {table.shape}")
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
