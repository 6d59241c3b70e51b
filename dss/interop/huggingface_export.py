"""Writes Hugging Face T5 directories, which transformers loads."""

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
from dss.errors import UserError
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
      UserError: the logits are scaled and the head is not the embedding, which only version 5 could
        read right.
    """
    if config.scaled_logits and not config.tied_embeddings:
        raise UserError(
            "a student with a head of its own and scaled logits has no form that every version of "
            "transformers reads right; export it with --to t5x"
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
      folder: where.
      config: the student's shape.
      params: its parameters.
      decoding: what `generate` does unless told otherwise.
      options: of `write_shards`.

    Raises:
      UserError: see `model_config`.
    """
    _write_json(folder / "config.json", model_config(config))
    generation = {"max_new_tokens": decoding.max_length, "num_beams": decoding.num_beams}
    _write_json(folder / "generation_config.json", _special_ids() | generation)
    like = dict(_tensors(config, placeholders(config)))
    write_shards(folder, like, _tensors(config, params), **options)


def write_tokenizer(
    folder: Path, config: T5Config, vocabulary: Vocabulary, inputs_length: int
) -> None:
    """Writes the files of which `AutoTokenizer` makes a tokenizer with the vocabulary's ids.

    Args:
      folder: where.
      config: says how many ids there may be.
      vocabulary: the student's.
      inputs_length: longest input in tokens, EOS counted; longer ones are cut if asked for.
    """
    special: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if isinstance(vocabulary, SentencePieceVocabulary):
        kind = "T5Tokenizer"
        (folder / SPIECE).write_bytes(vocabulary.path.read_bytes())
        options: dict[str, Any] = {"legacy": True}  # the text after a </s> begins a new word
    else:
        kind, options = "ByT5Tokenizer", {}
        # Else it would eat the spaces around a special token.
        sides = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        special = {name: {"content": text} | sides for name, text in special.items()}
    room = config.vocab_size - vocabulary.size
    _write_json(folder / "special_tokens_map.json", special)
    if kind == "ByT5Tokenizer":
        special = {name: {"__type": "AddedToken"} | token for name, token in special.items()}
    _write_json(
        folder / "tokenizer_config.json",
        special
        | options
        | {
            "tokenizer_class": kind,
            "extra_ids": SENTINELS[kind] if room >= SENTINELS[kind] else 0,
            "model_max_length": inputs_length,
            "clean_up_tokenization_spaces": False,  # decoding keeps the text as it is
        },
    )


def check_tokenizer(folder: Path, vocabulary: Vocabulary) -> str:
    """Checks that the tokenizer of an exported folder gives the ids that the student learnt.

    Where transformers is installed it is asked about some hundred texts. What T5's tokenizer there
    is known not to compute is refused without it.

    Returns:
      What a user should know: of a model of whole words, that others are read otherwise.

    Raises:
      UserError: it gives others.
    """
    words = False
    if isinstance(vocabulary, SentencePieceVocabulary):
        words, differs = _beside_t5(vocabulary.path.read_bytes())
        if differs:
            raise UserError(
                f"{vocabulary.path}: T5's tokenizer in transformers would give other ids: the "
                f"model {' and '.join(differs)}, unlike T5's; export with --to t5x"
            )
    note = "in transformers, words that the vocabulary does not have are other ids" if words else ""
    if importlib.util.find_spec("transformers") is None:
        return note
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        texts = [*PROBES, *_texts_of_pieces(vocabulary, words=words)]
        if words:
            texts = [text for text in texts if UNK not in vocabulary.encode(text)]
        theirs = tokenizer(texts).input_ids
    for text, found in zip(texts, theirs, strict=True):
        ours = [*vocabulary.encode(text), EOS]
        if found != ours:
            raise UserError(
                f"transformers gives other ids for {text!r}: {found} where dss has {ours}; export "
                "with --to t5x"
            )
    return note


PROBES = (
    *("predict: The refund never came", "explain: 3 + 4.5 = 7.5", "  two  blanks ", "a</s>b"),
    *("naïve Ünïcode Größe", "x_1[i] != 'y'", "UPPER lower 12,345.67", "a\nb\tc", "1/2 100% $5"),
)
PROBED_PIECES = 300


def _texts_of_pieces(vocabulary: Vocabulary, *, words: bool) -> list[str]:
    """Returns texts that have pieces from all of a vocabulary."""
    ids = range(EOS + 2, vocabulary.size, max(1, vocabulary.size // PROBED_PIECES))
    pieces = [vocabulary.decode([i]) for i in ids]
    if words:
        return [f"{one} {other}" for one, other in itertools.pairwise(pieces)]
    # Of a run of one character several ways to cut it are as likely, and a tie may break otherwise.
    return [f"of {word} and {word}s" for word in pieces if len(set(word)) > 1 or len(word) == 1]


def _beside_t5(model: bytes) -> tuple[bool, list[str]]:
    """Returns whether a SentencePiece model has whole words, and what of it T5's tokenizer in
    transformers does not take over.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    user_defined = proto.SentencePiece.USER_DEFINED
    facts = {
        "is of BPE or of characters": trained.model_type in (trained.BPE, trained.CHAR),
        "falls back to bytes": trained.byte_fallback,
        "puts no blank before a text": not normalizer.add_dummy_prefix,
        "keeps all blanks": not normalizer.remove_extra_whitespaces,
        "puts blanks after words": trained.treat_whitespace_as_suffix,
        "has symbols defined by a user": any(p.type == user_defined for p in proto.pieces),
    }
    return trained.model_type == trained.WORD, [fact for fact, is_so in facts.items() if is_so]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Has transformers neither show bars nor warn that T5's head is not tied, which is right."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
