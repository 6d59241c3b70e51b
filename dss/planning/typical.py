"""Random tokens with the lengths of a real dataset, for planning without data."""

import numpy as np

from dss.batches.store import Ragged, TaskTokens, TokenStore

__all__ = ["INPUTS_MEAN", "TARGETS_MEAN", "typical_store"]

EXAMPLES = 4096
# Lengths of CQA's training split with PaLM's rationales, in tokens of T5's vocabulary, as mean
# (standard deviation, minimum to maximum): inputs 48.5 (7.8, 33 to 102), labels 2.9 (1.0, 2 to 10),
# rationales 30.9 (5.7, 17 to 71). The mean over labels and rationales is 16.9.
INPUTS_MEAN, TARGETS_MEAN = 48.5, 16.9
# Mean, standard deviation, minimum and maximum, divided by INPUTS_MEAN or TARGETS_MEAN.
INPUTS = (1.0, 0.16, 0.68, 2.1)
LABELS = (0.17, 0.06, 0.12, 0.59)
RATIONALES = (1.83, 0.34, 1.0, 4.2)


def typical_store(
    vocab_size: int, inputs: float = INPUTS_MEAN, targets: float = TARGETS_MEAN
) -> TokenStore:
    """Returns a store of two tasks, label and rationale, with CQA's distribution of lengths.

    Args:
      vocab_size: number of token ids that tokens are drawn from.
      inputs: mean input length in tokens.
      targets: mean target length in tokens, over both tasks.
    """
    rng = np.random.default_rng(0)

    def ragged(mean: float, spread: tuple[float, float, float, float]) -> Ragged:
        center, deviation, minimum, maximum = (mean * factor for factor in spread)
        lengths = np.clip(rng.normal(center, deviation, EXAMPLES), minimum, maximum)
        lengths = np.maximum(lengths.round().astype(int), 2)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Ragged(rng.integers(3, vocab_size, offsets[-1], np.int32), offsets)

    tokens = ragged(inputs, INPUTS)
    tasks = tuple(TaskTokens(tokens, ragged(targets, spread)) for spread in (LABELS, RATIONALES))
    rows = np.tile(np.arange(EXAMPLES, dtype=np.int32)[:, None], 2)
    return TokenStore(tasks, rows, np.ones_like(rows), tuple(map(str, range(EXAMPLES))))
