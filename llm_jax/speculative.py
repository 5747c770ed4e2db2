"""Several tokens for one reading of the weights: guesses, and the model's own choice of each, as pure functions.

A guess is kept where it is the token that the model draws there by itself, with the row's own key and position. So
the text is the one that `generate.decode` makes, whoever guesses: greedy or sampled, with penalties and masks. A
draft model draws by the same keys, and guesses right the more often the nearer its probabilities are.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", have another rule, which keeps
more guesses of a draft model when sampling, but whose text depends on them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from llm_jax.generate import ApplyFn, Drawn, Rows, State, choose, counted

# (state of all rows, their new tokens in this call, their lengths before it, what it knew)
# -> (guesses [B, G], what it knows)
Propose = Callable[[State, Int[Array, "B C"], Int[Array, "B"], Any], tuple[Int[Array, "B G"], Any]]


MOVING = ("last", "lengths", "done")  # of State: what a row that stands keeps
NGRAM = 3  # tokens of a text's end that looking up wants to find before it, or fewer


class _Text(NamedTuple):
    """Rows as they grow in one call."""

    state: State  # without in_prompt and counts
    new: Int[Array, "B C"]


def speculate(
    apply_fn: ApplyFn,
    params: Any,
    state: State,
    rows: Rows,
    propose: Propose,
    known: Any,
    *,
    rounds: int,
    guesses: int,
    top_logprobs: int = 0,
) -> tuple[State, Any, Drawn]:
    """`rounds` times 1 to `guesses` + 1 more tokens of each row that is not done; as `generate.decode` gives them.

    Args:
        apply_fn: must return the logits of every token that it is given.
        propose: what guesses, and may itself change `known`.
    """
    before, batch = state.lengths, len(state.lengths)
    width = rounds * (guesses + 1)

    def in_text(text: _Text) -> Callable[[], tuple[Array, Array]]:
        there = jnp.arange(width) < (text.state.lengths - before)[:, None]
        return lambda: (state.in_prompt, counted(state.counts, text.new, there))

    def drawn_by(logits: Array, text: _Text, stands: Array) -> tuple[_Text, Drawn]:
        """One more token of each row that is neither done nor stands."""
        now, new = choose(logits, text.state, in_text(text), rows, top_logprobs)
        moves = ~(stands | text.state.done)
        keep = lambda new, old: jnp.where(moves, new, old)  # noqa: E731
        now = now._replace(**{name: keep(getattr(now, name), getattr(text.state, name)) for name in MOVING})
        column = jnp.where(moves, text.state.lengths - before, width)  # out of range: dropped
        return _Text(now, text.new.at[jnp.arange(batch), column].set(new.tokens, mode="drop")), new

    def one_round(carry: tuple[_Text, Any, Drawn], _: None) -> tuple[tuple[_Text, Any, Drawn], None]:
        text, known, drawn = carry
        whole = text.state._replace(in_prompt=state.in_prompt, counts=state.counts)
        guessed, known = propose(whole, text.new, before, known)
        tokens = jnp.concatenate([text.state.last[:, None], guessed], axis=1)
        positions = (text.state.lengths - 1)[:, None] + jnp.arange(guesses + 1)
        logits, cache = apply_fn(params, tokens, positions, text.state.cache)
        text = text._replace(state=text.state._replace(cache=None))

        def check(carry: tuple[_Text, Array, Drawn], xs: tuple[Array, Array]) -> tuple[Any, None]:
            (text, stands, drawn), (logits, guess) = carry, xs
            column = jnp.where(stands | text.state.done, width, text.state.lengths - before)
            text, new = drawn_by(logits, text, stands)
            put = lambda all_, one: all_.at[jnp.arange(batch), column].set(one, mode="drop")
            drawn = jax.tree.map(put, drawn, new)
            return (text, stands | (new.tokens != guess), drawn), None

        guessed = jnp.pad(guessed, ((0, 0), (0, 1)), constant_values=-1)  # after the last there is none
        xs = (logits.swapaxes(0, 1), guessed.T)
        (text, _, drawn), _ = jax.lax.scan(check, (text, jnp.zeros(batch, bool), drawn), xs)
        return (text._replace(state=text.state._replace(cache=cache)), known, drawn), None

    text = _Text(state._replace(in_prompt=None, counts=None), jnp.zeros((batch, width), jnp.int32))
    drawn = Drawn(
        tokens=text.new,
        logprobs=jnp.zeros((batch, width)),
        top_tokens=jnp.zeros((batch, width, top_logprobs), jnp.int32),
        top_logprobs=jnp.zeros((batch, width, top_logprobs)),
    )
    (text, known, drawn), _ = jax.lax.scan(one_round, (text, known, drawn), length=rounds)
    _, counts = in_text(text)()
    return text.state._replace(in_prompt=state.in_prompt, counts=counts), known, drawn


def by_lookup(guesses: int) -> Propose:
    """Guesses what followed the last time that the text's end was there: Saxena 2023, "Prompt Lookup Decoding".

    The latest place counts, of the longest end of at most NGRAM tokens that is found. It knows the text [B, L].
    """

    def propose(state: State, new: Array, before: Array, text: Array) -> tuple[Array, Any]:
        row, column = jnp.arange(len(text))[:, None], jnp.arange(new.shape[1])
        at = jnp.where(column < (state.lengths - before)[:, None], before[:, None] + column, text.shape[1])
        text = text.at[row, at].set(new, mode="drop")
        end = state.lengths - 1
        # same[n]: whether the n + 1 tokens up to each place are those up to the end.
        same = jnp.ones(text.shape, bool)
        score = jnp.zeros(text.shape, jnp.int32)
        for back in range(NGRAM):
            token = jnp.take_along_axis(text, jnp.maximum(end - back, 0)[:, None], axis=1)
            shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, : text.shape[1]]
            same &= (shifted == token) & (end >= back)[:, None]
            score += same
        places = jnp.arange(text.shape[1])
        score = jnp.where(places < end[:, None], score * text.shape[1] + places, 0)
        place = jnp.argmax(score, axis=1)
        follow = place[:, None] + 1 + jnp.arange(guesses)
        return jnp.take_along_axis(text, jnp.minimum(follow, end[:, None]), axis=1), text

    return propose


def by_draft(apply_fn: ApplyFn, params: Any, rows: Rows, guesses: int) -> Propose:
    """Guesses what a smaller model of the same tokens draws, with the same keys and settings. It knows its cache."""

    def propose(state: State, new: Array, before: Array, cache: Any) -> tuple[Array, Any]:
        width = new.shape[1] + guesses + 1

        def step(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], Array]:
            now, new = carry

            def in_text() -> tuple[Array, Array]:
                there = jnp.arange(width) < (now.lengths - before)[:, None]
                return state.in_prompt, counted(state.counts, new, there)

            logits, cache = apply_fn(params, now.last[:, None], (now.lengths - 1)[:, None], now.cache)
            column = jnp.where(now.done, width, now.lengths - before)
            now, drawn = choose(logits[:, 0], now._replace(cache=cache), in_text, rows, 0)
            new = new.at[jnp.arange(len(new)), column].set(drawn.tokens, mode="drop")
            return (now, new), drawn.tokens

        moving = state._replace(in_prompt=None, counts=None, cache=cache)
        padded = jnp.pad(new, ((0, 0), (0, guesses + 1)))
        # One step more than there are guesses: if all are right, the cache must hold the last of them too.
        (now, _), tokens = jax.lax.scan(step, (moving, padded), length=guesses + 1)
        return tokens[:guesses].T, now.cache

    return propose
