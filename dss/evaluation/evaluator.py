"""Predictions of a student, and how good they are."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dss.data.metrics import rouge_l
from dss.data.vocabulary import EOS, Vocabulary, encode_example
from dss.errors import UserError
from dss.evaluation.significance import wilson_interval
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import extract_label
from dss.parallel.mesh import fetch, put_batch
from dss.student.config import DecodingConfig, T5Config
from dss.student.decoding import candidate_slots, generate, score_candidates

__all__ = [
    "Answer",
    "DecodingProgress",
    "EvaluationExample",
    "Predictor",
    "Scored",
    "evaluation_set",
    "metric_name",
    "token_metrics",
]


@dataclasses.dataclass(frozen=True)
class EvaluationExample:
    """An input with what a prediction is held against."""

    id: str
    text: str
    target: str
    gold: bool = True  # whether the target is a gold label


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a student makes of an input.

    Attributes:
      text: the label, or a rationale where that is all it learnt.
      probabilities: of each possible label, where it was chosen among them; they sum to 1.
    """

    text: str
    probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)


def metric_name(mixture: Mixture) -> str:
    """Returns what a mixture's student is judged by: "accuracy", or "rouge_l" of rationales."""
    return "rouge_l" if mixture.tasks[0].kind == "rationale" else "accuracy"


def evaluation_set(
    mixture: Mixture, split: str, *, fraction: float = 1.0, seed: int = 0
) -> list[EvaluationExample]:
    """Returns the examples of a split that a mixture's student can be judged on.

    The target is the gold label; the teacher's where a split has no gold label at all; and the
    rationale where the mixture has no label.

    Args:
      mixture: its first task predicts.
      split: "train", "valid" or "test".
      fraction: of the training examples; see `Dataset.examples`.
      seed: of the subsample.

    Raises:
      UserError: there is none.
    """
    task = mixture.tasks[0]
    if task.kind != "rationale":
        examples = mixture.dataset.examples(split, fraction=fraction, seed=seed)
        gold = [EvaluationExample(e.id, e.input, e.label) for e in examples if e.label is not None]
        if gold:
            return gold
    rows = task.rows(split, fraction=fraction, seed=seed)
    if not rows:
        raise UserError(f"{mixture.name}: nothing to evaluate: no example of {split} has a label")
    return [
        EvaluationExample(r.id, r.inputs.removeprefix(task.prefix), r.targets, gold=False)
        for r in rows
    ]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Predictions, judged.

    Attributes:
      metric: "accuracy" or "rouge_l".
      verdicts: each prediction's score: 0 or 1, or ROUGE-L in [0, 1].
    """

    metric: str
    verdicts: tuple[float, ...]

    @property
    def value(self) -> float:
        """The mean score, in [0, 1]."""
        return sum(self.verdicts) / len(self.verdicts)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% Wilson interval of an accuracy."""
        if self.metric != "accuracy":
            return None
        return wilson_interval(int(sum(self.verdicts)), len(self.verdicts))

    @classmethod
    def of(
        cls,
        mixture: Mixture,
        examples: Sequence[EvaluationExample],
        predictions: Sequence[str],
        vocabulary: Vocabulary | None = None,
    ) -> "Scored":
        """Returns the scores of some predictions by the mixture's metric.

        Args:
          mixture: the mixture whose first task predicts.
          examples: the N examples with their targets.
          predictions: the N predictions.
          vocabulary: the student's vocabulary. A label is right too if it is what the vocabulary
            makes of the target, since the student can write nothing else.
        """
        metric = metric_name(mixture)
        pairs = zip(predictions, (e.target for e in examples), strict=True)
        if metric != "accuracy":
            return cls(metric, tuple(rouge_l(p, target) for p, target in pairs))
        is_right = mixture.dataset.labels.is_right
        return cls(metric, tuple(float(is_right(p, target, vocabulary)) for p, target in pairs))


class DecodingProgress:
    """Progress callbacks of decoding. The base class ignores all events."""

    def expect(self, total: int | None) -> None:
        """Called before the student is read, with the number of answers; None if it is unknown."""

    def began(self, shape: Hashable) -> None:
        """Called before a batch, with its shape; the first batch of a shape is compiled."""

    def ended(self, count: int) -> None:
        """Called after a batch, with its number of answers."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A student with its vocabulary, on a mesh.

    Attributes:
      config: the student's shape.
      params: its parameters, on the mesh.
      vocabulary: its vocabulary.
      mesh: where it computes; inputs are split over `data` where they divide.
      decoding: how text is read off it.
      progress: the callbacks for its batches.
    """

    config: T5Config
    params: Any
    vocabulary: Vocabulary
    mesh: Mesh
    decoding: DecodingConfig = DecodingConfig()
    progress: DecodingProgress = DecodingProgress()

    def generate(
        self, inputs: Sequence[Sequence[int]], *, max_length: int, start: int = 0
    ) -> list[str]:
        """Returns the text that the student writes for each input.

        Args:
          inputs: token ids, EOS included.
          max_length: longest output in tokens, EOS counted.
          start: the id that the output starts from; see `Task.start_id`.
        """
        out = [""] * len(inputs)
        for rows, tokens in self._batches(inputs):
            self.progress.began((tokens.shape, max_length, start))
            decoded, _ = generate(
                self.config,
                self.params,
                self._put(tokens),
                max_length=max_length,
                num_beams=self.decoding.num_beams,
                start=start,
            )
            for row, ids in zip(rows, fetch(decoded), strict=False):
                out[row] = self.vocabulary.decode(ids.tolist())
            self.progress.ended(len(rows))
        return out

    def choose(
        self, inputs: Sequence[Sequence[int]], candidates: Sequence[Sequence[str]]
    ) -> list[Answer]:
        """Returns, for each input, the candidate label that the student finds most likely.

        The score is the log-probability of the whole candidate, EOS included; a candidate's
        probability is its share among those of the input.

        Args:
          inputs: token ids, EOS included.
          candidates: of each input, at least one, all different.
        """
        encoded = [[[*self.vocabulary.encode(c), EOS] for c in cs] for cs in candidates]
        most = max((len(cs) for cs in encoded), default=1)
        longest = max((len(c) for cs in encoded for c in cs), default=1)
        slots = candidate_slots(encoded)
        table = np.zeros((len(inputs), most, longest), np.int32)
        for i, cs in enumerate(encoded):
            for j, c in enumerate(cs):
                table[i, j, : len(c)] = c
        out = [Answer("")] * len(inputs)
        for rows, tokens in self._batches(inputs):
            self.progress.began((tokens.shape, table.shape[1:], slots))
            padded_rows = np.resize(rows, len(tokens))
            padded_rows[len(rows) :] = rows[-1]
            offered = self._put(table[padded_rows])
            scores = score_candidates(self.config, self.params, self._put(tokens), offered, slots)
            for row, of_row in zip(rows, fetch(scores), strict=False):
                own = of_row[: len(candidates[row])].astype(np.float64)
                shares = np.exp(own - own.max())
                shares /= shares.sum()
                named = dict(zip(candidates[row], shares.tolist(), strict=True))
                out[row] = Answer(candidates[row][own.argmax()], named)
            self.progress.ended(len(rows))
        return out

    def predict(
        self, mixture: Mixture, examples: Sequence[EvaluationExample], inputs_length: int
    ) -> list[str]:
        """Returns the texts of `answer`."""
        return [answer.text for answer in self.answer(mixture, examples, inputs_length)]

    def answer(
        self, mixture: Mixture, examples: Sequence[EvaluationExample], inputs_length: int
    ) -> list[Answer]:
        """Returns what the student answers: a label, or a rationale where that is all it learnt.

        Args:
          mixture: the one that the student learnt.
          examples: their texts are the inputs.
          inputs_length: longest input, tokens.
        """
        task, dataset = mixture.tasks[0], mixture.dataset
        inputs = [
            encode_example(self.vocabulary, task.prefix + e.text, inputs_length) for e in examples
        ]
        if task.kind == "label":
            choices = [dataset.choices(e.text) if self.decoding.closed else () for e in examples]
            choices = [tuple(dict.fromkeys(cs)) for cs in choices]  # an input may offer one twice
            out = [Answer("")] * len(inputs)
            some = [i for i, c in enumerate(choices) if c]
            chosen = self.choose([inputs[i] for i in some], [choices[i] for i in some])
            others = [i for i, c in enumerate(choices) if not c]
            length = self.decoding.max_length
            written = self.generate([inputs[i] for i in others], max_length=length)
            for i, answer in zip(some + others, chosen + list(map(Answer, written)), strict=True):
                out[i] = answer
            return out
        texts = self.generate(inputs, max_length=self.decoding.rationale_length)
        single = task.kind == "rationale_then_label"
        return [Answer(extract_label(text) if single else text) for text in texts]

    def _put(self, array: np.ndarray) -> jax.Array:
        return put_batch(self.mesh, {"array": array})["array"]

    def _batches(self, inputs: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows [n], tokens [B, S]), inputs of like length together; rows past n repeat."""
        size, multiple = self.decoding.batch_size, self.decoding.length_multiple
        by_length = np.argsort([len(i) for i in inputs], kind="stable")
        for start in range(0, len(inputs), size):
            rows = by_length[start : start + size]
            longest = max(len(inputs[r]) for r in rows)
            tokens = np.zeros((size, -(-longest // multiple) * multiple), np.int32)
            for i in range(size):
                row = inputs[rows[min(i, len(rows) - 1)]]
                tokens[i, : len(row)] = row
            yield rows, tokens


def token_metrics(
    eval_step: Callable[[Any, dict], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, jax.Array]],
    task_names: Sequence[str],
    rates: Sequence[float],
    prefix: str,
) -> dict[str, float]:
    """Returns the loss of a whole split: of each task, and their mean weighted by rate.

    A task without a token in the split is left out.

    Args:
      eval_step: from `make_eval_step`.
      params: the student's.
      batches: the split, on the mesh.
      task_names: names of the mixture's tasks.
      rates: their rates.
      prefix: of the metrics' names, such as "valid".
    """
    totals: Any = None
    for batch in batches:
        sums = jax.tree.map(np.asarray, eval_step(params, batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    there = np.flatnonzero(totals["counts"])
    losses = totals["sums"][there] / totals["counts"][there]
    weights = np.asarray(rates)[there]
    if not weights.any():  # only tasks of rate 0: alpha is 0 and no rationale is there
        weights = np.ones_like(weights)
    metrics = {f"{prefix}/loss": float(np.average(losses, weights=weights))}
    for k, loss in zip(there.tolist(), losses, strict=True):
        right = totals["correct"][k] / totals["counts"][k]
        metrics[f"{prefix}/{task_names[k]}_loss"] = float(loss)
        metrics[f"{prefix}/{task_names[k]}_token_accuracy"] = float(right)
    return metrics
