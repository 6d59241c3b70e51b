"""What a step's compiled program says: what devices send each other, and how long that takes; what
a CPU's products of matrices take besides.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from dss.planning.hardware import Accelerator

__all__ = ["Exchange", "exchanges", "product_bytes", "sending_seconds"]

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
EXCHANGE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
CALL = re.compile(r" (?:call|fusion|async-start)\(.*(?:to_apply|calls)=%?([\w.-]+)")
PRODUCT = re.compile(
    r" dot\(%[\w.-]+, %([\w.-]+)\), lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}"
)
# A TPU's computation of this name has an all-reduce of which a device keeps its part alone.
SCATTERED = "all-reduce-scatter"
# Groups are written out, {{0,2},{1,3}}, or count through an array, [2,2]<=[2,2]T(1,0), or are along
# axes of one, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}.
WRITTEN = re.compile(r"replica_groups=\{\{([\d,]+)\}")
COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
ALONG = re.compile(
    r"replica_groups=mesh\[([^]]+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """All that a step exchanges in one way among the same devices.

    Attributes:
      kind: the operation, such as all-reduce.
      group: the devices that exchange, by their places in the mesh; the first of the groups.
      sent: bytes that each of them sends.
    """

    kind: str
    group: tuple[int, ...]
    sent: float


def exchanges(text: str, devices: int) -> tuple[Exchange, ...]:
    """Returns what a device sends in a program, along rings, every pass of a loop counted.

    Of an array that n devices gather or scatter along a ring each sends (n - 1) / n; an all-reduce
    is a scatter and a gather.

    Args:
      text: the compiled program of one device.
      devices: how many run it: exchanges that name no group are among all of them.
    """
    found = COMPUTATION.findall(text)
    bodies = {name: body for _, name, body in found}

    @functools.cache
    def of(name: str) -> dict[tuple[str, tuple[int, ...]], float]:
        sums: dict[tuple[str, tuple[int, ...]], float] = {}
        for line in bodies[name].splitlines():
            if exchange := EXCHANGE.search(line):
                kind, group = exchange[2], _group(line, devices)
                sent = _sent(kind, exchange[1], bool(exchange[3]), len(group))
                if kind == "all-reduce" and name.startswith(SCATTERED):
                    kind, sent = "reduce-scatter", sent / 2
                sums[kind, group] = sums.get((kind, group), 0) + sent
            inner, times = None, 1
            if loop := LOOP.search(line):
                inner, times = loop[2], _passes(line, bodies[loop[1]])
            elif call := CALL.search(line):
                inner = call[1]
            if inner:
                for key, sent in of(inner).items():
                    sums[key] = sums.get(key, 0) + times * sent
        return sums

    (entry,) = (name for is_entry, name, _ in found if is_entry)
    return tuple(
        Exchange(kind=kind, group=group, sent=sent)
        for (kind, group), sent in of(entry).items()
        if sent
    )


def sending_seconds(sent: Iterable[Exchange], chip: Accelerator) -> float:
    """Returns how long a device sends, one exchange after the other, at its links' full speed.

    What goes along a ring that leaves a machine is sent at the speed of the network between them.
    """
    return sum(exchange.sent / chip.speed(exchange.group) for exchange in sent)


def product_bytes(text: str) -> int:
    """Returns the bytes of the largest matrix that a CPU's products copy to multiply by it.

    The compiler's own plan leaves them out. The libraries that multiply order the right side anew
    where either side is transposed; plain ones they take piece by piece.

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
    """Returns the bytes of each of the arrays of a result."""
    return [
        _width(number) * math.prod(int(size) for size in shape.split(",") if size)
        for number, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def _sent(kind: str, result: str, starts: bool, n: int) -> float:
    """Returns the bytes that one of n devices sends for an operation with some result."""
    sizes = _array_bytes(result)
    if starts and kind != "all-reduce":  # the operands, too, are among its results
        sizes = sizes[:1] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
    parts = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return parts.get(kind, (n - 1) / n) * sum(sizes)


def _width(number: str) -> int:
    """Returns the bytes of a type of numbers, such as bf16."""
    bits = re.search(r"\d+", number)
    return int(bits[0]) // 8 if bits else 1  # pred


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _in_order(shape: str, axes: str | None) -> np.ndarray:
    """Returns the devices as [4,2]T(1,0) lays them out."""
    places = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return places.transpose(_numbers(axes)) if axes else places


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Returns the first group of devices of an exchange."""
    if found := WRITTEN.search(line):
        return tuple(_numbers(found[1]))
    if found := COUNTED.search(line):
        places = _in_order(found[2], found[3]).reshape(-1, int(found[1]))
        return tuple(places[0].tolist())
    if found := ALONG.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = re.findall(r"'(\w+)'", found[4])
        if ":" not in found[4]:  # else along a part of an axis
            places = _in_order(found[2] or str(devices), found[3])
            grid = places.reshape(tuple(sizes.values()))
            first = grid[tuple(slice(None) if name in along else 0 for name in sizes)]
            return tuple(sorted(first.ravel().tolist()))
    return tuple(range(devices))


def _passes(line: str, condition: str) -> int:
    """Returns how often a loop's body runs: as the line says, or what its condition counts to."""
    known = re.search(r"known_trip_count[^\d]*(\d+)", line)
    limits = re.findall(r"constant\((\d+)\)", condition)
    return int(known[1]) if known else max(map(int, limits), default=1)
