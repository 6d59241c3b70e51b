import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dss.errors import DssError
from dss.interop import huggingface
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, param_shardings
from dss.student.network import abstract_params, logical_axes


@pytest.fixture
def folder(shared):
    return shared / "fixtures" / "reference_cqa" / "model"


def test_shards_are_read_as_one_file_is(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    index = {}
    for k, part in enumerate((names[::2], names[1::2])):
        file = f"model-{k + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / huggingface.INDEX).write_text(json.dumps({"weight_map": index}))
    config = huggingface.read_config(tmp_path)
    whole, sharded = (huggingface.load_params(f, config) for f in (folder, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DssError, match="no such file, though"):
        huggingface.load_params(tmp_path, config)


def test_parameters_are_read_with_their_shardings(folder):
    config = huggingface.read_config(folder)
    mesh_config = MeshConfig(model=2, rules=(("embed", "data"), ("heads", "model")))
    mesh = make_mesh(mesh_config)
    shapes = abstract_params(config)
    shardings = param_shardings(mesh, mesh_config, logical_axes(config), shapes)
    placed = huggingface.load_params(folder, config, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, huggingface.load_params(folder, config))
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings


def test_bin_files_are_refused_with_the_reason(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DssError, match="pickles"):
        huggingface.read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": "umt5"}, "umt5"),
        ({"feed_forward_proj": "gated-tanh"}, "activation 'tanh'"),
        ({"d_model": None}, None),
        ({"vocab_size": "8"}, "T5Config.vocab_size must be of type int, got '8'"),
    ],
)
def test_configurations_that_are_not_a_t5s_are_errors(folder, tmp_path, changes, message):
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(DssError, match=message or "no 'd_model'"):
        huggingface.read_config(tmp_path)


def test_a_truncated_file_is_an_error(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DssError, match="not a complete safetensors file"):
        huggingface.read_config(tmp_path)


def test_files_that_are_not_json_objects_are_errors(folder, tmp_path):
    for content in (b"[]", b"\xff", b"{"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(DssError, match=r"config\.json: "):
            huggingface.read_config(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / huggingface.INDEX).write_text("{}")
    with pytest.raises(DssError, match="no 'weight_map'"):
        huggingface.read_config(tmp_path)


def test_a_missing_folder_and_an_unreachable_hub_are_errors(tmp_path):
    with pytest.raises(DssError, match="no such folder"):
        huggingface.resolve(f"hf:{tmp_path}/none")
    with pytest.raises(DssError, match="the hub did not send it"):
        huggingface.resolve("hf:google/t5-v1_1-small")
    with pytest.raises(DssError, match="the hub did not send it"):
        huggingface.resolve("hf:t5-small")
