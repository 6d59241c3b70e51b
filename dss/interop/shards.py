"""Writes safetensors files of limited size, one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dss.interop.huggingface import INDEX

__all__ = ["write_shards"]

LIMIT = 5 * 10**9  # bytes per file, as is usual on the hub
DTYPES = {"float32": "F32"}


def _plan(like: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    """Returns the names of the tensors of each file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, array in like.items():
        if files[-1] and size + array.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += array.nbytes
    return files


def _header(like: Mapping[str, np.ndarray], names: list[str]) -> bytes:
    """Returns the header of a file: the length of a JSON text in 8 bytes, then the text."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + like[name].nbytes
        dtype, shape = DTYPES[like[name].dtype.name], list(like[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path,
    like: Mapping[str, np.ndarray],
    tensors: Iterable[tuple[str, np.ndarray]],
    limit: int = LIMIT,
) -> None:
    """Writes `model.safetensors`, or several files and their index.

    Args:
      folder: the folder to write into.
      like: arrays of each tensor's shape and dtype, float32, in the order of `tensors`.
      tensors: (name, tensor) pairs; each tensor is written before the next is read.
      limit: maximum bytes of tensors per file, exceeded by a single larger tensor only.
    """
    plan, rest = _plan(like, limit), iter(tensors)
    files = {
        "model.safetensors"
        if len(plan) == 1
        else f"model-{k + 1:05d}-of-{len(plan):05d}.safetensors": names
        for k, names in enumerate(plan)
    }
    for file, names in files.items():
        with (folder / file).open("wb") as out:
            out.write(_header(like, names))
            for expected in names:
                name, tensor = next(rest)
                if name != expected or tensor.shape != like[name].shape:
                    raise ValueError(
                        f"expected {expected} {like[expected].shape}, got {name} {tensor.shape}"
                    )
                out.write(np.ascontiguousarray(tensor, like[name].dtype).data)
    if len(files) > 1:
        size = sum(array.nbytes for array in like.values())
        file_of = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
