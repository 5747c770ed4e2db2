"""The loop on the host that continues prompts: whoever computes, an engine, is called for some tokens at a time.

Lengths come in buckets, so that a new one rarely compiles: an engine has a program for each prompt length rounded up
to a power of two, and one for each such length of its cache. What a request sets is in arrays, compiling nothing.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llm_jax import generate

SMALLEST_PROMPT = 16
SMALLEST_CACHE = 128
# New tokens that a cache has room for at first: a longer one would cost each token of a text that ends early, and
# each time it grows a program is compiled.
ROOM = 256


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


@runtime_checkable
class Engine(Protocol):
    """A model, ready to continue texts. `kept` is what it keeps of a request from call to call."""

    chunk: int  # the most tokens that `decode` adds to a row

    def prefill(
        self,
        tokens: Int[np.ndarray, "b T"],
        starts: Int[np.ndarray, "B"],
        ends: Int[np.ndarray, "B"],
        request: Request,
    ) -> tuple[Any, generate.State, generate.Drawn]:
        """The first new token of each row, of right-padded prompts; `num_samples` rows for each."""

    def grow(self, kept: Any, state: generate.State, slots: int) -> tuple[Any, generate.State]:
        """With a cache for `slots` tokens a row."""

    def decode(
        self, kept: Any, state: generate.State, request: Request, text: Int[np.ndarray, "B S"]
    ) -> tuple[Any, generate.State, generate.Drawn]:
        """More tokens of each row that is neither done nor in `request.stopped`; `text` has all of them so far."""


def run(engine: Engine, request: Request) -> Iterator[list[NewTokens]]:
    """What each call adds to every row: at first one token, then some at a time, until all rows are done."""
    lengths = np.array([len(prompt) for prompt in request.prompts], np.int32)
    tokens = np.zeros((len(lengths), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, request.prompts, strict=True):
        row[: len(prompt)] = prompt
    text = np.repeat(tokens, request.num_samples, axis=0)
    lengths = np.repeat(lengths, request.num_samples)
    ends = lengths + np.int32(request.max_new_tokens)
    kept, state, drawn = engine.prefill(tokens, lengths, ends, request)
    slots = tokens.shape[1]
    while True:
        before, lengths = lengths, np.asarray(state.lengths)
        new = _by_row(drawn, lengths - before)
        yield new
        done = np.asarray(state.done) | request.stopped
        if done.all():
            return
        needed, room = (int(np.minimum(lengths + more, ends)[~done].max()) for more in (engine.chunk, ROOM))
        if slots < max(needed, SMALLEST_CACHE):
            slots = bucket(max(needed, room), SMALLEST_CACHE)
            kept, state = engine.grow(kept, state, slots)
            text = np.pad(text, ((0, 0), (0, slots - text.shape[1])))
        for row, each, start in zip(text, new, before, strict=True):
            row[start : start + len(each.tokens)] = each.tokens
        kept, state, drawn = engine.decode(kept, state, request, text)


def pad(leaf: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """On a CPU by numpy: nothing is compiled for a pair of lengths."""
    if leaf.devices().pop().platform == "cpu":
        # Where it was, and no more tied to that device than it was: either would compile its program anew.
        return jax.device_put(np.pad(np.asarray(leaf), padding), leaf.sharding if leaf.committed else None)
    return jnp.pad(leaf, padding)


def bucket(length: int, smallest: int = SMALLEST_PROMPT) -> int:
    """The power of two that a length is rounded up to."""
    return max(smallest, 1 << (length - 1).bit_length())


def padded(stop_tokens: Sequence[int]) -> Int[np.ndarray, "n"]:
    """As many as a power of two: another number of them rarely compiles."""
    out = np.full(bucket(max(1, len(stop_tokens)), 8), -1, np.int32)
    out[: len(stop_tokens)] = stop_tokens
    return out


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
