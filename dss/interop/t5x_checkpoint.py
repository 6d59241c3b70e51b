"""Reads T5X checkpoints: the legacy format (msgpack and zarr folders) and T5X's Orbax format."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath
from flax import serialization

from dss.errors import CheckpointError
from dss.interop.assemble import assemble
from dss.paths import absolute, check_no_pipes, in_bucket
from dss.student.config import T5Config
from dss.student.network import abstract_params

__all__ = ["NOT_STORED", "is_checkpoint", "load_params", "read_config", "resolve", "tensor_name"]

NOT_STORED = ("activation", "relative_max_distance", "layer_norm_epsilon")
"""Fields of `T5Config` that a T5X checkpoint does not store; `read_config` uses T5's values."""

LAYER = {  # name in dss -> (T5X's name in the encoder, in the decoder)
    "attention_norm": ("pre_attention_layer_norm.scale", "pre_self_attention_layer_norm.scale"),
    "cross_norm": ("", "pre_cross_attention_layer_norm.scale"),
    "mlp_norm": ("pre_mlp_layer_norm.scale", "pre_mlp_layer_norm.scale"),
    "attention": ("attention", "self_attention"),
    "cross": ("", "encoder_decoder_attention"),
    "mlp": ("mlp", "mlp"),
}
CACHE_BYTES = 2 * 10**9  # of a tensor's chunks, since devices read slices of the same chunks
VERSIONS = (2, 3)  # of the legacy format
LEGACY, ORBAX = "checkpoint", "state/_METADATA"  # the file that identifies each format
TENSORFLOW = b"model_checkpoint_path"  # first bytes of a TensorFlow `checkpoint` file
EMBEDDING, HEAD = "token_embedder.embedding", "decoder.logits_dense.kernel"
PARAMETERS = "target"  # T5X's name for the parameters of a train state


def tensor_name(path: tuple[str, ...], layer: int | None, *, gated: bool) -> tuple[str, bool]:
    """Returns a parameter's name in T5X, levels joined by dots, and whether it is transposed."""
    if path == ("embedding",):
        return EMBEDDING, False
    if path == ("head",):
        return HEAD, False
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


def resolve(source: str) -> epath.Path:
    """Returns the folder of a checkpoint, on this machine or in a bucket.

    Args:
      source: the checkpoint's folder, or a folder of `checkpoint_<step>` folders (or `<step>`, as
        Orbax alone names them), for the latest step; the prefix `t5x:` is optional.

    Raises:
      CheckpointError: if there is no T5X checkpoint, or it holds a named pipe.
    """
    folder = absolute(source.removeprefix("t5x:"))
    if is_checkpoint(folder):
        check_no_pipes(folder)
        return folder
    steps = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        step = re.fullmatch(r"(?:checkpoint_)?(\d+)", path.name)
        if step and is_checkpoint(path):
            steps[int(step[1])] = path
    if not steps:
        raise CheckpointError(
            f"{folder}: no T5X checkpoint: it holds neither `{LEGACY}` nor `{ORBAX}`, nor a "
            "`checkpoint_<step>` folder with one of them"
        )
    check_no_pipes(steps[max(steps)])
    return steps[max(steps)]


def is_checkpoint(folder: epath.PathLike) -> bool:
    """Returns whether a folder is a checkpoint of either format."""
    folder = absolute(folder)
    return (folder / LEGACY).is_file() or (folder / ORBAX).is_file()


def _kvstore(folder: epath.Path) -> dict[str, Any]:
    """Returns the TensorStore key-value store of a folder."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, path = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path.rstrip('/')}/"}


class _Tensors:
    """The parameters of a checkpoint, by their names in T5X.

    Args:
      folder: the folder returned by `resolve`.

    Raises:
      CheckpointError: if the checkpoint is incomplete or of an unknown version.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._inline: Mapping[str, Any] = {}  # arrays in the one file of the legacy format
        self.names: set[str] = set()  # of all tensors; empty for a partial legacy checkpoint
        self._opened: tuple[str, Any] = ("", None)  # the last tensor, whose slices are read in turn
        self._driver = "zarr"
        if (folder / LEGACY).is_file():
            self._inline, self.names = _read_legacy(folder / LEGACY)
            self._base, self._inside = _kvstore(folder), None
        else:
            metadata = _read_metadata(folder / ORBAX)
            self.names |= metadata["names"]
            self._base = _kvstore(folder / "state")
            self._inside = "ocdbt" if metadata.get("use_ocdbt") else None
            self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"

    def _open(self, name: str) -> Any:
        if name != self._opened[0]:
            self._opened = (name, self._open_store(name))
        return self._opened[1]

    def _open_store(self, name: str) -> Any:
        path = f"{PARAMETERS}.{name}/"
        if self._inside:
            kvstore = {"driver": "ocdbt", "base": self._base, "path": path}
        else:
            kvstore = self._base | {"path": self._base["path"] + path}
        spec: dict[str, Any] = {"driver": self._driver, "kvstore": kvstore}
        if self._driver == "zarr":  # T5X writes all chunks, so a missing one is an error
            spec["fill_missing_data_reads"] = False
        try:
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
            return tensorstore.open(spec, read=True, open=True, context=context).result()
        except ValueError as error:
            if "NOT_FOUND" in str(error):
                raise KeyError(name) from None
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: {name} cannot be read: {str(error).splitlines()[0]}"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """See `dss.interop.assemble.Tensors`."""
        inline = self._inline.get(name)
        return self._open(name).shape if inline is None else np.shape(inline)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See `dss.interop.assemble.Tensors`."""
        if name in self._inline:
            return np.asarray(self._inline[name])[index]
        array = self._open(name)
        try:
            part = array[index].read().result()
        except ValueError as error:
            raise self._unreadable(name, error) from error
        # Version 2 stores the bits of bfloat16 as uint16.
        return part.view("bfloat16") if part.dtype == np.uint16 else part

    def __contains__(self, name: str) -> bool:
        try:
            self.shape(name)
        except KeyError:
            return False
        return True


def _read_metadata(path: epath.Path) -> dict[str, Any]:
    """Returns Orbax's metadata of a checkpoint, with the `names` of its parameters added."""
    try:
        metadata = json.loads(path.read_text())
        leaves = [leaf["key_metadata"] for leaf in metadata["tree_metadata"].values()]
        keys = [[level["key"] for level in leaf] for leaf in leaves]
        names = {".".join(key[1:]) for key in keys if key[0] == PARAMETERS}
        return metadata | {"names": names}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not the metadata of a checkpoint: {reason}") from None


def _read_legacy(path: epath.Path) -> tuple[dict[str, Any], set[str]]:
    """Returns the arrays in the one file of a legacy checkpoint, by name; and all names.

    Other arrays are in folders of their own; the file has their TensorStore specs, or in a partial
    checkpoint nothing.
    """
    raw = path.read_bytes()
    if raw.startswith(TENSORFLOW):
        raise CheckpointError(
            f"{path}: a TensorFlow checkpoint; convert it with t5x/scripts/convert_tf_checkpoint.py"
        )
    try:
        content = serialization.msgpack_restore(raw)
        version, leaves = content["version"], dict(_flat(content["optimizer"][PARAMETERS]))
    except Exception as error:  # msgpack raises errors of many types for other files
        raise CheckpointError(
            f"{path}: not a T5X checkpoint: {type(error).__name__}: {error}"
        ) from None
    if version not in VERSIONS:
        supported = " and ".join(map(str, VERSIONS))
        raise CheckpointError(
            f"{path}: a T5X checkpoint of version {version}; supported: {supported}"
        )
    return {n: leaf for n, leaf in leaves.items() if isinstance(leaf, np.ndarray)}, set(leaves)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and "kvstore" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_config(folder: epath.Path) -> T5Config:
    """Returns the configuration of the T5 1.0 or 1.1 in a checkpoint, from its parameters' shapes.

    Fields in `NOT_STORED` have T5's values: the activation is T5 1.1's GELU with a gate, T5 1.0's
    ReLU without. Logits are scaled if the head is the embedding, as in T5X's network.

    Args:
      folder: the folder returned by `resolve`.

    Raises:
      CheckpointError: if the parameters are not those of a T5.
    """
    tensors = _Tensors(folder)

    def shape(name: str) -> tuple[int, int]:
        try:
            rows, columns = tensors.shape(name)
            return rows, columns
        except ValueError:
            raise CheckpointError(f"{folder}: {name} is not a matrix, unlike T5's") from None
        except KeyError:
            raise CheckpointError(
                f"{folder}: no tensor {name!r}; is it a T5 of T5X's example network, without "
                "scanned layers?"
            ) from None

    def depth(stack: str) -> int:
        return next(i for i in range(10**6) if _norm(stack, i) not in tensors)

    gated = "encoder.layers_0.mlp.wi_0.kernel" in tensors
    tied = HEAD not in tensors
    vocab_size, d_model = shape(EMBEDDING)
    heads, buckets = shape("encoder.relpos_bias.rel_embedding")
    width = shape("encoder.layers_0.attention.query.kernel")[1]
    d_ff = shape(f"encoder.layers_0.mlp.{'wi_0' if gated else 'wi'}.kernel")[1]
    try:
        config = T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=width // heads,
            d_ff=d_ff,
            num_heads=heads,
            num_encoder_layers=depth("encoder"),
            num_decoder_layers=depth("decoder"),
            activation="gelu" if gated else "relu",
            gated=gated,
            tied_embeddings=tied,
            scaled_logits=tied,
            relative_buckets=buckets,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: {error}; is it a T5?") from None
    extra = sorted(tensors.names - _names(config))
    if extra:  # biases, a position bias in every layer, layers after one that is missing
        raise CheckpointError(
            f"{folder}: {len(extra)} parameters more than a T5 of {config.num_encoder_layers} + "
            f"{config.num_decoder_layers} layers, such as {extra[0]}; a student cannot have them"
        )
    return config


def _names(config: T5Config) -> set[str]:
    """Returns the names in T5X of all parameters of a T5."""
    names = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        keys = tuple(p.key for p in path)
        layers = range(leaf.shape[0]) if "layers" in keys else [None]
        names |= {tensor_name(keys, i, gated=config.gated)[0] for i in layers}
    return names


def _norm(stack: str, layer: int) -> str:
    return tensor_name((stack, "layers", "mlp_norm"), layer, gated=True)[0]


def load_params(folder: epath.PathLike, config: T5Config, shardings: Any = None) -> Any:
    """Returns the parameters of a T5X checkpoint, float32.

    Args:
      folder: the folder `checkpoint_<step>` of either format, on this machine or in a bucket.
      config: the configuration by `read_config`, or that of a student of the same shape.
      shardings: the shardings of the parameters; None for the first device.

    Raises:
      CheckpointError: if it is not a T5X checkpoint, or a tensor is missing or has another shape.
    """
    folder = resolve(str(folder))
    name = functools.partial(tensor_name, gated=config.gated)
    return assemble(config, _Tensors(folder), name, str(folder), shardings)
