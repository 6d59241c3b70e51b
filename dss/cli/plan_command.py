"""`dss plan`: estimates the memory and time of a run without running it."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dss.cli.checks import check_output
from dss.cli.messages import in_flags
from dss.cli.options import add_gin_options, gin_folders, quiet_tpu
from dss.errors import DssError
from dss.paths import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dss.planning.hardware import Accelerator
    from dss.planning.hlo import Collective
    from dss.planning.plan import Plan

__all__ = ["add_arguments", "run"]

GIB = 2**30
MAX_TOKENS = 100_000  # maximum mean length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_gin_options(parser)
    parser.add_argument("--student", metavar="NAME", help="same as --gin_file=students/NAME.gin")
    parser.add_argument(
        "--mesh",
        metavar="data=N,model=N",
        help="mesh of the run (default: MeshConfig's)",
    )
    parser.add_argument(
        "--accelerator",
        default="cpu",
        metavar="NAME",
        help="v4, v5p (one device per chip), h100, h200, or cpu: this machine (default)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="FRACTION",
        help="assumed model FLOPs utilization (default: the accelerator's)",
    )
    parser.add_argument(
        "--tokens",
        metavar="INPUT,TARGET",
        help="mean input and target length (default: the data's, or CQA's without data)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="compile once: do not search the largest batch"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plan to FILE")
    parser.epilog = "dss plan --student=xl --mesh=data=4,model=2 --accelerator=v5p"


def run(args: argparse.Namespace) -> int:
    """Prints the plan of the run; returns 1 if it does not fit."""
    mesh = {} if args.mesh is None else _mesh(args.mesh)
    tokens = None if args.tokens is None else _mean_lengths(args.tokens)
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise DssError(f"--mfu={args.mfu}: must be a fraction of the peak, above 0 and at most 1")
    if args.json is not None:
        check_output("--json", args.json)
    if args.student:
        args.gin_file.insert(0, f"students/{args.student}.gin")
    search = gin_folders(args)

    from dss.config.gin_files import parse_gin

    flags = [*args.gin, *(f"MeshConfig.{axis}={size}" for axis, size in mesh.items())]
    experiment = parse_gin(args.gin_file, flags, search)
    if experiment.mesh.data == -1:  # all devices; their number is unknown, so one is planned
        one = dataclasses.replace(experiment.mesh, data=1)
        experiment = dataclasses.replace(experiment, mesh=one)

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA also raises the errors that it logs
    quiet_tpu()
    from dss.planning.hardware import simulate_devices
    from dss.planning.plan import plan

    simulate_devices(experiment.mesh.data * experiment.mesh.model)

    result = plan(
        experiment,
        args.accelerator,
        mfu=args.mfu,
        tokens=tokens,
        largest=not args.quick,
        report=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
    )
    _print(result, experiment, args.options)
    if args.json:
        _write(result, args.json)
    return 0 if result.fits else 1


def _mesh(text: str) -> dict[str, int]:
    """Parses `data=N,model=N`; an axis that is left out has size 1."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        known = axis in ("data", "model") and axis not in sizes
        if not known or not size.isdecimal() or int(size) < 1:
            raise DssError(f"--mesh={text}: give it as data=N,model=N, such as data=8,model=4")
        sizes[axis] = int(size)
    return {"data": 1, "model": 1} | sizes


def _mean_lengths(text: str) -> tuple[float, float]:
    """Parses `INPUT,TARGET`."""
    try:
        inputs, targets = map(float, text.split(","))
    except ValueError:
        inputs = targets = 0.0
    if not all(2 <= mean <= MAX_TOKENS for mean in (inputs, targets)):
        raise DssError(
            f"--tokens={text}: give it as INPUT,TARGET, mean lengths of 2 to {MAX_TOKENS:,} "
            "tokens, such as 48,17"
        )
    return inputs, targets


def _print(result: "Plan", experiment, options: dict[str, str]) -> None:
    """Prints a plan as lines and a table."""
    config, chip, memory, work = result.student, result.accelerator, result.memory, result.work
    devices = result.data * result.model
    sizes = {"data": result.data, "model": result.model}
    rules = [f"; {a} over {b}" for a, b in experiment.mesh.rules if sizes[b] > 1]
    print(
        f"{result.parameters / 1e6:,.0f}M parameters, {config.dtype}, gradients "
        f"{experiment.grad_dtype}, remat {config.remat}, {experiment.optimizer.name}"
    )
    print(f"mesh: {devices} {chip.name}, data={result.data}, model={result.model}{''.join(rules)}")
    print(
        f"batch: {result.batch_size} examples in {experiment.microbatches} microbatch(es), "
        f"{work.input_tokens:,.0f} input and {work.target_tokens:,.0f} target tokens "
        f"(lengths: {result.lengths})"
    )
    if work.empty_parts:
        print(
            f"  too few examples for {work.parts} parts, one per data shard and microbatch: "
            f"{work.empty_parts} are empty"
        )
    print(f"compiled by {result.compiler}, {result.compile_seconds:.0f} s")
    if chip.tpu is None and chip.name != "cpu":
        print("  not by a GPU's compiler: temporary memory will differ, more so in bfloat16")
    rows = (
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("gradients and activations", memory.temporary),
        ("program, padding, outputs" if chip.tpu else "outputs, copies", memory.other),
        ("total", memory.total),
        ("usable", chip.usable),
    )
    print(f"{'memory per device':<26}     GiB")
    for name, size in rows:
        print(f"  {name:<26} {size / GIB:7.2f}")
    print(
        f"{'fits' if result.fits else 'DOES NOT FIT'}; usable: {chip.usable / chip.memory:.0%} of "
        f"{chip.memory / GIB:.1f} GiB ({chip.reserve})"
    )
    if result.largest_batch and result.largest_bytes:
        print(
            f"largest batch that fits: {result.largest_batch} examples, "
            f"{result.largest_bytes / GIB:.2f} GiB (compiled)"
        )
    for line in result.advice:
        print(f"  {in_flags(line, options)}")
    peak = chip.flops[config.dtype]
    print(
        f"step: {work.useful / 1e12:.3g} useful TFLOP, {work.computed / work.useful:.2f} times as "
        "many with padding and rematerialization"
    )
    print(
        f"  compute: {result.computing_seconds:.3g} s at an assumed {result.mfu:.0%} of "
        f"{devices} x {peak / 1e12:.4g} TFLOP/s"
    )
    if result.exchanges:
        print(
            f"  communication: {result.sending_seconds:.3g} s, each device sends "
            f"{_sent(result.exchanges, chip)}"
        )
        if result.exchanges_compiler != result.compiler:
            print("    from the CPU's compiler: the TPU's program cannot be read")
        if config.dtype == "bfloat16" and "CPU's" in result.exchanges_compiler:
            print("    up to 2 times too high: the CPU's compiler sends bfloat16 as float32")
        print(f"  total: {_range(result.step_seconds)}, with full to no overlap of the two")
    print(
        f"{experiment.trainer.train_steps:,} steps: {_range(result.run_seconds)}, without "
        "evaluations"
    )


def _sent(collectives: "Sequence[Collective]", chip: "Accelerator") -> str:
    """Returns a description of the bytes that a device sends in a step, and of the bandwidths."""
    by_bandwidth: dict[float, float] = {}
    for collective in collectives:
        bandwidth = chip.bandwidth(collective.group)
        by_bandwidth[bandwidth] = by_bandwidth.get(bandwidth, 0) + collective.sent
    source = "measured by a copy in memory" if chip.name == "cpu" else "published"
    parts = [
        f"{sent / 1e9:.3g} GB at {bandwidth / 1e9:.3g} GB/s"
        for bandwidth, sent in sorted(by_bandwidth.items(), reverse=True)
    ]
    return f"{' and '.join(parts)} ({source})"


def _range(seconds: tuple[float, float]) -> str:
    """Returns a range of times as text, in a suitable unit."""
    low, high = seconds
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1))
    unit, size = next((u for u in units if low >= 2 * u[1]), units[-1])
    texts = f"{low / size:.3g}", f"{high / size:.3g}"
    return f"{texts[0] if texts[0] == texts[1] else ' to '.join(texts)} {unit}"


def _write(result: "Plan", file: str) -> None:
    import json

    values = dataclasses.asdict(result)
    values["memory"]["total"] = result.memory.total
    values["fits"] = result.fits
    text = json.dumps(values, indent=1) + "\n"
    write_whole(Path(file).expanduser(), text)
