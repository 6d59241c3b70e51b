"""Stand-ins for data that are not there: tokens without a meaning, in lengths like a dataset's."""

import numpy as np

from dss.batches.store import Ragged, TaskTokens, TokenStore

__all__ = ["INPUTS_MEAN", "TARGETS_MEAN", "typical_store"]

EXAMPLES = 4096
# Measured on CQA's training split with PaLM's rationales, in tokens of T5's vocabulary: inputs of
# 48.5 (deviation 7.8, 33 to 102); labels of 2.9 (1.0, 2 to 10) and rationales of 30.9 (5.7, 17 to
# 71), so targets of 16.9 on average.
INPUTS_MEAN, TARGETS_MEAN = 48.5, 16.9
INPUTS = (1.0, 0.16, 0.68, 2.1)  # mean, deviation, least and most, over INPUTS_MEAN
LABELS = (0.17, 0.06, 0.12, 0.59)  # the same over TARGETS_MEAN
RATIONALES = (1.83, 0.34, 1.0, 4.2)


def typical_store(
    vocab_size: int, inputs: float = INPUTS_MEAN, targets: float = TARGETS_MEAN
) -> TokenStore:
    """Returns a store of two tasks, label and rationale, in lengths spread as CQA's.

    Args:
      vocab_size: the tokens are drawn from it.
      inputs: mean tokens of an input.
      targets: mean tokens of a target, over both tasks.
    """
    draw = np.random.default_rng(0)

    def ragged(mean: float, spread: tuple[float, float, float, float]) -> Ragged:
        center, deviation, least, most = (mean * factor for factor in spread)
        lengths = np.clip(draw.normal(center, deviation, EXAMPLES), least, most)
        lengths = np.maximum(lengths.round().astype(int), 2)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Ragged(draw.integers(3, vocab_size, offsets[-1], np.int32), offsets)

    read = ragged(inputs, INPUTS)
    tasks = tuple(TaskTokens(read, ragged(targets, spread)) for spread in (LABELS, RATIONALES))
    rows = np.tile(np.arange(EXAMPLES, dtype=np.int32)[:, None], 2)
    return TokenStore(tasks, rows, np.ones_like(rows), tuple(map(str, range(EXAMPLES))))
