"""Exports to T5X, compared with T5X's checkpoints and restored by T5X where it is installed."""

import importlib.util
import json

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from dss.errors import DssError
from dss.interop import t5x_checkpoint
from dss.interop.t5x_export import train_state, write_checkpoint
from dss.student.config import T5Config
from dss.student.network import init_params
from dss.training.checkpoints import Checkpoints
from dss.training.config import OptimizerConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import TrainState
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

needs_t5x = pytest.mark.skipif(
    importlib.util.find_spec("t5x") is None, reason="T5X is not installed"
)
STEP, RATE = 3, 1e-2
# Wide enough that Adafactor factors: both sides of some matrices are at least 128.
WIDE = {"d_model": 128, "num_heads": 8, "d_kv": 16, "d_ff": 136, "num_encoder_layers": 1}


def flat(params) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(p.key for p in path): np.asarray(x) for path, x in leaves}


def restore(folder):
    handler = ocp.PyTreeCheckpointHandler()
    args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree
    )
    return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))


def assert_same(got, wanted):
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(got, wanted)


def gradients(params, seed: int):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(scope="module", params=["1.1", "1.0"])
def trained(request, tmp_path_factory):
    """A student after some steps of Adafactor, its optimizer, and its checkpoint for T5X."""
    kind = {
        "1.1": {},
        "1.0": {
            "tied_embeddings": True,
            "scaled_logits": True,
            "gated": False,
            "activation": "relu",
        },
    }[request.param]
    config = tiny_config(**WIDE, **kind)
    optimizer = make_optimizer(
        OptimizerConfig(
            name="adafactor", learning_rate=RATE, schedule="constant", clip_global_norm=None
        ),
        10,
    )
    params = init_params(config, 0)
    opt_state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEP):
        updates, opt_state = update(gradients(params, step), opt_state, params)
        params = optax.apply_updates(params, updates)
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(TrainState(np.int32(STEP), params, opt_state))
    checkpoints.wait()
    leaves = [checkpoints.leaves(STEP, item) for item in ("params", "opt_state")]
    checkpoints.close()
    state, kept = train_state(config, *leaves, STEP)
    assert kept
    return config, optimizer, params, opt_state, write_checkpoint(folder, state, STEP)


def test_the_imported_fixture_is_exported_as_t5x_wrote_it(shared, tmp_path):
    theirs = shared / "fixtures" / "t5x_tiny_v1_1" / "orbax" / "checkpoint_0"
    sizes = {"vocab_size": 1152, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    config = T5Config(**sizes, num_encoder_layers=2, num_decoder_layers=3)
    params = t5x_checkpoint.load_params(theirs, config)
    state, kept = train_state(config, flat(params), {}, 0)
    assert not kept
    ours = write_checkpoint(tmp_path, state, 0)
    # Names, dtypes, shapes and bits of the parameters and of the optimizer's initial state.
    jax.tree.map(assert_same, restore(ours / "state"), restore(theirs / "state"))
    again = t5x_checkpoint.load_params(ours, config)
    jax.tree.map(assert_same, again, params)


def test_an_export_has_the_position_in_the_data(trained):
    *_, path = trained
    assert json.loads((path / "dataset" / "train_ds-000-of-001").read_text()) == {"step": STEP}


def test_adafactors_statistics_are_exported(trained):
    config, _, params, _, path = trained
    state = restore(path / "state")
    assert state["state"]["step"] == STEP
    statistics = state["state"]["param_states"]["decoder"]["layers_1"]["mlp"]["wo"]["kernel"]
    assert {name: x.shape for name, x in statistics.items()} == {
        "m": (1,),
        "v": (1,),
        "v_row": (128,),
        "v_col": (136,),
    }
    assert statistics["v_row"].min() > 0
    bias = state["state"]["param_states"]["encoder"]["relpos_bias"]["rel_embedding"]
    assert bias["v"].shape == (config.num_heads, config.relative_buckets)
    jax.tree.map(assert_same, t5x_checkpoint.load_params(path, config), flat_to_host(params))


def flat_to_host(params):
    return jax.tree.map(np.asarray, params)


def test_a_student_that_t5x_cannot_represent_is_an_error():
    config = tiny_config(tied_embeddings=True)
    with pytest.raises(DssError, match="T5X's network scales the logits"):
        train_state(config, {}, {}, 0)


def t5x_model(config: T5Config):
    import seqio
    from t5x import adafactor, models
    from t5x.examples.t5 import network

    vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
    return models.EncoderDecoderModel(
        module=network.Transformer(
            network.T5Config(
                vocab_size=config.vocab_size,
                emb_dim=config.d_model,
                num_heads=config.num_heads,
                num_encoder_layers=config.num_encoder_layers,
                num_decoder_layers=config.num_decoder_layers,
                head_dim=config.d_kv,
                mlp_dim=config.d_ff,
                mlp_activations=("gelu", "linear") if config.gated else ("relu",),
                logits_via_embedding=config.tied_embeddings,
            )
        ),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=adafactor.Adafactor(
            learning_rate=RATE, logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
    )


@needs_t5x
def test_t5x_restores_an_export_and_updates_as_dss_does(trained):
    from t5x import partitioning, utils

    config, optimizer, params, opt_state, path = trained
    model, partitioner = t5x_model(config), partitioning.PjitPartitioner(num_partitions=1)
    features = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    restored, _ = utils.create_checkpoint_manager_and_restore(  # as t5x.train does
        utils.TrainStateInitializer(
            optimizer_def=model.optimizer_def,
            init_fn=model.get_initial_variables,
            input_shapes=dict.fromkeys(features, (8, 16)),
            partitioner=partitioner,
        ),
        partitioner,
        utils.RestoreCheckpointConfig(path=str(path), mode="specific"),
        str(path),
        None,
        use_orbax=True,
    )
    assert int(restored.step) == STEP
    ours = restore(path / "state")
    jax.tree.map(assert_same, flat_to_host(restored.state_dict()), ours)

    # The same gradient gives the same parameters.
    gradient = gradients(params, STEP)
    updates, _ = optimizer.update(gradient, opt_state, params)
    wanted, _ = train_state(config, flat(optax.apply_updates(params, updates)), {}, 0)
    named, _ = train_state(config, flat(gradient), {}, 0)
    moved = restored.apply_gradient(named["target"], learning_rate=RATE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        flat_to_host(moved.state_dict()["target"]),
        wanted["target"],
    )
