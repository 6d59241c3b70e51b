"""Compares every step of a recorded run of the reference implementation with dss.

    python benchmarks/fidelity.py --reference DIR --data-root DIR --vocab FILE
        [--packed | --unpacked] [--devices 8] [--microbatches 2]

The reference DIR has `trajectory.json` (dataset, label type, alpha, learning rate, order of the
examples, logged values) and `model/`, the initial Hugging Face T5. Prints the largest relative
error of each logged value over the steps, of the final decoder norm if it was recorded, and the
number of greedy outputs that equal the recorded ones. Exit status 1 above 1e-4.

A gradient norm recorded on a CPU is PyTorch's, which adds the squares of a tensor in eight float32
sums. Most of the head's million gradients are too small to change such a sum, so it is up to 1.4e-4
too low. Two norms are therefore compared with the recorded one: the train step's, and that of the
same gradients in PyTorch's order of summation. One of them must agree at every step.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dss.batches.batches import Batches, iterate
from dss.batches.order import Order, views
from dss.batches.store import TokenStore, tokenize
from dss.cli.options import quiet_tpu
from dss.data.datasets import Dataset
from dss.data.vocabulary import EOS, Vocabulary, load_vocabulary
from dss.errors import DssError
from dss.interop import huggingface
from dss.mixtures.tasks import EXPLAIN, PREDICT, TextRow
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh, put_batch
from dss.student.config import T5Config
from dss.student.decoding import generate
from dss.training.config import OptimizerConfig
from dss.training.loss import LossConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import TrainState, make_train_step, place_state, state_shardings

TOLERANCE = 1e-4
TEACHER = "palm"
INPUTS_LENGTH, TARGETS_LENGTH = 1024, 256  # as in the reference
NORMS = ("grad_norm, exact", "grad_norm, PyTorch")  # orders of summation
LOSSES = ("label_loss", "rationale_loss", "loss")


def reference_store(trajectory: dict, vocabulary: Vocabulary, root: Path | None) -> TokenStore:
    """Returns all rows of the reference's split in file order, empty ones included."""
    dataset = Dataset.released(trajectory["dataset"], root)
    examples = dataset.source.examples(trajectory["split"])
    outputs = dataset.source.outputs(trajectory["split"], TEACHER)
    if trajectory["label_type"] == "llm":
        labels = [output.label for output in outputs]
    else:
        labels = [example.label for example in examples]
    return tokenize(
        [
            [TextRow(e.id, PREDICT + e.input, l) for e, l in zip(examples, labels, strict=True)],
            [
                TextRow(o.id, EXPLAIN + e.input, o.rationale)
                for e, o in zip(examples, outputs, strict=False)
            ],
        ],
        vocabulary,
        inputs_length=INPUTS_LENGTH,
        targets_length=TARGETS_LENGTH,
    )


def keep_gradients() -> optax.GradientTransformation:
    """Returns the identity transformation; its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jax.numpy.zeros_like, params),
        lambda gradients, state, params=None: (gradients, gradients),
    )


def pytorch_norm(config: T5Config, gradients: Any) -> float:
    """Returns the global norm with the rounding of PyTorch's sums, tensor by tensor."""

    def square(array: np.ndarray) -> float:
        flat = np.square(array.ravel())
        lanes = np.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
        return float(np.add.reduce(lanes, axis=0).sum())  # sequential, in float32

    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        names = tuple(p.key for p in path)
        stacked = "layers" in names
        _, transposed = huggingface.tensor_name(names, 0 if stacked else None, gated=config.gated)
        for array in np.asarray(leaf) if stacked else [np.asarray(leaf)]:
            total += square(array.T if transposed else array)
    return total**0.5


def replay(
    trajectory: dict, config: T5Config, params: Any, store: TokenStore, args: argparse.Namespace
) -> tuple[list[dict[str, float]], TrainState]:
    """Returns the logged values of each step, and the last state."""
    mesh_config = MeshConfig()
    mesh = make_mesh(mesh_config)
    adam = trajectory["adam"]
    optimizer = optax.chain(
        keep_gradients(),
        make_optimizer(
            OptimizerConfig(
                learning_rate=trajectory["lr"],
                b1=adam["b1"],
                b2=adam["b2"],
                eps=adam["eps"],
                weight_decay=adam["weight_decay"],
                clip_global_norm=trajectory["clip_global_norm"],
            ),
            trajectory["max_steps"],
        ),
    )
    alpha = trajectory["alpha"]
    shardings = state_shardings(config, optimizer, mesh, mesh_config)
    step = make_train_step(
        config,
        optimizer,
        LossConfig(num_tasks=2, rates=(alpha, 1 - alpha)),
        mesh=mesh,
        shardings=shardings,
        microbatches=args.microbatches,
    )
    order = [np.array(rows) for rows in trajectory["order"]]
    batches = Batches(
        store,
        Order(lambda s: views(store, order[s]), most=2 * max(map(len, order))),
        num_steps=len(order),
        packed=args.packed,
        groups=args.devices * args.microbatches,
    )
    state = place_state(params, optimizer, shardings)
    log = []
    for batch in iterate(batches):
        state, metrics = step(state, put_batch(mesh, batch))
        losses = [*np.asarray(metrics["task_loss"]).tolist(), float(metrics["loss"])]
        values = dict(zip(LOSSES, losses, strict=True))
        norms = float(metrics["grad_norm"]), pytorch_norm(config, state.opt_state[0])
        values |= zip(NORMS, norms, strict=True)
        log.append(values)
    return log, state


def greedy_agrees(recorded: dict, config: T5Config, params, store: TokenStore) -> tuple[int, int]:
    """Returns the number of greedy outputs that equal the recorded ones, and their total."""
    wanted = [row[1 : row.index(EOS) + 1] if EOS in row else row[1:] for row in recorded["tokens"]]
    inputs = [store.tasks[0].inputs[i] for i in recorded["indices"]]
    table = np.zeros((len(inputs), max(map(len, inputs))), np.int32)
    for i, row in enumerate(inputs):
        table[i, : len(row)] = row
    tokens, _ = generate(config, params, table, max_length=max(map(len, wanted)))
    same = [
        got[: len(row)].tolist() == row
        for got, row in zip(np.asarray(tokens), wanted, strict=False)
    ]
    return sum(same), len(same)


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, help="folder of a recorded run")
    parser.add_argument("--data-root", type=Path, required=True, help="the released datasets")
    parser.add_argument("--vocab", type=Path, required=True, help="SentencePiece model")
    packing = parser.add_mutually_exclusive_group()
    packing.add_argument("--packed", action="store_true", default=True, help="the default")
    packing.add_argument(
        "--unpacked", dest="packed", action="store_false", help="one sequence per row"
    )
    parser.add_argument("--devices", type=int, default=1, help="number of simulated CPU devices")
    parser.add_argument("--microbatches", type=int, default=1, help="microbatches per step")
    parser.add_argument("--json", type=Path, help="file to write the errors to")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    try:
        trajectory = json.loads((args.reference / "trajectory.json").read_text())
        model = args.reference / "model"
        config = dataclasses.replace(
            huggingface.read_config(model), dropout_rate=trajectory["dropout"]
        )
        params = huggingface.load_params(model, config)
        store = reference_store(trajectory, load_vocabulary(args.vocab), args.data_root)
    except (DssError, OSError, ValueError, KeyError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    log, state = replay(trajectory, config, params, store, args)

    recorded = trajectory["log"]
    errors = {}
    for name in log[0]:
        got = np.array([values[name] for values in log])
        wanted = np.array([values[name.split(",")[0]] for values in recorded])
        errors[name] = float(np.abs(got / wanted - 1).max())  # NaN if any is
    exact, pytorch = (errors.pop(name) for name in NORMS)
    errors["grad_norm"] = min(exact, pytorch)
    norm = args.reference / "final_decoder_norm.npy"
    if norm.is_file():
        wanted = np.load(norm)
        got = np.asarray(state.params["decoder"]["norm"])
        errors["final_decoder_norm"] = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    same, total = greedy_agrees(trajectory["final_greedy"], config, state.params, store)

    print(
        f"{trajectory['dataset']}, {len(log)} steps of {trajectory['batch']} examples, "
        f"{'packed' if args.packed else 'unpacked'}, {args.devices} device(s), "
        f"{args.microbatches} microbatch(es): largest relative error"
    )
    for name, error in errors.items():
        verdict = "ok" if error <= TOLERANCE else f"above {TOLERANCE}"
        print(f"  {name:<20} {error:8.1e}  {verdict}")
    print(f"  (grad_norm: {exact:.1e} by the train step's sum, {pytorch:.1e} by PyTorch's)")
    print(f"  greedy outputs equal {same} of {total}")
    if args.json:
        args.json.write_text(json.dumps(errors | {"greedy_equal": same, "greedy": total}))
    close = all(error <= TOLERANCE for error in errors.values())
    return int(not close or same != total)


if __name__ == "__main__":
    sys.exit(main())
