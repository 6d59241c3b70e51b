"""Converts a Hugging Face T5 directory for CTranslate2, an inference engine for CPUs and GPUs."""

import importlib.util
from pathlib import Path

from dss.errors import missing_package
from dss.interop.huggingface_export import SPIECE, quiet_transformers
from dss.student.config import T5Config

__all__ = ["NEEDS", "check_installed", "convert"]

NEEDS = ("ctranslate2", "transformers", "torch")
TOKENIZER = (SPIECE, "tokenizer_config.json", "special_tokens_map.json")


def check_installed() -> None:
    """Raises the user's error where the converter is not installed."""
    missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise missing_package("--to ctranslate2", ", ".join(missing), "export")


def convert(source: Path, folder: Path, config: T5Config) -> None:
    """Writes CTranslate2's model of a Hugging Face directory, in float32, with its tokenizer.

    Args:
      source: the directory.
      folder: where; must not be there.
      config: the student's shape.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, *args, **kwargs):
            model = super().load_model(*args, **kwargs)
            # The converter scales the logits if this is true, and transformers 5 says it always is.
            model.config.tie_word_embeddings = config.scaled_logits
            return model

    files = [name for name in TOKENIZER if (source / name).is_file()]
    with quiet_transformers():
        Converter(str(source), copy_files=files).convert(str(folder))
