"""What a training step would need and could reach on devices that are not here, by compiling it for them."""

import dataclasses
import math
import re
import time
from collections import Counter
from typing import Any

import jax
import numpy as np

from llm_jax import data, hlo, hlo_cost, hlo_memory, model, programs, roofline, sharding
from llm_jax.chips import Topology
from llm_jax.config import Config
from llm_jax.config_rules import split_runs
from llm_jax.errors import InputError
from llm_jax.kernel_flops import KernelFlops
from llm_jax.roofline import Limits

MODULES = ("embed", "attn", "mlp", "moe", "lm_head", "optimizer")
REMATERIALIZED = "rematted_computation"  # what JAX calls a checkpoint's second forward pass
LAYERS = "Transformer.hidden"  # the scope of what goes through all layers, or is kept of each


class DoesNotFit(InputError):
    """A compiler has found out that a program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Temporary:
    """What the temporary memory holds when it holds most, by the live ranges in the program's text: an estimate."""

    by_module: dict[str, float]  # bytes, the most first
    largest: tuple[tuple[float, str, str], ...]  # arrays: bytes, dtype and shape, the operation that writes it

    @property
    def bytes(self) -> float:
        return sum(self.by_module.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one chip, for one step; bytes unless another unit is named."""

    mesh: dict[str, int]
    compile_seconds: float
    params: dict[str, int]  # by module
    optimizer: int
    temporary: int
    held: Temporary
    peak: int
    memory: float | None  # what a chip has
    flops: float
    model_flops: float  # without what is computed twice
    recomputed_flops: float  # of layers, a second time for the gradient (model.remat)
    traffic: float
    collectives: dict[str, tuple[float, float]]  # kind -> (how often, bytes sent)
    limits: Limits | None  # None: nothing is known of the chip
    peak_flops: float | None  # a second
    tokens: int  # of a step, on all chips
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = ("fits", "seconds", "tokens_per_second", "mfu")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory

    @property
    def seconds(self) -> float | None:
        """That a step takes at least."""
        return None if self.limits is None else self.limits.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """At most, on all chips."""
        return None if self.limits is None else self.tokens / self.limits.seconds

    @property
    def mfu(self) -> float | None:
        """Model flops utilization, at most (Chowdhery et al. 2022, "PaLM", appendix B, with causality)."""
        return None if self.limits is None else self.model_flops / self.peak_flops / self.limits.seconds


def plan_training(cfg: Config, topology: Topology) -> Plan:
    """Compiles the step of `llm_jax.main` for the devices and reads what it does.

    Raises:
        InputError: the config can't be split over them; `model.vocab_size` is not known; a DoesNotFit.
    """
    cfg = with_vocab_size(cfg)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices)
    programs.check_trainable(cfg, mesh)
    began = time.monotonic()
    try:
        state, compiled = compile_step(cfg, mesh)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"the step does not fit on {topology.name} ({used_memory(error)}); split it further (mesh.fsdp), set "
            "model.remat=block, or raise train.accumulation_steps"
        ) from None
    seconds = time.monotonic() - began
    program = hlo.parse(compiled.as_text())
    cost = hlo_cost.analyse(
        program,
        custom_call_flops=KernelFlops(cfg.model),
        module_of=lambda name: "again" if REMATERIALIZED in name else "once",
    )
    chip = topology.chip
    tokens = cfg.train.batch_size * cfg.seq_len
    return Plan(
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        compile_seconds=seconds,
        params=_by_module(state.params),
        optimizer=sum(map(_bytes, jax.tree.leaves((state.opt_state, state.ema)))),
        temporary=temporary_bytes(compiled),
        held=temporary(program),
        peak=peak_bytes(compiled),
        memory=None if chip is None else chip.memory_bytes,
        flops=cost.flops,
        model_flops=model.train_flops_per_token(cfg.model, cfg.seq_len) * tokens / mesh.size,
        recomputed_flops=cost.flops_of.get("again", 0.0),
        traffic=cost.bytes,
        collectives=_collectives(cost),
        limits=None if chip is None else roofline.limits(cost, chip),
        peak_flops=None if chip is None else chip.flops,
        tokens=tokens,
        warnings=_warnings(cost, state.params, mesh),
    )


def with_vocab_size(cfg: Config) -> Config:
    """Raises InputError where it is the tokenizer's, which is not read."""
    known = {"bpe": cfg.data.vocab_size, "byte": 256}
    vocab_size = cfg.model.vocab_size or known.get(cfg.data.tokenizer)
    if vocab_size is None:
        raise InputError(
            "model.vocab_size is the tokenizer's, which a plan does not read; give --config.model.vocab_size"
        )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def compile_step(cfg: Config, mesh: jax.sharding.Mesh) -> tuple[Any, jax.stages.Compiled]:
    """The state of a run, as shapes where they lie, and its training step.

    Raises:
        InputError: the config is of several runs.
    """
    if len(split_runs(cfg)) > 1:
        raise InputError("a plan, or train.micro_batch=0, is of one run; leave train.seeds and optim.peak_lrs out")
    made = programs.make_programs(cfg, mesh, np.zeros(cfg.model.vocab_size, np.int32))
    state = _on(jax.eval_shape(made.init), made.placed)
    return state, made.train_step.lower(state, _batch(cfg, mesh)).compile()


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a device holds at most: what goes in, what comes out elsewhere, and what is needed on the way."""
    return _kept_bytes(compiled) + temporary_bytes(compiled)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a device needs on the way, at most at one time."""
    memory = compiled.memory_analysis()
    (place, *_) = jax.tree.leaves(compiled.input_shardings)
    if next(iter(place.device_set)).platform != "tpu":
        return memory.temp_size_in_bytes
    # libtpu's temp_size is up to a third more than what it holds against a chip's memory: a step of 33.4 GiB by it
    # compiles for a v6e with 31.25, whose most at one time, arguments included, it tells as 25.6.
    return memory.peak_memory_in_bytes - _kept_bytes(compiled)


def _kept_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def temporary(program: hlo.Program, count: int = 5) -> Temporary:
    """What lies in the temporary memory, and the `count` largest arrays in it."""
    arrays = hlo_memory.at_peak(program)
    by_module: Counter[str] = Counter()
    for array in arrays:
        module = hlo_cost.module_name(array.op_name, (*MODULES, LAYERS))
        by_module["all layers" if module == LAYERS else module] += array.bytes
    return Temporary(
        dict(by_module.most_common()),
        tuple((array.bytes, array.shape, array.op_name) for array in arrays[:count]),
    )


def _on(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)


def _batch(cfg: Config, mesh: jax.sharding.Mesh) -> data.Batch:
    shape, at = (cfg.train.batch_size, cfg.seq_len), sharding.split_batch(mesh)
    return data.Batch(*(jax.ShapeDtypeStruct(shape, of, sharding=at) for of in (np.int32, np.int32, np.float32)))


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def used_memory(error: jax.errors.JaxRuntimeError) -> str:
    """What a compiler says that a program would take."""
    used = re.search(r"Used \S+ of \S+ hbm", str(error))
    return used[0] if used else "its compiler says no more"


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of a device's part."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _by_module(params: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        found[names[1] if names[0] == "blocks" else names[0]] += _bytes(leaf)
    return dict(found)


def _collectives(cost: hlo_cost.Cost) -> dict[str, tuple[float, float]]:
    times, sent = Counter(), Counter()
    for each in cost.collectives:
        if each.group_size > 1:
            times[each.kind] += each.times
            sent[each.kind] += each.times * hlo_cost.link_bytes(each)
    return {kind: (times[kind], sent[kind]) for kind in sorted(times)}


def _warnings(cost: hlo_cost.Cost, params: Any, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Of what costs more than it need."""
    told = []
    if mesh.shape["fsdp"] > 1:
        # A layer's part of each weight, gathered along fsdp, by any dtype: all-reduces have no such size otherwise.
        sizes = {
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * mesh.shape["fsdp"] // (leaf.shape[0] if stacked else 1)
            for stacked, tree in (
                (True, params["blocks"]),
                (False, {k: v for k, v in params.items() if k != "blocks"}),
            )
            for leaf in jax.tree.leaves(tree)
            if "fsdp" in leaf.sharding.spec
        }
        wrong = [
            each
            for each in cost.collectives
            if each.kind == "all-reduce"
            and any(each.result_bytes == size * width for size in sizes for width in (2, 4))
        ]
        count, extra = (
            sum(each.times for each in wrong),
            sum(each.times * hlo_cost.link_bytes(each) for each in wrong),
        )
        # Few bytes are of another array that is as large by chance.
        if extra > 0.01 * sum(each.times * hlo_cost.link_bytes(each) for each in cost.collectives):
            told.append(
                f"{count:.0f} gathers of weights, or sums of their gradients, became all-reduces of the whole "
                f"({extra / 1e9:.1f} GB, twice what they need)"
            )
    for loop in cost.unknown_loops:
        told.append(f"how often the loop {loop.name} turns is not known; its work is counted once")
    return tuple(told)
