"""Packing: sequences follow each other in flat slots, almost without padding.

Raffel et al. (2020, section 3.5.2) pack several sequences in a row. Here only attention has rows.
All other layers of a T5 process each token separately, on flat slots of the encoder and of the
decoder. Attention never crosses a segment, so packing does not change the result of a sequence.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = [
    "PackedShape",
    "RowWidths",
    "balance_groups",
    "balance_steps",
    "choose_shapes",
    "choose_widths",
    "group_members",
    "next_fit",
]

SLOT_MULTIPLE = 16  # numbers of slots are multiples of this
WIDTH_MULTIPLE = 8  # row widths are multiples of this
WIDTH_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # candidate widths, over the longest sequence
QUANTILES = np.arange(0.1, 1.0, 0.1)  # of the slots that steps need: candidates for smaller shapes
TARGET_COST = 2  # cost of a target slot in input slots (it also passes the LM head)
SCORES_PER_SLOT = 800  # attention scores that cost as much as an input slot (small, on two cores)
MIN_STEPS_SAVED = 5  # time that one more shape must save, in steps, to outweigh its compilation
MIN_FILL = 0.92  # packing density of encoder and decoder below which a shape is added anyway
MAX_SHAPES = 3
SPARE = 1.0625  # size of the spare shape, over what the sample of steps needs
MAX_GREEDY_GROUPS = 32  # groups that sequences are assigned to one by one


@dataclasses.dataclass(frozen=True)
class RowWidths:
    """The widths of attention rows, in tokens."""

    inputs: int  # S, encoder self-attention
    targets: int  # T, decoder self-attention
    cross: int  # C, encoder tokens that a decoder row attends to


@dataclasses.dataclass(frozen=True)
class PackedShape:
    """The shape of a group of a batch."""

    inputs: int  # N, encoder slots
    targets: int  # M, decoder slots
    input_rows: int  # R, attention rows of the encoder
    target_rows: int  # Q, attention rows of the decoder
    widths: RowWidths

    @property
    def work(self) -> float:
        """The estimated cost of a step, in units of an input slot without attention."""
        S, T, C = dataclasses.astuple(self.widths)
        scores = self.input_rows * S * S + self.target_rows * T * (T + C)
        return self.inputs + TARGET_COST * self.targets + scores / SCORES_PER_SLOT

    def enlarged(self) -> "PackedShape":
        """Returns a shape with slots and rows multiplied by `SPARE`."""
        return PackedShape(
            _up(SPARE * self.inputs, SLOT_MULTIPLE),
            _up(SPARE * self.targets, SLOT_MULTIPLE),
            math.ceil(SPARE * self.input_rows),
            math.ceil(SPARE * self.target_rows),
            self.widths,
        )

    def fits(self, needed: np.ndarray) -> np.ndarray:
        """Returns whether each step fits into the slots and row widths, [...] bool; the number of
        rows is not checked.

        Args:
          needed: [..., 4], the encoder slots, decoder slots, longest input and longest target of
            each step.
        """
        longest = min(self.widths.inputs, self.widths.cross), self.widths.targets
        bounds = np.array([self.inputs, self.targets, *longest])
        return np.all(needed <= bounds, axis=-1)


def _up(x: float, multiple: int) -> int:
    return int(np.ceil(x / multiple)) * multiple


def group_members(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items of each group, in their order.

    Args:
      groups: [X, n], the group of each item of X lists, from 0.
      count: G, the number of groups.

    Returns:
      The items [X, G, m], with m the size of the largest group, and a mask of the items that exist
      [X, G, m].
    """
    X, n = groups.shape
    order = np.argsort(groups, axis=1, kind="stable")
    flat = (groups + count * np.arange(X)[:, None]).reshape(-1)
    sizes = np.bincount(flat, minlength=X * count).reshape(X, count)
    positions = np.arange(sizes.max())
    index = (np.cumsum(sizes, axis=1) - sizes)[:, :, None] + positions
    exists = positions < sizes[:, :, None]
    index = np.minimum(index, n - 1).reshape(X, -1)
    return np.take_along_axis(order, index, axis=1).reshape(exists.shape), exists


def balance_groups(lengths: np.ndarray, groups: int) -> np.ndarray:
    """Assigns sequences to groups so that all groups have nearly equal input and target tokens.

    Many groups are balanced in two stages, for speed: first over parts of several groups, then
    greedily over the groups of each part.

    Args:
      lengths: [X, n, 2], the input and target lengths of X lists.
      groups: G, the number of groups.

    Returns:
      The group of each sequence, [X, n] int64, from 0.
    """
    X, n, _ = lengths.shape
    if groups == 1:
        return np.zeros((X, n), np.int64)
    size = lengths / np.maximum(lengths.sum(axis=1, keepdims=True), 1)
    part_sizes = range(MAX_GREEDY_GROUPS, MAX_GREEDY_GROUPS // 4, -1)
    parts = groups // next((count for count in part_sizes if groups % count == 0), groups)
    if parts <= 1:
        return _balance_greedily(size, groups)
    part = _balance_in_rounds(size, parts)
    items, exists = group_members(part, parts)
    part_items = np.take_along_axis(size, items.reshape(X, -1, 1), axis=1)
    part_items = np.where(exists[..., None], part_items.reshape(*exists.shape, 2), 0)
    inner = _balance_greedily(part_items.reshape(X * parts, -1, 2), groups // parts)
    out = np.empty((X, n), np.int64)
    lists, part_of_item, _ = np.nonzero(exists)
    first_group = part_of_item * (groups // parts)
    out[lists, items[exists]] = first_group + inner.reshape(exists.shape)[exists]
    return out


def _largest_first(size: np.ndarray) -> np.ndarray:
    return np.argsort(-size.max(axis=2), axis=1, kind="stable")


def _balance_greedily(size: np.ndarray, groups: int) -> np.ndarray:
    """Assigns items, largest first, each to the group where the larger of the resulting input and
    target loads is smallest.
    """
    X, n, _ = size.shape
    out = np.zeros((X, n), np.int64)
    load, lists = np.zeros((X, groups, 2)), np.arange(X)
    for i in _largest_first(size).T:
        added = size[lists, i]
        group = (load + added[:, None]).max(axis=2).argmin(axis=1)
        load[lists, group] += added
        out[lists, i] = group
    return out


def _balance_in_rounds(size: np.ndarray, groups: int) -> np.ndarray:
    """Assigns items, largest first, one to each group in a round.

    Rounds alternate: the largest item goes to the group with the smallest load, or the item with
    the most target relative to input goes to the group with the most input relative to target.
    """
    X, n, _ = size.shape
    out = np.zeros((X, n), np.int64)
    load, lists, order = np.zeros((X, groups, 2)), np.arange(X)[:, None], _largest_first(size)
    for start in range(0, n, groups):
        items = order[:, start : start + groups]
        added = np.take_along_axis(size, items[..., None], axis=1)
        if start // groups % 2:
            excess, key = added[..., 1] - added[..., 0], load[..., 0] - load[..., 1]
            items = np.take_along_axis(items, np.argsort(excess, axis=1, kind="stable"), axis=1)
        else:
            key = load.max(axis=2)
        group = np.argsort(key, axis=1, kind="stable")[:, : items.shape[1]]
        out[lists, items] = group
        load[lists, group] += size[lists, items]
    return out


def balance_steps(lengths: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Assigns examples to steps so that all steps have nearly equal input and target tokens.

    The i-th items of all steps are permuted among the steps, for i = 0, 1, ..., each time with the
    least sum of squared loads. The arithmetic is exact, so the result is the same on all machines.

    Args:
      lengths: [S, n, 2], the input and target lengths of the n items of each of S steps.
      epochs: [S, n], the epoch of each item; items stay in their epoch.

    Returns:
      The source step of each step's i-th item, [S, n] int64.
    """
    from scipy.optimize import linear_sum_assignment  # a slow import that evaluation does not need

    total = lengths.sum(axis=(0, 1))
    size = lengths * (total.max() // np.maximum(total, 1))
    load, source_steps = np.zeros_like(size[:, 0]), np.empty(lengths.shape[:2], np.int64)
    for i in range(lengths.shape[1]):
        # The part of sum(|load + size|^2) that depends on the assignment.
        cost = load @ size[:, i].T
        forbidden = len(size) * cost.max() + 1
        cost += forbidden * (epochs[:, None, i] != epochs[:, i])
        _, source_steps[:, i] = linear_sum_assignment(cost)
        load += size[source_steps[:, i], i]
    return source_steps


def next_fit(lengths: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Assigns sequences to rows by next-fit: a new row begins when the next sequence does not fit.

    A partly filled row only wastes attention, so a tighter packing would not pay off.

    Args:
      lengths: [X, n, d], the lengths of X lists of n sequences, in d dimensions (encoder, decoder).
      widths: [d], the width of a row; no sequence is longer.

    Returns:
      The row of each sequence, [X, n] int64, from 0.
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
    """Returns the row widths with the fewest attention scores.

    Args:
      lengths: [X, n, 2], the input and target lengths of X sample lists; 0 for padding of a list.
      longest: the longest input and target that a row must fit, in tokens; lengths are clipped to
        it.
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
    needed: np.ndarray,
    rows: np.ndarray,
    widths: Sequence[RowWidths],
    *,
    num_steps: int | None = None,
) -> tuple[PackedShape, ...]:
    """Returns at most three shapes, in order of work, such that every given step fits one.

    The largest shape fits every step. Smaller candidates have the slots that a quantile of the
    steps needs, or narrower rows; one is added if it saves more time than its compilation takes, or
    if the packing density is low.

    Args:
      needed: [steps, 4], the encoder slots, decoder slots, longest input and longest target of each
        step.
      rows: [steps, W, 2], the encoder rows and decoder rows that a step needs with each width.
      widths: [W], the candidate widths, at least one of which fits every sequence.
      num_steps: the number of steps of the run that the given ones are a sample of; None for as
        many as are given.
    """
    repeats = 1.0 if num_steps is None else num_steps / len(needed)
    slots = needed[:, :2]
    ladder = np.quantile(slots, [*QUANTILES, 1.0], axis=0)
    ladder = np.maximum(np.ceil(ladder / SLOT_MULTIPLE), 1).astype(int) * SLOT_MULTIPLE
    shapes, fits = [], []
    for N, M in ladder.tolist():
        for w, width in enumerate(widths):
            is_fit = PackedShape(N, M, 0, 0, width).fits(needed)
            R, Q = rows[is_fit, w].max(axis=0, initial=0).tolist()
            shapes.append(PackedShape(N, M, R, Q, width))
            fits.append(is_fit)
    work = np.array([shape.work for shape in shapes])
    costs = np.where(np.stack(fits, axis=1), work, np.inf)  # [steps, candidates]
    top = int(costs.sum(axis=0).argmin())

    sizes = np.array([(shape.inputs, shape.targets) for shape in shapes])

    def fill_rate(chosen: list[int]) -> float:
        assigned = np.array(chosen)[costs[:, chosen].argmin(axis=1)]
        return float((slots.sum(axis=0) / sizes[assigned].sum(axis=0)).min())

    chosen = [top]
    while len(chosen) < MAX_SHAPES:
        cost = costs[:, chosen].min(axis=1)
        with_one_more = np.minimum(cost[:, None], costs).sum(axis=0)
        best = int(with_one_more.argmin())
        saved = repeats * (cost.sum() - with_one_more[best]) / work[top]
        if saved <= 0 or (saved < MIN_STEPS_SAVED and fill_rate(chosen) >= MIN_FILL):
            break
        chosen.append(best)
    return tuple(shapes[c] for c in sorted(chosen, key=lambda c: work[c]))
