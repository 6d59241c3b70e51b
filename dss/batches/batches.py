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

Where the views of an example have one input, that is encoded once: the input and all its targets
take the place of a sequence above. Each target is a segment of its own and starts from its task's
id, and one more array says what it reads:

    decoder_reads          [G, M]   the encoder's segment that each target slot attends to
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dss.batches.packing import (
    PackedShape,
    RowWidths,
    choose_shapes,
    choose_widths,
    deal,
    exchange,
    members,
    next_fit,
)
from dss.batches.store import TokenStore

__all__ = [
    "Batch",
    "Batches",
    "Order",
    "Sequences",
    "fill",
    "iterate",
    "paired_order",
    "sampled_order",
    "sequential_order",
    "views",
]

Batch = dict[str, np.ndarray]

EXCHANGING = 32  # steps among which examples are exchanged; fewer where an epoch has fewer
SHAPE_BLOCKS = 8  # as many steps each, all over the run, that the shapes are chosen by
NARROWER = (0.2, 0.4, 0.6, 0.8, 0.9)  # quantiles of their longest sequences, tried as widths too


class Sequences(NamedTuple):
    """The sequences of a step, [n] each.

    Attributes:
      tasks: of the store.
      rows: of the task.
      examples: which of the step's examples each is a view of, from 0 on, ascending.
    """

    tasks: np.ndarray
    rows: np.ndarray
    examples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """Which sequences each step has.

    Attributes:
      draw: maps a step to them.
      most: no step has more of them.
    """

    draw: Callable[[int], Sequences]
    most: int

    def __call__(self, step: int) -> Sequences:
        """Returns the sequences of a step."""
        return self.draw(step)


@functools.lru_cache(maxsize=8)
def _permutation(n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, stream)).permutation(n)


def _shuffled(
    n: int, positions: np.ndarray, seed: int, stream: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items at some positions of the endless stream of reshuffled epochs, and these."""
    epochs, offsets = np.divmod(positions, n)
    out = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(n, seed, int(epoch), stream)[offsets[here]]
    return out, epochs


def views(
    store: TokenStore, examples: Sequence[int] | np.ndarray, epochs: np.ndarray | int = 0
) -> Sequences:
    """Returns the sequences of some examples: every view that each of them has.

    Of several rationales the first is that of epoch 0, the second of epoch 1, and so on, in turn.

    Args:
      store: the tokens.
      examples: [E].
      epochs: the epoch that each is drawn in, [E], or that all are.
    """
    first, counts = store.rows[examples], store.counts[examples]
    which, tasks = np.nonzero(counts)
    turn = np.broadcast_to(epochs, len(first))[which] % counts[which, tasks]
    rows = first[which, tasks] + turn
    return Sequences(tasks, rows, which)


def paired_order(store: TokenStore, batch_size: int, seed: int) -> Order:
    """Returns the order of training on pairs: `batch_size` examples a step, each in all its views.

    Examples are drawn as the reference draws them: each once in an epoch, in a new order. Then
    steps that follow each other exchange some of the same epoch, so that each has nearly as many
    tokens, and few shapes are filled by all.
    """
    steps = min(EXCHANGING, max(1, len(store) // batch_size))

    @functools.lru_cache(maxsize=2)
    def drawn(part: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples of `steps` steps [steps, batch_size], and the epochs of these."""
        positions = np.arange(part * steps * batch_size, (part + 1) * steps * batch_size)
        examples, epochs = _shuffled(len(store), positions, seed)
        tasks, rows, which = views(store, examples, epochs)
        lengths = np.zeros((len(examples), 2), np.int64)
        np.add.at(lengths, which, store.lengths(tasks, rows))
        shape = steps, batch_size
        taken = exchange(lengths.reshape(*shape, 2), epochs.reshape(shape))
        at = taken * batch_size + np.arange(batch_size)
        return examples[at], epochs[at]

    def order(step: int) -> Sequences:
        part, at = divmod(step, steps)
        examples, epochs = drawn(part)
        return views(store, examples[at], epochs[at])

    return Order(order, batch_size * len(store.tasks))


def sequential_order(store: TokenStore, batch_size: int) -> Order:
    """Returns the order of evaluation: every example once, in the store's order."""

    def order(step: int) -> Sequences:
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

    # Of each task its examples, as they follow each other: their first rows, and how many rows.
    firsts, counts = [], []
    for k in range(len(store.tasks)):
        there = np.flatnonzero(store.counts[:, k])
        there = there[np.argsort(store.rows[there, k])]
        firsts.append(store.rows[there, k])
        counts.append(store.counts[there, k])

    def order(step: int) -> Sequences:
        begin, end = given(step), given(step + 1)
        tasks, rows = [], []
        for k in range(len(store.tasks)):
            positions = np.arange(begin[k], end[k])
            items, epochs = _shuffled(len(firsts[k]), positions, seed, stream=k + 1)
            tasks.append(np.full(len(positions), k))
            rows.append(firsts[k][items] + epochs % counts[k][items])
        total = sum(map(len, rows))
        return Sequences(np.concatenate(tasks), np.concatenate(rows), np.arange(total))

    return Order(order, batch_size)


def _slots(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the concatenation of `arange(start, start + length)` over all N, [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _rows(lengths: np.ndarray, widths: RowWidths) -> tuple[np.ndarray, np.ndarray]:
    """Returns each item's row of the encoder and of the decoder, [X, n] each."""
    encoder = next_fit(lengths[..., :1], (widths.inputs,))
    return encoder, next_fit(lengths, (widths.cross, widths.targets))


def _sample_blocks(num_steps: int) -> list[range]:
    """Returns blocks of steps all over a run; of a short run, all its steps.

    The steps of a block are balanced with each other, see `paired_order`.
    """
    size = EXCHANGING
    if num_steps <= SHAPE_BLOCKS * size:
        starts = list(range(0, num_steps, size))
    else:
        last = num_steps // size - 1
        starts = [size * (last * k // (SHAPE_BLOCKS - 1)) for k in range(SHAPE_BLOCKS)]
    return [range(start, min(start + size, num_steps)) for start in starts]


def _ever_larger(shape: PackedShape) -> Iterator[PackedShape]:
    while True:
        shape = shape.enlarged()
        yield shape


class Batches:
    """The batches of an order, by step: `batches[step]`.

    Args:
      store: the tokens.
      order: which sequences each step has.
      num_steps: how many steps there are; indices go from 0 to below it.
      packed: sequences in flat slots; or each in a row of its own, padded to the longest.
      groups: G, among which the sequences are dealt (data shards x microbatches).
      starts: where the views of an example have one input, the id that each task's outputs start
        from, [K]; None where each has its own, and all start from 0.

    What is packed, an item below, is a sequence or, where views have one input, an example.

    Attributes:
      shapes: the shapes that batches have, by their work; at most three, and in a run of more steps
        than the sample that they are chosen by a spare one for steps that need more. A training
        step is compiled once for each shape that occurs.
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
        self._most = order.most if starts is None else -(-order.most // len(store.tasks))
        longest = store.longest if starts is None else store.longest_together
        if not packed:
            own = -(-self._most // groups) * groups
            alone = RowWidths(longest[0], longest[1], longest[0])
            self.shapes: tuple[PackedShape, ...] = (PackedShape(*longest, own, own, alone),)
            return
        blocks = [self._dealt(block)[0] for block in _sample_blocks(num_steps)]
        sample = blocks[0]
        narrower = np.quantile(self._needed(sample)[:, 2:], NARROWER, axis=0).clip(min=1)
        bounds = [*map(tuple, narrower.astype(int).tolist()), longest]
        widths = [choose_widths(sample, bound) for bound in bounds]
        widths = [*dict.fromkeys(reversed(widths))][::-1]  # the last ones hold every sequence
        needed = np.concatenate([self._needed(block) for block in blocks])
        rows = np.concatenate(
            [np.stack([self._rows_needed(b, w) for w in widths], axis=1) for b in blocks]
        )
        self.shapes = choose_shapes(needed, rows, widths)
        if len(needed) < num_steps:
            (N, M), (R, Q) = (x.max(axis=0).tolist() for x in (needed[:, :2], rows[:, -1]))
            self.shapes += (PackedShape(N, M, R, Q, widths[-1]).enlarged(),)

    def __len__(self) -> int:
        return self.num_steps

    def lengths(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns what a step encodes and decodes.

        Returns:
          The lengths of its inputs [i] and of its targets [n], in tokens, and which input each
          target reads [n].
        """
        _, _, lengths, items = self._sequences(step)
        opens = np.diff(items, prepend=-1) != 0
        return lengths[opens, 0], lengths[:, 1], items

    def _sequences(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the tasks, rows, lengths [n, 2] and items of a step's n sequences."""
        tasks, rows, examples = self.order(step)
        lengths = self.store.lengths(tasks, rows)
        return tasks, rows, lengths, np.arange(len(tasks)) if self.starts is None else examples

    def _dealt(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items of some steps, dealt among the groups.

        Returns:
          Lengths [steps * G, n, 2], 0 where a group has fewer than n items, and which item of its
          step each is [steps * G, n], -1 for none.
        """
        most, G = self._most, self.groups
        lengths = np.zeros((len(steps), most, 2), np.int64)
        for i, step in enumerate(steps):
            inputs, targets, items = self.lengths(step)
            lengths[i, : len(inputs), 0] = inputs
            np.add.at(lengths[i, :, 1], items, targets)
        which, there = members(deal(lengths, G), G)  # in each group the order drawn is kept
        n = there.shape[-1]
        dealt = np.take_along_axis(lengths, which.reshape(len(steps), -1, 1), axis=1)
        dealt, which = dealt.reshape(-1, n, 2), which.reshape(-1, n)
        there = there.reshape(-1, n) & (dealt[:, :, 0] > 0)
        return np.where(there[:, :, None], dealt, 0), np.where(there, which, -1)

    def _needed(self, dealt: np.ndarray) -> np.ndarray:
        """Returns the slots that the fullest group of each step needs, and the longest input and
        target of the step, [steps, 4].

        Args:
          dealt: the lengths of the items, see `_dealt`.
        """
        found = np.concatenate([dealt.sum(axis=1), dealt.max(axis=1)], axis=1)
        return found.reshape(-1, self.groups, 4).max(axis=1)

    def _rows_needed(self, dealt: np.ndarray, widths: RowWidths) -> np.ndarray:
        """Returns the rows of encoder and decoder that the fullest group needs, [steps, 2]."""
        rows = [row.max(axis=1) + 1 for row in _rows(dealt, widths)]
        return np.stack(rows, axis=1).reshape(-1, self.groups, 2).max(axis=1)

    def _shape(self, dealt: np.ndarray) -> PackedShape:
        """Returns the shape of one step's batch: the first that holds it.

        Args:
          dealt: the lengths of the step's items, see `_dealt`.
        """
        needed = self._needed(dealt)[0]
        for shape in itertools.chain(self.shapes, _ever_larger(self.shapes[-1])):
            if shape.holds(needed):
                rows = self._rows_needed(dealt, shape.widths)[0]
                if rows[0] <= shape.input_rows and rows[1] <= shape.target_rows:
                    return shape
        raise AssertionError("a shape that grows without end holds every batch")

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        n = len(self.lengths(step)[0])
        if not self.packed:
            shape, G = self.shapes[0], self.shapes[0].input_rows
            group, segment, starts = np.arange(n), np.ones(n, int), np.zeros((n, 2), int)
            return self._tokens(step, shape, G, group, segment, starts)
        dealt, which = self._dealt(range(step, step + 1))
        shape = self._shape(dealt)
        # Back from the groups [G, n] to the step's own order [n].
        at = which >= 0
        group, segment = np.empty((2, n), np.int64)
        group[which[at]], segment[which[at]] = (i for i in np.nonzero(at))
        before = np.cumsum(dealt, axis=1) - dealt
        starts = np.empty((n, 2), np.int64)
        starts[which[at]] = before[at]
        batch = self._tokens(step, shape, self.groups, group, segment + 1, starts)

        widths = shape.widths
        encoder, decoder = _rows(dealt, widths)
        layouts = (
            ("encoder_rows", encoder, 0, shape.input_rows, widths.inputs),
            ("decoder_rows", decoder, 1, shape.target_rows, widths.targets),
            ("cross_rows", decoder, 0, shape.target_rows, widths.cross),
        )
        for name, row, side, num_rows, width in layouts:
            empty = (shape.inputs, shape.targets)[side]
            table = np.full((self.groups, num_rows, width), empty, np.int32)
            row, first, size = row[at], before[..., side][at], dealt[..., side][at]
            # A row begins where its first item does, and that is where its slots begin.
            key = np.nonzero(at)[0] * num_rows + row
            opens = np.diff(key, prepend=-1) != 0
            row_start = first[opens][np.cumsum(opens) - 1]
            to = _slots(key * width + first - row_start, size)
            table.reshape(-1)[to] = _slots(first, size)
            batch[name] = table
        return batch

    def _tokens(
        self,
        step: int,
        shape: PackedShape,
        groups: int,
        group: np.ndarray,
        segment: np.ndarray,
        first: np.ndarray,
    ) -> Batch:
        """Returns the arrays of tokens of a step.

        Args:
          step: which.
          shape: of a group.
          groups: how many.
          group: of each item, [i].
          segment: its number there, from 1 on, [i].
          first: its first slots, [i, 2].
        """
        N, M, K = shape.inputs, shape.targets, len(self.store.tasks)
        names = ("target_tokens", "input_tokens", "segment_ids", "task_ids")
        batch = {f"encoder_{name}": np.zeros((groups, N), np.int32) for name in names[1:3]}
        batch |= {f"decoder_{name}": np.zeros((groups, M), np.int32) for name in names}
        tasks, rows, lengths, items = self._sequences(step)
        opens = np.diff(items, prepend=-1) != 0  # the sequence that has its item's input
        own = segment[items]  # the number of each target's segment
        if self.starts is not None:
            batch["decoder_reads"] = np.zeros((groups, M), np.int32)
            own = (own - 1) * K + tasks + 1
        before = np.cumsum(lengths[:, 1]) - lengths[:, 1]
        before -= before[opens][np.cumsum(opens) - 1]  # targets of the item that come earlier
        flat = {name: array.reshape(-1) for name, array in batch.items()}
        for k, task in enumerate(self.store.tasks):
            here = (tasks == k) & opens
            sizes, item = lengths[here, 0], items[here]
            to = _slots(group[item] * N + first[item, 0], sizes)
            tokens = task.inputs.tokens[_slots(task.inputs.offsets[rows[here]], sizes)]
            flat["encoder_input_tokens"][to] = tokens
            flat["encoder_segment_ids"][to] = np.repeat(segment[item], sizes)

            here = tasks == k
            sizes, item = lengths[here, 1], items[here]
            to = _slots(group[item] * M + first[item, 1] + before[here], sizes)
            tokens = task.targets.tokens[_slots(task.targets.offsets[rows[here]], sizes)]
            flat["decoder_target_tokens"][to] = tokens
            shifted = np.roll(tokens, 1)
            shifted[np.cumsum(sizes) - sizes] = 0 if self.starts is None else self.starts[k]
            flat["decoder_input_tokens"][to] = shifted
            flat["decoder_segment_ids"][to] = np.repeat(own[here], sizes)
            flat["decoder_task_ids"][to] = k + 1
            if self.starts is not None:
                flat["decoder_reads"][to] = np.repeat(segment[item], sizes)
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
