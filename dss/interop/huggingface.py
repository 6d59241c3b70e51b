"""Reads Hugging Face T5 directories: `config.json`, safetensors in one file or more, vocabulary."""

import atexit
import functools
import hashlib
import re
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import safe_open

from dss.batches.store import cache_dir
from dss.data.examples import read_json_file
from dss.data.vocabulary import BYTES
from dss.errors import CheckpointError
from dss.interop.assemble import assemble
from dss.interop.tokenizers import sentencepiece_model
from dss.paths import check_no_pipes, in_bucket
from dss.student.config import T5Config
from dss.student.network import abstract_params

__all__ = ["find_vocabulary", "load_params", "read_config", "resolve", "tensor_name"]

INDEX = "model.safetensors.index.json"
FILES = [
    "config.json",
    "*.safetensors",
    INDEX,
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
]
HEAD = "lm_head.weight"
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # of T5 1.0
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SENTINEL = re.compile(r"<extra_id_\d+>|<pad>|</s>|<unk>")  # added tokens of every T5 tokenizer
MERGE = "merge it with peft's merge_and_unload(), then save_pretrained(DIR)"
UNMERGED = (".base_layer.", ".lora_A.", ".lora_B.", ".ia3_l.", ".modules_to_save.")
WRAPPED = {
    "_orig_mod.": "a compiled model; save the model as it was before torch.compile",
    "module.": "a model wrapped in DistributedDataParallel; save its `module`",
    "base_model.model.": f"a model wrapped by peft; {MERGE}",
}
SHOWN = 3  # added tokens listed in an error
ROWS = 4096  # compared at a time
ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu", "swish": "silu"}


def resolve(source: str) -> Path:
    """Returns the local folder of a checkpoint, downloaded if it is in a bucket or on the hub.

    Args:
      source: a local folder, a folder in a bucket, or a hub id such as `google/t5-v1_1-small`; the
        prefix `hf:` is optional.

    Raises:
      CheckpointError: if there is no such folder, the hub has no such model or cannot be reached,
        or the folder holds a named pipe.
    """
    name = source.removeprefix("hf:")
    if in_bucket(name):
        return _download(epath.Path(name))
    if Path(name).expanduser().is_dir():
        check_no_pipes(Path(name).expanduser())
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such folder; give a checkpoint's folder or a hub id")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub's client raises many types of errors
        raise CheckpointError(
            f"{name}: no such folder, and the hub did not send it ({type(error).__name__}); check "
            "the path, or the id and the connection"
        ) from error


def _download(folder: epath.Path) -> Path:
    """Returns a local copy of a bucket's folder, deleted when this process exits."""
    files = [path for pattern in FILES for path in folder.glob(pattern)]
    if not files:
        raise CheckpointError(f"{folder}: no checkpoint; it holds none of {', '.join(FILES)}")
    copy = Path(tempfile.mkdtemp(prefix="dss-checkpoint-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for path in files:
        path.copy(copy / path.name)
    return copy


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; every Hugging Face T5 folder has one")
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a {type(value).__name__}, not a JSON object")
    return value


def read_config(folder: Path) -> T5Config:
    """Returns the configuration of the T5 in a folder: T5 1.0 or 1.1, Flan-T5, mT5 or ByT5.

    Raises:
      CheckpointError: if there is no `config.json`, it is not a T5's, or the folder holds tensors,
        special ids or added tokens that would be ignored.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: an adapter without its model; {MERGE}")
    raw = _read_json(path)
    kind = raw.get("model_type")
    if kind not in ("t5", "mt5", "umt5"):
        raise CheckpointError(f"{path}: model_type is {kind!r}; only t5 and mt5 are supported")
    if kind == "umt5":
        raise CheckpointError(
            f"{path}: umt5 has a position bias in every layer, which is not supported"
        )
    projection = raw.get("feed_forward_proj") or ("gated-gelu" if kind == "mt5" else "relu")
    if not isinstance(projection, str):
        raise CheckpointError(f"{path}: feed_forward_proj is {projection!r}; it must be text")
    gated = projection.startswith("gated-")
    activation = projection.removeprefix("gated-")
    if projection == "gated-gelu":  # in transformers this means the tanh approximation
        activation = "gelu_new"
    if activation not in ACTIVATIONS:
        supported = ", ".join(ACTIVATIONS)
        raise CheckpointError(
            f"{path}: activation {activation!r} is not supported; use {supported}"
        )
    given = {name: raw[name] for name in SPECIAL_IDS if raw.get(name) is not None}
    special = SPECIAL_IDS | given
    if special != SPECIAL_IDS:
        actual = ", ".join(f"{name} {value}" for name, value in special.items())
        expected = ", ".join(map(str, SPECIAL_IDS.values()))
        raise CheckpointError(f"{path}: {actual}; only T5's ids {expected} are supported")
    _check_tokenizer(folder)
    try:
        config = T5Config(
            vocab_size=raw["vocab_size"],
            d_model=raw["d_model"],
            d_kv=raw["d_kv"],
            d_ff=raw["d_ff"],
            num_heads=raw["num_heads"],
            num_encoder_layers=raw["num_layers"],
            num_decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
            activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
            gated=gated,
            tied_embeddings=_tied(folder),
            scaled_logits=_scaled_logits(raw),
            relative_buckets=raw.get("relative_attention_num_buckets", 32),
            relative_max_distance=raw.get("relative_attention_max_distance", 128),
            dropout_rate=raw.get("dropout_rate", 0.1),
            layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-6),
        )
        _check_tensors(folder, config)
        return config
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error.args[0]!r}; is it a T5's config?") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; is it a T5's config?") from None


def _expected_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of a T5, by name."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        keys = tuple(p.key for p in path)
        is_stack = "layers" in keys
        for layer in range(leaf.shape[0]) if is_stack else (None,):
            name, transposed = tensor_name(keys, layer, gated=config.gated)
            shape = leaf.shape[1:] if is_stack else leaf.shape
            shapes[name] = shape[::-1] if transposed else shape
    return shapes


def _check_tensors(folder: Path, config: T5Config) -> None:
    """Checks that a folder holds a T5's tensors and no others, by name and shape.

    Raises:
      CheckpointError: if a tensor would be ignored, has another shape, or has the name that a
        library gives it in a wrapped model or an unmerged adapter.
    """
    tensors, layers = _Tensors(folder), config.num_encoder_layers + config.num_decoder_layers
    if layers > len(tensors.names):
        raise CheckpointError(f"{folder}: {len(tensors.names)} tensors for {layers} layers")
    expected = _expected_shapes(config)
    for prefix, remedy in WRAPPED.items():
        if any(name.startswith(prefix) for name in tensors.names):
            raise CheckpointError(f"{folder}: its tensors are named {prefix}NAME: {remedy}")
    if any(mark in name for name in tensors.names for mark in UNMERGED):
        raise CheckpointError(f"{folder}: a model with an adapter that is not merged; {MERGE}")
    if not any(name.startswith("decoder.") for name in tensors.names):
        raise CheckpointError(f"{folder}: an encoder without a decoder; a student needs both")
    unknown = sorted(tensors.names - expected.keys() - {HEAD, UNUSED, *EMBEDDINGS})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{folder}: tensor {unknown[0]!r}{more}, which a T5 does not have; without it the "
            "model would compute something else"
        )
    for name in sorted(tensors.names & expected.keys()):
        if (shape := tensors.shape(name)) != expected[name]:
            raise CheckpointError(
                f"{folder}: a checkpoint of another size: the shape of {name} is {shape}, but "
                f"{expected[name]} by its config.json"
            )
    if EMBEDDINGS[0] in tensors.names:
        for name in EMBEDDINGS[1:]:
            if name in tensors.names and not tensors.are_equal(EMBEDDINGS[0], name):
                raise CheckpointError(
                    f"{folder}: {name} differs from {EMBEDDINGS[0]}; a student has one embedding "
                    "for encoder and decoder"
                )


def _check_tokenizer(folder: Path) -> None:
    """Checks that a tokenizer adds only T5's special tokens to its SentencePiece model.

    Raises:
      CheckpointError: if it adds others, which the student's vocabulary would lack.
    """
    path = folder / "added_tokens.json"
    if not path.is_file():
        return
    added = [token for token in _read_json(path) if not SENTINEL.fullmatch(token)]
    if added:
        shown = ", ".join(map(repr, added[:SHOWN])) + (", ..." if len(added) > SHOWN else "")
        raise CheckpointError(
            f"{path}: added tokens {shown}; only the pieces of spiece.model are supported"
        )


def _scaled_logits(raw: dict) -> bool:
    """Returns whether logits are scaled as in T5 1.0; newer files have a field for it."""
    if raw["model_type"] == "mt5":
        return False
    return raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True) is not False)


def _tied(folder: Path) -> bool:
    """Returns whether the head is the embedding: the files have no head, or an equal one."""
    tensors = _Tensors(folder)
    if HEAD not in tensors.names:
        return True
    if not any(name in tensors.names for name in EMBEDDINGS):
        return False
    return tensors.are_equal(EMBEDDINGS[0], HEAD)


def find_vocabulary(folder: Path) -> str | None:
    """Returns the vocabulary of a checkpoint's folder: a path, "bytes" for ByT5, or None.

    Of a folder with a `tokenizer.json` alone, the path is that of a SentencePiece model made of it.

    Raises:
      CheckpointError: if there is only a `tokenizer.json`, of another kind of tokenizer.
    """
    if (folder / "spiece.model").is_file():
        return str(folder / "spiece.model")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and "ByT5" in str(_read_json(tokenizer).get("tokenizer_class")):
        return BYTES
    if (folder / "tokenizer.json").is_file():
        model = sentencepiece_model(folder / "tokenizer.json")
        path = cache_dir() / "vocabularies" / f"{hashlib.sha256(model).hexdigest()[:16]}.model"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(model)  # several processes may write it, each its own
            Path(file.name).replace(path)
        return str(path)
    config = folder / "config.json"
    if config.is_file() and _read_json(config).get("vocab_size") == 384:
        return BYTES
    return None


class _Tensors:
    """The tensors of a folder's safetensors files, which are memory-mapped."""

    def __init__(self, folder: Path):
        if (folder / INDEX).is_file():
            shards = _read_json(folder / INDEX).get("weight_map")
            if not isinstance(shards, dict):
                raise CheckpointError(
                    f"{folder / INDEX}: no 'weight_map' from tensor names to files"
                )
            outside = [s for s in shards.values() if not _is_shard(s)]
            if outside:
                raise CheckpointError(
                    f"{folder / INDEX}: {outside[0]!r} is not a safetensors file in this folder"
                )
            self._file = {name: folder / shard for name, shard in shards.items()}
        elif (folder / "model.safetensors").is_file():
            with _open(folder / "model.safetensors") as file:
                self._file = dict.fromkeys(file.keys(), folder / "model.safetensors")
        elif any(folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{folder}: its .bin files are pickles, which run code when they are read; "
                "convert them: load the model with transformers and call save_pretrained(DIR), "
                "which writes safetensors"
            )
        else:
            raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX}")

    @property
    def names(self) -> Set[str]:
        """Names of the tensors."""
        return self._file.keys()

    def _stored_name(self, name: str) -> str:
        """Returns a tensor's name in the files: a shared one is stored under any of its names."""
        if name == EMBEDDINGS[0]:
            return next((n for n in EMBEDDINGS if n in self._file), name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """See `dss.interop.assemble.Tensors`."""
        name = self._stored_name(name)
        with _open(self._file[name]) as file:
            return tuple(_slice(file, name, self._file[name]).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See `dss.interop.assemble.Tensors`."""
        name = self._stored_name(name)
        with _open(self._file[name]) as file:
            part = _slice(file, name, self._file[name])
            try:
                return part[index]
            except (TypeError, ValueError, AttributeError):  # the type does not exist in NumPy
                raise CheckpointError(
                    f"{self._file[name]}: {name} has type {part.get_dtype()}, which is not "
                    "supported; save the model as float32 or bfloat16"
                ) from None

    def are_equal(self, name: str, other: str) -> bool:
        """Returns whether two tensors are equal, reading `ROWS` rows at a time."""
        shape = self.shape(name)
        if self.shape(other) != shape:
            return False
        starts = range(0, shape[0], ROWS) if shape else ()
        columns = [slice(None)] * len(shape[1:])
        parts = [(slice(i, min(i + ROWS, shape[0])), *columns) for i in starts]
        return all(np.array_equal(self.read(name, part), self.read(other, part)) for part in parts)


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though {INDEX} lists it") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None


def _slice(file: Any, name: str, path: Path) -> Any:
    """Returns a handle that reads slices of a tensor."""
    try:
        return file.get_slice(name)
    except Exception:
        raise CheckpointError(f"{path}: no tensor {name!r}, though {INDEX} lists it") from None


LAYER = {  # name in dss -> (sublayer index in the encoder, in the decoder, Hugging Face's name)
    "attention_norm": (0, 0, "layer_norm"),
    "cross_norm": (None, 1, "layer_norm"),
    "mlp_norm": (1, 2, "layer_norm"),
    "attention": (0, 0, "SelfAttention"),
    "cross": (None, 1, "EncDecAttention"),
    "mlp": (1, 2, "DenseReluDense"),
}
PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def tensor_name(path: tuple[str, ...], layer: int | None, *, gated: bool) -> tuple[str, bool]:
    """Returns a parameter's name in Hugging Face, and whether it is transposed there.

    Linear layers are [in, out] in dss and [out, in] in Hugging Face.
    """
    if path == ("embedding",):
        return EMBEDDINGS[0], False
    if path == ("head",):
        return HEAD, True
    stack = path[0]
    if path[1] == "norm":
        return f"{stack}.final_layer_norm.weight", False
    if path[1] == "relative_bias":
        attention = f"{stack}.block.0.layer.0.SelfAttention"
        return f"{attention}.relative_attention_bias.weight", False
    encoder_index, decoder_index, tensor = LAYER[path[2]]
    index = encoder_index if stack == "encoder" else decoder_index
    prefix = f"{stack}.block.{layer}.layer.{index}.{tensor}"
    if len(path) == 3:
        return f"{prefix}.weight", False
    last = path[3] if gated or path[3] != "wi_0" else "wi"
    return f"{prefix}.{PROJECTIONS.get(last, last)}.weight", True


def load_params(folder: Path, config: T5Config, shardings: Any = None) -> Any:
    """Returns the parameters in a folder's safetensors, float32.

    Args:
      folder: a Hugging Face T5 folder.
      config: the configuration by `read_config`, or that of a student of the same shape.
      shardings: the shardings of the parameters; None for the first device.

    Raises:
      CheckpointError: if there are no safetensors, or a tensor is missing or has another shape.
    """
    name = functools.partial(tensor_name, gated=config.gated)
    return assemble(config, _Tensors(folder), name, str(folder), shardings)
