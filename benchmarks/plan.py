"""Compares the memory that `dss plan` says a step needs with what a step takes, on a CPU.

    python benchmarks/plan.py [--student small] [--batch 16 48] [--remat none full] [--json FILE]

Each step is taken once in a process of its own, on one device, on tokens in lengths like CQA's, on
the largest of the shapes that batches have. What it takes is the peak of resident memory above that
of the process with the compiled step and nothing else. Linux only.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from dss.cli.options import quiet_tpu
from dss.config import parse_gin

GIB = 2**30


def resident(kind: str) -> int:
    """Returns the process's resident memory now (VmRSS) or at its peak (VmHWM), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise KeyError(kind)


def settle_memory() -> None:
    """Gives freed memory back, and forgets the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(student: str, batch_size: int, remat: str, dtype: str, pipe: Connection) -> None:
    """Sends the planned bytes and the measured ones."""
    quiet_tpu()
    import jax

    from dss.data.batches import Batches, paired_order
    from dss.data.typical import typical_store
    from dss.plan import abstract_batch, plan
    from dss.student.network import init_params
    from dss.train import abstract_state
    from dss.training.loss import LossConfig
    from dss.training.mesh import make_mesh, put_batch
    from dss.training.optimizer import make_optimizer
    from dss.training.step import make_train_step, place_state, state_shardings

    values = {"BATCH_SIZE": batch_size, "MeshConfig.data": 1, "Experiment.remat": remat}
    values["Experiment.dtype"] = dtype
    flags = [f"{name}={value}" for name, value in values.items()]
    experiment = parse_gin([f"students/{student}.gin"], flags)
    planned = plan(experiment, "cpu", largest=False).memory

    config = experiment.settle(experiment.student)
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, experiment.trainer.train_steps)
    shardings = state_shardings(config, optimizer, mesh, experiment.mesh)
    store = typical_store(config.vocab_size)
    batches = Batches(store, paired_order(store, batch_size, 0), num_steps=256)
    wanted = abstract_batch(batches, mesh)
    loss = LossConfig(num_tasks=2, rates=(0.5, 0.5))
    step = make_train_step(config, optimizer, loss, mesh=mesh, shardings=shardings)
    compiled = step.lower(abstract_state(config, optimizer, shardings), wanted).compile()
    shape = {name: array.shape for name, array in wanted.items()}
    number = next(
        i for i in range(256) if {name: a.shape for name, a in batches[i].items()} == shape
    )
    settle_memory()
    before = resident("VmRSS")
    state = place_state(init_params(config, 0, shardings.params), optimizer, shardings)
    batch = put_batch(mesh, batches[number])
    jax.block_until_ready((state, batch))
    settle_memory()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    pipe.send((dataclasses.asdict(planned), planned.total, resident("VmHWM") - before))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="small", help="a file of gin/students")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 48], help="examples a step")
    parser.add_argument("--remat", nargs="+", default=["none", "full"])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    result = []
    print(f"{'':<28} planned  measured, GiB")
    for remat in args.remat:
        for batch in args.batch:
            ours, theirs = context.Pipe()
            values = (args.student, batch, remat, args.dtype, theirs)
            process = context.Process(target=measure, args=values, daemon=True)
            process.start()
            theirs.close()
            memory, planned, measured = ours.recv()
            process.join()
            off = planned / measured - 1
            row = {"student": args.student, "dtype": args.dtype, "remat": remat, "batch": batch}
            row |= {"planned": planned, "measured": measured, "off": round(off, 4)}
            result.append(row | {"memory": memory})
            name = f"{args.student}, remat {remat}, batch {batch}"
            print(f"{name:<28} {planned / GIB:7.2f}  {measured / GIB:7.2f}  {off:+.1%}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(abs(row["off"]) <= 0.1 for row in result) else 1


if __name__ == "__main__":
    sys.exit(main())
