"""OptimConfig -> an optax transformation; which parameters decay, and as which matrices Muon takes them, comes
from their axis letters."""

import dataclasses
import difflib
import functools
import inspect
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from llm_jax import ops, sharding
from llm_jax.config import OptimConfig
from llm_jax.errors import InputError


class Rates(NamedTuple):
    """What the runs of one program may differ in; then these stand for the config's own, and may be traced."""

    peak_lr: float | Float[Array, ""]
    final_lr: float | Float[Array, ""]


def make_schedule(cfg: OptimConfig, *, num_steps: int, rates: Rates | None = None) -> optax.Schedule:
    """Update number (from 0) -> learning rate: linear warm-up, then `cfg.schedule`.

    The first update already has peak_lr / warmup_steps; the last one of `num_steps` has final_lr, unless the
    schedule is constant or all is warm-up. "cosine" and "linear" fall from the warm-up on, "wsd" (warm-up, stable,
    decay: Hu et al. 2024, "MiniCPM") in a line over the last `decay_fraction` of all steps, or what the warm-up
    leaves of it.
    """
    peak_lr, final_lr = rates or (cfg.peak_lr, cfg.final_lr)
    last = max(num_steps, cfg.warmup_steps + 1)
    falling = last - cfg.warmup_steps  # steps
    if cfg.schedule == "wsd":
        falling = min(falling, max(1, round(cfg.decay_fraction * num_steps)))

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        warmup = (count + 1) / max(cfg.warmup_steps, 1)
        done = jnp.clip((count + 1 - (last - falling)) / falling, 0, 1)
        decay = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": 1 - done,
            "wsd": 1 - done,
            "constant": 1.0,
        }[cfg.schedule]
        decayed = final_lr + (peak_lr - final_lr) * decay
        return jnp.where(count < cfg.warmup_steps, peak_lr * warmup, decayed).astype(jnp.float32)

    return schedule


def decays(axes: str) -> bool:
    """Whether a parameter with these axis letters is a weight matrix: one that reads or writes the width D.

    A norm scale stacked over layers ("LD") or a bias per head ("LNH") is a matrix only by its shape.
    """
    return "D" in axes and len(axes.replace("L", "")) > 1


def make_optimizer(
    cfg: OptimConfig,
    *,
    num_steps: int,
    axes: Any,
    rates: Rates | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019), Muon, or the optax optimizer `cfg.name`.

    Weight decay is on weight matrices only. An optimizer of optax gets the schedule, and those of b1, b2,
    weight_decay and the mask that it has; its other arguments keep optax's defaults (so does adafactor's
    weight_decay_rate, which the rate does not multiply).

    Args:
        cfg: its name must be one that `check_name` lets through.
        axes: `model.param_axes`, the axis letters of every parameter.
        mesh: of the devices that hold the parameters, among which Muon divides its matrices; None: one device.

    Raises:
        ValueError: Muon, and a parameter whose letters do not say which matrices it holds.
    """
    schedule = make_schedule(cfg, num_steps=num_steps, rates=rates)
    if cfg.name == "muon":
        peak_lr = rates.peak_lr if rates else cfg.peak_lr
        adamw_part = 1.0 if cfg.adamw_lr is None else cfg.adamw_lr / peak_lr
        optimizer = _muon(cfg, schedule, lambda count: adamw_part * schedule(count), axes, mesh)
    else:
        optimizer = _by_name(cfg, schedule, jax.tree.map(decays, axes))
    return optax.chain(optax.clip_by_global_norm(cfg.grad_clip), optimizer) if cfg.grad_clip else optimizer


def check_name(name: str) -> None:
    """Raises InputError, in one line, unless `optim.name` is "muon" or an optimizer of optax that trains here."""
    if name == "muon":
        return
    if not _takes_learning_rate(name):
        known = ["muon", *filter(_takes_learning_rate, dir(optax))]
        near = difflib.get_close_matches(name, known, 3, 0.5)
        what = "is in optax, but is no optimizer" if hasattr(optax, name) else "is no optimizer of optax"
        remedy = f"did you mean {', '.join(near)}?" if near else "take adamw, muon, lion, sgd or another"
        raise InputError(f"optim.name ({name!r}) {what}; {remedy}")
    cfg = dataclasses.replace(OptimConfig(), name=name, final_lr=0.0)

    def update() -> Any:
        params = {"matrix": jnp.zeros((2, 2)), "norm": jnp.zeros(2)}
        optimizer = make_optimizer(cfg, num_steps=1, axes={"matrix": "DF", "norm": "D"})
        return optimizer.update(params, optimizer.init(params), params)

    try:
        jax.eval_shape(update)
    except (TypeError, ValueError) as error:  # lbfgs wants the loss too, rprop a constant rate
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"optim.name ({name!r}) cannot train here: it needs more than gradients and a schedule ({reason}); "
            "take adamw, muon or another"
        ) from None


def _takes_learning_rate(name: str) -> bool:
    """Whether optax has a function of this name that makes an optimizer of a learning rate."""
    function = getattr(optax, name, None)
    if name.startswith(("_", "scale_by_")) or not isinstance(function, types.FunctionType | functools.partial):
        return False
    return "learning_rate" in inspect.signature(function).parameters


def _by_name(cfg: OptimConfig, schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    function = getattr(optax, cfg.name)
    takes = inspect.signature(function).parameters
    given = {"b1": cfg.b1, "b2": cfg.b2}
    if "mask" in takes or "weight_decay_mask" in takes:  # without one, norms would decay too
        given |= {"weight_decay": cfg.weight_decay, "mask": mask, "weight_decay_mask": mask}
    return function(learning_rate=schedule, **{key: value for key, value in given.items() if key in takes})


# -- Muon

SEPARATE = "LNKE"  # axes along which a parameter holds matrices of their own: layers, query and key heads, experts
MATRICES = ("DH", "HD", "DF", "FD")  # the two axes of a matrix, its input first
TABLES = ("VD", "CD")  # a row for each token or position


def matrix_axes(name: str, axes: str) -> tuple[int, int] | None:
    """Where the (input, output) axes of a parameter's matrices are; None: it is left to AdamW.

    q, k, v and o are a matrix per head. Left to AdamW are vectors (norms, biases) and tables, of which a step
    changes some rows only (Jordan et al. 2024).

    Raises:
        ValueError: neither; the letters do not say which axis is the input and which the output.
    """
    letters = "".join(letter for letter in axes if letter not in SEPARATE)
    if letters in MATRICES:
        return axes.index(letters[0]), axes.index(letters[1])
    if len(letters) < 2 or letters in TABLES:
        return None
    raise ValueError(
        f"parameter {name} with axes {axes}: of {letters}, optim.py does not know which is a matrix's input and "
        "which its output; list it in MATRICES or TABLES there"
    )


class MuonState(NamedTuple):
    count: Int[Array, ""]
    momentum: Any


def scale_by_muon(
    axes: Any, *, momentum: float, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
    """Nesterov momentum, each of its matrices orthogonalized, times 0.2 sqrt(max(input, output)).

    Jordan et al. 2024, "Muon", with Adam's bias corrections, as optax.contrib.muon. By the factor the entries have
    a root mean square of 0.2, about that of AdamW's updates, so that one learning rate and one weight decay serve
    both (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2).

    Args:
        axes: where the (input, output) axes of each parameter are, as a tree of the parameters' structure.
        mesh: of the devices among which the matrices are divided; None: each computes all that it holds.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        count = state.count + 1
        now, ahead = 1 / (1 - momentum**count), 1 / (1 - momentum ** (count + 1))

        def direction(mean: Array, grad: Array, at: tuple[int, int]) -> Array:
            matrices = jnp.moveaxis(momentum * ahead * mean + (1 - momentum) * now * grad, at, (-2, -1))
            scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
            return jnp.moveaxis(scale * _orthogonalize(matrices, mesh), (-2, -1), at)

        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, grads)
        return jax.tree.map(direction, mean, grads, axes), MuonState(count, mean)

    return optax.GradientTransformation(init, update)


def _orthogonalize(matrices: Float[Array, "*B M N"], mesh: jax.sharding.Mesh | None) -> Float[Array, "*B M N"]:
    """Each device its share of the matrices, which all of them hold."""
    if mesh is None or mesh.size == 1:
        return ops.orthogonalize(matrices)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    flat = jnp.pad(flat, ((0, -len(flat) % mesh.size), (0, 0), (0, 0)))
    flat = jax.lax.with_sharding_constraint(flat, sharding.split_batch(mesh))
    flat = jax.lax.with_sharding_constraint(ops.orthogonalize(flat), sharding.replicated(mesh))
    return flat[: math.prod(matrices.shape[:-2])].reshape(matrices.shape)


def _muon(
    cfg: OptimConfig,
    schedule: optax.Schedule,
    adamw_schedule: optax.Schedule,
    axes: Any,
    mesh: jax.sharding.Mesh | None,
) -> optax.GradientTransformation:
    def place(path: tuple[Any, ...], letters: str) -> tuple[int, int] | optax.MaskedNode:
        return matrix_axes(jax.tree_util.keystr(path, simple=True, separator="/"), letters) or optax.MaskedNode()

    places = jax.tree_util.tree_map_with_path(place, axes)
    labels = jax.tree.map(
        lambda at: "muon" if at else "adamw", places, is_leaf=lambda node: isinstance(node, tuple)
    )
    parts = {
        "muon": optax.chain(
            scale_by_muon(places, momentum=cfg.muon_momentum, mesh=mesh),
            optax.add_decayed_weights(cfg.weight_decay),  # all are weight matrices
            optax.scale_by_learning_rate(schedule),
        ),
        "adamw": optax.adamw(
            adamw_schedule,
            b1=cfg.b1,
            b2=cfg.b2,
            weight_decay=cfg.weight_decay,
            mask=jax.tree.map(decays, axes),
        ),
    }
    return optax.partition(parts, labels)
