"""Text from a model, as pure functions of (apply_fn, params): prefill, then scans over an explicit KV cache.

`apply_fn(params, tokens[B,T], positions[B,T], cache) -> (float32 logits [B,T,V], cache)`; a position below
0 marks padding. Prompts are right-padded; row i has lengths[i] >= 1 tokens, and its continuation starts there.
For a prompt, apply_fn may return the logits of each row's last token alone, [B,1,V].

`generate` is all of it in one traceable function. `prefill` and `decode` are its parts, for a loop on the host that
looks at the text as it comes.
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


class Rows(NamedTuple):
    """What of each row stays as it is while it is continued."""

    keys: Key[Array, "B"]
    starts: Int[Array, "B"]  # the prompt's length
    ends: Int[Array, "B"]  # the length at which the row is done
    sampling: SamplingConfig
    stop_tokens: Int[Array, "n"]  # of all rows; negative: none


class State(NamedTuple):
    """Between two tokens."""

    last: Int[Array, "B"]  # each row's latest token, which the cache does not hold yet
    lengths: Int[Array, "B"]  # tokens of the row, the latest included
    done: Bool[Array, "B"]
    in_prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]  # how often each token is in the continuation
    cache: Any


class Drawn(NamedTuple):
    """New tokens; of a row that is done before the last of them, the first lengths - (lengths before) count."""

    tokens: Int[Array, "B new"]
    logprobs: Float[Array, "B new"]  # unmodified model
    top_tokens: Int[Array, "B new n"]  # the n likeliest by the unmodified model
    top_logprobs: Float[Array, "B new n"]


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], positions: Int[Array, "B"], sampling: SamplingConfig
) -> Int[Array, "B"]:
    """One token a row, drawn with `fold_in(key, position)`: of the row's own key and position alone.

    Of `sampling` it takes temperature, top-k, top-p and min-p; what depends on the text is `penalized`.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.broadcast_to(jnp.asarray(sampling.temperature) == 0, keys.shape)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample() -> Array:
        # Below 1e-30 logits would overflow, and nothing changes any more. The likeliest is at 0 exactly.
        temperature = jnp.where(greedy, 1.0, jnp.maximum(sampling.temperature, 1e-30))[:, None]
        warped = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        uniform = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))(keys, positions)
        top_k = jnp.where(greedy, 1, sampling.top_k)  # whatever it asks for, it is quickly found
        return ops.masked_draw(warped, uniform, top_k=top_k, top_p=sampling.top_p, min_p=sampling.min_p)

    return jnp.where(greedy, likeliest, jax.lax.cond(jnp.all(greedy), lambda: likeliest, sample))


def penalized(
    logits: Float[Array, "B V"],
    in_text: Callable[[], tuple[Bool[Array, "B V"], Int[Array, "B V"]]],
    sampling: SamplingConfig,
) -> Float[Array, "B V"]:
    """The logits with bias and penalties.

    Args:
        in_text: () -> (which tokens the prompt holds, how often the continuation holds each); called where some row
            has a penalty.
    """
    logits = logits.astype(jnp.float32) + sampling.logit_bias
    repetition, presence, frequency = (
        jnp.broadcast_to(jnp.asarray(value, jnp.float32), logits.shape[:1])
        for value in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    )

    def penalize() -> Array:
        in_prompt, counts = in_text()
        each = dict(repetition=repetition, presence=presence, frequency=frequency)
        return ops.penalize(logits, in_prompt | (counts > 0), counts, **each)

    asked = jnp.any(repetition != 1) | jnp.any(presence != 0) | jnp.any(frequency != 0)
    return jax.lax.cond(asked, penalize, lambda: logits)


def prefill(
    apply_fn: ApplyFn,
    params: Any,
    tokens: Int[Array, "b T"],
    rows: Rows,
    cache: Any,
    *,
    num_samples: int = 1,
    top_logprobs: int = 0,
) -> tuple[State, Drawn]:
    """The first new token of each row, and the state from which `decode` goes on. `rows.ends` is above `starts`.

    Args:
        cache: an empty one.
        num_samples: continuations of each prompt, side by side: `rows` has B = b x num_samples.
    """
    lengths = rows.starts[::num_samples]
    positions = jnp.arange(tokens.shape[1])
    there = positions < lengths[:, None]
    logits, cache = apply_fn(params, tokens, jnp.where(there, positions, -1), cache)
    if logits.shape[1] == tokens.shape[1]:
        logits = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)
    logits = logits[:, 0]
    size = logits.shape[-1]
    in_prompt = counted(jnp.zeros((tokens.shape[0], size), jnp.int32), tokens, there) > 0
    logits, in_prompt, cache = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, num_samples, axis=0) if num_samples > 1 else leaf, (logits, in_prompt, cache)
    )
    batch = rows.starts.shape[0]
    state = State(
        last=jnp.zeros(batch, jnp.int32),
        lengths=rows.starts,
        done=jnp.zeros(batch, bool),
        in_prompt=in_prompt,
        counts=jnp.zeros((batch, size), jnp.int32),
        cache=cache,
    )
    state, drawn = choose(logits, state, lambda: (in_prompt, state.counts), rows, top_logprobs)
    drawn = jax.tree.map(lambda leaf: leaf[:, None], drawn)
    return state._replace(counts=counted(state.counts, drawn.tokens, jnp.ones((batch, 1), bool))), drawn


def decode(
    apply_fn: ApplyFn, params: Any, state: State, rows: Rows, *, length: int, top_logprobs: int = 0
) -> tuple[State, Drawn]:
    """`length` more tokens of each row that is not done: one scan."""
    before = state.lengths
    # Counted once for all of them, and where a penalty asks for it: counts are as large as a row of logits.
    drawn = jnp.zeros((before.shape[0], length), jnp.int32)

    def step(carry: tuple[State, Array], i: Array) -> tuple[tuple[State, Array], Drawn]:
        now, drawn = carry

        def in_text() -> tuple[Array, Array]:
            return state.in_prompt, counted(state.counts, drawn, jnp.arange(length) < (now.lengths - before)[:, None])

        logits, cache = apply_fn(params, now.last[:, None], (now.lengths - 1)[:, None], now.cache)
        now, new = choose(logits[:, 0], now._replace(cache=cache), in_text, rows, top_logprobs)
        return (now, jax.lax.dynamic_update_index_in_dim(drawn, new.tokens, i, 1)), new

    moving = state._replace(in_prompt=None, counts=None)
    (now, drawn), new = jax.lax.scan(step, (moving, drawn), jnp.arange(length))
    counts = counted(state.counts, drawn, jnp.arange(length) < (now.lengths - before)[:, None])
    return now._replace(in_prompt=state.in_prompt, counts=counts), jax.tree.map(lambda x: x.swapaxes(0, 1), new)


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
    split_cache: Callable[[Any, Array], Any] = lambda cache, lengths: cache,
    merge_cache: Callable[[Any, Array], Any] = lambda cache, lengths: cache,
) -> Generation:
    """Continues each row by max_new_tokens, or up to the first of stop_tokens.

    Args:
        init_cache: (batch, length) -> an empty cache for that many tokens.
        split_cache, merge_cache: (cache, tokens that it holds [B]) -> cache, before and after each scan of at most
            CHUNK tokens.
    """
    batch, width = tokens.shape
    there = jnp.arange(width + max_new_tokens) < lengths[:, None]
    padded = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    text = Generation(jnp.where(there, padded, pad_token), lengths, jnp.zeros((batch, max_new_tokens)))
    if max_new_tokens == 0:
        return text
    stops = jnp.array(stop_tokens or (-1,), jnp.int32)
    rows = Rows(keys, lengths, lengths + max_new_tokens, sampling, stops)

    def written(text: Generation, state: State, drawn: Drawn) -> Generation:
        columns = text.lengths[:, None] + jnp.arange(drawn.tokens.shape[1])
        out_of_range = width + max_new_tokens  # dropped
        columns = jnp.where(columns < state.lengths[:, None], columns, out_of_range)
        row = jnp.arange(batch)[:, None]
        return Generation(
            text.tokens.at[row, columns].set(drawn.tokens, mode="drop"),
            state.lengths,
            text.logprobs.at[row, columns - lengths[:, None]].set(drawn.logprobs, mode="drop"),
        )

    state, drawn = prefill(apply_fn, params, tokens, rows, init_cache(batch, width + max_new_tokens))
    text = written(text, state, drawn)
    left = max_new_tokens - 1
    if left == 0:
        return text
    # The length whose last scan does the least in vain.
    length = min(left, min(range(CHUNK, CHUNK // 2, -1), key=lambda length: -left % length))

    def chunk(carry: tuple[State, Generation]) -> tuple[State, Generation]:
        state, text = carry
        state = state._replace(cache=split_cache(state.cache, state.lengths - 1))
        state, drawn = decode(apply_fn, params, state, rows, length=length)
        return state._replace(cache=merge_cache(state.cache, state.lengths - 1)), written(text, state, drawn)

    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), chunk, (state, text))[1]


def uncached(apply_fn: ApplyFn, context: int) -> tuple[ApplyFn, Callable[[int, int], Any]]:
    """(apply_fn, init_cache) that compute every token by a full forward over the last `context` ones, at positions
    0.. and on: the "cache" holds those tokens.

    What learned positions need past the trained context, where every token moves to another position; and
    the plain version that cached decoding is held to.
    """

    def apply(params: Any, tokens: Array, positions: Array, cache: Array | None) -> tuple[Array, Array]:
        lengths = jnp.max(positions, axis=1) + 1
        if tokens.shape[1] > 1 or cache.shape[1] == 0:  # a prompt: its tail
            first = jnp.maximum(lengths - context, 0)
            padded = jnp.pad(tokens, ((0, 0), (0, context)))
            window = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (context,)))(padded, first)
        else:
            moved = jnp.where((lengths > context)[:, None], jnp.roll(cache, -1, axis=1), cache)
            window = jnp.where(jnp.arange(context) == jnp.minimum(lengths, context)[:, None] - 1, tokens, moved)
        at = jnp.minimum(lengths, context)[:, None] - 1
        # What lies after the last real token is never seen by it: attention is causal.
        at_0 = jnp.arange(context)
        logits, _ = apply_fn(params, window, jnp.where(at_0 <= at, at_0, -1), None)
        if logits.shape[1] == context:
            logits = jnp.take_along_axis(logits, at[..., None], axis=1)
        return logits, window

    return apply, lambda batch, length: jnp.zeros((batch, 0), jnp.int32)


def choose(
    logits: Array, state: State, in_text: Callable[[], tuple[Array, Array]], rows: Rows, top_logprobs: int
) -> tuple[State, Drawn]:
    """One new token of each row that is not done; `state.counts` are the caller's."""
    logits = logits.astype(jnp.float32)
    count = state.lengths - rows.starts
    allowed = penalized(logits, in_text, rows.sampling)
    size = logits.shape[1]
    stops = jnp.where(rows.stop_tokens < 0, size, rows.stop_tokens)  # out of range: dropped
    stops = jnp.zeros(size, bool).at[stops].set(True, mode="drop")
    allowed = jnp.where((count < rows.sampling.min_new_tokens)[:, None] & stops, -jnp.inf, allowed)
    token = sample_tokens(allowed, rows.keys, state.lengths, rows.sampling)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    likeliest, top_tokens = jax.lax.top_k(logits, top_logprobs)
    new = Drawn(
        tokens=token,
        logprobs=(jnp.take_along_axis(logits, token[:, None], axis=1) - total)[:, 0],
        top_tokens=top_tokens,
        top_logprobs=likeliest - total,
    )
    lengths = state.lengths + ~state.done
    done = state.done | jnp.isin(token, rows.stop_tokens) | (lengths >= rows.ends)
    return state._replace(last=jnp.where(state.done, state.last, token), lengths=lengths, done=done), new


def counted(counts: Int[Array, "B V"], tokens: Int[Array, "B T"], there: Bool[Array, "B T"]) -> Int[Array, "B V"]:
    """With each of the tokens that are there added."""
    row = jnp.arange(tokens.shape[0])[:, None]
    return counts.at[row, jnp.where(there, tokens, counts.shape[1])].add(1, mode="drop")
