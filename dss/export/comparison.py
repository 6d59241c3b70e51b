"""Compares an export's logits with the student's on a few tokens."""

import contextlib
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dss.data.vocabulary import EOS
from dss.errors import DssError
from dss.interop import t5x_checkpoint
from dss.interop.huggingface_export import quiet_transformers
from dss.student.config import T5Config
from dss.student.network import Params, bind, num_parameters

__all__ = ["Probes", "check", "enough_memory", "logits"]

TOLERANCE = 1e-3  # of logits or log probabilities, relative to the largest if that is above 1
COPIES = 3  # of the parameters in memory, while two programs load them
CGROUP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/meminfo")  # Linux's memory accounting


class Probes(NamedTuple):
    """Token ids that are given to the student and the export; each row ends with EOS."""

    inputs: np.ndarray  # [2, 9]
    targets: np.ndarray  # [2, 5]

    @classmethod
    def of(cls, tokens: int) -> "Probes":
        """Returns the probes, always the same, for a vocabulary of `tokens` tokens."""
        draw = np.random.default_rng(0).integers
        return cls(
            *(
                np.pad(draw(EOS + 2, tokens, (2, n)), ((0, 0), (0, 1)), constant_values=EOS)
                for n in (8, 4)
            )
        )

    @property
    def decoder_inputs(self) -> np.ndarray:
        """The targets shifted by one position, [2, 5], after the start id 0."""
        return np.pad(self.targets[:, :-1], ((0, 0), (1, 0)))


def enough_memory(config: T5Config) -> bool:
    """Returns whether a student's comparison fits into free memory; True if that is unknown."""
    free = [math.inf]
    if_known = contextlib.suppress(OSError, ValueError, KeyError)
    with if_known:  # of a container; without a limit the file has "max"
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used + _field(CGROUP / "memory.stat", "inactive_file"))
    with if_known:
        free.append(1024 * _field(MEMINFO, "MemAvailable:"))
    return COPIES * 4 * num_parameters(config) <= min(free)


def _field(file: Path, name: str) -> int:
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}[name]


def logits(config: T5Config, params: Params, probes: Probes) -> np.ndarray:
    """Returns a student's logits for the probes' targets, [2, 5, V], in float32."""
    config = dataclasses.replace(config, dtype="float32", dropout_rate=0.0)

    @jax.jit
    def compute(params: Params) -> jax.Array:
        inputs = jnp.asarray(probes.inputs, jnp.int32)
        return bind(config, params)(inputs, jnp.asarray(probes.decoder_inputs, jnp.int32))

    with jax.default_matmul_precision("highest"):
        return np.asarray(compute(params))


def check(to: str, path: Path, ours: np.ndarray, probes: Probes, config: T5Config) -> None:
    """Checks that an export has the student's logits, or log probabilities in CTranslate2.

    Without PyTorch and transformers a Hugging Face export is not checked.

    Args:
      to: the export's format, "hf", "t5x" or "ctranslate2".
      path: the export's folder; for T5X the checkpoint in it.
      ours: the student's logits for the probes, [2, 5, V].
      probes: the token ids.
      config: the student's configuration.

    Raises:
      DssError: if they differ by more than rounding.
    """
    if to == "ctranslate2":
        program, theirs = "CTranslate2", _ctranslate2_log_probs(path, probes)
        log_probs = np.asarray(jax.nn.log_softmax(ours))
        ours = np.take_along_axis(log_probs, probes.targets[..., None], axis=-1)[..., 0]
    elif to == "t5x":
        program, theirs = "dss", logits(config, t5x_checkpoint.load_params(path, config), probes)
    elif all(map(importlib.util.find_spec, ("torch", "transformers"))):
        program, theirs = "transformers", _transformers_logits(path, probes)
    else:
        return
    limit = TOLERANCE * max(1.0, float(np.abs(ours).max()))
    difference = float(np.max(np.abs(theirs - ours)))
    if not difference <= limit:  # also true for NaN
        raise DssError(
            f"{program} computes other logits from the export (they differ by {difference:.3g}, "
            f"more than the tolerance of {limit:.3g}); nothing was written. Please report it with "
            f"the versions of dss and of {program}"
        )


def _transformers_logits(folder: Path, probes: Probes) -> np.ndarray:
    import torch

    with quiet_transformers(), torch.no_grad():
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration.from_pretrained(str(folder)).eval()
        inputs, targets = (torch.from_numpy(ids) for ids in (probes.inputs, probes.decoder_inputs))
        return model(input_ids=inputs, decoder_input_ids=targets).logits.float().numpy()


def _ctranslate2_log_probs(folder: Path, probes: Probes) -> np.ndarray:
    """Returns the log probabilities of the target tokens, [2, 5]."""
    import ctranslate2

    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    inputs, targets = (
        [tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids]
        for ids in (probes.inputs, probes.targets[:, :-1])
    )
    scored = ctranslate2.Translator(str(folder), device="cpu").score_batch(inputs, targets)
    return np.array([result.log_probs for result in scored])
