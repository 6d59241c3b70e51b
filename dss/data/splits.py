"""The reference implementation's splits: rows that are subsampled, held out or trained on."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["VALID_FRACTION", "hold_out", "subsample"]

VALID_FRACTION = 0.1  # of train, held out where a dataset has no validation split
HOLD_OUT_SEED = 0


def _train_test(n: int, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test) rows, drawn and ordered as by `datasets.Dataset.train_test_split`."""
    test = math.ceil(test_fraction * n)
    permutation = np.random.default_rng(seed).permutation(n)
    return permutation[test:], permutation[:test]


def subsample(n: int, fraction: float, seed: int) -> np.ndarray:
    """Returns the rows of a training subset, int64, in the reference implementation's order.

    Subsets of one seed are nested: a smaller fraction's rows are among a larger one's.

    Args:
      n: number of rows.
      fraction: fraction of the rows to keep, in (0, 1]; 1 keeps all, in the file's order.
      seed: seed of the permutation; the reference implementation's `--run`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    return np.arange(n) if fraction == 1 else _train_test(n, 1.0 - fraction, seed)[0]


def hold_out(
    rows: np.ndarray, groups: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits training rows into (train, valid): a tenth is held out for validation.

    Args:
      rows: the training rows.
      groups: the group of each row of the file; None for no groups. No group is in both splits: a
        held-out row returns to train if another row of its group is there. If none is left, the
        group of the first held-out row is held out, unless it is the only group.
    """
    train, valid = _train_test(len(rows), VALID_FRACTION, HOLD_OUT_SEED)
    train, valid = rows[train], rows[valid]
    if groups is not None and len({groups[row] for row in rows}) > 1:
        held_out = {groups[row] for row in valid} - {groups[row] for row in train}
        held_out = held_out or {groups[valid[0]]}
        both = np.concatenate([train, valid])
        is_valid = np.array([groups[row] in held_out for row in both], bool)
        train, valid = both[~is_valid], both[is_valid]
    return train, valid
