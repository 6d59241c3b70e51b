"""Writes T5X's Orbax checkpoints, with a student's parameters and Adafactor's state."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from dss.errors import CheckpointError
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
DATASET = "dataset"  # the checkpoint item with the position in the training data
DATASET_FILE = "train_ds-000-of-001"  # in that item: T5X's file name for a single process
NONE = np.zeros(1, np.float32)  # stored, as in optax, for a statistic that a parameter lacks


def adafactor_statistics(opt_state: Params) -> dict[str, dict[Leaf, Leaf]]:
    """Returns the paths of Adafactor's statistics in an optimizer's state.

    Args:
      opt_state: the optimizer's state in a checkpoint; only its paths are used.

    Returns:
      For each name in `STATISTICS` a mapping from a parameter's path to the path in the state;
      empty for another optimizer.
    """
    paths: dict[str, dict[Leaf, Leaf]] = {name: {} for name in STATISTICS}
    for path in opt_state:
        for name in set(STATISTICS).intersection(path):
            paths[name][path[path.index(name) + 1 :]] = path
    return paths


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested dict from names whose levels are joined by dots."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        node = tree
        for level in parents:
            node = node.setdefault(level, {})
        node[last] = tensor
    return tree


class _Statistic(Mapping[Leaf, np.ndarray]):
    """One of Adafactor's statistics by parameter, read lazily from the optimizer's state."""

    def __init__(self, opt_state: Params, paths: dict[Leaf, Leaf]):
        self._opt_state, self._paths = opt_state, paths

    def __getitem__(self, path: Leaf) -> np.ndarray:
        return self._opt_state[self._paths[path]]

    def __iter__(self):
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _initial_statistics(parameter: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the statistics of a parameter before Adafactor's first step."""
    import optax

    state = optax.scale_by_factored_rms().init(parameter)
    return {name: np.asarray(getattr(state, name)) for name in STATISTICS}


def train_state(
    config: T5Config, params: Params, opt_state: Params, step: int
) -> tuple[dict[str, Any], bool]:
    """Returns the state dict of a T5X train state.

    Args:
      config: the student's configuration.
      params: the student's parameters.
      opt_state: the optimizer's state. Adafactor's statistics in optax are the same in T5X. Another
        optimizer's state is left out and replaced by Adafactor's initial statistics, since T5X
        trains only from a checkpoint with statistics.
      step: number of updates so far.

    Returns:
      The state, and whether the statistics are the run's.

    Raises:
      CheckpointError: if the logits are scaled and the head is not the embedding, or the reverse.
    """
    if config.scaled_logits != config.tied_embeddings:
        raise CheckpointError(
            "T5X's network scales the logits if the embeddings are tied, and only then; this "
            "student cannot be exported to T5X"
        )
    name = functools.partial(tensor_name, gated=config.gated)
    target = dict(disassemble(config, params, name))
    paths = adafactor_statistics(opt_state)
    kept = all(paths.values())
    if kept:
        by_name = {
            statistic: dict(disassemble(config, _Statistic(opt_state, leaves), name))
            for statistic, leaves in paths.items()
        }
        statistics = {n: {s: by_name[s][n] for s in STATISTICS} for n in target}
    else:
        statistics = {n: _initial_statistics(parameter) for n, parameter in target.items()}
    param_states = {n: arrays | {"m": NONE} for n, arrays in statistics.items()}
    state = {"step": np.asarray(step, np.int32), "param_states": _nested(param_states)}
    return {"target": _nested(target), "state": state}, kept


def write_checkpoint(folder: Path, state: dict[str, Any], step: int) -> Path:
    """Writes `checkpoint_<step>` into a folder in T5X's format; returns its path.

    T5X restores the position in the training data from every checkpoint that it trains from, so the
    item `dataset` is written too.
    """
    path = folder.absolute() / f"checkpoint_{step}"
    numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # they are not modified
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    data = ocp.JsonCheckpointHandler(DATASET_FILE)
    handlers = ocp.CompositeCheckpointHandler(**{"state": handler, DATASET: data})
    items = {"state": ocp.args.PyTreeSave(state), DATASET: ocp.args.JsonSave({"step": step})}
    with ocp.Checkpointer(handlers) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(**items))
    return path
