"""Text from a model, as pure functions of (apply_fn, params): prefill, then a scan over an explicit KV cache.

`apply_fn(params, tokens[B,T], positions[B,T], cache) -> (float32 logits [B,T,V], cache)`; a position below
0 marks padding. Prompts are right-padded; row i has lengths[i] >= 1 tokens, and its continuation starts there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from llm_jax import ops

ApplyFn = Callable[[Any, Array, Array, Any], tuple[Array, Any]]


class SamplingConfig(NamedTuple):
    """How each row is sampled; arrays, so that rows differ and a new value compiles nothing.

    Applied in this order: temperature (0: greedy), top-k, top-p; then one draw.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]  # the vocabulary's size or more: off
    top_p: Float[Array, "B"]  # 1: off


class Generation(NamedTuple):
    tokens: Int[Array, "B T+new"]  # prompt and continuation, then pad_token
    lengths: Int[Array, "B"]  # tokens that count, the stop token that ended the row included
    logprobs: Float[Array, "B new"]  # of each chosen token, unmodified model (temperature 1, no mask); 0 past the end


class _Carry(NamedTuple):
    tokens: Array
    lengths: Array
    done: Bool[Array, "B"]


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], positions: Int[Array, "B"], sampling: SamplingConfig
) -> Int[Array, "B"]:
    """One token a row, drawn with `fold_in(key, position)`: of the row's own key and position alone."""
    greedy = sampling.temperature == 0
    logits = logits.astype(jnp.float32)
    # Below 1e-30 logits would overflow, and nothing changes any more.
    warped = logits / jnp.where(greedy, 1.0, jnp.maximum(sampling.temperature, 1e-30))[:, None]
    warped = ops.top_k_mask(warped, sampling.top_k)
    warped = ops.top_p_mask(warped, sampling.top_p)
    uniform = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(keys, positions)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), ops.draw(warped, uniform)).astype(jnp.int32)


def generate(
    apply_fn: ApplyFn,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    sampling: SamplingConfig,
    *,
    max_new_tokens: int,
    init_cache: Callable[[int, int], Any],
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
) -> Generation:
    """Continues each row by max_new_tokens, or up to the first of stop_tokens.

    Args:
        init_cache: (batch, length) -> an empty cache for that many tokens.
    """
    batch, length = tokens.shape
    start = _start(tokens, lengths, max_new_tokens, pad_token)
    if max_new_tokens == 0:
        return Generation(start.tokens, start.lengths, jnp.zeros((batch, 0)))
    choose = _chooser(keys, sampling, stop_tokens)

    cache = init_cache(batch, length + max_new_tokens)
    positions = jnp.arange(length)
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    logits, cache = apply_fn(params, tokens, positions, cache)
    carry, logprob = choose(start, _at(logits, lengths - 1))

    def decode(carry: tuple[_Carry, Any], _: None) -> tuple[tuple[_Carry, Any], Array]:
        state, cache = carry
        last = (state.lengths - 1)[:, None]
        logits, cache = apply_fn(params, jnp.take_along_axis(state.tokens, last, axis=1), last, cache)
        state, logprob = choose(state, logits[:, 0])
        return (state, cache), logprob

    (state, _), logprobs = jax.lax.scan(decode, (carry, cache), length=max_new_tokens - 1)
    return Generation(state.tokens, state.lengths, jnp.concatenate([logprob[None], logprobs]).T)


def generate_uncached(
    apply_fn: ApplyFn,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    sampling: SamplingConfig,
    *,
    max_new_tokens: int,
    context: int,
    stop_tokens: tuple[int, ...] = (),
    pad_token: int = 0,
) -> Generation:
    """`generate` with a full forward over each row's last `context` tokens, at positions 0.., for every token.

    What learned positions need past the trained context, where every token moves to another position; and
    the plain version that cached decoding is held to.
    """
    batch, length = tokens.shape
    choose = _chooser(keys, sampling, stop_tokens)
    width = min(context, length + max_new_tokens)

    def decode(state: _Carry, _: None) -> tuple[_Carry, Array]:
        first = jnp.maximum(state.lengths - width, 0)
        window = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (width,)))(state.tokens, first)
        # What lies after the last real token is never seen by it: attention is causal.
        positions = jnp.broadcast_to(jnp.arange(width), window.shape)
        logits, _ = apply_fn(params, window, positions, None)
        return choose(state, _at(logits, state.lengths - first - 1))

    start = _start(tokens, lengths, max_new_tokens, pad_token)
    state, logprobs = jax.lax.scan(decode, start, length=max_new_tokens)
    return Generation(state.tokens, state.lengths, logprobs.T)


def _start(tokens: Array, lengths: Array, max_new_tokens: int, pad_token: int) -> _Carry:
    tokens = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, pad_token)
    tokens = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)), constant_values=pad_token)
    return _Carry(tokens, lengths, jnp.zeros(lengths.shape, bool))


def _chooser(
    keys: Array, sampling: SamplingConfig, stop_tokens: tuple[int, ...]
) -> Callable[[_Carry, Array], tuple[_Carry, Array]]:
    """(state, logits[B,V] of the next token) -> (state with it appended, its log-probability)."""

    def choose(state: _Carry, logits: Array) -> tuple[_Carry, Array]:
        token = sample_tokens(logits, keys, state.lengths, sampling)
        rows = jnp.arange(token.shape[0])
        logprob = jax.nn.log_softmax(logits.astype(jnp.float32))[rows, token]
        # A finished row writes nothing: its column is out of range, and dropped.
        column = jnp.where(state.done, state.tokens.shape[1], state.lengths)
        new = _Carry(
            state.tokens.at[rows, column].set(token, mode="drop"),
            state.lengths + ~state.done,
            state.done | jnp.isin(token, jnp.array(stop_tokens, jnp.int32)),
        )
        return new, jnp.where(state.done, 0.0, logprob)

    return choose


def _at(logits: Float[Array, "B T V"], index: Int[Array, "B"]) -> Float[Array, "B V"]:
    return jnp.take_along_axis(logits, index[:, None, None], axis=1)[:, 0]
