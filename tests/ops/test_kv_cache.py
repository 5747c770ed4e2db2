"""Cached attention equals attention over the whole text, however the text is cut into calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops
from llm_jax.ops import init_layer_cache

# Compiled whole: op by op, the tests would spend their time compiling each op of each shape.
masked_attention = jax.jit(ops.masked_attention)
update_layer_cache = jax.jit(ops.update_layer_cache, static_argnames="window")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def text(length, batch=2, seed=0):
    """q, k, v as numpy, whose slices cost no compilation."""
    rng = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [rng.standard_normal((batch, length, n, HEAD_DIM)).astype(np.float32) for n in heads]


def full_attention(q, k, v, window):
    t = np.arange(q.shape[1])
    visible = t[None, :] <= t[:, None]
    if window is not None:
        visible &= t[None, :] > t[:, None] - window
    return np.asarray(masked_attention(q, k, v, visible[None]))


@partial(jax.jit, static_argnames="window")
def cached_attention(cache, q, k, v, positions, window):
    cache, keys, values, mask = ops.update_layer_cache(cache, k, v, positions, window=window)
    return cache, ops.masked_attention(q, keys, values, mask)


@pytest.mark.parametrize(
    "slots, window, cuts",
    [
        (16, None, [16]),
        (16, None, [1] * 16),
        (20, None, [5, 1, 1, 4, 1, 4]),
        (16, 3, [6, 1, 1, 1, 7]),
        (5, 5, [1] * 16),  # a ring smaller than the text
        (5, 5, [12, 1, 1, 2]),  # a prefill longer than the ring
        (6, 4, [3, 8, 1, 4]),  # chunks that wrap around, over a ring in use
        (1, 1, [7, 1, 8]),
    ],
)
def test_equals_full_attention(slots, window, cuts):
    q, k, v = text(16)
    cache = init_layer_cache(2, slots, KV_HEADS, HEAD_DIM, jnp.float32)
    outs, start = [], 0
    for size in cuts:
        part = slice(start, start + size)
        positions = np.broadcast_to(np.arange(start, start + size), (2, size))
        cache, out = cached_attention(cache, q[:, part], k[:, part], v[:, part], positions, window)
        outs.append(out)
        start += size
    np.testing.assert_allclose(np.concatenate(outs, 1), full_attention(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("slots, window", [(12, None), (4, 4)])
def test_ragged_rows_equal_single_rows(slots, window, padding):
    """Rows of 7, 3 and 1 tokens prefilled together, then decoded at their own positions."""
    lengths = [7, 3, 1]
    q, k, v = text(12, batch=3)
    prompt = np.full((3, 7), -1)
    source = np.zeros((3, 7), int)
    for row, length in enumerate(lengths):
        at = slice(0, length) if padding == "right" else slice(7 - length, 7)
        prompt[row, at] = source[row, at] = range(length)
    take = lambda x, at: np.take_along_axis(x, at[..., None, None], axis=1)  # noqa: E731
    cache = init_layer_cache(3, slots, KV_HEADS, HEAD_DIM, jnp.float32)
    cache, out = cached_attention(cache, *(take(x, source) for x in (q, k, v)), prompt, window)
    out = np.asarray(out)
    assert np.isfinite(out).all()
    expected = full_attention(q, k, v, window)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row][prompt[row] >= 0], expected[row, :length], atol=1e-5)
    for step in range(5):
        positions = np.asarray([[length + step] for length in lengths])
        cache, out = cached_attention(cache, *(take(x, positions) for x in (q, k, v)), positions, window)
        np.testing.assert_allclose(out, take(expected, positions), atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
def test_padding_is_neither_stored_nor_seen(length):
    _, k, v = text(4)
    cache = init_layer_cache(2, 6, KV_HEADS, HEAD_DIM, jnp.float32)
    cache, *_ = update_layer_cache(cache, k, v, np.array([[0, 1, 2, 3]] * 2))
    new = np.full((2, length, KV_HEADS, HEAD_DIM), np.nan, np.float32)
    after, _, _, mask = update_layer_cache(cache, new, new, np.full((2, length), -1))
    jax.tree.map(np.testing.assert_array_equal, after, cache)
    assert not np.any(mask)


def test_the_last_positions_survive_whatever_order_they_are_written_in():
    """A scatter into one slot twice keeps either: only one entry a slot may reach it."""
    _, k, v = text(7)
    positions = np.broadcast_to(np.arange(7), (2, 7))
    cache = init_layer_cache(2, 3, KV_HEADS, HEAD_DIM, jnp.float32)
    forward, *_ = update_layer_cache(cache, k, v, positions)
    backward, *_ = update_layer_cache(cache, k[:, ::-1], v[:, ::-1], positions[:, ::-1])
    np.testing.assert_array_equal(forward.positions, [[6, 4, 5]] * 2)
    jax.tree.map(np.testing.assert_array_equal, forward, backward)


def test_a_ring_without_window_forgets_the_oldest():
    _, k, v = text(6)
    cache = init_layer_cache(2, 4, KV_HEADS, HEAD_DIM, jnp.float32)
    for t in range(6):
        now = slice(t, t + 1)
        cache, keys, _, mask = update_layer_cache(cache, k[:, now], v[:, now], np.full((2, 1), t))
    np.testing.assert_array_equal(cache.positions, [[4, 5, 2, 3]] * 2)
    np.testing.assert_array_equal(np.asarray(keys)[:, 1], k[:, 5])
    assert np.all(mask)


def test_writing_positions_again_replaces_them():
    """As speculative decoding does, after a rejected guess."""
    q, k, v = text(8)
    cache = init_layer_cache(2, 8, KV_HEADS, HEAD_DIM, jnp.float32)
    positions = np.broadcast_to(np.arange(8), (2, 8))
    guess = [np.concatenate([x[:, :4], x[:, 4:] + 1], axis=1) for x in (q, k, v)]
    cache, _ = cached_attention(cache, *guess, positions, None)
    cache, two = cached_attention(cache, q[:, 4:6], k[:, 4:6], v[:, 4:6], positions[:, 4:6], None)
    cache, one = cached_attention(cache, q[:, 6:7], k[:, 6:7], v[:, 6:7], positions[:, 6:7], None)
    expected = full_attention(q, k, v, None)
    np.testing.assert_allclose(np.concatenate([two, one], 1), expected[:, 4:7], atol=1e-5)


def test_one_token_returns_the_cache_itself():
    cache = init_layer_cache(1, 4, KV_HEADS, HEAD_DIM, jnp.bfloat16)
    _, k, v = text(1, batch=1)
    new = [jnp.asarray(x) for x in (k, v, np.zeros((1, 1), int))]
    after, keys, values, mask = ops.update_layer_cache(cache, *new)
    assert keys is after.k and values is after.v and keys.dtype == jnp.bfloat16
    assert mask.shape == (1, 1, 4) and after.positions.dtype == jnp.int32


def test_one_update_of_a_donated_cache_copies_nothing():
    cache = init_layer_cache(2, 4096, KV_HEADS, HEAD_DIM, jnp.float32)
    _, k, v = text(1)
    step = jax.jit(lambda cache, *new: ops.update_layer_cache(cache, *new)[0], donate_argnums=0)
    memory = step.lower(cache, k, v, np.zeros((2, 1), int)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.k.nbytes / 10


def test_vmap():
    _, k, v = text(3)
    cache = init_layer_cache(2, 4, KV_HEADS, HEAD_DIM, jnp.float32)
    positions = np.array([[0, 1, 2], [0, 1, -1]])
    whole = update_layer_cache(cache, k, v, positions, window=2)
    one_row = jax.jit(jax.vmap(partial(ops.update_layer_cache, window=2)))
    by_row = one_row(*jax.tree.map(lambda x: np.asarray(x)[:, None], (cache, k, v, positions)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[:, 0], b), by_row, whole)
