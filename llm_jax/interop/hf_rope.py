"""Rotary positions in a config.json, in the spellings of transformers 4 (rope_scaling) and 5 (rope_parameters)."""

import math
from collections.abc import Mapping
from typing import Any

from llm_jax.config import ModelConfig
from llm_jax.errors import InputError
from llm_jax.interop.families import Family
from llm_jax.interop.network import named, shown

ROPE_TYPES = {"default": None, "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
ROPE_TYPES |= {"longrope": "longrope", "su": "longrope"}
ROPE_KEYS = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    },
    "longrope": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_length",
        "attention_factor": "rope_attention_factor",
        "short_factor": "rope_short_factors",
        "long_factor": "rope_long_factors",
    },
}
# What a kind can't do without.
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
# Top-level keys that say what one inside rope_parameters may say too.
OUTSIDE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
OF_NO_CONSEQUENCE = ("attn_factor", "finetuned")  # of Yarn's authors; no code of transformers reads them
FULL, SLIDING = "full_attention", "sliding_attention"
LISTS = ("short_factor", "long_factor")


def keys(family: Family) -> set[str]:
    """Top-level keys that `read_rope` reads besides those of the family."""
    return {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"} | (
        {"rope_local_base_freq"} if family.local_theta is not None else set()
    )


def read_rope(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields of positions.

    Raises:
        InputError: a kind, key or value that is not known; one that is missing; two that contradict each other.
    """
    rope, local = _spelled(family, given)
    theta = rope.pop("rope_theta", family.theta)
    fraction = rope.pop("partial_rotary_factor", family.rotary_fraction)
    if fraction not in (None, 1) and family.rotary_fraction is None:
        raise InputError(f"config.json: {family.model_type} has no partial_rotary_factor ({fraction})")
    head_dim = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    kind = rope.pop("rope_type", "default")
    scaling = ROPE_TYPES[kind]
    fields = {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_dim": int(head_dim * (1 if fraction is None else fraction)),
    }
    if scaling == "yarn" and "factor" not in rope and "original_max_position_embeddings" in rope:
        rope["factor"] = given["max_position_embeddings"] / rope["original_max_position_embeddings"]
    if family.model_type == "phi3" and scaling not in (None, "longrope"):
        raise InputError(f"config.json: rope_type ({kind!r}) of phi3 must be 'longrope'")
    if missing := [key for key in NEEDED.get(scaling, ()) if key not in rope]:
        raise InputError(f"config.json: rope_type {kind!r} needs {missing[0]}, and there is none")
    if scaling == "yarn":
        _merge_mscales(rope)
    if "original_max_position_embeddings" in ROPE_KEYS.get(scaling, {}):
        length = rope.setdefault("original_max_position_embeddings", given["max_position_embeddings"])
        if scaling == "longrope":
            rope.setdefault("factor", max(1.0, given["max_position_embeddings"] / length))
    else:
        rope.pop("original_max_position_embeddings", None)  # of no consequence then
    known = ROPE_KEYS.get(scaling, {})
    for key, value in rope.items():
        if key in known:
            fields[known[key]] = value
        elif value is not False and (key, value) != ("factor", 1) and key not in OF_NO_CONSEQUENCE:
            raise InputError(f"config.json: rope's {named(key)} ({shown(value)}) is not known of rope_type {kind!r}")
    if family.local_theta is not None:
        if local.get("rope_type", "default") != "default":
            raise InputError(f"config.json: rope_type ({local['rope_type']!r}) of sliding layers must be 'default'")
        if unknown := local.keys() - {"rope_type", "rope_theta"}:
            raise InputError(f"config.json: rope's {named(sorted(unknown)[0])} is not known of sliding layers")
        fields["rope_local_theta"] = local.get("rope_theta", family.local_theta)
    return fields


def _spelled(family: Family, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all spellings say together, of full and of sliding layers; keys without a value are left out."""
    rope: dict[str, Any] = {}
    for key, there in OUTSIDE.items():
        is_older = key == "rope_theta" and given.get("rotary_emb_base") is not None  # which GPT-NeoX reads alone
        if given.get(key) is not None and not is_older:
            rope = _agreed(rope, {there: _value(key, given[key])})
    local: dict[str, Any] = {}
    if family.local_theta is not None and given.get("rope_local_base_freq") is not None:
        local = {"rope_theta": _value("rope_local_base_freq", given["rope_local_base_freq"])}
    for key in ("rope_parameters", "rope_scaling"):
        stated = {} if given.get(key) is None else given[key]
        if not isinstance(stated, dict):
            raise InputError(f"config.json: {key} ({shown(stated)}) must be an object")
        if FULL in stated or SLIDING in stated:
            if family.local_theta is None or stated.keys() - {FULL, SLIDING}:
                names = shown(", ".join(map(str, stated)))
                raise InputError(f"config.json: {key} of {names} is not known of {family.model_type}")
            local = _agreed(local, _values(stated.get(SLIDING)))
            stated = stated.get(FULL)
        rope = _agreed(rope, _values(stated))
    return rope, local


def _values(stated: Any) -> dict[str, Any]:
    if not isinstance(stated, dict | None):
        raise InputError(f"config.json: rope of a kind of layers ({shown(stated)}) must be an object")
    values: dict[str, Any] = {}
    for key, value in (stated or {}).items():
        if value is not None:
            values = _agreed(values, {"rope_type" if key == "type" else key: _value(key, value)})
    return values


def _value(key: str, value: Any) -> Any:
    """Checked for its kind; its range is ModelConfig's to check."""
    if key in ("type", "rope_type"):
        if not isinstance(value, str) or value not in ROPE_TYPES:
            raise InputError(f"config.json: rope_type ({shown(value)}) must be one of {', '.join(ROPE_TYPES)}")
        return "longrope" if value == "su" else value
    if key in LISTS:
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise InputError(f"config.json: rope's {key} must be a list of numbers")
        return tuple(map(float, value))
    if isinstance(value, bool):
        return value
    if not _is_number(value):
        raise InputError(f"config.json: rope's {named(key)} ({shown(value)}) must be a number")
    return value if key == "original_max_position_embeddings" else float(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _agreed(one: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    for key in one.keys() & other.keys():
        if one[key] != other[key]:
            both = f"{shown(one[key])} and {shown(other[key])}"
            raise InputError(f"config.json has {named(key)} twice, {both}; leave one of them")
    return one | other


def _merge_mscales(rope: dict[str, Any]) -> None:
    """Puts attention_factor in the place of the two numbers that it may be given by."""
    mscale, mscale_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if rope.pop("truncate", True) is not True:
        raise InputError("config.json: rope's truncate (False) is not known of rope_type 'yarn'")
    if "attention_factor" not in rope and mscale and mscale_all:
        log = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (mscale * log + 1) / (mscale_all * log + 1)


def write_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    """In both spellings, so that older readers open it too."""
    rope = {key: getattr(model, field) for key, field in ROPE_KEYS.get(model.rope_scaling, {}).items()}
    kind = next((name for name, scaling in ROPE_TYPES.items() if scaling == model.rope_scaling), "default")
    rope = {key: list(value) if key in LISTS else value for key, value in rope.items() if value is not None}
    rope = {"rope_type": kind} | rope
    theta = model.rope_theta
    fraction = {}
    if model.rope_dim is not None and family.rotary_fraction is not None:
        fraction = {"partial_rotary_factor": _fraction(model)}
    parameters: dict[str, Any] = {"rope_theta": theta, **fraction, **rope}
    older: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope, **fraction}
    if family.local_theta is not None:
        local = model.rope_local_theta or theta
        older["rope_local_base_freq"] = local
        parameters = {FULL: parameters, SLIDING: {"rope_type": "default", "rope_theta": local}}
    if family.model_type == "gpt_neox":
        older |= {"rotary_emb_base": theta, "rotary_pct": _fraction(model)}
    return older | {"rope_parameters": parameters}


def _fraction(model: ModelConfig) -> float:
    """Of the channels that turn; its readers multiply and cut."""
    fraction = model.rope_dim / model.head_dim
    return fraction if int(fraction * model.head_dim) == model.rope_dim else math.nextafter(fraction, 1)
