import jax
import numpy as np
import pytest

from llm_jax import programs, sharding
from llm_jax.config import MeshConfig
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError


@pytest.fixture
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices())


def test_the_mesh_takes_all_devices(mesh):
    ones = dict.fromkeys(sharding.AXES, 1)
    assert dict(mesh.shape) == ones | {"data": 8}
    assert dict(sharding.make_mesh(MeshConfig(data=8), jax.devices()).shape) == ones | {"data": 8}
    assert dict(sharding.make_mesh(MeshConfig(), jax.devices()[:1]).shape) == ones
    several = MeshConfig(data=2, fsdp=-1, tensor=2)
    assert dict(sharding.make_mesh(several, jax.devices()).shape) == ones | {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), "mesh.data (3) must be the number of devices (8)"),
        (dict(fsdp=3), "mesh.fsdp (3) must divide the number of devices (8)"),
        (dict(fsdp=16), "mesh.fsdp (16) must divide the number of devices (8)"),
        (dict(data=1), "mesh.data (1) must be the number of devices (8)"),
        (dict(data=2, tensor=2), "mesh.data (2) x mesh.tensor (2) must be the number of devices (8)"),
    ],
)
def test_a_number_of_devices_that_is_not_there_is_an_error(sizes, message):
    with pytest.raises(InputError) as error:
        sharding.make_mesh(MeshConfig(**sizes), jax.devices())
    assert message in str(error.value) and "-1" in str(error.value)


def test_slices_divide_the_data_axis():
    made = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, num_slices=2), jax.devices())
    assert [[device.id for device in part.flat] for part in made.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sharding.make_mesh(MeshConfig(data=-1, fsdp=2, num_slices=4), jax.devices()).shape["data"] == 4
    for sizes in (dict(data=1, fsdp=-1), dict(data=2, fsdp=4, num_slices=4)):
        with pytest.raises(InputError, match=r"mesh.data \(\d\) must be a multiple of the slices \(.*mesh.data=\d"):
            sharding.make_mesh(MeshConfig(**dict(num_slices=2) | sizes), jax.devices())
    with pytest.raises(InputError, match=r"mesh.num_slices \(0\) must be 1 or more"):
        freeze(dict(mesh=dict(num_slices=0)))


@pytest.mark.parametrize(
    "sizes, changed, message",
    [
        (dict(fsdp=8), dict(n_embd=36, n_head=2), "model.n_embd (36) must be a multiple of mesh.fsdp (8)"),
        (dict(tensor=8), {}, "model.n_head (4) must be a multiple of mesh.tensor (8)"),
        (dict(tensor=4), dict(n_kv_head=2), "model.n_kv_head (2) must be a multiple of mesh.tensor (4)"),
        (dict(tensor=4), dict(mlp_dim=70), "model.mlp_dim (70) must be a multiple of mesh.tensor (4)"),
        (dict(tensor=4), dict(vocab_size=97), "model.vocab_size (97) must be a multiple of mesh.tensor (4)"),
        (dict(context=8), dict(block_size=60), "(60) must be a multiple of mesh.context (8)"),
        (dict(expert=8), dict(n_expert=4), "model.n_expert (4) must be a multiple of mesh.expert (8)"),
        (dict(expert=8), {}, "mesh.expert (8) needs a model with experts"),
    ],
)
def test_what_can_not_be_split_evenly_is_told_of_before_anything_is_made(sizes, changed, message):
    model = dict(n_embd=32, n_head=4, n_layer=1, block_size=64, vocab_size=96) | changed
    cfg = freeze(dict(model=model, mesh=sizes, train=dict(batch_size=16)))
    with pytest.raises(InputError) as error:
        programs.check_trainable(cfg, sharding.make_mesh(cfg.mesh, jax.devices()))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_several_runs_in_one_program_take_whole_models():
    cfg = freeze(dict(model=dict(vocab_size=96), mesh=dict(fsdp=8), train=dict(seeds=2)))
    with pytest.raises(InputError, match="train one run"):
        programs.check_trainable(cfg, sharding.make_mesh(cfg.mesh, jax.devices()))


def test_parameters_are_split_by_their_letters():
    letters = {
        "VD": ("tensor", "fsdp"),
        "LDNH": (None, "fsdp", "tensor", None),
        "LNHD": (None, "tensor", None, "fsdp"),
    }
    letters |= {"LEDF": (None, "expert", "fsdp", "tensor"), "LD": (), "D": (), "LDE": (), "LF": (None, "tensor")}
    for each, spec in letters.items():
        assert tuple(sharding.param_spec(each)) == spec


def test_a_micro_batch_divides_over_the_devices_or_is_an_error(mesh):
    sharding.check_batch(16, 2, mesh)
    with pytest.raises(InputError, match=r"12 / 1 = 12.*rows \(8\)"):
        sharding.check_batch(12, 1, mesh)
    with pytest.raises(InputError, match=r"16 / 4 = 4.*rows \(8\)"):
        sharding.check_batch(16, 4, mesh)


def test_a_batch_is_split_and_a_state_is_everywhere_whole(mesh):
    batch = np.arange(16 * 3).reshape(16, 3)
    split = jax.device_put(batch, sharding.split_batch(mesh))
    assert [shard.data.shape for shard in split.addressable_shards] == [(2, 3)] * 8
    whole = jax.device_put(batch, sharding.replicated(mesh))
    assert [shard.data.shape for shard in whole.addressable_shards] == [(16, 3)] * 8
    np.testing.assert_array_equal(split, batch)
