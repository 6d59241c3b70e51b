"""Train and validation batches: a pure function of (seed, step), from a token store.

A batch is a dict of int32 arrays. Its sequences, each one view of one example, are its segments.
Packed, they lie one after another in G groups of N encoder and M decoder slots, and three arrays
say which slots the rows of attention read (see `dss.student.ops.Rows`). Two segments of a
group, `predict: a` -> `x` and `explain: b` -> `y z`, look so (1 is EOS, 0 padding):

    encoder_input_tokens   [G, N]   predict : a 1 explain : b 1 0 0
    encoder_segment_ids    [G, N]         1 1 1 1       2 2 2 2 0 0
    decoder_target_tokens  [G, M]   x 1 y z 1 0
    decoder_input_tokens   [G, M]   0 x 0 y z 0     targets, shifted right in each segment
    decoder_segment_ids    [G, M]   1 1 2 2 2 0
    decoder_task_ids       [G, M]   1 1 2 2 2 0     1 + the target's task in the mixture
    encoder_rows           [G, R, S]   slots that a row of the encoder's self-attention reads:
                                       (0 1 2 3), (4 5 6 7); N for none
    decoder_rows           [G, Q, T]   the same for the decoder's: (0 1 2 3 4); M for none
    cross_rows             [G, Q, C]   encoder slots that a row of decoder_rows attends to:
                                       (0 1 2 3 4 5 6 7); N for none

Unpacked, every group is one sequence and its own row, and there are no rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from dss.data.packing import PackedShape, RowWidths, choose_shapes, choose_widths, deal, next_fit
from dss.data.store import TokenStore

__all__ = [
    "Batch",
    "Batches",
    "Order",
    "fill",
    "iterate",
    "paired_order",
    "sampled_order",
    "sequential_order",
    "views",
]

Batch = dict[str, np.ndarray]

SAMPLE_STEPS = 32  # batches looked at to choose the width of rows
CHUNK_STEPS = 1024  # batches laid out together, to see what they need


@dataclasses.dataclass(frozen=True)
class Order:
    """Which sequences each step has.

    Attributes:
      draw: maps a step to their tasks and their rows, [N] each.
      most: no step has more of them.
    """

    draw: Callable[[int], tuple[np.ndarray, np.ndarray]]
    most: int

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sequences of a step."""
        return self.draw(step)


@functools.lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, stream)).permutation(n)


def _shuffled(n: int, positions: np.ndarray, seed: int, stream: int = 0) -> np.ndarray:
    """Returns the items at some positions of the endless stream of reshuffled epochs."""
    epochs, offsets = np.divmod(positions, n)
    out = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(n, seed, int(epoch), stream)[offsets[here]]
    return out


def views(store: TokenStore, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sequences of some examples: every view that each of them has."""
    rows = store.rows[examples]
    which, tasks = np.nonzero(rows >= 0)
    return tasks, rows[which, tasks]


def paired_order(store: TokenStore, batch_size: int, seed: int) -> Order:
    """Returns the reference's order: `batch_size` examples a step, each in all its views."""

    def order(step: int) -> tuple[np.ndarray, np.ndarray]:
        positions = step * batch_size + np.arange(batch_size)
        return views(store, _shuffled(len(store), positions, seed))

    return Order(order, batch_size * len(store.tasks))


def sequential_order(store: TokenStore, batch_size: int) -> Order:
    """Returns the order of evaluation: every example once, in the store's order."""

    def order(step: int) -> tuple[np.ndarray, np.ndarray]:
        start = step * batch_size
        return views(store, np.arange(start, min(start + batch_size, len(store))))

    return Order(order, batch_size * len(store.tasks))


def sampled_order(store: TokenStore, batch_size: int, seed: int, rates: tuple[float, ...]) -> Order:
    """Returns the order of a mixture: `batch_size` sequences a step, tasks in proportion to rates.

    How many sequences each task has given by step s is rounded, not drawn: the proportion is exact
    over a run, and the order still a function of the step alone.
    """

    def given(step: int) -> list[int]:
        """Returns how many sequences each task has given before a step; never falls with it."""
        left, counts = step * batch_size, []
        for k, rate in enumerate(rates):
            rest = sum(rates[k:])
            counts.append(math.floor(left * rate / rest + 0.5) if rest else 0)
            left -= counts[-1]
        return counts

    def order(step: int) -> tuple[np.ndarray, np.ndarray]:
        begin, end = given(step), given(step + 1)
        tasks, rows = [], []
        for k, task in enumerate(store.tasks):
            positions = np.arange(begin[k], end[k])
            tasks.append(np.full(len(positions), k))
            rows.append(_shuffled(len(task.inputs), positions, seed, stream=k + 1))
        return np.concatenate(tasks), np.concatenate(rows)

    return Order(order, batch_size)


def _slots(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the concatenation of `arange(start, start + length)` over all N, [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


class Batches:
    """The batches of an order, by step: `batches[step]`.

    Args:
      store: the tokens.
      order: which sequences each step has.
      num_steps: how many steps there are; indices go from 0 to below it.
      packed: sequences in flat slots; or each in a row of its own, padded to the longest.
      groups: G, among which the sequences are dealt (data shards x microbatches).

    Attributes:
      widths: of attention's rows; None if unpacked.
      shapes: the shapes that batches have, ascending; at most three, so a training step is
        compiled at most three times. Every step is looked at, so every step fits one.
    """

    def __init__(
        self,
        store: TokenStore,
        order: Order,
        *,
        num_steps: int,
        packed: bool = True,
        groups: int = 1,
    ):
        self.store, self.order, self.num_steps, self.packed = store, order, num_steps, packed
        self.groups = groups
        self._lengths = [(task.inputs.lengths, task.targets.lengths) for task in store.tasks]
        self.widths: RowWidths | None = None
        if not packed:
            rows = -(-order.most // groups) * groups
            self.shapes: tuple[PackedShape, ...] = (PackedShape(*store.longest, rows, rows),)
            return
        sample = self._dealt(range(min(num_steps, SAMPLE_STEPS)))[0]
        self.widths = choose_widths(sample, store.longest)
        chunks = range(0, num_steps, CHUNK_STEPS)
        needed = [self._needed(range(s, min(s + CHUNK_STEPS, num_steps))) for s in chunks]
        self.shapes = choose_shapes(np.concatenate(needed))

    def __len__(self) -> int:
        return self.num_steps

    def _sequences(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the tasks [n], rows [n] and lengths [n, 2] of a step's sequences."""
        tasks, rows = self.order(step)
        lengths = np.empty((len(tasks), 2), np.int64)
        for k, (inputs, targets) in enumerate(self._lengths):
            here = tasks == k
            lengths[here] = np.stack([inputs[rows[here]], targets[rows[here]]], axis=1)
        return tasks, rows, lengths

    def _dealt(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sequences of some steps, dealt among the groups.

        Returns:
          Lengths [steps * G, n, 2], 0 where a group has fewer than n sequences, and which sequence
          of its step each is [steps * G, n], -1 for none.
        """
        most, G = self.order.most, self.groups
        lengths = np.zeros((len(steps), most, 2), np.int64)
        for i, step in enumerate(steps):
            found = self._sequences(step)[2]
            lengths[i, : len(found)] = found
        group = deal(lengths, G)
        # In each group the order drawn is kept; a stable sort by group brings it together.
        order = np.argsort(group, axis=1, kind="stable")
        counts = (group[:, :, None] == np.arange(G)).sum(axis=1)  # [steps, G]
        n = counts.max()
        first = np.cumsum(counts, axis=1) - counts
        index = first[:, :, None] + np.arange(n)
        there = np.arange(n) < counts[:, :, None]
        which = np.take_along_axis(order, np.minimum(index, most - 1).reshape(len(steps), -1), 1)
        dealt = np.take_along_axis(lengths, which[:, :, None], axis=1).reshape(-1, n, 2)
        which = which.reshape(-1, n)
        there = there.reshape(-1, n) & (dealt[:, :, 0] > 0)
        return np.where(there[:, :, None], dealt, 0), np.where(there, which, -1)

    def _rows(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns each sequence's row of the encoder and of the decoder, [X, n] each."""
        widths = self.widths
        assert widths is not None
        encoder = next_fit(lengths[..., :1], (widths.inputs,))
        return encoder, next_fit(lengths, (widths.cross, widths.targets))

    def _needed(self, steps: range) -> np.ndarray:
        """Returns the slots and rows that the fullest group of each step needs, [steps, 4]."""
        lengths = self._dealt(steps)[0]
        rows = [found.max(axis=1) + 1 for found in self._rows(lengths)]
        needed = np.concatenate([lengths.sum(axis=1), np.stack(rows, axis=1)], axis=1)
        return needed.reshape(len(steps), self.groups, 4).max(axis=1)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        tasks, rows, lengths = self._sequences(step)
        n = len(tasks)
        if not self.packed:
            shape, G = self.shapes[0], self.shapes[0].input_rows
            group, segment, starts = np.arange(n), np.ones(n, int), np.zeros((n, 2), int)
            return self._tokens(tasks, rows, lengths, shape, G, group, segment, starts)
        dealt, which = self._dealt(range(step, step + 1))
        need = self._needed(range(step, step + 1))[0]
        shape = next(s for s in self.shapes if (need <= dataclasses.astuple(s)).all())
        # Back from the groups [G, n] to the step's own order [n].
        at = which >= 0
        group, segment = np.empty((2, n), np.int64)
        group[which[at]], segment[which[at]] = (i for i in np.nonzero(at))
        before = np.cumsum(dealt, axis=1) - dealt
        starts = np.empty((n, 2), np.int64)
        starts[which[at]] = before[at]
        batch = self._tokens(tasks, rows, lengths, shape, self.groups, group, segment + 1, starts)

        encoder, decoder = self._rows(dealt)
        widths = self.widths
        assert widths is not None
        layouts = (
            ("encoder_rows", encoder, 0, shape.input_rows, widths.inputs),
            ("decoder_rows", decoder, 1, shape.target_rows, widths.targets),
            ("cross_rows", decoder, 0, shape.target_rows, widths.cross),
        )
        for name, row, side, num_rows, width in layouts:
            empty = (shape.inputs, shape.targets)[side]
            table = np.full((self.groups, num_rows, width), empty, np.int32)
            row, first, size = row[at], before[..., side][at], dealt[..., side][at]
            # A row begins where its first sequence does, and that is where its slots begin.
            key = np.nonzero(at)[0] * num_rows + row
            opens = np.diff(key, prepend=-1) != 0
            row_start = first[opens][np.cumsum(opens) - 1]
            to = _slots(key * width + first - row_start, size)
            table.reshape(-1)[to] = _slots(first, size)
            batch[name] = table
        return batch

    def _tokens(
        self,
        tasks: np.ndarray,
        rows: np.ndarray,
        lengths: np.ndarray,
        shape: PackedShape,
        groups: int,
        group: np.ndarray,
        segment: np.ndarray,
        starts: np.ndarray,
    ) -> Batch:
        """Returns the arrays of tokens, the n sequences at their groups and first slots [n, 2]."""
        N, M = shape.inputs, shape.targets
        names = ("target_tokens", "input_tokens", "segment_ids", "task_ids")
        batch = {f"encoder_{name}": np.zeros((groups, N), np.int32) for name in names[1:3]}
        batch |= {f"decoder_{name}": np.zeros((groups, M), np.int32) for name in names}
        flat = {name: array.reshape(-1) for name, array in batch.items()}
        for k, task in enumerate(self.store.tasks):
            here = tasks == k
            sizes = lengths[here, 0]
            to = _slots(group[here] * N + starts[here, 0], sizes)
            tokens = task.inputs.tokens[_slots(task.inputs.offsets[rows[here]], sizes)]
            flat["encoder_input_tokens"][to] = tokens
            flat["encoder_segment_ids"][to] = np.repeat(segment[here], sizes)

            sizes = lengths[here, 1]
            to = _slots(group[here] * M + starts[here, 1], sizes)
            tokens = task.targets.tokens[_slots(task.targets.offsets[rows[here]], sizes)]
            flat["decoder_target_tokens"][to] = tokens
            shifted = np.roll(tokens, 1)
            shifted[np.cumsum(sizes) - sizes] = 0
            flat["decoder_input_tokens"][to] = shifted
            flat["decoder_segment_ids"][to] = np.repeat(segment[here], sizes)
            flat["decoder_task_ids"][to] = k + 1
        return batch


def fill(batch: Batch) -> tuple[float, float]:
    """Returns the part of encoder and of decoder slots that hold a token."""
    return (
        float((batch["encoder_segment_ids"] > 0).mean()),
        float((batch["decoder_segment_ids"] > 0).mean()),
    )


def iterate(batches: Batches, start: int = 0, buffer: int = 4) -> Iterator[Batch]:
    """Yields the batches from a step on, prepared ahead in another thread."""
    import grain  # imports slowly; evaluation and packing do without

    steps = grain.MapDataset.range(start, len(batches)).map(batches.__getitem__)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)
    yield from steps.to_iter_dataset(options)
