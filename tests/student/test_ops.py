"""Each platform's operations equal their definitions, and gathers give the right slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dss.student.cpu import CPU
from dss.student.ops import (
    Ops,
    Rows,
    additive_mask,
    dropout,
    dropout_seeds,
    from_rows,
    to_rows,
)

PLATFORMS = pytest.mark.parametrize("ops", [CPU, Ops()], ids=["cpu", "plain"])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def plain_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def dense(x, kernel):
    return jnp.einsum("gnd,df->gnf", x, kernel)


def heads(y, kernel):
    return jnp.einsum("gnhk,hkd->gnd", y, kernel)


@PLATFORMS
@pytest.mark.parametrize(
    ("name", "options", "plain", "args"),
    [
        ("rms_norm", (1e-6,), plain_norm, [(2, 5, 8), (8,)]),
        ("linear", (), dense, [(2, 5, 8), (8, 3)]),
        ("linear", (), dense, [(2, 5, 3), (3, 8)]),
        ("linear", (2,), heads, [(2, 5, 3, 4), (3, 4, 6)]),
        ("linear", (2,), heads, [(2, 5, 3, 4), (3, 4, 20)]),
        ("product_of_transpose", (), lambda x, y: x.T @ y, [(7, 3), (7, 4)]),
    ],
    ids=["norm", "narrowing", "widening", "of heads", "of heads, wider", "of transpose"],
)
def test_values_and_gradients_are_those_of_the_definition(ops, name, options, plain, args):
    arrays = [normal(i, *shape) for i, shape in enumerate(args)]
    found, back = jax.vjp(lambda *xs: getattr(ops, name)(*xs, *options), *arrays)
    wanted, plain_back = jax.vjp(plain, *arrays)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    g = normal(9, *wanted.shape)
    for a, b in zip(back(g), plain_back(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def plain_attend(query, key, value, bias, visible, rate, seed):
    scores = jnp.einsum("grhtk,grhsk->grhts", query, key) + (0 if bias is None else bias)
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e10))
    return jnp.einsum("grhts,grhsk->grhtk", dropout(weights, rate, seed), value)


@PLATFORMS
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("biased", [True, False])
def test_attention_and_its_gradients_are_those_of_the_definition(biased, rate, ops):
    seed = jnp.uint32([7, 8])
    visible = normal(6, 2, 3, 1, 5, 6) > 0
    visible = visible.at[0, 0, 0, 0].set(False)  # a row of padding attends to nothing
    query, key, value = (normal(i, 2, 3, 4, n, 8) for i, n in enumerate((5, 6, 6)))
    bias = normal(4, 4, 5, 6) if biased else None
    g = normal(5, *query.shape).at[0, 0, :, 0].set(0)
    arrays = (query, key, value, bias)
    found, back = jax.vjp(lambda *xs: ops.attend(*xs, additive_mask(visible), rate, seed), *arrays)
    wanted, plain_back = jax.vjp(lambda *xs: plain_attend(*xs, visible, rate, seed), *arrays)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for ours, plain in zip(back(g), plain_back(g), strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@PLATFORMS
def test_attention_and_dropout_save_no_scores_masks_or_constants_for_the_backward_pass(ops):
    S, seeds = 31, dropout_seeds(jnp.uint32([0, 0]), 2)
    visible = jnp.ones((1, 1, S, S), bool)

    def loss(x, seeds):
        def layer(x, seed):
            x = ops.attend(x, x, x, None, additive_mask(visible), 0.1, seed)
            return dropout(x, 0.1, seed), None

        return jax.lax.scan(layer, x, seeds)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss))(normal(0, 3, 5, S, 8), seeds)
    outside = [v.aval for eqn in program.eqns for v in eqn.outvars]  # of loop bodies
    assert any(a.shape == (2, 3, 5, S, 8) for a in outside)  # residuals of the two layers
    assert not [a for a in outside if a.shape[-2:] == (S, S) and a.size > S * S]
    assert not [a for a in outside if a.shape[-2:] == (S, 8) and a.dtype == jnp.uint32]


@PLATFORMS
def test_norm_keeps_the_dtype_and_computes_statistics_in_float32(ops):
    x = 1e3 * normal(0, 4, 64).astype(jnp.bfloat16)
    y = ops.rms_norm(x, jnp.ones(64), 1e-6)
    assert y.dtype == jnp.bfloat16
    wide = plain_norm(x.astype(jnp.float32), jnp.ones(64))
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=1e-2)
    dx, ds = jax.grad(lambda x, s: ops.rms_norm(x, s, 1e-6).sum(), (0, 1))(x, jnp.ones(64))
    assert (dx.dtype, ds.dtype) == (jnp.bfloat16, jnp.float32)


@PLATFORMS
def test_argmax_is_the_first_of_equal_maxima(ops):
    x = jnp.array([[[1.0, 3.0, 3.0, 2.0], [-jnp.inf, -2.0, -5.0, -2.0]]])
    best, index = ops.argmax(x)
    assert (best.tolist(), index.tolist()) == ([[3, -2]], [[1, 1]])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate):
    seeds = dropout_seeds(jnp.uint32([0, 0]), 2)
    x = jnp.ones((300, 1000))
    first, second = (dropout(x, rate, seed) for seed in seeds)
    n = x.size
    for y in (first, second):
        assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - rate))}
        # Within five or six standard deviations of a binomial proportion.
        assert abs(float((y == 0).mean()) - rate) < 5 * (rate * (1 - rate) / n) ** 0.5
        columns = np.asarray((y == 0).mean(axis=0))
        assert np.abs(columns - rate).max() < 6 * (rate * (1 - rate) / 300) ** 0.5
        rows = np.asarray((y == 0).mean(axis=1))
        assert np.abs(rows - rate).max() < 6 * (rate * (1 - rate) / 1000) ** 0.5
    both = float(((first == 0) & (second == 0)).mean())
    assert abs(both - rate**2) < 5 * rate / n**0.5
    neighbours = float(((first[:, 1:] == 0) & (first[:, :-1] == 0)).mean())
    assert abs(neighbours - rate**2) < 5 * rate / n**0.5


def test_dropout_is_a_function_of_its_seed_and_its_gradient_has_the_same_mask():
    seed = jnp.uint32([0, 1])
    x = normal(0, 6, 7) + 10
    y, back = jax.vjp(lambda x: dropout(x, 0.4, seed), x)
    np.testing.assert_array_equal(y, dropout(x, 0.4, seed))
    (dx,) = back(jnp.ones_like(x))
    np.testing.assert_allclose(dx * x, y, rtol=1e-6)
    assert dropout(x, 0.4, None) is x
    assert dropout(x, 0.0, seed) is x


def test_rows_gather_slots_and_scatter_them_back():
    slots = jnp.array([[[0, 1, 5], [3, 4, 5]], [[2, 3, 4], [0, 5, 5]]])  # 5 reads nothing
    rows = Rows.of(slots, 5)
    x = normal(0, 2, 5, 3, 4)
    y = to_rows(x, rows)
    assert y.shape == (2, 2, 3, 3, 4)
    for g, r, s in np.ndindex(2, 2, 3):
        slot = int(slots[g, r, s])
        wanted = np.zeros((3, 4)) if slot == 5 else x[g, slot]
        np.testing.assert_array_equal(y[g, r, :, s], wanted)
    back = np.array(x)
    back[0, 2] = back[1, 1] = 0  # which no row reads
    np.testing.assert_array_equal(from_rows(y, rows), back)


def test_the_gathers_gradients_are_autodiffs():
    slots = jnp.array([[[0, 1, 5], [3, 4, 5]]])
    rows = Rows.of(slots, 5)
    x, y = normal(0, 1, 5, 2, 4), normal(1, 1, 2, 2, 3, 4)

    def gather(x):
        padded = jnp.pad(x[0], ((0, 1), (0, 0), (0, 0)))
        return jnp.moveaxis(padded[slots[0]], 2, 1)[None]

    def scatter(y):
        flat = jnp.moveaxis(y[0], 2, 1).reshape(6, 2, 4)
        return jnp.zeros((6, 2, 4)).at[slots.reshape(-1)].set(flat)[None, :5]

    for ours, plain, value in ((to_rows, gather, x), (from_rows, scatter, y)):
        found, back = jax.vjp(lambda v, f=ours: f(v, rows), value)
        wanted, plain_back = jax.vjp(plain, value)
        np.testing.assert_array_equal(found, wanted)
        g = normal(3, *wanted.shape)
        np.testing.assert_allclose(back(g)[0], plain_back(g)[0], rtol=1e-6)


def test_without_rows_a_group_is_a_row():
    x = normal(0, 3, 5, 2, 4)
    y = to_rows(x, None)
    assert y.shape == (3, 1, 2, 5, 4)
    np.testing.assert_array_equal(from_rows(y, None), x)


def test_a_cpu_transposes_the_inputs_of_a_kernel_outside_of_the_fusion_that_computes_them():
    def loss(kernel, x, seed):
        return CPU.linear(dropout(x, 0.1, seed), kernel).sum()

    args = (normal(0, 32, 48), normal(1, 64, 32), jnp.zeros(2, jnp.uint32))
    program = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    computations = program.split("\n\n")
    (hashed,) = (c for c in computations if " xor(" in c)
    (copied,) = (c for c in computations if " copy(" in c and "ENTRY" not in c)
    assert hashed is not copied
    assert "-> f32[32,64] {" in copied
