"""A model's compiled prefill and decoding, and the loop on the host that calls them.

Lengths come in buckets, so that a new one rarely compiles: prefill has a program for each prompt length rounded up to
a power of two, decoding one for each such length of the cache. What a request sets is in arrays, compiling nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from llm_jax import generate, model
from llm_jax.config import ModelConfig

SMALLEST_PROMPT = 16
SMALLEST_CACHE = 128
# New tokens that a cache has room for at first: a longer one would cost each token of a text that ends early, and
# each time it grows a program is compiled.
ROOM = 256
# Tokens of one call. Between calls the host looks at the text; a large model's are worth looking at sooner.
CHUNK, LARGE_CHUNK = generate.CHUNK, 8
LARGE = 2**26  # bytes of parameters


@dataclasses.dataclass(frozen=True)
class Program:
    """What compiled programs differ by, besides shapes."""

    cfg: ModelConfig
    num_ids: int  # ids from there on only pad the vocabulary: they stand for no text
    cache_dtype: str | None = None  # None: the compute dtype
    slides: bool = False  # learned positions, past the last of them: every token moves at every step

    def functions(self) -> tuple[generate.ApplyFn, Any]:
        """(apply_fn, init_cache) of `generate`."""
        if self.slides:
            return generate.uncached(self._apply, self.cfg.block_size)
        dtype = None if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return self._apply, functools.partial(model.init_cache, self.cfg, dtype=dtype)

    def _apply(self, params: model.Params, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        network = model.Transformer(self.cfg)
        hidden, output, cache = network.apply({"params": params}, tokens, positions, cache, method="hidden")
        if tokens.shape[1] > 1:  # a prompt: only what follows its last token is asked for
            hidden = jnp.take_along_axis(hidden, jnp.max(positions, axis=1)[:, None, None], axis=1)
        logits = model.output_logits(self.cfg, hidden, output)
        return jnp.where(jnp.arange(self.cfg.vocab_size) < self.num_ids, logits, -jnp.inf), cache


class NewTokens(NamedTuple):
    """What one call added to a row."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]  # of each token, {likely token: its log-probability}


@dataclasses.dataclass
class Request:
    """Prompts to continue, and how."""

    prompts: Sequence[Sequence[int]]
    numbers: Sequence[int]  # tell the keys of equal prompts apart
    sampling: generate.SamplingConfig  # of num_samples rows for each prompt
    seed: int
    max_new_tokens: int
    stop_tokens: Sequence[int]
    num_samples: int = 1
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        # The host may end a row by setting it: at the next call.
        self.stopped = np.zeros(len(self.prompts) * self.num_samples, bool)


def run(program: Program, params: model.Params, request: Request) -> Iterator[list[NewTokens]]:
    """What each call adds to every row: at first one token, then some at a time, until all rows are done."""
    starts = np.array([len(prompt) for prompt in request.prompts], np.int32)
    tokens = np.zeros((len(starts), bucket(int(starts.max()))), np.int32)
    for row, prompt in zip(tokens, request.prompts, strict=True):
        row[: len(prompt)] = prompt
    starts = np.repeat(starts, request.num_samples)
    ends = starts + np.int32(request.max_new_tokens)
    static = dict(top_logprobs=request.top_logprobs)
    rows, state, drawn = _prefill(
        program,
        params,
        tokens,
        starts,
        ends,
        np.uint32(request.seed),
        np.array(request.numbers, np.uint32),
        request.sampling,
        _padded(request.stop_tokens),
        num_samples=request.num_samples,
        **static,
    )
    chunk = CHUNK if sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < LARGE else LARGE_CHUNK
    length = starts
    slots = tokens.shape[1]
    while True:
        lengths, done = np.asarray(state.lengths), np.asarray(state.done)
        yield _by_row(drawn, lengths - length)
        length = lengths
        done = done | request.stopped
        if done.all():
            return
        needed = int(np.minimum(length + chunk, ends)[~done].max())
        if slots < max(needed, SMALLEST_CACHE):
            room = int(np.minimum(length + ROOM, ends)[~done].max())
            slots = bucket(max(needed, room), SMALLEST_CACHE)
            state = state._replace(cache=_grown(program, state.cache, len(ends), slots))
        state, drawn = _decode(program, params, state, rows, request.stopped, length=chunk, **static)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_samples", "top_logprobs"))
def _prefill(
    program: Program,
    params: model.Params,
    tokens: Int[Array, "b T"],
    starts: Int[Array, "B"],
    ends: Int[Array, "B"],
    seed: UInt32[Array, ""],
    numbers: UInt32[Array, "B"],
    sampling: generate.SamplingConfig,
    stop_tokens: Int[Array, "n"],
    *,
    num_samples: int,
    top_logprobs: int,
) -> tuple[generate.Rows, generate.State, generate.Drawn]:
    apply_fn, init_cache = program.functions()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    rows = generate.Rows(keys, starts, ends, sampling, stop_tokens)
    state, drawn = generate.prefill(
        apply_fn,
        params,
        tokens,
        rows,
        init_cache(*tokens.shape),
        num_samples=num_samples,
        top_logprobs=top_logprobs,
    )
    return rows, state, drawn


@functools.partial(jax.jit, static_argnums=0, static_argnames=("length", "top_logprobs"), donate_argnames="state")
def _decode(
    program: Program,
    params: model.Params,
    state: generate.State,
    rows: generate.Rows,
    stopped: Bool[Array, "B"],
    *,
    length: int,
    top_logprobs: int,
) -> tuple[generate.State, generate.Drawn]:
    apply_fn, _ = program.functions()
    state = state._replace(done=state.done | stopped)
    if not program.slides:
        state = state._replace(cache=model.split_cache(state.cache, state.lengths - 1, slots=length))
    state, drawn = generate.decode(apply_fn, params, state, rows, length=length, top_logprobs=top_logprobs)
    if not program.slides:
        state = state._replace(cache=model.merge_cache(state.cache, state.lengths - 1))
    return state, drawn


def _grown(program: Program, cache: Any, batch: int, slots: int) -> Any:
    """The cache with that many slots a layer, or its window."""
    if program.slides:
        return cache
    _, init_cache = program.functions()
    return model.grow_cache(cache, init_cache(batch, slots), pad=_pad)


def _pad(leaf: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """On a CPU by numpy: nothing is compiled for a pair of lengths."""
    if leaf.devices().pop().platform == "cpu":
        # Where it was, and no more tied to that device than it was: either would compile its program anew.
        return jax.device_put(np.pad(np.asarray(leaf), padding), leaf.sharding if leaf.committed else None)
    return jnp.pad(leaf, padding)


def bucket(length: int, smallest: int = SMALLEST_PROMPT) -> int:
    """The power of two that a length is rounded up to."""
    return max(smallest, 1 << (length - 1).bit_length())


def _padded(stop_tokens: Sequence[int]) -> Int[np.ndarray, "n"]:
    """As many as a power of two: another number of them rarely compiles."""
    padded = np.full(bucket(max(1, len(stop_tokens)), 8), -1, np.int32)
    padded[: len(stop_tokens)] = stop_tokens
    return padded


def _by_row(drawn: generate.Drawn, counts: Int[np.ndarray, "B"]) -> list[NewTokens]:
    tokens, logprobs, top_tokens, top_logprobs = (np.asarray(field) for field in drawn)
    return [
        NewTokens(
            tokens[row, :count].tolist(),
            logprobs[row, :count].tolist(),
            [
                dict(zip(*each, strict=True))
                for each in zip(top_tokens[row, :count].tolist(), top_logprobs[row, :count].tolist(), strict=True)
            ],
        )
        for row, count in enumerate(counts)
    ]
