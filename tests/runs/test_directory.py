import pytest

from dss.errors import UserError
from dss.mixtures.methods import named_mixture
from dss.runs.student import explain


class Writer:
    """Stands for a student: it writes the same text for every input and keeps what it read."""

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


def test_a_rationale_is_asked_for_as_it_was_learnt(toy):
    for mixture, written, asked in (
        ("toy_step_by_step_rules", "2 is 2 mod 3", "explain: is 2 good"),
        ("toy_single_target_rules", "2 is 2 mod 3 So the answer is yes", "predict: is 2 good"),
    ):
        student = Writer(written)
        assert explain(student, named_mixture(mixture, [toy]), ["is 2 good"], 64) == [
            "2 is 2 mod 3"
        ]
        assert student.read == [asked]


def test_a_rationale_is_asked_for_by_the_start_where_the_input_is_shared(toy):
    student = Writer("2 is 2 mod 3")
    for shared in (False, True):
        mixture = named_mixture("toy_step_by_step_rules", [toy], one_input=shared)
        assert explain(student, mixture, ["is 2 good"], 64) == ["2 is 2 mod 3"]
    assert student.read == ["explain: is 2 good", "predict: is 2 good"]
    assert student.started == [0, 100]


def test_who_learnt_no_rationales_cannot_explain(toy):
    with pytest.raises(UserError, match="toy_finetune: its students learn no rationales"):
        explain(Writer(""), named_mixture("toy_finetune", [toy]), ["is 2 good"], 64)
