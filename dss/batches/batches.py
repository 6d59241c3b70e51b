"""Train and validation batches: a pure function of (seed, step), from a token store.

Every process computes the whole batch of a step, and `put_batch` (dss/parallel/mesh.py) keeps its
part.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from dss.batches.batch import Batch
from dss.batches.order import BLOCK_STEPS, Order
from dss.batches.packing import (
    PackedShape,
    RowWidths,
    balance_groups,
    choose_shapes,
    choose_widths,
    group_members,
    next_fit,
)
from dss.batches.store import TokenStore

__all__ = ["Batches", "iterate"]

SHAPE_BLOCKS = 8  # blocks of steps, spread over the run, that shapes are chosen from; fewer, but
SHAPE_GROUPS = 2**14  # at least 2, where their groups are more: more groups vary less by step
NARROWER = (0.2, 0.4, 0.6, 0.8, 0.9)  # quantiles of the longest sequences, candidates for widths


def _slots(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the concatenated ranges `arange(start, start + length)`, [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _rows(lengths: np.ndarray, widths: RowWidths) -> tuple[np.ndarray, np.ndarray]:
    """Returns the encoder row and the decoder row of each item, [X, n] each."""
    encoder = next_fit(lengths[..., :1], (widths.inputs,))
    return encoder, next_fit(lengths, (widths.cross, widths.targets))


def _sample_blocks(num_steps: int, groups: int) -> list[range]:
    """Returns blocks of steps spread over a run; for a short run, all its steps.

    The lengths of the steps of a block are balanced together, see `paired_order`.
    """
    size = BLOCK_STEPS
    count = min(SHAPE_BLOCKS, max(2, SHAPE_GROUPS // (size * groups)))
    if num_steps <= count * size:
        starts = list(range(0, num_steps, size))
    else:
        last = num_steps // size - 1
        starts = [size * (last * k // (count - 1)) for k in range(count)]
    return [range(start, min(start + size, num_steps)) for start in starts]


def _growing_shapes(shape: PackedShape) -> Iterator[PackedShape]:
    while True:
        shape = shape.enlarged()
        yield shape


class Batches:
    """The batches of an order, indexed by step: `batches[step]`.

    Batches are packed from items: an item is a sequence or, with one encoder pass, an example.

    Args:
      store: the tokens.
      order: the sequences of each step.
      num_steps: the number of steps.
      packed: whether sequences are packed; else each is padded to the longest, in its own row.
      groups: G, the number of groups that items are balanced across (data shards x microbatches).
      starts: the decoder's start id of each task, [K], if the tasks of an example share one input;
        None if each task has its own input, and all decoders start from 0.

    Attributes:
      shapes: the shapes of the batches, in order of work, at most three; the train step is compiled
        once for each.
      spare: a larger shape for the few steps that fit none of them; None if shapes are chosen from
        all steps.
    """

    def __init__(
        self,
        store: TokenStore,
        order: Order,
        *,
        num_steps: int,
        packed: bool = True,
        groups: int = 1,
        starts: tuple[int, ...] | None = None,
    ):
        self.store, self.order, self.num_steps, self.packed = store, order, num_steps, packed
        self.groups, self.starts = groups, starts
        self.spare: PackedShape | None = None
        self._max_items = order.most if starts is None else -(-order.most // len(store.tasks))
        longest = store.longest if starts is None else store.longest_together
        if not packed:
            rows = -(-self._max_items // groups) * groups
            full = RowWidths(longest[0], longest[1], longest[0])
            self.shapes: tuple[PackedShape, ...] = (PackedShape(*longest, rows, rows, full),)
            return
        blocks = [self._grouped_lengths(block)[0] for block in _sample_blocks(num_steps, groups)]
        sample = blocks[0]
        narrower = np.quantile(self._slots_needed(sample)[:, 2:], NARROWER, axis=0).clip(min=1)
        bounds = [*map(tuple, narrower.astype(int).tolist()), longest]
        widths = [choose_widths(sample, bound) for bound in bounds]
        widths = [*dict.fromkeys(reversed(widths))][::-1]  # the last ones fit every sequence
        needed = np.concatenate([self._slots_needed(block) for block in blocks])
        row_counts = np.concatenate(
            [np.stack([self._rows_needed(b, w) for w in widths], axis=1) for b in blocks]
        )
        self.shapes = choose_shapes(needed, row_counts, widths, num_steps=num_steps)
        if len(needed) < num_steps:
            (N, M), (R, Q) = (x.max(axis=0).tolist() for x in (needed[:, :2], row_counts[:, -1]))
            self.spare = PackedShape(N, M, R, Q, widths[-1]).enlarged()

    def __len__(self) -> int:
        return self.num_steps

    def lengths(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the lengths of a step's inputs [i] and targets [n] in tokens, and the index of
        the input that each target attends to [n].
        """
        _, _, lengths, items = self._sequences(step)
        is_first = np.diff(items, prepend=-1) != 0
        return lengths[is_first, 0], lengths[:, 1], items

    def _sequences(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the tasks, rows, lengths [n, 2] and items of a step's n sequences."""
        tasks, rows, examples = self.order(step)
        lengths = self.store.lengths(tasks, rows)
        return tasks, rows, lengths, np.arange(len(tasks)) if self.starts is None else examples

    def _grouped_lengths(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items of some steps, balanced across groups.

        Returns:
          The lengths [steps * G, n, 2], 0 if a group has fewer than n items, and the index of each
          item in its step [steps * G, n], -1 for none.
        """
        G = self.groups
        lengths = np.zeros((len(steps), self._max_items, 2), np.int64)
        for i, step in enumerate(steps):
            inputs, targets, items = self.lengths(step)
            lengths[i, : len(inputs), 0] = inputs
            np.add.at(lengths[i, :, 1], items, targets)
        # In each group, items keep the order that they are drawn in.
        items, exists = group_members(balance_groups(lengths, G), G)
        n = exists.shape[-1]
        grouped = np.take_along_axis(lengths, items.reshape(len(steps), -1, 1), axis=1)
        grouped, items = grouped.reshape(-1, n, 2), items.reshape(-1, n)
        exists = exists.reshape(-1, n) & (grouped[:, :, 0] > 0)
        return np.where(exists[:, :, None], grouped, 0), np.where(exists, items, -1)

    def _slots_needed(self, grouped: np.ndarray) -> np.ndarray:
        """Returns the encoder and decoder slots that the fullest group of each step needs, and the
        longest input and target of the step, [steps, 4].

        Args:
          grouped: the lengths of the items, from `_grouped_lengths`.
        """
        needed = np.concatenate([grouped.sum(axis=1), grouped.max(axis=1)], axis=1)
        return needed.reshape(-1, self.groups, 4).max(axis=1)

    def _rows_needed(self, grouped: np.ndarray, widths: RowWidths) -> np.ndarray:
        """Returns the encoder and decoder rows that the fullest group needs, [steps, 2]."""
        rows = [row.max(axis=1) + 1 for row in _rows(grouped, widths)]
        return np.stack(rows, axis=1).reshape(-1, self.groups, 2).max(axis=1)

    @property
    def largest(self) -> PackedShape:
        """The largest expected shape."""
        return self.spare or self.shapes[-1]

    def most_slots(self) -> tuple[int, int]:
        """Returns the most encoder and decoder slots of any step, by looking at every step."""
        if not self.packed:
            return self.shapes[0].inputs, self.shapes[0].targets
        shapes = set()
        for start in range(0, self.num_steps, BLOCK_STEPS):
            block = range(start, min(start + BLOCK_STEPS, self.num_steps))
            grouped = self._grouped_lengths(block)[0]
            for step in grouped.reshape(len(block), self.groups, -1, 2):
                shapes.add(self._layout(step)[0])
        return max(s.inputs for s in shapes), max(s.targets for s in shapes)

    def _layout(self, grouped: np.ndarray) -> tuple[PackedShape, tuple[np.ndarray, np.ndarray]]:
        """Returns the first shape that fits the batch of a step, and the rows of its items.

        Args:
          grouped: the lengths of the step's items, from `_grouped_lengths`.

        Returns:
          The shape, and the encoder and decoder row of each item, see `_rows`.
        """
        needed = self._slots_needed(grouped)[0]
        spare = () if self.spare is None else (self.spare,)
        for shape in itertools.chain(self.shapes, spare, _growing_shapes(self.largest)):
            if shape.fits(needed):
                encoder, decoder = _rows(grouped, shape.widths)
                if encoder.max() < shape.input_rows and decoder.max() < shape.target_rows:
                    return shape, (encoder, decoder)
        raise AssertionError("shapes grow until one fits")

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        n = len(self.lengths(step)[0])
        if not self.packed:
            shape, G = self.shapes[0], self.shapes[0].input_rows
            group, segment, starts = np.arange(n), np.ones(n, int), np.zeros((n, 2), int)
            return self._tokens(step, shape, G, group, segment, starts)
        grouped, items = self._grouped_lengths(range(step, step + 1))
        shape, (encoder, decoder) = self._layout(grouped)
        # From the order of the groups [G, n] to that of the step's items [n].
        exists = items >= 0
        group, segment = np.empty((2, n), np.int64)
        group[items[exists]], segment[items[exists]] = (i for i in np.nonzero(exists))
        before = np.cumsum(grouped, axis=1) - grouped
        starts = np.empty((n, 2), np.int64)
        starts[items[exists]] = before[exists]
        batch = self._tokens(step, shape, self.groups, group, segment + 1, starts)
        rows: dict[str, np.ndarray] = {}
        widths = shape.widths
        layouts = (
            ("encoder_rows", encoder, 0, shape.input_rows, widths.inputs),
            ("decoder_rows", decoder, 1, shape.target_rows, widths.targets),
            ("cross_rows", decoder, 0, shape.target_rows, widths.cross),
        )
        for name, row, side, num_rows, width in layouts:
            empty = (shape.inputs, shape.targets)[side]
            table = np.full((self.groups, num_rows, width), empty, np.int32)
            row, first, size = row[exists], before[..., side][exists], grouped[..., side][exists]
            # The first slot of a row is the first slot of its first item.
            key = np.nonzero(exists)[0] * num_rows + row
            is_first = np.diff(key, prepend=-1) != 0
            row_start = first[is_first][np.cumsum(is_first) - 1]
            positions = _slots(key * width + first - row_start, size)
            table.reshape(-1)[positions] = _slots(first, size)
            rows[name] = table
        return dataclasses.replace(batch, **rows)

    def _tokens(
        self,
        step: int,
        shape: PackedShape,
        groups: int,
        group: np.ndarray,
        segment: np.ndarray,
        first: np.ndarray,
    ) -> Batch:
        """Returns the token arrays of a step.

        Args:
          step: the step.
          shape: the shape of a group.
          groups: the number of groups.
          group: [i], the group of each item.
          segment: [i], the number of each item in its group, from 1.
          first: [i, 2], the first encoder slot and the first decoder slot of each item.
        """
        N, M, K = shape.inputs, shape.targets, len(self.store.tasks)
        names = ("target_tokens", "input_tokens", "segment_ids", "task_ids")
        arrays = {f"encoder_{name}": np.zeros((groups, N), np.int32) for name in names[1:3]}
        arrays |= {f"decoder_{name}": np.zeros((groups, M), np.int32) for name in names}
        tasks, rows, lengths, items = self._sequences(step)
        is_first = np.diff(items, prepend=-1) != 0  # the sequence that has its item's input
        target_segment = segment[items]
        if self.starts is not None:
            arrays["decoder_reads"] = np.zeros((groups, M), np.int32)
            target_segment = (target_segment - 1) * K + tasks + 1
        before = np.cumsum(lengths[:, 1]) - lengths[:, 1]
        before -= before[is_first][np.cumsum(is_first) - 1]  # earlier target tokens of the item
        flat = {name: array.reshape(-1) for name, array in arrays.items()}
        for k, task in enumerate(self.store.tasks):
            chosen = (tasks == k) & is_first
            sizes, item = lengths[chosen, 0], items[chosen]
            slots = _slots(group[item] * N + first[item, 0], sizes)
            tokens = task.inputs.tokens[_slots(task.inputs.offsets[rows[chosen]], sizes)]
            flat["encoder_input_tokens"][slots] = tokens
            flat["encoder_segment_ids"][slots] = np.repeat(segment[item], sizes)

            chosen = tasks == k
            sizes, item = lengths[chosen, 1], items[chosen]
            slots = _slots(group[item] * M + first[item, 1] + before[chosen], sizes)
            tokens = task.targets.tokens[_slots(task.targets.offsets[rows[chosen]], sizes)]
            flat["decoder_target_tokens"][slots] = tokens
            shifted = np.roll(tokens, 1)
            shifted[np.cumsum(sizes) - sizes] = 0 if self.starts is None else self.starts[k]
            flat["decoder_input_tokens"][slots] = shifted
            flat["decoder_segment_ids"][slots] = np.repeat(target_segment[chosen], sizes)
            flat["decoder_task_ids"][slots] = k + 1
            if self.starts is not None:
                flat["decoder_reads"][slots] = np.repeat(segment[item], sizes)
        return Batch(**arrays)


def iterate(batches: Batches, start: int = 0, buffer: int = 4) -> Iterator[Batch]:
    """Yields the batches from a step on, prefetched in another thread."""
    import grain  # a slow import that evaluation and packing do not need

    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
    yield from steps.to_iter_dataset(options)
