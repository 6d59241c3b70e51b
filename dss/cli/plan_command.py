"""`dss plan`."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dss.cli.checks import check_output
from dss.cli.options import add_gin_options, gin_folders, quiet_tpu
from dss.errors import UserError
from dss.paths import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dss.planning.hardware import Accelerator
    from dss.planning.hlo import Exchange
    from dss.planning.plan import Plan

__all__ = ["add_arguments", "run"]

GIB = 2**30
MOST_TOKENS = 100_000  # of a text, on average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_gin_options(parser)
    parser.add_argument("--student", metavar="NAME", help="short for --gin_file=students/NAME.gin")
    parser.add_argument(
        "--mesh",
        metavar="data=N,model=N",
        help="the devices of the run; else MeshConfig's",
    )
    parser.add_argument(
        "--accelerator",
        default="cpu",
        metavar="NAME",
        help="v4, v5p (one device a chip), h100, h200, or cpu, this machine (default)",
    )
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="of the peak, reached by useful operations"
    )
    parser.add_argument(
        "--tokens",
        metavar="INPUT,TARGET",
        help="mean tokens of an input and a target; else the data's, or CQA's without data",
    )
    parser.add_argument(
        "--quick", action="store_true", help="compile once: leave out the largest batch"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan there too")
    parser.epilog = "dss plan --student=xl --mesh=data=4,model=2 --accelerator=v5p"


def run(args: argparse.Namespace) -> int:
    """Prints what the run would need; returns 1 if it does not fit."""
    mesh = {} if args.mesh is None else _mesh(args.mesh)
    tokens = None if args.tokens is None else _numbers(args.tokens)
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu={args.mfu}: a share of the peak, above 0 and at most 1")
    if args.json is not None:
        check_output("--json", args.json)
    if args.student:
        args.gin_file.insert(0, f"students/{args.student}.gin")
    search = gin_folders(args)

    from dss.config.gin_files import parse_gin

    flags = [*args.gin, *(f"MeshConfig.{axis}={size}" for axis, size in mesh.items())]
    experiment = parse_gin(args.gin_file, flags, search)
    if experiment.mesh.data == -1:  # all devices, and no number of them was given
        one = dataclasses.replace(experiment.mesh, data=1)
        experiment = dataclasses.replace(experiment, mesh=one)

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what XLA logs as an error it raises too
    quiet_tpu()
    from dss.planning.hardware import simulate_devices
    from dss.planning.plan import plan

    simulate_devices(experiment.mesh.data * experiment.mesh.model)

    found = plan(
        experiment,
        args.accelerator,
        mfu=args.mfu,
        tokens=tokens,
        largest=not args.quick,
        report=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
    )
    _print(found, experiment)
    if args.json:
        _write(found, args.json)
    return 0 if found.fits else 1


def _mesh(text: str) -> dict[str, int]:
    """Returns the sizes of `data=N,model=N`; what is left out is 1."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        known = axis in ("data", "model") and axis not in sizes
        if not known or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh={text}: give it as data=N,model=N, such as data=8,model=4")
        sizes[axis] = int(size)
    return {"data": 1, "model": 1} | sizes


def _numbers(text: str) -> tuple[float, float]:
    try:
        inputs, targets = map(float, text.split(","))
    except ValueError:
        inputs = targets = 0.0
    if not all(2 <= mean <= MOST_TOKENS for mean in (inputs, targets)):
        raise UserError(
            f"--tokens={text}: give it as INPUT,TARGET, means of 2 to {MOST_TOKENS:,}, as 48,17"
        )
    return inputs, targets


def _print(found: "Plan", experiment) -> None:
    """Prints a plan as lines and a table."""
    config, chip, memory, work = found.student, found.accelerator, found.memory, found.work
    devices = found.data * found.model
    sizes = {"data": found.data, "model": found.model}
    rules = [f"; {a} over {b}" for a, b in experiment.mesh.rules if sizes[b] > 1]
    print(
        f"{found.parameters / 1e6:,.0f}M parameters, {config.dtype}, gradients "
        f"{experiment.grad_dtype}, remat {config.remat}, {experiment.optimizer.name}"
    )
    print(f"mesh: {devices} {chip.name}, data={found.data}, model={found.model}{''.join(rules)}")
    print(
        f"batch: {found.batch_size} examples in {experiment.microbatches} microbatch(es), "
        f"{work.input_tokens:,.0f} + {work.target_tokens:,.0f} tokens (lengths: {found.lengths})"
    )
    if work.empty_parts:
        print(
            f"  too few for {work.parts} parts, one for each data shard and microbatch: "
            f"{work.empty_parts} are empty"
        )
    print(f"compiled by {found.compiler}, {found.compile_seconds:.0f} s")
    if chip.tpu is None and chip.name != "cpu":
        print("  a GPU's compiler was not asked: its temporary memory differs, more in bfloat16")
    rows = (
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("gradients and activations", memory.temporary),
        ("program, padding, outputs" if chip.tpu else "outputs, copies", memory.other),
        ("total", memory.total),
        ("usable", chip.usable),
    )
    print(f"{'of one device':<26}     GiB")
    for name, size in rows:
        print(f"  {name:<26} {size / GIB:7.2f}")
    print(
        f"{'fits' if found.fits else 'DOES NOT FIT'}; usable: of {chip.memory / GIB:.1f} GiB "
        f"{chip.usable / chip.memory:.0%} ({chip.reserve})"
    )
    if found.largest_batch and found.largest_bytes:
        print(
            f"largest batch that fits: {found.largest_batch} examples, "
            f"{found.largest_bytes / GIB:.2f} GiB (compiled)"
        )
    for line in found.advice:
        print(f"  {line}")
    peak = chip.flops[config.dtype]
    print(
        f"a step: {work.useful / 1e12:.3g} TFLOP useful, {work.computed / work.useful:.2f} times "
        f"that with padding and recomputation"
    )
    print(
        f"  computing: {found.computing_seconds:.3g} s at an assumed {found.mfu:.0%} of "
        f"{devices} x {peak / 1e12:.4g} TFLOP/s"
    )
    if found.exchanges:
        if found.exchanges_compiler != found.compiler:
            print("  the TPU's program cannot be read: the CPU's compiler says what is sent")
        if config.dtype == "bfloat16" and "CPU's" in found.exchanges_compiler:
            print("  the CPU's compiler sends float32 for bfloat16: up to twice what would be sent")
        print(
            f"  sending: {found.sending_seconds:.3g} s for {_sent(found.exchanges, chip)}\n"
            f"  {_range(found.step_seconds)}: from both at the same time to one after the other"
        )
    print(
        f"{experiment.trainer.train_steps:,} steps: {_range(found.run_seconds)}; "
        "evaluations are not counted"
    )


def _sent(exchanges: "Sequence[Exchange]", chip: "Accelerator") -> str:
    """Returns in words what a device sends in a step, and how fast."""
    by_speed: dict[float, float] = {}
    for exchange in exchanges:
        speed = chip.speed(exchange.group)
        by_speed[speed] = by_speed.get(speed, 0) + exchange.sent
    how = "as a copy in memory takes here" if chip.name == "cpu" else "published"
    parts = [
        f"{sent / 1e9:.3g} GB at {speed / 1e9:.3g} GB/s"
        for speed, sent in sorted(by_speed.items(), reverse=True)
    ]
    return f"{' and '.join(parts)} of a device ({how})"


def _range(seconds: tuple[float, float]) -> str:
    """Returns a least and a largest time in the unit that suits them."""
    least, most = seconds
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1))
    unit, size = next((u for u in units if least >= 2 * u[1]), units[-1])
    texts = f"{least / size:.3g}", f"{most / size:.3g}"
    return f"{texts[0] if texts[0] == texts[1] else ' to '.join(texts)} {unit}"


def _write(found: "Plan", file: str) -> None:
    import json

    values = dataclasses.asdict(found)
    values["memory"]["total"] = found.memory.total
    values["fits"] = found.fits
    text = json.dumps(values, indent=1) + "\n"
    write_whole(Path(file).expanduser(), text)
