"""The loop on the host: what it compiles, and that its calls and buckets change no token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from llm_jax import decode_weights, decoding, engine, generate, model
from llm_jax.config_rules import freeze

VOCAB = 40


def make(**values):
    shape = dict(n_embd=16, n_head=4, n_kv_head=2, n_layer=2, block_size=512, vocab_size=VOCAB)
    cfg = freeze({"model": shape | values}).model
    return engine.Program(cfg, VOCAB), decode_weights.lay_out(cfg, random_params(cfg))


def request(prompts, *, max_new_tokens, num_samples=1, numbers=None, stop_tokens=(), top_logprobs=0, **sampling):
    count = len(prompts) * num_samples
    fields = dict(temperature=1.0, top_k=VOCAB, top_p=1.0, logit_bias=np.zeros((count, VOCAB))) | sampling
    kinds = dict(top_k=np.int32, min_new_tokens=np.int32)
    return decoding.Request(
        prompts=prompts,
        numbers=[*range(num_samples)] * len(prompts) if numbers is None else numbers,
        sampling=generate.SamplingConfig(
            **{
                name: np.broadcast_to(np.asarray(value, kinds.get(name, np.float32)), (count, *np.shape(value)[1:]))
                for name, value in fields.items()
            }
        ),
        seed=0,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        num_samples=num_samples,
        top_logprobs=top_logprobs,
    )


def continued(program, params, asked):
    """(new tokens of each row, how many each call added to the first)."""
    rows, sizes = [[] for _ in asked.stopped], []
    for new in decoding.run(engine.ModelEngine(program, params), asked):
        for row, each in zip(rows, new, strict=True):
            row += each.tokens
        sizes.append(len(new[0].tokens))
    return rows, sizes


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


@pytest.fixture
def compilations():
    """Names of what XLA compiles meanwhile."""
    names = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(kwargs.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.clear_event_listeners()


@pytest.mark.slow
def test_200_lengths_and_settings_compile_a_program_for_each_bucket(compilations):
    """Of prompts from 1 to 200 tokens there are five buckets, of caches for 11 to 210 tokens two."""
    program, params = make()
    rng = np.random.default_rng(0)
    compilations.clear()
    for length in rng.permutation(np.arange(1, 201)):
        settings = dict(
            temperature=rng.choice([0.0, rng.uniform(0.1, 2)]),
            top_k=rng.integers(1, VOCAB + 1),
            top_p=rng.uniform(0.1, 1),
            min_p=rng.uniform(0, 0.3),
            repetition_penalty=rng.choice([1.0, rng.uniform(0.8, 1.5)]),
            presence_penalty=rng.uniform(-1, 1),
            frequency_penalty=rng.uniform(-1, 1),
            logit_bias=rng.normal(size=(1, VOCAB)),
            min_new_tokens=rng.integers(0, 5),
        )
        stops = rng.integers(0, VOCAB, rng.integers(0, 4)).tolist()
        asked = request(prompts_of(length), max_new_tokens=10, stop_tokens=stops, **settings)
        rows, _ = continued(program, params, asked)
        assert 1 <= len(rows[0]) <= 10
    prompt_buckets = {decoding.bucket(n) for n in range(1, 201)}
    assert len(prompt_buckets) == 5
    assert len(compilations) <= len(prompt_buckets) + 2


@pytest.mark.parametrize("values", [{}, dict(layer_types=("sliding", "full"), window=20)], ids=["full", "windows"])
def test_calls_and_growing_caches_change_no_token(values, monkeypatch):
    """Caches of 16 slots that grow again and again, beside `generate` in one piece."""
    program, params = make(block_size=64, **values)  # the cache's ring wraps, too
    monkeypatch.setattr(decoding, "SMALLEST_CACHE", 16)
    monkeypatch.setattr(decoding, "ROOM", 1)
    prompts = prompts_of(3, 30, 1)
    asked = request(prompts, max_new_tokens=80, temperature=[1.0, 0.0, 1.3], top_p=[1.0, 1.0, 0.9], numbers=[0, 1, 2])
    rows, sizes = continued(program, params, asked)
    assert sizes == [1, *[generate.CHUNK] * 4, 15]
    apply_fn, init_cache = program.functions()
    tokens = np.zeros((3, 30), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))
    lengths = jnp.array([3, 30, 1])
    whole = generate.generate(
        apply_fn, params, jnp.asarray(tokens), lengths, keys, jax.tree.map(jnp.asarray, asked.sampling),
        max_new_tokens=80, init_cache=init_cache,
    )  # fmt: skip
    for row, start, out in zip(rows, (3, 30, 1), np.asarray(whole.tokens), strict=True):
        assert out[start : start + 80].tolist() == row


def test_samples_of_one_prompt_equal_rows_of_their_own():
    program, params = make()
    prompts = prompts_of(5, 9)
    together, _ = continued(program, params, request(prompts, max_new_tokens=20, num_samples=3))
    for i, prompt in enumerate(prompts):
        for j in range(3):
            alone, _ = continued(program, params, request([prompt], max_new_tokens=20, numbers=[j]))
            assert together[3 * i + j] == alone[0]
    assert len({tuple(row) for row in together}) == 6


def test_a_row_that_the_host_stops_adds_nothing_and_its_neighbours_go_on():
    program, params = make()
    free, _ = continued(program, params, request(prompts_of(5, 9), max_new_tokens=60))
    asked = request(prompts_of(5, 9), max_new_tokens=60)
    rows = [[], []]
    for calls, new in enumerate(decoding.run(engine.ModelEngine(program, params), asked)):
        for row, each in zip(rows, new, strict=True):
            row += each.tokens
        if calls == 1:
            asked.stopped[0] = True
    assert rows[0] == free[0][: 1 + generate.CHUNK] and rows[1] == free[1]


def test_logprobs_are_the_unmodified_models():
    program, params = make()
    prompt = prompts_of(5)
    asked = request(prompt, max_new_tokens=20, temperature=0.5, top_k=5, presence_penalty=1.0, top_logprobs=4)
    tokens, logprobs, tops = [], [], []
    for [new] in decoding.run(engine.ModelEngine(program, params), asked):
        tokens, logprobs, tops = tokens + new.tokens, logprobs + new.logprobs, tops + new.top_logprobs
    whole = jnp.asarray([prompt[0] + tokens])
    expected = jax.nn.log_softmax(model.Transformer(program.cfg).apply({"params": params}, whole)[0][0, 4:-1])
    np.testing.assert_allclose(logprobs, np.asarray(expected)[np.arange(20), tokens], atol=1e-4)
    for top, row in zip(tops, np.asarray(expected), strict=True):
        assert [*top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([*top.values()], np.sort(row)[::-1][:4], atol=1e-4)


@pytest.mark.slow
def test_a_cache_in_int8_continues_nearly_alike():
    """Greedy, of logits that are far apart: int8 keys and values turn few of them around."""
    program, params = make()
    small = engine.Program(program.cfg, VOCAB, cache_dtype="int8")
    asked = dict(max_new_tokens=30, temperature=0.0)
    exact, rounded = (continued(p, params, request(prompts_of(20, 7), **asked))[0] for p in (program, small))
    assert exact[0][:8] == rounded[0][:8]
    # By the numbers, of one more token after 20: within 5 % of the logits' spread, and not the same.
    tokens, last = jnp.asarray(prompts_of(20)), jnp.full((1, 1), 7)
    logits = []
    for each in (program, small):
        apply_fn, init_cache = each.functions()
        _, cache = apply_fn(params, tokens, jnp.arange(20)[None], init_cache(1, 24))
        logits.append(apply_fn(params, last, jnp.full((1, 1), 20), cache)[0])
    assert cache[0].k.dtype == jnp.int8
    assert 0 < jnp.abs(logits[0] - logits[1]).max() < 0.05 * jnp.ptp(logits[0])
