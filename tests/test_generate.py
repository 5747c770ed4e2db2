"""Cached decoding against forwards without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from llm_jax import generate, model
from llm_jax.config_rules import freeze
from llm_jax.generate import SamplingConfig

COMBINATIONS = [(r, n) for r in (True, False) for n in (True, False)]
VOCAB = 17


def make(**values):
    shape = dict(n_embd=16, n_head=4, n_kv_head=2, n_layer=2, block_size=24, vocab_size=VOCAB)
    return freeze({"model": shape | values}).model


def apply_fn(cfg):
    network = model.Transformer(cfg)
    return lambda params, tokens, positions, cache: network.apply({"params": params}, tokens, positions, cache)


def sampling(*rows) -> SamplingConfig:
    """One (temperature, top_k, top_p) a row."""
    temperature, top_k, top_p = zip(*rows, strict=True)
    return SamplingConfig(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


GREEDY, SAMPLED, MASKED = (0.0, VOCAB, 1.0), (1.0, VOCAB, 1.0), (1.3, 6, 0.9)
KEYS = jax.vmap(jax.random.key)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "stop_tokens", "pad_token"))
def cached(cfg, params, tokens, lengths, keys, how, **request):
    init_cache = functools.partial(model.init_cache, cfg)
    return generate.generate(apply_fn(cfg), params, tokens, lengths, keys, how, init_cache=init_cache, **request)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "stop_tokens", "pad_token"))
def two_level(cfg, params, tokens, lengths, keys, how, **request):
    """`cached`, with the latest tokens apart from the ring."""
    caches = dict(
        init_cache=functools.partial(model.init_cache, cfg),
        split_cache=functools.partial(model.split_cache, slots=generate.CHUNK),
        merge_cache=model.merge_cache,
    )
    return generate.generate(apply_fn(cfg), params, tokens, lengths, keys, how, **caches, **request)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "context", "stop_tokens"))
def uncached(cfg, params, tokens, lengths, keys, how, *, context, **request):
    apply, init_cache = generate.uncached(apply_fn(cfg), context)
    return generate.generate(apply, params, tokens, lengths, keys, how, init_cache=init_cache, **request)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens):
    return model.Transformer(cfg).apply({"params": params}, tokens)[0]


def prompt(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, length)), jnp.int32)


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)  # logits reach 30: float32 sums in another order


# -- The cache changes nothing


@pytest.mark.parametrize("use_rope, use_rmsnorm", COMBINATIONS)
def test_cached_decoding_equals_a_full_forward_for_every_token(use_rope, use_rmsnorm):
    cfg = make(use_rope=use_rope, use_rmsnorm=use_rmsnorm)
    params, lengths = random_params(cfg), jnp.array([4, 1, 6, 3])
    inputs = (params, prompt(4, 6), lengths, KEYS(jnp.arange(4)), sampling(GREEDY, SAMPLED, MASKED, GREEDY))
    fast = cached(cfg, *inputs, max_new_tokens=16)
    assert_same(fast, uncached(cfg, *inputs, max_new_tokens=16, context=24))
    assert_same(fast, two_level(cfg, *inputs, max_new_tokens=16))
    assert fast.tokens.shape == (4, 22) and fast.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(fast.lengths, lengths + 16)
    # Not by our sampling code: the greedy row by argmax of one forward over what came out.
    row = np.asarray(fast.tokens[0])
    logits = forward(cfg, params, jnp.asarray(row[None]))[0]
    np.testing.assert_array_equal(np.argmax(logits[3:19], -1), row[4:20])
    assert len({*row[4:20].tolist()}) > 1


@pytest.mark.parametrize(
    "values",
    [
        dict(layer_types=("sliding", "full"), window=3),
        dict(use_bias=True, qk_norm=True, tie_embeddings=False, attn_softcap=2.0, final_softcap=9.0),
        dict(n_kv_head=1, rope_scaling="yarn", rope_factor=2.0),
        dict(layer_types=("sliding", "full"), window=3, rope_local_theta=9.0, rope_layers=(True, True, False)),
        dict(norm_placement="both", parallel_residual=True, embed_scale=3.0, rope_dim=2, attn_scale=0.4),
        dict(norm_placement="post", qk_norm=True, qk_norm_axes="width", qkv_bias=True, norm_weight_offset=1.0),
    ],
    ids=lambda values: ",".join(values),
)
def test_cached_decoding_knows_windows_caps_and_scaling(values):
    cfg = make(**values)
    inputs = (random_params(cfg), prompt(2, 7), jnp.array([7, 2]), KEYS(jnp.arange(2)), sampling(GREEDY, SAMPLED))
    expected = uncached(cfg, *inputs, max_new_tokens=12, context=24)
    assert_same(cached(cfg, *inputs, max_new_tokens=12), expected)
    assert_same(two_level(cfg, *inputs, max_new_tokens=12), expected)


def test_logprobs_are_the_unmodified_models():
    cfg = make()
    params, lengths = random_params(cfg), jnp.full(4, 6)
    how = sampling(MASKED, GREEDY, SAMPLED, MASKED)
    out = cached(cfg, params, prompt(4, 6), lengths, KEYS(jnp.arange(4)), how, max_new_tokens=16)
    logprobs = jax.nn.log_softmax(forward(cfg, params, out.tokens))[:, 5:21]
    expected = np.take_along_axis(np.asarray(logprobs), np.asarray(out.tokens)[:, 6:, None], axis=2)[..., 0]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("values", [dict(), dict(layer_types=("sliding", "full"), window=3)], ids=["full", "windows"])
def test_past_block_size_rope_continues_as_a_forward_over_the_whole_text_in_a_window(values):
    short = make(block_size=8, **values)
    # The same written as windows, in a model that is long enough: every full layer sees 8.
    both = make(block_size=64, layer_types=("sliding",), window=8)
    params = random_params(short)
    inputs = (params, prompt(3, 12), jnp.array([2, 7, 12]), KEYS(jnp.arange(3)), sampling(SAMPLED, GREEDY, MASKED))
    fast = cached(short, *inputs, max_new_tokens=20)
    assert_same(fast, uncached(short, *inputs, max_new_tokens=20, context=32))
    assert_same(fast, two_level(short, *inputs, max_new_tokens=20))
    if not values:
        assert_same(fast, uncached(both, *inputs, max_new_tokens=20, context=32))


def test_learned_positions_slide_as_nanogpts():
    """nanoGPT's generate: the last block_size tokens, at positions from 0, for every token."""
    cfg = make(use_rope=False, use_rmsnorm=False, block_size=8)
    params = random_params(cfg)
    out = uncached(
        cfg, params, prompt(2, 10), jnp.array([10, 3]), KEYS(jnp.arange(2)), sampling(GREEDY, GREEDY),
        max_new_tokens=12, context=8,
    )  # fmt: skip
    for row, length in ((0, 10), (1, 3)):
        text = np.asarray(prompt(2, 10))[row, :length].tolist()
        for _ in range(12):
            seen = np.zeros((1, 8), np.int32)
            tail = text[-8:]
            seen[0, : len(tail)] = tail
            text.append(int(np.argmax(forward(cfg, params, jnp.asarray(seen))[0, len(tail) - 1])))
        assert np.asarray(out.tokens)[row, : length + 12].tolist() == text


# -- Rows know nothing of each other


def test_a_row_of_a_ragged_batch_equals_the_row_alone():
    cfg = make()
    params, tokens, lengths, keys = random_params(cfg), prompt(4, 6), [1, 4, 6, 3], KEYS(jnp.arange(4))
    how = [GREEDY, SAMPLED, MASKED, SAMPLED]
    together = cached(cfg, params, tokens, jnp.array(lengths), keys, sampling(*how), max_new_tokens=16)
    for i, n in enumerate(lengths):
        row = slice(i, i + 1)
        alone = cached(cfg, params, tokens[row], jnp.array([n]), keys[row], sampling(how[i]), max_new_tokens=16)
        assert alone.tokens[0].tolist() == together.tokens[i].tolist()
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-4)
    unpadded = cached(cfg, params, tokens[3:, :3], jnp.array([3]), keys[3:], sampling(SAMPLED), max_new_tokens=16)
    assert unpadded.tokens[0].tolist() == together.tokens[3, :19].tolist()


def test_what_lies_in_the_padding_is_ignored():
    cfg = make()
    tokens, lengths = prompt(4, 6), jnp.array([3, 5, 1, 6])
    garbage = jnp.where(jnp.arange(6) < lengths[:, None], tokens, (tokens + 7) % VOCAB)
    how = sampling(GREEDY, SAMPLED, MASKED, GREEDY)
    clean, dirty = (
        cached(cfg, random_params(cfg), t, lengths, KEYS(jnp.arange(4)), how, max_new_tokens=16)
        for t in (tokens, garbage)
    )
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert (np.asarray(clean.tokens)[0, 19:] == 0).all()


def test_the_draw_depends_on_the_rows_key_and_position_alone():
    logits = jnp.tile(jax.random.normal(jax.random.key(0), (1, 50)), (6, 1))
    keys = KEYS(jnp.array([5, 1, 5, 5, 5, 2]))
    how = SamplingConfig(jnp.ones(6), jnp.full(6, 50), jnp.ones(6))

    def draws(at):
        positions = jnp.array([at, at, at + 1, at, at, at])
        return np.asarray(generate.sample_tokens(logits, keys, positions, how))

    rows = np.stack([draws(at) for at in range(20)])
    assert (rows[:, 0] == rows[:, 3]).all() and (rows[:, 0] == rows[:, 4]).all()
    assert (rows[1:, 0] == rows[:-1, 2]).all()  # the next position's draw
    assert (rows[:, 0] != rows[:, 1]).sum() > 10 and (rows[1:, 0] != rows[:-1, 0]).sum() > 10


# -- From logits to a token


@pytest.mark.parametrize("top_p", [0.735, 0.78])
def test_frequencies_are_the_probabilities_after_temperature_then_top_k_then_top_p(top_p):
    """Temperature 2 and four tokens make cumulative 0.34, 0.63, 0.83, 1: three are kept. With temperature last it
    would be 0.42, 0.737: two for the first top_p; with top-k last 0.30, 0.56, 0.74: four for the second."""
    probs, n = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), 5000
    how = SamplingConfig(jnp.full(n, 2.0), jnp.full(n, 4), jnp.full(n, top_p))
    logits = jnp.tile(jnp.log(jnp.float32(probs))[None], (n, 1))
    tokens = generate.sample_tokens(logits, KEYS(jnp.zeros(n, jnp.int32)), jnp.arange(n), how)
    warped = np.sqrt(probs[:3])
    expected = [*warped / warped.sum(), 0, 0]
    # Three deviations of a frequency near 0.4 from 5,000 draws are 0.02.
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / n, expected, atol=0.021)


def test_temperature_zero_is_argmax_whatever_the_masks():
    logits = jax.random.normal(jax.random.key(1), (8, 30)) * 5
    how = SamplingConfig(jnp.zeros(8), jnp.full(8, 3), jnp.full(8, 0.1))
    tokens = generate.sample_tokens(logits, KEYS(jnp.arange(8)), jnp.arange(8), how)
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1.2e-38, 2e-38, 1e-38])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = jax.random.normal(jax.random.key(1), (8, 30)) * 5
    how = SamplingConfig(jnp.full(8, temperature), jnp.full(8, 30), jnp.ones(8))
    tokens = generate.sample_tokens(logits, KEYS(jnp.arange(8)), jnp.arange(8), how)
    np.testing.assert_array_equal(tokens, np.argmax(logits, -1))


# -- What the text holds already

PENALTIES = [(1.0, 0.0, 0.0), (1.4, 0.0, 0.0), (0.7, 0.0, 0.0), (1.0, 3.0, 0.0), (1.0, 0.0, 1.5), (1.2, 2.0, -0.5)]


def test_penalties_and_bias_by_row_as_written_out():
    """Greedy, by a loop over forwards of the whole text, in numpy."""
    cfg, n = make(), len(PENALTIES)
    params, tokens, lengths = random_params(cfg), prompt(n, 6), np.array([6, 5, 6, 3, 6, 4])
    bias = np.random.default_rng(1).normal(0, 2, (n, VOCAB)).astype(np.float32)
    how = sampling(*[GREEDY] * n)._replace(
        **dict(
            zip(
                ("repetition_penalty", "presence_penalty", "frequency_penalty"),
                map(jnp.float32, zip(*PENALTIES, strict=True)),
                strict=True,
            )
        ),
        logit_bias=jnp.asarray(bias),
    )
    out = cached(cfg, params, tokens, jnp.asarray(lengths), KEYS(jnp.arange(n)), how, max_new_tokens=16)
    for row, (repetition, presence, frequency) in enumerate(PENALTIES):
        text = np.asarray(tokens)[row, : lengths[row]].tolist()
        for _ in range(16):
            padded = jnp.asarray([[*text, *[0] * (22 - len(text))]])
            logits = np.asarray(forward(cfg, params, padded))[0, len(text) - 1] + bias[row]
            for token in set(text):
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
                new = text[lengths[row] :].count(token)
                logits[token] -= presence * (new > 0) + frequency * new
            text.append(int(np.argmax(logits)))
        assert np.asarray(out.tokens)[row, : len(text)].tolist() == text
    without = how._replace(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    biased, plain = (
        cached(cfg, params, tokens, jnp.asarray(lengths), KEYS(jnp.arange(n)), each, max_new_tokens=16)
        for each in (without, sampling(*[GREEDY] * n))
    )
    changed = [(np.asarray(out.tokens) != np.asarray(other.tokens)).any(axis=1).tolist() for other in (plain, biased)]
    assert all(changed[0]) and changed[1] == [False, *[True] * (n - 1)]


def test_a_token_that_bias_forbids_is_never_drawn_and_logprobs_stay_the_models():
    cfg = make()
    bias = jnp.where(jnp.arange(VOCAB) % 2 == 0, -jnp.inf, 0.0)
    how = sampling(SAMPLED, MASKED)._replace(logit_bias=jnp.tile(bias, (2, 1)))
    inputs = (random_params(cfg), prompt(2, 6), jnp.array([6, 2]), KEYS(jnp.arange(2)))
    out = cached(cfg, *inputs, how, max_new_tokens=16)
    new = np.stack([np.asarray(out.tokens)[row, start : start + 16] for row, start in ((0, 6), (1, 2))])
    assert (new % 2 == 1).all()
    logprobs = jax.nn.log_softmax(forward(cfg, inputs[0], out.tokens[:1]))[0, 5:21]
    np.testing.assert_allclose(out.logprobs[0], np.asarray(logprobs)[np.arange(16), new[0]], atol=1e-4)


# -- Ends


@pytest.mark.parametrize("max_new_tokens", [1, 2, 15, 16, 17, 18, 33])
def test_fewer_new_tokens_are_the_first_of_more(max_new_tokens):
    """Whatever scans they make."""
    cfg = make(block_size=64)
    inputs = (random_params(cfg), prompt(2, 4), jnp.array([4, 2]), KEYS(jnp.arange(2)), sampling(GREEDY, SAMPLED))
    many, out = (cached(cfg, *inputs, max_new_tokens=n) for n in (40, max_new_tokens))
    for row, start in ((0, 4), (1, 2)):
        end = start + max_new_tokens
        np.testing.assert_array_equal(out.tokens[row, :end], many.tokens[row, :end])
        assert int(out.lengths[row]) == end and not out.tokens[row, end:].any()
    np.testing.assert_allclose(out.logprobs, many.logprobs[:, :max_new_tokens], atol=1e-4)


def test_it_ends_within_a_scan_of_the_last_rows_stop_token():
    cfg, steps = make(block_size=256), []

    def counted(params, tokens, positions, cache):
        jax.debug.callback(lambda: steps.append(tokens.shape[1]))
        return apply_fn(cfg)(params, tokens, positions, cache)

    inputs = (random_params(cfg), prompt(2, 4), jnp.array([4, 2]), KEYS(jnp.arange(2)), sampling(SAMPLED, SAMPLED))
    request = dict(max_new_tokens=200, init_cache=functools.partial(model.init_cache, cfg))
    free = cached(cfg, *inputs, max_new_tokens=200)
    stops = (int(free.tokens[0, 9]), int(free.tokens[1, 7]))  # the sixth new token of both rows, if not before
    out = generate.generate(counted, *inputs, **request, stop_tokens=stops)
    jax.effects_barrier()
    assert steps.count(4) == 1 and steps.count(1) <= generate.CHUNK
    for row, start in ((0, 4), (1, 2)):
        end = int(out.lengths[row])
        assert start < end <= start + 6 and int(out.tokens[row, end - 1]) in stops
        np.testing.assert_array_equal(out.tokens[row, :end], free.tokens[row, :end])


def test_no_stop_token_before_min_new_tokens():
    cfg = make()
    inputs = (random_params(cfg), prompt(3, 6), jnp.array([6, 6, 2]), KEYS(jnp.arange(3)))
    free = cached(cfg, *inputs, sampling(*[GREEDY] * 3), max_new_tokens=16)
    stops = tuple({int(free.tokens[row, start]) for row, start in ((0, 6), (1, 6), (2, 2))})  # the first of each
    how = sampling(*[GREEDY] * 3)._replace(min_new_tokens=jnp.array([0, 5, 16]))
    out = cached(cfg, *inputs, how, max_new_tokens=16, stop_tokens=stops)
    count = np.asarray(out.lengths) - np.array([6, 6, 2])
    assert count[0] == 1 and count[1] > 5 and count[2] == 16
    assert not np.isin(np.asarray(out.tokens)[1, 6:11], stops).any()
    assert not np.isin(np.asarray(out.tokens)[2, 2:18], stops).any()


def test_a_stop_token_ends_its_row_and_no_other_and_may_stand_in_a_prompt():
    cfg = make()
    lengths = [6, 6, 2, 6]
    params, keys, how = random_params(cfg), KEYS(jnp.arange(4)), sampling(*[SAMPLED] * 4)
    free = cached(cfg, params, prompt(4, 6), jnp.array(lengths), keys, how, max_new_tokens=16)
    stop = int(free.tokens[0, 8])  # the third new token of row 0
    tokens = prompt(4, 6).at[3, 1].set(stop)
    free = cached(cfg, params, tokens, jnp.array(lengths), keys, how, max_new_tokens=16)
    request = dict(max_new_tokens=16, stop_tokens=(stop, VOCAB + 5), pad_token=9)
    out = cached(cfg, params, tokens, jnp.array(lengths), keys, how, **request)
    for i, start in enumerate(lengths):
        new = np.asarray(free.tokens)[i, start : start + 16].tolist()
        count = new.index(stop) + 1 if stop in new else 16
        assert int(out.lengths[i]) == start + count
        assert np.asarray(out.tokens)[i, start:].tolist() == new[:count] + [9] * (22 - start - count)
        np.testing.assert_array_equal(out.logprobs[i, :count], free.logprobs[i, :count])
        assert not out.logprobs[i, count:].any()
    assert len({*out.lengths.tolist()}) > 1 and int(out.lengths[3]) > 6


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_no_and_one_new_token(max_new_tokens):
    cfg = make()
    inputs = (random_params(cfg), prompt(2, 4), jnp.array([4, 2]), KEYS(jnp.arange(2)), sampling(GREEDY, SAMPLED))
    out = cached(cfg, *inputs, max_new_tokens=max_new_tokens)
    assert out.tokens.shape == (2, 4 + max_new_tokens) and out.logprobs.shape == (2, max_new_tokens)
    np.testing.assert_array_equal(out.lengths, np.array([4, 2]) + max_new_tokens)
    np.testing.assert_array_equal(out.tokens[0, :4], inputs[1][0])
