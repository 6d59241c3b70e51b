"""Memory, bytes sent and FLOPs of a step by student and mesh, read off compiled programs.

    python benchmarks/scaling.py [--json FILE] [--students base,large,xl,xxl] [--devices 1,8,64]

Steps are planned as by `dss plan`, on simulated CPU devices; nothing is run. Per device and step:
bytes of parameters, of gradients and activations, and bytes sent in collectives, with every
iteration of a loop counted. Adafactor, full remat, EXAMPLES examples of CQA's lengths per device;
float32, because the CPU's compiler converts bfloat16 products to float32.

The second table extrapolates from these points and the published peak and link bandwidth of chips
(dss/planning/hardware.py): the time of a step on up to 4096 chips, with and without overlap of
computing and sending. It is not measured.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin
from dss.planning.hardware import find_accelerator, simulate_devices
from dss.planning.hlo import Exchange, sending_seconds
from dss.planning.plan import Plan, plan

EXAMPLES = 8  # per device
LAYOUTS = ("data_parallel", "fsdp", "tensor_parallel", "two_d")
MOST = 8  # devices for which every layout is compiled
COMPILED_FOR = "h100"  # any GPU, since the CPU's compiler stands in for it
CHIPS = {"v5p": (1, 8, 64, 4096), "h100": (1, 8, 64)}


def compiled(student: str, layout: str, devices: int) -> Plan:
    """Returns the plan of a step; nothing is run."""
    files = [f"students/{student}.gin", f"layouts/{layout}.gin", "runs/adafactor.gin"]
    experiment = parse_gin(files, ["Experiment.remat=full", f"BATCH_SIZE={EXAMPLES * devices}"])
    data = devices // experiment.mesh.model
    mesh = dataclasses.replace(experiment.mesh, data=data)
    return plan(dataclasses.replace(experiment, mesh=mesh), COMPILED_FOR, largest=False)


def sent_bytes(exchanges: tuple[Exchange, ...]) -> float:
    """Returns the bytes that a device sends in a step."""
    return sum(exchange.sent for exchange in exchanges)


def on(point: Plan, chips: int) -> tuple[Exchange, ...]:
    """Returns what a device sends where `data` is so much longer that the mesh has some chips.

    Collectives within a row of `model` are unchanged. In all others a device sends (n - 1) / n of
    an array, with a larger n.
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
    """Returns the time of a step on a number of chips, extrapolated from a point."""
    chip = find_accelerator(accelerator, chips)
    devices = point.data * point.model
    computing = point.work.useful / devices / (chip.flops["float32"] * chip.mfu)
    sending = sending_seconds(on(point, chips), chip)
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
    parser.add_argument(
        "--students", default="base,large,xl,xxl", help="names of files of gin/students/"
    )
    parser.add_argument(
        "--devices", default="1,4,16,32,64", help="numbers of devices for the first student, FSDP"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    students, devices = args.students.split(","), [int(n) for n in args.devices.split(",")]
    simulate_devices(max([MOST, *devices]))

    print("read off compiled programs, nothing was run: GB and TFLOP per device and step")
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
    print("\nextrapolated with published peaks and link bandwidth, not measured")
    print("| student | layout | chips | examples per step | computing | sending | efficiency |")
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
