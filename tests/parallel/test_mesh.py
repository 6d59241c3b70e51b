import dataclasses

import jax
import numpy as np
import pytest

from dss.config.gin_files import parse_gin
from dss.errors import DssError
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import fetch, make_mesh, put_batch
from dss.paths import gin_root
from dss.runs.train import abstract_state
from dss.training.config import OptimizerConfig
from dss.training.optimizer import make_optimizer
from dss.training.step import state_shardings

SHARDS = {  # number of shards of a kernel on 8 devices
    "data_parallel": 1,
    "fsdp": 8,
    "tensor_parallel": 4,
    "two_d": 8,
}


def test_all_documented_layouts_exist():
    assert {path.stem for path in (gin_root() / "layouts").glob("*.gin")} == set(SHARDS)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("layout", SHARDS)
def test_a_layout_shards_parameters_and_optimizer_state(layout, optimizer):
    experiment = parse_gin(["students/base.gin", f"layouts/{layout}.gin"])
    update = make_optimizer(OptimizerConfig(name=optimizer), 10)
    mesh = make_mesh(experiment.mesh)
    shardings = state_shardings(experiment.student, update, mesh, experiment.mesh)
    state = abstract_state(experiment.student, update, shardings)

    def size(tree, *, device: bool) -> int:
        shapes = [
            x.sharding.shard_shape(x.shape) if device else x.shape for x in jax.tree.leaves(tree)
        ]
        return sum(int(np.prod(shape)) for shape in shapes)

    for part in (state.params, state):
        fraction = size(part, device=True) / size(part, device=False)
        assert fraction == pytest.approx(1 / SHARDS[layout], rel=0.05)


def test_the_model_axis_stays_in_one_tpu_slice():
    @dataclasses.dataclass(frozen=True)
    class Device:
        """The attributes of a device of a multislice TPU."""

        id: int
        slice_index: int
        process_index: int = 0
        platform: str = "cpu"
        device_kind: str = "cpu"

    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    grid = make_mesh(MeshConfig(data=4, model=2), devices).devices
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(DssError, match="data must be a multiple of 2"):
        make_mesh(MeshConfig(data=1, model=8), devices)


def test_rules_with_unknown_axes_are_errors():
    for rule in (("heds", "model"), ("heads", "modle")):
        with pytest.raises(ValueError, match="axes are"):
            MeshConfig(rules=(rule,))


def test_batches_that_are_not_divisible_by_the_mesh_are_replicated():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    for rows, num_shards in ((8, 4), (6, 1)):
        array = np.arange(rows * 3).reshape(rows, 3)
        placed = put_batch(mesh, array)
        assert len({str(s.index) for s in placed.addressable_shards}) == num_shards
        np.testing.assert_array_equal(fetch(placed), array)
