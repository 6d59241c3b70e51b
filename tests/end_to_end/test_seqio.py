"""What SeqIO's and TFDS's own programs make of the tasks and of the builder."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds

from dss.data.datasets import Dataset
from dss.integrations.seqio_tasks import register_seqio
from dss.mixtures.methods import named_mixture
from dss.runs.directory import load_run
from dss.runs.student import evaluate
from dss.student.decoding import generate
from tests.conftest import ROOT

CACHE = "seqio.scripts.cache_tasks_main"
TFDS = "tensorflow_datasets.scripts.cli.main"
LENGTHS = {"inputs": 48, "targets": 24}  # short, so that some are cut


def run(module: str, *args: object, **env: object) -> str:
    """Runs a module as a program from the repository; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        env=os.environ | {key: str(value) for key, value in env.items()},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def cache(tmp_path):
    """A folder where SeqIO looks for cached tasks."""
    seqio.set_global_cache_dirs([str(tmp_path / "cache")])
    yield tmp_path / "cache"
    seqio.set_global_cache_dirs([])


def by_id(name: str, split: str, *, cached: bool) -> dict[bytes, dict]:
    found = seqio.TaskRegistry.get(name).get_dataset(
        LENGTHS, split, use_cached=cached, shuffle=False
    )
    rows = list(found.as_numpy_iterator())
    out = {row["id"]: row for row in rows}
    assert len(out) == len(rows)
    return out


def assert_cached_as_uncached(name: str, splits: list[str]) -> None:
    for split in splits:
        cached, plain = (by_id(name, split, cached=c) for c in (True, False))
        assert cached.keys() == plain.keys()
        for id_, row in plain.items():
            assert cached[id_].keys() == row.keys()
            for feature, value in row.items():
                np.testing.assert_array_equal(cached[id_][feature], value)


@pytest.mark.parametrize("dataset", ["svamp", pytest.param("cqa", marks=pytest.mark.exhaustive)])
def test_cached_tasks_are_the_tasks_row_for_row(dataset, data_root, vocab_path, cache, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", str(vocab_path))
    importlib.import_module(f"dss.tasks.{dataset}")
    names = [f"{dataset}_{kind}" for kind in ("label_gold", "rationale_palm")]
    run(
        CACHE,
        f"--module_import=tasks.{dataset}",
        f"--tasks={','.join(names)}",
        f"--output_cache_dir={cache}",
        "--min_shards=4",
        DSS_DATA_ROOT=data_root,
    )
    assert sorted(path.name for path in cache.iterdir()) == sorted(names)
    for name in names:
        assert_cached_as_uncached(name, ["train", "validation", "test"])
        rows = named_mixture(name).tasks[0].rows("train")
        stats = json.loads((cache / name / "stats.train.json").read_text())
        assert stats["examples"] == len(rows)
    mixture = seqio.get_mixture_or_task(f"{dataset}_step_by_step_palm")
    drawn = mixture.get_dataset(LENGTHS, "train", use_cached=True, seed=0, num_epochs=1)
    seen = {tuple(row["targets"]) for row in drawn.as_numpy_iterator()}
    for task in mixture.tasks:
        targets = {tuple(r["targets"]) for r in by_id(task.name, "train", cached=False).values()}
        assert targets & seen


def test_all_tasks_of_ones_own_data_are_cached(toy_folder, cache, tmp_path, monkeypatch):
    """A teacher that wrote about some splits only, and bytes as the vocabulary."""
    folder = tmp_path / "own"
    shutil.copytree(toy_folder, folder)
    (folder / "test.rules.jsonl").unlink()
    module = (
        "from dss.data.datasets import Dataset\n"
        "from dss.integrations.seqio_tasks import register_seqio\n"
        f"register_seqio(Dataset.from_files({str(folder)!r}, labels=('yes', 'no')))\n"
    )
    (tmp_path / "my_tasks.py").write_text(module)
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "DSS_VOCABULARY": "bytes"}
    arguments = ["--module_import=my_tasks", f"--output_cache_dir={cache}", "--min_shards=1"]
    run(CACHE, *arguments, **env)
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    register_seqio(Dataset.from_files(folder, labels=("yes", "no")))
    names = {"own_label_gold", "own_label_rules", "own_rationale_rules"}
    names.add("own_rationale_then_label_rules")
    assert {path.name for path in cache.iterdir()} == names
    for name in names:
        splits = list(seqio.TaskRegistry.get(name).splits)
        assert ("test" in splits) == (name == "own_label_gold")
        assert_cached_as_uncached(name, splits)


def test_the_evaluator_measures_a_student_as_dss_eval_does(undisturbed, monkeypatch):
    monkeypatch.setenv("DSS_VOCABULARY", "bytes")
    found = load_run(undisturbed, ["DecodingConfig.closed=False"])
    wanted = evaluate(found, split="valid", checkpoint="latest")
    register_seqio(found.mixture().dataset)
    student, _ = found.predictor("latest")

    def predict(dataset, model_feature_shapes=None):
        indices, rows = zip(*dataset.as_numpy_iterator(), strict=True)
        inputs = jnp.asarray([row["encoder_input_tokens"] for row in rows])
        tokens, _ = generate(student.config, student.params, inputs, max_length=64)
        return [(int(i), ids) for i, ids in zip(indices, np.asarray(tokens), strict=True)]

    converter = seqio.EncDecFeatureConverter(pack=False)
    evaluator = seqio.Evaluator("toy_step_by_step_rules", converter, eval_split="validation")
    future, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    metrics = future.result()
    assert metrics["toy_label_gold"]["accuracy"] == pytest.approx(100 * wanted.scored.value)
    assert wanted.scored.value > 0, "the student writes no label at all, so this shows nothing"
    rationales = load_run(undisturbed, ["Experiment.mixture='toy_rationale_rules'"])
    wanted = evaluate(rationales, split="valid", checkpoint="latest")
    assert metrics["toy_rationale_rules"]["rouge_l"] == pytest.approx(100 * wanted.scored.value)


@pytest.mark.parametrize(
    ("config", "counts"),
    [("svamp", {"train": 720, "valid": 80, "test": 200}), ("jsonl", {"train": 40})],
)
def test_tfds_build(shared, toy_folder, tmp_path, config, counts):
    manual = toy_folder if config == "jsonl" else shared / "data" / "datasets"
    where = (f"--manual_dir={manual}", f"--data_dir={tmp_path}", f"--config={config}")
    run(TFDS, "build", "step_by_step", "--imports=dss.integrations.step_by_step", *where)
    builder = tfds.builder_from_directory(tmp_path / "step_by_step" / config / "1.0.0")
    for split, count in counts.items():
        assert builder.info.splits[split].num_examples == count
    run(TFDS, "build", Path("dss/integrations/step_by_step.py"), "--overwrite", *where)
