"""Text from a model, as pure functions of (apply_fn, params): prefill, then scans over an explicit KV cache.

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

CHUNK = 16  # tokens of one scan; between them it ends early if every row has


class SamplingConfig(NamedTuple):
    """How each row is sampled; arrays, so that rows differ and a new value compiles nothing.

    Applied in this order: bias, penalties, temperature (0: greedy), top-k, top-p, min-p; then one draw.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]  # the vocabulary's size or more: off
    top_p: Float[Array, "B"]  # 1: off
    min_p: Float[Array, "B"] | float = 0.0  # of the likeliest token's probability; 0: off
    repetition_penalty: Float[Array, "B"] | float = 1.0  # of tokens in the prompt or its continuation; 1: off
    presence_penalty: Float[Array, "B"] | float = 0.0  # of tokens in the continuation; 0: off
    frequency_penalty: Float[Array, "B"] | float = 0.0  # the same, for each time; 0: off
    logit_bias: Float[Array, "B V"] | float = 0.0  # added to the logits
    min_new_tokens: Int[Array, "B"] | int = 0  # no stop token before


class Generation(NamedTuple):
    tokens: Int[Array, "B T+new"]  # prompt and continuation, then pad_token
    lengths: Int[Array, "B"]  # tokens that count, the stop token that ended the row included
    logprobs: Float[Array, "B new"]  # of each chosen token, unmodified model (temperature 1, no mask); 0 past the end


class _State(NamedTuple):
    """Between two tokens."""

    tokens: Int[Array, "B T+new"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    logprobs: Float[Array, "B new"]
    cache: Any


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], positions: Int[Array, "B"], sampling: SamplingConfig
) -> Int[Array, "B"]:
    """One token a row, drawn with `fold_in(key, position)`: of the row's own key and position alone.

    Of `sampling` it takes temperature, top-k, top-p and min-p; what depends on the text is `penalized`.
    """
    greedy = sampling.temperature == 0
    logits = logits.astype(jnp.float32)
    # Below 1e-30 logits would overflow, and nothing changes any more.
    warped = logits / jnp.where(greedy, 1.0, jnp.maximum(sampling.temperature, 1e-30))[:, None]
    warped = ops.top_k_mask(warped, sampling.top_k)
    warped = ops.top_p_mask(warped, sampling.top_p)
    warped = ops.min_p_mask(warped, jnp.asarray(sampling.min_p))
    uniform = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(keys, positions)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), ops.draw(warped, uniform)).astype(jnp.int32)


def penalized(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    starts: Int[Array, "B"],
    lengths: Int[Array, "B"],
    sampling: SamplingConfig,
) -> Float[Array, "B V"]:
    """The logits after a text of `lengths` tokens, whose continuation begins at `starts`, with bias and penalties."""
    logits = logits.astype(jnp.float32) + sampling.logit_bias
    penalties = [
        jnp.broadcast_to(jnp.asarray(value, jnp.float32), lengths.shape)
        for value in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    ]

    def penalize(logits: Array) -> Array:
        rows, columns = jnp.arange(len(tokens))[:, None], jnp.arange(tokens.shape[1])
        there, new = columns < lengths[:, None], columns >= starts[:, None]
        none = jnp.zeros(logits.shape, jnp.int32)
        in_text = none.at[rows, tokens].add(there.astype(jnp.int32), mode="drop")
        in_continuation = none.at[rows, tokens].add((there & new).astype(jnp.int32), mode="drop")
        repetition, presence, frequency = penalties
        return ops.penalize(
            logits, in_text, in_continuation, repetition=repetition, presence=presence, frequency=frequency
        )

    repetition, presence, frequency = penalties
    asked = jnp.any(repetition != 1) | jnp.any(presence != 0) | jnp.any(frequency != 0)
    return jax.lax.cond(asked, penalize, lambda logits: logits, logits)


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
    choose = _chooser(keys, sampling, lengths, max_new_tokens, stop_tokens)

    def prefill(state: _State) -> _State:
        positions = jnp.arange(length)
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        logits, cache = apply_fn(params, tokens, positions, init_cache(batch, length + max_new_tokens))
        return choose(state._replace(cache=cache), _at(logits, lengths - 1))

    def decode(state: _State) -> _State:
        last = (state.lengths - 1)[:, None]
        logits, cache = apply_fn(params, jnp.take_along_axis(state.tokens, last, axis=1), last, state.cache)
        return choose(state._replace(cache=cache), logits[:, 0])

    start = _start(tokens, lengths, max_new_tokens, pad_token)
    if max_new_tokens == 0:
        return _finish(start)
    return _finish(_repeat(decode, prefill(start), max_new_tokens - 1))


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
    choose = _chooser(keys, sampling, lengths, max_new_tokens, stop_tokens)
    width = min(context, tokens.shape[1] + max_new_tokens)

    def decode(state: _State) -> _State:
        first = jnp.maximum(state.lengths - width, 0)
        window = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (width,)))(state.tokens, first)
        # What lies after the last real token is never seen by it: attention is causal.
        positions = jnp.broadcast_to(jnp.arange(width), window.shape)
        logits, _ = apply_fn(params, window, positions, None)
        return choose(state, _at(logits, state.lengths - first - 1))

    return _finish(_repeat(decode, _start(tokens, lengths, max_new_tokens, pad_token), max_new_tokens))


def _start(tokens: Array, lengths: Array, max_new_tokens: int, pad_token: int) -> _State:
    tokens = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, pad_token)
    tokens = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)), constant_values=pad_token)
    return _State(tokens, lengths, jnp.zeros(lengths.shape, bool), jnp.zeros((len(lengths), max_new_tokens)), None)


def _repeat(decode: Callable[[_State], _State], state: _State, times: int) -> _State:
    """`decode`, that many times, or until every row is done: by scans of one length, CHUNK at most."""
    if times == 0:
        return state
    # The length whose last scan does the least in vain.
    length = min(times, min(range(CHUNK, CHUNK // 2, -1), key=lambda length: -times % length))
    chunks = -(-times // length)

    def unfinished(carry: tuple[Array, _State]) -> Array:
        return (carry[0] < chunks) & ~jnp.all(carry[1].done)

    def chunk(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        return carry[0] + 1, jax.lax.scan(lambda state, _: (decode(state), None), carry[1], length=length)[0]

    return jax.lax.while_loop(unfinished, chunk, (jnp.zeros((), jnp.int32), state))[1]


def _finish(state: _State) -> Generation:
    return Generation(state.tokens, state.lengths, state.logprobs)


def _chooser(
    keys: Array, sampling: SamplingConfig, starts: Array, max_new_tokens: int, stop_tokens: tuple[int, ...]
) -> Callable[[_State, Array], _State]:
    """(state, logits[B,V] of the next token) -> the state with it appended."""
    stops = jnp.array(stop_tokens, jnp.int32)

    def choose(state: _State, logits: Array) -> _State:
        count = state.lengths - starts
        allowed = penalized(logits, state.tokens, starts, state.lengths, sampling)
        if stop_tokens:
            too_early = (count < sampling.min_new_tokens)[:, None] & jnp.isin(jnp.arange(logits.shape[1]), stops)
            allowed = jnp.where(too_early, -jnp.inf, allowed)
        token = sample_tokens(allowed, keys, state.lengths, sampling)
        rows = jnp.arange(token.shape[0])
        logprob = jax.nn.log_softmax(logits.astype(jnp.float32))[rows, token]

        def write(array: Array, column: Array, value: Array) -> Array:
            # A finished row writes nothing: its column is out of range, and dropped.
            return array.at[rows, jnp.where(state.done, array.shape[1], column)].set(value, mode="drop")

        return state._replace(
            tokens=write(state.tokens, state.lengths, token),
            lengths=state.lengths + ~state.done,
            done=state.done | jnp.isin(token, stops) | (count + 1 >= max_new_tokens),
            logprobs=write(state.logprobs, count, logprob),
        )

    return choose


def _at(logits: Float[Array, "B T V"], index: Int[Array, "B"]) -> Float[Array, "B V"]:
    return jnp.take_along_axis(logits, index[:, None, None], axis=1)[:, 0]
