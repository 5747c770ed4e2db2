"""Cached attention equals attention over the whole text, however the text is cut into calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops
from llm_jax.ops import EmptyCache, LayerCache

# Compiled whole: op by op, the tests would spend their time compiling each op of each shape.
masked_attention = jax.jit(ops.masked_attention)
fill_cache = jax.jit(ops.fill_cache)
merge_cache = jax.jit(ops.merge_cache)
update_cache = jax.jit(ops.update_cache, static_argnames="window")
split_cache = jax.jit(ops.split_cache, static_argnames="slots")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def text(length, batch=2, seed=0):
    """q, k, v as numpy, whose slices cost no compilation."""
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [rng.standard_normal((batch, length, n, HEAD_DIM)).astype(np.float32) for n in heads]


def empty(slots, dtype=jnp.float32):
    return EmptyCache(slots, dtype)


def full_attention(q, k, v, window):
    t = np.arange(q.shape[1])
    visible = t[None, :] <= t[:, None]
    if window is not None:
        visible &= t[None, :] > t[:, None] - window
    return np.asarray(masked_attention(q, k, v, visible[None]))


@partial(jax.jit, static_argnames="window")
def attend(cache, q, k, v, positions, window):
    """One call, which joins the ring at once where the cache is one."""
    is_ring = isinstance(cache, LayerCache)
    levels = ops.split_cache(cache, positions[:, 0], slots=q.shape[1]) if is_ring else cache
    levels, masks = ops.update_cache(levels, k, v, positions, window=window)
    out = ops.cached_attention(q, [levels.ring, levels.recent], masks)
    return (ops.merge_cache(levels, jnp.max(positions, axis=1) + 1) if is_ring else levels), out


def take(x, at):
    return np.take_along_axis(x, at[..., None, None], axis=1)


CASES = [
    (16, None, [16]),
    (16, None, [1] * 16),
    (20, None, [5, 1, 1, 4, 1, 4]),
    (16, 3, [6, 1, 1, 1, 7]),
    (5, 5, [1] * 16),  # a ring smaller than the text
    (5, 5, [12, 1, 1, 2]),  # a prefill longer than the ring
    (6, 4, [3, 8, 1, 4]),  # chunks that wrap around, over a ring in use
    (1, 1, [7, 1, 8]),
]


@pytest.mark.parametrize("apart", [1, 3, 16], ids=lambda n: f"{n}_calls_apart")
@pytest.mark.parametrize("slots, window, cuts", CASES)
def test_equals_full_attention(slots, window, cuts, apart):
    """The first call fills the cache; `apart` of the next ones are kept apart before they join the ring."""
    q, k, v = text(16)
    first, *rest = cuts
    cache = fill_cache(empty(slots), k[:, :first], v[:, :first], np.full(2, first))
    outs, start = [full_attention(q, k, v, window)[:, :first]], first
    for i in range(0, len(rest), apart):
        sizes = rest[i : i + apart]
        cache = split_cache(cache, np.full(2, start), slots=sum(sizes))
        for size in sizes:
            part = slice(start, start + size)
            positions = np.broadcast_to(np.arange(start, start + size), (2, size))
            cache, out = attend(cache, q[:, part], k[:, part], v[:, part], positions, window)
            outs.append(out)
            start += size
        cache = merge_cache(cache, np.full(2, start))
    np.testing.assert_allclose(np.concatenate(outs, 1), full_attention(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("slots, window", [(12, None), (4, 4)])
def test_ragged_rows_equal_single_rows(slots, window):
    """Rows of 7, 3 and 1 tokens prefilled together, then decoded at their own positions; the second stands still."""
    lengths = np.array([7, 3, 1])
    q, k, v = text(12, batch=3)
    cache = fill_cache(empty(slots), k[:, :7], v[:, :7], lengths)
    expected = full_attention(q, k, v, window)
    for size in (1, 1, 2, 1):
        positions = lengths[:, None] + np.arange(size)
        cache, out = attend(cache, *(take(x, positions) for x in (q, k, v)), positions, window)
        np.testing.assert_allclose(out, take(expected, positions), atol=1e-5)
        lengths = lengths + size
    levels = split_cache(cache, lengths - [0, 1, 0], slots=2)  # the second row's last token is written again
    for step in range(2):
        positions = np.array([[lengths[0] + step - 1], [lengths[1] - 1], [lengths[2] + step - 1]]) + [[0], [0], [1]]
        positions[0] = min(positions[0, 0] + 1, 11)
        levels, out = attend(levels, *(take(x, positions) for x in (q, k, v)), positions, window)
        np.testing.assert_allclose(out[1:], take(expected, positions)[1:], atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
def test_padding_is_neither_stored_nor_seen(length):
    _, k, v = text(4)
    cache = fill_cache(empty(6), k, v, np.array([4, 4]))
    new = np.full((2, length, KV_HEADS, HEAD_DIM), np.nan, np.float32)
    levels, masks = update_cache(split_cache(cache, np.full(2, -1), slots=length), new, new, np.full((2, length), -1))
    assert not any(np.any(mask) for mask in masks)
    jax.tree.map(np.testing.assert_array_equal, merge_cache(levels, np.zeros(2, int)), cache)
    # On the right of a row: its real tokens alone are stored.
    new = np.concatenate([k[:, :1] + 1, new], axis=1)
    positions = np.array([[4, *[-1] * length]] * 2)
    levels, masks = update_cache(split_cache(cache, np.full(2, 4), slots=1 + length), new, new, positions)
    assert not np.any(np.asarray(masks[1])[:, 0, 1:])
    merged = merge_cache(levels, np.full(2, 5))
    np.testing.assert_array_equal(merged.v[:, :, 4], k[:, 0] + 1)
    np.testing.assert_array_equal(merged.v[:, :, 5], cache.v[:, :, 5])


def test_a_ring_without_window_forgets_the_oldest():
    _, k, v = text(6)
    cache = fill_cache(empty(4), k, v, np.array([6, 6]))
    np.testing.assert_array_equal(np.asarray(cache.v)[:, :, [0, 1, 2, 3]], v[:, [4, 5, 2, 3]].swapaxes(1, 2))
    np.testing.assert_array_equal(np.asarray(cache.k)[..., [0, 1, 2, 3]], k[:, [4, 5, 2, 3]].transpose(0, 2, 3, 1))


def test_writing_positions_again_replaces_them():
    """As speculative decoding does, after a rejected guess; in a ring with slots to spare beyond its window too."""
    q, k, v = text(12)
    for slots, window in ((12, None), (8, 4)):
        guess = [np.concatenate([x[:, :4], x[:, 4:8] + 1], axis=1) for x in (k, v)]
        cache = fill_cache(empty(slots), *guess, np.array([8, 8]))
        outs, positions = [], np.broadcast_to(np.arange(12), (2, 12))
        for part in (slice(4, 6), slice(6, 7), slice(7, 12)):
            cache, out = attend(cache, q[:, part], k[:, part], v[:, part], positions[:, part], window)
            outs.append(out)
        expected = full_attention(q, k, v, window)[:, 4:]
        np.testing.assert_allclose(np.concatenate(outs, 1), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_smaller_dtypes_are_near(dtype):
    """int8 keeps each head of each token within 1/254 of its largest channel, bfloat16 within 1/256 of each."""
    q, k, v = text(16)
    cache = fill_cache(empty(16, dtype=dtype), k[:, :8], v[:, :8], np.array([8, 8]))
    assert cache.k.dtype == cache.v.dtype == dtype and (cache.k_scale is None) == (dtype != jnp.int8)
    outs = []
    for t in range(8, 16):
        now, positions = slice(t, t + 1), np.full((2, 1), t)
        cache, out = attend(cache, q[:, now], k[:, now], v[:, now], positions, None)
        outs.append(out)
    expected = full_attention(q, k, v, None)[:, 8:]
    difference = np.abs(np.concatenate(outs, 1) - expected).max()
    assert 0 < difference < 0.03


def test_a_longer_cache_holds_the_same():
    q, k, v = text(8)
    cache = fill_cache(empty(4, dtype=jnp.int8), k[:, :4], v[:, :4], np.array([4, 4]))
    longer = ops.grow_cache(cache, 9)
    assert longer.k.shape[3] == longer.v.shape[2] == longer.k_scale.shape[2] == 9
    whole = fill_cache(empty(9, dtype=jnp.int8), k[:, :4], v[:, :4], np.array([4, 4]))
    jax.tree.map(np.testing.assert_array_equal, longer, whole)


def test_vmap():
    _, k, v = text(3)
    positions = np.array([[0, 1, 2], [0, 1, -1]])
    levels = split_cache(fill_cache(empty(4), k, v, np.array([0, 0])), np.array([0, 0]), slots=3)
    whole = update_cache(levels, k, v, positions, window=2)
    one_row = jax.jit(jax.vmap(partial(ops.update_cache, window=2)))
    by_row = one_row(*jax.tree.map(lambda x: np.asarray(x)[:, None], (levels, k, v, positions)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[:, 0], b), by_row, whole)
