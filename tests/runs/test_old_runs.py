"""A run directory written before runs kept dataset and method opens, and resumes."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from dss.config.data import resolve
from dss.config.experiment import DataConfig, Experiment
from dss.config.gin_files import load_config, save_config
from dss.errors import DssError
from dss.runs.directory import load_run
from dss.runs.train import run_experiment
from tests.conftest import tiny_config

OLD = Path(__file__).parent / "fixtures" / "before_methods.gin"


@pytest.fixture
def old_run(tmp_path, toy_folder):
    """The configuration of such a run, of the toy data."""
    text = OLD.read_text().replace("data/toy", str(toy_folder))
    (tmp_path / "config.gin").write_text(text)
    return tmp_path


def test_its_configuration_is_read(old_run):
    experiment = load_config(old_run)
    assert experiment.mixture == experiment.mixture_name == "toy_step_by_step_rules"
    assert experiment.config.d_model == 128
    assert experiment.trainer.select_by == "accuracy"
    resolved = resolve(experiment)
    assert (resolved.dataset, resolved.method, resolved.teacher) == ("toy", "step_by_step", "rules")
    assert resolved.mixture_name == experiment.mixture


@pytest.mark.slow
def test_it_resumes_by_either_name(old_run, toy_folder, tmp_path):
    experiment = dataclasses.replace(
        load_config(old_run),
        student=tiny_config(num_encoder_layers=1, num_decoder_layers=1),
        run_dir=str(tmp_path / "run"),
        trainer=dataclasses.replace(load_config(old_run).trainer, train_steps=2, eval_period=1),
    )
    run_experiment(experiment)
    run = load_run(tmp_path / "run")
    written = dataclasses.replace(
        run.experiment, mixture="toy_step_by_step_rules", dataset=None, method=None, teacher=None
    )
    save_config(written, run.folder)  # as it was written then
    named = dataclasses.replace(
        experiment, mixture=None, dataset="toy", method="step_by_step", teacher="rules"
    )
    shutil.rmtree(run.folder / "checkpoints" / "2")
    for again in (experiment, named):
        assert run_experiment(again, resume="must").step == 2
    other = dataclasses.replace(named, method="finetune", teacher=None)
    with pytest.raises(DssError, match="METHOD was 'step_by_step' and is 'finetune'"):
        run_experiment(other)


def test_a_mixture_and_a_method_are_not_given_both(toy_folder):
    data = DataConfig(dataset_path=str(toy_folder))
    with pytest.raises(ValueError, match="; give one"):
        Experiment(mixture="toy_finetune", method="finetune", data=data)
