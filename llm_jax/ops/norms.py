"""Normalisation over the last axis, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"] | None,
    *,
    eps: float,
) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis; weight None means ones.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return _affine(y, weight, None).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"] | None,
    bias: Float[Array, "D"] | None,
    *,
    eps: float,
) -> Float[Array, "*B D"]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last axis.

    weight None means ones, bias None zeros; the variance is the biased one (divided by D).
    Ba, Kiros and Hinton 2016, "Layer Normalization".
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return _affine(y, weight, bias).astype(x.dtype)


def _affine(y, weight, bias):
    if weight is not None:
        y = y * weight.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y
