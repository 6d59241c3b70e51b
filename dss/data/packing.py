"""Packing: several sequences in one row, told apart by segment ids, so that padding costs nothing.

Raffel et al. (2020, section 3.5.2) pack text to text examples; here both views of an example are
packed alike. Attention never crosses a segment, so each sequence is trained as if it were alone.
"""

import dataclasses

import numpy as np

__all__ = ["Packing", "RowShape", "choose_row_shape", "pack"]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How long a packed row is, in tokens, on the encoder's and on the decoder's side."""

    inputs: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each of N sequences lies: its row, its segment in that row, and its first slots."""

    row: np.ndarray  # [N] int32
    segment: np.ndarray  # [N] int32, from 1
    input_start: np.ndarray  # [N] int32
    target_start: np.ndarray  # [N] int32
    num_rows: int


def pack(input_lengths: np.ndarray, target_lengths: np.ndarray, shape: RowShape) -> Packing:
    """Packs N sequences, the largest first, each into the fullest row that still takes it.

    Best fit decreasing in two dimensions: a row must have room for the input and for the target.

    Args:
      input_lengths: [N] lengths in tokens.
      target_lengths: [N] lengths in tokens.
      shape: the row's size; no sequence may be longer.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    n = len(input_lengths)
    if n and (input_lengths.max() > shape.inputs or target_lengths.max() > shape.targets):
        raise ValueError(
            f"a sequence of {input_lengths.max()} / {target_lengths.max()} tokens is longer than "
            f"the row, {shape.inputs} / {shape.targets}"
        )
    size = np.maximum(input_lengths / shape.inputs, target_lengths / shape.targets)
    free = np.empty((n, 2), np.int64)  # per row: encoder slots, decoder slots
    used = np.zeros(n, np.int32)
    num_rows = 0
    row, segment, input_start, target_start = np.empty((4, n), np.int32)
    scale = np.array([1 / shape.inputs, 1 / shape.targets])
    for i in np.argsort(-size, kind="stable"):
        need = (input_lengths[i], target_lengths[i])
        room = free[:num_rows]
        fits = np.flatnonzero((room[:, 0] >= need[0]) & (room[:, 1] >= need[1]))
        if len(fits):
            r = fits[np.argmin(room[fits] @ scale)]
        else:
            r = num_rows
            free[r] = shape.inputs, shape.targets
            num_rows += 1
        used[r] += 1
        row[i], segment[i] = r, used[r]
        input_start[i], target_start[i] = shape.inputs - free[r, 0], shape.targets - free[r, 1]
        free[r] -= need
    return Packing(row, segment, input_start, target_start, num_rows)


def choose_row_shape(
    batches: list[tuple[np.ndarray, np.ndarray]], longest: tuple[int, int], multiple: int = 8
) -> RowShape:
    """Returns the row shape that packs some sample batches into the fewest slots.

    The encoder's row is at least the longest input and the decoder's the longest target, so that
    every sequence fits; candidates go up to four times that.

    Args:
      batches: (input lengths [N], target lengths [N]) of each sample batch.
      longest: the longest input and target of all the data, in tokens.
      multiple: row lengths are multiples of this.
    """

    def up(x: float) -> int:
        return int(np.ceil(x / multiple)) * multiple

    mean_ratio = sum(t.sum() for _, t in batches) / sum(i.sum() for i, _ in batches)
    candidates = set()
    for factor in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0):
        inputs = up(longest[0] * factor)
        for balance in (0.9, 1.0, 1.1, 1.25):
            candidates.add((inputs, max(up(longest[1]), up(inputs * mean_ratio * balance))))
    for factor in (1.0, 1.5, 2.0):
        targets = up(longest[1] * factor)
        candidates.add((max(up(longest[0]), up(targets / mean_ratio)), targets))

    def slots(candidate: tuple[int, int]) -> tuple[int, int]:
        shape = RowShape(*candidate)
        rows = sum(pack(i, t, shape).num_rows for i, t in batches)
        # On a tie the shorter row: attention costs the square of it.
        return rows * (shape.inputs + shape.targets), shape.inputs

    return RowShape(*min(sorted(candidates), key=slots))
