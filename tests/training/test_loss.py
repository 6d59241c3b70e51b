import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dss.training.loss import cross_entropy, mixture_loss, task_sums, token_counts, token_weights


def test_cross_entropy_of_even_logits_is_the_log_of_the_vocabulary():
    loss = cross_entropy(jnp.zeros((2, 3, 10)), jnp.zeros((2, 3), int))
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)


def test_smoothing_and_z_loss():
    logits, targets = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
    log_p = np.asarray(jax.nn.log_softmax(logits))[0]
    log_z = float(jax.nn.logsumexp(logits))
    smooth = cross_entropy(logits, targets, label_smoothing=0.1)
    assert float(smooth[0]) == pytest.approx(-0.9 * log_p[0] - 0.1 * log_p.mean(), rel=1e-6)
    with_z = cross_entropy(logits, targets, z_loss=0.5)
    assert float(with_z[0]) == pytest.approx(-log_p[0] + 0.5 * log_z**2, rel=1e-6)


def test_each_task_is_averaged_over_its_own_tokens():
    ids = jnp.array([[1, 1, 2, 0], [2, 2, 2, 0]])
    losses = jnp.array([[1.0, 3.0, 5.0, 99.0], [1.0, 1.0, 1.0, 99.0]])
    sums, counts = task_sums(losses, ids, 2), token_counts(ids, 2)
    assert sums.tolist() == [4.0, 8.0]
    assert counts.tolist() == [2.0, 4.0]
    assert float(mixture_loss(sums, counts, (0.3, 0.7))) == pytest.approx(0.3 * 2 + 0.7 * 2)
    assert float(mixture_loss(sums, counts, None)) == pytest.approx(12 / 6)


def test_a_task_without_tokens_weighs_nothing():
    weights = token_weights(jnp.array([4.0, 0.0]), (0.5, 0.5))
    assert float(mixture_loss(jnp.array([8.0, 0.0]), jnp.array([4.0, 0.0]), (0.5, 0.5))) == 1.0
    assert jnp.isfinite(weights).all()
