"""Prediction with a student, and scoring of the predictions."""

import abc
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dss.batches.batch import Batch
from dss.data.metrics import rouge_l
from dss.data.vocabulary import EOS, Vocabulary, encode_example, round_trip
from dss.errors import DssError
from dss.evaluation.significance import wilson_interval
from dss.mixtures.methods import Mixture
from dss.mixtures.tasks import extract_label
from dss.parallel.mesh import fetch, put_batch
from dss.student.config import DecodingConfig, T5Config
from dss.student.decoding import candidate_slots, generate, score_candidates

__all__ = [
    "Answer",
    "DecodingProgress",
    "Engine",
    "EvaluationExample",
    "Predictor",
    "Scored",
    "evaluation_set",
    "has_classes",
    "metric_name",
    "predicted_labels",
    "token_metrics",
]


@dataclasses.dataclass(frozen=True)
class EvaluationExample:
    """An input and the target that its prediction is scored against.

    Attributes:
      id: the example's id.
      text: input text, without the task's prefix.
      target: expected output.
      gold: whether the target is a gold label.
    """

    id: str
    text: str
    target: str
    gold: bool = True


@dataclasses.dataclass(frozen=True)
class Answer:
    """A student's prediction for one input.

    Attributes:
      text: predicted label; the rationale if the student learnt only rationales.
      probabilities: probability of each possible label, summing to 1; empty if the student
        generated the text instead of choosing among labels.
    """

    text: str
    probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, labels: Sequence[str], scores: np.ndarray, temperature: float = 1.0) -> "Answer":
        """Returns the most likely label, with a softmax over the labels.

        Args:
          labels: the C possible labels.
          scores: their log-likelihoods, [C].
          temperature: divisor of the scores in the softmax.
        """
        scores = scores.astype(np.float64)
        softmax = np.exp((scores - scores.max()) / temperature)
        softmax /= softmax.sum()
        return cls(labels[int(scores.argmax())], dict(zip(labels, softmax.tolist(), strict=True)))

    def is_below(self, threshold: float) -> bool:
        """Returns whether the highest probability is below a threshold.

        Generated text has no probability and is below any threshold.
        """
        return max(self.probabilities.values(), default=0.0) < threshold


def metric_name(mixture: Mixture) -> str:
    """Returns the metric of a mixture: "rouge_l" if it has rationales only, else "accuracy"."""
    return "rouge_l" if mixture.tasks[0].kind == "rationale" else "accuracy"


def has_classes(mixture: Mixture) -> bool:
    """Returns whether predictions of a mixture can be scored by class.

    They can if the student predicts labels that are compared as text, or are of a closed set.
    """
    labels = mixture.dataset.labels
    return metric_name(mixture) == "accuracy" and (labels.metric == "text" or bool(labels.closed))


def evaluation_set(
    mixture: Mixture, split: str, *, fraction: float = 1.0, seed: int = 0
) -> list[EvaluationExample]:
    """Returns the examples of a split that a mixture's student can be evaluated on.

    The target is the gold label; the teacher's label if the split has no gold label at all; the
    rationale if the mixture has rationales only.

    Args:
      mixture: the student's mixture; predictions are those of its first task.
      split: "train", "valid" or "test".
      fraction: fraction of the training examples; see `Dataset.examples`.
      seed: random seed of the subsample.

    Raises:
      DssError: if no example of the split has a target.
    """
    task = mixture.tasks[0]
    if task.kind != "rationale":
        examples = mixture.dataset.examples(split, fraction=fraction, seed=seed)
        gold = [EvaluationExample(e.id, e.input, e.label) for e in examples if e.label is not None]
        if gold:
            return gold
    rows = task.rows(split, fraction=fraction, seed=seed)
    if not rows:
        raise DssError(f"{mixture.name}: nothing to evaluate: no example of {split} has a label")
    return [
        EvaluationExample(r.id, r.inputs.removeprefix(task.prefix), r.targets, gold=False)
        for r in rows
    ]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of a set of predictions.

    Attributes:
      metric: "accuracy" or "rouge_l".
      verdicts: score of each prediction: 0 or 1 for accuracy, in [0, 1] for ROUGE-L.
    """

    metric: str
    verdicts: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean score, in [0, 1]."""
        return sum(self.verdicts) / len(self.verdicts)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval of an accuracy (Wilson); None for ROUGE-L."""
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
        """Returns the scores of predictions under the mixture's metric.

        Args:
          mixture: the student's mixture; predictions are those of its first task.
          examples: the N examples with their targets.
          predictions: the N predictions.
          vocabulary: the student's vocabulary. A label is also correct if it equals the target
            encoded and decoded again, which is the closest text that the student can generate.
        """
        metric = metric_name(mixture)
        pairs = zip(predictions, (e.target for e in examples), strict=True)
        if metric != "accuracy":
            return cls(metric, tuple(rouge_l(p, target) for p, target in pairs))
        is_right = mixture.dataset.labels.is_right
        return cls(metric, tuple(float(is_right(p, target, vocabulary)) for p, target in pairs))


def predicted_labels(
    mixture: Mixture,
    examples: Sequence[EvaluationExample],
    predictions: Sequence[str],
    scored: Scored,
    vocabulary: Vocabulary | None = None,
) -> list[str]:
    """Returns the label that each prediction is counted as, in scores by class.

    That is the target if the prediction is correct, else the label that it equals, as written or as
    the vocabulary decodes it. A prediction that equals no label is returned unchanged.

    Args:
      mixture: the student's mixture, see `has_classes`.
      examples: the N examples with their targets.
      predictions: the N predictions.
      scored: the scores of the predictions.
      vocabulary: the student's vocabulary; see `Scored.of`.
    """
    labels = mixture.dataset.labels.closed or dict.fromkeys(e.target for e in examples)
    written = {} if vocabulary is None else {round_trip(vocabulary, n).strip(): n for n in labels}
    written |= {label: label for label in labels}
    rows = zip(examples, predictions, scored.verdicts, strict=True)
    return [e.target if right else written.get(text.strip(), text) for e, text, right in rows]


class DecodingProgress:
    """Progress callbacks of decoding. The base class ignores all events."""

    def expect(self, total: int | None) -> None:
        """Called before the student is read, with the number of answers; None if it is unknown."""

    def began(self, shape: Hashable) -> None:
        """Called before a batch, with its shape; the first batch of a shape is compiled."""

    def ended(self, count: int) -> None:
        """Called after a batch, with its number of answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(abc.ABC):
    """Answers a mixture's examples; subclasses run a student.

    Attributes:
      vocabulary: the student's vocabulary.
      decoding: decoding options: lengths, batch size, beams, choice among labels.
      progress: callbacks for progress.
      temperature: temperature of the label probabilities; see `TemperatureScaling`.
    """

    vocabulary: Vocabulary
    decoding: DecodingConfig = DecodingConfig()
    progress: DecodingProgress = DecodingProgress()
    temperature: float = 1.0

    @abc.abstractmethod
    def generate(
        self, inputs: Sequence[Sequence[int]], *, max_length: int, start: int = 0
    ) -> list[str]:
        """Returns the text that the student generates for each input.

        Args:
          inputs: token ids, including EOS.
          max_length: maximum output length in tokens, including EOS.
          start: token id that decoding starts from; see `Task.start_id`.
        """

    @abc.abstractmethod
    def choose(
        self, inputs: Sequence[Sequence[int]], candidates: Sequence[Sequence[str]]
    ) -> list[Answer]:
        """Returns each input's most likely candidate label, with the candidates' probabilities.

        The score of a candidate is its log-likelihood, including EOS; the probabilities are a
        softmax of the scores, divided by the temperature, over the candidates of the input.

        Args:
          inputs: token ids, including EOS.
          candidates: candidate labels of each input: at least one, without duplicates.
        """

    def predict(
        self, mixture: Mixture, examples: Sequence[EvaluationExample], inputs_length: int
    ) -> list[str]:
        """Returns the predicted texts only; see `answer`."""
        return [answer.text for answer in self.answer(mixture, examples, inputs_length)]

    def answer(
        self, mixture: Mixture, examples: Sequence[EvaluationExample], inputs_length: int
    ) -> list[Answer]:
        """Returns the student's prediction for each example.

        A label is chosen among the possible labels of the input if these are known and
        `decoding.closed` is set; otherwise text is generated.

        Args:
          mixture: the mixture that the student was trained on.
          examples: the examples to predict.
          inputs_length: maximum input length in tokens.
        """
        task, dataset = mixture.tasks[0], mixture.dataset
        inputs = [
            encode_example(self.vocabulary, task.prefix + e.text, inputs_length) for e in examples
        ]
        if task.kind == "label":
            choices = [dataset.choices(e.text) if self.decoding.closed else () for e in examples]
            choices = [tuple(dict.fromkeys(cs)) for cs in choices]  # an input may list one twice
            out = [Answer("")] * len(inputs)
            closed = [i for i, c in enumerate(choices) if c]
            chosen = self.choose([inputs[i] for i in closed], [choices[i] for i in closed])
            others = [i for i, c in enumerate(choices) if not c]
            length = self.decoding.max_length
            texts = self.generate([inputs[i] for i in others], max_length=length)
            for i, answer in zip(closed + others, chosen + list(map(Answer, texts)), strict=True):
                out[i] = answer
            return out
        texts = self.generate(inputs, max_length=self.decoding.rationale_length)
        single = task.kind == "rationale_then_label"
        return [Answer(extract_label(text) if single else text) for text in texts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor(Engine):
    """Batched inference with a student on a device mesh.

    Attributes:
      config: the student's architecture.
      params: the student's parameters, placed on the mesh.
      mesh: the device mesh; batches are sharded over its `data` axis if their size is divisible.
    """

    config: T5Config
    params: Any
    mesh: Mesh

    def generate(
        self, inputs: Sequence[Sequence[int]], *, max_length: int, start: int = 0
    ) -> list[str]:
        """See `Engine.generate`."""
        out = [""] * len(inputs)
        for batch, tokens in self._batches(inputs):
            self.progress.began((tokens.shape, max_length, start))
            decoded, _ = generate(
                self.config,
                self.params,
                put_batch(self.mesh, tokens),
                max_length=max_length,
                num_beams=self.decoding.num_beams,
                start=start,
            )
            for i, ids in zip(batch, fetch(decoded), strict=False):
                out[i] = self.vocabulary.decode(ids.tolist())
            self.progress.ended(len(batch))
        return out

    def choose(
        self, inputs: Sequence[Sequence[int]], candidates: Sequence[Sequence[str]]
    ) -> list[Answer]:
        """See `Engine.choose`."""
        encoded = [[[*self.vocabulary.encode(c), EOS] for c in cs] for cs in candidates]
        most = max((len(cs) for cs in encoded), default=1)
        longest = max((len(c) for cs in encoded for c in cs), default=1)
        slots = candidate_slots(encoded)
        table = np.zeros((len(inputs), most, longest), np.int32)
        for i, cs in enumerate(encoded):
            for j, c in enumerate(cs):
                table[i, j, : len(c)] = c
        out = [Answer("")] * len(inputs)
        for batch, tokens in self._batches(inputs):
            self.progress.began((tokens.shape, table.shape[1:], slots))
            padded_batch = np.resize(batch, len(tokens))
            padded_batch[len(batch) :] = batch[-1]
            labels = put_batch(self.mesh, table[padded_batch])
            scores = score_candidates(
                self.config, self.params, put_batch(self.mesh, tokens), labels, slots
            )
            for i, padded_scores in zip(batch, fetch(scores), strict=False):
                of_input = padded_scores[: len(candidates[i])]
                out[i] = Answer.of(candidates[i], of_input, self.temperature)
            self.progress.ended(len(batch))
        return out

    def _batches(self, inputs: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields batches of inputs of similar length: (indices [n], token ids [B, S]), n <= B.

        The last input fills an incomplete batch up to B.
        """
        size, multiple = self.decoding.batch_size, self.decoding.length_multiple
        by_length = np.argsort([len(i) for i in inputs], kind="stable")
        for start in range(0, len(inputs), size):
            batch = by_length[start : start + size]
            longest = max(len(inputs[i]) for i in batch)
            tokens = np.zeros((size, -(-longest // multiple) * multiple), np.int32)
            for row in range(size):
                ids = inputs[batch[min(row, len(batch) - 1)]]
                tokens[row, : len(ids)] = ids
            yield batch, tokens


def token_metrics(
    eval_step: Callable[[Any, Batch], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Batch],
    task_names: Sequence[str],
    rates: Sequence[float],
    prefix: str,
) -> dict[str, float]:
    """Returns the loss and token accuracy of each task on a split, and the mixture's loss.

    The mixture's loss is the mean of the tasks' losses, weighted by their rates. Tasks without
    target tokens in the split are skipped.

    Args:
      eval_step: the function that `make_eval_step` returns.
      params: the student's parameters.
      batches: all batches of the split, on the mesh.
      task_names: names of the mixture's tasks.
      rates: mixing rates of the tasks.
      prefix: prefix of the metrics' names, such as "valid".
    """
    totals: Any = None
    for batch in batches:
        sums = jax.tree.map(np.asarray, eval_step(params, batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    present = np.flatnonzero(totals["counts"])
    losses = totals["sums"][present] / totals["counts"][present]
    weights = np.asarray(rates)[present]
    if not weights.any():  # all tasks present have rate 0, as with alpha 0 and no rationales
        weights = np.ones_like(weights)
    metrics = {f"{prefix}/loss": float(np.average(losses, weights=weights))}
    for k, loss in zip(present.tolist(), losses, strict=True):
        accuracy = totals["correct"][k] / totals["counts"][k]
        metrics[f"{prefix}/{task_names[k]}_loss"] = float(loss)
        metrics[f"{prefix}/{task_names[k]}_token_accuracy"] = float(accuracy)
    return metrics
