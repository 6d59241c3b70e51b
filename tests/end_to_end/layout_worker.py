"""Trains 20 steps of real CQA, in bytes, on some layouts, as one of one or more processes.

    python -m tests.end_to_end.layout_worker OUT DEVICES SELECTION NAME:DATA:MODEL[:fsdp]...

For each layout and optimizer it writes OUT/NAME-OPTIMIZER.npz, the losses and the final state, and
a checkpoint into OUT/NAME-OPTIMIZER, unless they are there. Then it restores checkpoints of OUT
onto each layout, and compares them bit by bit. If SELECTION is `all`, that is every optimizer on
every layout. If it is `some`, it is one device with each optimizer, the layouts of SOME with one,
and every one of their checkpoints onto each of these layouts.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np

from dss.batches.batches import Batches
from dss.batches.order import paired_order
from dss.batches.store import TokenStore, open_store
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.mixtures.methods import Method, make_mixture
from dss.parallel.config import DEFAULT_RULES, MeshConfig
from dss.parallel.mesh import fetch, make_mesh, put_batch
from dss.parallel.processes import is_leader, join_processes, wait_for_all
from dss.runs.train import abstract_state
from dss.student.config import T5Config
from dss.student.network import init_params
from dss.training.checkpoints import Checkpoints
from dss.training.config import OptimizerConfig
from dss.training.loss import LossConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import (
    TrainState,
    make_train_step,
    place_state,
    state_shardings,
)

STEPS, BATCH, MICROBATCHES, ALPHA = 20, 8, 2, 0.3
OPTIMIZERS = {"adamw": 5e-5, "adafactor": 1e-3}  # learning rates: the reference's, T5X's
ONE = "one"  # the layout of one device
SOME = {"4x2": "adamw", "fsdp": "adafactor", "two_fsdp": "adamw"}  # layouts of the gate
# Adafactor factors the second moments of matrices of at least 128 x 128.
STUDENT = T5Config(
    vocab_size=384,
    d_model=128,
    d_kv=16,
    d_ff=256,
    num_heads=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.0,
)


def mesh_config(text: str) -> tuple[str, MeshConfig]:
    """Returns the name and the mesh of an argument."""
    name, data, model, *fsdp = text.split(":")
    rules = (("embed", "data"), *DEFAULT_RULES) if fsdp else DEFAULT_RULES
    return name, MeshConfig(data=int(data), model=int(model), rules=rules)


def run(store: TokenStore, config: MeshConfig, optimizer: str) -> tuple[np.ndarray, TrainState]:
    """Returns the losses, [STEPS, 3] of both tasks and the gradient's norm, and the last state."""
    mesh = make_mesh(config, jax.devices()[: config.data * config.model])
    update = make_optimizer(
        OptimizerConfig(name=optimizer, learning_rate=OPTIMIZERS[optimizer]), STEPS
    )
    shardings = state_shardings(STUDENT, update, mesh, config)
    loss = LossConfig(num_tasks=2, rates=(ALPHA, 1 - ALPHA))
    step = make_train_step(
        STUDENT, update, loss, mesh=mesh, shardings=shardings, microbatches=MICROBATCHES
    )
    batches = Batches(
        store,
        paired_order(store, BATCH, seed=0),
        num_steps=STEPS,
        groups=config.data * MICROBATCHES,
    )
    batches.shapes = batches.shapes[-1:]  # the largest does for all, and is compiled once
    state = place_state(init_params(STUDENT, 0, shardings.params), update, shardings)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, put_batch(mesh, batches[i]))
        losses.append([*np.asarray(metrics["task_loss"]), float(metrics["grad_norm"])])
    return np.array(losses), state


def flat(tree) -> dict[str, np.ndarray]:
    """Returns a tree's arrays, whole, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): fetch(leaf) for path, leaf in leaves}


def restore(folder: Path, config: MeshConfig, optimizer: str) -> None:
    """Restores a checkpoint onto a layout and compares it with what was trained."""
    mesh = make_mesh(config, jax.devices()[: config.data * config.model])
    update = make_optimizer(OptimizerConfig(name=optimizer), STEPS)
    shardings = state_shardings(STUDENT, update, mesh, config)
    checkpoints = Checkpoints(folder, read_only=True)
    state = checkpoints.restore(STEPS, abstract_state(STUDENT, update, shardings))
    checkpoints.close()
    with np.load(folder.with_suffix(".npz")) as wanted:
        found = flat(state)
        assert sorted(found) == sorted(set(wanted) - {"losses"})
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name])


def is_trained(layout: str, optimizer: str) -> bool:
    """Returns whether a layout is trained with an optimizer where only some pairs are."""
    return layout == ONE or SOME.get(layout) == optimizer


def main(out: Path, selection: str, layouts: list[str]) -> None:
    """Trains, saves, restores."""
    shared = Path(os.environ["DSS_SHARED"])
    cqa = Dataset.released("cqa", shared / "data" / "datasets")
    mixture = make_mixture(cqa, Method.STEP_BY_STEP, "palm", ALPHA)
    vocabulary = load_vocabulary("bytes")
    store = open_store(mixture, "train", vocabulary, inputs_length=128, targets_length=64)
    meshes = dict(map(mesh_config, layouts))
    for name, config in meshes.items():
        for optimizer in OPTIMIZERS:
            if (out / f"{name}-{optimizer}.npz").exists():
                continue
            if selection != "all" and not is_trained(name, optimizer):
                continue
            losses, state = run(store, config, optimizer)
            arrays = flat(state)
            if is_leader():
                np.savez(out / f"{name}-{optimizer}.npz", losses=losses, **arrays)
            checkpoints = Checkpoints(out / f"{name}-{optimizer}")
            checkpoints.save(state)
            checkpoints.close()
    wait_for_all("all layouts are trained")
    restored = 0
    for file in sorted(out.glob("*.npz")):
        for name, config in meshes.items():
            if selection == "all" or name in (ONE, *SOME):
                restore(file.with_suffix(""), config, file.stem.rpartition("-")[2])
                restored += 1
    print(f"restored {restored} bit by bit")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    join_processes()
    main(Path(sys.argv[1]), sys.argv[3], sys.argv[4:])
