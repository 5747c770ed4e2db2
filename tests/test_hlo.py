"""Texts of compiled programs, recorded from XLA for TPU and cut short, and those that it writes here."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import hlo, hlo_cost

# Of a scan over 6 layers for v5e:2x4: the bound is in the condition, the counter goes through copies and a fusion,
# and an inner loop takes step and start from the outer loop's state.
TPU_LOOPS = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "step.py"

%fused_computation.7 (param_0.1: s32[], param_1.2: s32[]) -> s32[] {
  %param_0.1 = s32[]{:T(128)S(6)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  ROOT %add.5 = s32[]{:T(128)} add(%param_0.1, %param_1.2)
}

%wide.windowed_dot_general_body_ag.sunk (wide.param.3: (bf16[8,128], u32[], u32[])) -> (bf16[8,128], u32[], u32[]) {
  %wide.param.3 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.3), index=0
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%wide.param.3), index=1
  %get-tuple-element.3 = u32[]{:T(128)} get-tuple-element(%wide.param.3), index=2
  %add.242 = u32[]{:T(128)} add(%get-tuple-element.2, %get-tuple-element.3), metadata={op_name="jit(step)/dot_general" stack_frame_id=15}
  ROOT %tuple.167 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%get-tuple-element.1, %add.242, %get-tuple-element.3)
}

%wide.windowed_dot_general_cond_ag.1 (wide.param.2: (bf16[8,128], u32[], u32[])) -> pred[] {
  %constant.557 = u32[]{:T(128)} constant(4), metadata={op_name="jit(step)/dot_general"}
  %wide.param.2 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.416 = u32[]{:T(128)} get-tuple-element(%wide.param.2), index=1
  ROOT %compare.17 = pred[]{:T(512)} compare(%get-tuple-element.416, %constant.557), direction=LT
}

%wide.region_0.1_spmd.sunk (wide.param.0: (s32[], bf16[8,128], s32[], /*index=3*/u32[])) -> (s32[], bf16[8,128], s32[], /*index=3*/u32[]) {
  %constant.645..sunk = u32[]{:T(128)} constant(0)
  %wide.param.0 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) parameter(0)
  %get-tuple-element.874 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=0
  %copy.87 = s32[]{:T(128)S(6)} copy(%get-tuple-element.874), backend_config={"flag_configs":[]}
  %get-tuple-element.875 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.0), index=1
  %get-tuple-element.876 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=2
  %get-tuple-element.877 = u32[]{:T(128)} get-tuple-element(%wide.param.0), index=3
  %copy.114 = u32[]{:T(128)} copy(%constant.645..sunk)
  %tuple.165 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%get-tuple-element.875, %copy.114, %get-tuple-element.877)
  %while.50 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}, u32[]{:T(128)}) while(%tuple.165), condition=%wide.windowed_dot_general_cond_ag.1, body=%wide.windowed_dot_general_body_ag.sunk, metadata={op_name="jit(step)/while/body/dot_general" stack_frame_id=14}
  %get-tuple-element.644 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.50), index=0
  %add.201 = s32[]{:T(128)} fusion(%copy.87, %get-tuple-element.876), kind=kLoop, calls=%fused_computation.7
  ROOT %tuple.170 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) tuple(%add.201, %get-tuple-element.644, %get-tuple-element.876, /*index=3*/%get-tuple-element.877)
}

%wide.region_1.2_spmd (wide.param.5: (s32[], bf16[8,128], s32[], /*index=3*/u32[])) -> pred[] {
  %constant.74.clone.1 = s32[]{:T(128)} constant(6)
  %wide.param.5 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) parameter(0)
  %get-tuple-element.529 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%get-tuple-element.529, %constant.74.clone.1), direction=LT
}

ENTRY %main.4_spmd (param.14: bf16[8,128]) -> bf16[8,128] {
  %constant.80 = s32[]{:T(128)} constant(0)
  %constant.71 = s32[]{:T(128)} constant(1)
  %constant.650 = u32[]{:T(128)} constant(2)
  %param.14 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}, metadata={op_name="ws[\\'x\\']"}
  %copy-start.2 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%param.14)
  %copy-done.2 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.2)
  %copy.112 = s32[]{:T(128)} copy(%constant.80)
  %tuple.176 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) tuple(%copy.112, %copy-done.2, %constant.71, /*index=3*/%constant.650)
  %while.44 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/u32[]{:T(128)}) while(%tuple.176), condition=%wide.region_1.2_spmd, body=%wide.region_0.1_spmd.sunk, metadata={op_name="jit(step)/while" stack_frame_id=11}
  ROOT %get-tuple-element.203 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.44), index=1
}
"""

# A Pallas kernel's call goes on in the next lines.
TPU_KERNEL = """\
HloModule jit_step

ENTRY %main.1 (param.1: f32[2,8,256,16]) -> f32[2,8,256,128] {
  %param.1 = f32[2,8,256,16]{3,2,1,0:T(8,128)} parameter(0)
  %splash.1 = (f32[2,8,256,16]{3,2,1,0:T(8,128)S(1)}, f32[2,8,256,128]{3,2,1,0:T(8,128)}) custom-call(%param.1, /*index=1*/%param.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(step)/attn/pallas_call"}
  ROOT %get-tuple-element.1 = f32[2,8,256,128]{3,2,1,0:T(8,128)} get-tuple-element(%splash.1), index=1
}
"""


@pytest.mark.parametrize(
    "text, dtype, dims, space, padded, size",
    [
        ("f32[]", "f32", (), 0, 1, 4),
        ("pred[3]{0}", "pred", (3,), 0, 3, 1),
        ("s4[6]{0:T(128)}", "s4", (6,), 0, 128, 0.5),
        ("f8e4m3fn[2,3]{1,0}", "f8e4m3fn", (2, 3), 0, 6, 1),
        ("c64[2]", "c64", (2,), 0, 2, 8),
        ("bf16[6,8,100,16]{3,2,1,0:T(8,128)(2,1)S(1)}", "bf16", (6, 8, 100, 16), 1, 6 * 8 * 104 * 128, 2),
        # The fastest axis is the first of the order: here 16 rows fill lanes, not 100.
        ("f32[100,16]{0,1:T(8,128)S(5)}", "f32", (100, 16), 5, 128 * 16, 4),
        ("u32[]{:S(2)}", "u32", (), 2, 1, 4),
        ("token[]", "token", (), 0, 1, 0),
    ],
)
def test_shapes(text, dtype, dims, space, padded, size):
    (shape,) = hlo.shapes_of(text)
    assert (shape.dtype, shape.dims, shape.memory_space) == (dtype, dims, space)
    assert (shape.padded_size, shape.itemsize) == (padded, size)


def test_arrays_of_a_nested_tuple():
    text = "((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/s32[]{:S(2)})"
    assert [shape.dims for shape in hlo.shapes_of(text)] == [(8, 128), (2, 128), ()]


def test_instructions():
    program = hlo.parse(TPU_LOOPS)
    entry = program.entry
    assert (program.num_devices, entry.name, len(entry.instructions)) == (8, "main.4_spmd", 10)
    assert entry.root.name == "get-tuple-element.203" and entry.root.numbers("index") == (1,)
    start, loop = entry.instructions["copy-start.2"], entry.instructions["while.44"]
    assert start.operands == (entry.instructions["param.14"],) and len(start.shapes) == 3
    assert entry.users[start] == [entry.instructions["copy-done.2"]]
    assert entry.instructions["param.14"].op_name == r"ws[\'x\']"
    assert loop.op_name == "jit(step)/while" and loop.called("body") == ["wide.region_0.1_spmd.sunk"]
    assert [each.name for each in entry.instructions["tuple.176"].operands][-1] == "constant.650"


def test_a_call_of_several_lines():
    entry = hlo.parse(TPU_KERNEL).entry
    call = entry.instructions["splash.1"]
    assert call.opcode == "custom-call" and call.op_name == "jit(step)/attn/pallas_call"
    assert call.operands == (entry.instructions["param.1"],) * 2
    assert entry.root.operands == (call,)


def test_names_without_percent_signs():
    program = hlo.parse(TPU_LOOPS.replace("%", ""))
    assert program.entry.instructions["while.44"].operands == (program.entry.instructions["tuple.176"],)


def test_what_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")


def counted(text):
    return {loop.name: loop.turns for loop in hlo_cost.analyse(text).loops}


def test_turns_of_a_tpus_loops():
    assert counted(TPU_LOOPS) == {"while.44": 6, "while.50": 2}


@pytest.mark.parametrize(
    "old, new, turns",
    [
        ("s32[]{:T(128)} constant(6)", "s32[]{:T(128)} constant(0)", 0),
        ("s32[]{:T(128)} constant(1)", "s32[]{:T(128)} constant(4)", 2),  # the step
        ("s32[]{:T(128)} constant(0)", "s32[]{:T(128)} constant(-3)", 9),
        ("s32[]{:T(128)} constant(6)", "s32[]{:T(128)} constant(1000000)", None),  # more than are followed
        ("%constant.80 = s32[]{:T(128)} constant(0)", "%constant.80 = s32[]{:T(128)} parameter(1)", None),
        ("direction=LT\n}\n\nENTRY", "direction=NE\n}\n\nENTRY", 6),
    ],
)
def test_turns_follow_from_start_step_and_bound(old, new, turns):
    assert old in TPU_LOOPS
    assert counted(TPU_LOOPS.replace(old, new))["while.44"] == turns


def test_turns_that_xla_tells():
    told = TPU_LOOPS.replace(
        "body=%wide.region_0.1_spmd.sunk,",
        'body=%wide.region_0.1_spmd.sunk, backend_config={"known_trip_count":{"n":"7"}},',
    )
    assert counted(told) == {"while.44": 7, "while.50": 2}


@pytest.mark.parametrize("told", [True, False])
def test_turns_of_a_cpus_loops(told):
    def nested(x):
        step = lambda x, _: (jax.lax.fori_loop(2, 9, lambda i, x: jnp.sin(x) + i, x), None)
        return jax.lax.scan(step, x, length=5, reverse=True)[0]

    text = jax.jit(nested).lower(jnp.ones(3)).compile().as_text()
    if not told:
        text = text.replace("known_trip_count", "")
    assert sorted(counted(text).values()) == [5, 7]


def test_turns_that_data_decides():
    loop = lambda n, x: jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 2), (0, x))
    text = jax.jit(loop).lower(jnp.int32(3), jnp.ones(3)).compile().as_text()
    assert list(counted(text).values()) == [None]
