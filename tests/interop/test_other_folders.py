"""Hugging Face folders that differ from a T5's are errors."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dss.cli.main import main
from dss.errors import DssError
from dss.interop import huggingface

QUERY = "encoder.block.0.layer.0.SelfAttention.q"
BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture
def folder(shared, tmp_path):
    """A copy of a whole T5 folder."""
    return shutil.copytree(shared / "fixtures" / "reference_cqa" / "model", tmp_path / "model")


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def change_json(folder, name, **values):
    path = folder / name
    current = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(current | values))


ones = np.ones((4, 4), np.float32)
TENSORS = {
    "unmerged lora": (lambda t: t | {f"{QUERY}.lora_A.default.weight": ones}, "not merged; merge"),
    "base layer": (lambda t: t | {f"{QUERY}.base_layer.weight": ones}, "not merged; merge it with"),
    "bias": (lambda t: t | {f"{QUERY}.bias": ones}, f"tensor '{QUERY}.bias', which a T5 does"),
    "head bias": (lambda t: t | {"lm_head.bias": ones}, "tensor 'lm_head.bias', which a T5"),
    "bias in layer 1": (lambda t: t | {BIAS: ones}, f"tensor '{BIAS}', which a T5 does not"),
    "two": (lambda t: t | {"a": ones, "b": ones}, "tensor 'a' and 1 more, which a T5 does not"),
    "compiled": (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "a compiled model; save"),
    "peft": (
        lambda t: {f"base_model.model.{k}": v for k, v in t.items()},
        "a model wrapped by peft",
    ),
    "parallel": (lambda t: {f"module.{k}": v for k, v in t.items()}, "DistributedDataParallel"),
    "encoder": (
        lambda t: {k: v for k, v in t.items() if not k.startswith(("decoder", "lm_head"))},
        "an encoder without a decoder; a student needs",
    ),
    "decoder embedding": (
        lambda t: t | {"decoder.embed_tokens.weight": t["shared.weight"] + 1},
        "decoder.embed_tokens.weight differs from shared.weight",
    ),
    "encoder embedding": (
        lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"] + 1},
        "encoder.embed_tokens.weight differs from shared.weight",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_would_be_ignored_are_refused_by_name(folder, case):
    change, message = TENSORS[case]
    change_tensors(folder, change)
    with pytest.raises(DssError, match=message.replace(".", r"\.")):
        huggingface.read_config(folder)


def test_copies_of_the_embedding_and_a_bias_that_t5_never_used_are_accepted(folder):
    wanted = huggingface.read_config(folder)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    change_tensors(
        folder,
        lambda t: (
            t | {huggingface.UNUSED: ones} | {name: t["shared.weight"].copy() for name in copies}
        ),
    )
    assert huggingface.read_config(folder) == wanted


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"decoder_start_token_id": 1}, "decoder_start_token_id 1; only T5's ids 0, 1, 0"),
        ({"pad_token_id": 1, "eos_token_id": 2}, "pad_token_id 1, eos_token_id 2"),
    ],
)
def test_other_special_ids_are_refused(folder, ids, message):
    change_json(folder, "config.json", **ids)
    with pytest.raises(DssError, match=message):
        huggingface.read_config(folder)


def test_added_tokens_are_refused_but_sentinels_are_not(folder):
    change_json(folder, "added_tokens.json", **{"<extra_id_0>": 32099, "</s>": 1})
    huggingface.read_config(folder)
    change_json(folder, "added_tokens.json", **{"{": 32100, "}": 32101})
    with pytest.raises(DssError, match=r"added tokens '\{', '\}'; only the pieces of"):
        huggingface.read_config(folder)


def test_an_adapter_float8_and_a_file_elsewhere_are_one_line_errors(folder, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    change_json(adapter, "adapter_config.json", peft_type="LORA")
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    narrow = {k: v.to(torch.float8_e4m3fn) if ".wi" in k else v for k, v in tensors.items()}
    save_torch(narrow, folder / "model.safetensors")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (elsewhere / huggingface.INDEX).write_text(
        json.dumps({"weight_map": {"a": "../model.safetensors"}})
    )
    for case, message in (
        (adapter, "an adapter without its model; merge it"),
        (folder, "has type F8_E4M3, which is not supported; save the model as float32"),
        (elsewhere, "'../model.safetensors' is not a safetensors file in this folder"),
    ):
        assert main(["import", f"hf:{case}", str(tmp_path / "run"), "--vocabulary=bytes"]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not JSON that can be read"),
        ("{", "not JSON"),
        ("[]", "a list, not a JSON object"),
        ('{"model_type": "t5", "feed_forward_proj": 3}', "feed_forward_proj is 3"),
        ('{"model_type": "t5", "feed_forward_proj": ["gelu"]}', "feed_forward_proj is"),
    ],
)
def test_an_invalid_config_is_a_one_line_error(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(DssError, match=message) as caught:
        huggingface.read_config(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DssError, match=rf"{name}: a named pipe, not a file"):
        huggingface.resolve(f"hf:{folder}")


@pytest.mark.parametrize("file", ["/etc/passwd", "../model.safetensors", "..", ".", "", 3, ["a"]])
def test_only_safetensors_files_of_the_folder_are_opened(folder, file):
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": {"shared.weight": file}}))
    with pytest.raises(DssError, match="is not a safetensors file in this folder"):
        huggingface.read_config(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 10**9}, "tensors for 10000000"),
        ({"num_decoder_layers": 10**30}, "tensors for 10000000"),
        ({"d_model": 10**30}, "another size"),
        ({"d_kv": 10**7}, r"another size: .*SelfAttention.k.weight is \(32, 32\), but \(40000000"),
    ],
)
def test_sizes_that_no_machine_has_are_errors_at_once(folder, values, message):
    change_json(folder, "config.json", **values)
    with pytest.raises(DssError, match=message):
        huggingface.read_config(folder)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_embeddings_that_are_not_matrices_are_errors(folder, shape):
    names = ("shared.weight", "lm_head.weight", "encoder.embed_tokens.weight")
    change_tensors(folder, lambda t: t | {name: np.ones(shape, np.float32) for name in names})
    with pytest.raises(DssError, match=r"another size: .* is \("):
        huggingface.read_config(folder)
