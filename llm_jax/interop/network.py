"""What decides a network among the fields of ModelConfig: whether two configs are the same one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm_jax.config import ModelConfig
from llm_jax.errors import InputError

# The fields that each kind of scaling reads, of those that only some do.
ROPE_FIELDS = {
    "linear": ("rope_factor",),
    "ntk": ("rope_factor",),
    "llama3": ("rope_factor", "rope_original_length", "rope_low_freq_factor", "rope_high_freq_factor"),
    "yarn": ("rope_factor", "rope_original_length", "rope_beta_fast", "rope_beta_slow", "rope_attention_factor"),
    "longrope": (
        "rope_factor",
        "rope_original_length",
        "rope_attention_factor",
        "rope_short_factors",
        "rope_long_factors",
    ),
}


# The most that a file may ask for; the deepest published model has 126 layers, the widest mixture 512 experts.
MAX_LAYERS = MAX_EXPERTS = 4096
# What reading values of any kind may raise.
WRONG_KIND = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


def shown(value: Any) -> str:
    """A value of a file in a message: on one line, and not all of it if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def named(key: str) -> str:
    """The same of a key, which is plain if it is a name."""
    return key if key.replace(".", "_").isidentifier() and len(key) <= 80 else shown(key)


def check_counts(n_layer: Any, n_expert: Any) -> None:
    """Before anything is made for each of them.

    Raises:
        InputError: more layers or experts than a file may ask for.
    """
    for name, count, most in (("layers", n_layer, MAX_LAYERS), ("experts", n_expert, MAX_EXPERTS)):
        if count is not None and not (type(count) is int and 0 < count <= most):
            raise InputError(f"its {name} ({count!r}) must be a whole number from 1 to {most}")


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """What makes them other networks, but for what the weights of norms are stored as; both values each."""
    own, there = _deciding(model), _deciding(other)
    return [
        f"model.{name} ({getattr(model, name)!r}, there {getattr(other, name)!r})"
        for name in sorted(own.keys() | there.keys())
        if (name in own) != (name in there) or own.get(name) != there.get(name)
    ]


def period(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest sequence that these are the repetition of, the last one perhaps cut."""
    length = next(n for n in range(1, len(values) + 1) if all(v == values[i % n] for i, v in enumerate(values)))
    return tuple(values[:length])


def _deciding(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide the network, those without a part in it left out, patterns at their shortest."""
    fields = dataclasses.asdict(model)
    unused = {"family", "dropout", "attention", "layer_execution", "remat"}
    unused |= {"param_dtype", "compute_dtype", "norm_weight_offset"}  # how the same numbers are stored
    if model.use_rmsnorm:
        unused |= {"use_bias"}  # LayerNorm's; those of products have fields of their own
    if not model.use_rope:
        unused |= {"rope_theta", "rope_layers"}
    scaling_fields = {name for names in ROPE_FIELDS.values() for name in names}
    unused |= scaling_fields - set(ROPE_FIELDS.get(model.rope_scaling, ()))
    if not model.qk_norm:
        unused |= {"qk_norm_axes"}
    if model.n_expert is None:
        unused |= {"n_expert_per_token", "normalize_experts"}
    for name in ("layer_types", "rope_layers"):
        pattern = fields[name]
        fields[name] = period([pattern[layer % len(pattern)] for layer in range(model.n_layer)])
    if model.attn_scale is None:
        fields["attn_scale"] = model.head_dim**-0.5
    return {name: _rounded(value) for name, value in fields.items() if name not in unused}


def _rounded(value: Any) -> Any:
    """Numbers that differ by their way through a square root are the same."""
    return float(f"{value:.12g}") if isinstance(value, float) else value
