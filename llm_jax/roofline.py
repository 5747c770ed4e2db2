"""How long a compiled program takes at least on a chip, by what the chip's units can do at most.

Each unit has its own limit: flops over the peak of the matrix units, bytes over the bandwidth of memory, what is sent
over that of the links. They are reached only if all else is done meanwhile. But a chip executes the instructions of
its program one after the other, each of which may be held up by another unit: so a nearer limit is the sum over all
instructions of the longest that any unit takes for it. Copies and exchanges that the program begins and waits for
later are no part of that sum. The vector unit, whose peak is not published for all chips, counts as if it took no
time, and so does every start of an instruction.
"""

import dataclasses

from llm_jax import hlo_cost
from llm_jax.chips import Chip

UNITS = ("flops", "memory", "links")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds that the program takes at least."""

    flops: float
    memory: float
    links: float
    in_turn: float  # all instructions, one after the other
    in_turn_by_unit: dict[str, float]  # which unit takes so long for them

    @property
    def bound(self) -> str:
        """The name of the largest."""
        return max((*UNITS, "in_turn"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        return getattr(self, self.bound)


def limits(cost: hlo_cost.Cost, chip: Chip) -> Limits:
    """Of one execution on each chip."""
    rates = (chip.flops, chip.memory_bandwidth, chip.link_bandwidth)
    by_unit = dict.fromkeys(UNITS, 0.0)
    for step in cost.steps:
        if not step.in_background:
            each = [amount / rate for amount, rate in zip((step.flops, step.bytes, step.sent), rates, strict=True)]
            by_unit[UNITS[each.index(max(each))]] += max(each)
    sent = sum(hlo_cost.link_bytes(each) * each.times for each in cost.collectives)
    return Limits(
        *(amount / rate for amount, rate in zip((cost.flops, cost.bytes, sent), rates, strict=True)),
        sum(by_unit.values()),
        by_unit,
    )
