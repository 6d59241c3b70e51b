import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.student.network import abstract_params, logical_axes
from dss.training.config import OptimizerConfig
from dss.training.optimizer import make_optimizer, make_schedule
from dss.training.step import state_shardings
from tests.conftest import tiny_config

FSDP = (("embed", "data"), ("heads", "model"), ("mlp", "model"), ("vocab", "model"))


def test_schedules():
    linear = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=2), 12)
    np.testing.assert_allclose([linear(s) for s in (0, 1, 2, 7, 12)], [0, 0.5, 1, 0.5, 0])
    constant = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="constant"), 12)
    assert float(constant(11)) == 1.0
    rsqrt = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="rsqrt", warmup_steps=4), 100)
    assert float(rsqrt(16)) == pytest.approx(0.5)


def test_adamw_with_clipping_equals_pytorchs():
    import torch

    config = OptimizerConfig(learning_rate=1e-2)
    optimizer = make_optimizer(config, 10)
    ours = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(ours)
    theirs = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    adam = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda s: 1 - s / 10)
    for gradient in ([3.0, 4.0, 0.0], [0.1, 0.2, -0.1], [-1.0, 5.0, 2.0]):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adam.step()
        decay.step()
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), rtol=1e-5)


def test_adafactor_updates_stacked_layers_separately():
    rng = np.random.default_rng(0)
    stacked = jnp.asarray(rng.normal(size=(3, 130, 140)), jnp.float32)
    gradients = jnp.asarray(rng.normal(size=stacked.shape) * [[[1.0]], [[10.0]], [[0.1]]])
    config = OptimizerConfig(
        name="adafactor", learning_rate=1e-3, schedule="constant", clip_global_norm=None
    )
    optimizer = make_optimizer(config, 10)
    params = {"encoder": {"layers": {"w": stacked}}, "embedding": stacked[0]}
    grads = {"encoder": {"layers": {"w": gradients}}, "embedding": gradients[0]}
    params["decoder"], grads["decoder"] = params["encoder"], grads["encoder"]
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    alone = optax.adafactor(1e-3, decay_rate=0.8)
    for layer in range(3):
        wanted, _ = alone.update(gradients[layer], alone.init(stacked[layer]), stacked[layer])
        np.testing.assert_allclose(
            updates["encoder"]["layers"]["w"][layer], wanted, rtol=1e-4, atol=1e-9
        )
    np.testing.assert_allclose(
        updates["embedding"], updates["encoder"]["layers"]["w"][0], rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("bad", [{"name": "sgd"}, {"learning_rate": 0.0}, {"schedule": "step"}])
def test_configurations_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)


def test_jax_has_eight_simulated_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("options", [{}, {"rules": FSDP}], ids=["2x4", "fsdp 2x4"])
def test_adafactors_statistics_are_sharded_like_the_remaining_axes_of_their_parameter(options):
    # Attention's matrices are square, so shapes do not tell which axis a statistic lacks.
    config = tiny_config(d_model=128, d_kv=32, d_ff=256)
    mesh_config = MeshConfig(data=2, model=4, **options)
    optimizer = make_optimizer(OptimizerConfig(name="adafactor"), 10)
    mesh = make_mesh(mesh_config)
    shardings = state_shardings(config, optimizer, mesh, mesh_config)
    rules = dict(reversed(mesh_config.rules))
    params = abstract_params(config)
    places = {
        tuple(p.key for p in path): [rules.get(axis) for axis in axes]
        for path, axes in jax.tree_util.tree_flatten_with_path(
            logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
        )[0]
    }
    shapes = {
        tuple(p.key for p in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    state = jax.eval_shape(optimizer.init, params)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    factored = 0
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings.opt_state), strict=True):
        names = tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))
        known = [names[i:] for i in range(len(names)) if names[i:] in shapes]
        if not known or leaf.size <= 2:  # a count, or a placeholder with one element per layer
            continue
        shape, place = shapes[known[0]], places[known[0]]
        if leaf.shape != shape:  # v_row lacks the largest axis, v_col the second largest
            start = len(shape) - 2
            by_size = sorted(range(start, len(shape)), key=lambda axis: shape[axis])
            gone = (
                by_size[-1] if any(getattr(p, "name", "") == "v_row" for p in path) else by_size[0]
            )
            assert leaf.shape == shape[:gone] + shape[gone + 1 :]
            place = place[:gone] + place[gone + 1 :]
            factored += 1
        assert sharding.spec == PartitionSpec(*place), path
    assert factored == 2 * (2 + 7 + 11)  # embedding, head, an encoder's and a decoder's matrices
