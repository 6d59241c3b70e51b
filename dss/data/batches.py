"""Train and validation batches: a pure function of (seed, step), from a token store.

A batch is a dict of int32 arrays, R rows of S encoder and T decoder slots. Each row holds one or
more segments (one, if unpacked); a segment is one view of one example. Two segments of a row,
`predict: a` -> `x` and `explain: b` -> `y z`, look so (1 is EOS, 0 padding):

    encoder_input_tokens   [R, S]   predict : a 1 explain : b 1 0 0
    encoder_segment_ids    [R, S]         1 1 1 1       2 2 2 2 0 0
    decoder_target_tokens  [R, T]   x 1 y z 1 0
    decoder_input_tokens   [R, T]   0 x 0 y z 0     targets, shifted right in each segment
    decoder_segment_ids    [R, T]   1 1 2 2 2 0
    decoder_task_ids       [R, T]   1 1 2 2 2 0     1 + the target's task in the mixture
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from dss.data.packing import RowShape, choose_row_shape, pack
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

SAMPLE_STEPS = 32  # batches looked at to choose the number of rows
SHAPE_STEPS = 4  # those of them looked at to choose the row shape


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
      packed: several sequences a row, or one.
      row_multiple: the number of rows is a multiple of this (data shards x microbatches).

    Attributes:
      shape: the row shape.
      row_counts: the numbers of rows a batch may have, ascending; at most three, so a training
        step is compiled at most three times, and nearly always once.
    """

    def __init__(
        self,
        store: TokenStore,
        order: Order,
        *,
        num_steps: int,
        packed: bool = True,
        row_multiple: int = 1,
    ):
        self.store, self.order, self.num_steps, self.packed = store, order, num_steps, packed
        lengths = [self._lengths(*order(s)) for s in range(min(num_steps, SAMPLE_STEPS))]

        def up(rows: float) -> int:
            return max(1, int(np.ceil(rows / row_multiple))) * row_multiple

        if packed:
            self.shape = choose_row_shape(lengths[:SHAPE_STEPS], store.longest)
            usual = max(pack(i, t, self.shape).num_rows for i, t in lengths)
            ladder = {usual, usual * 1.25, order.most}
        else:
            self.shape = RowShape(*store.longest)
            ladder = {order.most}
        self.row_counts = sorted({up(rows) for rows in ladder})

    def __len__(self) -> int:
        return self.num_steps

    def _lengths(self, tasks: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = np.zeros((2, len(tasks)), np.int64)
        for k, task in enumerate(self.store.tasks):
            here = tasks == k
            inputs[here] = task.inputs.lengths[rows[here]]
            targets[here] = task.targets.lengths[rows[here]]
        return inputs, targets

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        tasks, rows = self.order(step)
        input_lengths, target_lengths = self._lengths(tasks, rows)
        if self.packed:
            packing = pack(input_lengths, target_lengths, self.shape)
            place = packing.row, packing.segment, packing.input_start, packing.target_start
        else:
            zeros = np.zeros(len(tasks), np.int64)
            place = np.arange(len(tasks)), zeros + 1, zeros, zeros
        needed = int(place[0].max(initial=0)) + 1
        num_rows = next(n for n in self.row_counts if n >= needed)

        S, T = self.shape.inputs, self.shape.targets
        batch = {
            "encoder_input_tokens": np.zeros((num_rows, S), np.int32),
            "encoder_segment_ids": np.zeros((num_rows, S), np.int32),
            "decoder_target_tokens": np.zeros((num_rows, T), np.int32),
            "decoder_input_tokens": np.zeros((num_rows, T), np.int32),
            "decoder_segment_ids": np.zeros((num_rows, T), np.int32),
            "decoder_task_ids": np.zeros((num_rows, T), np.int32),
        }
        flat = {name: array.reshape(-1) for name, array in batch.items()}
        for k, task in enumerate(self.store.tasks):
            here = tasks == k
            row, segment, input_start, target_start = (a[here] for a in place)
            lengths = input_lengths[here]
            to = _slots(row * S + input_start, lengths)
            tokens = task.inputs.tokens[_slots(task.inputs.offsets[rows[here]], lengths)]
            flat["encoder_input_tokens"][to] = tokens
            flat["encoder_segment_ids"][to] = np.repeat(segment, lengths)

            lengths = target_lengths[here]
            to = _slots(row * T + target_start, lengths)
            tokens = task.targets.tokens[_slots(task.targets.offsets[rows[here]], lengths)]
            flat["decoder_target_tokens"][to] = tokens
            shifted = np.roll(tokens, 1)
            shifted[np.cumsum(lengths) - lengths] = 0
            flat["decoder_input_tokens"][to] = shifted
            flat["decoder_segment_ids"][to] = np.repeat(segment, lengths)
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
