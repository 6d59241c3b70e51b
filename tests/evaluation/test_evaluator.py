import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dss.data.datasets import Dataset
from dss.data.vocabulary import encode_example, load_vocabulary
from dss.evaluation.evaluator import DecodingProgress, EvaluationExample, Predictor, token_metrics
from dss.mixtures.methods import named_mixture
from dss.student.config import DecodingConfig
from dss.student.decoding import score_candidates
from dss.student.network import init_params
from tests.conftest import tiny_config


def predictor(config, vocabulary, mesh, **options) -> Predictor:
    params = init_params(config, 0)
    return Predictor(config=config, params=params, mesh=mesh, vocabulary=vocabulary, **options)


def test_inputs_without_possible_labels_are_generated_and_others_chosen(one_device):
    config = tiny_config()
    student = predictor(config, load_vocabulary("bytes"), one_device)
    closed = "Where?\nAnswer Choices:\n(a) here\n(b) there"
    mixture = named_mixture("cqa_finetune")

    def predict(*texts: str) -> list[str]:
        return student.predict(mixture, [EvaluationExample(t, t, "") for t in texts], 64)

    both = predict("no choices", closed)
    assert both == [*predict("no choices"), *predict(closed)]
    assert both[1] in Dataset.released("cqa").choices(closed)


def test_probabilities_are_a_softmax_over_candidates(one_device):
    config = tiny_config()
    vocabulary = load_vocabulary("bytes")
    student = predictor(config, vocabulary, one_device)
    inputs = [encode_example(vocabulary, text, 32) for text in ("a", "bc", "def")]
    candidates = [("yes", "no"), ("x",), ("one", "two", "three")]
    answers = student.choose(inputs, candidates)
    for read, offered, answer in zip(inputs, candidates, answers, strict=True):
        scores = []
        for candidate in offered:
            table = np.array([[encode_example(vocabulary, candidate, 32)]])
            scores.append(score_candidates(config, student.params, np.array([read]), table).item())
        wanted = np.exp(scores) / np.sum(np.exp(scores))
        assert tuple(answer.probabilities) == offered
        np.testing.assert_allclose(list(answer.probabilities.values()), wanted, rtol=1e-4)
        assert answer.text == offered[np.argmax(scores)]
    scaled = dataclasses.replace(student, temperature=2.0).choose(inputs, candidates)
    assert [answer.text for answer in scaled] == [answer.text for answer in answers]
    for at_one, at_two in zip(answers, scaled, strict=True):
        wanted = np.sqrt(list(at_one.probabilities.values()))
        found = list(at_two.probabilities.values())
        np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-6)


def test_progress_counts_predictions_and_distinguishes_shapes(one_device, monkeypatch):
    class Recorded(DecodingProgress):
        def __init__(self):
            self.shapes, self.counts = [], []

        def began(self, shape):
            self.shapes.append(shape)

        def ended(self, count):
            self.counts.append(count)

    def generate(config, params, tokens, **options):
        return jnp.zeros((len(tokens), 2), jnp.int32), None

    def score_candidates(config, params, tokens, candidates, slots):
        return jnp.zeros(candidates.shape[:2])

    monkeypatch.setattr("dss.evaluation.evaluator.generate", generate)
    monkeypatch.setattr("dss.evaluation.evaluator.score_candidates", score_candidates)
    config, progress = tiny_config(), Recorded()
    decoding = DecodingConfig(max_length=2, batch_size=2, length_multiple=8)
    vocabulary = load_vocabulary("bytes")
    student = predictor(config, vocabulary, one_device, decoding=decoding, progress=progress)
    examples = [EvaluationExample(text, text, "") for text in ("a", "b", "c" * 10, "d" * 11, "e")]
    student.predict(named_mixture("svamp_finetune"), examples, 64)
    assert progress.counts == [2, 2, 1]
    assert len(set(progress.shapes)) == 2
    student.choose([[5, 1]] * 3, [("yes", "no")] * 3)
    assert progress.counts == [2, 2, 1, 2, 1]
    assert len(set(progress.shapes)) == 3


def test_a_label_that_an_input_lists_twice_is_one_candidate(one_device):
    config = tiny_config()
    student = predictor(config, load_vocabulary("bytes"), one_device)
    text = "Where?\nAnswer Choices:\n(a) here\n(b) there\n(c) here"
    examples = [EvaluationExample("1", text, "here"), EvaluationExample("2", "no choices", "")]
    closed, written = student.answer(named_mixture("cqa_finetune"), examples, 64)
    assert tuple(closed.probabilities) == ("here", "there")
    assert sum(closed.probabilities.values()) == pytest.approx(1)
    assert written.probabilities == {}


def test_the_loss_of_a_split_without_rationales_is_that_of_labels():
    def eval_step(params, batch):
        return {k: np.array([v, 0.0]) for k, v in (("sums", 6.0), ("counts", 3.0), ("correct", 1))}

    for rates in ((0.3, 0.7), (0.0, 1.0)):
        found = token_metrics(eval_step, None, [{}, {}], ("label", "rationale"), rates, "valid")
        assert found == {
            "valid/loss": 2.0,
            "valid/label_loss": 2.0,
            "valid/label_token_accuracy": pytest.approx(1 / 3),
        }
