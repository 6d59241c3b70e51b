"""Writes small checkpoints in T5X's formats."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import serialization, traverse_util


def fixture_tensors(shared: Path) -> dict[str, np.ndarray]:
    """Returns the parameters of T5X's fixture by name, with dots between the levels."""
    folder = shared / "fixtures" / "t5x_tiny_v1_1" / "legacy" / "checkpoint_0"
    tensors = {}
    for path in folder.glob("target.*"):
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
        array = tensorstore.open(spec, read=True, open=True).result().read().result()
        tensors[path.name.removeprefix("target.")] = array
    return tensors


def write_legacy(
    folder: Path,
    tensors: dict[str, np.ndarray],
    rows: int = 16,
) -> Path:
    """Writes the legacy format: msgpack, and a zarr folder for each tensor.

    Args:
      folder: the folder to create.
      tensors: the tensors by name.
      rows: number of rows per chunk.
    """
    leaves = {}
    for name, array in tensors.items():
        shape = list(array.shape)
        kvstore = {"driver": "file", "path": f"target.{name}/"}
        chunks = [min(rows, shape[0]), *shape[1:]]
        metadata = {"chunks": chunks, "compressor": {"id": "gzip"}, "shape": shape}
        dtype = array.dtype.name
        spec = {"driver": "zarr", "dtype": dtype, "kvstore": kvstore, "metadata": metadata}
        leaves[name] = spec
        absolute_spec = spec | {"kvstore": kvstore | {"path": f"{folder}/target.{name}/"}}
        tensorstore.open(absolute_spec, create=True).result().write(array).result()
    target = traverse_util.unflatten_dict(leaves, sep=".")
    state = {"target": target, "state": {"step": np.int32(0)}}
    content = {"version": 3, "optimizer": state}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


def write_orbax(folder: Path, tensors: dict[str, np.ndarray], **options: bool) -> Path:
    """Writes the Orbax format; options are those of Orbax's PyTreeCheckpointHandler."""
    target = traverse_util.unflatten_dict(tensors, sep=".")
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        state = {"target": target, "state": {"step": np.int32(0)}}
        checkpointer.save(folder / "state", ocp.args.PyTreeSave(state))
    return folder
