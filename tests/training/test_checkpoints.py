import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from orbax.checkpoint._src.serialization import replica_slices

from dss.errors import DssError
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.runs.train import abstract_state
from dss.student.network import abstract_params, init_params
from dss.training.checkpoints import Checkpoints, abstract_like, largest_part
from dss.training.config import OptimizerConfig
from dss.training.metrics import MetricsWriter, read_metrics
from dss.training.optimizer import make_optimizer
from dss.training.step import TrainState, init_state, state_shardings
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def state():
    optimizer = make_optimizer(OptimizerConfig(), 10)
    return init_state(init_params(tiny_config(), 0), optimizer)


def at(state: TrainState, step: int) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), state.params, state.opt_state)


def test_the_latest_two_and_the_best_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.5), (5, 0.2)):
        checkpoints.save(at(state, step), score)
        checkpoints.wait()
    assert checkpoints.steps == [2, 4, 5]
    assert (checkpoints.latest, checkpoints.best) == (5, 2)
    assert [checkpoints.find(name) for name in ("latest", "best", "4")] == [5, 2, 4]
    with pytest.raises(DssError, match=r"no checkpoint '3'; available: 2, 4, 5, latest, best"):
        checkpoints.find("3")
    checkpoints.close()


def test_single_arrays_of_a_checkpoint_can_be_read(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(state, 7), 0.5)
    checkpoints.wait()
    params = checkpoints.leaves(7, "params")
    assert len(params) == len(jax.tree.leaves(state.params))
    for path, wanted in jax.tree_util.tree_leaves_with_path(state.params)[::7]:
        found = params[tuple(p.key for p in path)]
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, wanted)
    assert any("mu" in path for path in checkpoints.leaves(7, "opt_state"))
    assert len(checkpoints.leaves(7, "no such item")) == 0
    with pytest.raises(KeyError):
        params["decoder", "none"]
    checkpoints.close()


def test_checkpoint_files_have_a_limited_size(tmp_path, state, monkeypatch):
    monkeypatch.setattr("dss.training.checkpoints.FILE_SIZE", 2**15)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(state, 7), 0.5)
    checkpoints.close()
    sizes = [path.stat().st_size for path in (tmp_path / "7" / "params").rglob("d/*")]
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert sum(sizes) > 2 * 2**15
    assert max(sizes) < 2**15 + largest


def test_writes_in_flight_are_limited_to_the_largest_shard(tmp_path, state, monkeypatch):
    config, mesh_config = tiny_config(), MeshConfig(data=4, model=2)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    shardings = state_shardings(config, optimizer, make_mesh(mesh_config), mesh_config)
    abstract = abstract_state(config, optimizer, shardings)
    split = jax.device_put(state, shardings)
    largest = largest_part(split)
    assert largest == largest_part(abstract)
    assert largest < largest_part(state) == max(x.nbytes for x in jax.tree.leaves(state))

    limits, handler = [], ocp.BasePyTreeCheckpointHandler
    monkeypatch.setattr(
        ocp,
        "BasePyTreeCheckpointHandler",
        lambda save_concurrent_bytes: (
            limits.append(save_concurrent_bytes)
            or handler(save_concurrent_bytes=save_concurrent_bytes)
        ),
    )
    checkpoints = Checkpoints(tmp_path, largest=largest)
    checkpoints.save(at(split, 7))
    checkpoints.wait()
    found = checkpoints.restore(7, abstract)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    checkpoints.close()
    assert set(limits) == {largest + 1}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_state_is_copied_to_the_host_array_by_array(tmp_path, state, monkeypatch, frozen):
    counts, transfer = [], replica_slices.transfer_arrays_to_host

    def spy(arrays, *args, **kwargs):
        counts.append(len(arrays))
        return transfer(arrays, *args, **kwargs)

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", spy)
    checkpoints = Checkpoints(tmp_path, largest=largest_part(state), frozen=frozen)
    checkpoints.save(TrainState(state.step, state.params, ()))
    checkpoints.close()
    arrays = len(jax.tree.leaves(state.params))
    assert counts == ([1] * arrays if frozen else [arrays])
    reader = Checkpoints(tmp_path, read_only=True)
    found = reader.restore_params(0, abstract(state.params))
    jax.tree.map(np.testing.assert_array_equal, found, state.params)
    reader.close()


def test_a_state_is_restored_bitwise_and_onto_another_mesh(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(state, 7), 0.5)
    checkpoints.wait()
    config, mesh_config = tiny_config(), MeshConfig(data=4, model=2)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    shardings = state_shardings(config, optimizer, make_mesh(mesh_config), mesh_config)
    found = checkpoints.restore(7, abstract_state(config, optimizer, shardings))
    assert int(found.step) == 7
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    checkpoints.close()


@pytest.fixture
def saved(tmp_path, state):
    """Checkpoints of steps 1 and 2 of a run; step 1 is the best."""
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((1, 0.9), (2, 0.5)):
        checkpoints.save(at(state, step), score)
    checkpoints.close()
    return tmp_path


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.mark.parametrize(("item", "name"), [("params", ""), ("opt_state", "1.0.mu.")])
def test_a_changed_element_makes_a_checkpoint_corrupt(saved, state, item, name):
    """TensorStore does not detect most flipped bits in its files."""
    kvstore = {"driver": "ocdbt", "base": f"file://{saved}/2/{item}"}
    kvstore["path"] = f"{name}encoder.layers.mlp_norm/"
    array = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
    array[1, 2].write(np.nextafter(array[1, 2].read().result(), 9)).result()
    checkpoints = Checkpoints(saved)
    if item == "params":
        message = "corrupt checkpoint: encoder/layers/mlp_norm differs from what was saved"
        with pytest.raises(DssError, match=message):
            checkpoints.restore_params(2, abstract(state.params))
        with pytest.raises(DssError, match=message):
            dict(checkpoints.leaves(2, "params"))
    found, corrupt = checkpoints.restore_newest(abstract(state))
    assert int(found.step) == 1
    assert "encoder/layers/mlp_norm differs from what was saved" in corrupt[2]
    assert (saved / "2.damaged").is_dir()
    checkpoints.close()


@pytest.mark.parametrize("content", ["", "[", "[]", '"x"', '{"a": ' * 100_000])
def test_corrupt_metadata_files_are_a_user_error(saved, state, content):
    (saved / "2" / "params" / "_METADATA").write_text(content)
    checkpoints = Checkpoints(saved, read_only=True)
    for read in (
        lambda: checkpoints.restore_params(2, abstract(state.params)),
        lambda: checkpoints.check_shapes(2, abstract(state.params)),
        lambda: checkpoints.leaves(2, "params"),
    ):
        with pytest.raises(DssError, match=r"2(/params)?: cannot be read: "):
            read()
    checkpoints.close()
    (saved / "2" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    with pytest.raises(DssError, match="cannot be read: maximum recursion"):
        Checkpoints(saved)


@pytest.mark.parametrize("content", ["", "3", '{"score": "0.9", "step": 1}', "[" * 100_000])
def test_a_score_that_cannot_be_read_is_ignored(saved, state, content):
    (saved / "1" / "metrics" / "metrics").write_text(content)
    checkpoints = Checkpoints(saved)
    assert checkpoints.best == 2
    assert int(checkpoints.restore(1, abstract(state)).step) == 1
    checkpoints.save(at(state, 3), 0.1)
    checkpoints.wait()
    assert checkpoints.steps == [2, 3]
    checkpoints.close()


@pytest.mark.parametrize("error", [PermissionError(13, "no"), ValueError("UNAVAILABLE: bucket")])
def test_transient_errors_do_not_make_a_checkpoint_corrupt(saved, state, error, monkeypatch):
    def fail(*_):
        raise error

    checkpoints = Checkpoints(saved)
    monkeypatch.setattr(checkpoints, "_read", fail)
    with pytest.raises(type(error)):
        checkpoints.restore_newest(abstract(state))
    assert checkpoints.steps == [1, 2]
    checkpoints.close()


def test_a_checkpoint_of_another_size_is_an_error(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(state, 1), 0.5)
    checkpoints.wait()
    shapes = abstract_params(tiny_config(d_model=32))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = abstract_like(shapes, jax.tree.map(lambda _: one, shapes))
    with pytest.raises(DssError, match="a checkpoint of another size: decoder/layers/"):
        checkpoints.restore_params(1, abstract)
    checkpoints.close()


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(DssError, match="no checkpoints"):
        Checkpoints(tmp_path / "none", read_only=True)


def test_metrics_resume_after_the_restored_step(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')  # killed while writing
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"train/loss": 30.0})
    writer.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_saving_a_step_again_while_it_is_written_keeps_its_score(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step, score in ((1, 0.2), (2, 0.9)):
        checkpoints.save(at(state, step), score)
    checkpoints.save(at(state, 2))  # as at the end of a run, right after its evaluation
    checkpoints.wait()
    assert checkpoints.best == 2
    checkpoints.close()
