"""Views that share an input and are encoded once have the losses of separate computations."""

import jax
import numpy as np
import pytest

from dss.batches.batches import Batches
from dss.batches.order import paired_order, sequential_order
from dss.batches.store import open_store
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.mixtures.methods import named_mixture
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, put_batch
from dss.student.decoding import generate
from dss.student.network import bind, init_params
from dss.training.config import OptimizerConfig
from dss.training.loss import LossConfig, cross_entropy
from dss.training.optimizer import make_optimizer
from dss.training.step import make_eval_step, make_train_step, place_state, state_shardings
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

RATES, BATCH, STEPS = (0.3, 0.7), 8, 3
CONFIG = tiny_config(num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def mixture(toy_folder):
    toy = Dataset.from_files(toy_folder, name="toy", labels=("yes", "no"))
    return named_mixture("toy_step_by_step_rules", [toy], RATES[0], one_input=True)


@pytest.fixture(scope="module")
def starts(mixture):
    return mixture.start_ids(load_vocabulary("bytes"))


@pytest.fixture(scope="module")
def store(mixture):
    return open_store(
        mixture, "train", load_vocabulary("bytes"), inputs_length=64, targets_length=32
    )


def test_tasks_differ_only_in_their_start_id(toy, mixture, store, starts):
    assert starts == (0, 259)
    assert (
        named_mixture("toy_step_by_step_rules", [toy]).start_ids(load_vocabulary("bytes")) is None
    )
    assert [task.prefix for task in mixture.tasks] == ["predict: ", "predict: "]
    np.testing.assert_array_equal(store.tasks[0].inputs.tokens, store.tasks[1].inputs.tokens)


def separate_losses(store, params, starts, step):
    """Returns each task's mean cross entropy, with every view computed separately."""
    model = bind(CONFIG, params)

    @jax.jit
    def loss(inputs, targets, start):
        decoder_inputs = jax.numpy.concatenate([start[None], targets[:-1]])
        losses = cross_entropy(model(inputs[None], decoder_inputs[None])[0], targets)
        return jax.numpy.where(targets > 0, losses, 0).sum()

    sums, counts = np.zeros(2), np.zeros(2)
    tasks, rows, _ = paired_order(store, BATCH, seed=0)(step)
    for task, row in zip(tasks, rows, strict=True):
        inputs, targets = store.tasks[task].inputs[row], store.tasks[task].targets[row]
        padded = [np.pad(array, (0, 64 - len(array))) for array in (inputs, targets)]
        sums[task] += loss(*padded, np.int32(starts[task]))
        counts[task] += len(targets)
    return sums / counts


def batches_of(store, starts, *, packed=True, groups=1):
    order = paired_order(store, BATCH, seed=0)
    return Batches(store, order, num_steps=STEPS, packed=packed, groups=groups, starts=starts)


def trained(store, starts, *, packed=True, microbatches=1, data=1):
    """Returns the losses of `STEPS` steps and the final parameters."""
    mesh_config = MeshConfig(data=data)
    mesh = make_mesh(mesh_config, jax.devices()[:data])
    update = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10)
    shardings = state_shardings(CONFIG, update, mesh, mesh_config)
    loss = LossConfig(num_tasks=2, rates=RATES)
    step = make_train_step(
        CONFIG, update, loss, mesh=mesh, shardings=shardings, microbatches=microbatches
    )
    batches = batches_of(store, starts, packed=packed, groups=data * microbatches)
    state = place_state(init_params(CONFIG, 0), update, shardings)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, put_batch(mesh, batches[i]))
        losses.append(np.asarray(metrics["task_loss"]))
    return np.array(losses), jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def plain(store, starts):
    """The result of `trained` for packed batches on one device."""
    return trained(store, starts)


def test_losses_are_those_of_views_computed_separately(store, starts, plain):
    losses, _ = plain
    np.testing.assert_allclose(
        losses[0], separate_losses(store, init_params(CONFIG, 0), starts, 0), rtol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [{"packed": False}, {"data": 2, "microbatches": 2}, {"data": 4, "packed": False}],
    ids=str,
)
def test_results_do_not_depend_on_packing_or_sharding(store, starts, plain, options):
    wanted, found = plain, trained(store, starts, **options)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[1], wanted[1])


def test_validation_does_not_depend_on_packing(store, starts, one_device):
    update = make_optimizer(OptimizerConfig(), 10)
    shardings = state_shardings(CONFIG, update, one_device, MeshConfig())
    loss = LossConfig(num_tasks=2, rates=None)
    step = make_eval_step(CONFIG, loss, mesh=one_device, shardings=shardings)
    params = init_params(CONFIG, 0)
    order = sequential_order(store, len(store))
    found = [
        step(
            params,
            put_batch(
                one_device, Batches(store, order, num_steps=1, packed=packed, starts=starts)[0]
            ),
        )
        for packed in (True, False)
    ]
    for name, tolerance in (("counts", 0), ("correct", 0), ("sums", 1e-5)):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=tolerance)


def test_the_encoder_has_half_the_slots_at_a_high_fill_rate(store, starts):
    apart, together = batches_of(store, None), batches_of(store, starts)
    slots = [batches.shapes[-1].inputs for batches in (apart, together)]
    assert slots[1] < 0.55 * slots[0]
    for step in range(STEPS):
        assert min(together[step].fill) > 0.8
        inputs, targets, reads = together.lengths(step)
        both, same, _ = apart.lengths(step)
        # Both prefixes have nine bytes.
        assert 2 * inputs.sum() == both.sum()
        assert targets.tolist() == same.tolist()
        assert reads.tolist() == np.repeat(np.arange(BATCH), 2).tolist()


def test_decoding_depends_on_the_start_id(store, starts, plain):
    _, params = plain
    inputs = store.tasks[0].inputs[0][None]
    model = bind(CONFIG, params)
    for beams in (1, 2):
        for start in starts:
            tokens, _ = generate(
                CONFIG, params, inputs, max_length=6, num_beams=beams, start=start, stop=False
            )
            if beams == 1:
                shifted = np.concatenate([[start], np.asarray(tokens)[0, :-1]])[None]
                assert model(inputs, shifted).argmax(-1).tolist() == tokens.tolist()
    first = [generate(CONFIG, params, inputs, max_length=1, start=s, stop=False) for s in starts]
    assert first[0][1] != first[1][1]
