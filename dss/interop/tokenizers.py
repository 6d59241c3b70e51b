"""The SentencePiece model in a `tokenizer.json`, the one tokenizer file that transformers 5 writes.

It holds the pieces and scores of a Unigram model (Kudo, 2018) and the compiled normalization rules,
of which a SentencePiece model with the same ids is made.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from dss.data.examples import read_json_file
from dss.errors import CheckpointError

__all__ = ["sentencepiece_model"]

SPECIAL = ("<pad>", "</s>", "<unk>")  # the first pieces of a T5 vocabulary
EXTRA_ID = re.compile(r"<extra_id_\d+>")  # after the pieces of the SentencePiece model
SHOWN = 3  # added tokens listed in an error
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece_model(path: Path) -> bytes:
    """Returns a SentencePiece model that gives the ids of a `tokenizer.json`.

    Args:
      path: the file; of a T5, mT5 or umT5 tokenizer.

    Raises:
      CheckpointError: if it is another kind of tokenizer.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb

    content = read_json_file(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(
            f"{path}: a tokenizer of type {kind!r}; supported is Unigram, as T5's; give the "
            "SentencePiece model of the checkpoint as vocabulary"
        )
    pieces = _pieces(path, model.get("vocab"))
    _check_added(path, content.get("added_tokens"))
    steps = _steps(content.get("normalizer")) + _steps(content.get("pre_tokenizer"))
    known = {"Precompiled", "Strip", "Replace", "WhitespaceSplit", "Metaspace"}
    unknown = sorted({str(step.get("type")) for step in steps} - known)
    metaspace = [step for step in steps if step.get("type") == "Metaspace"]
    prepends = [s.get("prepend_scheme", "always") == "always" for s in metaspace]
    if unknown or prepends != [True] or metaspace[0].get("replacement") != "▁":
        raise CheckpointError(
            f"{path}: not T5's normalization ({', '.join(unknown) or 'its Metaspace step'}); give "
            "the SentencePiece model of the checkpoint as vocabulary"
        )
    byte_fallback = bool(model.get("byte_fallback"))
    proto = pb.ModelProto()
    for index, (piece, score) in enumerate(pieces):
        kind = pb.ModelProto.SentencePiece.Type.NORMAL
        if index < len(SPECIAL):
            types = pb.ModelProto.SentencePiece.Type
            kind = types.UNKNOWN if piece == "<unk>" else types.CONTROL
        elif byte_fallback and BYTE.fullmatch(piece):
            kind = pb.ModelProto.SentencePiece.Type.BYTE
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = pb.TrainerSpec.ModelType.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = SPECIAL
    trainer.byte_fallback = byte_fallback
    rules = next((s.get("precompiled_charsmap") for s in steps if s["type"] == "Precompiled"), None)
    if rules:
        try:
            proto.normalizer_spec.precompiled_charsmap = base64.b64decode(rules, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise CheckpointError(f"{path}: 'precompiled_charsmap' is not base64") from None
    else:
        proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString()


def _pieces(path: Path, vocab: Any) -> list[tuple[str, float]]:
    """Returns the pieces of the SentencePiece model with their scores, ordered by id."""
    try:
        pieces = [(str(piece), float(score)) for piece, score in vocab]
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: 'vocab' is not a list of pieces and scores") from None
    while pieces and EXTRA_ID.fullmatch(pieces[-1][0]):
        pieces.pop()
    special = tuple(piece for piece, _ in pieces[: len(SPECIAL)])
    if special != SPECIAL:
        raise CheckpointError(
            f"{path}: its first pieces are {', '.join(special)}; T5's are {', '.join(SPECIAL)}"
        )
    return pieces


def _check_added(path: Path, added: Any) -> None:
    """Raises CheckpointError if tokens other than T5's special ones were added to the pieces."""
    tokens = [str(token.get("content")) for token in added or [] if isinstance(token, dict)]
    others = [t for t in tokens if t not in SPECIAL and not EXTRA_ID.fullmatch(t)]
    if others:
        shown = ", ".join(map(repr, others[:SHOWN])) + (", ..." if len(others) > SHOWN else "")
        raise CheckpointError(f"{path}: added tokens {shown}, which are not supported")


def _steps(value: Any) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer, those of sequences included."""
    if not isinstance(value, dict):
        return []
    if value.get("type") != "Sequence":
        return [value]
    parts = value.get("normalizers") or value.get("pretokenizers") or []
    return [step for part in parts for step in _steps(part)]
