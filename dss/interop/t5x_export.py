"""Writes T5X's Orbax checkpoints: a student's parameters and Adafactor's state."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from dss.errors import UserError
from dss.interop.disassemble import Leaf, Params, disassemble
from dss.interop.t5x_checkpoint import tensor_name
from dss.student.config import T5Config

__all__ = [
    "DATASET",
    "DATASET_FILE",
    "STATISTICS",
    "adafactor_statistics",
    "train_state",
    "write_checkpoint",
]

STATISTICS = ("v", "v_row", "v_col")
DATASET = "dataset"  # the item of a checkpoint that says how far the data were read
DATASET_FILE = "train_ds-000-of-001"  # in it, as T5X names the file of the only process
NONE = np.zeros(1, np.float32)  # what T5X, as optax, keeps where a parameter has no such statistic


def adafactor_statistics(opt_state: Params) -> dict[str, dict[Leaf, Leaf]]:
    """Returns where an optimizer's state has each of Adafactor's statistics of each parameter.

    Args:
      opt_state: of a checkpoint; only its paths are looked at.

    Returns:
      For each name in `STATISTICS`, from a parameter's path to the path in the state. Empty dicts
      where the optimizer is another one.
    """
    found: dict[str, dict[Leaf, Leaf]] = {name: {} for name in STATISTICS}
    for path in opt_state:
        for name in set(STATISTICS).intersection(path):
            found[name][path[path.index(name) + 1 :]] = path
    return found


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree from names with a dot between its levels."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        node = tree
        for level in above:
            node = node.setdefault(level, {})
        node[last] = tensor
    return tree


class _Statistic(Mapping[Leaf, np.ndarray]):
    """One of Adafactor's statistics by parameter, read when asked for."""

    def __init__(self, opt_state: Params, where: dict[Leaf, Leaf]):
        self._opt_state, self._where = opt_state, where

    def __getitem__(self, path: Leaf) -> np.ndarray:
        return self._opt_state[self._where[path]]

    def __iter__(self):
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _fresh(parameter: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the statistics of a parameter before Adafactor's first step."""
    import optax

    state = optax.scale_by_factored_rms().init(parameter)
    return {name: np.asarray(getattr(state, name)) for name in STATISTICS}


def train_state(
    config: T5Config, params: Params, opt_state: Params, step: int
) -> tuple[dict[str, Any], bool]:
    """Returns what T5X calls the state dict of a train state.

    Args:
      config: the student's shape.
      params: its parameters.
      opt_state: its optimizer's state. Adafactor's statistics in optax are those in T5X; of
        another optimizer's state nothing is taken, and the statistics are those of a beginning,
        for T5X trains on no checkpoint that has none.
      step: updates so far.

    Returns:
      The state and whether the statistics are the run's.

    Raises:
      UserError: the logits are scaled and the head is not the embedding, or the reverse.
    """
    if config.scaled_logits != config.tied_embeddings:
        raise UserError(
            "T5X scales the logits where the head is the embedding and nowhere else; "
            "this student differs"
        )
    name = functools.partial(tensor_name, gated=config.gated)
    target = dict(disassemble(config, params, name))
    where = adafactor_statistics(opt_state)
    kept = all(where.values())
    if kept:
        by_name = {
            statistic: dict(disassemble(config, _Statistic(opt_state, leaves), name))
            for statistic, leaves in where.items()
        }
        statistics = {n: {s: by_name[s][n] for s in STATISTICS} for n in target}
    else:
        statistics = {n: _fresh(parameter) for n, parameter in target.items()}
    param_states = {n: found | {"m": NONE} for n, found in statistics.items()}
    state = {"step": np.asarray(step, np.int32), "param_states": _nested(param_states)}
    return {"target": _nested(target), "state": state}, kept


def write_checkpoint(folder: Path, state: dict[str, Any], step: int) -> Path:
    """Writes `checkpoint_<step>` into a folder as T5X does; returns it.

    T5X restores how far the data were read from any checkpoint that it trains from, so the item
    `dataset` is there too.
    """
    path = folder.absolute() / f"checkpoint_{step}"
    numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # nobody changes them
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    data = ocp.JsonCheckpointHandler(DATASET_FILE)
    handlers = ocp.CompositeCheckpointHandler(**{"state": handler, DATASET: data})
    items = {"state": ocp.args.PyTreeSave(state), DATASET: ocp.args.JsonSave({"step": step})}
    with ocp.Checkpointer(handlers) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(**items))
    return path
