import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.planning.hlo import product_bytes
from dss.training import loss as loss_module
from dss.training.loss import (
    LossConfig,
    cross_entropy,
    head_loss,
    head_scores,
    mixture_loss,
    task_sums,
    token_counts,
    token_weights,
)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_vocabulary_size():
    loss = cross_entropy(jnp.zeros((2, 3, 10)), jnp.zeros((2, 3), int))
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)


def test_label_smoothing_and_z_loss():
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


def test_a_task_without_tokens_does_not_contribute():
    weights = token_weights(jnp.array([4.0, 0.0]), (0.5, 0.5))
    assert float(mixture_loss(jnp.array([8.0, 0.0]), jnp.array([4.0, 0.0]), (0.5, 0.5))) == 1.0
    assert jnp.isfinite(weights).all()


def test_rates_change_linearly_from_the_first_step_to_the_last():
    moving = LossConfig(num_tasks=2, rates=(0.3, 0.7), last_rates=(0.9, 0.1), num_steps=4)
    found = np.array([jax.jit(moving.rates_at)(step) for step in range(4)])
    np.testing.assert_allclose(found[:, 0], [0.3, 0.5, 0.7, 0.9], rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    constant = LossConfig(num_tasks=2, rates=(0.3, 0.7))
    np.testing.assert_array_equal(constant.rates_at(jnp.array(2)), np.float32([0.3, 0.7]))
    assert LossConfig(num_tasks=2, rates=None).rates_at(jnp.array(2)) is None
    once = LossConfig(num_tasks=2, rates=(0.3, 0.7), last_rates=(0.9, 0.1), num_steps=1)
    np.testing.assert_allclose(once.rates_at(jnp.array(0)), (0.3, 0.7), rtol=1e-6)


D, V, M = 16, 384, 20


def head_arguments(groups):
    """Returns hidden states, head, weights, targets and task ids; the last slots are padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (groups, M, D))
    kernel = jax.random.normal(keys[1], (D, V)) / 4
    targets = jax.random.randint(keys[2], (groups, M), 0, V)
    ids = jax.random.randint(keys[3], (groups, M), 1, 3).at[:, -3:].set(0)
    return hidden, kernel, token_weights(token_counts(ids, 2), (0.3, 0.7)), targets, ids


CHUNKS = {"padded": 7, "even": 16, "one": 1024}
EXTRAS = {"": {}, "more": {"label_smoothing": 0.1, "z_loss": 0.02}}
HEAD_CASES = [
    pytest.param(
        chunk,
        data,
        extra,
        id=f"{extra}-{data}-{chunk}",
        marks=() if (data == 4) == (chunk == "padded") and extra else pytest.mark.exhaustive,
    )
    for extra, data, chunk in itertools.product(EXTRAS, (1, 4), CHUNKS)
]


@pytest.mark.parametrize(("chunk", "data", "extra"), HEAD_CASES)
def test_the_loss_in_chunks_has_the_value_and_gradient_of_the_plain_loss(
    monkeypatch, chunk, data, extra
):
    extra = EXTRAS[extra]
    monkeypatch.setattr(loss_module, "CHUNK_SLOTS", CHUNKS[chunk])
    config = LossConfig(num_tasks=2, rates=(0.3, 0.7), **extra)
    mesh = make_mesh(MeshConfig(data=data), jax.devices()[:data])
    hidden, kernel, weights, targets, ids = head_arguments(groups=8)

    def chunked(hidden, kernel):
        weighted, sums = head_loss(config, mesh, hidden, kernel, weights, targets, ids)
        return 3 * weighted, sums

    def plain(hidden, kernel):
        losses = cross_entropy(hidden @ kernel, targets, **extra)
        sums = task_sums(losses, ids, 2)
        return 3 * jnp.sum(weights * sums), sums

    found, wanted = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)
        for f in (chunked, plain)
    )
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * float(jnp.abs(want).max()))
    value, sums = jax.jit(chunked)(hidden, kernel)
    np.testing.assert_allclose([value, *sums], [found[0][0], *found[0][1]], rtol=1e-6)

    sums, correct = jax.jit(lambda *args: head_scores(config, mesh, *args))(
        hidden, kernel, targets, ids
    )
    np.testing.assert_allclose(sums, wanted[0][1], rtol=1e-6)
    right = jnp.argmax(hidden @ kernel, -1) == targets
    np.testing.assert_array_equal(correct, task_sums(right.astype(float), ids, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("data", "model", "embed"),
    [(8, 1, None), (8, 1, "data"), (2, 4, None), (2, 4, "data")],
    ids=["8x1", "8x1 fsdp", "2x4", "2x4 fsdp"],
)
def test_the_heads_gradient_is_reduced_over_the_mesh_once_not_per_chunk(
    monkeypatch, dtype, data, model, embed
):
    monkeypatch.setattr(loss_module, "CHUNK_SLOTS", 8)
    config = LossConfig(num_tasks=2, rates=(0.5, 0.5))
    mesh = make_mesh(MeshConfig(data=data, model=model))
    place = [PartitionSpec("data"), PartitionSpec(embed, "model"), *[PartitionSpec()] * 3]
    place = [NamedSharding(mesh, spec) for spec in place]
    args = [
        jax.ShapeDtypeStruct(x.shape, dtype if i < 2 else x.dtype, sharding=place[i])
        for i, x in enumerate(head_arguments(groups=8))
    ]
    gradient = jax.grad(lambda *args: head_loss(config, mesh, *args), (0, 1), has_aux=True)
    compiled = jax.jit(gradient, out_shardings=(tuple(place[:2]), None)).lower(*args).compile()
    text = compiled.as_text()
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert bodies
    reduced = {False: 0, True: 0}  # number of kernels reduced outside and inside of loops
    for computation in re.split(r"\n(?=(?:%|ENTRY)[^\n]*\{\n)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+)", computation)[1]
        for shapes in re.findall(
            r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", computation
        ):
            reduced[name in bodies] += len(re.findall(rf"\[{D},{V // model}\]", shapes))
    assert reduced == {False: 1, True: 0}


def test_a_cpu_copies_no_logits_for_the_heads_gradient():
    """Only the kernel is copied: it is transposed for the gradient of the hidden states."""
    config, mesh = LossConfig(num_tasks=2, rates=(0.5, 0.5)), make_mesh(MeshConfig())
    shapes = [((8, 1024, 64), jnp.float32), ((64, 512), jnp.float32), ((2,), jnp.float32)]
    shapes += [((8, 1024), jnp.int32)] * 2
    gradient = jax.grad(lambda *args: head_loss(config, mesh, *args), (0, 1), has_aux=True)
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    text = jax.jit(gradient).lower(*args).compile().as_text()
    assert product_bytes(text) == 64 * 512 * 4
