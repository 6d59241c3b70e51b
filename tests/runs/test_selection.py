"""Selection of the best checkpoint by a metric of validation."""

import dataclasses

import pytest

from dss.config.experiment import DataConfig, Experiment
from dss.errors import ConfigError, DssError
from dss.runs.directory import load_run
from dss.runs.student import evaluate
from dss.runs.train import run_experiment
from dss.training.config import TrainerConfig
from dss.training.metrics import read_metrics
from tests.conftest import tiny_config


@pytest.fixture
def experiment(toy_folder, tmp_path) -> Experiment:
    """An experiment of two steps that selects by macro F1."""
    return Experiment(
        mixture="toy_finetune",
        run_dir=str(tmp_path / "run"),
        student=tiny_config(num_encoder_layers=1, num_decoder_layers=1),
        vocabulary="bytes",
        batch_size=8,
        data=DataConfig(dataset_path=str(toy_folder), labels=("yes", "no")),
        trainer=TrainerConfig(train_steps=2, eval_period=1, patience=1, select_by="macro_f1"),
    )


@pytest.mark.slow
def test_validation_logs_the_selected_metric_as_dss_eval_measures_it(experiment):
    result = run_experiment(experiment)
    run = load_run(experiment.run_dir)
    lines = [x for x in read_metrics(run.folder / "metrics.jsonl") if "valid/accuracy" in x]
    scores = {line["step"]: line["valid/macro_f1"] for line in lines}
    assert result.best_step == max(scores, key=lambda step: (scores[step], -step))
    metrics = evaluate(run, split="valid").classes
    assert metrics.macro_f1 == scores[result.best_step]
    assert metrics.majority_accuracy == 5 / 8
    assert "valid/balanced_accuracy" not in lines[0]
    assert run_experiment(experiment, resume="must").step == result.step
    trainer = dataclasses.replace(experiment.trainer, select_by="accuracy")
    with pytest.raises(DssError, match="select_by was 'macro_f1' and is 'accuracy'"):
        run_experiment(dataclasses.replace(experiment, trainer=trainer))


def test_rationales_have_no_metrics_by_class(experiment, tmp_path):
    other = dataclasses.replace(experiment, mixture="toy_rationale_rules")
    with pytest.raises(ConfigError) as error:
        run_experiment(other)
    assert str(error.value) == (
        "`TrainerConfig.select_by='macro_f1'` needs labels that are classes, but students of "
        "toy_rationale_rules predict rationales; give 'accuracy' or 'loss'"
    )
    assert not (tmp_path / "run").exists()
