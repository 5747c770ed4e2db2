"""Attention: the plain form that every fast one is tested against, a blockwise one, others' kernels, and the choice.

All take grouped heads as they are (query head n reads key head n // G), float32 scores, and the same masks.
"""

import contextlib
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

# Finite, not -inf: a left-padded row has no visible key, and softmax of all -inf is NaN.
MASK_VALUE = float(jnp.finfo(jnp.float32).min)

IMPLEMENTATIONS = ("auto", "plain", "blockwise", "cudnn", "splash")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    window: int | None = None,
    segments: Int[Array, "B T"] | None = None,
    softcap: float | None = None,
    implementation: Literal["auto", "plain", "blockwise", "cudnn", "splash"] = "auto",
    device: jax.Device | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(mask(softcap(q k^T / sqrt(H)))) v, with query head n on key head n // (N // K).

    causal: query t sees keys 0..t; fewer queries than keys are those of the last keys. window: it sees keys
    t-window+1..t, itself included, whatever `causal` says. segments: it sees the keys of its own segment only.
    softcap: scores become softcap * tanh(scores / softcap), before the mask.

    implementation: "plain" holds the T x S scores in memory; "blockwise" (Dao et al. 2022,
    "FlashAttention", in plain JAX) holds one block of queries at a time and keeps only the
    log-sum-exp for its gradient, so memory is linear in T; "cudnn" is the flash attention of NVIDIA's library
    (no soft-cap, no segments, no float32), "splash" the Pallas kernel for TPUs (elsewhere
    by Pallas' interpreter: for tests). "auto" takes the fused kernel of
    the device, else by size a blockwise or plain form; where the kernel can't serve a call, a warning says why.

    device: "auto" chooses for it; None: the default one.
    Raises ValueError where a mask needs S >= T, or with segments S == T, and that is not so, the heads don't divide,
    or the implementation that is named can't serve.
    """
    query_time, key_time = q.shape[1], k.shape[1]
    causal = causal or window is not None
    device = device or _default_device()
    _check(q, k, causal=causal, window=window, segments=segments, implementation=implementation)
    if implementation == "auto":
        implementation = _choose(q, k, device, causal=causal, segments=segments, softcap=softcap)
    elif implementation == "cudnn" and (reason := _why_not_cudnn(q, k, device, segments=segments, softcap=softcap)):
        raise ValueError(f"cuDNN's attention can't serve this call: {reason}")
    if implementation == "cudnn":
        return _cudnn(q, k, v, causal=causal, window=window)
    if implementation == "splash":
        interpret = device.platform != "tpu"
        masked = dict(causal=causal, window=window, segments=segments, softcap=softcap)
        return _splash(q, k, v, **masked, interpret=interpret)
    if implementation == "blockwise":
        return _blockwise(q, k, v, segments, _Static(causal, window, softcap, _tile_elements(device)))
    mask = jnp.ones((1, query_time, key_time), bool)
    first = key_time - query_time if causal else 0
    t, s = first + jnp.arange(query_time)[:, None], jnp.arange(key_time)
    if causal:
        mask &= s <= t
    if window is not None:
        mask &= s > t - window
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    return masked_attention(q, k, v, mask, softcap=softcap)


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #T #S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` with the mask written out (True: visible), for decoding and as the plain form.

    A query that sees no key gets finite numbers without meaning (the mean of the values).
    """
    return cached_attention(q, [(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), None, None)], [mask], softcap=softcap)


Part = tuple[
    Float[Array, "B K H _"] | Int8[Array, "B K H _"],  # keys
    Float[Array, "B K _ H"] | Int8[Array, "B K _ H"],  # values
    Float[Array, "B K _"] | None,  # what keys are multiples of
    Float[Array, "B K _"] | None,  # and values
]


def cached_attention(
    q: Float[Array, "B T N H"],
    parts: Sequence[Part],
    masks: Sequence[Bool[Array, "#B #T _"]],
    *,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`masked_attention` to the keys of all parts together, each as a `LayerCache` holds them; `masks` [B, T, S] has
    that of each part.
    """
    batch, query_time, heads, head_dim = q.shape
    kv_heads = parts[0][0].shape[1]
    groups = heads // kv_heads
    grouped = q.reshape(batch, query_time, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, groups * query_time, head_dim)
    scores, borders = [], [0]
    for (k, _, k_scale, _), mask in zip(parts, masks, strict=True):
        part = einsum_f32("bkgh,bkhs->bkgs", grouped, k.astype(q.dtype)) * head_dim**-0.5
        part = _cap(part if k_scale is None else part * k_scale[:, :, None], softcap)
        part = part.reshape(batch, kv_heads, groups, query_time, -1)
        scores.append(jnp.where(mask[:, None, None], part, MASK_VALUE))
        borders.append(borders[-1] + part.shape[-1])
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = weights.reshape(batch, kv_heads, groups * query_time, -1)
    out = 0.0
    for (_, v, _, v_scale), start, end in zip(parts, borders, borders[1:], strict=False):
        part = weights[..., start:end]
        part = part if v_scale is None else part * v_scale[:, :, None]
        out += einsum_f32("bkgs,bksh->bkgh", part.astype(q.dtype), v.astype(q.dtype))
    out = out.reshape(batch, kv_heads, groups, query_time, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)


def _check(q, k, *, causal, window, segments, implementation):
    query_time, heads, key_time, kv_heads = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a multiple of key/value heads ({kv_heads})")
    if (causal and query_time > key_time) or (segments is not None and query_time != key_time):
        raise ValueError(
            f"causal and window need no more queries than keys, segments as many, got {query_time} and {key_time}; "
            "write the mask out and use masked_attention"
        )
    if window is not None and window < 1:
        raise ValueError(f"window ({window}) must be at least 1: a query sees itself")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation not in ("auto", "plain") and query_time != key_time and not causal:
        raise ValueError(f"{implementation} attention needs S == T, got T={query_time} and S={key_time}")


def _default_device():
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def _choose(q, k, device, *, causal, segments, softcap):
    time = q.shape[1]
    if (time != k.shape[1] and not causal) or time < AUTO_BLOCKWISE_LENGTH:
        return "plain"
    if device.platform == "tpu":
        return "splash"
    if device.platform == "gpu":
        reason = _why_not_cudnn(q, k, device, segments=segments, softcap=softcap)
        if reason is None:
            return "cudnn"
        # Python shows a warning of the same words once.
        warnings.warn(f"attention runs without cuDNN's kernel: {reason}", stacklevel=3)
    return "blockwise"


def einsum_f32(equation: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays with float32 accumulation and result, whatever their dtype."""

    def product(a, b):
        return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    if a.dtype == b.dtype == jnp.float32:
        return product(a, b)

    # XLA's CPU backend of jax 0.7 refuses bf16 x bf16 -> f32; widening first gives the same numbers.
    def widened(a, b):
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=widened, default=product)


def _cap(scores, softcap):
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


# --- Blockwise -----------------------------------------------------------------------------------
#
# Batch and key/value heads fold into one leading axis b, of which a few entries at a time go
# through a sequential loop; each block of queries meets the one contiguous range of keys that its
# queries can see, in one product. The sizes keep such a tile of scores inside a core's cache, which
# is where the speed comes from.

BLOCK_SIZES = (64, 128)  # queries: for short texts, or a short window, and for long ones
TILE_ELEMENTS = 2**17  # for the cores of a CPU together
CORE_TILE_ELEMENTS = 2**15  # for one: 28 instead of 33 ms at B16 T256 N8 H16, forward and backward
ACCELERATOR_TILE_ELEMENTS = 2**27  # no cache to stay in, but memory: half a GiB of float32 (not measured)
MAX_RUNS = 8  # key ranges of different length: bounds the compiled program's size
# Value and gradient, plain against blockwise, on 2 CPU cores: T=64 2.1 / 1.7 ms (B12 N4 H32),
# T=128 32 / 12 and T=256 86 / 26 (B16 N8 H16). Below 64 there is one block and nothing to gain.
AUTO_BLOCKWISE_LENGTH = 64


def _tile_elements(device: jax.Device) -> int:
    if device.platform != "cpu":
        return ACCELERATOR_TILE_ELEMENTS
    return CORE_TILE_ELEMENTS if device.client.device_count() > 1 else TILE_ELEMENTS


class _Static(NamedTuple):
    """What of a call is known when it is compiled."""

    causal: bool
    window: int | None
    softcap: float | None
    tile: int  # elements of scores at a time


class _Run(NamedTuple):
    """Query blocks first..last-1, each of which meets `keys` keys."""

    first: int
    last: int
    keys: int


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q, k, v, segments, static):
    return _blockwise_forward(q, k, v, segments, static)[0]


def _blockwise_forward(q, k, v, segments, static):
    before, keys_time = k.shape[1] - q.shape[1], k.shape[1]  # keys before the first query
    block, padded = _block_sizes(q.shape[1], static.window)

    def group(q, k, v, segments):
        def one_block(carry, start, keys):
            q_i, at = _cut(q, start, block, 2), _key_start(before + start, block, keys)
            scores, visible = _scores(q_i, k, segments, before + start, at, keys, keys_time, static)
            scores = jnp.where(visible, scores, MASK_VALUE)
            highest = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = einsum_f32("bgts,bsh->bgth", weights.astype(v.dtype), _cut(v, at, keys, 1)) / total
            return carry, (out.astype(q.dtype), (highest + jnp.log(total))[..., 0])

        return _over_blocks(one_block, (), _runs(padded // block, block, before, static), block)[1]

    keys_padded = before + padded
    folded = (_fold_queries(q, k, padded), _fold_keys(k, keys_padded), _fold_keys(v, keys_padded))
    out, lse = _over_groups(group, (*folded, _fold_segments(segments, k, padded)), block, static.tile)
    out = _unfold_queries(out, q)
    return out, (q, k, v, segments, out, lse)


def _blockwise_backward(static, residuals, d_out):
    q, k, v, segments, out, lse = residuals
    before, keys_time = k.shape[1] - q.shape[1], k.shape[1]
    block, padded = _block_sizes(q.shape[1], static.window)
    # sum_s weights * d_weights of each query, from Dao et al. 2022, equation 4.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)

    def group(q, k, v, d_out, delta, lse, segments):
        def one_block(carry, start, keys):
            dk, dv = carry
            at = _key_start(before + start, block, keys)
            q_i, d_out_i, delta_i, lse_i = (_cut(x, start, block, 2) for x in (q, d_out, delta, lse))
            k_i, v_i = _cut(k, at, keys, 1), _cut(v, at, keys, 1)
            scores, visible = _scores(q_i, k, segments, before + start, at, keys, keys_time, static)
            weights = jnp.where(visible, jnp.exp(scores - lse_i[..., None]), 0.0)
            d_scores = weights * (einsum_f32("bgth,bsh->bgts", d_out_i, v_i) - delta_i)
            if static.softcap is not None:
                d_scores *= 1 - jnp.square(scores / static.softcap)
            d_scores = (d_scores * q.shape[-1] ** -0.5).astype(q.dtype)
            dk = _add_at(dk, _transposed_product(q_i, d_scores), at)
            dv = _add_at(dv, _transposed_product(d_out_i, weights.astype(q.dtype)), at)
            return (dk, dv), (einsum_f32("bgts,bsh->bgth", d_scores, k_i).astype(q.dtype),)

        zeros = jnp.zeros(k.swapaxes(1, 2).shape, jnp.float32)
        runs = _runs(padded // block, block, before, static)
        (dk, dv), (dq,) = _over_blocks(one_block, (zeros, zeros), runs, block)
        return dq, dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype)

    keys_padded = before + padded
    folded = (_fold_queries(q, k, padded), _fold_keys(k, keys_padded), _fold_keys(v, keys_padded))
    folded += (_fold_queries(d_out, k, padded), _fold_queries(delta, k, padded), lse)
    dq, dk, dv = _over_groups(group, (*folded, _fold_segments(segments, k, padded)), block, static.tile)
    return _unfold_queries(dq, q), _unfold_keys(dk, k), _unfold_keys(dv, v), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _scores(q_i, k, segments, start, at, keys, time, static):
    """Capped scores [b, G, block, keys] of one tile, and which of them are visible."""
    scores = einsum_f32("bgth,bsh->bgts", q_i, _cut(k, at, keys, 1)) * q_i.shape[-1] ** -0.5
    block = q_i.shape[2]
    t, s = start + jnp.arange(block)[:, None], at + jnp.arange(keys)
    visible = s <= t if static.causal else s < time  # keys past `time` are padding
    if static.window is not None:
        visible &= s > t - static.window
    if segments is not None:
        own, other = _cut(segments, start, block, 1), _cut(segments, at, keys, 1)
        visible &= (own[:, :, None] == other[:, None, :])[:, None]
    return _cap(scores, static.softcap), visible


def _block_sizes(time: int, window: int | None) -> tuple[int, int]:
    """(queries in a block, time padded to a multiple of it).

    Between the two sizes, a block for each run: then every block meets only keys that it can see. Forward and
    backward on 2 CPU cores, blocks of 64 / 128 / 256: T=512 68 / 76 / 73 ms (B8 N8 H16), T=1024 145 / 76 / 78 (B4),
    T=4096 335 / 262 / 241 (B1); 256 would make the temporary memory of T=2048 four times that of 1024.
    """
    smallest, largest = BLOCK_SIZES
    most_keys = min(time, window or time)
    blocks = math.ceil(time / min(max(math.ceil(most_keys / MAX_RUNS), smallest), largest))
    block = math.ceil(time / blocks)
    return block, block * blocks


def _runs(blocks: int, block: int, before: int, static: _Static) -> list[_Run]:
    """Splits the query blocks into runs that meet key ranges of one length, as short as they can be.

    before: keys before the first query.
    """
    longest = before + blocks * block
    if not static.causal:
        return [_Run(0, blocks, longest)]
    if static.window is not None:
        longest = min(longest, block + block * math.ceil((static.window - 1) / block))
    step = math.ceil(blocks / MAX_RUNS)
    runs = []
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        keys = min(before + last * block, longest)
        if runs and runs[-1].keys == keys:
            first = runs.pop().first
        runs.append(_Run(first, last, keys))
    return runs


def _key_start(start, block: int, keys: int):
    """The range of `keys` keys ends with the query block, or starts at 0."""
    return jnp.maximum(start + block - keys, 0) if isinstance(start, Array) else max(start + block - keys, 0)


def _over_blocks(one_block, carry, runs: list[_Run], block: int):
    """Threads `carry` through the blocks; joins their outputs [b, G, block, ...] along time."""
    outputs = []
    for run in runs:
        if run.last - run.first == 1:
            carry, output = one_block(carry, run.first * block, run.keys)
        else:
            starts = block * jnp.arange(run.first, run.last)
            carry, output = jax.lax.scan(partial(one_block, keys=run.keys), carry, starts)
            output = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2).reshape(*y.shape[1:3], -1, *y.shape[4:]), output)
        outputs.append(output)
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys, axis=2), *outputs)


def _over_groups(group, arrays, block: int, tile: int):
    """Maps `group` over the leading axis, as many entries at a time as fit a tile."""
    q, k = arrays[:2]
    entries, heads = q.shape[:2]
    wanted = max(1, tile // (heads * block * k.shape[1]))
    size = next(n for n in range(min(wanted, entries), 0, -1) if entries % n == 0)
    if size == entries:
        return group(*arrays)
    split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), arrays)
    return jax.tree.map(lambda y: y.reshape(entries, *y.shape[2:]), jax.lax.map(lambda xs: group(*xs), split))


def _fold_queries(x, k, padded: int):
    """[B, T, N, X] -> [B*K, G, padded, X]"""
    batch, time, heads, width = x.shape
    kv_heads = k.shape[2]
    x = x.reshape(batch, time, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    x = x.reshape(batch * kv_heads, heads // kv_heads, time, width)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - time), (0, 0)))


def _unfold_queries(x, q):
    batch, time, heads, width = q.shape
    return x[:, :, :time].reshape(batch, heads, time, width).transpose(0, 2, 1, 3)


def _fold_keys(x, padded: int):
    """[B, S, K, H] -> [B*K, padded, H]"""
    batch, time, kv_heads, width = x.shape
    x = x.transpose(0, 2, 1, 3).reshape(batch * kv_heads, time, width)
    return jnp.pad(x, ((0, 0), (0, padded - time), (0, 0)))


def _unfold_keys(x, k):
    batch, time, kv_heads, width = k.shape
    return x[:, :time].reshape(batch, kv_heads, time, width).transpose(0, 2, 1, 3)


def _fold_segments(segments, k, padded: int):
    """[B, T] -> [B*K, padded]; None stays None."""
    if segments is None:
        return None
    segments = jnp.repeat(segments, k.shape[2], axis=0)
    return jnp.pad(segments, ((0, 0), (0, padded - segments.shape[1])))


def _cut(x, start, size: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _transposed_product(rows, tile):
    """sum over queries of rows [b, G, t, H] and tile [b, G, t, s] -> [b, H, s].

    The transpose of rows is small and explicit. For the other order, [b, s, H], XLA's CPU backend walks down the
    columns of the tile: 2 to 8 times as slow (7 GFLOP/s instead of 54 on a core at t 64, s 1024, H 16).
    """
    batch, heads, time, width = rows.shape
    flat = rows.reshape(batch, heads * time, width).swapaxes(1, 2)
    return einsum_f32("bht,bts->bhs", flat, tile.reshape(batch, heads * time, -1))


def _add_at(total, part, start):
    size = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(total, _cut(total, start, size, 2) + part, start, 2)


# --- Kernels of others -----------------------------------------------------------------------------
#
# cuDNN's flash attention on NVIDIA GPUs, splash attention on TPUs; both take as many queries as keys.

# Splash attention's blocks are multiples of this. Larger ones read keys and values less often: the largest of
# SPLASH_BLOCKS that divides the padded length is taken (by the kernel's authors' use of it, not measured here).
SPLASH_UNIT = 128
SPLASH_BLOCKS = (512, 256, 128)


def _why_not_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
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
    if q.shape[1] != k.shape[1]:
        return f"it takes as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
    return None


def _cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T N H"]:
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=local, implementation="cudnn")


def _splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
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

    (time, heads, head_dim), keys = q.shape[1:], k.shape[1]
    padded, keys_padded = (math.ceil(each / SPLASH_UNIT) * SPLASH_UNIT for each in (time, keys))
    shape, before = (padded, keys_padded), keys - time  # keys before the first query
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), before)
    else:
        mask = masks.CausalMask(shape, before) if causal else masks.FullMask(shape)
    if segments is None and not causal and padded > time:
        segments = jnp.zeros(q.shape[:2], jnp.int32)  # only to tell the padding apart
    block, block_kv = (next(size for size in SPLASH_BLOCKS if each % size == 0) for each in shape)
    of_queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block)
    of_keys = "block_kv block_kv_compute block_kv_dkv block_kv_dkv_compute block_kv_dq"
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**of_queries, **dict.fromkeys(of_keys.split(), block_kv)),
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
    folded = [jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % SPLASH_UNIT), (0, 0))) for x in (q, k, v)]
    if segments is not None:
        lowest = jnp.iinfo(jnp.int32).min  # of the padding: no text has it
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padded - time)), constant_values=lowest)
    # f32 means f32: the kernel's products would be bf16's otherwise.
    precise = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else contextlib.nullcontext()
    with precise:
        out = jax.vmap(one_text, in_axes=(0, 0, 0, None if segments is None else 0))(*folded, segments)
    return out.swapaxes(1, 2)[:, :time].astype(v.dtype)
