"""Costs of small programs against closed forms, of recorded pieces of TPU programs, and of a whole training step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import config, data, hlo, hlo_cost, programs, sharding
from llm_jax.config_rules import freeze

M, K = 32, 48  # of a product [M, K] @ [K, K]
PRODUCT = 2 * M * K * K


def cost(function, *shapes, **options):
    """Of the program for CPUs; a shape is a tuple, or a ShapeDtypeStruct with its sharding."""
    arguments = [jax.ShapeDtypeStruct(each, jnp.float32) if isinstance(each, tuple) else each for each in shapes]
    return hlo_cost.analyse(jax.jit(function).lower(*arguments).compile().as_text(), **options)


def test_a_product():
    found = cost(jnp.matmul, (M, K), (K, K))
    assert found.flops == PRODUCT
    assert found.bytes_read == 4 * (M * K + K * K) and found.bytes_written == 4 * M * K
    assert not found.collectives and not found.loops


def test_a_batched_product():
    assert cost(functools.partial(jnp.einsum, "bij,bkj->bik"), (5, M, K), (5, 7, K)).flops == 5 * 2 * M * K * 7


def product_chain(x, w, *, length=5, loop=True, remat=False):
    step = lambda x, _: (jnp.tanh(x @ w), None)
    step = jax.checkpoint(step) if remat else step
    if loop:
        return jnp.sum(jax.lax.scan(step, x, length=length)[0])
    for _ in range(length):
        x, _ = step(x, None)
    return jnp.sum(x)


@pytest.mark.parametrize("loop", [True, False])
def test_a_loop_and_its_gradient_cost_what_they_do_unrolled(loop):
    chain = functools.partial(product_chain, loop=loop)
    assert cost(chain, (M, K), (K, K)).flops == 5 * PRODUCT
    assert cost(jax.grad(chain, argnums=(0, 1)), (M, K), (K, K)).flops == 3 * 5 * PRODUCT


def test_rematerialisation_computes_again():
    chain = functools.partial(product_chain, remat=True)
    assert cost(jax.grad(chain, argnums=(0, 1)), (M, K), (K, K)).flops == 4 * 5 * PRODUCT


def test_loops_in_loops():
    def nested(x, w):
        inner = lambda x, _: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)
        return jax.lax.scan(inner, x, length=4)[0]

    found = cost(nested, (M, K), (K, K))
    assert found.flops == 12 * PRODUCT
    assert sorted(loop.turns for loop in found.loops) == [3, 4] and not found.unknown_loops


def test_a_loop_that_data_decides_is_told_of_and_can_be_given():
    def until_large(x, w):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 100, lambda x: x @ w, x)

    found = cost(until_large, (M, K), (K, K))
    assert found.flops == PRODUCT
    (loop,) = found.unknown_loops
    assert "while" in loop.op_name
    given = cost(until_large, (M, K), (K, K), turns={"no such": 3, "until_large.*while": 9})
    assert given.flops == 9 * PRODUCT and not given.unknown_loops


def test_an_inner_loop_that_the_turn_decides_is_told_of():
    def triangle(x, w):
        inner = lambda i, x: jax.lax.fori_loop(0, i, lambda _, x: jnp.tanh(x @ w), x)
        return jax.lax.fori_loop(0, 4, inner, x)

    found = cost(triangle, (M, K), (K, K))
    assert sorted(loop.turns or 0 for loop in found.loops) == [0, 4]
    assert len(found.unknown_loops) == 1 and found.flops == 4 * PRODUCT


def test_the_dearest_branch_or_the_cheapest():
    def branches(i, x, w):
        return jax.lax.switch(i, [lambda x: x, lambda x: jnp.tanh(x @ w) @ w, lambda x: x @ w], x)

    found = cost(branches, jax.ShapeDtypeStruct((), jnp.int32), (M, K), (K, K))
    assert found.flops == 2 * PRODUCT
    assert cost(branches, jax.ShapeDtypeStruct((), jnp.int32), (M, K), (K, K), cheapest_branch=True).flops == 0


def test_steps_are_all_that_is_executed():
    found = cost(product_chain, (M, K), (K, K))
    assert sum(step.flops for step in found.steps) == found.flops == 5 * PRODUCT
    assert sum(step.bytes for step in found.steps) == found.bytes
    assert not any(step.in_background or step.sent for step in found.steps)


def test_flops_by_module():
    @jax.named_scope("mlp")
    def mlp(x, w):
        return jnp.tanh(x @ w)

    def loss(x, w):
        x, _ = jax.lax.scan(lambda x, _: (mlp(x, w), None), x, length=2)
        with jax.named_scope("lm_head"):
            return jnp.sum(jnp.tanh(x @ w))

    found = cost(jax.grad(loss, argnums=1), (M, K), (K, K))
    assert found.flops_of == {"mlp": 2 * 3 * PRODUCT, "lm_head": 3 * PRODUCT}
    together = cost(jax.grad(loss, argnums=1), (M, K), (K, K), module_of=lambda op_name: "all")
    assert together.flops_of == {"all": found.flops}


@pytest.mark.parametrize(
    "op_name, names",
    [
        ("jit(step)/transpose(jvp(Model.hidden))/while/body/closed_call/Block_0/attn/bd,bf->df/dot_general", "attn"),
        ("jit(step)/jvp(mlp)/checkpoint/rematted_computation/jit(silu)/mul", "mlp"),
        ("jit(step)/transpose(jvp(embed/norm))/mul;jit(step)/other/mul", "norm"),
        ("jit(step)/attn/shard_map/vmap(splash)/jit(_splash)/pallas_call", "splash"),
        ("jit(step)/jvp()/dot_general", "other"),
        ("", "other"),
    ],
)
def test_names_of_modules(op_name, names):
    assert hlo_cost.module_name(op_name) == names


def test_only_names_that_are_wanted():
    op_name = "jit(step)/jvp(Model)/while/body/Block_0/attn/vmap(splash)/pallas_call"
    assert hlo_cost.scope(op_name) == ("Model", "Block_0", "attn", "splash")
    assert hlo_cost.module_name(op_name, ("attn", "mlp")) == "attn"
    assert hlo_cost.module_name(op_name, ("mlp",)) == "other"


# --- Several devices --------------------------------------------------------------------------------


def on_mesh(shape, *axes):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def test_flops_are_those_of_a_device():
    assert cost(jnp.matmul, on_mesh((64, K), ("x", "y")), on_mesh((K, K))).flops == 2 * 64 * K * K / 8


def test_a_weight_gathered_over_one_axis():
    found = cost(jnp.matmul, on_mesh((64, 4096), "x"), on_mesh((4096, 16), "y"))
    kinds = {each.kind for each in found.collectives}
    if kinds == {"all-gather"}:
        (gather,) = found.collectives
        assert (gather.operand_bytes, gather.result_bytes) == (4 * 1024 * 16, 4 * 4096 * 16)
        assert (gather.group_size, gather.num_groups, gather.times) == (4, 2, 1)
    else:  # it may as well multiply what it has, and add up
        assert kinds == {"all-reduce"}


EXCHANGES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "y"), 8, 4 * 8 * 3 / 4, (4, 2)),
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), 8, 2 * 8 * 1 / 2, (2, 4)),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "y", tiled=True), 8, 8 * 3 / 4, (4, 2)),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "y", 0, 0, tiled=True), 8, 8 * 3 / 4, (4, 2)),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "y", [(0, 1), (1, 2)]), 8, 8, (2, 4)),
}


@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize("loop", [False, True])
def test_collectives(kind, loop):
    """Rows that a device has, rows that it sends, and its group."""
    exchange, rows, sent, (size, number) = EXCHANGES[kind]
    x = on_mesh((64, 100), ("x", "y"))

    def on_device(x):
        def turn(x, _):
            return jnp.tanh(x), exchange(x)

        return jax.lax.scan(turn, x, length=3)[1] if loop else exchange(x)

    mesh = x.sharding.mesh
    split = jax.shard_map(on_device, mesh=mesh, in_specs=x.sharding.spec, out_specs=PartitionSpec(), check_vma=False)
    (found,) = cost(split, x).collectives
    assert (found.kind, found.dtype, found.times) == (kind, "f32", 3 if loop else 1)
    assert (found.group_size, found.num_groups) == (size, number)
    assert found.operand_bytes == rows * 400
    assert hlo_cost.link_bytes(found) == sent * 400


@pytest.mark.parametrize(
    "written, size, number",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2, 4),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", 8, 1),
        ("replica_groups={}", 16, 1),
        ("replica_groups=[2,4]<=[8]", 4, 2),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 4),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", 8, 1),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", 2, 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8, 1),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}", 4, 4),
    ],
)
def test_groups(written, size, number):
    instruction = hlo.Instruction("x", "all-reduce", (), (), "", f", channel_id=1, {written}, to_apply=%add")
    assert hlo_cost.groups(instruction, 16) == (size, number)


# --- Of a TPU ---------------------------------------------------------------------------------------


def tpu(*computations):
    return "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n" + "\n\n".join(computations)


def entry(*lines):
    return "ENTRY %main.1 (x: f32[]) -> f32[] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"


@pytest.mark.parametrize(
    "lhs, kernel, out, attributes, flops",
    [
        ("1024,256", "256,512", "1024,512", "dim_labels=bf_io->bf", 2 * 1024 * 256 * 512),
        # 48 products of [16, 128] and [16, 128], batched: of the window all but the diagonal falls into holes.
        (
            "6,8,16,128",
            "6,8,16,128",
            "6,8,16,16",
            "window={size=6x8 stride=5x7 lhs_dilate=6x8}, dim_labels=01bf_01oi->01bf",
            48 * 2 * 16 * 16 * 128,
        ),
        # Two batches summed over.
        ("2,256,8192", "2,256,128", "8192,128,1", "window={size=2}, dim_labels=0fb_0io->bf0", 2 * 512 * 8192 * 128),
        ("1,10,3", "4,3,5", "1,10,5", "window={size=4 pad=2_1}, dim_labels=b0f_0io->b0f", 2 * (4 * 10 - 4) * 3 * 5),
        (
            "1,10,6",
            "3,1,6",
            "1,8,6",
            "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=6",
            2 * 3 * 8 * 6,
        ),
    ],
)
def test_products_are_convolutions(lhs, kernel, out, attributes, flops):
    text = tpu(
        entry(
            f"%x = f32[{lhs}] parameter(0)",
            f"%y = f32[{kernel}] parameter(1)",
            f"ROOT %convolution.1 = f32[{out}] convolution(%x, %y), {attributes}",
        )
    )
    assert hlo_cost.analyse(text).flops == flops


def test_places_that_a_window_meets():
    for size, window, out, stride, pad, dilation, window_dilation in itertools.product(
        (1, 4), (1, 3), (1, 5), (1, 2, 3), (0, 2), (1, 2, 4), (1, 2)
    ):
        met = 0
        for place, result in itertools.product(range(window), range(out)):
            at = result * stride + place * window_dilation - pad
            met += at >= 0 and at % dilation == 0 and at // dilation < size
        assert hlo_cost._meetings(size, window, out, stride, pad, dilation, window_dilation) == met


GATHER = "channel_id=105, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true"
# An all-gather that goes on while a fusion multiplies stands in three computations.
ASYNC_GATHER = tpu(
    f"""%fused_computation.434 (param_0.1: bf16[128,4096]) -> (bf16[128,4096], bf16[1024,4096], u32[]) {{
  %param_0.1 = bf16[128,4096]{{1,0:T(8,128)(2,1)}} parameter(0)
  %all-gather.57 = bf16[1024,4096]{{1,0:T(8,128)(2,1)}} all-gather(%param_0.1), {GATHER}, frontend_attributes={{chain_id="0"}}
  ROOT %custom-call.26 = (bf16[128,4096]{{1,0:T(8,128)(2,1)}}, bf16[1024,4096]{{1,0:T(8,128)(2,1)}}, u32[]{{:S(2)}}) custom-call(%all-gather.57), custom_call_target="AsyncCollectiveStart"
}}""",
    f"""%async_collective_fusion.595 (param_0.2: bf16[128,4096], param_1.2: bf16[1024,4096], param_2.2: u32[], param_3.2: bf16[1024,128]) -> (bf16[1024,4096], bf16[128,4096], bf16[1024,4096], bf16[1024,4096], u32[]) {{
  %param_3.2 = bf16[1024,128]{{1,0:T(8,128)(2,1)S(1)}} parameter(3)
  %param_0.2 = bf16[128,4096]{{1,0:T(8,128)(2,1)}} parameter(0)
  %convolution.231 = bf16[1024,4096]{{1,0:T(8,128)(2,1)S(1)}} convolution(%param_3.2, %param_0.2), dim_labels=bf_io->bf
  %param_1.2 = bf16[1024,4096]{{1,0:T(8,128)(2,1)}} parameter(1)
  %all-gather.59 = bf16[1024,4096]{{1,0:T(8,128)(2,1)}} all-gather(%param_0.2), {GATHER}
  %param_2.2 = u32[]{{:S(2)}} parameter(2)
  ROOT %tuple.328 = (bf16[1024,4096]{{1,0:T(8,128)(2,1)S(1)}}, bf16[128,4096]{{1,0:T(8,128)(2,1)}}, bf16[1024,4096]{{1,0:T(8,128)(2,1)}}, bf16[1024,4096]{{1,0:T(8,128)(2,1)}}, u32[]{{:S(2)}}) tuple(%convolution.231, %param_0.2, %param_1.2, %all-gather.59, %param_2.2)
}}""",
    f"""%fused_computation.440 (param_0.3: bf16[128,4096], param_1.3: bf16[1024,4096], param_2.3: u32[]) -> bf16[1024,4096] {{
  %param_0.3 = bf16[128,4096]{{1,0:T(8,128)(2,1)}} parameter(0)
  %param_1.3 = bf16[1024,4096]{{1,0:T(8,128)(2,1)}} parameter(1)
  %all-gather.31 = bf16[1024,4096]{{1,0:T(8,128)(2,1)}} all-gather(%param_0.3), {GATHER}
  %param_2.3 = u32[]{{:S(2)}} parameter(2)
  ROOT %custom-call.8 = bf16[1024,4096]{{1,0:T(8,128)(2,1)}} custom-call(%param_0.3, %param_1.3, %all-gather.31, %param_2.3), custom_call_target="AsyncCollectiveDone"
}}""",
    entry(
        "%w = bf16[128,4096]{1,0:T(8,128)(2,1)} parameter(0)",
        "%x = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)",
        "%async-collective-start = (bf16[128,4096]{1,0:T(8,128)(2,1)}, bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.434",
        "%a.0 = bf16[128,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0",
        "%a.1 = bf16[1024,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1",
        "%a.2 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=2",
        "%fusion.3 = (bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)}, bf16[128,4096]{1,0:T(8,128)(2,1)}, bf16[1024,4096]{1,0:T(8,128)(2,1)}, bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%a.0, %a.1, %a.2, %x), kind=kCustom, calls=%async_collective_fusion.595",
        "ROOT %async-collective-done = bf16[1024,4096]{1,0:T(8,128)(2,1)} fusion(%a.0, %a.1, %a.2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%fused_computation.440",
    ),
)


def test_a_gather_beside_a_product_counts_once():
    found = hlo_cost.analyse(ASYNC_GATHER)
    (gather,) = found.collectives
    weight = 2 * 128 * 4096
    assert (gather.kind, gather.operand_bytes, gather.result_bytes) == ("all-gather", weight, 8 * weight)
    assert (gather.group_size, gather.num_groups, gather.dtype) == (8, 1, "bf16")
    assert found.flops == 2 * 1024 * 128 * 4096
    # The gather reads the weight and writes eight; the product reads it again, and leaves its result in VMEM.
    assert (found.bytes_read, found.bytes_written) == (2 * weight, 8 * weight)
    assert not found.custom_calls


SCATTERED = tpu(
    """%all-reduce-scatter.2.clone.1 (input_0.2: f32[2048,512], input_1.2: f32[512,2048]) -> (f32[2048,64], f32[64,2048]) {
  %input_0.2 = f32[2048,512]{0,1:T(8,128)S(1)} parameter(0)
  %input_1.2 = f32[512,2048]{1,0:T(8,128)S(1)} parameter(1)
  %all-reduce.9 = (f32[2048,512]{0,1:T(8,128)}, f32[512,2048]{1,0:T(8,128)}) all-reduce(%input_0.2, %input_1.2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add.1.clone
  %get-tuple-element.303 = f32[2048,512]{0,1:T(8,128)} get-tuple-element(%all-reduce.9), index=0
  %constant.185 = u32[] constant(0)
  %partition-id.11 = u32[] partition-id()
  %constant.186 = u32[] constant(64)
  %multiply.10 = u32[]{:T(128)} multiply(%partition-id.11, %constant.186)
  %dynamic-slice.43 = f32[2048,64]{0,1:T(8,128)S(1)} dynamic-slice(%get-tuple-element.303, %constant.185, %multiply.10), dynamic_slice_sizes={2048,64}
  %get-tuple-element.304 = f32[512,2048]{1,0:T(8,128)} get-tuple-element(%all-reduce.9), index=1
  %dynamic-slice.44 = f32[64,2048]{1,0:T(8,128)S(1)} dynamic-slice(%get-tuple-element.304, %multiply.10, %constant.185), dynamic_slice_sizes={64,2048}
  ROOT %tuple.58 = (f32[2048,64]{0,1:T(8,128)S(1)}, f32[64,2048]{1,0:T(8,128)S(1)}) tuple(%dynamic-slice.43, %dynamic-slice.44)
}""",
    entry(
        "%x = f32[2048,512]{0,1:T(8,128)S(1)} parameter(0)",
        "%y = f32[512,2048]{1,0:T(8,128)S(1)} parameter(1)",
        'ROOT %fusion.77 = (f32[2048,64]{0,1:T(8,128)S(1)}, f32[64,2048]{1,0:T(8,128)S(1)}) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.2.clone.1, metadata={op_name="jit(step)/mlp/dot_general" stack_frame_id=17}',
    ),
)


def test_a_sum_that_is_sliced_is_scattered():
    (found,) = hlo_cost.analyse(SCATTERED).collectives
    both = 2 * 4 * 2048 * 512
    assert (found.kind, found.operand_bytes, found.result_bytes) == ("reduce-scatter", both, both / 8)
    assert hlo_cost.link_bytes(found) == both * 7 / 8
    assert found.op_name == "jit(step)/mlp/dot_general"


def test_a_sum_that_something_else_reads_is_not():
    kept = SCATTERED.replace(
        "tuple(%dynamic-slice.43, %dynamic-slice.44)", "tuple(%dynamic-slice.43, %get-tuple-element.304)"
    )
    assert [each.kind for each in hlo_cost.analyse(kept).collectives] == ["all-reduce"]


def test_starts_and_ends_count_once():
    text = tpu(
        entry(
            "%x = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)",
            "%collective-permute-start.1 = (bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=11, source_target_pairs={{0,7},{1,0},{2,1},{3,2},{4,3},{5,4},{6,5},{7,6}}",
            "%collective-permute-done.1 = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.1)",
            "%all-gather-start.1 = (bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) all-gather-start(%collective-permute-done.1), replica_groups=[1,8]<=[8], dimensions={0}",
            "ROOT %all-gather-done.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.1)",
        )
    )
    found = hlo_cost.analyse(text)
    permute, gather = found.collectives
    assert (permute.kind, permute.group_size, permute.num_groups) == ("collective-permute", 2, 8)
    assert permute.operand_bytes == permute.result_bytes == gather.operand_bytes == gather.result_bytes / 8 == 2**15
    assert (found.bytes_read, found.bytes_written) == (0, 2**18)  # the rest is in VMEM


def test_an_exchange_in_a_computation_of_its_own():
    text = tpu(
        """%async_computation (param_0: f32[64,128]) -> f32[8,128] {
  %param_0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %reduce-scatter.1 = f32[8,128]{1,0:T(8,128)} reduce-scatter(%param_0), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}""",
        entry(
            "%x = f32[64,128]{1,0:T(8,128)} parameter(0)",
            "%async-start = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, u32[]) async-start(%x), calls=%async_computation",
            "%async-update = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)}, u32[]) async-update(%async-start)",
            "ROOT %async-done = f32[8,128]{1,0:T(8,128)} async-done(%async-update)",
        ),
    )
    (found,) = hlo_cost.analyse(text).collectives
    assert (found.kind, found.operand_bytes, found.result_bytes) == ("reduce-scatter", 2**15, 2**12)


def test_a_sum_of_float32_that_is_given_as_bfloat16():
    text = tpu(
        entry(
            "%x = f32[1024]{0:T(1024)S(1)} parameter(0)",
            "ROOT %all-reduce.1 = bf16[1024]{0:T(1024)(128)(2,1)S(1)} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add",
        )
    )
    (found,) = hlo_cost.analyse(text).collectives
    assert hlo_cost.link_bytes(found) == (4096 + 2048) * 7 / 8


def test_kernels_are_the_callers():
    text = tpu(
        entry(
            "%x = f32[2,8,256,16]{3,2,1,0:T(8,128)} parameter(0)",
            '%buffer = f32[2,8,256,16]{3,2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"',
            'ROOT %splash.1 = f32[2,8,256,16]{3,2,1,0:T(8,128)S(1)} custom-call(%x, /*index=1*/%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attn/pallas_call"}',
        )
    )
    found = hlo_cost.analyse(text, custom_call_flops=lambda call: 10.0 * call.operands[0].shapes[0].dims[0])
    (call,) = found.custom_calls
    assert (call.instruction.name, call.target, call.times, call.flops) == ("splash.1", "tpu_custom_call", 1, 20)
    assert found.flops_of == {"attn": 20}
    assert (found.bytes_read, found.bytes_written) == (4 * 2 * 8 * 256 * 128, 0)  # 16 channels lie in 128 lanes


def fused(*lines, call):
    return tpu("%fused (p: f32[]) -> f32[] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}", entry(*call))


BIG, ROW = "f32[6,128,128]{2,1,0:T(8,128)}", "f32[1,128,128]{2,1,0:T(8,128)}"
ARGUMENTS = (f"%x = {BIG} parameter(0)", "%i = s32[]{:T(128)S(6)} parameter(1)", f"%r = {ROW} parameter(2)")


def test_a_slice_reads_itself():
    text = fused(
        *ARGUMENTS[:2],
        f"%b = {BIG.replace('f32', 'bf16')} convert(%x)",
        f"%s = {ROW.replace('f32', 'bf16')} dynamic-slice(%b, %i, %i, %i), dynamic_slice_sizes={{1,128,128}}",
        f"ROOT %n = {ROW.replace('f32', 'bf16')} negate(%s)",
        call=(
            *ARGUMENTS[:2],
            f"ROOT %f = {ROW.replace('f32', 'bf16')} fusion(%x, %i), kind=kLoop, calls=%fused",
        ),
    )
    found = hlo_cost.analyse(text)
    assert (found.bytes_read, found.bytes_written) == (2**16, 2**15)


def test_an_update_in_place_writes_itself():
    update = f"%u = {BIG} dynamic-update-slice(%x, %r, %i, %i, %i)"
    call = (*ARGUMENTS, f"ROOT %f = {BIG} fusion(%x, %i, %r), kind=kLoop, calls=%fused")
    found = hlo_cost.analyse(fused(*ARGUMENTS, f"ROOT {update}", call=call))
    assert (found.bytes_read, found.bytes_written) == (2**16, 2**16)
    alone = hlo_cost.analyse(tpu(entry(*ARGUMENTS, f"ROOT {update}")))
    assert (alone.bytes_read, alone.bytes_written) == (2**16, 2**16)
    # A buffer that is made here is written whole.
    new = "%z = f32[]{:T(128)} constant(0)", f"%b = {BIG} broadcast(%z), dimensions={{}}"
    made = hlo_cost.analyse(fused(*ARGUMENTS, *new, f"ROOT {update.replace('%x', '%b')}", call=call))
    assert (made.bytes_read, made.bytes_written) == (2**16, 6 * 2**16)
    # Of a copy all is read and written.
    elsewhere = hlo_cost.analyse(fused(*ARGUMENTS, update, f"ROOT %n = {BIG} negate(%u)", call=call))
    assert (elsewhere.bytes_read, elsewhere.bytes_written) == (7 * 2**16, 6 * 2**16)


# --- The training step ------------------------------------------------------------------------------

SIZES = dict(n_embd=32, n_head=4, n_layer=3, block_size=64, vocab_size=128, attention="plain")
TEXTS = 16


def step_cost(devices=8, **changes):
    cfg = freeze({"model": SIZES | changes, "train": {"batch_size": TEXTS}})
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:devices])
    init, step, *_ = programs.make_programs(cfg, mesh, np.ones(cfg.model.vocab_size, np.int32))
    placed = lambda where, tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)
    state = placed(sharding.replicated(mesh), jax.eval_shape(init))
    shape = (TEXTS, cfg.model.block_size)
    batch = data.Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.int32, np.float32)))
    text = step.lower(state, placed(sharding.split_batch(mesh), batch)).compile().as_text()
    return cfg.model, hlo_cost.analyse(text, module_of=lambda name: hlo_cost.module_name(name, ("attn", "mlp")))


def step_flops(m, remat="none"):
    """Of all devices. Forward once, backward twice, and what remat computes again."""
    tokens = TEXTS * m.block_size
    projections = m.n_layer * 2 * tokens * 4 * m.n_embd**2
    attention = m.n_layer * 2 * 2 * TEXTS * m.block_size**2 * m.n_embd
    gate_and_up = m.n_layer * 2 * tokens * 2 * m.n_embd * m.mlp_dim
    down, head = gate_and_up / 2, 2 * tokens * m.n_embd * m.vocab_size
    again = dict(attn=projections + attention, mlp=gate_and_up) if remat == "block" else dict(attn=0, mlp=0)
    return {
        "attn": 3 * (projections + attention) + again["attn"],
        "mlp": 3 * (gate_and_up + down) + again["mlp"],
        "other": 3 * head,
    }


@pytest.mark.parametrize("layer_execution, remat", [("scan", "none"), ("unrolled", "none"), ("scan", "block")])
def test_training_step(layer_execution, remat):
    m, found = step_cost(layer_execution=layer_execution, remat=remat)
    assert not found.unknown_loops
    expected = step_flops(m, remat)
    assert found.flops_of.keys() == expected.keys()
    for module, flops in expected.items():
        assert 8 * found.flops_of[module] == pytest.approx(flops, rel=0.02), module
    sums = sum(each.operand_bytes * each.times for each in found.collectives if each.kind == "all-reduce")
    params = 4 * (m.n_layer * (4 * m.n_embd**2 + 3 * m.n_embd * m.mlp_dim) + m.vocab_size * m.n_embd)
    assert sums == pytest.approx(params, rel=0.02)
