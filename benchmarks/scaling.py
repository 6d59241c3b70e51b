"""What a step costs each device, by student and by mesh: read off the compiled programs.

    python benchmarks/scaling.py [--json FILE] [--students base,large,xl,xxl] [--devices 1,8,64]

Every step is planned as `dss plan` does it, on simulated CPU devices, and nothing is run: bytes of
parameters and optimizer (Adafactor), of gradients and activations, and the bytes that a device
sends in a step, every pass of a loop counted. Each device has EXAMPLES examples of CQA's lengths,
layers are computed again backward, and the compute dtype is float32, because the CPU's compiler
turns bfloat16 products into float32 ones.

From these points and the published speeds of a chip and its links (dss/planning/hardware.py) the
second table computes what was not measured: the time of a step on up to 4096 chips, with and
without overlap.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin
from dss.planning.hardware import find_accelerator, simulate_devices
from dss.planning.hlo import Collective, communication_seconds
from dss.planning.plan import Plan, plan

EXAMPLES = 8  # of a device
LAYOUTS = ("data_parallel", "fsdp", "tensor_parallel", "two_d")
MOST = 8  # devices that every layout is compiled for
COMPILED_FOR = "h100"  # any GPU: the CPU's compiler does it, in float32
CHIPS = {"v5p": (1, 8, 64, 4096), "h100": (1, 8, 64)}


def compiled(student: str, layout: str, devices: int) -> Plan:
    """Plans a step; nothing is run."""
    files = [f"students/{student}.gin", f"layouts/{layout}.gin", "runs/adafactor.gin"]
    experiment = parse_gin(files, ["Experiment.remat=full", f"BATCH_SIZE={EXAMPLES * devices}"])
    data = devices // experiment.mesh.model
    mesh = dataclasses.replace(experiment.mesh, data=data)
    return plan(dataclasses.replace(experiment, mesh=mesh), COMPILED_FOR, largest=False)


def sent_bytes(exchanges: tuple[Collective, ...]) -> float:
    """Returns the bytes that a device sends in a step."""
    return sum(exchange.sent for exchange in exchanges)


def on(point: Plan, chips: int) -> tuple[Collective, ...]:
    """Returns what a device sends where `data` is so much longer that the mesh has some chips.

    Exchanges within a row of `model` stay as they are. All others are among more devices: each
    sends (n - 1) / n of an array, a little more than before.
    """
    if chips == 1:
        return ()
    times, found = chips // (point.data * point.model), []
    for exchange in point.exchanges:
        n, stride = len(exchange.group), exchange.group[1] - exchange.group[0]
        if exchange.group[-1] >= point.model:
            group = tuple(range(0, stride * n * times, stride))
            sent = exchange.sent * (n / (n - 1)) * (len(group) - 1) / len(group)
            exchange = dataclasses.replace(exchange, group=group, sent=sent)
        found.append(exchange)
    return tuple(found)


def extrapolate(point: Plan, accelerator: str, chips: int) -> dict:
    """Returns the time of a step on some chips, computed from a point; nothing was measured."""
    chip = find_accelerator(accelerator, chips)
    devices = point.data * point.model
    computing = point.work.useful / devices / (chip.flops["float32"] * chip.mfu)
    sending = communication_seconds(on(point, chips), chip)
    return {
        "accelerator": accelerator,
        "chips": chips,
        "examples": EXAMPLES * chips,
        "computing_seconds": computing,
        "sending_seconds": sending,
        "efficiency": computing / (computing + sending),
        "efficiency_overlapped": computing / max(computing, sending),
    }


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", default="base,large,xl,xxl")
    parser.add_argument("--devices", default="1,4,16,32,64", help="for the first student, FSDP")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    students, devices = args.students.split(","), [int(n) for n in args.devices.split(",")]
    simulate_devices(max([MOST, *devices]))

    print("read off compiled programs, nothing was run: GB and TFLOP of a device and a step")
    print("| student | layout | mesh | parameters | gradients, activations | sent | useful TFLOP |")
    print("|---|---|---|---|---|---|---|")
    points, computed = [], []
    todo = [(student, layout, MOST) for student in students for layout in LAYOUTS]
    todo += [(students[0], "fsdp", n) for n in devices if n != MOST]
    for student, layout, n in todo:
        point = compiled(student, layout, n)
        name = {"name": student, "layout": layout}
        points.append(name | dataclasses.asdict(point))
        figures = (
            point.memory.parameters / 1e9,
            point.memory.temporary / 1e9,
            sent_bytes(point.exchanges) / 1e9,
            point.work.useful / n / 1e12,
        )
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        print(f"| {student} | {layout} | {point.data}x{point.model} | {cells} |", flush=True)
        if n == MOST and layout in ("fsdp", "two_d"):
            for accelerator, sizes in CHIPS.items():
                computed += [name | extrapolate(point, accelerator, chips) for chips in sizes]
    print("\ncomputed from these points and the published speeds of chips and links, not measured")
    print("| student | layout | chips | examples a step | computing | sending | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for row in computed:
        times = (1000 * row[f"{what}_seconds"] for what in ("computing", "sending"))
        print(
            f"| {row['name']} | {row['layout']} | {row['chips']:,} {row['accelerator']} "
            f"| {row['examples']:,} | {' | '.join(f'{time:.0f} ms' for time in times)} "
            f"| {row['efficiency']:.0%} to {row['efficiency_overlapped']:.0%} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"points": points, "computed": computed}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
