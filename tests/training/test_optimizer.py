import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dss.training.optimizer import OptimizerConfig, make_optimizer, make_schedule


def test_schedules():
    linear = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=2), 12)
    np.testing.assert_allclose([linear(s) for s in (0, 1, 2, 7, 12)], [0, 0.5, 1, 0.5, 0])
    constant = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="constant"), 12)
    assert float(constant(11)) == 1.0
    rsqrt = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="rsqrt", warmup_steps=4), 100)
    assert float(rsqrt(16)) == pytest.approx(0.5)


def test_adamw_is_pytorchs_with_clipping():
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


def test_adafactor_treats_stacked_layers_one_by_one():
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


def test_jax_is_on_simulated_devices():
    assert len(jax.devices()) == 8
