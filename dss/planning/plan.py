"""What a run would need: memory, operations and time, from its compiled training step.

Nothing is allocated and nothing runs: the step of the mesh is compiled for abstract arguments, by
the TPU's own compiler where libtpu is installed, else for simulated CPU devices, and the compiler
says what it would take.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError

from dss.batches.batches import Batches
from dss.batches.store import TokenStore
from dss.config.data import open_mixture
from dss.config.experiment import Experiment
from dss.errors import UserError
from dss.parallel.mesh import batch_sharding, make_mesh
from dss.planning.flops import computed_flops, useful_flops
from dss.planning.hardware import Accelerator, find_accelerator, planned_devices
from dss.planning.hlo import Exchange, exchanges, product_bytes, sending_seconds
from dss.planning.typical import INPUTS_MEAN, TARGETS_MEAN, typical_store
from dss.runs.data import training_order, training_store
from dss.runs.train import abstract_state
from dss.student.config import T5Config
from dss.student.network import num_parameters
from dss.training.loss import LossConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import make_train_step, state_shardings

__all__ = ["Memory", "Plan", "Planner", "Work", "abstract_batch", "device_bytes", "plan"]

STEPS = 256  # that are laid out of data that are not there, and whose tokens are counted
CLOSE = 0.95  # a batch that takes this part of what is usable is as large as one looks for
COMPILATIONS = 4  # at most, for the largest batch
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device during a step.

    Attributes:
      parameters: float32.
      optimizer: its moments.
      batch: the tokens.
      temporary: gradients and activations, and copies in the compute dtype.
      other: outputs that take no argument's place; on a TPU the program, on a CPU what its products
        of matrices copy.
    """

    parameters: int
    optimizer: int
    batch: int
    temporary: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does.

    Attributes:
      input_tokens: of a step, the mean.
      target_tokens: of a step, the mean.
      useful: operations that the tokens need.
      computed: operations with padding, rows of attention and what is computed again.
      parts: of a batch, one for each data shard and microbatch.
      empty_parts: of these, those that have no tokens.
    """

    input_tokens: float
    target_tokens: float
    useful: float
    computed: float
    parts: int
    empty_parts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would need.

    Attributes:
      student: its configuration.
      parameters: how many numbers it holds.
      accelerator: a device.
      data: devices along the mesh's `data`.
      model: devices along its `model`.
      batch_size: examples a step.
      lengths: where the lengths of the texts are from.
      compiler: what compiled the step.
      memory: of a device.
      compile_seconds: of the step, once.
      work: of a step, on all devices.
      mfu: share of the peak that useful operations are assumed to reach.
      computing_seconds: of a step at that share.
      exchanges: what a device sends in a step.
      exchanges_compiler: whose program they were read off; not `compiler` where a TPU's refused the
        step or gave no text.
      sending_seconds: of a step, one exchange after the other.
      step_seconds: from computing and sending at the same time, the longer of both, to one after
        the other, their sum.
      run_seconds: the run's steps, from and to.
      largest_batch: the largest that fits, compiled to be sure; None if none does or none was
        looked for.
      largest_bytes: a device's total with it.
      advice: what to change where it does not fit.
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
    exchanges: tuple[Exchange, ...]
    exchanges_compiler: str
    sending_seconds: float
    step_seconds: tuple[float, float]
    run_seconds: tuple[float, float]
    largest_batch: int | None
    largest_bytes: int | None
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.accelerator.usable


def device_bytes(arrays: Any) -> int:
    """Returns the bytes of one device's shards of abstract arrays that say how they lie."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


def abstract_batch(batches: Batches, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the largest batch, and how they lie on a mesh."""
    shape, G = batches.shapes[-1], batches.groups
    shapes: dict[str, tuple[int, ...]] = {}
    if not batches.packed:
        G = shape.input_rows
    else:
        widths = shape.widths
        shapes["encoder_rows"] = (G, shape.input_rows, widths.inputs)
        shapes["decoder_rows"] = (G, shape.target_rows, widths.targets)
        shapes["cross_rows"] = (G, shape.target_rows, widths.cross)
    for name in ("input_tokens", "segment_ids"):
        shapes[f"encoder_{name}"] = (G, shape.inputs)
    if batches.starts is not None:
        shapes["decoder_reads"] = (G, shape.targets)
    for name in ("input_tokens", "segment_ids", "target_tokens", "task_ids"):
        shapes[f"decoder_{name}"] = (G, shape.targets)
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        for name, shape in shapes.items()
    }


class Planner:
    """Compiles the step of an experiment for batches of any size.

    Args:
      experiment: with a mesh.
      config: the student's, settled by the experiment.
      store: the tokens.
      devices: of the mesh, real, simulated or of a topology.
      num_steps: how many are laid out to see what batches need.
      cpu: whether it is CPUs that will take the step, not what they only compile for.
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
        together = experiment.data.one_encoder_pass and len(store.tasks) > 1
        self.starts = (0,) * len(store.tasks) if together else None  # any ids would do
        self.mesh = make_mesh(experiment.mesh, devices)
        self.optimizer = make_optimizer(experiment.optimizer, experiment.trainer.train_steps)
        self.shardings = state_shardings(config, self.optimizer, self.mesh, experiment.mesh)
        self.state = abstract_state(config, self.optimizer, self.shardings)
        self.unit = self.mesh.shape["data"] * experiment.microbatches
        self.tpu = devices[0].platform == "tpu"
        # Nothing will run: machine code need not be good. It has no part in the memory.
        self.options = None if self.tpu else {"xla_backend_optimization_level": 0}

    def batches(self, batch_size: int) -> Batches:
        """Returns the batches of the steps that are laid out."""
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

    def lower(self, batch: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Returns the step for an abstract batch, to be compiled."""
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

    def compile(self, batch_size: int) -> tuple[Memory, tuple[Exchange, ...] | None, float]:
        """Returns what a device needs and sends, and how long compiling took, in seconds.

        What it sends is None if the compiler refused, or gives no text of its program.
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
            found = compiled.memory_analysis()
        except JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            temporary = max(_wanted(str(error)) - sum(parts.values()), 0)
            return Memory(**parts, temporary=temporary, other=0), None, time.perf_counter() - began
        other = found.output_size_in_bytes - found.alias_size_in_bytes
        if self.tpu:  # it holds the program, too
            other += found.generated_code_size_in_bytes
        # A TPU pads arrays to tiles.
        other += max(found.argument_size_in_bytes - sum(parts.values()), 0)
        seconds = time.perf_counter() - began
        sent: tuple[Exchange, ...] | None = ()
        if self.mesh.size > 1 or self.cpu:  # else nothing is sent, and all is known
            try:
                text = compiled.as_text()
            except JaxRuntimeError:
                sent = None  # seen for XXL on 8 v5p: "async-update instruction should have ..."
            else:
                sent = exchanges(text, self.mesh.size)
                if self.cpu:
                    other += product_bytes(text)
        memory = Memory(**parts, temporary=found.temp_size_in_bytes, other=other)
        return memory, sent, seconds

    def work(self, batch_size: int) -> Work:
        """Returns what a step does, from the first STEPS."""
        batches = self.batches(batch_size)
        per_step = []
        for step in range(min(len(batches), STEPS)):
            inputs, targets, reads = batches.lengths(step)
            flops = useful_flops(self.config, inputs, targets, reads)
            per_step.append((inputs.sum(), targets.sum(), flops))
        mean = np.mean(per_step, axis=0)
        filled = batches[0]["encoder_segment_ids"].reshape(self.unit, -1).any(axis=1)
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
            empty_parts=self.unit - int(filled.sum()),
        )

    def largest(
        self, usable: float, known: dict[int, Memory], report: Callable[[str], None]
    ) -> int | None:
        """Returns the largest batch that fits, None if none does; adds what it compiled to `known`.

        Memory is nearly affine in the batch: the line through the two batches that came closest
        says which to try next.
        """
        for _ in range(COMPILATIONS):
            low = max((b for b, m in known.items() if m.total <= usable), default=0)
            high = min((b for b, m in known.items() if m.total > usable), default=math.inf)
            least = (low // self.unit + 1) * self.unit
            if least >= high or (low and known[low].total >= CLOSE * usable):
                break
            most = 16 * max(known) if high == math.inf else high - 1
            guess = int(_guess(usable * (1 + CLOSE) / 2, known) // self.unit) * self.unit
            guess = max(least, min(guess, int(most // self.unit) * self.unit))
            report(f"compiling a batch of {guess}")
            known[guess] = self.compile(guess)[0]
        return max((b for b, m in known.items() if m.total <= usable), default=None)


def _guess(wanted: float, known: dict[int, Memory]) -> float:
    """Returns the batch that should take some bytes, given what others took.

    Between two batches that is on their line. Beyond them the line says too much, as small batches
    leave room that larger ones use first: all that is temporary but the gradients is then taken to
    grow with the batch.
    """
    near = sorted(known, key=lambda batch: abs(known[batch].total - wanted))[:2]
    a = near[0]
    slope = max(known[a].temporary - known[a].parameters, known[a].temporary / 8) / a
    if len(near) == 2:
        line = (known[near[1]].total - known[a].total) / (near[1] - a)
        between = min(near) <= a + (wanted - known[a].total) / max(line, 1) <= max(near)
        slope = line if between else max(line, slope)
    return a + (wanted - known[a].total) / max(slope, 1)


def _wanted(message: str) -> int:
    """Returns the bytes, arguments counted, that a TPU compiler's message says it would need."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    return int(float(found[1]) * 2 ** (10 * "_KMGT".index(found[2]))) if found else 2**62


def _open_data(
    experiment: Experiment, config: T5Config, tokens: tuple[float, float] | None
) -> tuple[TokenStore, str, bool]:
    """Returns the tokens to plan with, where their lengths are from, and if they are the run's."""
    data = experiment.data
    there = data.root or data.dataset_path or os.environ.get("DSS_DATA_ROOT")
    if tokens is None and there and experiment.has_task and experiment.vocabulary:
        return training_store(experiment), f"{open_mixture(experiment).name}'s", True
    inputs, targets = tokens or (INPUTS_MEAN, TARGETS_MEAN)
    where = "as given" if tokens else "CQA's, assumed: no DATASET and METHOD with their data"
    return typical_store(config.vocab_size, inputs, targets), where, False


def _advice(experiment: Experiment, config: T5Config, planner: Planner, usable: float) -> tuple:
    """Returns what could make an experiment fit."""
    mesh = planner.mesh
    rules = dict(reversed(experiment.mesh.rules))
    state = planner.state
    arrays = jax.tree.leaves((state.params, state.params, state.opt_state))  # gradients, too
    whole = sum(x.size * x.dtype.itemsize for x in arrays)
    found = []
    if "embed" not in rules and mesh.shape["data"] > 1:
        layout = "fsdp" if mesh.shape["model"] == 1 else "two_d"
        found.append(f"split parameters over data too: --gin_file=layouts/{layout}.gin")
    if config.remat != "full":
        found.append("compute layers again backward: --gin.Experiment.remat=full")
    if config.dtype != "bfloat16":
        found.append("compute in bfloat16: --gin.Experiment.dtype=bfloat16")
    if experiment.optimizer.name != "adafactor":
        found.append("an optimizer of small state: --gin_file=runs/adafactor.gin")
    if experiment.batch_size > planner.unit:
        found.append(
            "more, smaller parts of a batch: "
            f"--gin.Experiment.microbatches={2 * experiment.microbatches}"
        )
    devices = int(np.ceil(whole / usable))
    if devices > mesh.size:
        found.append(
            f"more devices: parameters, gradients and moments, split evenly, take {devices} or more"
        )
    if not found:
        found.append("more devices along the mesh's model or data")
    return tuple(found)


def plan(
    experiment: Experiment,
    accelerator: str,
    *,
    mfu: float | None = None,
    tokens: tuple[float, float] | None = None,
    largest: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Returns what an experiment would need.

    Args:
      experiment: its mesh says how many devices there are along both axes.
      accelerator: v4, v5p, h100, h200, or cpu for simulated devices on this machine.
      mfu: share of the peak that useful operations reach; None: the accelerator's.
      tokens: mean tokens of an input and of a target, in place of the data's.
      largest: whether to look for the largest batch that fits, which compiles some more times.
      report: told what is being done, a line each.

    Raises:
      UserError: the experiment has no student or no mesh, or cannot be laid out so.
    """
    if experiment.config is None:
        raise UserError("no student: give --student=SIZE or --gin_file=students/SIZE.gin")
    mesh = experiment.mesh
    if mesh.data < 1:
        raise UserError("no mesh: give --mesh data=N,model=N, the devices of a run")
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
    share = mfu or chip.mfu
    computing = work.useful / (len(devices) * chip.flops[config.dtype] * share)
    reader = compiler
    if sent is None:
        cpus, reader = planned_devices(dataclasses.replace(chip, tpu=None), len(devices))
        report(f"compiling a batch of {experiment.batch_size} with {reader}, to see what is sent")
        sent = Planner(experiment, config, store, cpus, num_steps).compile(experiment.batch_size)[1]
        assert sent is not None
    sending = sending_seconds(sent, chip)
    step = (max(computing, sending), computing + sending)
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
        mfu=share,
        computing_seconds=computing,
        exchanges=sent,
        exchanges_compiler=reader,
        sending_seconds=sending,
        step_seconds=step,
        run_seconds=(step[0] * steps, step[1] * steps),
        largest_batch=best,
        largest_bytes=None if best is None else known[best].total,
        advice=() if fits else _advice(experiment, config, planner, chip.usable),
    )
