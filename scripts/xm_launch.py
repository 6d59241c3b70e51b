#!/usr/bin/env python3
"""Launches `dss train` with XManager, in a container on this machine or on Vertex AI.

    python scripts/xm_launch.py --executor=vertex --accelerator=a100=8 --name=cqa [--dry-run] \
      -- ARGUMENT_OF_DSS_TRAIN...

The container holds the checkout as committed, and all accelerators of one machine belong to one
process. Needs only the package `xmanager`, not `dss`. docs/launching.md says more.
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
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
BASE_IMAGE = "python:3.11"
# As in NVIDIA's own images: where the machine's driver is mounted, and that all of it is wanted.
FIND_DRIVER = (
    "ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 NVIDIA_VISIBLE_DEVICES=all "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What XManager is told, each field under the name that XManager gives it."""

    experiment_title: str
    revision: str  # of the checkout, what the container holds
    base_image: str
    docker_instructions: list[str]
    entrypoint: list[str]  # shell commands, the arguments of `dss train` among them
    executor: str  # 'Local' or 'Vertex', of xm_local
    requirements: dict[str, int | str]  # accelerator: how many, or a topology
    volumes: dict[str, str]  # folder of this machine: where the container sees it; only of Local


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def accelerator(text: str) -> dict[str, int | str]:
    """Reads `a100=8` or `tpu_v3=2x2`."""
    match = re.fullmatch(r"(\w+)=([1-9]\d*(?:x[1-9]\d*)*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give NAME=COUNT, such as a100=8 (XManager's names) or local_gpu=1"
        )
    name, count = match.groups()
    return {name.lower(): int(count) if count.isdigit() else count}


def git(*args: str) -> bytes:
    """Returns what git says about the checkout."""
    return subprocess.run(["git", "-C", ROOT, *args], check=True, capture_output=True).stdout


def plan(
    title: str,
    revision: str,
    executor: str,
    requirements: dict[str, int | str],
    train: list[str],
) -> Launch:
    """Returns the launch of `dss train` with the arguments `train`."""
    kind = next(iter(requirements), "")
    extra = "[tpu]" if kind.startswith("tpu") else "[cuda]" if kind else ""
    # Not as arguments of the job: those XManager quotes for a shell, and hands to the container
    # without one. A container of this machine works in this folder, which it sees as its own.
    command = shlex.join(["dss", "train", *train])
    here = os.getcwd()
    local = executor == "local"
    return Launch(
        experiment_title=title,
        revision=revision,
        base_image=BASE_IMAGE,
        docker_instructions=[
            *([FIND_DRIVER] if extra == "[cuda]" else []),
            "ENV PYTHONUNBUFFERED=1",
            "COPY dss/ /dss",
            "WORKDIR /dss",
            f"RUN python -m pip install --no-cache-dir '.{extra}'",
        ],
        entrypoint=[*([f"cd {shlex.quote(here)}"] if local else []), f"exec {command}"],
        executor=executor.capitalize(),
        requirements=requirements,
        volumes={here: here} if local else {},
    )


def launch(todo: Launch, requirements: Any) -> None:
    """Builds the container and starts the job, which needs `xm.JobRequirements`; waits for a local
    one.
    """
    from xmanager import xm, xm_local

    make_executor = getattr(xm_local, todo.executor)
    options = {}
    if todo.volumes:
        options["docker_options"] = xm_local.DockerOptions(volumes=dict(todo.volumes))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dss"  # the last part is the name of the image
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
    parser.add_argument("--executor", choices=("vertex", "local"), required=True)
    parser.add_argument(
        "--accelerator", type=accelerator, default={}, help="NAME=COUNT; without it CPU only"
    )
    parser.add_argument("--name", required=True, help="of the experiment")
    parser.add_argument("--dry-run", action="store_true", help="print what would be launched")
    args = parser.parse_args(argv[:end])
    if not train:
        parser.error(
            "nothing to train: give the arguments of dss train after --, such as "
            "-- --gin_file=recipes/cqa_step_by_step.gin --gin.MODEL_DIR=DIR"
        )
    if not train[0].startswith("-"):
        parser.error(
            f"{train[0]!r} after --: give the arguments of dss train only, without 'dss train'"
        )
    if args.executor == "local" and args.accelerator.keys() - {"local_gpu"}:
        parser.error("--accelerator: a local container can have local_gpu=COUNT only")
    if args.executor == "vertex" and "local_gpu" in args.accelerator:
        parser.error("--accelerator: local_gpu is of --executor=local; name one such as a100=8")
    try:
        revision = git("rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        parser.error(f"{ROOT}: no git checkout; clone dss and launch it from there")
    todo = plan(args.name, revision, args.executor, args.accelerator, train)
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(todo), indent=2))
        return 0
    if args.executor == "vertex" and "GOOGLE_CLOUD_BUCKET_NAME" not in os.environ:
        parser.error("set GOOGLE_CLOUD_BUCKET_NAME to a bucket of yours, where XManager stages")
    try:
        from absl import flags
        from xmanager import xm
    except ModuleNotFoundError as error:
        if error.name not in ("absl", "xmanager"):
            raise
        parser.error(f"no module {error.name}: pip install xmanager, best in its own environment")
    flags.FLAGS([parser.prog])  # XManager looks at its flags, and those must have been read
    try:
        requirements = xm.JobRequirements(**todo.requirements)
    except (KeyError, ValueError) as error:
        parser.error(f"--accelerator: {error.args[0]}")
    launch(todo, requirements)
    return 0


if __name__ == "__main__":
    sys.exit(main())
