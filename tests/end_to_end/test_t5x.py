"""T5X itself, training, evaluating and inferring, against `dss`; skipped where it is missing."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from dss.paths import gin_root
from dss.runs.directory import load_run
from dss.runs.student import evaluate
from tests.end_to_end.runs import finish, start

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("t5x") is None, reason="T5X is not installed; see docs/t5x.md"
)
STEPS, ROWS = 6, 8
STUDENT = {
    "vocab_size": 1152,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
}
QUIET = [  # no evaluation between steps, and a line of metrics for every one
    "train.train_eval_dataset_cfg=None",
    "train.infer_eval_dataset_cfg=None",
    "train.stats_period=1",
]


def values(shared, **changes):
    """Returns the gin values that both sides are given."""
    found = {
        "TASK_FEATURE_LENGTHS": {"inputs": 256, "targets": 96},
        "BATCH_SIZE": ROWS,
        "TRAIN_STEPS": STEPS,
        "EVAL_PERIOD": STEPS,
        "DROPOUT_RATE": 0.0,
        "RANDOM_SEED": 3,
        "ALPHA": 0.3,
        "DATA_ROOT": str(shared / "data" / "datasets"),
        "VOCABULARY": "bytes",
        **{f"T5Config.{name}": value for name, value in STUDENT.items()},
    }
    return found | changes


def t5x(mode, files, bindings, raw=()):
    command = [sys.executable, "-m", f"t5x.{mode}", f"--gin_search_paths={gin_root()}"]
    command += [f"--gin_file={file}" for file in (f"t5x/{mode}.gin", *files)]
    command += [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    done = subprocess.run(
        command + [f"--gin.{binding}" for binding in raw], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def t5x_metrics(model_dir):
    """Returns what T5X wrote for TensorBoard of each training step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(model_dir / "train"), size_guidance={"tensors": 0})
    events.Reload()
    return {
        name: {
            e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(name)
        }
        for name in {"loss", "label_loss", "rationale_loss"} & set(events.Tags()["tensors"])
    }


def dss_metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"train/loss": "loss"} | {
        f"train/{k}_loss": f"{k}_loss" for k in ("label", "rationale")
    }
    return {
        ours: {row["step"]: row[name] for row in rows if name in row}
        for name, ours in names.items()
    }


@pytest.fixture(scope="module")
def checkpoint(shared):
    return shared / "fixtures" / "t5x_tiny_v1_1" / "orbax" / "checkpoint_0"


@pytest.mark.parametrize(
    ("method", "files", "raw"),
    [
        ("step_by_step", [], []),
        ("step_by_step", ["runs/adafactor.gin"], ["trainer.Trainer.num_microbatches=2"]),
        ("finetune", [], []),
    ],
    ids=["adamw", "adafactor in microbatches", "finetune"],
)
def test_the_same_run_has_the_losses_of_dss(method, files, raw, shared, checkpoint, tmp_path):
    files = ["datasets/cqa.gin", f"methods/{method}.gin", *files]
    t5x(
        "train",
        files,
        values(shared, MODEL_DIR=str(tmp_path / "t5x"), INITIAL_CHECKPOINT_PATH=str(checkpoint)),
        [*QUIET, *raw],
    )
    ours = values(
        shared, MODEL_DIR=str(tmp_path / "dss"), INITIAL_CHECKPOINT_PATH=f"t5x:{checkpoint}"
    )
    command = [f"--gin_file={file}" for file in ("students/base.gin", *files)]
    command += [f"--gin.{name}={value}" for name, value in ours.items()]
    command += ["--gin.TrainerConfig.log_period=1", "--gin.Experiment.eval_examples=8"]
    finish(start("train", *command))
    found, wanted = t5x_metrics(tmp_path / "t5x"), dss_metrics(tmp_path / "dss")
    tasks = ["label"] if method == "finetune" else ["label", "rationale"]
    for name in ("loss", *(f"{task}_loss" for task in tasks)):
        steps = range(1, STEPS + 1)
        pairs = [(found[name][step], wanted[name][step]) for step in steps]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4, err_msg=name)


def test_a_run_resumes_with_the_data_it_had_not_seen(shared, checkpoint, tmp_path):
    files = ["datasets/cqa.gin", "methods/step_by_step.gin", "runs/adafactor.gin"]
    for folder, stops in (("whole", (STEPS,)), ("resumed", (STEPS // 2, STEPS))):
        for steps in stops:
            given = values(
                shared,
                MODEL_DIR=str(tmp_path / folder),
                INITIAL_CHECKPOINT_PATH=str(checkpoint),
                TRAIN_STEPS=steps,
                EVAL_PERIOD=STEPS // 2,
            )
            t5x("train", files, given, QUIET)
    whole, resumed = (t5x_metrics(tmp_path / folder)["loss"] for folder in ("whole", "resumed"))
    for step in range(1, STEPS + 1):
        assert resumed[step] == pytest.approx(whole[step], rel=1e-6)


def test_an_exported_run_goes_on_under_t5x(shared, checkpoint, tmp_path, monkeypatch):
    """From a working folder that has a folder `runs`, with a relative MODEL_DIR."""
    monkeypatch.chdir(tmp_path)
    files = ["datasets/cqa.gin", "methods/step_by_step.gin", "runs/adafactor.gin"]
    ours = {"INITIAL_CHECKPOINT_PATH": f"t5x:{checkpoint}"}
    for folder, steps in (("half", STEPS // 2), ("whole", STEPS)):
        given = values(shared, MODEL_DIR=f"runs/{folder}", TRAIN_STEPS=steps, **ours)
        command = [f"--gin_file={file}" for file in ("students/base.gin", *files)]
        command += [f"--gin.{name}={value}" for name, value in given.items()]
        command += ["--gin.TrainerConfig.log_period=1", "--gin.Experiment.eval_examples=8"]
        finish(start("train", *command))
    finish(start("export", "runs/half", "--to", "t5x", "runs/t5x", "--checkpoint", "latest"))
    t5x("train", files, values(shared, MODEL_DIR="runs/t5x"), QUIET)
    found, wanted = t5x_metrics(tmp_path / "runs/t5x"), dss_metrics(tmp_path / "runs/whole")
    steps = range(STEPS // 2 + 1, STEPS + 1)
    pairs = [(found["loss"][step], wanted["loss"][step]) for step in steps]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4)
    # As an initial checkpoint it begins at step 0.
    start_here = f"runs/t5x/checkpoint_{STEPS // 2}"
    given = values(shared, MODEL_DIR="runs/anew", INITIAL_CHECKPOINT_PATH=start_here)
    t5x("train", files, given, QUIET)
    assert sorted(t5x_metrics(tmp_path / "runs/anew")["loss"]) == list(range(1, STEPS + 1))


def test_eval_and_infer_say_what_dss_says(shared, checkpoint, tmp_path):
    """The checkpoint knows nothing, so what it writes is noise, and the same noise."""
    given = values(
        shared,
        CHECKPOINT_PATH=str(checkpoint),
        TASK_FEATURE_LENGTHS={"inputs": 256, "targets": 24},
        BATCH_SIZE=50,
    )
    files = ["datasets/svamp.gin", "methods/step_by_step.gin"]
    t5x("eval", files, given | {"EVAL_OUTPUT_DIR": str(tmp_path / "eval")})
    t5x("infer", files, given | {"INFER_OUTPUT_DIR": str(tmp_path / "infer")})
    (written,) = (tmp_path / "infer").glob("svamp_label_gold-predict.jsonl-00000-of-00001")
    theirs = [json.loads(line)["prediction"] for line in written.read_text().splitlines()]
    scores = (tmp_path / "eval" / "inference_eval" / "svamp_label_gold-metrics.jsonl").read_text()

    finish(start("import", f"t5x:{checkpoint}", tmp_path / "run", "--vocabulary", "bytes"))
    run = load_run(
        tmp_path / "run",
        [
            "Experiment.mixture=svamp_step_by_step_palm",
            f"DataConfig.root={shared / 'data' / 'datasets'}",
            "DataConfig.feature_lengths={'inputs': 256, 'targets': 24}",
            "DecodingConfig.max_length=24",
            "DecodingConfig.closed=False",
        ],
    )
    ours = evaluate(run)
    assert list(ours.predictions) == theirs
    accuracy = json.loads(scores.splitlines()[-1])["accuracy"]
    assert accuracy == pytest.approx(100 * ours.scored.value)
