"""The device mesh, and the shardings of parameters, optimizer state and batches.

Each parameter dimension has a logical axis (`dss.student.network.logical_axes`). Sharding rules map
logical axes to mesh axes; other dimensions are replicated. With the default rules, `model` above 1
is tensor parallelism; the rule `("embed", "data")` also shards parameters over `data` (FSDP).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dss.errors import DssError
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

MAX_SUGGESTED = 256  # largest number of shards that an error message suggests


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh, with `model` as the innermost axis.

    Across TPU slices only `data` is split, so that `model` never crosses the network between them.

    Args:
      config: the mesh's size.
      devices: the devices to use; None: all of JAX's.

    Raises:
      DssError: if the mesh does not use the devices exactly, or does not split into TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // config.model if config.data == -1 else config.data
    if data * config.model != len(devices):
        raise DssError(
            f"a mesh of data={config.data}, model={config.model} does not use the "
            f"{len(devices)} devices exactly; set MeshConfig.data and MeshConfig.model so that "
            "their product is the number of devices"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            (data, config.model), devices, allow_split_physical_axes=True
        )
    else:
        if data % slices:
            raise DssError(
                f"a mesh of data={data}, model={config.model} does not split into {slices} TPU "
                f"slices: data must be a multiple of {slices}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, config.model), (slices, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def param_shardings(mesh: Mesh, config: MeshConfig, axes: Any, shapes: Any) -> Any:
    """Returns a tree of `NamedSharding`, one for each parameter.

    Args:
      mesh: the mesh.
      config: the sharding rules; the first rule of a logical axis applies.
      axes: tree of tuples of logical axis names, one name per dimension.
      shapes: tree of arrays or `ShapeDtypeStruct`, of the same structure.

    Raises:
      DssError: if a sharded dimension is not divisible by its number of shards.
    """
    rules = dict(reversed(config.rules))

    def sharding(names: tuple[str, ...], array: jax.ShapeDtypeStruct) -> NamedSharding:
        spec: list[str | None] = []
        for name, size in zip(names, array.shape, strict=True):
            axis = rules.get(name)
            if axis is not None and axis not in spec and mesh.shape[axis] > 1:
                check_split(name, size, mesh, axis)
                spec.append(axis)
            else:
                spec.append(None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def check_split(name: str, size: int, mesh: Mesh, axis: str) -> None:
    """Checks that the size of a mesh axis divides the size of a dimension.

    Raises:
      DssError: if it does not; the message lists sizes that would.
    """
    if size % mesh.shape[axis]:
        divisors = [str(n) for n in range(1, min(size, MAX_SUGGESTED) + 1) if size % n == 0]
        raise DssError(
            f"{name} of size {size} cannot be sharded over the {mesh.shape[axis]} devices of mesh "
            f"axis {axis!r}; set MeshConfig.{axis} to one of {', '.join(divisors)}"
        )


def opt_state_shardings(mesh: Mesh, opt_state: Any, params: Any, shardings: Any) -> Any:
    """Returns the shardings of the optimizer state: moments are sharded like their parameters.

    A leaf belongs to the parameter whose path is a suffix of the leaf's path. A moment has the
    parameter's shape and sharding. A factored statistic of Adafactor lacks the axis that was
    averaged away, and is sharded like the remaining axes. All other leaves (counts, placeholders)
    are replicated.

    Args:
      mesh: the mesh.
      opt_state: tree of arrays or `ShapeDtypeStruct`.
      params: tree of the parameters, arrays or `ShapeDtypeStruct`.
      shardings: tree of the parameters' shardings.
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
    """Returns the partition spec of a factored statistic of a parameter.

    Args:
      path: path of the statistic in the optimizer state.
      shape: shape of the statistic.
      param: shape of the parameter.
      spec: partition spec of the parameter.
    """
    dropped = [axis for axis in range(len(param)) if param[:axis] + param[axis + 1 :] == shape]
    if not dropped:
        return PartitionSpec()
    # The shape is ambiguous for a square matrix; optax averages the last axis away for v_row.
    is_v_row = jax.tree_util.GetAttrKey("v_row") in path
    axis = dropped[-1] if is_v_row else dropped[0]
    return PartitionSpec(*spec[:axis], *spec[axis + 1 :])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first axis of each array is sharded over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array with a sharding.

    Args:
      array: a `jax.Array`, or a host array that every process has in full.
      sharding: the sharding of the result.
    """
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Returns a batch on the mesh.

    Arrays are sharded over `data`, or replicated if their first axis is not divisible by its size.

    Args:
      mesh: the mesh.
      batch: tree of host arrays; the whole batch, in every process.
    """

    def put(array: np.ndarray) -> jax.Array:
        divisible = len(array) % mesh.shape["data"] == 0
        return place(array, batch_sharding(mesh) if divisible else replicated(mesh))

    return jax.tree.map(put, batch)


def fetch(array: jax.Array) -> np.ndarray:
    """Returns all values of an array as a host array. Every process must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
