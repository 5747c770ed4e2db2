"""Our Transformer as an engine of `decoding.run`: what generating compiles."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from llm_jax import decoding, generate, model, sharding, speculative
from llm_jax.config import ModelConfig

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
    verifies: bool = False  # the logits of every token are asked for
    mesh: jax.sharding.Mesh | None = None  # of the one device that it is compiled for; None: the default one

    def functions(self) -> tuple[generate.ApplyFn, Any]:
        """(apply_fn, init_cache) of `generate`."""
        if self.slides:
            return generate.uncached(self._apply, self.cfg.block_size)
        dtype = None if self.cache_dtype is None else jnp.dtype(self.cache_dtype)
        return self._apply, functools.partial(model.init_cache, self.cfg, dtype=dtype)

    def _apply(self, params: model.Params, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        network = model.Transformer(self.cfg, self.mesh)
        hidden, output, cache = network.apply({"params": params}, tokens, positions, cache, method="hidden")
        if tokens.shape[1] > 1 and not self.verifies:  # a prompt: only what follows its last token is asked for
            hidden = jnp.take_along_axis(hidden, jnp.max(positions, axis=1)[:, None, None], axis=1)
        logits = model.output_logits(self.cfg, hidden, output)
        return jnp.where(jnp.arange(self.cfg.vocab_size) < self.num_ids, logits, -jnp.inf), cache


@dataclasses.dataclass(frozen=True)
class Guesses:
    """Of speculative decoding: how many a round, and by which model; None: by looking the text's end up in it."""

    number: int
    draft: Program | None = None


class ModelEngine:
    """Parameters laid out by decode_weights.py, with a program for what may be asked of them.

    Args:
        guesses: speculative decoding; with a draft its parameters too, laid out.
    """

    def __init__(
        self,
        program: Program,
        params: model.Params,
        *,
        guesses: Guesses | None = None,
        draft_params: model.Params | None = None,
    ) -> None:
        self._program, self._params = program, params
        self._guesses, self._draft_params = guesses, draft_params
        self.chunk = chunk_for(params)
        if guesses is not None:
            self._rounds = max(1, self.chunk // (guesses.number + 1))
            self.chunk = self._rounds * (guesses.number + 1)

    def prefill(
        self,
        tokens: Int[np.ndarray, "b T"],
        starts: Int[np.ndarray, "B"],
        ends: Int[np.ndarray, "B"],
        request: decoding.Request,
    ) -> tuple[Any, generate.State, generate.Drawn]:
        rows, state, drawn = _prefill(
            self._program,
            self._params,
            tokens,
            starts,
            ends,
            np.uint32(request.seed),
            np.array(request.numbers, np.uint32),
            request.sampling,
            decoding.padded(request.stop_tokens),
            num_samples=request.num_samples,
            top_logprobs=request.top_logprobs,
        )
        draft_cache = None
        if self._guesses is not None and self._guesses.draft is not None:
            shared = (self._draft_params, tokens, starts)
            draft_cache = _prefill_draft(self._guesses.draft, *shared, num_samples=request.num_samples)
        return (rows, draft_cache), state, drawn

    def grow(self, kept: Any, state: generate.State, slots: int) -> tuple[Any, generate.State]:
        rows, draft_cache = kept
        if draft_cache is not None:
            draft_cache = _grown(self._guesses.draft, draft_cache, len(state.last), slots)
        return (rows, draft_cache), state._replace(cache=_grown(self._program, state.cache, len(state.last), slots))

    def decode(
        self, kept: Any, state: generate.State, request: decoding.Request, text: Int[np.ndarray, "B S"]
    ) -> tuple[Any, generate.State, generate.Drawn]:
        rows, draft_cache = kept
        shared, top_logprobs = (state, rows, request.stopped), request.top_logprobs
        if self._guesses is None:
            state, drawn = _decode(self._program, self._params, *shared, length=self.chunk, top_logprobs=top_logprobs)
            return kept, state, drawn
        known = text if self._guesses.draft is None else draft_cache
        state, draft_cache, drawn = _speculate(
            self._program,
            self._guesses,
            self._params,
            self._draft_params,
            *shared,
            known,
            rounds=self._rounds,
            top_logprobs=top_logprobs,
        )
        return (rows, draft_cache), state, drawn


def chunk_for(params: model.Params) -> int:
    """Tokens of one call, with these parameters or their shapes."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return LARGE_CHUNK if size >= LARGE else CHUNK


def lower(
    program: Program, params: model.Params, *, batch: int, prompt_tokens: int, slots: int
) -> tuple[jax.stages.Lowered, jax.stages.Lowered, generate.State]:
    """(prefill, decode, what goes from call to call) as `ModelEngine` runs them, of shapes, for `program.mesh`.

    Args:
        params: shapes of parameters that are laid out.
        prompt_tokens, slots: of each row's prompt, and of its cache while it decodes.
    """
    there = functools.partial(_shapes_on, sharding.replicated(program.mesh))
    ints, floats = jax.ShapeDtypeStruct((batch,), np.int32), jax.ShapeDtypeStruct((batch,), np.float32)
    sampling = generate.SamplingConfig(
        **dict.fromkeys(("top_k", "min_new_tokens"), ints),
        **dict.fromkeys(("temperature", "top_p", "min_p"), floats),
        **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), floats),
        logit_bias=jax.ShapeDtypeStruct((batch, program.cfg.vocab_size), np.float32),
    )
    tokens = jax.ShapeDtypeStruct((batch, prompt_tokens), np.int32)
    seed, numbers = jax.ShapeDtypeStruct((), np.uint32), jax.ShapeDtypeStruct((batch,), np.uint32)
    stop_tokens = jax.ShapeDtypeStruct((8,), np.int32)
    params, *arguments = there((params, tokens, ints, ints, seed, numbers, sampling, stop_tokens))
    each = dict(num_samples=1, top_logprobs=0)
    rows, state, _ = jax.eval_shape(functools.partial(_prefill, program, **each), params, *arguments)
    grown = jax.eval_shape(lambda cache: _grown(program, cache, batch, slots, pad=jnp.pad), state.cache)
    rows, state = there((rows, state._replace(cache=grown)))
    stopped = there(jax.ShapeDtypeStruct((batch,), np.bool_))
    decode = dict(length=chunk_for(params), top_logprobs=0)
    return (
        _prefill.lower(program, params, *arguments, **each),
        _decode.lower(program, params, state, rows, stopped, **decode),
        state,
    )


def _shapes_on(place: jax.sharding.Sharding, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


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


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_samples")
def _prefill_draft(
    program: Program, params: model.Params, tokens: Int[Array, "b T"], lengths: Int[Array, "B"], *, num_samples: int
) -> model.Cache:
    apply_fn, init_cache = program.functions()
    positions = jnp.arange(tokens.shape[1])
    positions = jnp.where(positions < lengths[::num_samples, None], positions, -1)
    _, cache = apply_fn(params, tokens, positions, init_cache(*tokens.shape))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_samples, axis=0), cache)


@functools.partial(
    jax.jit, static_argnums=(0, 1), static_argnames=("rounds", "top_logprobs"), donate_argnames=("state",)
)
def _speculate(
    program: Program,
    guesses: Guesses,
    params: model.Params,
    draft_params: model.Params | None,
    state: generate.State,
    rows: generate.Rows,
    stopped: Bool[Array, "B"],
    known: Any,
    *,
    rounds: int,
    top_logprobs: int,
) -> tuple[generate.State, Any, generate.Drawn]:
    slots = rounds * (guesses.number + 1)

    def split(cache: model.Cache) -> model.Cache:
        return model.split_cache(cache, state.lengths - 1, slots=slots)

    if guesses.draft is None:
        propose = speculative.by_lookup(guesses.number)
    else:
        draft_fn, _ = guesses.draft.functions()
        propose = speculative.by_draft(draft_fn, draft_params, rows, guesses.number)
        known = split(known)
    apply_fn, _ = dataclasses.replace(program, verifies=True).functions()
    state = state._replace(done=state.done | stopped, cache=split(state.cache))
    how = dict(rounds=rounds, guesses=guesses.number, top_logprobs=top_logprobs)
    state, known, drawn = speculative.speculate(apply_fn, params, state, rows, propose, known, **how)
    known = None if guesses.draft is None else model.merge_cache(known, state.lengths - 1)
    return state._replace(cache=model.merge_cache(state.cache, state.lengths - 1)), known, drawn


def _grown(program: Program, cache: Any, batch: int, slots: int, pad: Callable[..., Array] = decoding.pad) -> Any:
    """The cache with that many slots a layer, or its window."""
    if program.slides:
        return cache
    _, init_cache = program.functions()
    return model.grow_cache(cache, init_cache(batch, slots), pad=pad)
