import dataclasses

import pytest

from dss.config import gin_root, load_config, parse_gin, save_config
from dss.data.tasks import get_mixture
from dss.errors import UserError
from dss.student.network import num_parameters
from dss.train import run_experiment
from tests.conftest import tiny_config

STUDENTS = sorted(p.stem for p in (gin_root() / "students").glob("*.gin"))
RECIPES = sorted(p.stem for p in (gin_root() / "recipes").glob("*.gin"))
MILLIONS = {
    "tiny": 9,
    "small": 77,
    "base": 248,
    "large": 783,
    "xl": 2850,
    "xxl": 11135,
    "t5_1_0_small": 61,
    "t5_1_0_base": 223,
    "mt5_small": 300,
    "byt5_small": 300,
}


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_has_its_size(name):
    student = parse_gin([f"students/{name}.gin"]).student
    assert round(num_parameters(student) / 1e6) == MILLIONS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_its_purpose_and_trains_a_step(name, small_root, tmp_path):
    text = (gin_root() / "recipes" / f"{name}.gin").read_text()
    assert [line.split(":")[0] for line in text.splitlines()[:4]] == [
        "# Purpose",
        "# Score",
        "# Cost",
        "# Command",
    ]
    experiment = parse_gin([f"recipes/{name}.gin"], [f"DATA_ROOT={small_root}", "VOCABULARY=bytes"])
    experiment = dataclasses.replace(
        experiment,
        student=tiny_config(num_encoder_layers=1, num_decoder_layers=1),
        run_dir=str(tmp_path / "run"),
        batch_size=8,
        trainer=dataclasses.replace(experiment.trainer, train_steps=1),
        data=dataclasses.replace(experiment.data, feature_lengths={"inputs": 64, "targets": 32}),
        decoding=dataclasses.replace(experiment.decoding, rationale_length=8, max_length=8),
    )
    assert get_mixture(experiment.mixture).name.startswith(name.split("_")[0])
    result = run_experiment(experiment)
    assert (result.step, result.best_step) == (1, 1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_run_keeps_its_whole_configuration(tmp_path):
    experiment = parse_gin(
        ["students/tiny.gin", "recipes/cqa_step_by_step.gin", "runs/adafactor.gin"],
        ["ALPHA=0.3", "MODEL_DIR=runs/a b", "OptimizerConfig.b2=0.95", "MeshConfig.model=2"],
    )
    assert experiment.optimizer.name == "adafactor"
    assert experiment.run_dir == "runs/a b"
    save_config(experiment, tmp_path)
    assert load_config(tmp_path) == experiment
    assert load_config(tmp_path, ["Experiment.alpha=0.9"]).alpha == 0.9
    assert load_config(tmp_path, ["ALPHA=0.8", "DATA_ROOT=/data"]).alpha == 0.8
    assert load_config(tmp_path, ["DATA_ROOT=/data"]).data.root == "/data"
    with pytest.raises(UserError, match="unknown macro 'ALPHE'"):
        load_config(tmp_path, ["ALPHE=0.8"])


def test_an_experiment_says_how_its_student_computes():
    experiment = parse_gin(["students/tiny.gin"], ["Experiment.dtype=bfloat16", "DROPOUT_RATE=0.2"])
    student = experiment.settle(experiment.student)
    assert (student.dtype, student.remat, student.dropout_rate) == ("bfloat16", "none", 0.2)


def test_user_gin_files_are_found_in_search_paths(tmp_path):
    (tmp_path / "mine.gin").write_text("BATCH_SIZE = 7\n")
    assert parse_gin(["mine.gin"], search_paths=[str(tmp_path)]).batch_size == 7
    for text, message in (
        ("ALPHA == 3", r"configuration: .*bad.gin"),
        ("ALPHA = (", r"configuration: .*EOF in multi-line"),
        ("import nosuchmodule", r"configuration: No module named 'nosuchmodule'"),
    ):
        (tmp_path / "bad.gin").write_text(f"BATCH_SIZE = 7\n{text}\n")
        with pytest.raises(UserError, match=message):
            parse_gin(["bad.gin"], search_paths=[str(tmp_path)])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("ALPHA=1.5", "ALPHA must be in"),
        ("TRAIN_FRACTION=0", "TRAIN_FRACTION must be in"),
        ("TASK_FEATURE_LENGTHS={'inputs': 8}", "TASK_FEATURE_LENGTHS must be"),
        (
            "OptimizerConfig.name='sgd'",
            "OptimizerConfig.name must be one of 'adamw', 'adafactor', got 'sgd'",
        ),
        ("DataConfig.batches='both'", "must be one of 'paired', 'sampled'"),
        ("MeshConfig.model=0", "has no devices"),
        ("BATCH_SIZE=abc", "Experiment.batch_size must be of type int, got 'abc'"),
        ("BATCH_SIZE=10.5", "Experiment.batch_size must be of type int, got 10.5"),
        ("DROPOUT_RATE=1.5", "Experiment.dropout_rate must be in"),
        ("Experiment.eval_examples=0", "Experiment.eval_examples must be at least 1"),
        ("TRAIN_STEP=5", "unknown macro 'TRAIN_STEP'; did you mean 'TRAIN_STEPS'"),
        ("DATASET_LABELS=yes", "DataConfig.labels must be of type tuple"),
        ("DATASET_LABELS=(0, 1)", "DataConfig.labels must be of type tuple"),
        ("MeshConfig.rules=(('embed',),)", "MeshConfig.rules must be of type tuple"),
        ("T5Config.dtype=bfloat16", "T5Config.dtype is set and nothing reads it"),
        ("ALPHA=%NOPE", "macro 'NOPE' is used and never set"),
    ],
)
def test_values_out_of_range(flag, message):
    with pytest.raises(UserError, match=message):
        parse_gin([], [flag])
