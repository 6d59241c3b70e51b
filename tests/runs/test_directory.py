import dataclasses

import pytest
from etils import epath

import dss
from dss.errors import DssError
from dss.evaluation.calibration import TemperatureScaling
from dss.mixtures.methods import named_mixture
from dss.runs.directory import CALIBRATION_FILE, Run
from dss.runs.student import calibrate, explain
from tests.conftest import tiny_config


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


def test_a_calibration_is_of_one_step_and_one_dataset(toy, tmp_path):
    experiment = dss.Experiment(dataset=toy, method="finetune", student=tiny_config())
    run = Run(epath.Path(tmp_path), experiment)
    assert run.temperature(60) == 1
    scaling = TemperatureScaling(1.5, "toy", "valid", 60, 24, 0.7, 0.6, 0.1, 0.05)
    scaling.save(run.folder / CALIBRATION_FILE)
    assert [run.temperature(step) for step in (60, 50)] == [1.5, 1]
    other = dataclasses.replace(experiment, dataset=None, method=None, mixture="cqa_finetune")
    assert Run(run.folder, other).temperature(60) == 1
    imported = dataclasses.replace(experiment, method=None)
    assert Run(run.folder, imported).temperature(60) == 1


def test_calibration_needs_twenty_examples(toy, tmp_path):
    experiment = dss.Experiment(dataset=toy, method="finetune", student=tiny_config())
    message = "toy_finetune: valid has 8 labeled examples, and calibration needs at least 20"
    with pytest.raises(DssError, match=message):
        calibrate(Run(epath.Path(tmp_path), experiment))
