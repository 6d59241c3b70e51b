"""Converts a Hugging Face T5 directory to CTranslate2, an inference engine for CPUs and GPUs."""

import importlib.util
from pathlib import Path

from dss.errors import missing_package
from dss.interop.huggingface_export import SPIECE, quiet_transformers
from dss.student.config import T5Config

__all__ = ["PACKAGES", "QUANTIZATIONS", "check_installed", "convert"]

PACKAGES = ("ctranslate2", "transformers", "torch")
QUANTIZATIONS = (  # of weights; the second word is the dtype of other arrays
    "int8",
    "int8_float16",
    "int8_bfloat16",
    "int8_float32",
    "int16",
    "float16",
    "bfloat16",
)
TOKENIZER = (SPIECE, "tokenizer_config.json", "special_tokens_map.json")


def check_installed() -> None:
    """Checks that the converter's packages are installed.

    Raises:
      CheckpointError: if one is missing.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise missing_package("an export to CTranslate2", ", ".join(missing), "export")


def convert(source: Path, folder: Path, config: T5Config, quantization: str | None = None) -> None:
    """Writes a Hugging Face directory as a CTranslate2 model, with its tokenizer.

    Args:
      source: the Hugging Face directory.
      folder: the folder to write, which must not exist.
      config: the student's configuration.
      quantization: one of `QUANTIZATIONS`; None for float32.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, *args, **kwargs):
            model = super().load_model(*args, **kwargs)
            # The converter scales the logits if this is true, which it always is in transformers 5.
            model.config.tie_word_embeddings = config.scaled_logits
            return model

    files = [name for name in TOKENIZER if (source / name).is_file()]
    with quiet_transformers():
        Converter(str(source), copy_files=files).convert(str(folder), quantization=quantization)
