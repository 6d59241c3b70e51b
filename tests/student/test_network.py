import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dss.data.vocabulary import EOS, PAD
from dss.interop import huggingface
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, put_batch
from dss.student import decoding
from dss.student.config import T5Config
from dss.student.cpu import CPU
from dss.student.decoding import (
    best_continuations,
    candidate_slots,
    generate,
    score_candidates,
)
from dss.student.network import bind, init_params, logical_axes, num_parameters
from dss.student.ops import Ops
from tests.conftest import tiny_config

TOLERANCE = 1e-4  # relative to the largest logit


def logits_of(config, params, *args):
    return jax.jit(lambda p, *a: bind(config, p)(*a))(params, *args)


KINDS = {
    "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "byt5": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "vocab_size": 384,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def hugging_face(request, tmp_path_factory):
    """A random T5 of transformers with well-separated logits, and the folder it is saved in."""
    import torch
    import transformers

    torch.manual_seed(0)
    values = {
        "vocab_size": 200,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    config = transformers.T5Config(**(values | KINDS[request.param]))
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
        if request.param != "1.0":  # a separate head, as in published checkpoints
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
            model.config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp(request.param.replace(".", "_"))
    model.save_pretrained(folder)
    return model, folder


def _inputs():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 190, (4, 150))  # longer than relative_max_distance
    inputs[:, -1] = 1
    for row in range(4):
        inputs[row, 150 - 20 * row :] = 0
    targets = rng.integers(2, 190, (4, 140))
    targets[:, 0] = 0
    return inputs, targets


def test_logits_are_those_of_transformers(hugging_face):
    import torch

    model, folder = hugging_face
    config = huggingface.read_config(folder)
    params = huggingface.load_params(folder, config)
    inputs, targets = _inputs()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(inputs),
            attention_mask=torch.tensor(inputs != 0).long(),
            decoder_input_ids=torch.tensor(targets),
        ).logits.numpy()
    ours = np.asarray(logits_of(config, params, inputs, targets))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("num_beams", [1, 4])
def test_decoding_is_that_of_transformers(hugging_face, num_beams):
    import torch

    model, folder = hugging_face
    config = huggingface.read_config(folder)
    params = huggingface.load_params(folder, config)
    inputs, _ = _inputs()
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(inputs),
            attention_mask=torch.tensor(inputs != 0).long(),
            max_new_tokens=20,
            num_beams=num_beams,
            do_sample=False,
        ).numpy()[:, 1:]
    ours, _ = generate(config, params, jnp.asarray(inputs), max_length=20, num_beams=num_beams)
    theirs = np.pad(theirs, ((0, 0), (0, 20 - theirs.shape[1])))
    np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config()
    return config, init_params(config, 0)


def test_a_packed_segment_has_the_logits_of_the_segment_alone(tiny):
    config, params = tiny
    rng = np.random.default_rng(1)
    a, b = rng.integers(3, 300, 5), rng.integers(3, 300, 4)
    x, y = rng.integers(3, 300, 3), rng.integers(3, 300, 6)
    packed = logits_of(
        config,
        params,
        np.array([[*a, *b, 0]]),
        np.array([[*x, *y]]),
        np.array([[1] * 5 + [2] * 4 + [0]]),
        np.array([[1] * 3 + [2] * 6]),
    )
    for inputs, targets, slots in ((a, x, slice(0, 3)), (b, y, slice(3, 9))):
        alone = logits_of(config, params, inputs[None], targets[None])
        np.testing.assert_allclose(packed[0, slots], alone[0], atol=1e-5)


def test_remat_and_bfloat16_change_no_more_than_rounding(tiny):
    config, params = tiny
    inputs, targets = np.array([[5, 6, 7, 1]]), np.array([[0, 8, 9]])
    wanted = logits_of(config, params, inputs, targets)
    for changes, tolerance in (({"remat": "full"}, 1e-6), ({"dtype": "bfloat16"}, 0.15)):
        got = logits_of(tiny_config(**changes), params, inputs, targets)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, atol=tolerance)


def test_the_networks_of_a_cpu_and_of_an_accelerator_are_equal(tiny, monkeypatch):
    """Logits and gradients of packed rows with dropout, and the tokens of both decoders."""
    config, params = dataclasses.replace(tiny[0], dropout_rate=0.1), tiny[1]
    tokens, segments = np.array([[5, 6, 1, 9, 1, 0]]), np.array([[1, 1, 1, 2, 2, 0]])
    rows = np.array([[[0, 1, 2, 6], [3, 4, 6, 6]]])

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, ops):
        args = (tokens, tokens, segments, segments, np.uint32([1, 2]), (rows,) * 3)
        logits, back = jax.vjp(lambda p: bind(config, p, ops)(*args)[:, :5], params)
        return logits, back(logits)[0]

    (logits, grads), (plain_logits, plain_grads) = run(params, CPU), run(params, Ops())
    np.testing.assert_allclose(logits, plain_logits, atol=1e-6 * np.abs(plain_logits).max())
    largest = max(np.abs(x).max() for x in jax.tree.leaves(plain_grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest), grads, plain_grads
    )

    inputs = np.random.default_rng(0).integers(3, 300, (4, 6)).astype(np.int32)
    decoded = [generate(*tiny, inputs, max_length=8, num_beams=n) for n in (1, 2)]
    monkeypatch.setattr("dss.student.network.ops_for", Ops)
    plain = [generate(config, params, inputs, max_length=8, num_beams=n) for n in (1, 2)]
    for (found, scores), (wanted, plain_scores) in zip(decoded, plain, strict=True):
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_allclose(scores, plain_scores, rtol=1e-5)


def test_dropout_is_a_function_of_its_seed():
    config = tiny_config(dropout_rate=0.5)
    params = init_params(config, 0)
    inputs, targets = np.array([[5, 6, 7, 1]]), np.array([[0, 8, 9]])
    first, second = np.uint32([1, 2]), np.uint32([1, 3])
    a = logits_of(config, params, inputs, targets, None, None, first)
    np.testing.assert_array_equal(a, logits_of(config, params, inputs, targets, None, None, first))
    assert not np.allclose(a, logits_of(config, params, inputs, targets, None, None, second))
    assert not np.allclose(a, logits_of(config, params, inputs, targets))


@pytest.mark.parametrize(
    ("sizes", "millions"),
    [
        ((512, 64, 1024, 6, 8), 77),
        ((768, 64, 2048, 12, 12), 248),
        ((1024, 64, 2816, 16, 24), 783),
        ((2048, 64, 5120, 32, 24), 2850),
        ((4096, 64, 10240, 64, 24), 11135),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(sizes, millions):
    names = ("d_model", "d_kv", "d_ff", "num_heads", "num_encoder_layers")
    values = dict(zip(names, sizes, strict=True))
    config = T5Config(vocab_size=32128, num_decoder_layers=sizes[-1], **values)
    assert round(num_parameters(config) / 1e6) == millions


def test_every_parameter_has_logical_axes(tiny):
    config, params = tiny
    axes = logical_axes(config)
    jax.tree.map(
        lambda names, x: pytest.fail(str(names)) if len(names) != x.ndim else None,
        axes,
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize("field", ["d_model", "num_heads", "num_decoder_layers"])
def test_sizes_are_checked(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        tiny_config(**{field: 0})


def test_greedy_is_the_argmax_of_the_whole_network(tiny):
    config, params = tiny
    inputs = np.array([[5, 6, 7, 1], [9, 1, 0, 0]])
    tokens, _ = generate(config, params, inputs, max_length=6, stop=False)
    given = np.zeros((2, 1), int)
    for t in range(6):
        best = np.asarray(logits_of(config, params, inputs, given))[:, -1].argmax(-1)
        np.testing.assert_array_equal(np.asarray(tokens)[:, t], best)
        given = np.concatenate([given, best[:, None]], axis=1)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("devices", [1, 4])
def test_stages_and_dropped_sequences_change_no_output(tiny, monkeypatch, num_beams, devices):
    config, params = tiny
    params = params | {"head": params["head"].at[:, EOS].multiply(8)}  # outputs differ in length
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    inputs = np.random.default_rng(0).integers(3, 300, (16, 6)).astype(np.int32)
    inputs = put_batch(mesh, inputs)
    options = {"max_length": 30, "num_beams": num_beams}
    monkeypatch.setattr(decoding, "STAGE", 30)
    wanted, scores = generate(config, params, inputs, **options)
    assert len(set((np.asarray(wanted) != 0).sum(axis=1).tolist())) > 3
    stages, resize = [], decoding._resize

    def spy(source, state, *, size, positions):
        stages.append((size, positions))
        assert devices == 1 or state.caches[0].keys.sharding.spec[0] == "data"
        return resize(source, state, size=size, positions=positions)

    monkeypatch.setattr(decoding, "_resize", spy)
    monkeypatch.setattr(decoding, "STAGE", 4)
    monkeypatch.setattr(decoding, "MIN_BATCH", 2)
    tokens, staged_scores = generate(config, params, inputs, **options)
    np.testing.assert_array_equal(tokens, wanted)
    np.testing.assert_allclose(staged_scores, scores, rtol=1e-5)
    sizes, positions = zip(*stages, strict=True)
    assert positions == (8, 16, 30)[: len(positions)]
    assert set(sizes) == {16} if devices == 4 else sizes[-1] < 16 and min(sizes) >= 2
    assert not any(size % 2 for size in sizes)  # multiples of an eighth of 16


@pytest.mark.parametrize("num_beams", [1, 3])
def test_outputs_are_padded_after_eos(tiny, num_beams):
    config, params = tiny
    params = params | {"head": params["head"].at[:, EOS].multiply(8)}  # some outputs end early
    inputs = np.random.default_rng(0).integers(3, 300, (16, 6))
    tokens, _ = generate(config, params, inputs, max_length=12, num_beams=num_beams)
    ended = [row for row in np.asarray(tokens).tolist() if EOS in row[:-1]]
    assert len(ended) >= 4
    for row in ended:
        end = row.index(EOS)
        assert PAD not in row[:end]
        assert set(row[end + 1 :]) == {PAD}


@pytest.mark.parametrize("vocabulary", [512, 100])  # a multiple of the chunk size, and not
def test_the_best_continuations_are_those_of_a_full_search(vocabulary):
    draw = np.random.default_rng(0)
    # Few different values: many ties, which go to the lower id as in `top_k`.
    logits = draw.integers(0, 6, (3, 4, vocabulary)).astype(np.float32)
    scores = np.float32([[0, -1, -2, -1e9]] * 3)
    found, parents, ids = best_continuations(jnp.asarray(logits), jnp.asarray(scores), 8)
    base = scores - np.asarray(jax.nn.logsumexp(logits, axis=-1))
    all_scores = (logits + base[..., None]).reshape(3, -1)
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :8]
    np.testing.assert_array_equal(found, np.take_along_axis(all_scores, best, 1))
    np.testing.assert_array_equal(parents, best // vocabulary)
    np.testing.assert_array_equal(ids, best % vocabulary)


@pytest.mark.parametrize("packed", [True, False])
def test_a_candidates_score_is_its_summed_log_probability(tiny, packed):
    config, params = tiny
    inputs = np.array([[5, 6, 7, 1], [7, 5, 1, 0]])
    labels = [[[8, 9, 1], [10, 1], [1]], [[11, 1], [8, 9, 12, 13, 1]]]
    candidates = np.zeros((2, 3, 5), int)
    for b, ids_of_input in enumerate(labels):
        for c, ids in enumerate(ids_of_input):
            candidates[b, c, : len(ids)] = ids
    slots = candidate_slots(labels) if packed else None
    scores = np.asarray(score_candidates(config, params, inputs, candidates, slots))
    for b, ids_of_input in enumerate(labels):
        for c, ids in enumerate(ids_of_input):
            shifted = np.array([[0, *ids[:-1]]])
            log_probs = jax.nn.log_softmax(logits_of(config, params, inputs[b : b + 1], shifted))
            wanted = sum(float(log_probs[0, t, i]) for t, i in enumerate(ids))
            assert scores[b, c] == pytest.approx(wanted, abs=1e-4)
    assert scores[1, 2] == -np.inf


def test_candidates_share_the_first_slot_and_do_not_read_eos():
    assert candidate_slots([[[5, 6, 1], [7, 1]], [[1]]]) == 4
    assert candidate_slots([[[5, 6, 7, 1], [7, 8, 1]]]) == 8  # 6, padded to a multiple of 4
    assert candidate_slots([]) == 4


@pytest.mark.parametrize(("longest", "active"), [(8, False), (1000, True)])
def test_a_search_ends_if_no_running_hypothesis_can_win_at_any_length(monkeypatch, longest, active):
    # The finished hypothesis has a log-probability of -0.0068. The running one has -5: at most
    # -0.62 per token at a length of 8, and -0.005 at 1000.
    probabilities = np.float32([1e-9, 1 - np.exp(-5.0), np.exp(-5.0), 1e-9])
    logits = jnp.broadcast_to(jnp.log(probabilities), (1, 2, 4))
    monkeypatch.setattr(decoding, "_step", lambda *args: (logits, []))
    tokens, scores = jnp.zeros((1, 2, longest), jnp.int32), jnp.float32([[0.0, decoding.NEVER]])
    done = jnp.full((1, 2), decoding.NEVER)
    index, is_active = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    state = decoding.Beams(
        jnp.int32(0), index, tokens, scores, tokens, tokens, done, is_active, caches=[]
    )
    state = decoding._beam_step(None, [], None, 0, True, state)
    assert np.exp(state.done_scores[0, 0]) == pytest.approx(probabilities[decoding.EOS])
    assert bool(state.active[0]) == active


def test_student_and_training_need_no_tensorflow():
    code = (
        "import sys, dss.student.decoding, dss.training.loop, dss.runs.train;"
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'seqio', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
