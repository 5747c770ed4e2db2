"""Training losses, as sums: the caller divides, so that micro-batches and devices add up exactly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    mask: Float[Array, "*B"] | Int[Array, "*B"] | Bool[Array, "*B"] | None = None,
    *,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum_i mask_i * (log Z_i - logits[i, target_i] + z_loss * (log Z_i)^2), sum_i mask_i).

    log Z is the log-sum-exp over the vocabulary. Both results are float32, the first in nats.
    `mask` holds weights (None: all ones); where it is 0 the target may be anything, -100 included.
    z_loss (Chowdhery et al. 2022, "PaLM": 1e-4) keeps log Z near 0.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: its gradient fuses with the softmax's, where a gather's is a
    # scatter into a second [B, V] array, and it stays local when V is sharded.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    nats = log_z - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    nats = nats + z_loss * jnp.square(log_z)
    if mask is None:
        return jnp.sum(nats), jnp.asarray(nats.size, jnp.float32)
    weights = mask.astype(jnp.float32)
    return jnp.sum(jnp.where(weights == 0, 0.0, nats * weights)), jnp.sum(weights)
