"""Packing: several sequences in one row, told apart by segment ids, so that padding costs nothing.

Raffel et al. (2020, section 3.5.2) pack text to text examples; here both views of an example are
packed alike. Attention never crosses a segment, so each sequence is trained as if it were alone.
"""

import dataclasses

import numpy as np

__all__ = ["Packing", "RowShape", "choose_row_shape", "pack"]

TARGET_WEIGHTS = (0.5, 1.0, 2.0)  # of the decoder against the encoder, in what is left of a row


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
    """Packs N sequences into few rows.

    Rows are filled one after another, each time with the sequence that comes nearest to what is
    left of the row in both dimensions: a row that has used up its decoder slots wastes its encoder
    slots, so long and short targets must be mixed (Panigrahy et al., 2011, Heuristics for vector
    bin packing: the norm-based greedy). How much a dimension weighs is tried out.

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
    lengths = np.stack([input_lengths, target_lengths], 1).astype(np.int64)
    tried = (_fill_rows(lengths, shape, weight) for weight in TARGET_WEIGHTS)
    order, row = min(tried, key=lambda found: found[1][-1] if n else 0)
    first = np.searchsorted(row, row)  # position of the first sequence of the same row
    before = np.cumsum(lengths[order], axis=0) - lengths[order]
    starts = np.empty((n, 2), np.int32)
    starts[order] = before - before[first]
    rows, segments = np.empty((2, n), np.int32)
    rows[order], segments[order] = row, np.arange(n) - first + 1
    return Packing(rows, segments, starts[:, 0], starts[:, 1], int(row[-1]) + 1 if n else 0)


def _fill_rows(
    lengths: np.ndarray, shape: RowShape, target_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sequences in the order they are placed, and the row of each, both [N]."""
    n = len(lengths)
    scale = np.array([1 / shape.inputs, np.sqrt(target_weight) / shape.targets])
    size = lengths * scale
    largest_first = np.argsort(-size.sum(1), kind="stable")
    size, lengths = size[largest_first], lengths[largest_first]
    placed = np.zeros(n, bool)
    order, row = np.empty((2, n), np.int64)
    free = np.array([shape.inputs, shape.targets])
    current = 0
    for i in range(n):
        while True:
            fits = ~placed & (lengths <= free).all(1)
            if fits.any():
                break
            free = np.array([shape.inputs, shape.targets])
            current += 1
        rest = free * scale - size
        j = np.where(fits, np.einsum("nd,nd->n", rest, rest), np.inf).argmin()
        placed[j] = True
        free = free - lengths[j]
        order[i], row[i] = largest_first[j], current
    return order, row


def choose_row_shape(
    batches: list[tuple[np.ndarray, np.ndarray]], longest: tuple[int, int], multiple: int = 8
) -> RowShape:
    """Returns the row shape that packs each of some sample batches into the fewest slots.

    All batches get as many rows as the fullest one needs, so that one is what counts.

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
    for factor in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0):
        inputs = up(longest[0] * factor)
        for balance in (0.95, 1.0, 1.05, 1.1):
            candidates.add((inputs, max(up(longest[1]), up(inputs * mean_ratio * balance))))
    for factor in (1.0, 1.5, 2.0):
        targets = up(longest[1] * factor)
        candidates.add((max(up(longest[0]), up(targets / mean_ratio)), targets))

    def slots(candidate: tuple[int, int]) -> tuple[int, int]:
        shape = RowShape(*candidate)
        rows = max(pack(i, t, shape).num_rows for i, t in batches)
        # On a tie the shorter row: attention costs the square of it.
        return rows * (shape.inputs + shape.targets), shape.inputs

    return RowShape(*min(sorted(candidates), key=slots))
