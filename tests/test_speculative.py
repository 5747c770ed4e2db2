"""Guessing changes the time of a text, not the text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_decoding import VOCAB, continued, make, prompts_of, request

import llm_jax
from llm_jax import decoding, engine, generate, model, speculative
from llm_jax.errors import InputError
from llm_jax.language_model import LanguageModel
from llm_jax.tokenizers import char_tokenizer

SETTINGS = dict(
    temperature=[0.0, 1.0, 0.7],
    top_k=[VOCAB, VOCAB, 8],
    top_p=[1.0, 0.9, 1.0],
    presence_penalty=[0.0, 0.0, 0.5],
    min_new_tokens=[0, 3, 0],
)


def draft_of(params, noise):
    """The model itself, so that it guesses right, or less and less so."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + noise * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


# By looking up, or by the model itself with that much noise.
@pytest.mark.parametrize("noise, number", [(None, 4), (None, 15), (0.0, 4), (0.1, 1), (0.1, 7), (10.0, 4)])
def test_the_text_is_the_one_without_guesses(noise, number):
    """Greedy and sampled, with masks, penalties and stop tokens, ragged, past the window and a cache's length."""
    program, params = make(block_size=96)
    asked = dict(max_new_tokens=150, numbers=[0, 1, 2], stop_tokens=[3], **SETTINGS)
    plain, _ = continued(program, params, request(prompts_of(5, 40, 1), **asked))
    how = dict(guesses=engine.Guesses(number, None if noise is None else program))
    if noise is not None:
        how["draft_params"] = draft_of(params, noise)
    rows = [[], [], []]
    for new in decoding.run(engine.ModelEngine(program, params, **how), request(prompts_of(5, 40, 1), **asked)):
        for row, each in zip(rows, new, strict=True):
            row += each.tokens
    assert rows == plain


@pytest.mark.slow
@pytest.mark.parametrize("values", [dict(use_rope=False), dict(layer_types=("sliding", "full"), window=6)], ids=str)
def test_learned_positions_and_windows(values):
    """A rejected guess leaves nothing in a ring of a few slots; the last guesses may lie past the last position."""
    program, params = make(block_size=64, **values)
    asked = dict(max_new_tokens=59, numbers=[0, 1], temperature=[0.0, 1.0])
    plain, _ = continued(program, params, request(prompts_of(5, 3), **asked))
    for how in (
        dict(guesses=engine.Guesses(5)),
        dict(guesses=engine.Guesses(5, program), draft_params=draft_of(params, 0.1)),
    ):
        rows = [[], []]
        for new in decoding.run(engine.ModelEngine(program, params, **how), request(prompts_of(5, 3), **asked)):
            for row, each in zip(rows, new, strict=True):
                row += each.tokens
        assert rows == plain


def test_logprobs_are_those_without_guesses():
    program, params = make()
    prompt = prompts_of(5)
    asked = dict(max_new_tokens=30, top_logprobs=2)

    def details(**how):
        tokens, logprobs, tops = [], [], []
        for [new] in decoding.run(engine.ModelEngine(program, params, **how), request(prompt, **asked)):
            tokens, logprobs, tops = tokens + new.tokens, logprobs + new.logprobs, tops + new.top_logprobs
        return tokens, logprobs, [[*top] for top in tops]

    plain, guessed = details(), details(guesses=engine.Guesses(3))
    assert plain[0] == guessed[0] and plain[2] == guessed[2]
    np.testing.assert_allclose(plain[1], guessed[1], atol=1e-4)


def rounds_of(noise):
    """New tokens a row and round, of four rounds of four guesses."""
    program, params = make()
    apply_fn, init_cache = program.functions()
    prompt = np.array(prompts_of(12) * 8)
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    everywhere = lambda value, dtype: jnp.full(8, value, dtype)  # noqa: E731
    fields = dict(temperature=everywhere(1.0, jnp.float32), top_k=everywhere(VOCAB, jnp.int32), top_p=jnp.ones(8))
    rows = generate.Rows(
        keys,
        everywhere(12, jnp.int32),
        everywhere(500, jnp.int32),
        generate.SamplingConfig(**fields),
        jnp.full(1, -1),
    )
    state, _ = generate.prefill(apply_fn, params, jnp.asarray(prompt), rows, init_cache(8, 64))
    _, draft_cache = apply_fn(params, jnp.asarray(prompt), jnp.tile(jnp.arange(12), (8, 1)), init_cache(8, 64))
    propose = speculative.by_draft(apply_fn, draft_of(params, noise), rows, 4)
    every, _ = engine.Program(program.cfg, VOCAB, verifies=True).functions()
    run = jax.jit(functools.partial(speculative.speculate, every, params, propose=propose, rounds=4, guesses=4))
    after, _, _ = run(state=state, rows=rows, known=draft_cache)
    return np.asarray(after.lengths - state.lengths) / 4


@pytest.mark.parametrize("noise", [0.05, 10.0])
def test_the_distribution_is_the_models(noise):
    """Of the second new token, which is the first that a guess may be: chi-squared over 20,000 rows of one prompt."""
    program, params = make(n_layer=1)
    apply_fn, init_cache = program.functions()
    rows = generate.Rows(
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(20_000)),
        jnp.full(20_000, 4),
        jnp.full(20_000, 6),
        generate.SamplingConfig(jnp.full(20_000, 2.5), jnp.full(20_000, VOCAB), jnp.ones(20_000)),
        jnp.full(1, -1),
    )
    prompt = jnp.asarray(prompts_of(4))
    every, _ = engine.Program(program.cfg, VOCAB, verifies=True).functions()

    @jax.jit
    def second(params, draft_params):
        state, _ = generate.prefill(apply_fn, params, prompt, rows, init_cache(1, 16), num_samples=20_000)
        _, cache = apply_fn(draft_params, prompt, jnp.arange(4)[None], init_cache(1, 16))
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, 20_000, axis=0), cache)
        propose = speculative.by_draft(apply_fn, draft_params, rows, 2)
        return speculative.speculate(every, params, state, rows, propose, cache, rounds=1, guesses=2)[2].tokens[:, 0]

    counts = np.bincount(second(params, draft_of(params, noise)), minlength=VOCAB)
    texts = jnp.concatenate([jnp.tile(prompt, (VOCAB, 1)), jnp.arange(VOCAB)[:, None]], axis=1)
    logits = model.Transformer(program.cfg).apply({"params": params}, texts)[0]
    first, then = (np.asarray(jax.nn.softmax(x / 2.5), np.float64) for x in (logits[0, 3], logits[:, 4]))
    expected = 20_000 * first @ then
    often = expected >= 5
    seen = np.array([*counts[often], counts[~often].sum()])
    wanted = np.array([*expected[often], expected[~often].sum()])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 10
    assert ((seen - wanted) ** 2 / wanted).sum() < stats.chi2.ppf(0.999, len(wanted) - 1)


def test_right_guesses_are_kept():
    """All five a round of a draft that is the model itself, and hardly more than one of another."""
    assert (rounds_of(0.0) == 5).all()
    far, near = rounds_of(10.0).mean(), rounds_of(0.05).mean()
    assert 1 <= far < 2 and far < near <= 5


def test_looking_up_finds_what_followed_the_longest_end():
    #                 0  1  2  3  4  5  6  7  8  9 10 11 12
    text = jnp.array([[1, 2, 3, 9, 8, 2, 3, 7, 7, 1, 2, 3, 0], [5, 6, 5, 6, 5, 0, 0, 0, 0, 0, 0, 0, 0]])
    before = jnp.array([11, 4])
    state = generate.State(None, jnp.array([12, 5]), None, None, None, None)
    new = jnp.array([[3, 0, 0], [5, 0, 0]])
    text = text.at[0, 11].set(0).at[1, 4].set(0)  # the last token of each is in `new` alone
    guesses, known = speculative.by_lookup(4)(state, new, before, text)
    assert guesses[0].tolist() == [9, 8, 2, 3]  # after 1 2 3 at 0, not after 2 3 at 5
    assert guesses[1].tolist() == [6, 5, 5, 5]  # after 5 6 5 at 2; past the end its last token
    assert known[0, 11] == 3 and known[1, 4] == 5


def test_the_language_model_refuses_a_draft_that_cannot_serve(tiny_run):
    lm = llm_jax.load(tiny_run)
    request = dict(max_new_tokens=40, seed=3)
    plain = lm.generate("the ", **request)
    assert lm.generate("the ", **request, draft=lm) == lm.generate("the ", **request, draft="lookup") == plain
    assert "the " + "".join(lm.stream("the ", **request, draft="lookup", draft_tokens=9)) == plain
    samples = lm.generate_detailed("the ", num_samples=2, **request, draft=lm)
    assert [s.text for s in samples] == [s.text for s in lm.generate_detailed("the ", num_samples=2, **request)]
    stranger = LanguageModel(lm.config, lm.params, char_tokenizer("ab"))
    for draft, words in ((stranger, "tokenizer"), ("look", "'look'")):
        with pytest.raises(InputError, match=words):
            lm.generate("the ", draft=draft)
    with pytest.raises(InputError, match="draft_tokens"):
        lm.generate("the ", draft="lookup", draft_tokens=0)
