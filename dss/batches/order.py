"""The sequences of each step: a pure function of (seed, step).

A run's order is chosen in dss/runs/data.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dss.batches.packing import (
    balance_steps,
)
from dss.batches.store import TokenStore

__all__ = [
    "BLOCK_STEPS",
    "Order",
    "Sequences",
    "paired_order",
    "sampled_order",
    "sequential_order",
    "views",
]

BLOCK_STEPS = 32  # steps whose lengths are balanced together, or those of an epoch if fewer


class Sequences(NamedTuple):
    """The n sequences of a step.

    Attributes:
      tasks: [n], the index of each sequence's task in the store.
      rows: [n], the index of each sequence's row in its task.
      examples: [n], the index of each sequence's example in the step, ascending from 0.
    """

    tasks: np.ndarray
    rows: np.ndarray
    examples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """The sequences of each step.

    Attributes:
      draw: a function from a step to its sequences.
      most: an upper bound on the number of sequences of a step.
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
    """Returns the items at positions of an endless stream that is reshuffled each epoch, and the
    epoch of each.
    """
    epochs, offsets = np.divmod(positions, n)
    items = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        items[in_epoch] = _permutation(n, seed, int(epoch), stream)[offsets[in_epoch]]
    return items, epochs


def views(
    store: TokenStore, examples: Sequence[int] | np.ndarray, epochs: np.ndarray | int = 0
) -> Sequences:
    """Returns the sequences of some examples: one for each task that an example has a row in.

    An example with several rationales uses them in turn, one each epoch.

    Args:
      store: the tokens.
      examples: [E], the indices of the examples in the store.
      epochs: the epoch of all examples, or of each, [E].
    """
    first_rows, counts = store.rows[examples], store.counts[examples]
    indices, tasks = np.nonzero(counts)
    turns = np.broadcast_to(epochs, len(first_rows))[indices] % counts[indices, tasks]
    rows = first_rows[indices, tasks] + turns
    return Sequences(tasks, rows, indices)


def paired_order(store: TokenStore, batch_size: int, seed: int) -> Order:
    """Returns the order of paired training: `batch_size` examples per step, each in all its tasks.

    As in the reference implementation, every epoch has each example once, in a new order. Then
    examples of an epoch are balanced across the steps of a block, so that all steps have nearly
    equal numbers of tokens and few shapes suffice.
    """
    steps = min(BLOCK_STEPS, max(1, len(store) // batch_size))

    @functools.lru_cache(maxsize=2)
    def draw_block(block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples of a block [steps, batch_size], and the epoch of each."""
        positions = np.arange(block * steps * batch_size, (block + 1) * steps * batch_size)
        examples, epochs = _shuffled(len(store), positions, seed)
        tasks, rows, indices = views(store, examples, epochs)
        lengths = np.zeros((len(examples), 2), np.int64)
        np.add.at(lengths, indices, store.lengths(tasks, rows))
        shape = steps, batch_size
        source_steps = balance_steps(lengths.reshape(*shape, 2), epochs.reshape(shape))
        balanced = source_steps * batch_size + np.arange(batch_size)
        return examples[balanced], epochs[balanced]

    def order(step: int) -> Sequences:
        block, offset = divmod(step, steps)
        examples, epochs = draw_block(block)
        return views(store, examples[offset], epochs[offset])

    return Order(order, batch_size * len(store.tasks))


def sequential_order(store: TokenStore, batch_size: int) -> Order:
    """Returns the order of evaluation: every example once, in the store's order."""

    def order(step: int) -> Sequences:
        start = step * batch_size
        return views(store, np.arange(start, min(start + batch_size, len(store))))

    return Order(order, batch_size * len(store.tasks))


def sampled_order(store: TokenStore, batch_size: int, seed: int, rates: tuple[float, ...]) -> Order:
    """Returns the order of sampled training: `batch_size` sequences per step, tasks by their rates.

    The number of sequences of each task up to a step is rounded, not drawn at random: the
    proportions are exact over a run, and the order is a function of the step alone.
    """

    def task_counts(step: int) -> list[int]:
        """Returns the number of sequences of each task before a step; it never decreases."""
        left, counts = step * batch_size, []
        for k, rate in enumerate(rates):
            rest = sum(rates[k:])
            counts.append(math.floor(left * rate / rest + 0.5) if rest else 0)
            left -= counts[-1]
        return counts

    # For each task, the first row and the number of rows of each of its examples, in row order.
    firsts, counts = [], []
    for k in range(len(store.tasks)):
        examples = np.flatnonzero(store.counts[:, k])
        examples = examples[np.argsort(store.rows[examples, k])]
        firsts.append(store.rows[examples, k])
        counts.append(store.counts[examples, k])

    def order(step: int) -> Sequences:
        begin, end = task_counts(step), task_counts(step + 1)
        tasks, rows = [], []
        for k in range(len(store.tasks)):
            positions = np.arange(begin[k], end[k])
            items, epochs = _shuffled(len(firsts[k]), positions, seed, stream=k + 1)
            tasks.append(np.full(len(positions), k))
            rows.append(firsts[k][items] + epochs % counts[k][items])
        total = sum(map(len, rows))
        return Sequences(np.concatenate(tasks), np.concatenate(rows), np.arange(total))

    return Order(order, batch_size)
