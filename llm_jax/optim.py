"""OptimConfig -> an optax transformation; which parameters decay comes from their axis letters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from llm_jax.config import OptimConfig


def make_schedule(cfg: OptimConfig, *, num_steps: int) -> optax.Schedule:
    """Update number (from 0) -> learning rate: linear warm-up, then cosine to `final_lr` or constant.

    The first update already has peak_lr / warmup_steps; the last one of `num_steps` has final_lr.
    """

    def schedule(count: Int[Array, ""] | int) -> Float[Array, ""]:
        warmup = (count + 1) / max(cfg.warmup_steps, 1)
        done = (count - cfg.warmup_steps + 1) / max(num_steps - cfg.warmup_steps, 1)
        decay = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))),
            "constant": 1.0,
        }[cfg.schedule]
        decayed = cfg.final_lr + (cfg.peak_lr - cfg.final_lr) * decay
        return jnp.where(count < cfg.warmup_steps, cfg.peak_lr * warmup, decayed).astype(jnp.float32)

    return schedule


def decays(axes: str) -> bool:
    """Whether a parameter with these axis letters is a weight matrix: one that reads or writes the width D.

    A norm scale stacked over layers ("LD") or a bias per head ("LNH") is a matrix only by its shape.
    """
    return "D" in axes and len(axes.replace("L", "")) > 1


def make_optimizer(cfg: OptimConfig, *, num_steps: int, axes: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter 2019) with decay on weight matrices only.

    Args:
        axes: `model.param_axes`, the axis letters of every parameter.
    """
    adamw = optax.adamw(
        make_schedule(cfg, num_steps=num_steps),
        b1=cfg.b1,
        b2=cfg.b2,
        weight_decay=cfg.weight_decay,
        mask=jax.tree.map(decays, axes),
    )
    return optax.chain(optax.clip_by_global_norm(cfg.grad_clip), adamw) if cfg.grad_clip else adamw
