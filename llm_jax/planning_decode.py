"""What generating text would need and could reach on a device that is not here, by compiling it for one.

A model that generates lies whole on one device; of a topology of more, the others would do the same for other texts.
"""

import dataclasses
import functools
import time
from typing import Any

import jax

from llm_jax import decode_weights, decoding, engine, hlo, hlo_cost, model, planning, roofline, sharding
from llm_jax.chips import Topology
from llm_jax.config import Config, MeshConfig
from llm_jax.kernel_flops import KernelFlops
from llm_jax.roofline import Limits


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of the sampler, executed once; bytes unless another unit is named."""

    tokens: int  # of all rows, that it reads or writes
    compile_seconds: float
    temporary: int
    held: planning.Temporary
    peak: int
    flops: float
    traffic: float
    limits: Limits | None  # None: nothing is known of the chip

    @property
    def tokens_per_second(self) -> float | None:
        """At most."""
        return None if self.limits is None else self.tokens / self.limits.seconds


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Of one chip; bytes."""

    weights: int
    cache: int  # keys and values of all rows, when it is longest
    memory: float | None  # what a chip has
    prefill: Part
    decode: Part

    @property
    def peak(self) -> int:
        return max(self.prefill.peak, self.decode.peak)

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = dataclasses.asdict(self) | {"peak": self.peak, "fits": self.fits}
        for name in ("prefill", "decode"):
            told[name]["tokens_per_second"] = getattr(self, name).tokens_per_second
        return told


def plan_decode(
    cfg: Config,
    topology: Topology,
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    weights: str | None = None,
    cache_dtype: str | None = None,
) -> DecodePlan:
    """Compiles prefill and decode of the sampler for the topology's first device, and reads what they do.

    The decode program is that of the last tokens, with the longest cache. Where what is asked for decides what is
    computed, it is the cheapest: greedy, without penalties. Flops are of products of matrices: attention of a single
    query, which a TPU's compiler gives to the vector unit, has none there.

    Args:
        weights, cache_dtype: as of `llm_jax.sample`.

    Raises:
        InputError: `model.vocab_size` is not known; a DoesNotFit.
    """
    cfg = planning.with_vocab_size(cfg)
    mesh = sharding.make_mesh(MeshConfig(), topology.devices[:1])
    length = prompt_tokens + new_tokens
    slides = not cfg.model.use_rope and length > cfg.model.block_size
    program = engine.Program(cfg.model, cfg.model.vocab_size, cache_dtype=cache_dtype, slides=slides, mesh=mesh)
    lay_out = functools.partial(decode_weights.lay_out, cfg.model, int8=weights == "int8")
    params = jax.eval_shape(lay_out, model.param_shapes(cfg.model))
    prompt, slots = decoding.bucket(prompt_tokens), decoding.bucket(length, decoding.SMALLEST_CACHE)
    prefill, decode, state = engine.lower(program, params, batch=batch_size, prompt_tokens=prompt, slots=slots)
    parts = [
        _part(cfg, topology, name, lowered, batch_size * count)
        for name, lowered, count in (
            ("prefill", prefill, prompt_tokens),
            ("decode", decode, engine.chunk_for(params)),
        )
    ]
    memory = None if topology.chip is None else topology.chip.memory_bytes
    return DecodePlan(_bytes(params), _bytes(state.cache), memory, *parts)


def _part(cfg: Config, topology: Topology, name: str, lowered: jax.stages.Lowered, tokens: int) -> Part:
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not planning.is_out_of_memory(error):
            raise
        raise planning.DoesNotFit(
            f"{name} does not fit on a device of {topology.name} ({planning.used_memory(error)}); take fewer rows "
            "(--batch_size), a shorter text, --weights=int8 or --cache_dtype=int8"
        ) from None
    seconds = time.monotonic() - began
    parsed = hlo.parse(compiled.as_text())
    cost = hlo_cost.analyse(parsed, custom_call_flops=KernelFlops(cfg.model), cheapest_branch=True)
    return Part(
        tokens,
        seconds,
        planning.temporary_bytes(compiled),
        planning.temporary(parsed),
        planning.peak_bytes(compiled),
        cost.flops,
        cost.bytes,
        None if topology.chip is None else roofline.limits(cost, topology.chip),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
