"""T5X checkpoints: the legacy format (msgpack and zarr folders) and T5X's Orbax format."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from flax import serialization

from dss.errors import UserError
from dss.interop.assemble import Read, assemble
from dss.student.config import T5Config

__all__ = ["load_params", "tensor_name"]

LAYER = {  # our name in a layer -> T5X's in the encoder and in the decoder
    "attention_norm": ("pre_attention_layer_norm.scale", "pre_self_attention_layer_norm.scale"),
    "cross_norm": ("", "pre_cross_attention_layer_norm.scale"),
    "mlp_norm": ("pre_mlp_layer_norm.scale", "pre_mlp_layer_norm.scale"),
    "attention": ("attention", "self_attention"),
    "cross": ("", "encoder_decoder_attention"),
    "mlp": ("mlp", "mlp"),
}


def tensor_name(path: tuple[str, ...], layer: int | None, *, gated: bool) -> tuple[str, bool]:
    """Returns what T5X calls a parameter, dots between the levels."""
    if path == ("embedding",):
        return "token_embedder.embedding", False
    if path == ("head",):
        return "decoder.logits_dense.kernel", False
    stack = path[0]
    if path[1] == "norm":
        return f"{stack}.{stack}_norm.scale", False
    if path[1] == "relative_bias":
        return f"{stack}.relpos_bias.rel_embedding", True  # [H, buckets]
    prefix = f"{stack}.layers_{layer}.{LAYER[path[2]][stack == 'decoder']}"
    if len(path) == 3:
        return prefix, False
    last = path[3] if gated or path[3] != "wi_0" else "wi"
    return f"{prefix}.{last}.kernel", False


def _read_zarr(kvstore: dict) -> np.ndarray:
    spec = {"driver": "zarr", "kvstore": kvstore}
    try:
        array = tensorstore.open(spec, read=True, open=True).result().read().result()
    except ValueError as error:
        if "NOT_FOUND" in str(error):
            raise KeyError(kvstore["path"]) from None
        raise
    # Version 2 stored bfloat16 as its bits.
    return array.view("bfloat16") if array.dtype == np.uint16 else array


def _legacy(folder: Path) -> Read:
    inline = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    inline = inline["optimizer"]["target"]

    def read(name: str) -> np.ndarray:
        leaf: Any = inline
        for level in name.split("."):
            leaf = leaf[level]
        if isinstance(leaf, np.ndarray):
            return leaf
        return _read_zarr({"driver": "file", "path": str(folder / f"target.{name}")})

    return read


def _orbax(folder: Path) -> Read:
    metadata = json.loads((folder / "_METADATA").read_text())

    def read(name: str) -> np.ndarray:
        path = f"target.{name}"
        if metadata.get("use_ocdbt"):
            base = {"driver": "file", "path": f"{folder}/"}
            return _read_zarr({"driver": "ocdbt", "base": base, "path": f"{path}/"})
        return _read_zarr({"driver": "file", "path": str(folder / path)})

    return read


def load_params(folder: Path, config: T5Config) -> Any:
    """Returns the parameters of a T5X checkpoint, as nested dicts of float32 numpy arrays.

    Args:
      folder: `checkpoint_<step>` of either format.
      config: the student's shape.

    Raises:
      UserError: not a T5X checkpoint, a missing tensor, or one of another shape.
    """
    if (folder / "checkpoint").is_file():
        read = _legacy(folder.resolve())
    elif (folder / "state" / "_METADATA").is_file():
        read = _orbax(folder.resolve() / "state")
    else:
        raise UserError(f"{folder}: no T5X checkpoint: neither `checkpoint` nor `state/_METADATA`")
    return assemble(config, read, functools.partial(tensor_name, gated=config.gated), str(folder))
