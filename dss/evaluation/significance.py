"""How far a measured accuracy can be trusted."""

__all__ = ["wilson_interval"]

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


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
