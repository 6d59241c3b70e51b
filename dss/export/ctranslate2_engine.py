"""Runs an exported CTranslate2 model as `Predictor` runs a student."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dss.data.vocabulary import Vocabulary
from dss.errors import DssError, missing_package
from dss.evaluation.evaluator import Answer, Engine
from dss.student.config import DecodingConfig

__all__ = ["CTranslate2Engine", "load_engine"]

PIECES = "shared_vocabulary.json"  # the piece of each token id, a list


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTranslate2Engine(Engine):
    """Batched inference with an exported model.

    Attributes:
      translator: the model, a `ctranslate2.Translator`.
      pieces: the piece of each token id.
    """

    translator: Any
    pieces: tuple[str, ...]

    def generate(
        self, inputs: Sequence[Sequence[int]], *, max_length: int, start: int = 0
    ) -> list[str]:
        """See `Engine.generate`; only the start id 0.

        Raises:
          DssError: if the start id is another one.
        """
        if start:
            raise DssError(
                "CTranslate2 decodes from the start id 0, and this task of a student with one "
                f"encoder pass from {start}"
            )
        ids_of = {piece: i for i, piece in enumerate(self.pieces)}
        out = [""] * len(inputs)
        for batch in self._parts(inputs):
            self.progress.began((len(batch), max_length))
            results = self.translator.translate_batch(
                [self._pieces(inputs[i]) for i in batch],
                beam_size=self.decoding.num_beams,
                max_decoding_length=max_length,
            )
            for i, result in zip(batch, results, strict=True):
                out[i] = self.vocabulary.decode([ids_of[p] for p in result.hypotheses[0]])
            self.progress.ended(len(batch))
        return out

    def choose(
        self, inputs: Sequence[Sequence[int]], candidates: Sequence[Sequence[str]]
    ) -> list[Answer]:
        """See `Engine.choose`."""
        out = [Answer("")] * len(inputs)
        for batch in self._parts(inputs):
            self.progress.began(len(batch))
            pairs = [(i, c) for i in batch for c in candidates[i]]
            results = self.translator.score_batch(
                [self._pieces(inputs[i]) for i, _ in pairs],
                [self._pieces(self.vocabulary.encode(c)) for _, c in pairs],
                max_batch_size=self.decoding.batch_size,
            )
            # The log probabilities of a target include that of the EOS that follows it.
            scores = iter([sum(result.log_probs) for result in results])
            for i in batch:
                of_input = np.array([next(scores) for _ in candidates[i]])
                out[i] = Answer.of(candidates[i], of_input, self.temperature)
            self.progress.ended(len(batch))
        return out

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.pieces[i] for i in ids]

    def _parts(self, inputs: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yields the indices of inputs of similar length."""
        order = np.argsort([len(ids) for ids in inputs], kind="stable").tolist()
        size = self.decoding.batch_size
        return (order[start : start + size] for start in range(0, len(order), size))


def load_engine(
    folder: Path, vocabulary: Vocabulary, decoding: DecodingConfig
) -> CTranslate2Engine:
    """Returns the engine of an exported folder.

    Args:
      folder: the folder that `dss.export.export.export` has written.
      vocabulary: the student's vocabulary.
      decoding: decoding options.

    Raises:
      MissingPackageError: if CTranslate2 is not installed.
      DssError: if the folder is no CTranslate2 model with this vocabulary.
    """
    try:
        import ctranslate2
    except ImportError as error:
        raise missing_package("a CTranslate2 model", error.name, "export") from None
    try:
        pieces = tuple(json.loads((folder / PIECES).read_text(encoding="utf-8")))
        translator = ctranslate2.Translator(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        raise DssError(f"{folder}: no CTranslate2 model: {error}") from None
    if len(pieces) < vocabulary.size:
        raise DssError(f"{folder}: has {len(pieces)} tokens, the vocabulary {vocabulary.size}")
    return CTranslate2Engine(
        vocabulary=vocabulary, decoding=decoding, translator=translator, pieces=pieces
    )
