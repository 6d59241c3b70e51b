"""Times a training step on meshes of simulated devices, beside the time of the plan's model.

    python benchmarks/mesh_step.py [--student small] [--batch 32] [--devices 8] [--json FILE]

The devices of all meshes share this machine and take the same batch, so a layout without cost takes
as long on eight devices as on one. The cost of a layout is narrower matrix products, an update that
every data shard repeats, and collectives, here copies in memory. The last column is one device's
time plus the bytes sent at the bandwidth of a copy, the model of `dss plan --accelerator=cpu`.
Lengths as CQA's, Adafactor, full remat, float32.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin
from dss.parallel.memory import keep_freed_memory
from dss.planning.hardware import find_accelerator, simulate_devices
from dss.planning.hlo import exchanges, sending_seconds

MOST = 8
# Layout, data, model.
MESHES = (
    ("data_parallel", 1, 1),
    ("data_parallel", 2, 1),
    ("data_parallel", 4, 1),
    ("data_parallel", 8, 1),
    ("fsdp", 2, 1),
    ("fsdp", 4, 1),
    ("fsdp", 8, 1),
    ("tensor_parallel", 4, 2),
    ("two_d", 4, 2),
)


def prepare(student: str, batch_size: int, layout: str, data: int, model: int) -> tuple:
    """Returns a function that times a step, and the collectives of a device."""
    import jax
    from largest import compile_largest, place

    from dss.planning.plan import STEPS, Planner
    from dss.planning.typical import typical_store

    files = [f"students/{student}.gin", f"layouts/{layout}.gin", "runs/adafactor.gin"]
    sizes = [f"MeshConfig.data={data}", f"MeshConfig.model={model}"]
    experiment = parse_gin(files, ["Experiment.remat=full", f"BATCH_SIZE={batch_size}", *sizes])
    config = experiment.resolve_student(experiment.student)
    store = typical_store(config.vocab_size)
    planner = Planner(experiment, config, store, jax.devices()[: data * model], STEPS)
    program, batch = compile_largest(planner, batch_size)
    state, placed = place(planner, batch)

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = program(state, placed)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    return step, exchanges(program.as_text(), data * model)


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="small", help="name of a file of gin/students/")
    parser.add_argument("--batch", type=int, default=32, help="examples per step, over all devices")
    parser.add_argument(
        "--devices", type=int, default=MOST, help="maximum number of devices of a mesh"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per mesh")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    simulate_devices(MOST)
    keep_freed_memory()  # as in the command line

    steps: list[Callable[[], float]] = []
    rows: list[dict[str, Any]] = []
    for layout, data, model in MESHES:
        if data * model > args.devices:
            continue
        step, sent = prepare(args.student, args.batch, layout, data, model)
        steps.append(step)
        chip = find_accelerator("cpu", data * model)
        rows.append(
            {
                "layout": layout,
                "mesh": f"{data}x{model}",
                "sent": data * model * sum(exchange.sent for exchange in sent),
                "sending_seconds": sending_seconds(sent, chip),
            }
        )
    seconds = [[step() for step in steps] for _ in range(1 + args.repeats)][1:]
    for row, taken in zip(rows, zip(*seconds, strict=True), strict=True):
        row |= {"seconds": statistics.median(taken), "all": taken}
    alone = rows[0]["seconds"]
    print("| layout | mesh | sent, GB | s/step | of one device's | modelled, s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['layout']} | {row['mesh']} | {row['sent'] / 1e9:.2f} | {row['seconds']:.2f} "
            f"| {row['seconds'] / alone:.2f} | {alone + row['sending_seconds']:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
