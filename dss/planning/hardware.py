"""Memory, FLOP/s and bandwidths of accelerators, and devices to compile for without them."""

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

from dss.errors import DssError

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "find_accelerator",
    "matmul_peak",
    "planned_devices",
    "simulate_devices",
]

GIB = 2**30
CPU_SIDE, ACCELERATOR_SIDE = 2048, 8192  # sides of the square matrices that measure the peak FLOP/s
COPY_BYTES = 2**27  # size of the copy that measures the bandwidth between simulated devices
MAX_SIMULATED = 1024  # devices; compiling for so many takes minutes, even for a tiny student
# The axis that doubles with each doubling of a TPU slice: 1x1x1, 2x1x1, 2x2x1, 2x2x2, 2x2x4, ...
DOUBLED_AXES = (0, 1, 2, 2, 1, 0, 2, 1, 0, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Properties of a kind of device.

    Attributes:
      name: name of the accelerator.
      memory: memory of a device in bytes.
      usable: memory available to a program in bytes.
      reserve: reason why not all memory is usable.
      flops: peak FLOP/s by compute dtype.
      mfu: default model FLOPs utilization, as a fraction of the peak.
      links: outgoing bandwidth of a device within a machine, over all its links, in bytes/s.
      machine: number of devices per machine; None: all devices are connected by links.
      network: outgoing bandwidth of a device between machines in bytes/s.
      tpu: name of the TPU topology; None for other devices.
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

    def bandwidth(self, group: Sequence[int]) -> float:
        """Returns the bandwidth in bytes/s at which a device sends within a group of devices.

        Args:
          group: indices of the devices in the mesh; `machine` consecutive ones are one machine.
        """
        if self.machine is None or len({index // self.machine for index in group}) == 1:
            return self.links
        return self.network


# JAX preallocates three quarters of a GPU's memory by default (docs.jax.dev, "GPU memory
# allocation").
GPU_FRACTION = 0.75
GPU_RESERVE = "JAX preallocates 75%; change it with XLA_PYTHON_CLIENT_MEM_FRACTION"
TPU_RESERVE = "limit of the TPU's compiler"

# Peak FLOP/s and memory: cloud.google.com/tpu/docs/v4 and /v5p; NVIDIA's data sheets of the H100
# SXM and the H200 SXM, without sparsity. JAX's default precision multiplies float32 in one bfloat16
# pass on a TPU, and in TensorFloat-32 on these GPUs. The usable memory of a TPU is the limit in its
# compiler's out-of-memory errors.
#
# Bandwidths, one way, published, not measured: v4 has 6 links of 50 GB/s (Jouppi et al. 2023,
# arXiv:2304.01433, table 4); v5p has 1,200 GB/s both ways (cloud.google.com/tpu/docs/v5p); the GPUs
# have 900 GB/s of NVLink both ways. NVIDIA's DGX H100 and H200, machines of 8, have 8 ports of
# 400 Gb/s.
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
        usable=80e9 * GPU_FRACTION,
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
        usable=141e9 * GPU_FRACTION,
        reserve=GPU_RESERVE,
        flops={"bfloat16": 989e12, "float32": 494e12},
        mfu=0.4,
        links=450e9,
        machine=8,
        network=50e9,
    ),
}


def matmul_peak(dtype: str) -> float:
    """Returns the FLOP/s of a matrix product on JAX's default device, the best of five."""
    import jax
    import jax.numpy as jnp

    side = CPU_SIDE if jax.default_backend() == "cpu" else ACCELERATOR_SIDE
    a = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def _copy_bandwidth() -> float:
    """Returns the bandwidth in bytes/s of a copy in this machine's memory, the best of five."""
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return COPY_BYTES / min(times)


def _this_machine(devices: int) -> Accelerator:
    """Returns the properties of one of `devices` simulated devices, which share this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Accelerator(
        name="cpu",
        memory=memory,
        usable=0.9 * memory,
        reserve="10% is left to the system",
        flops={dtype: matmul_peak(dtype) / devices for dtype in ("bfloat16", "float32")},
        mfu=0.45,  # measured, docs/performance.md
        links=_copy_bandwidth() / devices,
    )


def find_accelerator(name: str, devices: int) -> Accelerator:
    """Returns the accelerator with a name.

    Args:
      name: a key of `ACCELERATORS`, or "cpu" for simulated devices on this machine.
      devices: number of devices, which share this machine if it is "cpu".

    Raises:
      DssError: if the name is unknown.
    """
    if name == "cpu":
        return _this_machine(devices)
    if name not in ACCELERATORS:
        raise DssError(f"unknown accelerator {name!r}; known: {', '.join([*ACCELERATORS, 'cpu'])}")
    return ACCELERATORS[name]


def simulate_devices(number: int) -> None:
    """Makes JAX use simulated CPU devices only. Has no effect once JAX has created its devices.

    Args:
      number: number of simulated devices.

    Raises:
      DssError: if there are more than `MAX_SIMULATED`.
    """
    if number > MAX_SIMULATED:
        raise DssError(f"a mesh of {number:,} devices: at most {MAX_SIMULATED:,} are simulated")
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
        jax.config.update("jax_platforms", "cpu")


def planned_devices(accelerator: Accelerator, number: int) -> tuple[list[Any], str]:
    """Returns the devices to compile for, and a description of their compiler.

    The devices are those of a TPU topology, which needs no TPU, if the accelerator is a TPU and
    libtpu is installed; otherwise simulated CPU devices (see `simulate_devices`).

    Args:
      accelerator: the accelerator.
      number: number of devices.

    Raises:
      DssError: if there is no such topology, or there are fewer simulated devices.
    """
    if accelerator.tpu and importlib.util.find_spec("libtpu"):
        return _tpus(accelerator.tpu, number), "the TPU's own compiler"
    import jax

    devices = jax.devices("cpu")
    if len(devices) < number:
        raise DssError(
            f"cannot plan for {number} devices: JAX has already created {len(devices)}; plan in a "
            "new process"
        )
    hint = " (install libtpu to use the TPU's own)" if accelerator.tpu else ""
    return devices[:number], f"the CPU's compiler, on simulated devices{hint}"


@functools.lru_cache(maxsize=4)
def _tpus(name: str, number: int) -> list[Any]:
    from jax.experimental import topologies

    doublings = number.bit_length() - 1
    if number != 2**doublings or doublings > len(DOUBLED_AXES):
        raise DssError(
            f"a mesh of {number} {name} chips: the number must be a power of two, up to "
            f"{2 ** len(DOUBLED_AXES)}"
        )
    sides = [2 ** DOUBLED_AXES[:doublings].count(axis) for axis in range(3)]
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{name}:{'x'.join(map(str, sides))}",
        chip_config_name="megacore",  # the two cores of a chip are one device
        chips_per_host_bounds=(min(sides[0], 2), min(sides[1], 2), 1),
    ).devices
