"""Rotary position embedding: frequencies as data, one rotation, one pair convention (i, i + R)."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex64, Float, Float32, Int

TABLE_ELEMENTS = 2**20  # the largest table that becomes part of a program, 4 MiB each for sine and cosine


class RopeScaling(NamedTuple):
    """How a model trained on `original_length` positions is stretched by `factor`; see rope_frequencies."""

    kind: Literal["linear", "ntk", "llama3", "yarn", "longrope"]
    factor: float
    original_length: int
    low_freq_factor: float = 1.0  # llama3: channels turning fewer times than this are fully stretched
    high_freq_factor: float = 4.0  # llama3: those turning more often than this are left alone
    beta_fast: float = 32.0  # yarn: the same two bounds, in turns over original_length
    beta_slow: float = 1.0
    attention_factor: float | None = None  # yarn, longrope: the `scale`; None: as it follows from `factor`
    divisors: tuple[float, ...] = ()  # longrope: of each channel's frequency


def rope(
    x: Float[Array, "*B T N H"],
    positions: Int[Array, "*#B T"],
    inv_freq: Float[Array, "R"] | Float[Array, "*#B 1 R"],
    *,
    scale: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*B T N H"]:
    """Rotates channel pairs (i, i + R) of each head by positions * inv_freq[i]; R <= H/2, the rest passes.

    `inv_freq, scale = rope_frequencies(head_dim, theta, scaling)`; frequencies are data, so that
    llama3 and YaRN scaling, partial rotary and layers without rope (zeros) need no second function;
    [..., 1, R] has those of each text.
    `scale` multiplies cosine and sine, as transformers' attention_scaling does.
    Su et al. 2021, "RoFormer", in the half-split layout of Llama checkpoints.
    """
    # Of numbers that are known when it is traced numpy makes a table: XLA's CPU backend would compute the sines in
    # the loop that rotates x, anew for every head, and again in the backward pass.
    known = not any(isinstance(value, jax.core.Tracer) for value in (positions, inv_freq))
    module = np if known and positions.size * inv_freq.size <= TABLE_ELEMENTS else jnp
    angles = module.asarray(positions, np.float32)[..., None] * module.asarray(inv_freq, np.float32)
    return _rotate(x, module.cos(angles) * scale, module.sin(angles) * scale)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float32[Array, "R"], float]:
    """(inv_freq [head_dim/2] in radians per position, the `scale` of `rope`).

    Unscaled, inv_freq[i] = theta^(-2i/head_dim) and scale = 1. By `scaling.kind`:

    - linear: inv_freq / factor (Chen et al. 2023, "Extending Context Window ... Interpolation").
    - ntk: theta * factor^(H/(H-2)): the fastest channel stays, the slowest slows by `factor`.
    - llama3: a channel making n turns over original_length keeps its frequency for
      n >= high_freq_factor, gets it divided by `factor` for n <= low_freq_factor, and a blend
      linear in n between (Llama 3.1).
    - yarn: the same idea, the blend linear in the channel's index between the channels of
      beta_fast and beta_slow turns, and scale = 0.1 ln(factor) + 1 (Peng et al. 2023, "YaRN").
    - longrope: each inv_freq / divisors[i], which were searched for, one set for texts up to original_length and
      one for longer ones, and scale = sqrt(1 + ln(factor) / ln(original_length)) (Ding et al. 2024, "LongRoPE").

    Raises ValueError for an odd head_dim or an unknown kind. For partial rotary, pass the number of
    rotated channels as head_dim.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim ({head_dim}) must be even and positive: rope rotates pairs of channels")
    kind = None if scaling is None else scaling.kind
    if kind == "ntk":
        theta = theta * scaling.factor ** (head_dim / max(head_dim - 2, 1))
    channel = np.arange(head_dim // 2, dtype=np.float64)
    inv_freq = theta ** (-2 * channel / head_dim)
    scale = 1.0

    if kind in (None, "ntk"):
        kept = 1.0
    elif kind == "linear":
        kept = 0.0
    elif kind == "llama3":
        turns = scaling.original_length * inv_freq / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif kind == "yarn":
        first = math.floor(_channel_of_turns(scaling.beta_fast, head_dim, theta, scaling.original_length))
        last = math.ceil(_channel_of_turns(scaling.beta_slow, head_dim, theta, scaling.original_length))
        first, last = max(first, 0), min(last, head_dim - 1)
        # The 0.001 is the reference's way out of a division by zero.
        kept = 1 - (channel - first) / (last - first if last != first else 0.001)
        scale = scaling.attention_factor
        if scale is None:
            scale = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    elif kind == "longrope":
        inv_freq = inv_freq / np.asarray(scaling.divisors)
        scale = scaling.attention_factor
        if scale is None:
            stretch = math.log(max(scaling.factor, 1.0)) / math.log(scaling.original_length)
            scale = math.sqrt(1 + stretch)
    else:
        raise ValueError(f"rope scaling kind {kind!r} is not one of linear, ntk, llama3, yarn, longrope")

    if kind not in (None, "ntk", "longrope"):
        kept = np.clip(kept, 0.0, 1.0)
        inv_freq = inv_freq * kept + inv_freq / scaling.factor * (1 - kept)
    return jnp.asarray(inv_freq, jnp.float32), scale


def precompute_freqs_cis(
    head_dim: int, length: int, theta: float = 10000.0
) -> Complex64[Array, "{length} {head_dim//2}"]:
    """exp(1j * position * inv_freq) for positions 0..length-1: the table that `apply_rope` takes."""
    inv_freq, _ = rope_frequencies(head_dim, theta)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * inv_freq
    return jax.lax.complex(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Float[Array, "*B T N H"], freqs_cis: Complex64[Array, "P R"]) -> Float[Array, "*B T N H"]:
    """`rope` at positions 0..T-1, from a table of at least T rows; the same pairs (i, i + R).

    Not the interleaved pairs (2i, 2i + 1) of Meta's own checkpoints: convert those on import.
    """
    length = x.shape[-3]
    if freqs_cis.shape[0] < length:
        raise ValueError(f"x has {length} positions, freqs_cis only {freqs_cis.shape[0]}")
    return _rotate(x, freqs_cis.real[:length], freqs_cis.imag[:length])


def _rotate(x, cos, sin):
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"{pairs} rotated pairs need {2 * pairs} channels, the head has {x.shape[-1]}")
    cos, sin = cos[..., None, :], sin[..., None, :]  # the same angle for every head
    x1 = x[..., :pairs].astype(jnp.float32)
    x2 = x[..., pairs : 2 * pairs].astype(jnp.float32)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * pairs == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * pairs :]], axis=-1)


def _channel_of_turns(turns, head_dim, theta, original_length):
    """The (fractional) channel whose wave makes `turns` turns over original_length positions."""
    return head_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
