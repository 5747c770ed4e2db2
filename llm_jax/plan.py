"""Whether a run fits on devices that are not here, and how fast it can be at most:

python -m llm_jax.plan --config=configs/llama3_8b.py --topology=v5p:4x4x4 [--config.mesh.fsdp=16 ...]

Compiles the training step for them, which needs libtpu (pip install 'llm_jax[tpu]', in an environment of its own);
--topology=cpu:8 needs nothing. No data is read.
"""

import json
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from llm_jax import flags
from llm_jax.config_file import load_file, override
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.progress import say

if TYPE_CHECKING:  # it imports jax
    from llm_jax.planning import Plan, Temporary
    from llm_jax.roofline import Limits

_CONFIG = absl_flags.DEFINE_string("config", None, "Config file, such as configs/llama3_8b.py.")
_CHANGES = absl_flags.DEFINE_multi_string(
    flags.CONFIG_CHANGES, [], "Changes a key of the config, such as --config.mesh.fsdp=16."
)
_TOPOLOGY = absl_flags.DEFINE_string(
    "topology", None, "Chips and how they are linked: v5e:2x4, v5p:4x4x4, cpu:8, ..."
)
_JSON = absl_flags.DEFINE_bool("json", False, "The numbers as one line of JSON.")

GIB = 2**30


def main() -> None:
    if not _CONFIG.value or not _TOPOLOGY.value:
        missing = "config" if not _CONFIG.value else "topology"
        raise InputError(f"no --{missing} given; for example --config=configs/llama3_8b.py --topology=v5p:4x4x4")
    config = load_file(_CONFIG.value)
    override(config, _CHANGES.value)
    config.data.source, config.data.path = "python_stdlib", None  # no data is read
    cfg = freeze(config)
    with flags.importing():
        import jax

        from llm_jax import chips
        from llm_jax.planning import plan_training
    jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
    jax.config.update("jax_num_cpu_devices", chips.number_of_cpus(_TOPOLOGY.value) or 1)
    topology = chips.find(_TOPOLOGY.value)
    say(f"compiles for {topology.name}, which takes seconds to minutes")
    plan = plan_training(cfg, topology)
    if _JSON.value:
        print(json.dumps(plan.as_dict()))
    else:
        print(_report(topology.name, len(topology.devices), plan))


def _report(name: str, count: int, plan: "Plan") -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    lines = [f"{name}: {count} devices, mesh {mesh}; compiled in {plan.compile_seconds:.0f} s", "", "GiB on a device"]
    modules = ", ".join(f"{module} {_gib(size)}" for module, size in plan.params.items())
    lines += [
        f"  parameters  {_gib(sum(plan.params.values())):>8}   {modules}",
        f"  optimizer   {_gib(plan.optimizer):>8}",
        f"  temporary   {_gib(plan.temporary):>8}   activations, gradients, gathered weights",
    ]
    verdict = ""
    if plan.memory is not None:
        verdict = f"   {'fits' if plan.fits else 'DOES NOT FIT'} in {plan.memory / GIB:.1f}"
    lines += [f"  peak        {_gib(plan.peak):>8}{verdict}", *_held(plan.held), "", "A step on a device"]
    lines += [f"  {plan.flops / 1e12:.4g} TFLOP, of the model {plan.model_flops / 1e12:.4g}"]
    lines += [f"  {plan.traffic / 1e9:.4g} GB of memory traffic (an estimate)"]
    for kind, (times, sent) in plan.collectives.items():
        lines.append(f"  {times:.0f} x {kind}, {sent / 1e9:.4g} GB sent")
    if plan.limits is not None:
        lines += _limits(plan.limits)
        lines += [
            f"At most {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}: an upper bound, not a measurement"
        ]
    lines += [f"warning: {each}" for each in plan.warnings]
    return "\n".join(lines)


def _limits(limits: "Limits") -> list[str]:
    told = {"flops": "", "memory": "", "links": ""}
    told["in_turn"] = "instructions one after the other: " + ", ".join(
        f"{seconds:.3g} for {unit}" for unit, seconds in limits.in_turn_by_unit.items()
    )
    lines = ["", "Seconds that it takes at least"]
    for name, words in told.items():
        mark = "<- the bound" if name == limits.bound else ""
        lines.append(f"  {name.replace('_', ' '):8} {getattr(limits, name):8.4g} {words} {mark}".rstrip())
    return lines


def _held(held: "Temporary") -> list[str]:
    lines = ["", f"Where the temporary memory goes: {_gib(held.bytes)} GiB, an estimate by when arrays are needed"]
    lines += ["  " + ", ".join(f"{module} {_gib(size)}" for module, size in held.by_module.items())]
    return lines + [f"  {_gib(size):>8} {shape} {_short(name)}" for size, shape, name in held.largest]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def _short(op_name: str) -> str:
    """The end of an operation's name, which is long where it is in several loops."""
    return op_name if len(op_name) <= 60 else "..." + op_name[-60:]


if __name__ == "__main__":
    flags.run(main)
