import pytest

from dss.errors import DssError
from dss.mixtures.methods import named_mixture
from dss.runs.student import explain


class FakePredictor:
    """A predictor with the same output for every input, which records inputs and start ids."""

    def __init__(self, text: str):
        self.text, self.read, self.started = text, [], []
        self.vocabulary = self
        self.decoding = self
        self.rationale_length, self.size = 16, 100

    def encode(self, text):
        self.read.append(text)
        return []

    def generate(self, inputs, *, max_length, start):
        assert max_length == self.rationale_length
        self.started.append(start)
        return [self.text] * len(inputs)


def test_explain_uses_the_prefix_of_the_rationale_task(toy):
    for mixture, output, expected in (
        ("toy_step_by_step_rules", "2 is 2 mod 3", "explain: is 2 good"),
        ("toy_single_target_rules", "2 is 2 mod 3 So the answer is yes", "predict: is 2 good"),
    ):
        student = FakePredictor(output)
        assert explain(student, named_mixture(mixture, [toy]), ["is 2 good"], 64) == [
            "2 is 2 mod 3"
        ]
        assert student.read == [expected]


def test_explain_uses_the_start_id_with_one_encoder_pass(toy):
    student = FakePredictor("2 is 2 mod 3")
    for shared in (False, True):
        mixture = named_mixture("toy_step_by_step_rules", [toy], one_input=shared)
        assert explain(student, mixture, ["is 2 good"], 64) == ["2 is 2 mod 3"]
    assert student.read == ["explain: is 2 good", "predict: is 2 good"]
    assert student.started == [0, 100]


def test_explain_without_a_rationale_task_is_an_error(toy):
    with pytest.raises(DssError, match="toy_finetune: its students generate no rationales"):
        explain(FakePredictor(""), named_mixture("toy_finetune", [toy]), ["is 2 good"], 64)
