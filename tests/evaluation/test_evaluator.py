import numpy as np
import pytest

from dss.data.registry import get_dataset
from dss.data.tasks import get_mixture
from dss.data.vocabulary import load_vocabulary
from dss.evaluation.evaluator import EvaluationExample, Predictor, token_metrics
from dss.student.network import init_params
from tests.conftest import tiny_config


def test_whether_a_label_is_chosen_is_decided_input_by_input(one_device):
    config = tiny_config()
    student = Predictor(config, init_params(config, 0), load_vocabulary("bytes"), one_device)
    closed = "Where?\nAnswer Choices:\n(a) here\n(b) there"
    mixture = get_mixture("cqa_finetune")

    def predict(*texts: str) -> list[str]:
        return student.predict(mixture, [EvaluationExample(t, t, "") for t in texts], 64)

    both = predict("no choices", closed)
    assert both == [*predict("no choices"), *predict(closed)]
    assert both[1] in get_dataset("cqa").choices(closed)


def test_a_split_without_rationales_shows_the_labels_loss():
    def eval_step(params, batch):
        return {k: np.array([v, 0.0]) for k, v in (("sums", 6.0), ("counts", 3.0), ("correct", 1))}

    for rates in ((0.3, 0.7), (0.0, 1.0)):
        found = token_metrics(eval_step, None, [{}, {}], ("label", "rationale"), rates, "valid")
        assert found == {
            "valid/loss": 2.0,
            "valid/label_loss": 2.0,
            "valid/label_token_accuracy": pytest.approx(1 / 3),
        }
