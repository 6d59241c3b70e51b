"""The plug-in with T5X itself; skipped where T5X is not installed, see docs/t5x.md."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest
import seqio

from dss.config.data import open_mixture
from dss.config.experiment import DataConfig, Experiment
from dss.data.rationales import RationaleConfig
from dss.errors import DssError
from dss.interop.t5x_checkpoint import load_params
from dss.interop.t5x_export import write_checkpoint
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import put_batch
from dss.runs.data import training_batches, training_store
from dss.student.config import DecodingConfig, T5Config
from dss.training.config import OptimizerConfig, TrainerConfig
from dss.training.loss import LossConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import make_eval_step, state_shardings

plugin = pytest.importorskip(
    "dss.integrations.t5x", reason="T5X is not installed; see docs/t5x.md", exc_type=ImportError
)
ROWS = 4


@pytest.fixture(scope="module")
def checkpoint(shared):
    return shared / "fixtures" / "t5x_tiny_v1_1" / "legacy" / "checkpoint_0"


@pytest.fixture(scope="module")
def student(shared):
    raw = json.loads((shared / "fixtures" / "t5x_tiny_v1_1" / "config.json").read_text())
    return T5Config(
        vocab_size=raw["vocab_size"],
        d_model=raw["emb_dim"],
        d_kv=raw["head_dim"],
        d_ff=raw["mlp_dim"],
        num_heads=raw["num_heads"],
        num_encoder_layers=raw["num_encoder_layers"],
        num_decoder_layers=raw["num_decoder_layers"],
    )


@pytest.fixture
def experiment(shared, student):
    return Experiment(
        mixture="cqa_step_by_step_palm",
        student=student,
        vocabulary="bytes",
        dropout_rate=0.0,
        alpha=0.3,
        batch_size=ROWS,
        data=DataConfig(
            root=str(shared / "data" / "datasets"),
            feature_lengths={"inputs": 256, "targets": 96},
        ),
        trainer=TrainerConfig(train_steps=20),
    )


def t5x_batches(experiment, shard=0, shards=1):
    cfg = types.SimpleNamespace(batch_size=experiment.batch_size)
    return plugin.get_dataset(cfg, shard, shards, experiment=experiment)


def t5x_params(checkpoint):
    from t5x.checkpoints import load_t5x_checkpoint

    return load_t5x_checkpoint(str(checkpoint))["target"]


def test_a_batch_has_the_losses_of_dss(experiment, student, checkpoint, one_device):
    mixture = open_mixture(experiment)
    batch = training_batches(experiment, mixture, training_store(experiment), 1)[0]
    config = experiment.resolve_student(student)
    optimizer = make_optimizer(experiment.optimizer, 20)
    shardings = state_shardings(config, optimizer, one_device, MeshConfig())
    loss = LossConfig(num_tasks=2, rates=mixture.rates)
    step = make_eval_step(config, loss, mesh=one_device, shardings=shardings)
    ours = step(load_params(checkpoint, student), put_batch(one_device, batch))
    wanted = np.asarray(ours["sums"]) / np.asarray(ours["counts"])

    total, metrics = plugin.model(experiment).loss_fn(
        t5x_params(checkpoint), next(t5x_batches(experiment)), None
    )
    found = [float(metrics[f"{name}_loss"].compute()) for name in ("label", "rationale")]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(float(total), 0.3 * wanted[0] + 0.7 * wanted[1], rtol=1e-5)
    right = float(metrics["rationale_token_accuracy"].compute())
    np.testing.assert_allclose(right, ours["correct"][1] / ours["counts"][1], rtol=1e-5)


def test_the_losses_of_microbatches_add_up_to_the_batchs(experiment, checkpoint):
    model, params = plugin.model(experiment), t5x_params(checkpoint)
    batch = next(t5x_batches(experiment))
    whole, _ = model.loss_fn(params, batch, None)
    halves = [{n: a[i : i + 2] for n, a in batch.items()} for i in (0, 2)]
    parts = [float(model.loss_fn(params, half, None)[0]) for half in halves]
    np.testing.assert_allclose(sum(parts), float(whole), rtol=1e-5)
    assert not np.isclose(parts[0], parts[1], rtol=1e-3)


def test_weights_by_the_model_equal_those_in_the_batch(experiment, checkpoint):
    model, params = plugin.model(experiment), t5x_params(checkpoint)
    batch = next(t5x_batches(experiment))
    counted = {n: a for n, a in batch.items() if n != "decoder_token_weights"}
    losses = [float(model.loss_fn(params, b, None)[0]) for b in (batch, counted)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_rows_hold_every_sequence_of_a_steps_examples_once(experiment):
    batches = t5x_batches(experiment)
    spec = batches.element_spec
    store = training_store(experiment)
    for step in range(3):
        batch = next(batches)
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
            n: (s.shape, s.dtype) for n, s in spec.items()
        }
        tasks, rows, _ = batches._batches.order(step)
        wanted = sorted(
            (store.tasks[k].inputs[r].tolist(), store.tasks[k].targets[r].tolist(), k + 1)
            for k, r in zip(tasks, rows, strict=True)
        )
        found = []
        for row in range(ROWS):
            for segment in range(1, batch["encoder_segment_ids"][row].max() + 1):
                source = batch["encoder_segment_ids"][row] == segment
                target = batch["decoder_segment_ids"][row] == segment
                (task,) = np.unique(batch["decoder_task_ids"][row][target])
                tokens = batch["decoder_target_tokens"][row][target].tolist()
                assert batch["decoder_positions"][row][target].tolist() == list(range(len(tokens)))
                assert batch["decoder_input_tokens"][row][target].tolist() == [0, *tokens[:-1]]
                found.append((batch["encoder_input_tokens"][row][source].tolist(), tokens, task))
        assert sorted(found) == wanted


def test_filters_are_those_of_dss(experiment):
    few = dataclasses.replace(experiment, rationales=RationaleConfig(right_only=True, max_words=24))
    counts = [
        [np.bincount(next(t5x_batches(e))["decoder_task_ids"].ravel())[k] for k in (1, 2)]
        for e in (experiment, few)
    ]
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] < counts[0][1]


def test_processes_have_their_rows_of_the_whole_batch(experiment):
    whole = next(t5x_batches(experiment))
    parts = [next(t5x_batches(experiment, shard, 2)) for shard in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def test_the_data_resume_from_the_runs_own_checkpoint(experiment, tmp_path):
    experiment = dataclasses.replace(experiment, run_dir=str(tmp_path / "run"))
    first, second = t5x_batches(experiment), t5x_batches(experiment)
    next(first), next(first)
    for folder in ("run", "another"):
        (tmp_path / folder).mkdir()
        first.save(tmp_path / folder / "state")
    second.restore(tmp_path / "another" / "state")  # of an initial checkpoint, not of this run
    jax.tree.map(np.testing.assert_array_equal, next(second), next(t5x_batches(experiment)))
    second.restore(tmp_path / "run" / "state")
    jax.tree.map(np.testing.assert_array_equal, next(second), next(first))
    first.reset()
    jax.tree.map(np.testing.assert_array_equal, next(first), next(t5x_batches(experiment)))


def test_only_the_parameters_of_an_initial_checkpoint_are_restored():
    state = {"target": {"a": 1}, "state": {"step": 7}}
    assert plugin.parameters_only(state, {}) == {"target": {"a": 1}}
    assert plugin.parameters_only(state, {}, is_resuming=True) == state


def test_students_that_t5x_does_not_support_are_errors(experiment, student):
    for changes, message in (
        ({"student": None}, "no student"),
        ({"student": dataclasses.replace(student, relative_buckets=16)}, "relative_buckets is 16"),
        ({"student": dataclasses.replace(student, tied_embeddings=True)}, "scales the logits"),
    ):
        with pytest.raises(DssError, match=message):
            plugin.transformer(dataclasses.replace(experiment, **changes))
    with pytest.raises(DssError, match="no method"):
        plugin.mixture(dataclasses.replace(experiment, mixture=None))


def test_fields_that_t5x_would_ignore_are_errors(experiment):
    data, trainer = experiment.data, experiment.trainer
    for changes, message in (
        ({"data": dataclasses.replace(data, packed=False)}, "DataConfig.packed is False"),
        (
            {"data": dataclasses.replace(data, one_encoder_pass=True)},
            "leave variants/one_encoder_pass.gin out",
        ),
        ({"alpha_end": 0.9}, r"ALPHA_END is 0.9; .*variants/alpha_schedule.gin out"),
        ({"microbatches": 2}, "Experiment.microbatches is 2; .*num_microbatches"),
        ({"trainer": dataclasses.replace(trainer, patience=2)}, "TrainerConfig.patience is 2"),
        (
            {"trainer": dataclasses.replace(trainer, select_by="loss")},
            "TrainerConfig.select_by is loss",
        ),
        ({"mesh": MeshConfig(model=2)}, "MeshConfig.model is 2; .*PjitPartitioner"),
    ):
        with pytest.raises(DssError, match=message):
            t5x_batches(dataclasses.replace(experiment, **changes))
    beams = dataclasses.replace(experiment, decoding=DecodingConfig(num_beams=4))
    with pytest.raises(DssError, match=r"DecodingConfig.num_beams is 4; .*decode_fn"):
        plugin.model(beams)


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plugin.absolute_path("runs/a") == str(tmp_path / "runs" / "a")
    assert plugin.absolute_path(["a", "gs://b/c"]) == [str(tmp_path / "a"), "gs://b/c"]
    assert plugin.absolute_path(None) is None


@pytest.mark.parametrize("change", [{"label_smoothing": 0.3}, {"z_loss": 0.01}])
def test_label_smoothing_and_z_loss_are_the_experiments(change, experiment, checkpoint):
    batch, params = next(t5x_batches(experiment)), t5x_params(checkpoint)
    smoothed = dataclasses.replace(experiment, **change)
    plain, other = (plugin.model(e).loss_fn(params, batch, None)[0] for e in (experiment, smoothed))
    assert abs(float(plain) - float(other)) > 0.01


def test_validation_is_padded_to_the_longest_of_its_rows(experiment):
    assert plugin.feature_lengths(experiment, "valid") == {"inputs": 256, "targets": 96}
    longer = DataConfig(root=experiment.data.root)
    lengths = plugin.feature_lengths(dataclasses.replace(experiment, data=longer), "valid")
    mixture = seqio.get_mixture_or_task(plugin.mixture_name(experiment, "valid"))
    features = {"inputs": 5000, "targets": 5000}
    rows = [*mixture.get_dataset(features, "validation", num_epochs=1).as_numpy_iterator()]
    longest = {name: max(len(row[name]) for row in rows) for name in lengths}
    assert lengths == {name: min(longest[name], longer.feature_lengths[name]) for name in lengths}
    assert lengths["inputs"] < 1024


def test_an_exported_run_resumes_at_its_position_in_the_data(experiment, tmp_path):
    """All processes read its one file; a run with another folder starts at step 0."""
    path = write_checkpoint(tmp_path / "run", {"target": {"x": np.ones(2)}}, 3)
    for folder, step in (("run", 3), ("another", 0)):
        moved = dataclasses.replace(experiment, run_dir=str(tmp_path / folder))
        for file in ("train_ds-000-of-001", "process_1-of-2/train_ds-001-of-002"):
            batches = t5x_batches(moved)
            batches.restore(path / "dataset" / file)
            np.testing.assert_equal(next(batches), nth(t5x_batches(moved), step))


def nth(batches, n):
    """Returns the batch after `n` others."""
    return next(itertools.islice(batches, n, None))


def test_adafactor_is_t5xs_and_adamw_optax(experiment):
    from t5x import adafactor, optimizers

    assert isinstance(plugin.optimizer(experiment), optimizers.OptaxWrapper)
    config = OptimizerConfig(name="adafactor", schedule="constant", clip_global_norm=None)
    experiment = dataclasses.replace(experiment, optimizer=config)
    assert isinstance(plugin.optimizer(experiment), adafactor.Adafactor)
    assert float(plugin.learning_rate(experiment)(3)) == pytest.approx(config.learning_rate)
