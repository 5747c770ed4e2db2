"""Rotary positions in a GGUF file: its keys of rope scaling, and tensors of factors, <-> fields of a ModelConfig."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.errors import InputError
from llm_jax.interop.tensors import Shape

FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# (factor, low_freq_factor, high_freq_factor, original length) of the published models whose factors a file lists.
LLAMA3 = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)]


def read_scaling(
    name: str,
    given: Mapping[str, Any],
    fields: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """Fields of a ModelConfig by an architecture's own keys, the fields read so far, and the factors.

    Raises:
        InputError: a scaling that is not known here.
    """
    kind = given.get("rope.scaling.type", "none")
    if "rope.scale_linear" in given:
        return {"rope_scaling": "linear", "rope_factor": given["rope.scale_linear"]}
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise InputError(f"{name}.rope.scaling.type ({kind!r}) must be none, linear, yarn or longrope")
    if kind == "linear":
        return {"rope_scaling": kind}
    if kind == "yarn":
        own = fields.get("rope_attention_factor")
        return {"rope_scaling": kind, "rope_attention_factor": own and own * _yarn_scale(fields["rope_factor"])}
    unscaled = {"rope_factor": 1.0, "rope_original_length": None, "rope_attention_factor": None}
    if "rope_freqs.weight" in shapes:
        return unscaled | _llama3(fields, _factors(read, "rope_freqs.weight"))
    if "rope_factors_long.weight" in shapes:
        length = fields.get("rope_original_length") or fields["block_size"]
        factor = max(1.0, fields["block_size"] / length)
        own, usual = fields.get("rope_attention_factor"), _longrope_scale(factor, length)
        return {
            "rope_scaling": "longrope",
            "rope_original_length": length,
            "rope_factor": factor,
            "rope_attention_factor": None if own is None or math.isclose(own, usual, rel_tol=1e-6) else own,
            "rope_short_factors": _factors(read, "rope_factors_short.weight"),
            "rope_long_factors": _factors(read, "rope_factors_long.weight"),
        }
    return unscaled


def as_written(value: Any) -> Any:
    """A float32 as the number of few digits that it was before."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _yarn_scale(factor: float) -> float:
    """What llama.cpp multiplies its attention factor by, besides."""
    return 0.1 * math.log(factor) + 1


def _longrope_scale(factor: float, length: int) -> float:
    """The attention factor where none is given; see ops.rope_frequencies."""
    return math.sqrt(1 + math.log(factor) / math.log(length))


def _factors(read: Callable[[str], np.ndarray], name: str) -> tuple[float, ...]:
    return tuple(as_written(value) for value in read(name).astype(np.float32).ravel().tolist())


def _llama3(fields: Mapping[str, Any], factors: tuple[float, ...]) -> dict[str, Any]:
    """As llama3 scaling where these are a published model's factors, else as factors."""
    for factor, low, high, length in LLAMA3:
        expected = _llama3_factors(2 * len(factors), fields["rope_theta"], factor, low, high, length)
        if np.allclose(factors, expected, rtol=1e-5):
            return {
                "rope_scaling": "llama3",
                "rope_factor": factor,
                "rope_low_freq_factor": low,
                "rope_high_freq_factor": high,
                "rope_original_length": length,
            }
    return _as_longrope(factors, fields["block_size"])


def _as_longrope(factors: tuple[float, ...], length: int) -> dict[str, Any]:
    """The same factors for texts of any length."""
    return {
        "rope_scaling": "longrope",
        "rope_factor": 1.0,
        "rope_short_factors": factors,
        "rope_long_factors": factors,
        "rope_original_length": length,
        "rope_attention_factor": 1.0,
    }


def listed(model: ModelConfig, factors: Mapping[str, np.ndarray]) -> ModelConfig:
    """The same model, its factors as a file of them is read."""
    if "rope_freqs.weight" not in factors:
        return model
    listed = _factors(factors.__getitem__, "rope_freqs.weight")
    return dataclasses.replace(model, **_as_longrope(listed, model.block_size))


def _llama3_factors(channels: int, theta: float, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """What llama3 scaling divides each frequency by; see ops.rope_frequencies."""
    turns = length * theta ** (-np.arange(0, channels, 2) / channels) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / factor)


def write_scaling(model: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(an architecture's own keys, tensors of factors by name) of a model with rotary positions."""
    keys: dict[str, Any] = {}
    factors: dict[str, np.ndarray] = {}
    if model.rope_scaling in ("linear", "yarn"):
        keys |= {"rope.scaling.type": model.rope_scaling, "rope.scaling.factor": model.rope_factor}
    own = model.rope_attention_factor
    is_one_list = model.rope_short_factors == model.rope_long_factors and own == 1.0
    if model.rope_scaling == "longrope" and is_one_list:
        factors["rope_freqs.weight"] = np.asarray(model.rope_long_factors, np.float32)
    elif model.rope_scaling in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = model.rope_original_length
    if model.rope_scaling == "yarn" and own is not None:
        keys["rope.scaling.attn_factor"] = own / _yarn_scale(model.rope_factor)
    if model.rope_scaling == "longrope" and not is_one_list:
        usual = _longrope_scale(model.rope_factor, model.rope_original_length)
        keys["rope.scaling.attn_factor"] = usual if own is None else own
    if model.rope_scaling == "yarn":
        keys |= {"rope.scaling.yarn_beta_fast": model.rope_beta_fast}
        keys |= {"rope.scaling.yarn_beta_slow": model.rope_beta_slow}
    if model.rope_scaling == "longrope" and not is_one_list:
        keys["rope.scaling.type"] = "longrope"
        factors["rope_factors_short.weight"] = np.asarray(model.rope_short_factors, np.float32)
        factors["rope_factors_long.weight"] = np.asarray(model.rope_long_factors, np.float32)
    if model.rope_scaling == "llama3":
        scaling = (model.rope_low_freq_factor, model.rope_high_freq_factor, model.rope_original_length)
        listed = _llama3_factors(model.rope_dim, model.rope_theta, model.rope_factor, *scaling)
        factors["rope_freqs.weight"] = listed.astype(np.float32)
    return keys, factors
