"""The reference's splits: which rows of a file are subsampled, held out or trained on."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["VALID_SHARE", "hold_out", "subsample"]

VALID_SHARE = 0.1  # of train, where a dataset has no validation split
HOLD_OUT_SEED = 0


def _train_test(n: int, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, test) rows as `datasets.Dataset.train_test_split` draws and orders them."""
    test = math.ceil(test_share * n)
    permutation = np.random.default_rng(seed).permutation(n)
    return permutation[test:], permutation[:test]


def subsample(n: int, fraction: float, seed: int) -> np.ndarray:
    """Returns the rows of a training subset, int64, in the order the reference has them.

    Subsets of one seed are nested: a smaller fraction's rows are among a larger one's.

    Args:
      n: how many rows there are.
      fraction: the part to keep, in (0, 1]; 1 keeps all, in the file's order.
      seed: of the draw; the reference's `--run`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    return np.arange(n) if fraction == 1 else _train_test(n, 1.0 - fraction, seed)[0]


def hold_out(
    rows: np.ndarray, groups: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, valid): a tenth of some training rows is held out for validation.

    Args:
      rows: the training rows.
      groups: the group of each row of the file. A row that would be held out is trained on if
        another of its group is, so that no group is in both; if that leaves nothing, the first
        one's group is held out, unless there is no other.
    """
    train, valid = _train_test(len(rows), VALID_SHARE, HOLD_OUT_SEED)
    train, valid = rows[train], rows[valid]
    if groups is not None and len({groups[row] for row in rows}) > 1:
        held_out = {groups[row] for row in valid} - {groups[row] for row in train}
        held_out = held_out or {groups[valid[0]]}
        both = np.concatenate([train, valid])
        is_valid = np.array([groups[row] in held_out for row in both], bool)
        train, valid = both[~is_valid], both[is_valid]
    return train, valid
