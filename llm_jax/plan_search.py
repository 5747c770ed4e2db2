"""Which micro-batch, checkpointing and mesh train fastest on devices that are not here, by compiling the likeliest.

A formula, far too coarse to be shown, orders all that divide evenly: by the time of each mesh and checkpointing with
the most rows at a time that seem to fit. The first are compiled, with fewer rows where they do not fit, and the best
by the plan's bound are told.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import model, planning, sharding
from llm_jax.chips import CHIPS, Chip, Topology
from llm_jax.config import Config, ModelConfig
from llm_jax.errors import InputError
from llm_jax.planning import Plan
from llm_jax.progress import say

REMATS = ("none", "dots", "block")  # from most to least memory
LEARNS = 0.8  # of the formula's bytes of what did not fit: what has more is tried last, the formula being coarse
LARGEST_SPLIT = 16  # of an axis that sends activations for every layer


@dataclasses.dataclass(frozen=True)
class Candidate:
    mesh: tuple[tuple[str, int], ...]  # every axis
    remat: str
    micro_batch: int
    seconds: float  # of a step, and bytes of a device, by the formula
    bytes: float

    @property
    def changes(self) -> tuple[str, ...]:
        """The config's keys that it sets."""
        sizes = tuple(f"mesh.{axis}={size}" for axis, size in self.mesh)
        rows = (f"train.micro_batch={self.micro_batch}", "train.accumulation_steps=1")
        return (*sizes, f"model.remat={self.remat}", *rows)

    def sets(self, key: str) -> bool:
        return key in {change.partition("=")[0] for change in self.changes}

    def order(self, room: dict[str, float]) -> tuple[bool, float]:
        """The smaller, the sooner it is tried: what seems to fit by its time, then the rest by its bytes."""
        too_large = self.bytes > room[self.remat]
        return too_large, self.bytes if too_large else self.seconds

    def needs_more_than(self, other: "Candidate") -> bool:
        """Surely: the same, with more rows at a time or with more kept of each."""
        return (
            self.mesh == other.mesh
            and self.micro_batch >= other.micro_batch
            and REMATS.index(self.remat) <= REMATS.index(other.remat)
        )

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh if size > 1) or "one device"
        return f"mesh {mesh}, remat {self.remat}, micro-batch {self.micro_batch}"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has come to."""

    best: tuple[tuple[Candidate, Plan], ...]  # the fastest first
    candidates: int
    outcomes: dict[str, int]  # "fit", "do not fit", ... -> how many


def search(
    configured: Callable[[Sequence[str]], Config], topology: Topology, *, max_compiles: int, keep: int = 3
) -> Found:
    """Compiles at most `max_compiles` training steps.

    Args:
        configured: (assignments "group.key=value") -> the config with them.

    Raises:
        InputError: nothing divides evenly over the devices.
    """
    cfg = planning.with_vocab_size(configured(()))
    groups = candidates(cfg, topology.devices, topology.chip)
    if not groups:
        raise InputError(
            f"no mesh of {len(topology.devices)} devices divides this model and train.batch_size "
            f"({cfg.train.batch_size}) evenly; change the batch"
        )
    number = sum(map(len, groups))
    room = dict.fromkeys(REMATS, math.inf if topology.chip is None else topology.chip.memory_bytes)
    outcomes: Counter[str] = Counter()
    plans: list[tuple[Candidate, Plan]] = []
    too_large: list[Candidate] = []
    began, compiled = time.monotonic(), 0
    while groups and compiled < max_compiles:
        group = min(groups, key=lambda each: each[0].order(room))
        candidate = group.pop(0)
        if any(candidate.needs_more_than(other) for other in too_large):
            outcomes["need more than what did not fit"] += 1
        else:
            left = (time.monotonic() - began) / compiled * (max_compiles - compiled) if compiled else None
            say(f"{compiled + 1} of {max_compiles}: {candidate}" + (f"; about {left:.0f} s left" if left else ""))
            compiled += 1
            outcome, plan = _tried(configured(candidate.changes), topology)
            outcomes[outcome] += 1
            if outcome == "fit":
                plans.append((candidate, plan))
                group.clear()  # fewer rows at a time take no less time
            elif outcome == "do not fit":
                too_large.append(candidate)
                room[candidate.remat] = min(room[candidate.remat], LEARNS * candidate.bytes)
        groups = list(filter(None, groups))
    return Found(tuple(sorted(plans, key=_slowness)[:keep]), number, dict(outcomes))


def _tried(cfg: Config, topology: Topology) -> tuple[str, Plan | None]:
    """(what came of it, the plan if it fits)."""
    try:
        plan = planning.plan_training(cfg, topology)
    except planning.DoesNotFit:
        return "do not fit", None
    except (InputError, jax.errors.JaxRuntimeError) as error:
        say(f"  does not compile: {' '.join(str(error).split())[:200]}")
        return "do not compile", None
    finally:
        jax.clear_caches()  # no program is compiled twice, and some are large
    return ("do not fit", None) if plan.fits is False else ("fit", plan)


def _slowness(tried: tuple[Candidate, Plan]) -> tuple[float, ...]:
    """Of devices of which no rate is known, by what they compute, then by what they send."""
    _, plan = tried
    return (plan.seconds,) if plan.seconds is not None else (plan.flops, sum(b for _, b in plan.collectives.values()))


def candidates(cfg: Config, devices: Sequence[Any], chip: Chip | None) -> list[list[Candidate]]:
    """All that divide evenly over the devices; of each mesh and checkpointing a list, most rows first."""
    groups: list[list[Candidate]] = []
    known = (cfg, _weights(cfg.model), model.train_flops_per_token(cfg.model, cfg.seq_len))
    for mesh in _meshes(cfg, devices):
        parts = sharding.row_parts(mesh)
        rows = cfg.train.batch_size // parts if cfg.train.batch_size % parts == 0 else 0
        for remat in REMATS:
            groups.append([])
            for micro_batch in (parts * of for of in reversed(_divisors(rows))):
                estimate = _estimate(*known, mesh, remat, micro_batch, chip or CHIPS["v5e"])
                groups[-1].append(Candidate(tuple(mesh.shape.items()), remat, micro_batch, *estimate))
    return list(filter(None, groups))


def _divisors(number: int, largest: int | None = None) -> list[int]:
    return [d for d in range(1, (largest or number) + 1) if number % d == 0]


def _meshes(cfg: Config, devices: Sequence[Any]) -> Iterable[Mesh]:
    count = len(devices)
    largest = min(count, LARGEST_SPLIT)
    experts = _divisors(math.gcd(cfg.model.n_expert, count)) if cfg.model.n_expert else [1]
    for tensor, context, expert in itertools.product(_divisors(count, largest), _divisors(count, largest), experts):
        rest, remainder = divmod(count, tensor * context * expert)
        for fsdp in _divisors(rest) if not remainder else ():
            mesh = Mesh(np.reshape(devices, (rest // fsdp, fsdp, expert, context, tensor)), sharding.AXES)
            try:
                sharding.check_model(cfg.model, cfg.seq_len, mesh)
            except InputError:
                continue
            yield mesh


def _weights(cfg: ModelConfig) -> Counter[str]:
    """Letters of axes -> entries of all parameters that have them."""
    axes, shapes = (jax.tree.leaves(tree) for tree in (model.param_axes(cfg), model.param_shapes(cfg)))
    found: Counter[str] = Counter()
    for letters, shape in zip(axes, shapes, strict=True):
        found[letters] += shape.size
    return found


def _estimate(
    cfg: Config,
    weights: Counter[str],
    flops_per_token: float,
    mesh: Mesh,
    remat: str,
    micro_batch: int,
    chip: Chip,
) -> tuple[float, float]:
    """(seconds of a step, bytes of a device), coarsely."""
    m, size = cfg.model, mesh.shape
    rows = micro_batch // sharding.row_parts(mesh)
    tokens = rows * cfg.seq_len // size["context"]  # of a device, at a time
    times = cfg.train.batch_size // micro_batch
    own = sum(number / _parts(letters, size) for letters, number in weights.items())
    whole = own * size["fsdp"]
    flops = flops_per_token * tokens * times / size["tensor"]
    flops *= {"none": 1, "dots": 1.05, "block": 4 / 3}[remat]

    def share(axis: str) -> float:
        return (size[axis] - 1) / size[axis]

    passes = 3 if remat == "block" else 2
    stream = m.n_layer * tokens * m.n_embd * 2  # bytes of what a layer hands on, of all layers
    keys = m.n_layer * tokens * size["context"] * 2 * m.n_kv_head * m.head_dim * 2 / size["tensor"]
    sent = (2 * passes + 4) * whole * share("fsdp") + 2 * 4 * own * share("data")
    sent += 2 * 2 * passes * stream * share("tensor") + passes * keys * share("context")
    sent += 2 * passes * stream * size["expert"] * share("expert")
    width = (m.n_head + 2 * m.n_kv_head) * m.head_dim + 3 * m.mlp_dim * (m.n_expert_per_token if m.n_expert else 1)
    wide = width / size["tensor"] / m.n_embd
    kept = {"block": 1, "dots": 2 + wide, "none": 4 + 2 * wide}
    state = 4 * (4 if times > 1 else 3) * own  # parameters, two moments, and sums of gradients
    layer = 10 * whole / m.n_layer + 10 * m.vocab_size * m.n_embd / size["tensor"]  # gathered, and its gradient
    return flops / chip.flops + times * sent / chip.link_bandwidth, state + layer + stream * kept[remat]


def _parts(letters: str, size: dict[str, int]) -> int:
    if letters.removeprefix("L") in sharding.WHOLE:
        return 1
    return math.prod(size[sharding.SPLIT[letter]] for letter in letters if letter in sharding.SPLIT)
