"""What temporary memory holds, against small programs written out and against XLA's own total."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import hlo_memory

# a is needed up to d; b ends with c, so that three arrays lie there at c and at d.
CHAIN = """HloModule chain, is_scheduled=true

ENTRY main (x: f32[256]) -> f32[256] {
  x = f32[256]{0} parameter(0)
  a = f32[256]{0} negate(x), metadata={op_name="jit(f)/attn/neg"}
  b = f32[512]{0} concatenate(a, x), dimensions={0}, metadata={op_name="jit(f)/mlp/concatenate"}
  c = f32[1024]{0} concatenate(b, b), dimensions={0}, metadata={op_name="jit(f)/mlp/concatenate"}
  v = f32[4096]{0:T(1024)S(1)} concatenate(c, c, c, c), dimensions={0}
  d = f32[256]{0} slice(c), slice={[0:256]}
  e = f32[256]{0} add(a, d)
  ROOT f = f32[256]{0} negate(e)
}
"""


def sizes(text):
    return [(array.shape, array.bytes) for array in hlo_memory.at_peak(text)]


def test_arrays_lie_there_until_they_are_needed_no_more():
    assert sizes(CHAIN) == [("f32[1024]", 4096.0), ("f32[512]", 2048.0), ("f32[256]", 1024.0)]
    names = [array.op_name for array in hlo_memory.at_peak(CHAIN)]
    assert names == ["jit(f)/mlp/concatenate", "jit(f)/mlp/concatenate", "jit(f)/attn/neg"]


# The larger part of a pair ends with c; d lies where c does, which nothing else needs.
PAIR = """HloModule pair, is_scheduled=true

negated (a: f32[1024]) -> f32[1024] {
  a = f32[1024]{0} parameter(0)
  ROOT b = f32[1024]{0} negate(a)
}

ENTRY main (x: f32[256]) -> f32[256] {
  x = f32[256]{0} parameter(0)
  pair = (f32[256]{0}, f32[512]{0}) custom-call(x), custom_call_target="pair"
  b = f32[512]{0} get-tuple-element(pair), index=1
  c = f32[1024]{0} concatenate(b, b), dimensions={0}
  d = f32[1024]{0} fusion(c), kind=kLoop, calls=negated
  e = f32[2048]{0} concatenate(d, d), dimensions={0}
  a = f32[256]{0} get-tuple-element(pair), index=0
  ROOT f = f32[256]{0} custom-call(a, e), custom_call_target="end"
}
"""


def test_what_ends_makes_room():
    assert sizes(PAIR) == [("f32[2048]", 8192.0), ("f32[1024]", 4096.0), ("f32[256]", 1024.0)]
    assert len(hlo_memory.at_peak(PAIR)[1].written_by) == 2


LOOP = """HloModule loop, is_scheduled=true

update (stack: f32[8,256], row: f32[1,256], i: s32[]) -> f32[8,256] {
  stack = f32[8,256]{1,0} parameter(0)
  row = f32[1,256]{1,0} parameter(1)
  i = s32[] parameter(2)
  zero = s32[] constant(0)
  ROOT updated = f32[8,256]{1,0} dynamic-update-slice(stack, row, i, zero)
}

body (state: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  state = (s32[], f32[8,256]{1,0}) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  stack = f32[8,256]{1,0} get-tuple-element(state), index=1
  row = f32[1,256]{1,0} custom-call(i), custom_call_target="row"
  new = f32[8,256]{1,0} fusion(stack, row, i), kind=kLoop, calls=update, metadata={op_name="jit(f)/while/body/set"}
  one = s32[] constant(1)
  next = s32[] add(i, one)
  ROOT after = (s32[], f32[8,256]{1,0}) tuple(next, new)
}

condition (state: (s32[], f32[8,256])) -> pred[] {
  state = (s32[], f32[8,256]{1,0}) parameter(0)
  i = s32[] get-tuple-element(state), index=0
  eight = s32[] constant(8)
  ROOT on = pred[] compare(i, eight), direction=LT
}

ENTRY main () -> f32[256] {
  first = s32[] custom-call(), custom_call_target="zero"
  empty = f32[8,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  start = (s32[], f32[8,256]{1,0}) tuple(first, empty)
  loop = (s32[], f32[8,256]{1,0}) while(start), condition=condition, body=body
  full = f32[8,256]{1,0} get-tuple-element(loop), index=1
  last = f32[1,256]{1,0} custom-call(), custom_call_target="row"
  changed = f32[8,256]{1,0} fusion(full, last, first), kind=kLoop, calls=update
  ROOT sum = f32[256]{0} custom-call(changed), custom_call_target="sum"
}
"""


def test_what_is_changed_in_place_lies_there_once():
    assert sizes(LOOP) == [("f32[8,256]", 8192.0), ("f32[1,256]", 1024.0), ("s32[]", 4.0)]
    assert hlo_memory.at_peak(LOOP)[0].op_name == "jit(f)/while/body/set"


@pytest.mark.parametrize("remat", [True, False])
def test_it_is_near_the_compilers_total(remat):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    def loss(ws, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, ws)[0])

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 64, 64), (512, 64))]
    compiled = jax.jit(jax.grad(loss)).lower(*arrays).compile()
    found = sum(array.bytes for array in hlo_memory.at_peak(compiled.as_text()))
    total = compiled.memory_analysis().temp_size_in_bytes
    assert 0.9 * total < found < 1.1 * total
    assert total > 16 * 512 * 64 * 4  # a layer's input, of each of them
