"""Training losses, as sums: the caller divides, so that micro-batches and devices add up exactly."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    mask: Float[Array, "*B"] | Int[Array, "*B"] | Bool[Array, "*B"] | None = None,
    *,
    z_loss: float = 0.0,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum_i mask_i * (log Z_i - logits[i, target_i] + z_loss * (log Z_i)^2), sum_i mask_i).

    log Z is the log-sum-exp over the vocabulary. Both results are float32, the first in nats.
    `mask` holds weights (None: all ones); where it is 0 the target may be anything, -100 included.
    z_loss (Chowdhery et al. 2022, "PaLM": 1e-4) keeps log Z near 0.
    vocab_axis: in a shard_map, the mesh axis along which V is split evenly over devices.
    """
    logits = logits.astype(jnp.float32)
    log_z, first = _log_z(logits, vocab_axis)
    # A comparison, not a gather: its gradient fuses with the softmax's, where a gather's is a
    # scatter into a second [B, V] array, and it stays local when V is sharded.
    tokens = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    of_target = jnp.sum(jnp.where(tokens == targets[..., None], logits, 0.0), axis=-1)
    nats = log_z - (of_target if vocab_axis is None else jax.lax.psum(of_target, vocab_axis))
    nats = nats + z_loss * jnp.square(log_z)
    if mask is None:
        return jnp.sum(nats), jnp.asarray(nats.size, jnp.float32)
    weights = mask.astype(jnp.float32)
    return jnp.sum(jnp.where(weights == 0, 0.0, nats * weights)), jnp.sum(weights)


def _log_z(logits, vocab_axis):
    """The log-sum-exp, and the first of the tokens that are here."""
    if vocab_axis is None:
        return jax.nn.logsumexp(logits, axis=-1), 0
    highest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), vocab_axis)
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1), vocab_axis)
    return highest + jnp.log(total), jax.lax.axis_index(vocab_axis) * logits.shape[-1]


# --- Without the logits ---------------------------------------------------------------------------

# On a CPU a chunk's logits should stay in its caches; but a chunk also adds to all of d_weight, which shows
# below some D / 3 rows. Value and gradient, processor time on a Zen 4 server by that of the plain form:
# D=128 V=8192 (1024 rows; 4096 rows), 2**19 logits 0.66; 0.58, 2**21 0.56; 0.48, 2**23 0.98; 0.76;
# D=768 V=8192 (2048 rows), 2**20 0.94, 2**21 0.85, 2**22 0.85, 2**23 0.93, 2**24 1.01;
# D=768 V=50257 (2048 rows), 2**21 1.45, 2**22 0.93, 2**23 0.80, 2**24 0.79, 2**25 0.78, 2**26 0.83.
# At V=65 there is one chunk and no difference.
CACHED_ELEMENTS = 2**21


def linear_cross_entropy(
    hidden: Float[Array, "*B D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "*B"],
    mask: Float[Array, "*B"] | Int[Array, "*B"] | Bool[Array, "*B"] | None = None,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_elements: int | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy(logits, targets, mask, z_loss=z_loss)` of logits = hidden @ weight.T, never all in memory.

    With softcap, logits are softcap * tanh(hidden @ weight.T / softcap). Products accumulate in float32.

    Rows go through in chunks of at most `chunk_elements` logits (over all devices, for each run of a vmap;
    None: D/2 rows or 2**21 logits, whichever is more, the best on a CPU), but of one place of the last axis of B
    at least; if they all fit, there is no loop. Since the result is a sum, each chunk's gradient is taken while
    its logits are there (as Hsu et al. 2024, "Liger Kernel", do), and no product is computed twice. Rows may be
    sharded along any axis: a chunk takes every n-th place of the last one, so that each device works on rows of
    its own. Differentiable in hidden, weight and mask, by reverse mode only. vocab_axis: of `cross_entropy`; the
    gradient with respect to hidden is this device's part then, as shard_map sums it.
    """
    if chunk_elements is None:
        chunk_elements = max(CACHED_ELEMENTS, weight.size // 2)
    count = jnp.asarray(targets.size, jnp.float32) if mask is None else jnp.sum(mask.astype(jnp.float32))
    weights = jnp.ones(targets.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    places = targets.shape[-1] if targets.ndim else 1
    rows_per_place = targets.size // max(places, 1)
    in_chunk = max(1, chunk_elements // max(1, rows_per_place * weight.shape[0]))
    static = _Static(z_loss, softcap, math.ceil(places / in_chunk), vocab_axis)
    return _linear_nats(hidden, weight, targets, weights, static), count


class _Static(NamedTuple):
    """What of a call is known when it is compiled."""

    z_loss: float
    softcap: float | None
    chunks: int
    vocab_axis: str | None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear_nats(hidden, weight, targets, weights, static):
    def chunk(total, rows):
        hidden, targets, weights = rows
        return total + _nats(_tensordot_f32(hidden, weight, (-1, -1)), targets, weights, static), None

    return _over_chunks(chunk, jnp.zeros((), jnp.float32), (hidden, targets, weights), static.chunks)[0]


def _linear_nats_and_gradient(hidden, weight, targets, weights, static):
    nats_and_gradient = jax.value_and_grad(_nats, argnums=(0, 2))

    def chunk(totals, rows):
        hidden, targets, weights = rows
        logits = _tensordot_f32(hidden, weight, (-1, -1))
        nats, (d_logits, d_weights) = nats_and_gradient(logits, targets, weights, static)
        d_logits = d_logits.astype(hidden.dtype)  # an accelerator's units for bf16 take two bf16 operands
        row_axes = tuple(range(targets.ndim))
        # [D, V], transposed at the end: for [V, D] XLA's CPU backend would transpose every chunk's d_logits.
        d_weight = _tensordot_f32(hidden, d_logits, (row_axes, row_axes))
        d_hidden = _tensordot_f32(d_logits, weight, (-1, 0)).astype(hidden.dtype)
        return jax.tree.map(jnp.add, totals, (nats, d_weight)), (d_hidden, d_weights)

    zeros = (jnp.zeros((), jnp.float32), jnp.zeros(weight.shape[::-1], jnp.float32))
    rows = (hidden, targets, weights)
    (nats, d_weight), (d_hidden, d_weights) = _over_chunks(chunk, zeros, rows, static.chunks)
    # On a CPU behind a barrier: XLA would turn the product of a single chunk around instead.
    d_weight = jax.lax.platform_dependent(
        d_weight, cpu=lambda x: jax.lax.optimization_barrier(x).T, default=jnp.transpose
    )
    return nats, (d_hidden, d_weight.astype(weight.dtype), d_weights)


def _scale(static, gradients, d_nats):
    d_hidden, d_weight, d_weights = ((d_nats * g).astype(g.dtype) for g in gradients)
    return d_hidden, d_weight, None, d_weights


_linear_nats.defvjp(_linear_nats_and_gradient, _scale)


def _nats(logits, targets, weights, static):
    if static.softcap is not None:
        logits = static.softcap * jnp.tanh(logits / static.softcap)
    return cross_entropy(logits, targets, weights, z_loss=static.z_loss, vocab_axis=static.vocab_axis)[0]


def _over_chunks(chunk, carry, rows, chunks: int):
    """`jax.lax.scan(chunk, carry, ...)` over `chunks` parts of the arrays `rows`, whose leading axes B are alike.

    Part j is places j, j + chunks, ... of the last axis of B, filled up with zeros.
    """
    axis = rows[1].ndim - 1
    if chunks <= 1:
        return chunk(carry, rows)
    places = rows[1].shape[axis]
    padding = -places % chunks

    def split(x):
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunks, *x.shape[axis + 1 :]), axis + 1, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, axis + 1)
        return jax.lax.slice_in_dim(y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :]), 0, places, axis=axis)

    carry, outputs = jax.lax.scan(chunk, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(join, outputs)


def _tensordot_f32(a, b, axes):
    """`jnp.tensordot` with float32 accumulation and result, whatever the dtype."""

    def product(a, b):
        return jnp.tensordot(a, b, axes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    if a.dtype == b.dtype == jnp.float32:
        return product(a, b)

    # XLA's CPU backend of jax 0.7 refuses bf16 x bf16 -> f32; widening first gives the same numbers.
    def widened(a, b):
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=widened, default=product)
