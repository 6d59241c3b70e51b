import jax
import numpy as np
import pytest

from dss.batches.batch import Batch
from dss.batches.batches import Batches
from dss.batches.order import paired_order
from dss.batches.packing import PackedShape, RowWidths
from dss.batches.store import open_store
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import named_mixture
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, put_batch
from dss.student.network import abstract_params, init_params
from dss.student.ops import Ops
from dss.training.config import OptimizerConfig
from dss.training.loss import LossConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import (
    init_state,
    make_eval_step,
    make_train_step,
    place_state,
    state_shardings,
)
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

STEPS = 4
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run(toy_folder):
    """A function that trains `STEPS` steps and returns losses, params and optimizer state."""
    toy = Dataset.from_files(toy_folder, name="toy", labels=("yes", "no"))
    mixture = named_mixture("toy_step_by_step_rules", [toy], alpha=0.3)
    store = open_store(
        mixture, "train", load_vocabulary("bytes"), inputs_length=64, targets_length=32
    )

    def train(
        *,
        packed=True,
        microbatches=1,
        optimizer="adamw",
        dropout=0.0,
        dtype="float32",
        grad_dtype="float32",
        last_rates=None,
        student=None,
        **mesh_options,
    ):
        config = tiny_config(dropout_rate=dropout, dtype=dtype, **(student or {}))
        mesh_config = MeshConfig(**mesh_options)
        devices = jax.devices()[: mesh_config.data * mesh_config.model]
        mesh = make_mesh(mesh_config, devices)
        update = make_optimizer(OptimizerConfig(name=optimizer, learning_rate=1e-2), 10)
        shardings = state_shardings(config, update, mesh, mesh_config)
        step = make_train_step(
            config,
            update,
            LossConfig(num_tasks=2, rates=mixture.rates, last_rates=last_rates, num_steps=STEPS),
            mesh=mesh,
            shardings=shardings,
            microbatches=microbatches,
            grad_dtype=grad_dtype,
        )
        batches = Batches(
            store,
            paired_order(store, 8, seed=0),
            num_steps=STEPS,
            packed=packed,
            groups=mesh_config.data * microbatches,
        )
        state = place_state(init_params(config, 0), update, shardings)
        losses = []
        for i in range(STEPS):
            state, metrics = step(state, put_batch(mesh, batches[i]))
            losses.append([*np.asarray(metrics["task_loss"]), float(metrics["grad_norm"])])
            if last_rates is not None:
                rates = np.asarray(metrics["rates"])
                assert float(metrics["loss"]) == pytest.approx(rates @ losses[-1][:2], rel=1e-5)
                losses[-1].append(rates[0])
        return np.array(losses), *jax.tree.map(np.asarray, (state.params, state.opt_state))

    return train


@pytest.fixture(scope="module")
def plain(run):
    return run(data=1)


def assert_same(got, wanted):
    np.testing.assert_allclose(got[0], wanted[0], rtol=TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got[1], wanted[1])


@pytest.mark.parametrize(
    "options",
    [
        {"data": 1, "packed": False},
        {"data": 1, "microbatches": 2},
        {"data": 8},
        {"data": 4, "model": 2, "microbatches": 2},
        {"data": 2, "model": 2, "rules": (("embed", "data"), ("heads", "model"), ("mlp", "model"))},
    ],
    ids=["unpacked", "microbatches", "8x1", "4x2 microbatches", "fsdp 2x2"],
)
def test_results_do_not_depend_on_packing_or_sharding(run, plain, options):
    assert_same(run(**options), plain)


def test_rates_change_during_training(run, plain):
    losses, *_ = run(data=2, microbatches=2, last_rates=(1.0, 0.0))
    np.testing.assert_allclose(losses[:, 3], [0.3, 0.5333, 0.7667, 1.0], rtol=1e-3)
    np.testing.assert_allclose(losses[0, :3], plain[0][0], rtol=TOLERANCE)
    assert losses[-1, 0] < plain[0][-1, 0]  # more of the label's loss was minimised
    assert losses[-1, 1] > plain[0][-1, 1]


def test_loss_falls_and_task_losses_differ(plain):
    losses, *_ = plain
    assert (losses[-1, :2] < losses[0, :2]).all()
    assert losses[0, 0] != losses[0, 1]


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param({}, marks=pytest.mark.exhaustive),
        {"rules": (("embed", "data"), ("heads", "model"), ("mlp", "model"))},
    ],
    ids=["default", "fsdp"],
)
def test_adafactor_on_a_mesh_equals_adafactor_on_one_device(run, rules):
    student = {"d_model": 128, "d_kv": 32, "d_ff": 256}
    wanted = run(data=1, optimizer="adafactor", student=student)
    leaves = jax.tree_util.tree_leaves_with_path(wanted[2])
    rows = [leaf for path, leaf in leaves if ".v_row" in jax.tree_util.keystr(path)]
    assert sum(row.shape[-1] > 1 for row in rows) == 2 + 7 + 11  # every matrix of the student
    initial = init_params(tiny_config(**student), 0)

    def compare_movement(got, wanted, initial):
        assert np.linalg.norm(got - wanted) <= 1e-4 * np.linalg.norm(wanted - initial)

    got = run(data=4, model=2, optimizer="adafactor", student=student, **rules)
    assert_same(got, wanted)
    jax.tree.map(compare_movement, got[1], wanted[1], initial)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), got[2], wanted[2])


def test_steps_on_a_cpu_and_on_an_accelerator_are_equal(run, monkeypatch):
    options = {"data": 2, "microbatches": 2, "dropout": 0.1}
    found = run(**options)
    for module in ("training.step", "training.loss"):
        monkeypatch.setattr(f"dss.{module}.ops_for", lambda mesh: Ops())
    wanted = run(**options)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    assert_same(found, wanted)


def test_dropout_is_deterministic(run):
    first, second = run(data=1, dropout=0.3), run(data=1, dropout=0.3)
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


@pytest.mark.parametrize(
    "options",
    [
        {"microbatches": 2},
        *(pytest.param(options, marks=pytest.mark.exhaustive) for options in ({}, {"model": 2})),
    ],
    ids=str,
)
def test_bfloat16_gradients_are_close_to_float32_gradients(run, options):
    wide, narrow = (
        run(data=2, dtype="bfloat16", grad_dtype=dtype, **options)
        for dtype in ("float32", "bfloat16")
    )
    assert narrow[1]["embedding"].dtype == np.float32
    np.testing.assert_allclose(narrow[0], wide[0], rtol=0.02)


def test_bfloat16_gradients_of_a_float32_student_are_an_error(run):
    with pytest.raises(DssError, match=r"set Experiment\.dtype to 'bfloat16' too"):
        run(data=1, grad_dtype="bfloat16")


def temporary_bytes(mesh, microbatches=1, **student):
    """Returns the temporary memory of a compiled step on 64 sequences of 32 + 16 tokens."""
    config = tiny_config(d_model=64, d_ff=64, num_encoder_layers=8, num_decoder_layers=8, **student)
    update = make_optimizer(OptimizerConfig(), 10)
    shardings = state_shardings(config, update, mesh, MeshConfig())
    state = jax.eval_shape(lambda p: init_state(p, update), abstract_params(config))
    batch = Batch.abstract(PackedShape(32, 16, 1, 1, RowWidths(32, 16, 32)), 64, packed=False)
    step = make_train_step(
        config,
        update,
        LossConfig(num_tasks=2, rates=(0.5, 0.5)),
        mesh=mesh,
        shardings=shardings,
        microbatches=microbatches,
    )
    return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes


def test_rematerialization_and_microbatches_reduce_memory(one_device):
    none, dots, full = (temporary_bytes(one_device, remat=r) for r in ("none", "dots", "full"))
    assert none > 1.3 * dots > 1.3 * 1.3 * full
    parts = [temporary_bytes(one_device, microbatches=n) for n in (1, 2, 4)]
    assert parts[0] > 1.3 * parts[1] > 1.3 * 1.3 * parts[2]


def test_a_mesh_that_does_not_fit_is_an_error():
    with pytest.raises(DssError, match="does not use the 8 devices exactly"):
        make_mesh(MeshConfig(data=3))
    config, mesh_config = tiny_config(num_heads=3, d_kv=3), MeshConfig(data=4, model=2)
    update = make_optimizer(OptimizerConfig(), 10)
    with pytest.raises(
        DssError, match=r"num_heads of size 3 cannot be sharded over the 2 .* one of 1, 3$"
    ):
        state_shardings(config, update, make_mesh(mesh_config), mesh_config)
    config = tiny_config(d_ff=15)
    with pytest.raises(DssError, match=r"mlp of size 15 .* one of 1, 3, 5, 15$"):
        state_shardings(config, update, make_mesh(mesh_config), mesh_config)


def test_validation_counts_all_target_tokens(toy, one_device):
    mixture = named_mixture("toy_step_by_step_rules", [toy])
    store = open_store(
        mixture, "test", load_vocabulary("bytes"), inputs_length=64, targets_length=32
    )
    config, update = tiny_config(), make_optimizer(OptimizerConfig(), 10)
    shardings = state_shardings(config, update, one_device, MeshConfig())
    step = make_eval_step(
        config, LossConfig(num_tasks=2, rates=None), mesh=one_device, shardings=shardings
    )
    params = init_params(config, 0)
    for packed in (True, False):
        batch = Batches(store, paired_order(store, 8, seed=0), num_steps=1, packed=packed)[0]
        sums = step(params, put_batch(one_device, batch))
        assert np.asarray(sums["counts"]).tolist() == [
            task.targets.lengths.sum() for task in store.tasks
        ]
        assert (np.asarray(sums["correct"]) <= np.asarray(sums["counts"])).all()
