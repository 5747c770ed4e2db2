"""The key/value cache of one attention layer: an argument and a result, a plain pytree.

A cache is a ring of S slots: position p lives in slot p % S. A layer with a window needs only as
many slots as its window; a shorter ring than the text forgets the oldest positions.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LayerCache(NamedTuple):
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]  # int32: the position held by each slot, -1 where empty


def init_layer_cache(batch: int, length: int, n_kv_head: int, head_dim: int, dtype) -> LayerCache:
    """An empty cache of `length` slots for each of `batch` rows."""
    empty = jnp.zeros((batch, length, n_kv_head, head_dim), dtype)
    # Two arrays, not one twice: a donated buffer may be donated only once.
    return LayerCache(empty, jnp.zeros_like(empty), jnp.full((batch, length), -1, jnp.int32))


def update_layer_cache(
    cache: LayerCache,
    k_new: Float[Array, "B T K H"],
    v_new: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
) -> tuple[LayerCache, Float[Array, "B X K H"], Float[Array, "B X K H"], Bool[Array, "B T X"]]:
    """Stores T new entries a row; returns (cache, keys, values, mask) for `masked_attention`.

    A query at position q sees the keys at q-window+1..q (window None: all up to q that are left).
    Positions rise along a row, and rows may differ; a negative position is padding, which is
    neither stored nor seen, and sees nothing. Writing positions again replaces them, and what a
    row held from its first new position on is no longer seen.

    T = 1 returns the cache's own arrays (X = S). For T > 1, X = S + T: the old cache and then the
    new entries, because writing first could evict a key that an earlier query of the same call
    still needs; afterwards the cache holds the last S positions.
    """
    slots = cache.positions.shape[1]
    positions = positions.astype(jnp.int32)
    newest = jnp.max(positions, axis=1, keepdims=True)
    survives = (positions >= 0) & (positions > newest - slots)
    slot = jnp.where(survives, positions % slots, slots)  # one past the end: dropped
    row = jnp.arange(positions.shape[0])[:, None]

    def write(old, new):
        return old.at[row, slot].set(new.astype(old.dtype), mode="drop")

    new_cache = LayerCache(write(cache.k, k_new), write(cache.v, v_new), write(cache.positions, positions))
    if positions.shape[1] == 1:
        return new_cache, new_cache.k, new_cache.v, _visible(positions, new_cache.positions, window)

    padding = positions < 0
    first = jnp.min(jnp.where(padding, jnp.iinfo(jnp.int32).max, positions), axis=1, keepdims=True)
    old_positions = jnp.where(cache.positions < first, cache.positions, -1)
    keys = jnp.concatenate([cache.k, k_new.astype(cache.k.dtype)], axis=1)
    values = jnp.concatenate([cache.v, v_new.astype(cache.v.dtype)], axis=1)
    key_positions = jnp.concatenate([old_positions, positions], axis=1)
    return new_cache, keys, values, _visible(positions, key_positions, window)


def _visible(query: Int[Array, "B T"], key: Int[Array, "B X"], window: int | None) -> Bool[Array, "B T X"]:
    query, key = query[:, :, None], key[:, None, :]
    visible = (key >= 0) & (key <= query)
    return visible if window is None else visible & (key > query - window)
