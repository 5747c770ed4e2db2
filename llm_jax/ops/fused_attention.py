"""Attention by kernels of others: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Both take what `ops.attention` takes, with as many queries as keys; `why_not_*` says what they can't serve.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Splash attention's blocks are multiples of this. Larger ones read keys and values less often: the largest of
# SPLASH_BLOCKS that divides the padded length is taken (by the kernel's authors' use of it, not measured here).
SPLASH_UNIT = 128
SPLASH_BLOCKS = (512, 256, 128)


def why_not_cudnn(
    q: Float[Array, "B T N H"],
    device: jax.Device,
    *,
    segments: Int[Array, "B T"] | None,
    softcap: float | None,
) -> str | None:
    """What keeps cuDNN's flash attention from serving this call; None: nothing."""
    capability = getattr(device, "compute_capability", "")
    try:
        major_minor = float(capability)
    except ValueError:  # AMD's are names
        major_minor = 0.0
    if major_minor < 8.0:
        return f"it needs compute capability 8.0 or more, and {device.device_kind} has {capability or 'none'}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {q.dtype} (model.compute_dtype)"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"it takes heads of at most 128 channels, a multiple of 8, not {q.shape[-1]}"
    if softcap is not None:
        return "it has no soft-cap"
    if segments is not None:
        return "it takes segments only as a mask of T x T"
    return None


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T N H"]:
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, local_window_size=local, implementation="cudnn"
    )


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool,
    window: int | None,
    segments: Int[Array, "B T"] | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Pallas' splash attention, on lengths padded to a multiple of 128. `interpret`: on any platform, slowly."""
    # Here and not above: half a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, heads, head_dim = q.shape[1:]
    padded = math.ceil(time / SPLASH_UNIT) * SPLASH_UNIT
    shape = (padded, padded)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if segments is None and not causal and padded > time:
        segments = jnp.zeros(q.shape[:2], jnp.int32)  # only to tell the padding apart
    block = next(size for size in SPLASH_BLOCKS if padded % size == 0)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names.split(), block)),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_text(q, k, v, segments):
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        return kernel(q, k, v, segment_ids=ids)

    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)  # the kernel does not scale
    # [B, T, N, H] -> [B, N, padded, H]
    folded = [jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - time), (0, 0))) for x in (q, k, v)]
    if segments is not None:
        lowest = jnp.iinfo(jnp.int32).min  # of the padding: no text has it
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padded - time)), constant_values=lowest)
    # f32 means f32: the kernel's products would be bf16's otherwise.
    precise = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext()
    with precise:
        out = jax.vmap(one_text, in_axes=(0, 0, 0, None if segments is None else 0))(*folded, segments)
    return out.swapaxes(1, 2)[:, :time].astype(v.dtype)
