"""Writes Hugging Face T5 directories for transformers."""

import contextlib
import functools
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dss.data.vocabulary import EOS, PAD, UNK, SentencePieceVocabulary, Vocabulary
from dss.errors import CheckpointError
from dss.interop.disassemble import Params, disassemble, placeholders
from dss.interop.huggingface import HEAD, tensor_name
from dss.interop.shards import write_shards
from dss.student.config import DecodingConfig, T5Config

__all__ = [
    "SPIECE",
    "check_tokenizer",
    "model_config",
    "quiet_transformers",
    "write_model",
    "write_tokenizer",
]

SPIECE = "spiece.model"
SENTINELS = {"T5Tokenizer": 100, "ByT5Tokenizer": 125}  # ids above the pieces, <extra_id_0> last
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu"}  # gelu is the tanh approximation


def model_config(config: T5Config) -> dict[str, Any]:
    """Returns the config.json of a student.

    Before version 5 transformers ties the head and scales the logits if `tie_word_embeddings` is
    true, and does neither if it is false. Version 5 takes the scaling from it, and ties the head
    unless the files hold a head that is not the embedding. Where the logits are not scaled it is
    therefore false, and the files always hold a head, which may be a copy of the embedding.

    Raises:
      CheckpointError: if the logits are scaled and the head is not the embedding, which only
        version 5 could load correctly.
    """
    if config.scaled_logits and not config.tied_embeddings:
        raise CheckpointError(
            "a student with untied embeddings and scaled logits has no format that every version "
            "of transformers loads correctly; such a student cannot be exported"
        )
    activation = ACTIVATIONS[config.activation]
    if config.gated:
        activation = f"gated-{config.activation}"
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.scaled_logits,
        "scale_decoder_outputs": config.scaled_logits,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_factor": 1.0,
        "use_cache": True,
        "dtype": "float32",
        **_special_ids(),
    }


def _special_ids() -> dict[str, int]:
    return {"decoder_start_token_id": PAD, "eos_token_id": EOS, "pad_token_id": PAD}


def _tensors(config: T5Config, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    name = functools.partial(tensor_name, gated=config.gated)
    yield from disassemble(config, params, name)
    if config.tied_embeddings and not config.scaled_logits:
        yield HEAD, params["embedding",]


def write_model(
    folder: Path, config: T5Config, params: Params, decoding: DecodingConfig, **options: Any
) -> None:
    """Writes config.json, generation_config.json and the safetensors.

    Args:
      folder: the folder to write into.
      config: the student's configuration.
      params: the student's parameters.
      decoding: the defaults of transformers' `generate`.
      options: options of `write_shards`.

    Raises:
      CheckpointError: see `model_config`.
    """
    _write_json(folder / "config.json", model_config(config))
    generation = {"max_new_tokens": decoding.max_length, "num_beams": decoding.num_beams}
    _write_json(folder / "generation_config.json", _special_ids() | generation)
    like = dict(_tensors(config, placeholders(config)))
    write_shards(folder, like, _tensors(config, params), **options)


def write_tokenizer(
    folder: Path, config: T5Config, vocabulary: Vocabulary, inputs_length: int
) -> None:
    """Writes the files from which `AutoTokenizer` makes a tokenizer with the vocabulary's ids.

    Args:
      folder: the folder to write into.
      config: the student's configuration, for its number of ids.
      vocabulary: the student's vocabulary.
      inputs_length: longest input in tokens with EOS, for truncation.
    """
    special: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if isinstance(vocabulary, SentencePieceVocabulary):
        kind = "T5Tokenizer"
        (folder / SPIECE).write_bytes(vocabulary.path.read_bytes())
        options: dict[str, Any] = {"legacy": True}  # the text after a </s> begins a new word
    else:
        kind, options = "ByT5Tokenizer", {}
        # Without these flags the tokenizer would remove spaces around a special token.
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        special = {name: {"content": text} | flags for name, text in special.items()}
    spare_ids = config.vocab_size - vocabulary.size
    _write_json(folder / "special_tokens_map.json", special)
    if kind == "ByT5Tokenizer":
        special = {name: {"__type": "AddedToken"} | token for name, token in special.items()}
    _write_json(
        folder / "tokenizer_config.json",
        special
        | options
        | {
            "tokenizer_class": kind,
            "extra_ids": SENTINELS[kind] if spare_ids >= SENTINELS[kind] else 0,
            "model_max_length": inputs_length,
            "clean_up_tokenization_spaces": False,  # decoded text is not changed
        },
    )


def check_tokenizer(folder: Path, vocabulary: Vocabulary) -> str:
    """Checks that the tokenizer of an exported folder gives the ids of the student's training.

    SentencePiece models with properties that T5's tokenizer in transformers does not support are
    refused. Where transformers is installed, the ids of some hundred texts are compared too.

    Returns:
      A note for the user: for a model of whole words, that the ids of unknown words differ.

    Raises:
      CheckpointError: if the tokenizer gives other ids.
    """
    words = False
    if isinstance(vocabulary, SentencePieceVocabulary):
        words, differences = _compare_with_t5(vocabulary.path.read_bytes())
        if differences:
            raise CheckpointError(
                f"{vocabulary.path}: T5's tokenizer in transformers would give other ids: the "
                f"model {' and '.join(differences)}, unlike T5's; export to T5X instead"
            )
    note = "transformers gives other ids for words outside the vocabulary" if words else ""
    if importlib.util.find_spec("transformers") is None:
        return note
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        texts = [*PROBES, *_texts_of_pieces(vocabulary, words=words)]
        if words:
            texts = [text for text in texts if UNK not in vocabulary.encode(text)]
        theirs = tokenizer(texts).input_ids
    for text, actual in zip(texts, theirs, strict=True):
        expected = [*vocabulary.encode(text), EOS]
        if actual != expected:
            raise CheckpointError(
                f"transformers gives other ids for {text!r}: {actual} where dss has {expected}; "
                "export to T5X instead"
            )
    return note


PROBES = (
    *("predict: The refund never came", "explain: 3 + 4.5 = 7.5", "  two  blanks ", "a</s>b"),
    *("naïve Ünïcode Größe", "x_1[i] != 'y'", "UPPER lower 12,345.67", "a\nb\tc", "1/2 100% $5"),
)
PROBED_PIECES = 300


def _texts_of_pieces(vocabulary: Vocabulary, *, words: bool) -> list[str]:
    """Returns texts with pieces sampled evenly from a vocabulary."""
    ids = range(EOS + 2, vocabulary.size, max(1, vocabulary.size // PROBED_PIECES))
    pieces = [vocabulary.decode([i]) for i in ids]
    if words:
        return [f"{first} {second}" for first, second in itertools.pairwise(pieces)]
    # Segmentations of a repeated character are equally likely, and ties may be broken otherwise.
    return [f"of {word} and {word}s" for word in pieces if len(set(word)) > 1 or len(word) == 1]


def _compare_with_t5(model: bytes) -> tuple[bool, list[str]]:
    """Compares a SentencePiece model with T5's.

    Returns:
      Whether its pieces are whole words, and its properties that T5's tokenizer in transformers
      does not support.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    user_defined = proto.SentencePiece.USER_DEFINED
    facts = {
        "is of type BPE or character": trained.model_type in (trained.BPE, trained.CHAR),
        "falls back to bytes": trained.byte_fallback,
        "puts no space before a text": not normalizer.add_dummy_prefix,
        "keeps repeated spaces": not normalizer.remove_extra_whitespaces,
        "puts spaces after words": trained.treat_whitespace_as_suffix,
        "has user-defined symbols": any(p.type == user_defined for p in proto.pieces),
    }
    return trained.model_type == trained.WORD, [fact for fact, holds in facts.items() if holds]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disables transformers' progress bars and warnings, such as of a head that is not tied."""
    from transformers.utils import logging

    shows_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bar:
            logging.enable_progress_bar()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
