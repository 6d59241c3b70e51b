import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from etils import epath
from flax import serialization

from dss.config.experiment import Experiment
from dss.errors import DssError
from dss.interop import t5x_checkpoint, t5x_export
from dss.interop.assemble import assemble
from dss.interop.t5x_checkpoint import load_params, read_config, resolve
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, param_shardings
from dss.runs.start import import_checkpoint, read_initial
from dss.student.decoding import generate
from dss.student.network import abstract_params, bind, init_params, logical_axes
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

FORMATS = ["legacy", "orbax"]
LAYOUTS = {
    "8x1": MeshConfig(),
    "fsdp 4x2": MeshConfig(model=2, rules=(("embed", "data"), ("heads", "model"))),
    "2x4": MeshConfig(model=4),
}


@pytest.fixture
def fixture(shared):
    return shared / "fixtures" / "t5x_tiny_v1_1"


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def write_legacy(folder, params, config, *, version=3, dtype=np.float32):
    """Writes parameters in T5X's legacy format, in zarr folders."""
    from dss.interop.disassemble import disassemble

    leaves = {
        tuple(p.key for p in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def name(path, layer):
        return t5x_checkpoint.tensor_name(path, layer, gated=config.gated)

    for tensor_name, tensor in disassemble(config, leaves, name):
        array = np.asarray(tensor, dtype)
        if version == 2 and dtype == ml_dtypes.bfloat16:
            array = array.view(np.uint16)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/target.{tensor_name}/"},
        }
        store = tensorstore.open(spec, create=True, dtype=array.dtype, shape=array.shape).result()
        store.write(array).result()
    content = {"version": version, "optimizer": {"target": {}, "state": {}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))


@pytest.mark.parametrize("form", FORMATS)
def test_an_imported_run_has_the_logits_and_tokens_of_t5x(form, fixture, tmp_path):
    experiment = Experiment(
        run_dir=str(tmp_path / "run"),
        initial_checkpoint=f"t5x:{fixture / form}",
        vocabulary="bytes",
    )
    predictor, step = import_checkpoint(experiment).predictor()
    assert step == 0
    expected = np.load(fixture / "expected.npz")
    inputs, targets = expected["encoder_input_tokens"], expected["decoder_target_tokens"]
    network = bind(predictor.config, predictor.params)
    logits = network(inputs, expected["decoder_input_tokens"])
    real = targets != 0
    np.testing.assert_allclose(logits[real], expected["logits"][real], rtol=1e-4, atol=1e-4)
    greedy = expected["greedy_tokens"]
    tokens, _ = generate(predictor.config, predictor.params, inputs, max_length=greedy.shape[1])
    np.testing.assert_array_equal(tokens, greedy)


def test_both_formats_hold_the_same_parameters(fixture):
    folders = [resolve(f"t5x:{fixture / form}") for form in FORMATS]
    configs = [read_config(folder) for folder in folders]
    raw = json.loads((fixture / "config.json").read_text())
    assert configs[0] == configs[1]
    assert (configs[0].d_model, configs[0].d_kv, configs[0].d_ff) == (
        raw["emb_dim"],
        raw["head_dim"],
        raw["mlp_dim"],
    )
    assert (configs[0].num_encoder_layers, configs[0].num_decoder_layers) == (2, 3)
    assert_same(*(load_params(folder, configs[0]) for folder in folders))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMATS)
def test_parameters_are_read_with_their_shardings(layout, form, fixture):
    folder, mesh_config = resolve(str(fixture / form)), LAYOUTS[layout]
    config = read_config(folder)
    mesh = make_mesh(mesh_config)
    shapes = abstract_params(config)
    shardings = param_shardings(mesh, mesh_config, logical_axes(config), shapes)
    placed = load_params(folder, config, shardings)
    assert_same(placed, load_params(folder, config))
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings


def test_a_device_reads_only_its_part():
    config = tiny_config()
    mesh_config = MeshConfig(rules=(("embed", "data"),))
    mesh = make_mesh(mesh_config)
    shapes = abstract_params(config)
    shardings = param_shardings(mesh, mesh_config, logical_axes(config), shapes)
    read = []

    class Ones:
        def shape(self, name):
            return shape_of[name]

        def read(self, name, index):
            part = np.ones(shape_of[name], np.float32)[index]
            read.append((name, part.size, np.prod(shape_of[name])))
            return part

    shape_of = {}

    def name(path, layer):
        leaf = shapes
        for key in path:
            leaf = leaf[key]
        tensor_name = f"{path}{layer}"
        shape_of[tensor_name] = leaf.shape if layer is None else leaf.shape[1:]
        return tensor_name, False

    params = assemble(config, Ones(), name, "here", shardings)
    assert_same(params, jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes))
    query = [(part, whole) for name, part, whole in read if "query" in name]
    assert query
    assert all(part * 8 == whole for part, whole in query)
    relative = [part for name, part, whole in read if "relative_bias" in name]
    assert len(relative) == 2, "a replicated tensor is read once"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "relu", "gated": False, "tied_embeddings": True, "scaled_logits": True}],
    ids=["1.1", "1.0"],
)
def test_bfloat16_of_either_version_and_both_kinds(version, changes, tmp_path):
    config = tiny_config(num_encoder_layers=3, **changes)
    params = init_params(config, 0)
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()
    write_legacy(folder, params, config, version=version, dtype=ml_dtypes.bfloat16)
    read = read_config(resolve(str(tmp_path)))
    assert dataclasses.replace(read, dropout_rate=0.0) == config
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    assert_same(load_params(folder, config), rounded)


def test_the_latest_checkpoint_of_a_folder_is_read(fixture, tmp_path):
    for step in (2, 10):
        shutil.copytree(fixture / "orbax" / "checkpoint_0", tmp_path / f"checkpoint_{step}")
    (tmp_path / "checkpoint_30").mkdir()  # of a run that is writing it
    assert resolve(f"t5x:{tmp_path}") == epath.Path(tmp_path / "checkpoint_10")


def test_an_export_is_read_again(tmp_path):
    config = tiny_config()
    params = init_params(config, 1)
    leaves = {
        tuple(p.key for p in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    state, _ = t5x_export.train_state(config, leaves, {}, 5)
    written = t5x_export.write_checkpoint(tmp_path, state, 5)
    assert read_config(resolve(str(tmp_path))) == dataclasses.replace(config, dropout_rate=0.1)
    assert_same(load_params(written, config), params)


def test_user_errors_are_one_line(fixture, tmp_path):
    def error_of(source, **options):
        with pytest.raises(DssError) as error:
            read_initial(Experiment(initial_checkpoint=f"t5x:{source}", **options))
        assert "\n" not in str(error.value)
        return str(error.value)

    orbax = fixture / "orbax"
    assert "`Experiment.vocabulary`" in error_of(orbax)
    assert "gs://t5-data/vocabs" in error_of(orbax)
    assert "no T5X checkpoint" in error_of(tmp_path, vocabulary="bytes")
    assert "no T5X checkpoint" in error_of(tmp_path / "nowhere", vocabulary="bytes")
    assert "another size" in error_of(orbax, vocabulary="bytes", student=tiny_config())

    broken = tmp_path / "legacy"
    shutil.copytree(fixture / "legacy" / "checkpoint_0", broken)
    (broken / "target.decoder.layers_1.mlp.wo.kernel" / "0.0").write_bytes(b"cut short")
    assert "decoder.layers_1.mlp.wo.kernel cannot be read" in error_of(broken, vocabulary="bytes")
    shutil.rmtree(broken / "target.token_embedder.embedding")
    assert "no tensor 'token_embedder.embedding'" in error_of(broken, vocabulary="bytes")
    (broken / "checkpoint").write_bytes(b"no msgpack")
    assert "not a T5X checkpoint" in error_of(broken, vocabulary="bytes")
    old = {"version": 1, "optimizer": {"target": {}}}
    (broken / "checkpoint").write_bytes(serialization.msgpack_serialize(old))
    assert "version 1; supported: 2 and 3" in error_of(broken, vocabulary="bytes")
