"""Estimates the memory, FLOPs and time of a run from its compiled train step.

Nothing is allocated and nothing runs: the step is compiled for abstract arguments on the mesh, by
the TPU's own compiler if libtpu is installed, otherwise by the CPU's for simulated devices. Memory
is that of the compiler's memory analysis.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from dss.batches.batch import Batch
from dss.batches.batches import Batches
from dss.batches.store import TokenStore
from dss.config.data import open_mixture
from dss.config.experiment import Experiment
from dss.errors import DssError
from dss.parallel.mesh import batch_sharding, make_mesh
from dss.planning.flops import computed_flops, useful_flops
from dss.planning.hardware import Accelerator, find_accelerator, planned_devices
from dss.planning.hlo import Collective, collectives, communication_seconds, product_bytes
from dss.planning.typical import INPUTS_MEAN, TARGETS_MEAN, typical_store
from dss.runs.data import training_order, training_store
from dss.runs.train import abstract_state
from dss.student.config import T5Config
from dss.student.network import num_parameters
from dss.training.loss import LossConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import make_train_step, state_shardings

__all__ = ["Memory", "Plan", "Planner", "Work", "abstract_batch", "device_bytes", "plan"]

STEPS = 256  # steps that are packed without data, and over which tokens are averaged
CLOSE = 0.95  # fraction of the usable memory at which the search for the largest batch ends
MAX_COMPILATIONS = 4  # compilations to find the largest batch
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory per device during a train step, in bytes.

    Attributes:
      parameters: the parameters, in float32.
      optimizer: the optimizer state.
      batch: the token arrays.
      temporary: gradients, activations, and copies of parameters in the compute dtype.
      other: outputs without a donated argument; padding and the program on a TPU; copies of matrix
        products on a CPU.
    """

    parameters: int
    optimizer: int
    batch: int
    temporary: int
    other: int

    @property
    def total(self) -> int:
        """Total memory in bytes."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens and FLOPs of a train step, over all devices.

    Attributes:
      input_tokens: mean number of input tokens.
      target_tokens: mean number of target tokens.
      useful: FLOPs without padding and rematerialization.
      computed: FLOPs with padding and rematerialization.
      parts: number of parts of a batch, data shards x microbatches.
      empty_parts: number of parts without tokens.
    """

    input_tokens: float
    target_tokens: float
    useful: float
    computed: float
    parts: int
    empty_parts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, FLOPs, communication and time of a run.

    Attributes:
      student: the student's configuration.
      parameters: number of parameters.
      accelerator: the accelerator.
      data: size of the mesh's `data` axis.
      model: size of the mesh's `model` axis.
      batch_size: examples per step.
      lengths: source of the input and target lengths.
      compiler: compiler of the step.
      memory: memory per device.
      compile_seconds: time to compile the step.
      work: tokens and FLOPs of a step.
      mfu: assumed model FLOPs utilization, as a fraction of the peak.
      computing_seconds: compute time of a step at this utilization.
      exchanges: collective communication of a step.
      exchanges_compiler: compiler of the program that `exchanges` are read from; not `compiler` if
        the TPU's compiler rejects the step or does not return its text.
      sending_seconds: communication time of a step.
      step_seconds: time of a step, with full overlap of compute and communication and without any.
      run_seconds: time of all steps, with full overlap and without any.
      largest_batch: largest batch that fits, verified by compiling; None if none fits or the search
        is off.
      largest_bytes: total memory per device with the largest batch.
      advice: changes that reduce memory, if the run does not fit.
    """

    student: T5Config
    parameters: int
    accelerator: Accelerator
    data: int
    model: int
    batch_size: int
    lengths: str
    compiler: str
    memory: Memory
    compile_seconds: float
    work: Work
    mfu: float
    computing_seconds: float
    exchanges: tuple[Collective, ...]
    exchanges_compiler: str
    sending_seconds: float
    step_seconds: tuple[float, float]
    run_seconds: tuple[float, float]
    largest_batch: int | None
    largest_bytes: int | None
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the memory fits on a device."""
        return self.memory.total <= self.accelerator.usable


def device_bytes(arrays: Any) -> int:
    """Returns the bytes per device of a tree of abstract arrays with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


def abstract_batch(batches: Batches, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the largest batch, as abstract arrays sharded over the mesh."""
    shape, packed = batches.largest, batches.packed
    groups = batches.groups if packed else shape.input_rows
    batch = Batch.abstract(shape, groups, packed=packed, reads=batches.starts is not None)
    return jax.tree.map(lambda x: x.update(sharding=batch_sharding(mesh)), batch)


class Planner:
    """Compiles the train step of an experiment for batches of any size.

    Args:
      experiment: the experiment, with a mesh.
      config: the student's configuration, resolved by the experiment.
      store: the tokens.
      devices: the mesh's devices: real, simulated, or of a TPU topology.
      num_steps: number of steps that are packed to find the shapes of batches.
      cpu: whether the step will run on CPUs, rather than only be compiled for them.
    """

    def __init__(
        self,
        experiment: Experiment,
        config: T5Config,
        store: TokenStore,
        devices: list[Any],
        num_steps: int,
        *,
        cpu: bool = False,
    ):
        self.experiment, self.config, self.store = experiment, config, store
        self.num_steps, self.cpu = num_steps, cpu
        one_pass = experiment.data.one_encoder_pass and len(store.tasks) > 1
        self.starts = (0,) * len(store.tasks) if one_pass else None  # placeholder start ids
        self.mesh = make_mesh(experiment.mesh, devices)
        self.optimizer = make_optimizer(experiment.optimizer, experiment.trainer.train_steps)
        self.shardings = state_shardings(config, self.optimizer, self.mesh, experiment.mesh)
        self.state = abstract_state(config, self.optimizer, self.shardings)
        self.unit = self.mesh.shape["data"] * experiment.microbatches
        self.tpu = devices[0].platform == "tpu"
        # Nothing runs, so machine code is not optimized, which does not change the memory.
        self.options = None if self.tpu else {"xla_backend_optimization_level": 0}

    def batches(self, batch_size: int) -> Batches:
        """Returns the batches of `num_steps` steps."""
        experiment = dataclasses.replace(self.experiment, batch_size=batch_size)
        rates = (1 / len(self.store.tasks),) * len(self.store.tasks)
        return Batches(
            self.store,
            training_order(experiment, self.store, rates),
            num_steps=self.num_steps,
            packed=experiment.data.packed,
            groups=self.unit,
            starts=self.starts,
        )

    def lower(self, batch: Batch) -> Any:
        """Returns the lowered train step for an abstract batch."""
        tasks = len(self.store.tasks)
        step: Any = make_train_step(
            self.config,
            self.optimizer,
            LossConfig(num_tasks=tasks, rates=(1 / tasks,) * tasks),
            mesh=self.mesh,
            shardings=self.shardings,
            microbatches=self.experiment.microbatches,
            grad_dtype=self.experiment.grad_dtype,
        )
        return step.lower(self.state, batch)

    def compile(self, batch_size: int) -> tuple[Memory, tuple[Collective, ...] | None, float]:
        """Compiles the train step.

        Returns:
          The memory per device; the collectives, or None if the compiler rejects the step or does
          not return the program's text; and the compile time in seconds.
        """
        batch = abstract_batch(self.batches(batch_size), self.mesh)
        began = time.perf_counter()
        parts = {
            "parameters": device_bytes(self.state.params),
            "optimizer": device_bytes(self.state.opt_state),
            "batch": device_bytes(batch),
        }
        try:
            compiled = self.lower(batch).compile(compiler_options=self.options)
            analysis = compiled.memory_analysis()
        except JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            temporary = max(_required_bytes(str(error)) - sum(parts.values()), 0)
            return Memory(**parts, temporary=temporary, other=0), None, time.perf_counter() - began
        other = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        if self.tpu:  # a TPU's memory also holds the program
            other += analysis.generated_code_size_in_bytes
        # A TPU pads arrays to tiles.
        other += max(analysis.argument_size_in_bytes - sum(parts.values()), 0)
        seconds = time.perf_counter() - began
        sent: tuple[Collective, ...] | None = ()
        if self.mesh.size > 1 or self.cpu:  # otherwise the program's text is not needed
            try:
                text = compiled.as_text()
            except JaxRuntimeError:
                # Happens for XXL on 8 v5p: "async-update instruction should have ...".
                sent = None
            else:
                sent = collectives(text, self.mesh.size)
                if self.cpu:
                    other += product_bytes(text)
        memory = Memory(**parts, temporary=analysis.temp_size_in_bytes, other=other)
        return memory, sent, seconds

    def work(self, batch_size: int) -> Work:
        """Returns the tokens and FLOPs of a step, averaged over the first `STEPS`."""
        batches = self.batches(batch_size)
        per_step = []
        for step in range(min(len(batches), STEPS)):
            inputs, targets, reads = batches.lengths(step)
            flops = useful_flops(self.config, inputs, targets, reads)
            per_step.append((inputs.sum(), targets.sum(), flops))
        mean = np.mean(per_step, axis=0)
        is_filled = batches[0].encoder_segment_ids.reshape(self.unit, -1).any(axis=1)
        shape = batches.shapes[-1]
        groups, R, Q = batches.groups, shape.input_rows, shape.target_rows
        if not batches.packed:  # each row is a group
            groups, R, Q = R, 1, 1
        flops = computed_flops(
            self.config,
            (shape.inputs, shape.targets),
            (R, shape.widths.inputs),
            (Q, shape.widths.targets),
            shape.widths.cross,
        )
        return Work(
            input_tokens=float(mean[0]),
            target_tokens=float(mean[1]),
            useful=float(mean[2]),
            computed=float(groups * flops),
            parts=self.unit,
            empty_parts=self.unit - int(is_filled.sum()),
        )

    def largest(
        self, usable: float, known: dict[int, Memory], report: Callable[[str], None]
    ) -> int | None:
        """Returns the largest batch that fits; None if none does.

        Memory is nearly affine in the batch size, so the next size is extrapolated from the two
        closest ones.

        Args:
          usable: memory available to a program in bytes.
          known: memory of the batch sizes compiled so far; those compiled here are added.
          report: called with a line before each compilation.
        """
        for _ in range(MAX_COMPILATIONS):
            low = max((b for b, m in known.items() if m.total <= usable), default=0)
            high = min((b for b, m in known.items() if m.total > usable), default=math.inf)
            least = (low // self.unit + 1) * self.unit
            if least >= high or (low and known[low].total >= CLOSE * usable):
                break
            most = 16 * max(known) if high == math.inf else high - 1
            estimate = _estimate_batch_size(usable * (1 + CLOSE) / 2, known)
            size = int(estimate // self.unit) * self.unit
            size = max(least, min(size, int(most // self.unit) * self.unit))
            report(f"compiling a batch of {size}")
            known[size] = self.compile(size)[0]
        return max((b for b, m in known.items() if m.total <= usable), default=None)


def _estimate_batch_size(target: float, known: dict[int, Memory]) -> float:
    """Returns the batch size that is estimated to need `target` bytes.

    Between the two closest known sizes, memory is interpolated linearly. Beyond them a line
    underestimates its growth, as larger batches first fill memory that smaller ones leave unused;
    the slope is then at least the temporary memory without gradients, divided by the batch size.

    Args:
      target: memory per device in bytes.
      known: memory of the batch sizes compiled so far.
    """
    nearest = sorted(known, key=lambda size: abs(known[size].total - target))[:2]
    a = nearest[0]
    slope = max(known[a].temporary - known[a].parameters, known[a].temporary / 8) / a
    if len(nearest) == 2:
        secant = (known[nearest[1]].total - known[a].total) / (nearest[1] - a)
        estimate = a + (target - known[a].total) / max(secant, 1)
        slope = secant if min(nearest) <= estimate <= max(nearest) else max(secant, slope)
    return a + (target - known[a].total) / max(slope, 1)


def _required_bytes(message: str) -> int:
    """Returns the bytes, with arguments, in the out-of-memory error of a TPU's compiler."""
    match = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    return int(float(match[1]) * 2 ** (10 * "_KMGT".index(match[2]))) if match else 2**62


def _open_data(
    experiment: Experiment, config: T5Config, tokens: tuple[float, float] | None
) -> tuple[TokenStore, str, bool]:
    """Returns the tokens to plan with, the source of their lengths, and whether they are real."""
    data = experiment.data
    folder = data.root or data.dataset_path or os.environ.get("DSS_DATA_ROOT")
    if tokens is None and folder and experiment.has_task and experiment.vocabulary:
        return training_store(experiment), f"{open_mixture(experiment).name}'s", True
    inputs, targets = tokens or (INPUTS_MEAN, TARGETS_MEAN)
    source = "as given" if tokens else "CQA's, assumed: no DATASET and METHOD with their data"
    return typical_store(config.vocab_size, inputs, targets), source, False


def _advice(experiment: Experiment, config: T5Config, planner: Planner, usable: float) -> tuple:
    """Returns changes that could make an experiment fit."""
    mesh = planner.mesh
    rules = dict(reversed(experiment.mesh.rules))
    state = planner.state
    arrays = jax.tree.leaves((state.params, state.params, state.opt_state))  # with gradients
    state_bytes = sum(x.size * x.dtype.itemsize for x in arrays)
    advice = []
    if "embed" not in rules and mesh.shape["data"] > 1:
        layout = "fsdp" if mesh.shape["model"] == 1 else "two_d"
        advice.append(f"shard parameters over data too: `layouts/{layout}.gin`")
    if config.remat != "full":
        advice.append("rematerialize layers: `Experiment.remat=full`")
    if config.dtype != "bfloat16":
        advice.append("compute in bfloat16: `Experiment.dtype=bfloat16`")
    if experiment.optimizer.name != "adafactor":
        advice.append("use an optimizer with a smaller state: `runs/adafactor.gin`")
    if experiment.batch_size > planner.unit:
        microbatches = 2 * experiment.microbatches
        advice.append(f"use more microbatches: `Experiment.microbatches={microbatches}`")
    devices = int(np.ceil(state_bytes / usable))
    if devices > mesh.size:
        advice.append(
            "use more devices: parameters, gradients and optimizer state, evenly sharded, need "
            f"{devices} or more"
        )
    if not advice:
        advice.append("use more devices along the mesh's model or data axis")
    return tuple(advice)


def plan(
    experiment: Experiment,
    accelerator: str,
    *,
    mfu: float | None = None,
    tokens: tuple[float, float] | None = None,
    largest: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Estimates the memory, FLOPs, communication and time of an experiment.

    Args:
      experiment: the experiment, with the sizes of both mesh axes.
      accelerator: v4, v5p, h100, h200, or cpu for simulated devices on this machine.
      mfu: assumed model FLOPs utilization, in (0, 1]; None: the accelerator's default.
      tokens: mean input and target length in tokens, instead of the data's.
      largest: whether to search the largest batch that fits, with up to 4 more compilations.
      report: called with a line before each compilation.

    Raises:
      DssError: if the experiment has no student or no mesh, or the mesh does not fit the student
        or the accelerator.
    """
    if experiment.config is None:
        raise DssError("no student: give `Experiment.student`")
    mesh = experiment.mesh
    if mesh.data < 1:
        raise DssError("no mesh: give `MeshConfig.data` and `MeshConfig.model`")
    config = experiment.resolve_student(experiment.config)
    chip = find_accelerator(accelerator, mesh.data * mesh.model)
    devices, compiler = planned_devices(chip, mesh.data * mesh.model)
    store, lengths, real = _open_data(experiment, config, tokens)
    steps = experiment.trainer.train_steps
    num_steps = steps if real else min(steps, STEPS)
    planner = Planner(experiment, config, store, devices, num_steps, cpu=chip.name == "cpu")

    report(f"compiling a batch of {experiment.batch_size} with {compiler}")
    memory, sent, seconds = planner.compile(experiment.batch_size)
    known = {experiment.batch_size: memory}
    best = planner.largest(chip.usable, known, report) if largest else None
    work = planner.work(experiment.batch_size)
    mfu = mfu or chip.mfu
    computing = work.useful / (len(devices) * chip.flops[config.dtype] * mfu)
    sent_compiler = compiler
    if sent is None:
        cpus, sent_compiler = planned_devices(dataclasses.replace(chip, tpu=None), len(devices))
        size = experiment.batch_size
        report(f"compiling a batch of {size} with {sent_compiler}, to find collectives")
        sent = Planner(experiment, config, store, cpus, num_steps).compile(size)[1]
        assert sent is not None
    communication = communication_seconds(sent, chip)
    step = (max(computing, communication), computing + communication)
    fits = memory.total <= chip.usable
    return Plan(
        student=config,
        parameters=num_parameters(config),
        accelerator=chip,
        data=mesh.data,
        model=mesh.model,
        batch_size=experiment.batch_size,
        lengths=lengths,
        compiler=compiler,
        memory=memory,
        compile_seconds=seconds,
        work=work,
        mfu=mfu,
        computing_seconds=computing,
        exchanges=sent,
        exchanges_compiler=sent_compiler,
        sending_seconds=communication,
        step_seconds=step,
        run_seconds=(step[0] * steps, step[1] * steps),
        largest_batch=best,
        largest_bytes=None if best is None else known[best].total,
        advice=() if fits else _advice(experiment, config, planner, chip.usable),
    )
