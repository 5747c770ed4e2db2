"""Masks against transformers' warpers; the draw against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_jax.ops import draw, masked_draw, min_p_mask, penalize, top_k_mask, top_p_mask

JIT_TOP_K = jax.jit(top_k_mask)
ROWS = np.random.default_rng(0).standard_normal((1000, 40)).astype(np.float32) * 2
ROWS[::7, :20] = -np.inf  # what an earlier mask left
CASES = {
    "top_k": (top_k_mask, "TopKLogitsWarper", [1, 2, 10, 40, 100]),
    "top_p": (top_p_mask, "TopPLogitsWarper", [0.0, 0.1, 0.5, 0.9, 0.999]),
    "min_p": (min_p_mask, "MinPLogitsWarper", [0.0, 0.02, 0.1, 0.5, 1.0]),
}


def kept(logits):
    return ~np.isneginf(np.asarray(logits, np.float32))


def logs(*probs):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.array(probs)), jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_on_1000_rows(name):
    """Scalar, per-row and traced values all keep the tokens that transformers' warper keeps, unchanged."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers not installed: pip install llm_jax[parity]"
    )
    torch = pytest.importorskip("torch", reason="torch not installed: pip install llm_jax[parity]")
    mask, warper, values = CASES[name]
    rows, traced = jnp.asarray(ROWS), jax.jit(mask)
    for value in values:
        expected = getattr(transformers, warper)(value)(None, torch.tensor(ROWS)).numpy()
        np.testing.assert_array_equal(mask(rows, value), expected)
        np.testing.assert_array_equal(traced(rows, value), expected)
        np.testing.assert_array_equal(traced(rows, np.full(1000, value)), expected)


def test_equals_transformers_on_exact_boundaries():
    """Probabilities that are powers of two, p on their partial sums: <= and < differ here."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers not installed: pip install llm_jax[parity]"
    )
    torch = pytest.importorskip("torch", reason="torch not installed: pip install llm_jax[parity]")
    rng = np.random.default_rng(0)
    probs = np.stack([rng.permutation([0.5, 0.25, 0.125, 0.0625, 0.0625]) for _ in range(50)])
    logits = np.log(probs).astype(np.float32)
    for p in (0.25, 0.5, 0.75, 0.875):  # not 0.9375: it cuts between the tied last two
        expected = transformers.TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(top_p_mask(jnp.asarray(logits), p), expected)


def test_values_per_row():
    logits = logs([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1])
    np.testing.assert_array_equal(kept(top_k_mask(logits, jnp.array([1, 3]))).sum(-1), [1, 3])
    np.testing.assert_array_equal(kept(top_p_mask(logits, jnp.array([0.35, 0.75]))).sum(-1), [1, 3])
    np.testing.assert_array_equal(kept(min_p_mask(logits, jnp.array([0.9, 0.4]))).sum(-1), [1, 3])


def test_ties_stay_together():
    logits = jnp.array([2.0, 1.0, 1.0, 1.0, 0.0, -0.0, -5.0])
    np.testing.assert_array_equal(kept(top_k_mask(logits, 2)), [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(kept(top_k_mask(logits, 5)), [1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(kept(top_p_mask(logits, 0.5)), [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(kept(top_p_mask(jnp.zeros(8), 0.1)), [1] * 8)


def test_limits():
    logits = jnp.array([0.0, 200.0, 1.0, -jnp.inf])  # the others underflow to probability 0
    np.testing.assert_array_equal(top_p_mask(logits, 1.0), logits)
    np.testing.assert_array_equal(top_k_mask(logits, 99), logits)
    np.testing.assert_array_equal(kept(top_p_mask(logits, 0.0)), [0, 1, 0, 0])
    np.testing.assert_array_equal(kept(top_k_mask(logits, 0)), [0, 1, 0, 0])
    np.testing.assert_array_equal(kept(min_p_mask(logits, 1.0)), [0, 1, 0, 0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=6, max_size=6), st.integers(1, 6))
def test_top_k_keeps_exactly_what_reaches_the_kth_value(values, k):
    logits = np.array(values, np.float32)
    np.testing.assert_array_equal(kept(JIT_TOP_K(logits, k)), logits >= np.sort(logits)[-k])


def test_masks_compose():
    logits = logs(0.4, 0.3, 0.2, 0.1)
    # Of the two that top-k leaves, 0.4 / 0.7 = 0.57 is more than p.
    np.testing.assert_array_equal(kept(top_p_mask(top_k_mask(logits, 2), 0.5)), [1, 0, 0, 0])
    np.testing.assert_array_equal(kept(top_p_mask(logits, 0.5)), [1, 1, 0, 0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_vmap(name, dtype):
    mask, _, values = CASES[name]
    rows = jnp.asarray(ROWS[:20]).astype(dtype)
    whole = mask(rows, values[2])
    assert whole.dtype == dtype
    by_row = jax.vmap(mask)(rows, jnp.full(20, values[2]))
    np.testing.assert_array_equal(by_row.astype(jnp.float32), whole.astype(jnp.float32))


@pytest.mark.parametrize("repetition", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(repetition):
    torch = pytest.importorskip("torch", reason="torch not installed")
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    logits, text = jnp.asarray(ROWS[:50]), np.random.default_rng(0).integers(0, ROWS.shape[1], (50, 12))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty=repetition)
    expected = processor(torch.tensor(text), torch.tensor(np.asarray(logits, np.float32)))
    in_text = jnp.stack([jnp.bincount(row, length=ROWS.shape[1]) for row in text])
    others = dict(presence=0.0, frequency=0.0)
    actual = penalize(logits, in_text > 0, 0 * in_text, repetition=jnp.full(50, repetition), **others)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)


def test_presence_is_subtracted_once_and_frequency_each_time():
    counts = jnp.array([0, 1, 3, 0])
    out = penalize(jnp.zeros(4), counts > 0, counts, repetition=1.0, presence=0.5, frequency=0.25)
    np.testing.assert_array_equal(out, [0, -0.75, -1.25, 0])


def test_draw_has_the_exact_distribution():
    """Chi-squared over 100,000 draws; 27.9 is the 0.999 quantile at 9 degrees of freedom."""
    probs = np.array([0.3, 0.0, 0.2, 0.05, 0.0, 0.1, 0.12, 0.08, 0.06, 0.04, 0.03, 0.02])
    uniform = jax.random.uniform(jax.random.key(0), (100_000,))
    logits = jnp.broadcast_to(logs(*probs), (100_000, 12))
    tokens = jax.jit(draw)(logits, uniform)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(tokens, minlength=12)
    assert not counts[probs == 0].any()
    possible = probs > 0
    expected = 100_000 * probs[possible]
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 27.9


@pytest.mark.parametrize("size", [3, 1000, 50_000])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2.0**-24, 1.0])
def test_draw_never_takes_a_masked_token(size, uniform):
    """Few tokens possible, at the ends of the row and at the ends of [0, 1)."""
    rows = [[size // 2], [0, size - 1], [1, size - 2]]
    logits = np.full((3, size), -np.inf, np.float32)
    for row, possible in enumerate(rows):
        logits[row, possible] = np.linspace(0.0, 1.0, len(possible))
    tokens = jax.jit(draw)(logits, np.full(3, uniform, np.float32)).tolist()
    assert all(token in possible for token, possible in zip(tokens, rows, strict=True))


def test_draw_survives_a_cumulative_sum_that_is_not_monotone(monkeypatch):
    """As XLA's parallel one may be, in its last bits; here it overshoots on an impossible token."""
    cumsum = jnp.cumsum
    monkeypatch.setattr(jnp, "cumsum", lambda p, axis: cumsum(p, axis=axis) + 1e-6 * (p == 0))
    assert draw(logs([0.5, 0.0, 0.5, 0.0]), jnp.full(1, 0.5)).tolist() == [2]
    assert draw(logs([0.5, 0.5, 0.0, 0.0]), jnp.full(1, 1 - 2.0**-24)).tolist() == [1]


def test_draw_is_the_inverse_cdf_row_by_row():
    logits = logs([0.25, 0.5, 0.25], [0.5, 0.25, 0.25])
    for uniform, expected in ((0.2, [0, 0]), (0.45, [1, 0]), (0.7, [1, 1]), (0.9, [2, 2])):
        np.testing.assert_array_equal(draw(logits, jnp.full(2, uniform)), expected)
    assert draw(logits.astype(jnp.bfloat16), jnp.full(2, 0.9)).tolist() == [2, 2]
    np.testing.assert_array_equal(jax.vmap(draw)(logits, jnp.array([0.9, 0.7])), [2, 1])


# -- All masks and the draw at once

SETTINGS = [
    dict(top_k=99_999, top_p=1.0, min_p=0.0),
    dict(top_k=7, top_p=1.0, min_p=0.0),
    dict(top_k=99_999, top_p=0.6, min_p=0.0),
    dict(top_k=99_999, top_p=1.0, min_p=0.2),
    dict(top_k=20, top_p=0.8, min_p=0.05),
    dict(top_k=150, top_p=0.95, min_p=0.0),  # more than the candidates
]
NAMES = [",".join(f"{k}={v}" for k, v in each.items()) for each in SETTINGS]


def exact_probabilities(logits, *, top_k, top_p, min_p):
    """By sorting, in float64, of a row without ties."""
    probs = np.exp(np.float64(logits) - np.max(logits))
    order = np.argsort(-probs)
    probs[order[top_k:]] = 0
    probs /= probs.sum()
    below = np.cumsum(probs[order][::-1])[::-1]  # of each and the less likely ones
    probs[order[1:][below[1:] <= 1 - top_p]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_masked_draw_has_the_exact_distribution(setting):
    """Chi-squared over 100,000 draws; the tokens expected less than 10 times count as one."""

    rng, n, size = np.random.default_rng(3), 100_000, 200
    logits = (rng.standard_normal(size) * 1.5).astype(np.float32)
    uniform = jax.random.uniform(jax.random.key(7), (n,))
    tokens = jax.jit(masked_draw)(jnp.broadcast_to(logits, (n, size)), uniform, **setting)
    assert tokens.dtype == jnp.int32
    expected = n * exact_probabilities(logits, **setting)
    counts = np.bincount(tokens, minlength=size)
    assert not counts[expected == 0].any()
    often = expected >= 10
    pairs = [*zip(counts[often], expected[often], strict=True), (counts[~often].sum(), expected[~often].sum())]
    seen, wanted = np.array([(a, b) for a, b in pairs if b > 0]).T
    assert ((seen - wanted) ** 2 / wanted).sum() < stats.chi2.ppf(0.999, len(wanted) - 1)


# Nearly uniform, no candidates are enough.
@pytest.mark.parametrize("size, spread", [(5, 1.0), (128, 1.0), (1000, 0.01), (1000, 8.0), (49_152, 1.0)])
def test_masked_draw_is_the_masks_and_the_draw(size, spread):
    """One call with every setting as a row, some within the candidates and some not."""
    rng = np.random.default_rng(size)
    uniform = np.linspace(0, 1, 7, endpoint=False, dtype=np.float32)
    rows = [(each, u) for each in SETTINGS for u in uniform]
    logits = jnp.asarray(rng.standard_normal((len(rows), size)) * spread, jnp.float32)
    by_row = {name: jnp.asarray([each[name] for each, _ in rows]) for name in SETTINGS[0]}
    u = jnp.asarray([u for _, u in rows])
    masked = min_p_mask(top_p_mask(top_k_mask(logits, by_row["top_k"]), by_row["top_p"]), by_row["min_p"])
    together = jax.jit(masked_draw)(logits, u, **by_row)
    np.testing.assert_array_equal(together, draw(masked, u))
    # And each setting in a call of its own: whether the others need the search changes nothing.
    for start in range(0, len(rows), len(uniform)):
        part = slice(start, start + len(uniform))
        alone = jax.jit(masked_draw)(logits[part], u[part], **{name: value[part] for name, value in by_row.items()})
        np.testing.assert_array_equal(alone, together[part])


@pytest.mark.parametrize("tied", [2, 127, 128, 129, 200])
@pytest.mark.parametrize("top_k, top_p", [(2, 1.0), (300, 0.3), (2, 0.3)])
def test_masked_draw_keeps_ties(tied, top_k, top_p):
    """The likeliest, then `tied` tokens of the same logit: more than the candidates, exactly as many, fewer."""
    logits = np.full(300, -3.0, np.float32)
    logits[10], logits[50 : 50 + tied] = 1.0, 0.5
    uniform = np.linspace(0, 1, 500, endpoint=False, dtype=np.float32)
    rows = jnp.broadcast_to(logits, (500, 300))
    masked = top_p_mask(top_k_mask(rows, top_k), top_p)
    tokens = masked_draw(rows, jnp.asarray(uniform), top_k=top_k, top_p=top_p, min_p=0.0)
    np.testing.assert_array_equal(tokens, draw(masked, jnp.asarray(uniform)))
    assert {*tokens.tolist()} == {*np.flatnonzero(kept(masked[0])).tolist()}


def test_masked_draw_takes_no_token_that_a_bias_forbids():
    logits = np.full((4, 1000), -np.inf, np.float32)
    logits[:, [3, 999]] = [1.0, 0.0]
    for setting in SETTINGS:
        for uniform in (0.0, 0.5, 0.99, 1.0):
            tokens = masked_draw(jnp.asarray(logits), jnp.full(4, uniform), **setting)
            assert {*tokens.tolist()} <= {3, 999}
