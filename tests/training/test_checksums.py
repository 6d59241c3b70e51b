import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dss.errors import DssError
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.training import checksums as module
from dss.training.checksums import check_sums, checksum, checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 7)])
def test_checksums_on_host_and_device_are_equal(monkeypatch, dtype, shape):
    monkeypatch.setattr(module, "HOST_BLOCK", 8)
    array = jnp.asarray(np.random.default_rng(0).normal(0, 30, shape), dtype)
    assert checksums({"a": [array]}) == {"a/0": checksum(np.asarray(array))}


def test_the_checksum_does_not_depend_on_the_sharding():
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    mesh = make_mesh(MeshConfig(data=4, model=2))
    split = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data", "model")))
    assert checksums({"a": split}) == checksums({"a": array})


def test_any_flipped_bit_and_swapped_elements_are_noticed():
    array = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    wanted = checksum(array)
    for bit in range(32):
        flipped = array.copy()
        flipped.view(np.uint32)[2, 1] ^= np.uint32(1 << bit)
        assert checksum(flipped) != wanted
    assert checksum(array[[0, 2, 1, 3]]) != wanted


def test_the_error_names_the_array():
    check_sums("run/7", {"a/b": 3}, {"a/b": 3, "c": 4})
    with pytest.raises(DssError, match="run/7: corrupt checkpoint: a/b differs from"):
        check_sums("run/7", {"a/b": 3}, {"a/b": 4})
    with pytest.raises(DssError, match="a/b"):
        check_sums("run/7", {"a/b": 3}, None)
