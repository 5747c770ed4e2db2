"""The programs of configs/small.py compile for Colab's TPU chip on a machine that has none.

libtpu is wanted in an environment of its own (`pip install '.[tpu,test]'`, JAX_PLATFORMS=cpu): beside a CPU jax it
changes what jax.devices() tries first. Not marked slow, though it takes minutes: elsewhere it is skipped at once.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from llm_jax import (
    chips,
    data,
    decode_weights,
    engine,
    generate,
    hlo,
    model,
    planning,
    planning_decode,
    programs,
    sharding,
)
from llm_jax.config import MeshConfig
from llm_jax.config_file import load_file
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu not installed", allow_module_level=True)

SMALL = Path(__file__).parents[1] / "configs" / "small.py"
HBM_BYTES = 16 * 2**30  # of a v5e chip


@pytest.fixture(scope="module")
def mesh():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    return sharding.make_mesh(MeshConfig(), topology.devices)


@pytest.fixture(scope="module")
def cfg():
    frozen = freeze(load_file(str(SMALL)))
    return dataclasses.replace(frozen, model=dataclasses.replace(frozen.model, vocab_size=frozen.data.vocab_size))


@pytest.fixture(scope="module")
def compiled(cfg, mesh):
    return programs.make_programs(cfg, mesh, np.ones(cfg.model.vocab_size, np.int32))


def on(placement, tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), tree)


def batch(cfg, mesh):
    shape = (cfg.train.batch_size, cfg.model.block_size)
    like = data.Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.int32, np.float32)))
    return on(sharding.split_batch(mesh), like)


def check(compiled):
    """It is code for a TPU, and it fits."""
    assert "T(8,128)" in compiled.as_text()  # the tiles that TPU memory is laid out in
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert 0 < needed - memory.alias_size_in_bytes < 0.9 * HBM_BYTES
    return memory


def test_the_chip(mesh):
    assert [(device.platform, device.device_kind) for device in mesh.devices.flat] == [("tpu", "TPU v5 lite")]


def test_train_step(cfg, mesh, compiled):
    init, train_fn, *_ = compiled
    state = on(sharding.replicated(mesh), jax.eval_shape(init))
    program = train_fn.lower(state, batch(cfg, mesh)).compile()
    memory = check(program)
    assert "splash" in program.as_text()  # attention by the chip's kernel
    # The state is donated: the new one lies where the old one was.
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= 0.9 * state_bytes


@pytest.mark.parametrize("topology_name", ["v5e:2x4", "v6e:2x4"])
def test_train_step_in_bfloat16_on_eight_chips(cfg, topology_name):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    mesh = sharding.make_mesh(MeshConfig(), topology.devices)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, compute_dtype="bfloat16"),
        train=dataclasses.replace(cfg.train, batch_size=16),
    )
    init, train_fn, *_ = programs.make_programs(cfg, mesh, np.ones(cfg.model.vocab_size, np.int32))
    state = on(sharding.replicated(mesh), jax.eval_shape(init))
    program = train_fn.lower(state, batch(cfg, mesh)).compile()
    check(program)
    text = program.as_text()
    assert "splash" in text and "all-reduce" in text and "all-gather" not in text  # each chip has its own texts


def test_fsdp_on_eight_chips_gathers_weights_and_scatters_the_sums_of_gradients():
    changed = load_file(str(SMALL))
    changed.mesh.data, changed.mesh.fsdp, changed.train.batch_size = 1, 8, 16
    changed.model.compute_dtype, changed.optim.name = "bfloat16", "adamw"
    cfg = freeze(changed)
    plan = planning.plan_training(cfg, chips.find("v5e:2x4"))
    assert plan.fits and 0 < plan.mfu < 1 and not plan.warnings
    matrices = 7 * cfg.model.n_layer
    in_layers = cfg.model.n_layer * (4 * 128 * 128 + 3 * 128 * 336)
    table, sent_of = 8192 * 128, 7 / 8  # of what is gathered or summed each device has an eighth
    count, sent = plan.collectives["all-gather"]
    assert count >= 2 * matrices + 1  # a pass forward, and one for the gradient; the output's for both
    assert sent == pytest.approx(2 * sent_of * (2 * in_layers + table), rel=0.01)  # bfloat16; the rest: tokens, norms
    count, sent = plan.collectives["reduce-scatter"]
    assert count == matrices + 1  # of the table that of the output: the look-up's gradient goes with the tokens'
    assert sent == pytest.approx(4 * sent_of * (in_layers + table), rel=0.01)
    assert plan.collectives["all-reduce"][1] < 0.01 * sent
    # One instruction after the other takes longer than any unit alone, and less than all units in turn.
    limits = plan.limits
    assert max(limits.flops, limits.links) < limits.in_turn < limits.flops + limits.memory + limits.links


@pytest.mark.parametrize("topology_name", ["v6e:4x4", "v5p:2x2x2", "v5p:4x4x4"])
def test_fsdp_over_a_torus_gathers_and_scatters_in_stages(topology_name):
    """Where XLA would do neither (`parallel._stages`)."""
    model = dict(n_embd=1024, n_head=8, n_layer=2, block_size=512, vocab_size=1024, mlp_dim=2048)
    model |= dict(compute_dtype="bfloat16")
    topology = chips.find(topology_name)
    values = dict(model=model, mesh=dict(data=1, fsdp=-1), optim=dict(name="adamw"))
    plan = planning.plan_training(freeze(values | dict(train=dict(batch_size=len(topology.devices)))), topology)
    assert not plan.warnings
    summed = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2048) + 1024 * 1024
    sent = summed * 4 * (1 - 1 / len(topology.devices))
    # But for some small sums, which it joins and makes whole: 3 MB of 83 on v6e:4x4.
    assert 0.9 * sent < plan.collectives["reduce-scatter"][1] < 1.02 * sent
    assert plan.collectives["all-reduce"][1] < 0.15 * sent


@pytest.mark.parametrize("topology_name", ["v5e:2x4", "v6e:2x4"])
def test_decoding_on_one_of_eight_chips(cfg, topology_name):
    lengths = dict(batch_size=8, prompt_tokens=100, new_tokens=100)
    plan = planning_decode.plan_decode(cfg, chips.find(topology_name), **lengths)
    assert plan.fits and plan.peak > plan.weights + plan.cache
    m = cfg.model
    weights = model.train_flops_per_token(m, 1) / 6 - 12 * m.n_head * m.head_dim * m.n_layer / 12
    # Attention of a single query is no product of matrices there: the compiler gives it to the vector unit.
    assert plan.decode.flops == pytest.approx(plan.decode.tokens * 2 * weights, rel=0.02)
    # Attention's kernel has whole blocks of the prompt's bucket, 128 tokens.
    attention = 4 * m.n_head * m.head_dim * m.n_layer
    in_layers = weights - m.vocab_size * m.n_embd
    formula = 8 * (128 * (2 * in_layers + attention * 128) + 2 * m.vocab_size * m.n_embd)
    assert plan.prefill.flops == pytest.approx(formula, rel=0.02)
    assert plan.decode.limits.memory > plan.decode.limits.flops and plan.decode.limits.links == 0


def test_two_slices_sum_each_gradient_once_and_gather_nothing():
    """What leaves a slice is handed to its host."""
    model = dict(n_embd=1024, n_head=8, n_layer=2, block_size=128, vocab_size=1024, mlp_dim=1024)
    model |= dict(tie_embeddings=False, compute_dtype="bfloat16", layer_execution="unrolled")
    values = dict(model=model, mesh=dict(data=-1, fsdp=8), optim=dict(name="adamw"), train=dict(batch_size=16))
    cfg = freeze(values)
    devices = chips.find("2xv5e:2x4").devices
    with pytest.raises(InputError, match=r"mesh.num_slices \(4\) must be that of the TPUs \(2\)"):
        sharding.make_mesh(MeshConfig(num_slices=4), devices)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    state, program = planning.compile_step(cfg, mesh)
    sums, kinds = 0, set()
    for computation in hlo.parse(program.as_text()).computations.values():
        for each in computation.instructions.values():
            kinds |= set(re.findall(r'_xla_megascale_transfer_type="(\w+)"', each.attributes))
            sums += each.shapes[0].bytes if each.opcode == "send" else 0
    assert kinds == {"ALL_REDUCE"}
    held = sum(planning._bytes(leaf) for leaf in jax.tree.leaves(state.params))
    assert held <= sums < 1.1 * held  # in float32, as they are kept; the rest: norms, losses


def test_eval_step(cfg, mesh, compiled):
    init, _, eval_fn, _ = compiled
    params = on(sharding.replicated(mesh), jax.eval_shape(init).params)
    check(eval_fn.lower(params, batch(cfg, mesh)).compile())


def test_initialisation(compiled):
    check(compiled[0].lower().compile())


@pytest.mark.parametrize("how", ["cached", "int8", "sliding", "guessing"])
def test_sampler(cfg, mesh, compiled, how):
    """Prefill and decoding of two rows; sliding is what learned positions need past the context."""
    if how == "sliding":
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, use_rope=False))
    init = programs.make_programs(cfg, mesh, np.ones(1, np.int32))[0] if how == "sliding" else compiled[0]
    there = functools.partial(on, sharding.replicated(mesh))
    program = engine.Program(
        cfg.model, cfg.model.vocab_size, cache_dtype="int8" if how == "int8" else None, slides=how == "sliding"
    )
    lay_out = functools.partial(decode_weights.lay_out, cfg.model, int8=how == "int8")
    params = there(jax.eval_shape(lay_out, jax.eval_shape(init).params))
    ints, floats = jax.ShapeDtypeStruct((2,), np.int32), jax.ShapeDtypeStruct((2,), np.float32)
    sampling = generate.SamplingConfig(
        top_k=ints,
        min_new_tokens=ints,
        logit_bias=jax.ShapeDtypeStruct((2, cfg.model.vocab_size), np.float32),
        **dict.fromkeys(("temperature", "top_p", "min_p"), floats),
        **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), floats),
    )
    arguments = there(
        (
            jax.ShapeDtypeStruct((2, 128), np.int32),
            ints,
            ints,
            jax.ShapeDtypeStruct((), np.uint32),
            jax.ShapeDtypeStruct((2,), np.uint32),
            sampling,
            jax.ShapeDtypeStruct((8,), np.int32),
        )
    )
    each = dict(num_samples=1, top_logprobs=0)
    check(engine._prefill.lower(program, params, *arguments, **each).compile())
    rows, state, _ = jax.eval_shape(functools.partial(engine._prefill, program, **each), params, *arguments)
    state, rows, stopped = there((state, rows, jax.ShapeDtypeStruct((2,), np.bool_)))
    if how == "guessing":
        text = there(jax.ShapeDtypeStruct((2, 128), np.int32))
        shared = (program, engine.Guesses(4), params, None, state, rows, stopped, text)
        check(engine._speculate.lower(*shared, rounds=3, top_logprobs=0).compile())
    else:
        check(engine._decode.lower(program, params, state, rows, stopped, length=16, top_logprobs=0).compile())
