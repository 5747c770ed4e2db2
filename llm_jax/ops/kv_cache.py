"""The key/value cache of one attention layer: an argument and a result, a plain pytree.

A cache is a ring of S slots: position p lives in slot p % S. A layer with a window needs only as
many slots as its window; a shorter ring than the text forgets the oldest positions.

A row's positions are 0, 1, 2, ... from call to call, so what a slot holds follows from the newest one. Going back
and writing positions again replaces what came after them.

The latest few tokens are kept apart from the ring, and join it all at once. A loop that writes one token into a large
array at every turn, and multiplies by all of it, has XLA's CPU backend copy it at every turn; and new keys are seen
before they push old ones out of the ring, that an earlier query of the same call still needs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8


class LayerCache(NamedTuple):
    """Keys and values; int8 ones are multiples of a scale for each head of each token.

    Each lies as its product in attention reads it. For 8 rows, 3 heads of 64 and 256 slots the scores take 100 us
    on two CPU cores, 400 where keys lie as values do.
    """

    k: Float[Array, "B K H S"] | Int8[Array, "B K H S"]
    v: Float[Array, "B K S H"] | Int8[Array, "B K S H"]
    k_scale: Float[Array, "B K S"] | None = None
    v_scale: Float[Array, "B K S"] | None = None


SLOTS = LayerCache(3, 2, 2, 2)  # the axis of slots of each array


class TwoLevelCache(NamedTuple):
    """A ring, and apart from it the R tokens from position `first` on, in slots 0, 1, ..."""

    ring: LayerCache
    recent: LayerCache
    first: Int[Array, "B"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EmptyCache:
    """A cache of `length` slots that is known to be empty when a program is traced, so that the prompt which fills
    it need not look into it. `dtype` int8: quantized."""

    length: Any  # an int, or the symbol that stands for one in a program that is exported for any length
    dtype: Any


def fill_cache(
    cache: EmptyCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int[Array, "B"]
) -> LayerCache:
    """The cache of texts of `lengths` tokens, padded on the right: the last of them that it has slots for."""
    time, entries = k.shape[1], _entries(cache.dtype, k, v)
    if time <= cache.length:  # position p is in slot p, and what lies after a text is not seen
        return grow_cache(entries, cache.length)
    source = jnp.maximum(_held(lengths[:, None] - 1, cache.length), 0)
    return _map(lambda entry, axis: _take(entry, source, axis), entries)


def grow_cache(cache: LayerCache, length: int, *, pad: Callable[..., Array] = jnp.pad) -> LayerCache:
    """The cache with `length` slots, of a text that the slots it has were enough for.

    pad: (array, padding of each axis) -> array.
    """

    def longer(array: Array, axis: int) -> Array:
        more = length - array.shape[axis]
        return pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)]) if more else array

    return _map(longer, cache)


def split_cache(ring: LayerCache, first: Int[Array, "B"], *, slots: int) -> TwoLevelCache:
    """With an empty place apart for `slots` tokens a row, from position `first` on, which the ring does not hold."""

    def empty(array: Array, axis: int) -> Array:
        return jnp.zeros([slots if i == axis else size for i, size in enumerate(array.shape)], array.dtype)

    return TwoLevelCache(ring, _map(empty, ring), first)


def update_cache(
    cache: TwoLevelCache,
    k_new: Float[Array, "B T K H"],
    v_new: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
) -> tuple[TwoLevelCache, list[Bool[Array, "B T _"]]]:
    """Stores T new entries a row apart; returns (cache, masks of ring and recent) for `cached_attention`.

    A query at position q sees the keys at q-window+1..q (window None: all up to q that are left).
    Positions rise by one along a row, and rows may differ; a negative position, on a row's right, is padding, which
    sees nothing and is not seen.
    """
    recent, first = cache.recent, cache.first
    slots, time = recent.v.shape[SLOTS.v], k_new.shape[1]
    offset = jnp.arange(slots) - (positions[:, :1] - first[:, None])  # which of the new entries goes there
    new = (offset >= 0) & (offset < time)

    def store(old: Array, entry: Array, axis: int) -> Array:
        entry = entry if time == 1 else _take(entry, jnp.clip(offset, 0, time - 1), axis)
        return jnp.where(_along(new, old.ndim, axis), entry, old)

    # Behind a barrier: XLA's CPU backend would rotate a new key again for every slot.
    entries = jax.lax.optimization_barrier(_entries(recent.v.dtype, k_new, v_new))
    masks = [_visible(positions, keys, window) for keys in cache_positions(cache)]
    return cache._replace(recent=_map(store, recent, entries)), masks


def cache_positions(cache: TwoLevelCache) -> list[Int[Array, "B _"]]:
    """The position that each slot of the ring, and of what lies apart, is for; below 0: none."""
    first, slots = cache.first[:, None], cache.recent.v.shape[SLOTS.v]
    return [_held(first - 1, cache.ring.v.shape[SLOTS.v]), first + jnp.arange(slots)]


def merge_cache(cache: TwoLevelCache, lengths: Int[Array, "B"]) -> LayerCache:
    """The ring with all positions below `lengths` in it; 0: as it was."""
    slots = cache.recent.v.shape[SLOTS.v]
    held = _held(lengths[:, None] - 1, cache.ring.v.shape[SLOTS.v])
    offset = held - cache.first[:, None]
    moves = (offset >= 0) & (held >= 0)

    def store(old: Array, entry: Array, axis: int) -> Array:
        taken = _take(entry, jnp.clip(offset, 0, slots - 1), axis)
        return jnp.where(_along(moves, old.ndim, axis), taken, old)

    return _map(store, cache.ring, cache.recent)


def _map(function: Callable[..., Array], *caches: LayerCache) -> LayerCache:
    """function(*arrays, axis of slots), of keys, values and, where there are, scales."""
    arrays = zip(*caches, SLOTS, strict=True)
    return LayerCache(*(None if each[0] is None else function(*each) for each in arrays))


def _along(x: Array, ndim: int, axis: int) -> Array:
    """[B, X] -> what broadcasts against [B, K, ...] of `ndim` axes with X on `axis`."""
    return x.reshape([x.shape[0] if i == 0 else x.shape[1] if i == axis else 1 for i in range(ndim)])


def _take(entry: Array, index: Int[Array, "B X"], axis: int) -> Array:
    return jnp.take_along_axis(entry, _along(index, entry.ndim, axis), axis=axis)


def _entries(dtype: Any, k_new: Array, v_new: Array) -> LayerCache:
    """The new entries as a cache of `dtype` stores them."""
    k, v = k_new.swapaxes(1, 2), v_new.swapaxes(1, 2)
    if jnp.dtype(dtype) != jnp.int8:
        return LayerCache(k.swapaxes(2, 3).astype(dtype), v.astype(dtype))
    (k, k_scale), (v, v_scale) = (_quantized(x) for x in (k, v))
    return LayerCache(k.swapaxes(2, 3), v, k_scale, v_scale)


def _quantized(x: Float[Array, "*B H"]) -> tuple[Int8[Array, "*B H"], Float[Array, "*B"]]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale


def _held(newest: Int[Array, "B 1"], slots: int) -> Int[Array, "B S"]:
    """The position that each slot holds once `newest` is written; below 0: none yet."""
    return newest - (newest - jnp.arange(slots)) % slots


def _visible(query: Int[Array, "B T"], key: Int[Array, "B X"], window: int | None) -> Bool[Array, "B T X"]:
    query, key = query[:, :, None], key[:, None, :]
    visible = (key >= 0) & (key <= query)
    return visible if window is None else visible & (key > query - window)
