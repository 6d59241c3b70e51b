"""Compares the memory planned by `dss plan` with that of real steps, on a CPU.

    python benchmarks/plan.py [--student small] [--rows NAME ...] [--json FILE]

Each row runs in its own process, which keeps freed memory as `dss train` does: three steps of the
largest batch shape, with lengths as CQA's. Measured is the peak of resident memory above that of
the process with the compiled step. Simulated devices share the process, so the plan of one is
multiplied by their number. Exit status 1 if a plan is off by more than 10%. Linux only.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin
from dss.planning.hardware import simulate_devices

GIB = 2**30
TIMES = 3  # steps per row
CLOSE = 0.1  # maximum relative error of a plan
FULL, ADAFACTOR = "Experiment.remat=full", "runs/adafactor.gin"
# (examples per step, data, model), gin files, flags.
ROWS: dict[str, tuple[tuple[int, int, int], list[str], list[str]]] = {
    "16 examples": ((16, 1, 1), [], []),
    "48 examples": ((48, 1, 1), [], []),
    "remat full, 16": ((16, 1, 1), [], [FULL]),
    "remat full, 48": ((48, 1, 1), [], [FULL]),
    "4 microbatches, 48": ((48, 1, 1), [], ["Experiment.microbatches=4"]),
    "Adafactor, 48": ((48, 1, 1), [ADAFACTOR], []),
    "Adafactor, remat full, 48": ((48, 1, 1), [ADAFACTOR], [FULL]),
    "bfloat16, 48": ((48, 1, 1), [], ["Experiment.dtype=bfloat16"]),
    "2x1 devices, fsdp, Adafactor, 2 microbatches, 16": (
        (16, 2, 1),
        ["layouts/fsdp.gin", ADAFACTOR],
        ["Experiment.microbatches=2"],
    ),
    "4x1 devices, 32": ((32, 4, 1), [], []),
    "8x1 devices, fsdp, 64": ((64, 8, 1), ["layouts/fsdp.gin"], []),
    "4x2 devices, two_d, 64": ((64, 4, 2), ["layouts/two_d.gin"], []),
    "4x2 devices, two_d, Adafactor, remat full, 2 microbatches, 64": (
        (64, 4, 2),
        ["layouts/two_d.gin", ADAFACTOR],
        [FULL, "Experiment.microbatches=2"],
    ),
}


def resident(kind: str) -> int:
    """Returns the process's current (VmRSS) or peak (VmHWM) resident memory, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise KeyError(kind)


def settle_memory() -> None:
    """Releases freed memory to the system and resets the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(student: str, row: str, pipe: Connection) -> None:
    """Sends the planned bytes of one device, and the measured bytes of all."""
    (batch_size, data, model), files, flags = ROWS[row]
    simulate_devices(data * model)
    import jax
    from largest import compile_largest, place

    from dss.parallel.memory import keep_freed_memory
    from dss.planning.plan import STEPS, Planner
    from dss.planning.typical import typical_store

    keep_freed_memory()  # as in the command line
    sizes = [f"BATCH_SIZE={batch_size}", f"MeshConfig.data={data}", f"MeshConfig.model={model}"]
    experiment = parse_gin([f"students/{student}.gin", *files], [*flags, *sizes])
    config = experiment.resolve_student(experiment.student)
    planner = Planner(
        experiment, config, typical_store(config.vocab_size), jax.devices(), STEPS, cpu=True
    )
    planned, _, _ = planner.compile(batch_size)

    compiled, batch = compile_largest(planner, batch_size)
    settle_memory()
    before = resident("VmRSS")
    state, batch = place(planner, batch)
    settle_memory()
    for _ in range(TIMES):
        state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    pipe.send((dataclasses.asdict(planned), planned.total, resident("VmHWM") - before))


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="small", help="name of a file of gin/students/")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="rows to run"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    result = []
    print("| row | planned, GiB | measured, GiB | |\n|---|---|---|---|")
    for row in args.rows:
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(args.student, row, theirs), daemon=True)
        process.start()
        theirs.close()
        memory, of_one, measured = ours.recv()
        process.join()
        devices = math.prod(ROWS[row][0][1:])
        planned = devices * of_one
        off = planned / measured - 1
        figures = {"planned": planned, "measured": measured, "off": round(off, 4)}
        result.append({"student": args.student, "row": row} | figures | {"memory": memory})
        print(f"| {row} | {planned / GIB:.2f} | {measured / GIB:.2f} | {off:+.1%} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(abs(row["off"]) <= CLOSE for row in result) else 1


if __name__ == "__main__":
    sys.exit(main())
