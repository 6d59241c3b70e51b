#!/usr/bin/env python3
"""Launches `dss train` with XManager, in a container on this machine or on Vertex AI.

    python scripts/xm_launch.py --executor=vertex --accelerator=h100=8 --name=cqa [--dry-run] \
      -- ARGUMENT_OF_DSS_TRAIN...

The container has HEAD of the checkout; one process uses all accelerators of the machine. Needs only
the package `xmanager`, not `dss`. Details: docs/launching.md
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
BASE_IMAGE = "python:3.11"
# As in NVIDIA's images: the path at which the host's driver is mounted, and its capabilities.
FIND_DRIVER = (
    "ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 NVIDIA_VISIBLE_DEVICES=all "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
)

# XManager's entrypoint waits for a TPU with `nc`, which the base image lacks.
INSTALL_NC = (
    "RUN apt-get update && apt-get install -y --no-install-recommends netcat-openbsd "
    "&& rm -rf /var/lib/apt/lists/*"
)
HOST_MEMORY = 30  # GiB per accelerator by default; comes with at least 6 vCPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine type of Vertex AI.

    Attributes:
      name: Vertex AI's name of the machine type.
      kind: name of its accelerators; None if it has none.
      count: number of accelerators.
      cpus: number of vCPUs.
      memory: host memory, GiB.
    """

    name: str
    kind: str | None
    count: int
    cpus: int
    memory: float

    def spec(self) -> dict[str, int | str]:
        """Returns Vertex AI's `MachineSpec`."""
        spec: dict[str, int | str] = {"machine_type": self.name}
        if self.kind is not None:
            spec |= {"accelerator_type": VERTEX_NAMES[self.kind], "accelerator_count": self.count}
        return spec


def n1(kind: str | None, counts: Sequence[int], cpus: int) -> list[Machine]:
    """Returns the N1 machine types, to which accelerators are attached.

    Args:
      kind: name of the accelerators; None for machines without.
      counts: numbers of accelerators that can be attached.
      cpus: maximum number of vCPUs per accelerator.
    """
    return [
        Machine(name=f"n1-{series}-{size}", kind=kind, count=count, cpus=size, memory=size * memory)
        for series, memory in (("standard", 3.75), ("highmem", 6.5))
        for size in (4, 8, 16, 32, 64, 96)
        for count in counts
        if size <= cpus * max(count, 1)
    ]


def built_in(
    kind: str, counts: Sequence[int], name: str, cpus: int, memory: float
) -> list[Machine]:
    """Returns the machine types of a series that includes its accelerators.

    Args:
      kind: name of the accelerators.
      counts: numbers of accelerators.
      name: Vertex AI's name of the machine type, with `{}` for the number of accelerators.
      cpus: vCPUs per accelerator.
      memory: host memory per accelerator, GiB.
    """
    return [
        Machine(name=name.format(n), kind=kind, count=n, cpus=cpus * n, memory=memory * n)
        for n in counts
    ]


# cloud.google.com/vertex-ai/docs/training/configure-compute: machine types and their accelerators;
# cloud.google.com/compute/docs/accelerator-optimized-machines: vCPUs and memory.
MACHINES = [
    *n1(None, [0], 96),
    *n1("t4", [1, 2, 4], 24),
    *n1("v100", [1, 2, 4, 8], 12),
    *(
        Machine(name=f"g2-standard-{cpus}", kind="l4", count=count, cpus=cpus, memory=4 * cpus)
        for count, sizes in {1: (4, 8, 12, 16, 32), 2: (24,), 4: (48,), 8: (96,)}.items()
        for cpus in sizes
    ),
    *built_in("a100", [1, 2, 4, 8], "a2-highgpu-{}g", 12, 85),
    *built_in("a100", [16], "a2-megagpu-{}g", 6, 85),
    *built_in("a100_80gib", [1, 2, 4, 8], "a2-ultragpu-{}g", 12, 170),
    *built_in("h100", [1, 2, 4, 8], "a3-highgpu-{}g", 26, 234),
    *built_in("h100_mega", [8], "a3-megagpu-{}g", 26, 234),
    *built_in("h200", [8], "a3-ultragpu-{}g", 28, 369),
    *built_in("b200", [8], "a4-highgpu-{}g", 28, 496),
    *built_in("tpu_v2", [8], "cloud-tpu", 12, 41.75),  # the count is of cores
    *built_in("tpu_v3", [8], "cloud-tpu", 12, 41.75),
]
VERTEX_NAMES = {
    "t4": "NVIDIA_TESLA_T4",
    "v100": "NVIDIA_TESLA_V100",
    "l4": "NVIDIA_L4",
    "a100": "NVIDIA_TESLA_A100",
    "a100_80gib": "NVIDIA_A100_80GB",
    "h100": "NVIDIA_H100_80GB",
    "h100_mega": "NVIDIA_H100_MEGA_80GB",
    "h200": "NVIDIA_H200_141GB",
    "b200": "NVIDIA_B200",
    "tpu_v2": "TPU_V2",
    "tpu_v3": "TPU_V3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """The arguments of XManager's functions, each field under XManager's name."""

    experiment_title: str
    revision: str  # commit of the checkout in the container
    base_image: str
    docker_instructions: list[str]
    entrypoint: list[str]  # shell commands, with the arguments of `dss train`
    executor: str  # executor class of xm_local: 'Local' or 'Vertex'
    requirements: dict[str, int]  # number of accelerators by kind; local GPUs and TPUs only
    machine_spec: dict[str, int | str] | None  # Vertex AI's; None for Local
    volumes: dict[str, str]  # host folder -> container folder; Local only


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def accelerator(text: str) -> tuple[str, int]:
    """Parses a kind and number of accelerators, such as `a100=8`."""
    match = re.fullmatch(r"(\w+)=([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give NAME=COUNT, such as a100=8, or local_gpu=1 for a local container"
        )
    return match[1].lower(), int(match[2])


def positive(text: str) -> int:
    """Parses a whole number above 0."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def choose_machine(
    kind: str | None, count: int, cpus: int = 0, memory: int | None = None
) -> Machine:
    """Returns the smallest machine type with these accelerators.

    Args:
      kind: name of the accelerators; None for a machine without.
      count: number of accelerators, exactly.
      cpus: minimum number of vCPUs.
      memory: minimum host memory, GiB; by default 30 per accelerator.

    Raises:
      ValueError: if no machine type has them.
    """
    of_kind = [machine for machine in MACHINES if machine.kind == kind]
    if not of_kind:
        raise ValueError(
            f"unknown accelerator {kind!r}; known: {', '.join(VERTEX_NAMES)}; other TPUs are "
            "started by scripts/tpu_vm.sh"
        )
    with_count = [machine for machine in of_kind if machine.count == count]
    if not with_count:
        counts = sorted({machine.count for machine in of_kind})
        raise ValueError(
            f"Vertex AI has no machine with {count} {kind}; give {', '.join(map(str, counts))}"
        )
    memory = memory or HOST_MEMORY * max(count, 1)
    large = [m for m in with_count if m.cpus >= cpus and m.memory >= memory]
    if not large:
        most = max(with_count, key=lambda machine: machine.memory)
        raise ValueError(
            f"Vertex AI has no such machine with {f'{cpus} vCPUs and ' if cpus else ''}{memory} "
            f"GiB; the largest, {most.name}, has {most.cpus} vCPUs and {most.memory:g} GiB"
        )
    return min(large, key=lambda machine: (machine.cpus, machine.memory))


def git(*args: str) -> bytes:
    """Returns the output of a git command in the checkout."""
    return subprocess.run(["git", "-C", ROOT, *args], check=True, capture_output=True).stdout


def plan(
    title: str,
    revision: str,
    executor: str,
    accelerators: tuple[str | None, int],
    machine: Machine | None,
    train: list[str],
) -> Launch:
    """Returns the launch of `dss train`.

    Args:
      title: title of the experiment.
      revision: commit of the checkout.
      executor: 'vertex' or 'local'.
      accelerators: kind and number of accelerators.
      machine: machine type of Vertex AI; None for a local container.
      train: arguments of `dss train`.
    """
    kind, count = accelerators
    tpu = kind is not None and kind.startswith("tpu")
    cuda = kind is not None and not tpu
    extras = ",".join(["tpu"] * tpu + ["cuda"] * cuda + ["gcs"])  # runs may be in a bucket
    # Not as arguments of the job: those XManager quotes for a shell, and hands to the container
    # without one. A local container's working folder is this folder, mounted under the same path.
    command = shlex.join(["dss", "train", *train])
    here = os.getcwd()
    local = executor == "local"
    # On Vertex AI XManager needs only TPUs as requirements (they have no service account); it lacks
    # names for some of the other accelerators.
    requirements = {kind: count} if kind is not None and (local or tpu) else {}
    return Launch(
        experiment_title=title,
        revision=revision,
        base_image=BASE_IMAGE,
        docker_instructions=[
            *([FIND_DRIVER] if cuda else []),
            *([INSTALL_NC] if tpu else []),
            "ENV PYTHONUNBUFFERED=1",
            "COPY dss/ /dss",
            "WORKDIR /dss",
            f"RUN python -m pip install --no-cache-dir '.[{extras}]'",
        ],
        entrypoint=[*([f"cd {shlex.quote(here)}"] if local else []), f"exec {command}"],
        executor=executor.capitalize(),
        requirements=requirements,
        machine_spec=machine.spec() if machine else None,
        volumes={here: here} if local else {},
    )


def launch(todo: Launch) -> None:
    """Builds the container and starts the job; waits for a local one."""
    from xmanager import xm, xm_local

    make_executor = getattr(xm_local, todo.executor)
    options = {}
    if todo.volumes:
        options["docker_options"] = xm_local.DockerOptions(volumes=dict(todo.volumes))
    if todo.machine_spec is not None:
        from xmanager.cloud import vertex

        # XManager 0.8 requests an N1 machine for most accelerators, even for those that N1 lacks.
        vertex.get_machine_spec = lambda job: todo.machine_spec
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dss"  # the last component becomes the image's name
        source.mkdir()
        archive = git("archive", todo.revision)
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
        container = xm.PythonContainer(
            path=str(source),
            base_image=todo.base_image,
            docker_instructions=todo.docker_instructions,
            entrypoint=xm.CommandList(todo.entrypoint),
        )
        with xm_local.create_experiment(experiment_title=todo.experiment_title) as experiment:
            [executable] = experiment.package(
                [xm.Packageable(executable_spec=container, executor_spec=make_executor.Spec())]
            )
            requirements = xm.JobRequirements(**todo.requirements)
            executor = make_executor(requirements=requirements, **options)
            experiment.add(xm.Job(executable=executable, executor=executor))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    train = argv[end + 1 :]
    parser = OneLineParser(
        prog="xm_launch.py",
        usage="%(prog)s --executor=vertex|local [OPTION]... -- ARGUMENT_OF_DSS_TRAIN...",
        description="Launches `dss train` in a container with XManager.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--executor",
        choices=("vertex", "local"),
        required=True,
        help="Vertex AI, or a container on this machine",
    )
    parser.add_argument(
        "--accelerator",
        type=accelerator,
        default=(None, 0),
        help="kind and number of accelerators, NAME=COUNT (default: CPU only)",
    )
    parser.add_argument(
        "--cpu",
        type=positive,
        default=0,
        help="minimum number of vCPUs of the Vertex AI machine (default: any)",
    )
    parser.add_argument(
        "--memory",
        type=positive,
        help="minimum host memory of the Vertex AI machine, GiB (default: 30 per accelerator)",
    )
    parser.add_argument("--name", required=True, help="title of the experiment")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the launch without starting it"
    )
    args = parser.parse_args(argv[:end])
    if not train:
        parser.error(
            "nothing to train: give the arguments of dss train after --, such as "
            "-- --gin_file=datasets/cqa.gin --gin_file=methods/step_by_step.gin --gin.MODEL_DIR=DIR"
        )
    if not train[0].startswith("-"):
        parser.error(
            f"{train[0]!r} after --: give the arguments of dss train only, without 'dss train'"
        )
    kind, count = args.accelerator
    machine = None
    if args.executor == "vertex":
        if kind == "local_gpu":
            parser.error("--accelerator: local_gpu is of --executor=local; name one such as a100=8")
        try:
            machine = choose_machine(kind, count, args.cpu, args.memory)
        except ValueError as error:
            parser.error(f"{'--accelerator' if kind else '--cpu, --memory'}: {error}")
    elif kind not in (None, "local_gpu"):
        parser.error("--accelerator: a local container can have local_gpu=COUNT only")
    elif args.cpu or args.memory:
        parser.error("--cpu, --memory: a local container has those of this machine")
    try:
        revision = git("rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        parser.error(f"{ROOT}: no git checkout; clone dss and launch it from there")
    todo = plan(args.name, revision, args.executor, args.accelerator, machine, train)
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(todo), indent=2))
        return 0
    if args.executor == "vertex" and "GOOGLE_CLOUD_BUCKET_NAME" not in os.environ:
        parser.error("set GOOGLE_CLOUD_BUCKET_NAME to a bucket of yours, where XManager stages")
    try:
        import xmanager  # noqa: F401
        from absl import flags
    except ModuleNotFoundError as error:
        if error.name not in ("absl", "xmanager"):
            raise
        parser.error(f"no module {error.name}: pip install xmanager, best in its own environment")
    flags.FLAGS([parser.prog])  # XManager reads its flags, which must have been parsed
    launch(todo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
