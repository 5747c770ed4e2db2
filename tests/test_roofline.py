"""The least time of small programs, written out, on a chip of round numbers."""

import pytest

from llm_jax import hlo_cost, roofline
from llm_jax.chips import Chip

CHIP = Chip(flops=1e6, memory_bytes=1e9, memory_bandwidth=1e5, link_bandwidth=1e4)
HEAD = "HloModule steps, is_scheduled=true, num_partitions=4\n\nENTRY main (x: f32[100,100]) -> f32[100,100] {\n"
SUM = "add (a: f32[], b: f32[]) -> f32[] {\n  a = f32[] parameter(0)\n  b = f32[] parameter(1)\n"
SUM += "  ROOT c = f32[] add(a, b)\n}\n\n"
X = "  x = f32[100,100]{1,0} parameter(0)\n"
PRODUCT = "  y = f32[100,100]{1,0} dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"


def limits(*lines):
    head, entry = HEAD.split("\n\n")
    return roofline.limits(hlo_cost.analyse("\n".join([head, "", SUM + entry + X + "".join(lines) + "}\n"])), CHIP)


def test_instructions_are_executed_one_after_the_other():
    found = limits(PRODUCT, "  ROOT z = f32[100,100]{1,0} negate(y)\n")
    product, moved = 2 * 100**3 / 1e6, 4 * 100**2 / 1e5
    assert found.flops == pytest.approx(product)
    assert found.memory == pytest.approx((2 + 2) * moved)
    assert found.in_turn == pytest.approx(product + 2 * moved)  # the product's own bytes move meanwhile
    assert found.in_turn_by_unit == pytest.approx({"flops": product, "memory": 2 * moved, "links": 0})
    assert found.bound == "in_turn" and found.seconds == found.in_turn


def test_an_exchange_that_is_waited_for_takes_its_time():
    found = limits("  ROOT z = f32[100,100]{1,0} all-reduce(x), replica_groups=[1,4]<=[4], to_apply=add\n")
    assert found.links == found.in_turn == pytest.approx(2 * 4 * 100**2 * 3 / 4 / 1e4)


def test_an_exchange_in_the_background_takes_none_of_the_others():
    found = limits(
        "  s = f32[100,100]{1,0} all-reduce-start(x), replica_groups=[1,4]<=[4], to_apply=add\n",
        PRODUCT,
        "  z = f32[100,100]{1,0} all-reduce-done(s)\n",
        "  ROOT w = f32[100,100]{1,0} add(y, z)\n",
    )
    assert found.links == pytest.approx(2 * 4 * 100**2 * 3 / 4 / 1e4)
    assert found.in_turn == pytest.approx(2 * 100**3 / 1e6 + 3 * 4 * 100**2 / 1e5)
    assert found.bound == "links"
