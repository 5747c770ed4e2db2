"""From logits to a token: masks that are functions logits -> logits, and one draw.

The masks take a scalar or one value per row, traced or not, so that one compiled program serves
every setting. They find their threshold by bisection over float bits, not by sorting: 32 fused
passes over a row instead of a sort.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

Scalar = float | int


def top_k_mask(
    logits: Float[Array, "*B V"],
    value: Scalar | Int[Array, "*B"] | Int[Array, ""],
) -> Float[Array, "*B V"]:
    """-inf for every logit below the row's k-th largest; k is clipped to 1..V.

    All tokens tied with the k-th stay, as in transformers' TopKLogitsWarper.
    """
    count = jnp.clip(_per_row(jnp.asarray(value)), 1, logits.shape[-1])
    order = _order(logits)
    kth = _largest(lambda t: jnp.sum(order >= t, axis=-1, keepdims=True) >= count, order)
    return jnp.where(order >= kth, logits, -jnp.inf)


def top_p_mask(
    logits: Float[Array, "*B V"],
    value: Scalar | Float[Array, "*B"] | Float[Array, ""],
) -> Float[Array, "*B V"]:
    """Keeps the smallest set of most likely tokens whose probability exceeds p, and their ties.

    The rule is transformers' TopPLogitsWarper's: a token goes when it and all less likely ones
    together have at most 1 - p. The best token always stays; p >= 1 keeps everything.
    Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration".
    """
    # Subtracted before the cast: 1 - 0.9 rounded to float32 is not 1 - float32(0.9).
    removable = _per_row(jnp.asarray(1.0 - value, jnp.float32))
    order = _order(logits)
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    def removes_few(threshold):
        below = jnp.sum(jnp.where(order < threshold, probs, 0.0), axis=-1, keepdims=True)
        return below <= removable

    lowest_kept = jnp.minimum(_largest(removes_few, order), jnp.max(order, axis=-1, keepdims=True))
    return jnp.where((order >= lowest_kept) | (removable <= 0), logits, -jnp.inf)


def min_p_mask(
    logits: Float[Array, "*B V"],
    value: Scalar | Float[Array, "*B"] | Float[Array, ""],
) -> Float[Array, "*B V"]:
    """-inf for tokens less likely than p times the most likely one, as transformers' MinPLogitsWarper."""
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    least = _per_row(jnp.asarray(value, jnp.float32)) * jnp.max(probs, axis=-1, keepdims=True)
    return jnp.where(probs < least, -jnp.inf, logits)


def penalize(
    logits: Float[Array, "*B V"],
    in_text: Int[Array, "*B V"],
    in_continuation: Int[Array, "*B V"],
    *,
    repetition: Scalar | Float[Array, "*B"],
    presence: Scalar | Float[Array, "*B"],
    frequency: Scalar | Float[Array, "*B"],
) -> Float[Array, "*B V"]:
    """Lowers the logits of tokens that are there already.

    repetition: of a token with in_text > 0 a positive logit is divided by it, a negative one multiplied (Keskar et
    al. 2019, "CTRL", as transformers' RepetitionPenaltyLogitsProcessor); 1: off. presence: subtracted where
    in_continuation > 0. frequency: subtracted in_continuation times (both as in OpenAI's API); 0: off.

    Args:
        in_text, in_continuation: how often each token is in the whole text, and in what was generated of it.
    """
    repetition, presence, frequency = (
        jnp.asarray(value, jnp.float32)[..., None] for value in (repetition, presence, frequency)
    )
    logits = logits.astype(jnp.float32)
    lowered = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_text > 0, lowered, logits)
    return logits - presence * (in_continuation > 0) - frequency * in_continuation


def draw(logits: Float[Array, "*B V"], uniform: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """One token (int32) a row from softmax(logits), by inverse CDF of one uniform in [0, 1) a row.

    A token of probability 0 is never drawn. One uniform and a cumulative sum cost less than V
    Gumbel variables.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # XLA's parallel cumulative sum need not be monotone in its last bits: zeroing it where the
    # token is impossible, and scaling by its own maximum, leaves rounding no way to pick one.
    cumulative = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)
    below_one = jnp.minimum(uniform.astype(jnp.float32), 1 - 2.0**-24)
    threshold = below_one[..., None] * jnp.max(cumulative, axis=-1, keepdims=True)
    return jnp.argmax(cumulative > threshold, axis=-1).astype(jnp.int32)


def _per_row(value: Array) -> Array:
    """A scalar or [...] -> something that broadcasts against [..., V]."""
    return value[..., None]


def _order(logits: Float[Array, "*B V"]) -> UInt32[Array, "*B V"]:
    """Integers in the order of the logits, equal where they are equal (0.0 and -0.0 too)."""
    x = logits.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[Array], Array], order: UInt32[Array, "*B V"]) -> UInt32[Array, "*B 1"]:
    """The largest threshold for which `holds`, true up to some threshold and false from there on."""

    def try_bit(i, threshold):
        raised = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(raised), raised, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros_like(order[..., :1]))
