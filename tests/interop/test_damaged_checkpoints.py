"""Corrupt T5X and Hugging Face checkpoints, and those of other networks, are errors."""

import os
import shutil

import jax
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from dss.config.experiment import Experiment
from dss.config.gin_files import parse_gin
from dss.errors import DssError
from dss.interop import huggingface, t5x_checkpoint
from dss.runs.start import read_initial
from tests.integrations.t5x_files import fixture_tensors, write_legacy, write_orbax

WO = "encoder.layers_1.mlp.wo.kernel"


@pytest.fixture(scope="module")
def tensors(shared):
    return fixture_tensors(shared)


def read(folder):
    folder = t5x_checkpoint.resolve(str(folder))
    config = t5x_checkpoint.read_config(folder)
    return t5x_checkpoint.load_params(folder, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder.layers_1.relpos_bias.rel_embedding": (4, 32)},
            r"1 parameters more.*relpos_bias",
        ),
        ({"decoder.layers_0.mlp.wo.bias": (32,)}, r"1 parameters more.*layers_0\.mlp\.wo\.bias"),
        ({"decoder.layers_1.pre_mlp_layer_norm.scale": None}, r"a T5 of 2 \+ 1 layers, such as"),
        ({"encoder.layers_0.attention.query.kernel": (32, 4, 8)}, "query.kernel is not a matrix"),
        ({"token_embedder.embedding": (32,)}, "embedding is not a matrix"),
        ({"encoder.layers_0.attention.query.kernel": (32, 2)}, "d_kv must be at least 1"),
        ({WO: (32, 48)}, r"of another size: .* is \(32, 48\)"),
    ],
)
def test_parameters_that_are_not_a_t5s(tensors, tmp_path, change, message):
    changed = {n: a for n, a in tensors.items() if change.get(n, ()) is not None}
    changed |= {n: np.ones(s, np.float32) for n, s in change.items() if s is not None}
    with pytest.raises(DssError, match=message):
        read(write_legacy(tmp_path / "c", changed))


@pytest.mark.parametrize("form", ["hf", "t5x"])
def test_non_finite_and_integer_parameters_are_errors(shared, tensors, tmp_path, form):
    model = shared / "fixtures" / "reference_cqa" / "model"
    name = WO if form == "t5x" else "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    whole = tensors if form == "t5x" else load_file(model / "model.safetensors")

    def read_with(array, folder):
        if form == "t5x":
            return read(write_legacy(folder, whole | {name: array}))
        folder.mkdir()
        shutil.copy(model / "config.json", folder)
        save_file(whole | {name: array}, folder / "model.safetensors")
        return huggingface.load_params(folder, huggingface.read_config(folder))

    bad = whole[name].copy()
    bad[3, 4] = np.nan
    with pytest.raises(DssError, match=f"{name} holds non-finite values"):
        read_with(bad, tmp_path / "nan")
    with pytest.raises(DssError, match=f"{name} has type int8; parameters must have a floating"):
        read_with(np.zeros_like(bad, np.int8), tmp_path / "int8")


def test_a_lost_chunk_is_an_error(tensors, tmp_path):
    folder = write_legacy(tmp_path / "c", tensors)
    zeros = np.zeros_like(tensors[WO])
    params = read(
        write_legacy(tmp_path / "zeros", tensors | {WO: zeros})
    )  # chunks of zeros are written too
    np.testing.assert_array_equal(params["encoder"]["layers"]["mlp"]["wo"][1], zeros)
    (folder / f"target.{WO}" / "1.0").unlink()
    with pytest.raises(DssError, match=rf"{WO} cannot be read: .*is missing"):
        read(folder)


def test_invalid_metadata_and_tensorflow_checkpoints_are_errors(tensors, tmp_path):
    folder = write_orbax(tmp_path / "c", tensors)
    for content in ("[", "{}", "[]", '{"tree_metadata": [3]}', '{"a": ' * 100_000):
        (folder / "state" / "_METADATA").write_text(content)
        with pytest.raises(DssError, match="not the metadata of a checkpoint"):
            read(folder)
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (legacy / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-1"\n')
    with pytest.raises(DssError, match=r"a TensorFlow checkpoint; .*convert_tf_checkpoint"):
        read(legacy)


@pytest.mark.parametrize("tree", [3, [1, 2], None, "x", {"target": [1]}, {"target": {"a": 3}}])
def test_a_file_without_a_t5s_tree_is_an_error(tmp_path, tree):
    content = {"version": 3, "optimizer": tree}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(DssError, match=r"not a T5X checkpoint|no tensor 'token_embedder"):
        read(tmp_path)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tensors, tmp_path):
    folder = write_legacy(tmp_path / "checkpoint_1", tensors)
    (folder / f"target.{WO}" / "1.0").unlink()
    os.mkfifo(folder / f"target.{WO}" / "1.0")
    for source in (folder, tmp_path):
        with pytest.raises(DssError, match=r"/1\.0: a named pipe"):
            t5x_checkpoint.resolve(f"t5x:{source}")


def test_orbax_without_ocdbt_and_in_a_folder_of_its_own_name(tensors, tmp_path):
    wanted = read(write_legacy(tmp_path / "legacy", tensors))
    for k, options in enumerate(({"use_ocdbt": False}, {"use_zarr3": True})):
        write_orbax(tmp_path / str(k) / "7", tensors, **options)  # not checkpoint_7
        jax.tree.map(np.testing.assert_array_equal, read(tmp_path / str(k)), wanted)


def test_a_path_without_prefix_and_fields_that_are_not_stored(shared, tmp_path):
    path = str(shared / "fixtures" / "t5x_tiny_v1_1" / "orbax" / "checkpoint_0")  # without t5x:
    found, _, _ = read_initial(Experiment(initial_checkpoint=path, vocabulary="bytes"))
    assert (found.activation, found.relative_max_distance) == ("gelu", 128)
    sizes = {n: getattr(found, n) for n in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads")}
    sizes |= {"num_encoder_layers": 2, "num_decoder_layers": 3, "relative_max_distance": 64}
    flags = [f"T5Config.{n}={v}" for n, v in sizes.items()] + ["T5Config.activation='silu'"]
    student = parse_gin(["students/tiny.gin"], flags).student
    completed, _, _ = read_initial(
        Experiment(initial_checkpoint=path, vocabulary="bytes", student=student)
    )
    assert (completed.activation, completed.relative_max_distance) == ("silu", 64)


def test_a_wrong_vocabulary_is_an_error_before_parameters_are_read(tensors, vocab_path, tmp_path):
    folder = write_legacy(tmp_path / "c", tensors)
    shutil.rmtree(folder / "target.decoder.decoder_norm.scale")
    experiment = Experiment(initial_checkpoint=f"t5x:{folder}", vocabulary=str(vocab_path))
    with pytest.raises(DssError, match="wrong vocabulary: it has 32000 ids and the student 1152"):
        read_initial(experiment)
