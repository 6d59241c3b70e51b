"""Times a training step of dss and of the PyTorch reference on the same examples.

    python benchmarks/train_step.py --student small --dataset cqa --batch 36 --data-root DIR
        --vocab FILE [--steps 5] [--json FILE]
    python benchmarks/train_step.py --student small --random

Sides: dss packed, dss unpacked, and the reference (transformers' T5, each view padded to its
longest sequence, AdamW) in float32 and under bfloat16 autocast; with --sides also dss one pass
(gin/variants/one_encoder_pass.gin). Each side keeps its model in its own process (small, 36
examples: 20 GB in all); sides take turns, and medians exclude the first two steps. `of peak` is the
FLOPs of real tokens, forward and backward, over those of a matrix product in --dtype on the same
device, measured between the steps. On an accelerator: --sides "dss packed" --dtype bfloat16
(without a CUDA build of PyTorch its sides run on the CPU); memory is then the device's.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dss.batches.batches import Batches
from dss.batches.order import paired_order
from dss.batches.store import Ragged, TokenStore, open_store
from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin
from dss.data.datasets import Dataset
from dss.data.vocabulary import load_vocabulary
from dss.errors import DssError
from dss.mixtures.methods import Method, make_mixture
from dss.planning.flops import useful_flops
from dss.planning.hardware import matmul_peak
from dss.planning.typical import typical_store
from dss.student.config import T5Config

ALPHA, DROPOUT, LEARNING_RATE = 0.5, 0.1, 5e-5
WARM = 2  # warm-up steps
RUN = 2000  # steps of the run whose first ones are timed; shapes depend on its length
PACKED, ONE_PASS, UNPACKED = DSS_SIDES = ("dss packed", "dss one pass", "dss unpacked")
REFERENCE = "PyTorch f32"
PEAK = "peak"  # message that requests the peak; others are step numbers
SIDES = (PACKED, UNPACKED, REFERENCE, "PyTorch bf16")
IGNORED = -100  # target that PyTorch's loss ignores


def open_data(
    args: argparse.Namespace, vocab_size: int, side: str = PACKED
) -> tuple[TokenStore, tuple[int, ...] | None]:
    """Returns the tokens of a side and, for one pass, the start ids of its outputs."""
    one_input = side == ONE_PASS
    if args.random:
        return typical_store(vocab_size), (0, vocab_size - 1) if one_input else None
    dataset = Dataset.released(args.dataset, args.data_root)
    mixture = make_mixture(dataset, Method.STEP_BY_STEP, "palm", ALPHA, one_input=one_input)
    vocabulary = load_vocabulary(str(args.vocab))
    store = open_store(mixture, args.split, vocabulary, inputs_length=1024, targets_length=256)
    return store, mixture.start_ids(vocabulary)


def open_batches(args: argparse.Namespace, vocab_size: int, side: str, *, packed: bool) -> Batches:
    store, starts = open_data(args, vocab_size, side)
    order = paired_order(store, args.batch, seed=0)
    return Batches(
        store, order, num_steps=max(RUN, WARM + args.steps), packed=packed, starts=starts
    )


def process_peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


class DssSide:
    """dss, packed or unpacked, on one device."""

    def __init__(self, config: T5Config, args: argparse.Namespace, side: str):
        import jax

        from dss.parallel.config import MeshConfig
        from dss.parallel.memory import keep_freed_memory
        from dss.parallel.mesh import make_mesh, put_batch
        from dss.student.network import init_params
        from dss.training.config import OptimizerConfig
        from dss.training.loss import LossConfig
        from dss.training.optimizer import make_optimizer
        from dss.training.step import make_train_step, place_state, state_shardings

        keep_freed_memory()  # as in the command line
        packed = side != UNPACKED
        self.batches = open_batches(args, config.vocab_size, side, packed=packed)
        mesh_config = MeshConfig()
        mesh = make_mesh(mesh_config, jax.devices()[:1])
        optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE), len(self.batches))
        shardings = state_shardings(config, optimizer, mesh, mesh_config)
        loss = LossConfig(num_tasks=2, rates=(ALPHA, 1 - ALPHA))
        state = place_state(init_params(config, 0), optimizer, shardings)
        step = make_train_step(config, optimizer, loss, mesh=mesh, shardings=shardings)
        self.jax, self.put, self.mesh = jax, put_batch, mesh
        self.compile_seconds, self.programs = 0.0, {}
        self.step_function, self.state, self.steps = step, state, WARM + args.steps

    def step(self, number: int) -> float:
        batch = self.put(self.mesh, self.batches[number])
        shape = batch.shapes
        if shape not in self.programs:
            began = time.perf_counter()
            self.programs[shape] = self.step_function.lower(self.state, batch).compile()
            self.compile_seconds += time.perf_counter() - began
        began = time.perf_counter()
        self.state, metrics = self.programs[shape](self.state, batch)
        self.jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began

    def peak_gb(self) -> float:
        stats = self.jax.devices()[0].memory_stats()  # none on a CPU
        return round(stats["peak_bytes_in_use"] / 1e9, 2) if stats else process_peak_gb()

    def facts(self) -> dict:
        fills = [self.batches[number].fill for number in range(self.steps)]
        encoder, decoder = np.mean(fills, axis=0)
        return {
            "compile_seconds": round(self.compile_seconds, 1),
            "peak_gb": self.peak_gb(),
            "fill": [round(float(encoder), 3), round(float(decoder), 3)],
            "shapes": [dataclasses.asdict(shape) for shape in self.batches.shapes],
        }


class PyTorchSide:
    """The reference: two forward passes, one loss, AdamW."""

    def __init__(self, config: T5Config, args: argparse.Namespace, bf16: bool):
        import torch
        import transformers

        gate = "gated-gelu" if config.gated else "relu"
        shape = transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_heads=config.num_heads,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            feed_forward_proj=gate,
            tie_word_embeddings=config.tied_embeddings,
            dropout_rate=DROPOUT,
            decoder_start_token_id=0,
            use_cache=False,
        )
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformers.T5ForConditionalGeneration(shape).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.torch, self.bf16 = torch, bf16
        self.store, _ = open_data(args, config.vocab_size)
        self.order = paired_order(self.store, args.batch, seed=0)
        self.fills: list[tuple[float, float]] = []

    def padded(self, sequences: Ragged, rows: np.ndarray, value: int):
        lengths = sequences.lengths[rows]
        out = np.full((len(rows), lengths.max()), value, np.int64)
        for i, row in enumerate(rows):
            out[i, : lengths[i]] = sequences[row]
        return self.torch.from_numpy(out).to(self.device), lengths.sum() / out.size

    def step(self, number: int) -> float:
        torch = self.torch
        tasks, rows, _ = self.order(number)
        views, filled = [], []
        for k, task in enumerate(self.store.tasks):
            here = rows[tasks == k]
            inputs, inputs_fill = self.padded(task.inputs, here, 0)
            targets, targets_fill = self.padded(task.targets, here, IGNORED)
            views.append((inputs, targets))
            filled.append((inputs_fill, targets_fill))
        self.fills.append(tuple(np.mean(filled, axis=0)))
        if self.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            losses = [
                self.model(input_ids=inputs, attention_mask=inputs != 0, labels=targets).loss
                for inputs, targets in views
            ]
            loss = ALPHA * losses[0] + (1 - ALPHA) * losses[1]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began

    def facts(self) -> dict:
        encoder, decoder = np.mean(self.fills, axis=0)
        return {
            "compile_seconds": 0.0,
            "peak_gb": process_peak_gb(),
            "fill": [round(float(encoder), 3), round(float(decoder), 3)],
            "shapes": [],
        }


def serve(side: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Serves timed steps over a pipe; for a separate process."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # sides share the device
    config = student(args)
    if side in DSS_SIDES:
        taken = DssSide(config, args, side)
    else:
        taken = PyTorchSide(config, args, side == "PyTorch bf16")
    pipe.send("ready")
    while (told := pipe.recv()) is not None:
        pipe.send(matmul_peak(args.dtype) if told == PEAK else taken.step(told))
    pipe.send(taken.facts())


def student(args: argparse.Namespace) -> T5Config:
    flags = [f"Experiment.dropout_rate={DROPOUT}", f"Experiment.dtype={args.dtype!r}"]
    experiment = parse_gin([f"students/{args.student}.gin"], flags)
    assert experiment.student is not None
    return experiment.resolve_student(experiment.student)


def take_steps(args: argparse.Namespace, config: T5Config) -> tuple[dict[str, dict], float]:
    """Returns the figures of alternating sides, and the median peak.

    A dss side measures the peak after each round, since a machine's speed varies by the minute.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in args.sides:
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(side, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the pipe closes with the process
        pipes[side].recv()
    seconds: dict[str, list[float]] = {side: [] for side in args.sides}
    peaks = []
    measuring = next((pipes[side] for side in args.sides if side in DSS_SIDES), None)
    for number in range(WARM + args.steps):
        for side, pipe in pipes.items():
            pipe.send(number)
            seconds[side].append(pipe.recv())
        if measuring:
            measuring.send(PEAK)
            peaks.append(measuring.recv())
    sides = {}
    for side, pipe in pipes.items():
        pipe.send(None)
        batches = open_batches(args, config.vocab_size, side, packed=False)
        tokens, operations = [], []
        for number in range(WARM, WARM + args.steps):
            inputs, targets, reads = batches.lengths(number)
            tokens.append(int(inputs.sum() + targets.sum()))
            operations.append(useful_flops(config, inputs, targets, reads))
        taken = statistics.median(seconds[side][WARM:])
        sides[side] = {
            "seconds": round(taken, 3),
            "examples_per_second": round(args.batch / taken, 2),
            "tokens_per_second": round(statistics.mean(tokens) / taken, 1),
            "operations_per_second": statistics.mean(operations) / taken,
        } | pipe.recv()
    for process in processes:
        process.join()
    peak = statistics.median(peaks[WARM:] or [matmul_peak(args.dtype)])
    for row in sides.values():
        row["share_of_peak"] = round(row.pop("operations_per_second") / peak, 3)
    return sides, peak


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="small", help="name of a file of gin/students/")
    parser.add_argument("--dataset", default="cqa", help="a released dataset")
    parser.add_argument("--split", default="train", help="train, valid or test")
    parser.add_argument("--batch", type=int, default=36, help="examples per step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two warm-up steps")
    parser.add_argument("--data-root", type=Path, help="the released datasets")
    parser.add_argument("--vocab", type=Path, help="SentencePiece model")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype of dss"
    )
    parser.add_argument("--random", action="store_true", help="random tokens instead of data")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=list(SIDES),
        choices=(*SIDES, ONE_PASS),
        metavar="SIDE",
        help=f"of: {', '.join((*SIDES, ONE_PASS))} (default: all but the last)",
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    if not args.random and (args.data_root is None or args.vocab is None):
        parser.error("give --data-root and --vocab, or --random")
    try:
        config = student(args)
        open_data(args, config.vocab_size)
    except DssError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 2
    try:
        sides, peak = take_steps(args, config)
    except EOFError:
        print("train_step: a side has ended; its output is above", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"sides": sides}
    speed = {side: row["examples_per_second"] for side, row in sides.items()}
    if PACKED in speed and REFERENCE in speed:
        result["ratio_vs_pytorch_f32"] = round(speed[PACKED] / speed[REFERENCE], 3)
    if PACKED in speed and ONE_PASS in speed:
        result["one_pass_vs_packed"] = round(speed[ONE_PASS] / speed[PACKED], 3)
    result |= {
        "student": args.student,
        "dataset": "random" if args.random else args.dataset,
        "batch": args.batch,
        "steps": args.steps,
        "dtype": args.dtype,
        "peak_gflops": round(peak / 1e9, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    print(
        f"{'side':<14} {'s/step':>7} {'ex/s':>6} {'tokens/s':>9} {'fill':>11} {'of peak':>8} ",
        end="",
    )
    print(f"{'GB':>6} {'compile':>8}")
    for side, row in sides.items():
        filled = " ".join(f"{part:.0%}" for part in row["fill"])
        print(
            f"{side:<14} {row['seconds']:>7.2f} {row['examples_per_second']:>6.2f} "
            f"{row['tokens_per_second']:>9.0f} {filled:>11} {row['share_of_peak']:>8.1%} "
            f"{row['peak_gb']:>6.2f} {row['compile_seconds']:>7.1f}s"
        )
    if "ratio_vs_pytorch_f32" in result:
        print(f"{PACKED} is {result['ratio_vs_pytorch_f32']:.2f} times as fast as {REFERENCE}")
    if "one_pass_vs_packed" in result:
        print(f"{ONE_PASS} is {result['one_pass_vs_packed']:.2f} times as fast as {PACKED}")
    print(f"peak {result['peak_gflops']:.0f} GFLOP/s; {result['machine']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
