"""The device mesh and how parameters and batches lie on it.

Each parameter dimension has a logical axis (`dss.student.network.logical_axes`); the rules say
which mesh axis, if any, a logical axis is split over. With the default rules `model` above 1 is
tensor parallelism; adding `("embed", "data")` shards parameters over `data` too (FSDP).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dss.errors import UserError
from dss.parallel.config import MeshConfig

__all__ = [
    "batch_sharding",
    "check_split",
    "fetch",
    "make_mesh",
    "opt_state_shardings",
    "param_shardings",
    "place",
    "put_batch",
    "replicated",
]

MOST_SHARDS = 256  # of one mesh axis, that an error suggests


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over some devices (all, by default), `model` innermost.

    Of several TPU slices each holds whole rows of `model`, so that only `data` crosses the network
    between them.

    Raises:
      UserError: the devices cannot be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.model if config.data == -1 else config.data
    if data * config.model != len(devices):
        raise UserError(
            f"a mesh of data={config.data}, model={config.model} does not use the "
            f"{len(devices)} devices exactly"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            (data, config.model), devices, allow_split_physical_axes=True
        )
    else:
        if data % slices:
            raise UserError(
                f"a mesh of data={data}, model={config.model} does not split into {slices} slices: "
                f"data must be a multiple of {slices}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, config.model), (slices, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def param_shardings(mesh: Mesh, config: MeshConfig, axes: Any, shapes: Any) -> Any:
    """Returns a `NamedSharding` for every parameter.

    Args:
      mesh: the mesh.
      config: its rules; for each logical axis the first rule counts.
      axes: tree of tuples of logical axis names, one name a dimension.
      shapes: the same tree, of arrays or `ShapeDtypeStruct`.

    Raises:
      UserError: a split dimension is not divisible by its number of shards.
    """
    rules = dict(reversed(config.rules))

    def sharding(names: tuple[str, ...], array: jax.ShapeDtypeStruct) -> NamedSharding:
        taken: list[str | None] = []
        for name, size in zip(names, array.shape, strict=True):
            where = rules.get(name)
            where = where if where and where not in taken and mesh.shape[where] > 1 else None
            if where:
                check_split(name, size, mesh, where)
            taken.append(where)
        return NamedSharding(mesh, PartitionSpec(*taken))

    return jax.tree.map(sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def check_split(name: str, size: int, mesh: Mesh, axis: str) -> None:
    """Raises UserError, with the numbers that would do, if a mesh axis does not divide a size."""
    if size % mesh.shape[axis]:
        divisors = [str(n) for n in range(1, min(size, MOST_SHARDS) + 1) if size % n == 0]
        raise UserError(
            f"{name} of size {size} cannot be split over the {mesh.shape[axis]} devices of mesh "
            f"axis {axis!r}; {', '.join(divisors)} would do"
        )


def opt_state_shardings(mesh: Mesh, opt_state: Any, params: Any, shardings: Any) -> Any:
    """Returns the optimizer state's shardings: a moment lies as its parameter does.

    A leaf belongs to the parameter whose path its own ends in. A moment has the parameter's
    shape; a factored statistic of Adafactor has it but for the axis that was averaged away, and
    lies as what is left. Everything else (counts, placeholders) is replicated.
    """

    def keys(path: tuple) -> tuple[str, ...]:
        return tuple(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey))

    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        keys(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True)
    }

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = keys(path)
        for start in range(len(names)):
            shape, spec = known.get(names[start:], (None, None))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
            if shape is not None:
                return NamedSharding(mesh, _factored(path, leaf.shape, shape, spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _factored(
    path: tuple, shape: tuple[int, ...], param: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    """Returns how a statistic of a parameter lies, given both shapes and how the parameter lies."""
    gone = [axis for axis in range(len(param)) if param[:axis] + param[axis + 1 :] == shape]
    if not gone:
        return PartitionSpec()
    # Of a square matrix either axis could be; optax averages the last one away for v_row.
    rows = jax.tree_util.GetAttrKey("v_row") in path
    axis = gone[-1] if rows else gone[0]
    return PartitionSpec(*spec[:axis], *spec[axis + 1 :])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows are split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array where a sharding says; every process has it whole, or as a `jax.Array`."""
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the batch on the mesh; every process gives the whole batch and keeps its part.

    Arrays whose rows do not divide over `data` lie whole on every device.
    """

    def put(array: np.ndarray) -> jax.Array:
        splits = len(array) % mesh.shape["data"] == 0
        return place(array, batch_sharding(mesh) if splits else replicated(mesh))

    return {name: put(array) for name, array in batch.items()}


def fetch(array: jax.Array) -> np.ndarray:
    """Returns an array's values, all of them in every process; every process must ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
