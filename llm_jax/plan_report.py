"""What `python -m llm_jax.plan` prints of a plan."""

import shlex
from collections.abc import Sequence

from llm_jax.plan_search import Found
from llm_jax.planning import Plan, Temporary
from llm_jax.planning_decode import DecodePlan, Part
from llm_jax.roofline import Limits

GIB = 2**30
BOUND = "an upper bound, not a measurement"


def training(name: str, count: int, plan: Plan) -> str:
    """Of a training step on a topology of `count` devices."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    lines = [f"{name}: {count} devices, mesh {mesh}; compiled in {plan.compile_seconds:.0f} s", "", "GiB on a device"]
    modules = ", ".join(f"{module} {_gib(size)}" for module, size in plan.params.items())
    # Attention's scores, again for its gradient, and the masked part of its blocks; the optimizer.
    other = plan.flops - plan.model_flops - plan.recomputed_flops
    lines += [
        f"  parameters  {_gib(sum(plan.params.values())):>8}   {modules}",
        f"  optimizer   {_gib(plan.optimizer):>8}",
        f"  temporary   {_gib(plan.temporary):>8}   activations, gradients, gathered weights",
        f"  peak        {_gib(plan.peak):>8}{_verdict(plan.fits, plan.memory)}",
        *_held(plan.held),
        "",
        "A step on a device",
        f"  {plan.flops / 1e12:.4g} TFLOP: of the model {plan.model_flops / 1e12:.4g}, of layers computed again "
        f"{plan.recomputed_flops / 1e12:.4g}, else {other / 1e12:.4g}",
        f"  {plan.traffic / 1e9:.4g} GB of memory traffic (an estimate)",
    ]
    for kind, (times, sent) in plan.collectives.items():
        lines.append(f"  {times:.0f} x {kind}, {sent / 1e9:.4g} GB sent")
    if plan.limits is not None:
        lines += ["", "Seconds that it takes at least", *_limits(plan.limits)]
        lines += [f"At most {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}: {BOUND}"]
    lines += [f"warning: {each}" for each in plan.warnings]
    return "\n".join(lines)


def decode(name: str, count: int, plan: DecodePlan, *, batch_size: int, prompt_tokens: int, new_tokens: int) -> str:
    """Of generating on one device of a topology."""
    which = "one device" if count == 1 else f"one device of {count}, the others idle or with texts of their own"
    return "\n".join(
        [
            f"{name}: {which}; {batch_size} rows of {prompt_tokens} tokens and {new_tokens} new ones",
            "",
            "GiB on the device",
            f"  weights     {_gib(plan.weights):>8}",
            f"  cache       {_gib(plan.cache):>8}   keys and values of all rows, when it is longest",
            f"  peak        {_gib(plan.peak):>8}{_verdict(plan.fits, plan.memory)}",
            *_part("The prompts", plan.prefill),
            *_part(f"{plan.decode.tokens // batch_size} new tokens of each row, the last ones", plan.decode),
        ]
    )


def _part(title: str, part: Part) -> list[str]:
    lines = [
        "",
        f"{title}; compiled in {part.compile_seconds:.0f} s",
        f"  {part.flops / 1e12:.4g} TFLOP, {part.traffic / 1e9:.4g} GB of memory traffic (an estimate)",
        f"  {_gib(part.temporary)} GiB of temporary memory: "
        + ", ".join(f"{module} {_gib(size)}" for module, size in part.held.by_module.items()),
    ]
    if part.limits is not None:
        lines += ["  seconds that it takes at least", *_limits(part.limits)]
        lines += [f"  at most {part.tokens_per_second:,.0f} tokens/s: {BOUND}"]
    return lines


def search(found: Found, config: str, changes: Sequence[str]) -> str:
    """The best of a search, as command lines; `changes` are the keys that were given."""
    told = ", ".join(f"{count} {outcome}" for outcome, count in found.outcomes.items())
    lines = [f"{found.candidates} ways to divide it; of those that were looked at {told}"]
    for candidate, plan in found.best:
        speed = f"{plan.flops / 1e12:.4g} TFLOP a step"
        if plan.limits is not None:
            speed = f"at most {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}"
        own = [change for change in changes if not candidate.sets(change.partition("=")[0])]
        words = ["python", "-m", "llm_jax.main", f"--config={config}"]
        words += [f"--config.{change}" for change in (*own, *candidate.changes)]
        lines += ["", f"{speed}, {_gib(plan.peak)} GiB: {candidate}", shlex.join(words)]
    if found.best:
        lines += ["", "Speeds are upper bounds, not measurements."]
    return "\n".join(lines)


def _verdict(fits: bool | None, memory: float | None) -> str:
    return "" if memory is None else f"   {'fits' if fits else 'DOES NOT FIT'} in {memory / GIB:.1f}"


def _limits(limits: Limits) -> list[str]:
    told = {"flops": "", "memory": "", "links": ""}
    told["in_turn"] = "instructions one after the other: " + ", ".join(
        f"{seconds:.3g} for {unit}" for unit, seconds in limits.in_turn_by_unit.items()
    )
    lines = []
    for name, words in told.items():
        mark = "<- the bound" if name == limits.bound else ""
        lines.append(f"  {name.replace('_', ' '):8} {getattr(limits, name):8.4g} {words} {mark}".rstrip())
    return lines


def _held(held: Temporary) -> list[str]:
    lines = ["", f"Where the temporary memory goes: {_gib(held.bytes)} GiB, an estimate by when arrays are needed"]
    lines += ["  " + ", ".join(f"{module} {_gib(size)}" for module, size in held.by_module.items())]
    return lines + [f"  {_gib(size):>8} {shape} {_short(name)}" for size, shape, name in held.largest]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def _short(op_name: str) -> str:
    """The end of an operation's name, which is long where it is in several loops."""
    return op_name if len(op_name) <= 60 else "..." + op_name[-60:]
