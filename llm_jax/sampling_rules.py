"""The rules of one sampling request: for the config, the flags and the call alike."""

import operator
from typing import Any

from llm_jax.errors import InputError

LARGEST = 1e6  # of temperature and penalties: what they do to a float32 logit stays one
MAX_NEW_TOKENS = 2**24  # float32, in which rope computes angles, counts no further


def whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} ({value!r}) must be a whole number") from None


def number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes):  # which float takes
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} ({value!r}) must be a number") from None


def check_sampling(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    min_new_tokens: int,
    prefix: str = "",
) -> None:
    """Raises InputError for a value outside its range; `prefix` goes before its name."""
    whole_number(f"{prefix}max_new_tokens", max_new_tokens)
    whole_number(f"{prefix}min_new_tokens", min_new_tokens)
    if top_k is not None:
        whole_number(f"{prefix}top_k", top_k)
    for name, value in (
        ("temperature", temperature),
        ("top_p", 1.0 if top_p is None else top_p),
        ("min_p", min_p),
        ("repetition_penalty", repetition_penalty),
        ("presence_penalty", presence_penalty),
        ("frequency_penalty", frequency_penalty),
    ):
        number(prefix + name, value)
    if not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise InputError(f"{prefix}max_new_tokens ({max_new_tokens}) must be at least 0 and at most {MAX_NEW_TOKENS}")
    if not 0 <= temperature <= LARGEST:
        raise InputError(
            f"{prefix}temperature ({temperature}) must be a finite number, 0 (greedy) or more, at most {LARGEST:.0e}"
        )
    if top_k is not None and top_k < 1:
        raise InputError(f"{prefix}top_k ({top_k}) must be 1 or more; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"{prefix}top_p ({top_p}) must be above 0 and at most 1; leave it out to keep every token")
    if not 0 <= min_p <= 1:
        raise InputError(f"{prefix}min_p ({min_p}) must be at least 0 (every token is kept) and at most 1")
    if not 1 / LARGEST <= repetition_penalty <= LARGEST:
        raise InputError(
            f"{prefix}repetition_penalty ({repetition_penalty}) must be above 0 and finite: "
            f"{1 / LARGEST:.0e} to {LARGEST:.0e}; 1 is none"
        )
    for name, penalty in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
        if not abs(penalty) <= LARGEST:
            raise InputError(f"{prefix}{name} ({penalty}) must be finite and at most {LARGEST:.0e}; 0 is none")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InputError(
            f"{prefix}min_new_tokens ({min_new_tokens}) must be at least 0 and at most {prefix}max_new_tokens "
            f"({max_new_tokens})"
        )
