"""Whether an exported student computes what it computes here, on a few tokens."""

import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dss.data.vocabulary import EOS
from dss.errors import UserError
from dss.interop import t5x_checkpoint
from dss.interop.huggingface_export import quiet_transformers
from dss.student.config import T5Config
from dss.student.network import Params, bind, num_parameters

__all__ = [
    "Probes",
    "check_ctranslate2",
    "check_hugging_face",
    "check_t5x",
    "enough_memory",
    "logits",
]

TOLERANCE = 1e-3  # of logits, relative to the largest; of log probabilities
COPIES = 3  # of the parameters, while two programs read them
MEMORY = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/proc/meminfo")


class Probes(NamedTuple):
    """Token ids that both sides read, each row with EOS at its end."""

    inputs: np.ndarray  # [2, 9]
    targets: np.ndarray  # [2, 5]

    @classmethod
    def of(cls, tokens: int) -> "Probes":
        """Returns probes of a vocabulary with some number of tokens; always the same."""
        draw = np.random.default_rng(0).integers
        return cls(
            *(
                np.pad(draw(EOS + 2, tokens, (2, n)), ((0, 0), (0, 1)), constant_values=EOS)
                for n in (8, 4)
            )
        )

    @property
    def decoder_inputs(self) -> np.ndarray:
        """The targets moved by one, [2, 5]; 0 is where the decoder starts."""
        return np.pad(self.targets[:, :-1], ((0, 0), (1, 0)))


def enough_memory(config: T5Config) -> bool:
    """Returns whether this machine has the memory to compare a student, as far as Linux says."""
    limit, used, system = map(Path, MEMORY)
    free = []
    with contextlib.suppress(OSError, ValueError):
        free.append(int(limit.read_text()) - int(used.read_text()))  # "max" is no limit
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in system.read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
    return COPIES * 4 * num_parameters(config) <= min(free, default=0)


def logits(config: T5Config, params: Params, probes: Probes) -> np.ndarray:
    """Returns a student's logits of the probes' targets, [2, 5, V], in float32."""
    config = dataclasses.replace(config, dtype="float32", dropout_rate=0.0)

    @jax.jit
    def compute(params: Params) -> jax.Array:
        inputs = jnp.asarray(probes.inputs, jnp.int32)
        return bind(config, params)(inputs, jnp.asarray(probes.decoder_inputs, jnp.int32))

    with jax.default_matmul_precision("highest"):
        return np.asarray(compute(params))


def _check(theirs: np.ndarray, ours: np.ndarray, scale: float, program: str) -> None:
    difference = float(np.max(np.abs(theirs - ours)))
    if not difference <= TOLERANCE * scale:  # nan is not
        raise UserError(
            f"{program} computes other numbers from the export (off by {difference:.3g}, where "
            f"{TOLERANCE * scale:.3g} would be rounding); nothing was written. This is an error "
            "of dss or of that version; please report it with the versions"
        )


def check_hugging_face(folder: Path, ours: np.ndarray, probes: Probes) -> None:
    """Checks the logits of transformers, where it is installed with PyTorch.

    Args:
      folder: the export.
      ours: what `logits` returns.
      probes: what they are of.

    Raises:
      UserError: it computes others.
    """
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return
    import torch

    with quiet_transformers(), torch.no_grad():
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration.from_pretrained(str(folder)).eval()
        inputs, targets = (torch.from_numpy(ids) for ids in (probes.inputs, probes.decoder_inputs))
        theirs = model(input_ids=inputs, decoder_input_ids=targets).logits.float().numpy()
    _check(theirs, ours, max(1.0, float(np.abs(ours).max())), "transformers")


def check_ctranslate2(folder: Path, ours: np.ndarray, probes: Probes) -> None:
    """Checks the log probabilities of the targets in CTranslate2; see `check_hugging_face`."""
    import ctranslate2

    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    inputs, targets = (
        [tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids]
        for ids in (probes.inputs, probes.targets[:, :-1])
    )
    scored = ctranslate2.Translator(str(folder), device="cpu").score_batch(inputs, targets)
    theirs = np.array([result.log_probs for result in scored])
    log_probs = np.asarray(jax.nn.log_softmax(ours))
    mine = np.take_along_axis(log_probs, probes.targets[..., None], axis=-1)[..., 0]
    _check(theirs, mine, max(1.0, float(np.abs(mine).max())), "CTranslate2")


def check_t5x(checkpoint: Path, ours: np.ndarray, probes: Probes, config: T5Config) -> None:
    """Checks the logits of the parameters that T5X's checkpoint holds; see `check_hugging_face`."""
    params = t5x_checkpoint.load_params(checkpoint, config)
    theirs = logits(config, params, probes)
    _check(theirs, ours, max(1.0, float(np.abs(ours).max())), "T5X")
