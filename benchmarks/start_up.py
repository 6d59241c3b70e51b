"""Times `dss --help`, a run's first step, and the compilation of a training step.

    python benchmarks/start_up.py [--repeats 5] [--json FILE]

`dss --help` and `dss train` run in processes of their own. The run, a tiny student on the
quickstart's data, is timed from its start to the log line of its first step, then killed: first
with an empty cache, then with a warm one (tokens, compiled programs). The step is compiled without
a cache, with the widths of T5 1.1 small and the depths of small (8 + 8 layers) and xxl (24 + 24),
alternating. Medians.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dss.cli.options import quiet_tpu

DEPTHS = {"small": 8, "xxl": 24}  # layers of each stack
SLOTS, ROWS, WIDTHS = (2304, 672), (20, 10), (136, 80, 296)  # as of e-SNLI with 36 examples
RUN = (
    "--gin_file=students/tiny.gin",
    "--gin.MIXTURE_OR_TASK_NAME=timeline_step_by_step_rules",
    "--gin.BATCH_SIZE=16",
    "--gin.TRAIN_STEPS=1000",
    "--gin.TrainerConfig.log_period=1",
)


def dss(*args: str) -> list[str]:
    return [str(Path(sys.executable).parent / "dss"), *args]


def time_help() -> float:
    began = time.perf_counter()
    subprocess.run(dss("--help"), check=True, capture_output=True)
    return time.perf_counter() - began


def time_first_step(data: Path, cache: Path) -> float:
    """Returns the seconds to a run's first step, and kills the run."""
    with tempfile.TemporaryDirectory() as folder:
        command = dss(
            "train",
            *RUN,
            f"--gin.DATASET_PATH={data / 'timeline'}",
            f"--gin.VOCABULARY={data / 'vocabulary.model'}",
            f"--gin.MODEL_DIR={folder}/run",
        )
        began = time.perf_counter()
        environment = os.environ | {"DSS_CACHE": str(cache)}
        with subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 1/"):
                    taken = time.perf_counter() - began
                    process.kill()
                    return taken
                print(line, end="", file=sys.stderr)
    sys.exit("start_up: the run ended before its first step; its output is above")


def compile_steps(repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of tracing and compiling a step, by depth."""
    import dataclasses

    import jax

    from dss.batches.batch import Batch
    from dss.batches.packing import PackedShape, RowWidths
    from dss.config.gin_files import parse_gin
    from dss.parallel.config import MeshConfig
    from dss.parallel.mesh import make_mesh
    from dss.student.network import abstract_params
    from dss.training.config import OptimizerConfig
    from dss.training.loss import LossConfig
    from dss.training.optimizer import make_optimizer
    from dss.training.step import init_state, make_train_step, state_shardings

    experiment = parse_gin(["students/small.gin"], [])
    assert experiment.student is not None
    small = experiment.resolve_student(experiment.student)
    mesh_config = MeshConfig()
    mesh = make_mesh(mesh_config, jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    batch = Batch.abstract(PackedShape(*SLOTS, *ROWS, RowWidths(*WIDTHS)), 1)
    seconds: dict[str, list[float]] = {name: [] for name in DEPTHS}
    for _ in range(repeats):
        for name, depth in DEPTHS.items():
            student = dataclasses.replace(small, num_encoder_layers=depth, num_decoder_layers=depth)
            shardings = state_shardings(student, optimizer, mesh, mesh_config)
            state = jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params(student))
            loss = LossConfig(num_tasks=2, rates=(0.5, 0.5))
            step = make_train_step(student, optimizer, loss, mesh=mesh, shardings=shardings)
            began = time.perf_counter()
            step.lower(state, batch).compile()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="number of measurements")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats: at least 1")

    from dss.quickstart import make_data

    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "data", Path(folder) / "cache"
        make_data(data)
        cold = time_first_step(data, cache)
        helps, warm = [], []
        for _ in range(args.repeats):
            helps.append(time_help())
            warm.append(time_first_step(data, cache))
    compiled = {name: statistics.median(s) for name, s in compile_steps(args.repeats).items()}
    result = {
        "help_seconds": statistics.median(helps),
        "first_step_seconds": statistics.median(warm),
        "first_step_seconds_cold": cold,
        "compile_seconds": compiled,
        "compile_growth": compiled["xxl"] / compiled["small"],
        "repeats": args.repeats,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    }
    print(f"dss --help                   {result['help_seconds']:6.2f} s")
    print(f"first step, empty cache      {cold:6.2f} s")
    print(f"first step, warm cache       {result['first_step_seconds']:6.2f} s")
    for name, seconds in compiled.items():
        print(f"compiling, {f'depth of {name}':<17} {seconds:6.2f} s")
    print(f"xxl's depth compiles {result['compile_growth']:.2f} times as long; {result['machine']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
