"""Encodes text to token ids and back: SentencePiece (T5, Flan, mT5) and bytes (ByT5)."""

import functools
import hashlib
from typing import Protocol

import sentencepiece
from etils import epath

from dss.errors import DataError
from dss.paths import check_no_pipes

__all__ = [
    "BYTES",
    "EOS",
    "PAD",
    "T5_VOCABULARY",
    "ByteVocabulary",
    "SentencePieceVocabulary",
    "Vocabulary",
    "cut",
    "encode_example",
    "is_cut",
    "load_vocabulary",
    "round_trip",
]

PAD, EOS, UNK = 0, 1, 2
EOS_TEXT = "</s>"
BYTES = "bytes"
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"  # of T5 1.0, 1.1 and Flan


class Vocabulary(Protocol):
    """Interface of vocabularies. Ids 0, 1 and 2 are padding, end of sequence and unknown."""

    size: int  # ids are in [0, size)
    fingerprint: str  # sha256 of the SentencePiece model, or "bytes"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without a final EOS. A `</s>` in the text is the EOS id."""

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids` up to the first EOS, without special ids."""

    def pieces(self, ids: list[int]) -> list[str]:
        """Returns a readable piece for each id, for display."""


def _until_eos(ids: list[int]) -> list[int]:
    ids = [int(i) for i in ids]
    return ids[: ids.index(EOS)] if EOS in ids else ids


class SentencePieceVocabulary:
    """A SentencePiece model with T5's special ids.

    The parts of a text between `</s>` are encoded separately, as in Hugging Face's T5 tokenizer,
    so that an NLI input `premise</s>hypothesis` has one EOS id between its parts.
    """

    def __init__(self, path: epath.Path):
        if not path.is_file():
            raise DataError(
                f"{path}: no such vocabulary file; give a SentencePiece model or 'bytes'"
            )
        check_no_pipes(path)
        self.path = path
        content = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise DataError(
                f"{path}: not a SentencePiece model; give a T5 vocabulary such as spiece.model"
            ) from None
        special = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if special != (PAD, EOS, UNK):
            raise DataError(
                f"{path}: wrong vocabulary: its ids of pad, eos and unk are {special}; T5's are "
                "(0, 1, 2)"
            )
        self.size = self._model.get_piece_size()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary.encode`."""
        first, *rest = self._model.encode(text.split(EOS_TEXT))
        return [*first, *(i for part in rest for i in (EOS, *part))]

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`. Ids above the model's pieces (T5's sentinels) are left out."""
        return self._model.decode([i for i in _until_eos(ids) if UNK < i < self.size])

    def pieces(self, ids: list[int]) -> list[str]:
        """See `Vocabulary.pieces`."""
        return [self._model.id_to_piece(int(i)) if i < self.size else f"<{i}>" for i in ids]


class ByteVocabulary:
    """ByT5's vocabulary: the UTF-8 byte b has the id b + 3 (Xue et al., 2022).

    >>> ByteVocabulary().encode("hi</s>!")
    [107, 108, 1, 36]
    >>> ByteVocabulary().decode([107, 108, 1, 0])
    'hi'
    """

    size = 256 + 3
    fingerprint = BYTES
    path = None

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary.encode`."""
        first, *rest = ([b + 3 for b in part.encode()] for part in text.split(EOS_TEXT))
        return [*first, *(i for part in rest for i in (EOS, *part))]

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`. Bytes that are not valid UTF-8 are left out."""
        return bytes(i - 3 for i in _until_eos(ids) if 3 <= i < self.size).decode(errors="ignore")

    def pieces(self, ids: list[int]) -> list[str]:
        """See `Vocabulary.pieces`. A byte that is not printable ASCII is shown as `<e9>`.

        >>> ByteVocabulary().pieces(ByteVocabulary().encode("a é"))
        ['a', '▁', '<c3>', '<a9>']
        """
        special = {PAD: "<pad>", EOS: EOS_TEXT, UNK: "<unk>", ord(" ") + 3: "▁"}
        return [
            special.get(i) or (chr(i - 3) if 0x20 < i - 3 < 0x7F else f"<{i - 3:02x}>")
            for i in map(int, ids)
        ]


@functools.lru_cache(maxsize=8)
def load_vocabulary(source: str | epath.Path) -> Vocabulary:
    """Returns the vocabulary of the SentencePiece file `source`, or ByT5's for "bytes".

    Raises:
      DataError: if the file does not exist or is not a SentencePiece model with T5's special ids.
    """
    if str(source) == BYTES:
        return ByteVocabulary()
    return SentencePieceVocabulary(epath.Path(source).expanduser())


def round_trip(vocabulary: Vocabulary, text: str) -> str:
    """Returns a text encoded and decoded again: what a student can generate of it.

    T5's vocabulary has no `{` and no newline, and decodes `m²` as `m2`.
    """
    return vocabulary.decode([*vocabulary.encode(text), EOS])


def cut(ids: list[int], length: int) -> list[int]:
    """Returns ids truncated to `length - 1`, with EOS at the end."""
    return [*ids[: length - 1], EOS]


def is_cut(vocabulary: Vocabulary, text: str, length: int) -> bool:
    """Returns whether a text with its EOS has more than `length` tokens."""
    return len(vocabulary.encode(text)) >= length


def encode_example(vocabulary: Vocabulary, text: str, length: int) -> list[int]:
    """Returns a student's input or target: ids truncated to `length - 1`, with EOS at the end."""
    return cut(vocabulary.encode(text), length)
