"""Configuration of the device mesh and of the sharding rules."""

import dataclasses

from dss.errors import ConfigError
from dss.fields import check_types
from dss.student.config import AXES

__all__ = ["DEFAULT_RULES", "LOGICAL_AXES", "MeshConfig"]

DEFAULT_RULES = (("vocab", "model"), ("heads", "model"), ("mlp", "model"))
LOGICAL_AXES = {"layers"} | {name for names in AXES.values() for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """A mesh of `data` x `model` devices, and the sharding rules of parameters."""

    data: int = -1  # shards of the batch; -1: the number of devices / `model`
    model: int = 1  # shards of each layer
    rules: tuple[tuple[str, str], ...] = DEFAULT_RULES  # (logical axis, mesh axis) pairs

    def __post_init__(self) -> None:
        check_types(self)
        if self.model < 1 or (self.data < 1 and self.data != -1):
            raise ConfigError(f"a mesh of data={self.data}, model={self.model} has no devices")
        for axis, mesh_axis in self.rules:
            rule = f"sharding rule {axis!r} -> {mesh_axis!r}"
            if axis not in LOGICAL_AXES:
                known = ", ".join(sorted(LOGICAL_AXES))
                raise ConfigError(
                    f"{rule}: unknown logical axis {axis!r}; logical axes are {known}"
                )
            if mesh_axis not in ("data", "model"):
                raise ConfigError(
                    f"{rule}: unknown mesh axis {mesh_axis!r}; mesh axes are 'data' and 'model'"
                )
