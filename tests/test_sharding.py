import jax
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.config import MeshConfig
from llm_jax.errors import InputError


@pytest.fixture
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices())


def test_the_mesh_takes_all_devices(mesh):
    assert dict(mesh.shape) == {"data": 8}
    assert dict(sharding.make_mesh(MeshConfig(data=8), jax.devices()).shape) == {"data": 8}
    assert dict(sharding.make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1}


def test_a_number_of_devices_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match=r"mesh.data \(3\).*\(8\).*-1"):
        sharding.make_mesh(MeshConfig(data=3), jax.devices())


def test_a_micro_batch_divides_over_the_devices_or_is_an_error(mesh):
    sharding.check_batch(16, 2, mesh)
    with pytest.raises(InputError, match=r"12 / 1 = 12.*devices \(8\)"):
        sharding.check_batch(12, 1, mesh)
    with pytest.raises(InputError, match=r"16 / 4 = 4.*devices \(8\)"):
        sharding.check_batch(16, 4, mesh)


def test_a_batch_is_split_and_a_state_is_everywhere_whole(mesh):
    batch = np.arange(16 * 3).reshape(16, 3)
    split = jax.device_put(batch, sharding.split_batch(mesh))
    assert [shard.data.shape for shard in split.addressable_shards] == [(2, 3)] * 8
    whole = jax.device_put(batch, sharding.replicated(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(16, 3)] * 8
    np.testing.assert_array_equal(split, batch)
