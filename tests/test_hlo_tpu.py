"""Costs of programs that libtpu compiles for chips that are not here, against closed forms.

libtpu is wanted in an environment of its own, as tests/test_tpu.py says.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import config, data, hlo_cost, hlo_memory, kernel_flops, planning, programs, sharding
from llm_jax.config_file import load_file
from llm_jax.config_rules import freeze
from llm_jax.model import train_flops_per_token

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu not installed", allow_module_level=True)

SMALL = Path(__file__).parents[1] / "configs" / "small.py"
LAYERS = 4


@pytest.fixture(scope="module")
def devices():
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def fsdp_step(devices, width, hidden, rows, dtype):
    """A training step of two-layer MLPs in a scan, their weights and rows split over all devices."""
    mesh = Mesh(np.array(devices), ("data",))

    def placed(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    weights = {
        "up": placed((LAYERS, width, hidden), jnp.float32, None, "data"),
        "down": placed((LAYERS, hidden, width), jnp.float32, None, None, "data"),
    }
    x = placed((rows, 128, width), dtype, "data")

    def loss(weights, x):
        def layer(x, w):
            with jax.named_scope("mlp"):
                y = x + jax.nn.relu(x @ w["up"].astype(dtype)) @ w["down"].astype(dtype)
            return jax.lax.with_sharding_constraint(y, x_sharding), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def step(weights, x):
        nats, gradient = jax.value_and_grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient), nats

    x_sharding = x.sharding
    placement = ({name: w.sharding for name, w in weights.items()}, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(step, donate_argnums=0, out_shardings=placement).lower(weights, x).compile()


def mlp_flops(rows, width, hidden):
    """Seven products: two forward, the first of them again, four backward."""
    return LAYERS * 7 * 2 * rows * 128 * width * hidden


def test_gathered_weights_and_scattered_gradients(devices):
    width, hidden, rows = 512, 2048, 32
    found = hlo_cost.analyse(fsdp_step(devices, width, hidden, rows, jnp.float32).as_text())
    assert found.flops_of == {"mlp": mlp_flops(rows, width, hidden) / 8}
    assert [loop.turns for loop in found.loops] == [LAYERS, LAYERS]
    by_kind = {}
    for each in found.collectives:
        by_kind[each.kind] = by_kind.get(each.kind, 0) + each.times * hlo_cost.link_bytes(each)
        assert (each.group_size, each.num_groups) == (8, 1)
    sent = LAYERS * width * hidden * 7 / 8
    # Both weights are gathered forward and backward, in bfloat16, which products of float32 are rounded to.
    assert by_kind["all-gather"] == 4 * 2 * sent
    assert by_kind["reduce-scatter"] == 2 * 4 * sent
    assert by_kind["all-reduce"] == 2 * 4 * 7 / 8  # the loss


def test_weights_that_go_round_while_they_are_multiplied(devices):
    width, hidden, rows = 1024, 4096, 64
    found = hlo_cost.analyse(fsdp_step(devices, width, hidden, rows, jnp.bfloat16).as_text())
    assert found.flops == mlp_flops(rows, width, hidden) / 8
    assert not found.unknown_loops and len(found.loops) > 2
    assert sum(each.kind == "collective-permute" for each in found.collectives) > 8
    sent = sum(each.times * hlo_cost.link_bytes(each) for each in found.collectives)
    whole = LAYERS * width * hidden * 2 * 7 / 8
    # Four times gathered, twice scattered; that in both directions at once takes a step more.
    assert 6 * whole <= sent < 1.3 * 6 * whole


def test_temporary_memory_is_what_the_compiler_says(devices):
    compiled = fsdp_step(devices, 4096, 16384, 1024, jnp.bfloat16)
    arrays = hlo_memory.at_peak(compiled.as_text())
    total = planning.temporary_bytes(compiled)
    assert total > 8 * 128 * 2**20  # far more than VMEM holds
    assert sum(array.bytes for array in arrays) == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("layer_execution, remat", [("scan", "none"), ("unrolled", "none"), ("scan", "block")])
def test_training_step(devices, layer_execution, remat):
    """Of configs/small.py: 6 flops a weight and token, and Muon's, on each device its own."""
    cfg = freeze(load_file(str(SMALL)))
    model = dataclasses.replace(
        cfg.model, vocab_size=cfg.data.vocab_size, layer_execution=layer_execution, remat=remat
    )
    cfg = dataclasses.replace(cfg, model=model, train=dataclasses.replace(cfg.train, batch_size=16))
    mesh = sharding.make_mesh(config.MeshConfig(), devices)
    init, step, *_ = programs.make_programs(cfg, mesh, np.ones(model.vocab_size, np.int32))
    placed = lambda where, tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
    state = placed(sharding.replicated(mesh), jax.eval_shape(init))
    batch = data.Batch(*(jax.ShapeDtypeStruct((16, 256), dtype) for dtype in (np.int32, np.int32, np.float32)))
    text = step.lower(state, placed(sharding.split_batch(mesh), batch)).compile().as_text()
    found = hlo_cost.analyse(text, module_of=functools.partial(hlo_cost.module_name, names=("attn", "mlp")))
    assert not found.unknown_loops
    every = hlo_cost.analyse(text, custom_call_flops=kernel_flops.KernelFlops(model))
    tokens, width = 2 * 256, model.n_embd
    projections = 2 * tokens * 4 * width**2 * model.n_layer
    matrix = 2 * tokens * width * model.mlp_dim * model.n_layer
    again = remat == "block"  # all but the last product of a block
    orthogonal = lambda small, large: 4 * small**2 * large + 9 * 2 * small**3
    muon = model.n_layer * (4 * model.n_head * orthogonal(16, width) + 3 * orthogonal(width, model.mlp_dim))
    expected = {
        "attn": (3 + again) * projections,
        "mlp": 3 * 3 * matrix + again * 2 * matrix,
        "other": 3 * 2 * tokens * width * model.vocab_size + muon,
    }
    assert found.flops_of == pytest.approx(expected, rel=1e-6)
    # Attention's products: two forward, three for dq and four for dk and dv, of whole blocks of 256 by 256.
    product = 2 * tokens * 256 * width * model.n_layer
    assert every.flops - found.flops == (2 * (1 + again) + 3 + 4) * product
    # With what is named above, the formula of `model` in which attention is causal: six products, by half.
    named = projections + 2 * matrix + 2 * product if again else 0
    once = train_flops_per_token(model, 256) * tokens - 6 * product / 2 + 9 * product + muon
    assert every.flops == pytest.approx(once + named, rel=0.02)
    kernels = {}
    for call in found.custom_calls:
        name = call.instruction.name.split(".")[0]
        kernels[name] = kernels.get(name, 0) + call.times
    assert kernels == {
        "splash_mha_fwd_residuals": model.n_layer * (1 + again),
        "splash_mha_dq_no_residuals": model.n_layer,
        "splash_mha_dkv_no_residuals": model.n_layer,
    }
