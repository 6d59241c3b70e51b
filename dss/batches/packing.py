"""Packing: sequences one after another in flat slots, so that padding costs nothing.

Raffel et al. (2020, section 3.5.2) pack several sequences in a row. Here only attention has rows;
everything else of a T5 looks at a token alone, and sees flat slots that hold sequence after
sequence, encoder and decoder each filled to the end. Both views of an example are packed alike.
Attention never crosses a segment, so each sequence is trained as if it were alone.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = [
    "PackedShape",
    "RowWidths",
    "choose_shapes",
    "choose_widths",
    "deal",
    "exchange",
    "members",
    "next_fit",
]

SLOT_MULTIPLE = 16  # numbers of slots are multiples of this
WIDTH_MULTIPLE = 8  # and widths of rows of this
WIDTH_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # of the longest sequence, tried
QUANTILES = np.arange(0.1, 1.0, 0.1)  # of what steps need, tried as smaller numbers of slots
TARGET_SLOT = 2  # input slots that take as long as a target slot, which meets the head too
SCORES = 800  # of attention that take as long as an input slot: measured at small, on two cores
WORTH_A_SHAPE = 5  # steps, whose time one more shape must save, for it has to be compiled;
FILLED = 0.92  # or what steps need is less than this of the slots of encoder or decoder
MOST_SHAPES = 3
SPARE = 1.0625  # room for the steps that need more than any of the sample
WITH_CARE = 32  # groups among which sequences are dealt one by one


@dataclasses.dataclass(frozen=True)
class RowWidths:
    """How many tokens a row of attention holds."""

    inputs: int  # S, of the encoder's self-attention
    targets: int  # T, of the decoder's self-attention
    cross: int  # C, encoder tokens that a decoder's row attends to


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """The shape of a batch, a group: slots of encoder and decoder, and rows of their attention."""

    inputs: int  # N
    targets: int  # M
    input_rows: int  # R
    target_rows: int  # Q
    widths: RowWidths

    @property
    def work(self) -> float:
        """How long a step takes, in that of one input slot without attention."""
        S, T, C = dataclasses.astuple(self.widths)
        scores = self.input_rows * S * S + self.target_rows * T * (T + C)
        return self.inputs + TARGET_SLOT * self.targets + scores / SCORES

    def enlarged(self) -> "PackedShape":
        """Returns a shape with room for `SPARE` more in slots and rows."""
        return PackedShape(
            _up(SPARE * self.inputs, SLOT_MULTIPLE),
            _up(SPARE * self.targets, SLOT_MULTIPLE),
            math.ceil(SPARE * self.input_rows),
            math.ceil(SPARE * self.target_rows),
            self.widths,
        )

    def holds(self, needed: np.ndarray) -> np.ndarray:
        """Returns which steps fit, [...] bool, for rows as many as they take.

        Args:
          needed: [..., 4] of each step: slots of encoder and decoder, longest input and target.
        """
        longest = min(self.widths.inputs, self.widths.cross), self.widths.targets
        bounds = np.array([self.inputs, self.targets, *longest])
        return np.all(needed <= bounds, axis=-1)


def _up(x: float, multiple: int) -> int:
    return int(np.ceil(x / multiple)) * multiple


def members(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items of each group, in their order.

    Args:
      groups: [X, n] the group of each item of X lists, from 0.
      count: G, how many groups there are.

    Returns:
      Items [X, G, m] of the fullest group's m, and whether there is one, [X, G, m].
    """
    X, n = groups.shape
    order = np.argsort(groups, axis=1, kind="stable")
    flat = (groups + count * np.arange(X)[:, None]).reshape(-1)
    sizes = np.bincount(flat, minlength=X * count).reshape(X, count)
    places = np.arange(sizes.max())
    index = (np.cumsum(sizes, axis=1) - sizes)[:, :, None] + places
    there = places < sizes[:, :, None]
    index = np.minimum(index, n - 1).reshape(X, -1)
    return np.take_along_axis(order, index, axis=1).reshape(there.shape), there


def deal(lengths: np.ndarray, groups: int) -> np.ndarray:
    """Returns a group for each sequence so that the groups are nearly equal on both sides.

    Many groups are made of few, which many sequences fill nearly alike in any order; those are
    then divided with care.

    Args:
      lengths: [X, n, 2] input and target lengths of X lists.
      groups: G.

    Returns:
      [X, n] int64, from 0.
    """
    X, n, _ = lengths.shape
    if groups == 1:
        return np.zeros((X, n), np.int64)
    size = lengths / np.maximum(lengths.sum(axis=1, keepdims=True), 1)
    few = range(WITH_CARE, WITH_CARE // 4, -1)  # of the groups, as many as divide them
    parts = groups // next((count for count in few if groups % count == 0), groups)
    if parts <= 1:
        return _deal_with_care(size, groups)
    part = _deal_in_rounds(size, parts)
    items, there = members(part, parts)
    of_parts = np.take_along_axis(size, items.reshape(X, -1, 1), axis=1)
    of_parts = np.where(there[..., None], of_parts.reshape(*there.shape, 2), 0)
    inner = _deal_with_care(of_parts.reshape(X * parts, -1, 2), groups // parts)
    out = np.empty((X, n), np.int64)
    lists, at, _ = np.nonzero(there)
    out[lists, items[there]] = at * (groups // parts) + inner.reshape(there.shape)[there]
    return out


def _largest_first(size: np.ndarray) -> np.ndarray:
    return np.argsort(-size.max(axis=2), axis=1, kind="stable")


def _deal_with_care(size: np.ndarray, groups: int) -> np.ndarray:
    """Deals from the largest on, each to where the fuller side is then least full."""
    X, n, _ = size.shape
    out = np.zeros((X, n), np.int64)
    load, lists = np.zeros((X, groups, 2)), np.arange(X)
    for i in _largest_first(size).T:
        own = size[lists, i]
        group = (load + own[:, None]).max(axis=2).argmin(axis=1)
        load[lists, group] += own
        out[lists, i] = group
    return out


def _deal_in_rounds(size: np.ndarray, groups: int) -> np.ndarray:
    """Deals from the largest on, one to each group in a round: in turn the largest to the emptiest
    group, and what is mostly target to where mostly inputs are.
    """
    X, n, _ = size.shape
    out = np.zeros((X, n), np.int64)
    load, lists, order = np.zeros((X, groups, 2)), np.arange(X)[:, None], _largest_first(size)
    for start in range(0, n, groups):
        items = order[:, start : start + groups]
        own = np.take_along_axis(size, items[..., None], axis=1)
        if start // groups % 2:
            by, room = own[..., 1] - own[..., 0], load[..., 0] - load[..., 1]
            items = np.take_along_axis(items, np.argsort(by, axis=1, kind="stable"), axis=1)
        else:
            room = load.max(axis=2)
        group = np.argsort(room, axis=1, kind="stable")[:, : items.shape[1]]
        out[lists, items] = group
        load[lists, group] += size[lists, items]
    return out


def exchange(lengths: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Returns whose items steps take so that they are nearly equal on both sides.

    The first items of all steps are assigned to them, then the second ones and so on, each time so
    that the sum of squares of what the steps hold is the least. Nothing is rounded: all machines
    find the same.

    Args:
      lengths: [S, n, 2] input and target lengths of n items of each of S steps.
      epochs: [S, n] that they are drawn in; items take each other's places within one.

    Returns:
      [S, n] int64, from 0: the step that each step's item i is the i-th of.
    """
    from scipy.optimize import linear_sum_assignment  # imports slowly; evaluation does without

    total = lengths.sum(axis=(0, 1))
    size = lengths * (total.max() // np.maximum(total, 1))
    load, taken = np.zeros_like(size[:, 0]), np.empty(lengths.shape[:2], np.int64)
    for i in range(lengths.shape[1]):
        # of the sum of |load + size|^2, what depends on the assignment
        cost = load @ size[:, i].T
        never = len(size) * cost.max() + 1
        cost += never * (epochs[:, None, i] != epochs[:, i])
        _, taken[:, i] = linear_sum_assignment(cost)
        load += size[taken[:, i], i]
    return taken


def next_fit(lengths: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Returns the row of each sequence where rows are filled in order, each until one is too long.

    Rows cut short waste attention only, so that nothing cleverer is worth its time.

    Args:
      lengths: [X, n, d] for X lists of n sequences, in d dimensions (encoder, decoder).
      widths: d, what a row holds; no sequence is longer.

    Returns:
      [X, n] int64, from 0.
    """
    X, n, d = lengths.shape
    row, used, rows = np.zeros(X, np.int64), np.zeros((X, d), np.int64), np.zeros((X, n), np.int64)
    for i in range(n):
        used = used + lengths[:, i]
        over = (used > widths).any(axis=1)
        used = np.where(over[:, None], lengths[:, i], used)
        row = row + over
        rows[:, i] = row
    return rows


def choose_widths(lengths: np.ndarray, longest: tuple[int, int]) -> RowWidths:
    """Returns the widths with which attention has the fewest scores.

    Args:
      lengths: [X, n, 2] input and target lengths of X sample lists; 0 where a list has fewer.
      longest: the longest input and target that rows must hold, in tokens; of longer sequences in
        the lists only so much is looked at.
    """
    lengths = np.minimum(lengths, longest)

    def candidates(longest: float) -> list[int]:
        return sorted({_up(longest * f, WIDTH_MULTIPLE) for f in WIDTH_FACTORS})

    def rows(widths: Sequence[int], sides: slice) -> float:
        return next_fit(lengths[..., sides], widths)[:, -1].mean() + 1

    def encoder_scores(S: int) -> float:
        return rows((S,), slice(0, 1)) * S * S

    def decoder_scores(widths: tuple[int, int]) -> float:
        T, C = widths
        return rows((C, T), slice(0, 2)) * T * (T + C)

    inputs, targets = (candidates(side) for side in longest)
    ratio = lengths[..., 0].sum() / max(lengths[..., 1].sum(), 1)
    pairs = {
        (T, max(inputs[0], _up(T * ratio * balance, WIDTH_MULTIPLE)))
        for T in targets
        for balance in (1.0, 1.25, 1.5)
    }
    S = min(inputs, key=encoder_scores)
    T, C = min(sorted(pairs), key=decoder_scores)
    return RowWidths(S, T, C)


def choose_shapes(
    needed: np.ndarray, rows: np.ndarray, widths: Sequence[RowWidths]
) -> tuple[PackedShape, ...]:
    """Returns at most three shapes, by their work, such that every step fits one.

    The largest fits every step. Smaller ones have as many slots as some quantile of the steps
    needs, or rows only as wide as many steps' longest sequences; they are taken where they save
    enough of the run or fill what is not full.

    Args:
      needed: [steps, 4] of each step: slots of encoder and decoder, longest input and target.
      rows: [steps, W, 2] that encoder and decoder need with each of the widths.
      widths: W, some of which hold every sequence.
    """
    slots = needed[:, :2]
    ladder = np.quantile(slots, [*QUANTILES, 1.0], axis=0)
    ladder = np.maximum(np.ceil(ladder / SLOT_MULTIPLE), 1).astype(int) * SLOT_MULTIPLE
    shapes, fits = [], []
    for N, M in ladder.tolist():
        for w, width in enumerate(widths):
            held = PackedShape(N, M, 0, 0, width).holds(needed)
            R, Q = rows[held, w].max(axis=0, initial=0).tolist()
            shapes.append(PackedShape(N, M, R, Q, width))
            fits.append(held)
    work = np.array([shape.work for shape in shapes])
    costs = np.where(np.stack(fits, axis=1), work, np.inf)  # [steps, candidates]
    top = int(costs.sum(axis=0).argmin())

    sizes = np.array([(shape.inputs, shape.targets) for shape in shapes])

    def filled(chosen: list[int]) -> float:
        taken = np.array(chosen)[costs[:, chosen].argmin(axis=1)]
        return float((slots.sum(axis=0) / sizes[taken].sum(axis=0)).min())

    chosen = [top]
    while len(chosen) < MOST_SHAPES:
        cost = costs[:, chosen].min(axis=1)
        with_one_more = np.minimum(cost[:, None], costs).sum(axis=0)
        best = int(with_one_more.argmin())
        saved = (cost.sum() - with_one_more[best]) / work[top]
        if saved <= 0 or (saved < WORTH_A_SHAPE and filled(chosen) >= FILLED):
            break
        chosen.append(best)
    return tuple(shapes[c] for c in sorted(chosen, key=lambda c: work[c]))
