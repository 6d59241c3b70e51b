"""What accelerators offer, and devices to compile for where there are none."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dss.errors import UserError

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "find_accelerator",
    "matmul_peak",
    "planned_devices",
    "simulate_devices",
]

GIB = 2**30
MATRIX, ACCELERATOR_MATRIX = 2048, 8192  # side of the product that measures the peak
COPIED = 2**27  # bytes whose copy measures how fast simulated devices exchange
MOST_SIMULATED = 1024  # devices: a tiny student's plan took 2.3 minutes for as many (two cores)
DOUBLED = (0, 1, 2, 2, 1, 0, 2, 1, 0, 2)  # the sides of slices: 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device of some kind.

    Attributes:
      memory: of a device, bytes.
      usable: of these, what a program can have, bytes.
      reserve: why not all.
      flops: operations a second by compute dtype, at the peak.
      mfu: share of the peak that is assumed where none is given.
      links: what a device can send to those near it, bytes a second, all its links together.
      machine: how many devices its links reach; None for all of them.
      network: what a device can send to other machines, bytes a second.
      tpu: its name as a TPU topology; None for what is no TPU.
    """

    name: str
    memory: float
    usable: float
    reserve: str
    flops: dict[str, float]
    mfu: float
    links: float
    machine: int | None = None
    network: float = math.inf
    tpu: str | None = None

    def speed(self, group: Sequence[int]) -> float:
        """Returns the bytes a second at which a device sends to others of a group.

        Args:
          group: their places in the mesh, of which every `machine` are one machine.
        """
        if self.machine is None or len({place // self.machine for place in group}) == 1:
            return self.links
        return self.network


# JAX takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
# (docs.jax.dev, "GPU memory allocation").
GPU_SHARE = 0.75
GPU_RESERVE = "JAX takes 75% of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
TPU_RESERVE = "what the TPU's compiler lets a program have"

# Peaks and memory: cloud.google.com/tpu/docs/v4 and /v5p; NVIDIA's data sheets of the H100 SXM and
# the H200 SXM, without sparsity. In float32 JAX by default multiplies in one bfloat16 pass on a
# TPU, and in TensorFloat-32 on these GPUs. A TPU's usable memory is what its compiler says when a
# program is too large.
#
# Links, one way, as published, not measured: v4 has 6 of 50 GB/s (Jouppi et al. 2023,
# arXiv:2304.01433, table 4), v5p 1,200 GB/s both ways (cloud.google.com/tpu/docs/v5p), the GPUs
# 900 GB/s of NVLink both ways; NVIDIA's DGX H100 and H200, machines of 8, have 8 ports of 400 Gb/s.
ACCELERATORS = {
    "v4": Accelerator(
        name="v4",
        memory=32 * GIB,
        usable=30.75 * GIB,
        reserve=TPU_RESERVE,
        flops={"bfloat16": 275e12, "float32": 275e12},
        mfu=0.4,
        links=300e9,
        tpu="v4",
    ),
    "v5p": Accelerator(
        name="v5p",
        memory=95.73 * GIB,
        usable=95.73 * GIB,
        reserve=TPU_RESERVE,
        flops={"bfloat16": 459e12, "float32": 459e12},
        mfu=0.4,
        links=600e9,
        tpu="v5p",
    ),
    "h100": Accelerator(
        name="h100",
        memory=80e9,
        usable=80e9 * GPU_SHARE,
        reserve=GPU_RESERVE,
        flops={"bfloat16": 989e12, "float32": 494e12},
        mfu=0.4,
        links=450e9,
        machine=8,
        network=50e9,
    ),
    "h200": Accelerator(
        name="h200",
        memory=141e9,
        usable=141e9 * GPU_SHARE,
        reserve=GPU_RESERVE,
        flops={"bfloat16": 989e12, "float32": 494e12},
        mfu=0.4,
        links=450e9,
        machine=8,
        network=50e9,
    ),
}


def matmul_peak(dtype: str) -> float:
    """Returns the operations a second of a matrix product here, the best of five."""
    import jax
    import jax.numpy as jnp

    side = MATRIX if jax.default_backend() == "cpu" else ACCELERATOR_MATRIX
    a = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def _copy_rate() -> float:
    """Returns the bytes a second of a copy in this machine's memory, the best of five."""
    source = np.ones(COPIED, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return COPIED / min(times)


def _this_machine(devices: int) -> Accelerator:
    """Returns one of some simulated devices, which share this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Accelerator(
        name="cpu",
        memory=memory,
        usable=0.9 * memory,
        reserve="a tenth is left to the system",
        flops={dtype: matmul_peak(dtype) / devices for dtype in ("bfloat16", "float32")},
        mfu=0.45,  # measured, docs/performance.md
        links=_copy_rate() / devices,
    )


def find_accelerator(name: str, devices: int) -> Accelerator:
    """Returns the accelerator of a name; `cpu` is this machine, shared by some devices.

    Raises:
      UserError: there is none of that name.
    """
    if name == "cpu":
        return _this_machine(devices)
    if name not in ACCELERATORS:
        raise UserError(f"unknown accelerator {name!r}; known: {', '.join([*ACCELERATORS, 'cpu'])}")
    return ACCELERATORS[name]


def simulate_devices(number: int) -> None:
    """Has JAX run on simulated CPU devices alone; does nothing once JAX has been used.

    Raises:
      UserError: these are too many.
    """
    if number > MOST_SIMULATED:
        raise UserError(f"a mesh of {number:,} devices: at most {MOST_SIMULATED:,} are simulated")
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
        jax.config.update("jax_platforms", "cpu")


def planned_devices(accelerator: Accelerator, number: int) -> tuple[list[Any], str]:
    """Returns devices to compile for, and in words what compiles for them.

    For a TPU with libtpu installed they are those of a topology, which needs no TPU; otherwise
    simulated CPU devices, as many as JAX was told to make.

    Raises:
      UserError: there is no such topology, or there are too few simulated devices.
    """
    if accelerator.tpu and importlib.util.find_spec("libtpu"):
        return _tpus(accelerator.tpu, number), "the TPU's own compiler"
    import jax

    found = jax.devices("cpu")
    if len(found) < number:
        raise UserError(f"{number} devices are to be simulated and JAX has made {len(found)}")
    missing = " (with libtpu installed it would be the TPU's own)" if accelerator.tpu else ""
    return found[:number], f"the CPU's compiler, on simulated devices{missing}"


@functools.lru_cache(maxsize=4)
def _tpus(name: str, number: int) -> list[Any]:
    from jax.experimental import topologies

    doublings = number.bit_length() - 1
    if number != 2**doublings or doublings > len(DOUBLED):
        raise UserError(
            f"a mesh of {number} {name} chips: a slice has a power of two of them, up to "
            f"{2 ** len(DOUBLED)}"
        )
    sides = [2 ** DOUBLED[:doublings].count(axis) for axis in range(3)]
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{name}:{'x'.join(map(str, sides))}",
        chip_config_name="megacore",  # both cores of a chip are one device
        chips_per_host_bounds=(min(sides[0], 2), min(sides[1], 2), 1),
    ).devices
