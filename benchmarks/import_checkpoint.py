"""Memory of an import besides the parameters.

    python benchmarks/import_checkpoint.py [--student base] [--devices 1 8] [--json FILE]

Writes a checkpoint with random parameters in each format. A separate process reads it to one
device, or to several simulated ones with the parameters sharded (FSDP), and saves them as a run's
checkpoint. Memory is the process's anonymous resident memory, sampled every millisecond, minus what
it had before and the parameters. Linux only.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin

FORMATS = ("hf", "t5x")
MB = 10**6
RULES = (("embed", "data"),)


def own_memory() -> int:
    """Returns the process's anonymous resident memory, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise KeyError("RssAnon")


def peak_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """Calls a function; returns its result and the peak memory meanwhile, bytes."""
    peak, done = own_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return function(), peak
    finally:
        done.set()
        thread.join()


def write(student: str, folder: Path) -> None:
    """Writes the checkpoints `folder/hf` and `folder/t5x`."""
    import jax

    from dss.interop import huggingface_export, t5x_export
    from dss.student.config import DecodingConfig
    from dss.student.network import init_params

    config = parse_gin([f"students/{student}.gin"]).student
    leaves = {
        tuple(p.key for p in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(init_params(config, 0))
    }
    (folder / "hf").mkdir()
    huggingface_export.write_model(folder / "hf", config, leaves, DecodingConfig())
    state, _ = t5x_export.train_state(config, leaves, {}, 0)
    t5x_export.write_checkpoint(folder / "t5x", state, 0)


def read(form: str, devices: int, folder: Path, pipe: Connection) -> None:
    """Reads a checkpoint and saves it; sends the bytes besides the parameters, and the seconds."""
    import jax
    import optax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    from dss.interop import huggingface, t5x_checkpoint
    from dss.parallel.config import MeshConfig
    from dss.parallel.memory import return_freed_memory
    from dss.parallel.mesh import make_mesh, param_shardings
    from dss.student.network import abstract_params, logical_axes
    from dss.training.checkpoints import Checkpoints, largest_part
    from dss.training.step import init_state

    return_freed_memory()  # as in the command line
    module: Any = huggingface if form == "hf" else t5x_checkpoint
    source = module.resolve(str(folder / form))
    config = module.read_config(source)
    mesh_config = MeshConfig(rules=RULES)
    shapes = abstract_params(config)
    mesh = make_mesh(mesh_config)
    shardings = param_shardings(mesh, mesh_config, logical_axes(config), shapes)
    gc.collect()
    before, start = own_memory(), time.monotonic()

    def load() -> Any:
        return jax.block_until_ready(module.load_params(source, config, shardings))

    params, peak = peak_of(load)
    seconds = time.monotonic() - start
    size = sum(x.nbytes for leaf in jax.tree.leaves(params) for x in _parts(leaf))
    checkpoints = Checkpoints(
        folder / f"saved-{form}-{devices}", largest=largest_part(params), frozen=True
    )
    gc.collect()

    def save() -> None:
        checkpoints.save(init_state(params, optax.identity()))
        checkpoints.close()

    start = time.monotonic()
    _, peak_saving = peak_of(save)
    saving = time.monotonic() - start
    peaks = [p - before - size for p in (peak, peak_saving)]
    pipe.send((peaks, [round(seconds, 2), round(saving, 2)]))


def _parts(leaf: Any) -> list[Any]:
    return [shard.data for shard in leaf.addressable_shards]


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="base", help="name of a file of gin/students/")
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[1, 8], help="numbers of simulated devices"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    import jax

    from dss.student.network import abstract_params

    config = parse_gin([f"students/{args.student}.gin"]).student
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    size = sum(4 * leaf.size for _, leaf in shapes)
    tensors = [  # a stack has one tensor per layer
        4 * leaf.size // (leaf.shape[0] if "layers" in jax.tree_util.keystr(path) else 1)
        for path, leaf in shapes
    ]
    largest = max(tensors)
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        writer = context.Process(target=write, args=(args.student, folder))
        writer.start()
        writer.join()
        print(f"{args.student}: {size / MB:.0f} MB, largest tensor {largest / MB:.1f} MB")
        print(f"{'format':<8}{'devices':>8}{'':>6}{'besides, MB':>13}{'largest':>9}{'seconds':>9}")
        for form in FORMATS:
            for devices in args.devices:
                ours, theirs = context.Pipe(duplex=False)
                reader = context.Process(target=read, args=(form, devices, folder, theirs))
                reader.start()
                figures = ours.recv()
                reader.join()
                for what, besides, seconds in zip(("read", "save"), *figures, strict=True):
                    row = {"format": form, "devices": devices, "what": what, "besides": besides}
                    rows.append(row | {"largest": largest, "parameters": size, "seconds": seconds})
                    print(
                        f"{form:<8}{devices:>8}{what:>6}{besides / MB:>13.1f}"
                        f"{besides / largest:>8.1f}x{seconds:>9.1f}"
                    )
    if args.json:
        args.json.write_text(json.dumps({"student": args.student, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
