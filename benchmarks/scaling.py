"""What a step costs each device, by student and by mesh: read off the compiled programs.

    python benchmarks/scaling.py [--json FILE] [--students base,large,xl,xxl] [--devices 1,8,64]

Every step is compiled, for abstract arguments on simulated CPU devices, and nothing is run: bytes
of parameters and optimizer (Adafactor), of gradients and activations, and the bytes that a device
exchanges in a step, every pass of a loop counted. Each device has EXAMPLES examples of CQA's
lengths, layers are computed again backward, and the compute dtype is float32, because the CPU's
compiler turns bfloat16 products into float32 ones.

From these points and the stated speeds of a chip and its links the second table computes what was
not measured: the time of a step on up to 4096 chips, with and without overlap.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from pathlib import Path

import jax

from dss.config import parse_gin
from dss.data.batches import Batches, paired_order
from dss.data.typical import typical_store
from dss.experiment import Experiment
from dss.plan import abstract_batch, device_bytes
from dss.student.flops import useful_flops
from dss.student.network import num_parameters
from dss.train import abstract_state
from dss.training.loss import LossConfig
from dss.training.mesh import make_mesh
from dss.training.optimizer import make_optimizer
from dss.training.step import make_train_step, state_shardings

EXAMPLES = 8  # of a device
LAYOUTS = ("data_parallel", "fsdp", "tensor_parallel", "two_d")
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
# cloud.google.com/tpu/docs/v5p: bfloat16 peak of a chip, and 1,200 GB/s of its links both ways.
V5P_FLOPS, V5P_LINKS, MFU = 459e12, 600e9, 0.4
CHIPS = (8, 64, 512, 4096)


def exchanged_bytes(text: str, devices: int) -> dict[str, float]:
    """Returns the bytes a device sends in a program, by kind of exchange, along rings.

    Args:
      text: the compiled program of one device.
      devices: exchanges whose groups are not written out are among all of them.
    """
    computations = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    )
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)[1]

    @functools.cache
    def of(name: str) -> tuple[tuple[str, float], ...]:
        sums: dict[str, float] = {}
        for line in computations[name].splitlines():
            found = re.search(
                r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", line
            )
            if found:
                size = sum(
                    WIDTHS[kind] * math.prod(int(n) for n in dims.split(",") if n)
                    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1])
                )
                group = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", line)
                n = devices
                if group:
                    n = int(group[1]) if group[1] else group[2].count(",") + 1
                # An all-reduce is a reduce-scatter and an all-gather; a reduce-scatter's result is
                # a part.
                factor = {"all-reduce": 2, "reduce-scatter": n}.get(found[2], 1) * (n - 1) / n
                sums[found[2]] = sums.get(found[2], 0) + factor * size
            loop = re.search(r" while\(.*body=%?([\w.-]+)", line)
            called = re.search(r" (?:call|fusion)\(.*(?:to_apply|calls)=%?([\w.-]+)", line)
            if loop or called:
                trips = re.search(r"known_trip_count[^\d]*(\d+)", line) if loop else None
                times = int(trips[1]) if trips else 1
                for kind, size in of((loop or called)[1]):
                    sums[kind] = sums.get(kind, 0) + times * size
        return tuple(sums.items())

    return dict(of(entry))


def measure(student: str, layout: str, devices: int) -> dict:
    """Compiles a step; returns what a device needs and exchanges."""
    files = [f"students/{student}.gin", f"layouts/{layout}.gin", "runs/adafactor.gin"]
    experiment: Experiment = parse_gin(files)
    experiment = dataclasses.replace(experiment, remat="full", batch_size=EXAMPLES * devices)
    config = experiment.settle(experiment.student)
    mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
    optimizer = make_optimizer(experiment.optimizer, 1000)
    shardings = state_shardings(config, optimizer, mesh, experiment.mesh)
    state = abstract_state(config, optimizer, shardings)
    store = typical_store(config.vocab_size)
    batches = Batches(
        store,
        paired_order(store, experiment.batch_size, seed=0),
        num_steps=32,
        groups=mesh.shape["data"],
    )
    loss = LossConfig(num_tasks=2, rates=(0.5, 0.5))
    step = make_train_step(config, optimizer, loss, mesh=mesh, shardings=shardings)
    began = time.perf_counter()
    compiled = step.lower(state, abstract_batch(batches, mesh)).compile(
        compiler_options={"xla_backend_optimization_level": 0}
    )
    seconds = time.perf_counter() - began
    inputs, targets = (
        [getattr(task, side).lengths for task in store.tasks] for side in ("inputs", "targets")
    )
    flops = sum(useful_flops(config, i, t) for i, t in zip(inputs, targets, strict=True))
    return {
        "student": student,
        "layout": layout,
        "data": mesh.shape["data"],
        "model": mesh.shape["model"],
        "parameters": num_parameters(config),
        "parameter_bytes": device_bytes(state.params),
        "optimizer_bytes": device_bytes(state.opt_state),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "exchanged_bytes": exchanged_bytes(compiled.as_text(), devices),
        "flops": float(flops) / len(store) * EXAMPLES,  # useful, of a device
        "compile_seconds": round(seconds, 1),
    }


def extrapolate(point: dict, chips: int) -> dict:
    """Returns the time of a step on v5p chips, computed from a point; nothing of it was measured.

    A device of `chips` exchanges what one of the point does, as along a ring the part of a gathered
    array that a device sends hardly grows with the number of devices: (n - 1) / n.
    """
    n = point["data"] * point["model"]
    compute = point["flops"] / (V5P_FLOPS * MFU)
    sent = sum(point["exchanged_bytes"].values())
    exchange = sent * ((chips - 1) / chips) / ((n - 1) / n) / V5P_LINKS
    return {
        "student": point["student"],
        "layout": point["layout"],
        "chips": chips,
        "examples": EXAMPLES * chips,
        "compute_seconds": compute,
        "exchange_seconds": exchange,
        "efficiency": compute / (compute + exchange),
        "efficiency_overlapped": compute / max(compute, exchange),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", default="base,large,xl,xxl")
    parser.add_argument("--devices", default="1,4,8,16,32,64", help="for the first student, FSDP")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    students, devices = args.students.split(","), [int(n) for n in args.devices.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max([8, *devices]))

    print(
        f"{'student':8} {'layout':16} {'mesh':>6}  {'params':>7} {'optim.':>7} {'temp.':>7} GB"
        f"  {'exchanged':>9} GB  {'TFLOP':>6}  compile"
    )
    points = []
    todo = [(student, layout, 8) for student in students for layout in LAYOUTS]
    todo += [(students[0], "fsdp", n) for n in devices if n != 8]
    for student, layout, n in todo:
        point = measure(student, layout, n)
        points.append(point)
        sizes = [point[f"{name}_bytes"] / 1e9 for name in ("parameter", "optimizer", "temporary")]
        sent = sum(point["exchanged_bytes"].values()) / 1e9
        mesh = f"{point['data']}x{point['model']}"
        print(
            f"{student:8} {layout:16} {mesh:>6}  "
            + " ".join(f"{s:7.2f}" for s in sizes)
            + f"     {sent:9.2f}     {point['flops'] / 1e12:6.2f}"
            + f"  {point['compile_seconds']:.0f} s",
            flush=True,
        )
    print(f"\ncomputed, not measured: v5p, {MFU:.0%} of the peak, {EXAMPLES} examples a chip")
    print(
        f"{'student':8} {'layout':16} {'chips':>5} {'examples':>8}  compute  exchange  efficiency"
    )
    computed = [
        extrapolate(point, chips)
        for point in points
        if point["data"] * point["model"] == 8 and point["layout"] in ("fsdp", "two_d")
        for chips in CHIPS
    ]
    for row in computed:
        print(
            f"{row['student']:8} {row['layout']:16} {row['chips']:5} {row['examples']:8}  "
            f"{row['compute_seconds'] * 1e3:5.0f} ms  {row['exchange_seconds'] * 1e3:5.0f} ms  "
            f"{row['efficiency']:.0%} to {row['efficiency_overlapped']:.0%}"
        )
    if args.json:
        args.json.write_text(json.dumps({"points": points, "computed": computed}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
