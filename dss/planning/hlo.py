"""Analysis of compiled programs (HLO): collective communication, copies of CPU matrix products."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from dss.planning.hardware import Accelerator

__all__ = ["Collective", "collectives", "communication_seconds", "product_bytes"]

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
CALL = re.compile(r" (?:call|fusion|async-start)\(.*(?:to_apply|calls)=%?([\w.-]+)")
PRODUCT = re.compile(
    r" dot\(%[\w.-]+, %([\w.-]+)\), lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}"
)
# Computations of this name in TPU programs have an all-reduce whose result is then sliced. They are
# reduce-scatters.
REDUCE_SCATTER_PREFIX = "all-reduce-scatter"
# Replica groups have three notations: listed, {{0,2},{1,3}}; iota, [2,2]<=[2,2]T(1,0); mesh axes,
# mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}.
LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^]]+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collective communication of one kind, within one group of devices, in a train step.

    Attributes:
      kind: kind of collective, such as all-reduce.
      group: indices in the mesh of the devices of the first group.
      sent: bytes sent per device.
    """

    kind: str
    group: tuple[int, ...]
    sent: float


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """Returns the collective communication of a program, with ring algorithms, including loops.

    When n devices gather or scatter an array along a ring, each sends (n - 1) / n of it. An
    all-reduce is a reduce-scatter and an all-gather.

    Args:
      text: the compiled program of one device.
      devices: number of devices that run it; collectives without replica groups include them all.
    """
    computations = COMPUTATION.findall(text)
    bodies = {name: body for _, name, body in computations}

    @functools.cache
    def sent_bytes(name: str) -> dict[tuple[str, tuple[int, ...]], float]:
        sums: dict[tuple[str, tuple[int, ...]], float] = {}
        for line in bodies[name].splitlines():
            if match := COLLECTIVE.search(line):
                kind, group = match[2], _group(line, devices)
                sent = _sent(kind, match[1], bool(match[3]), len(group))
                if kind == "all-reduce" and name.startswith(REDUCE_SCATTER_PREFIX):
                    kind, sent = "reduce-scatter", sent / 2
                sums[kind, group] = sums.get((kind, group), 0) + sent
            callee, count = None, 1
            if loop := LOOP.search(line):
                callee, count = loop[2], _trip_count(line, bodies[loop[1]])
            elif call := CALL.search(line):
                callee = call[1]
            if callee:
                for key, sent in sent_bytes(callee).items():
                    sums[key] = sums.get(key, 0) + count * sent
        return sums

    (entry,) = (name for is_entry, name, _ in computations if is_entry)
    return tuple(
        Collective(kind=kind, group=group, sent=sent)
        for (kind, group), sent in sent_bytes(entry).items()
        if sent
    )


def communication_seconds(sent: Iterable[Collective], chip: Accelerator) -> float:
    """Returns the time of collectives that run one after the other at full bandwidth.

    The bandwidth is that of the network between machines if a group spans several.

    Args:
      sent: the collectives of a program.
      chip: the accelerator.
    """
    return sum(collective.sent / chip.bandwidth(collective.group) for collective in sent)


def product_bytes(text: str) -> int:
    """Returns the bytes of the largest matrix that a CPU's matrix products copy.

    The CPU's matrix libraries repack the whole right operand if an operand is transposed, and
    otherwise blocks of it. The compiler's memory analysis does not include these copies.

    Args:
      text: the compiled program of one device.
    """
    largest = 0
    for _, _, body in COMPUTATION.findall(text):
        results = dict(re.findall(r"%([\w.-]+) = (\w+\[[\d,]*\])", body))
        for right, *contracted in PRODUCT.findall(body):
            if contracted != ["1", "0"]:
                largest = max(largest, *_array_bytes(results[right]))
    return largest


def _array_bytes(result: str) -> list[int]:
    """Returns the sizes in bytes of the arrays of a result type."""
    return [
        _itemsize(dtype) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def _sent(kind: str, result: str, is_async: bool, n: int) -> float:
    """Returns the bytes that one of n devices sends for a collective.

    Args:
      kind: kind of collective.
      result: type of the result.
      is_async: whether it is the start of an asynchronous collective.
      n: number of devices in the group.
    """
    sizes = _array_bytes(result)
    if is_async and kind != "all-reduce":  # the result contains the operands, too
        sizes = sizes[:1] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
    factors = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return factors.get(kind, (n - 1) / n) * sum(sizes)


def _itemsize(dtype: str) -> int:
    """Returns the bytes per element of an HLO dtype, such as bf16."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1  # pred


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(shape: str, axes: str | None) -> np.ndarray:
    """Returns the device indices of an iota notation, such as [4,2]T(1,0)."""
    indices = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return indices.transpose(_integers(axes)) if axes else indices


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Returns the first replica group of a collective."""
    if match := LISTED_GROUPS.search(line):
        return tuple(_integers(match[1]))
    if match := IOTA_GROUPS.search(line):
        groups = _iota(match[2], match[3]).reshape(-1, int(match[1]))
        return tuple(groups[0].tolist())
    if match := MESH_GROUPS.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'", match[4])
        if ":" not in match[4]:  # a colon marks part of an axis: all devices are assumed
            indices = _iota(match[2] or str(devices), match[3])
            grid = indices.reshape(tuple(sizes.values()))
            first = grid[tuple(slice(None) if name in axes else 0 for name in sizes)]
            return tuple(sorted(first.ravel().tolist()))
    return tuple(range(devices))


def _trip_count(line: str, condition: str) -> int:
    """Returns a loop's trip count, from its metadata or the largest constant of its condition."""
    known = re.search(r"known_trip_count[^\d]*(\d+)", line)
    limits = re.findall(r"constant\((\d+)\)", condition)
    return int(known[1]) if known else max(map(int, limits), default=1)
