"""The plain form against float64 numpy and torch; the blockwise form against the plain one."""

import sys

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops

# Compiled whole: op by op, the tests would spend their time compiling each op of each shape.
STATIC = ("causal", "window", "softcap", "implementation")
attention = jax.jit(ops.attention, static_argnames=STATIC)
masked_attention = jax.jit(ops.masked_attention, static_argnames="softcap")

NO_TORCH = "torch not installed: pip install llm_jax[parity]"
IMPLEMENTATIONS = ["plain", "blockwise"]


def inputs(time, *, batch=2, heads=4, kv_heads=2, head_dim=8, key_time=None, seed=0):
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((batch, time, heads, head_dim))
    k, v = rng.standard_normal((2, batch, key_time or time, kv_heads, head_dim))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def segments_of(time, batch=2):
    return jnp.asarray(np.sort(np.random.default_rng(9).integers(0, 4, (batch, time)), axis=1), jnp.int32)


def reference(q, k, v, *, causal=True, window=None, segments=None, softcap=None):
    """float64, one query of one head at a time, the visible keys picked out: no mask value at all."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.arange(k.shape[1])
        if causal:
            seen = seen[seen <= t]
        if window is not None:
            seen = seen[(seen > t - window) & (seen <= t)]
        if segments is not None:
            seen = seen[np.asarray(segments)[b, seen] == int(segments[b, t])]
        head = n // (q.shape[2] // k.shape[2])
        scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(q.shape[3])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window_1": {"window": 1},
    "window_7": {"window": 7},
    "window_100": {"window": 100},
    "window_alone": {"window": 5, "causal": False},
    "softcap": {"softcap": 1.5},
    "segments": {"segments": True},
    "segments_full_softcap": {"segments": True, "causal": False, "softcap": 2.0},
    "segments_window": {"segments": True, "window": 70, "softcap": 2.0},
}


def options(name, time, batch=2):
    chosen = dict(MASKS[name])
    if chosen.get("segments"):
        chosen["segments"] = segments_of(time, batch)
    return chosen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MASKS)
def test_equals_float64(name, implementation):
    q, k, v = inputs(37)
    chosen = options(name, 37)
    actual = attention(q, k, v, **chosen, implementation=implementation)
    np.testing.assert_allclose(actual, reference(q, k, v, **chosen), atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch_with_gradients(causal, implementation):
    """scaled_dot_product_attention in float64, grouped heads, to 1e-4 on gradients of order 1."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    arrays = inputs(70)
    d_out = inputs(70, seed=5)[0]
    tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    out.backward(torch.tensor(np.asarray(d_out, np.float64)))
    run = lambda *a: attention(*a, causal=causal, implementation=implementation)  # noqa: E731
    actual, gradients = jax.jit(lambda *a: (run(*a), jax.vjp(run, *a)[1](d_out)))(*arrays)
    np.testing.assert_allclose(actual, out.detach().numpy(), atol=1e-5)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-4)


def value_and_gradients(arrays, chosen, implementation):
    weights = np.random.default_rng(7).standard_normal(arrays[0].shape).astype(np.float32)

    def loss(q, k, v):
        out = attention(q, k, v, **chosen, implementation=implementation)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients


@pytest.mark.parametrize(
    "name, time",
    [("causal", time) for time in (1, 17, 255, 300, 700)]
    + [(name, 300) for name in ("full", "window_7", "softcap", "segments", "segments_window")]
    + [("segments_full_softcap", 1), ("segments_full_softcap", 255), ("window_100", 700)],
)
def test_blockwise_equals_plain_with_gradients(name, time):
    arrays = inputs(time, heads=6, kv_heads=3)
    chosen = options(name, time)
    plain = value_and_gradients(arrays, chosen, "plain")
    blockwise = value_and_gradients(arrays, chosen, "blockwise")
    for expected, actual in zip(plain, blockwise, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["causal", "full", "window_7", "window_100", "segments_full_softcap"])
def test_more_blocks_than_runs(name, monkeypatch):
    """Then the blocks of a run share one range of keys, in a loop: as for texts of more than 2,048 tokens."""
    monkeypatch.setattr(sys.modules["llm_jax.ops.attention"], "BLOCK_SIZES", (16, 16))
    arrays = inputs(331)  # no other test's, whose compiled function would be found
    chosen = options(name, 331)
    plain = value_and_gradients(arrays, chosen, "plain")
    blockwise = value_and_gradients(arrays, chosen, "blockwise")
    for expected, actual in zip(plain, blockwise, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (5, 1)])
def test_grouped_heads_read_their_own_key_head(heads, kv_heads):
    """As if each key head were repeated N // K times in a row."""
    q, k, v = inputs(80, heads=heads, kv_heads=kv_heads)
    repeated = [jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v)]
    expected = attention(q, *repeated, implementation="plain")
    for implementation in IMPLEMENTATIONS:
        actual = attention(q, k, v, implementation=implementation)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_reaches_what_is_masked(implementation):
    """Causality, window and segments, by the gradient of one query's output."""
    _, k, v = arrays = inputs(100, batch=1)
    segments = jnp.asarray(np.arange(100)[None] >= 60, jnp.int32)

    def one(k, v):
        out = attention(arrays[0], k, v, window=30, segments=segments, implementation=implementation)
        return out[0, 70].sum()

    for gradient in jax.jit(jax.grad(one, argnums=(0, 1)))(k, v):
        reached = np.flatnonzero(np.abs(gradient[0]).max((1, 2)) > 0)
        np.testing.assert_array_equal(reached, range(60, 71))


def test_masked_softmax_is_the_softmax_of_the_kept_entries():
    q, k, v = inputs(5, key_time=9)
    keep = np.array([0, 2, 3, 8])
    mask = jnp.asarray(np.isin(np.arange(9), keep)[None, None])
    everything = jnp.asarray(np.ones((1, 1, 4), bool))
    np.testing.assert_allclose(
        masked_attention(q, k, v, mask), masked_attention(q, k[:, keep], v[:, keep], everything), atol=1e-6
    )


def test_a_fully_masked_row_is_finite_and_disturbs_no_other():
    q, k, v = inputs(4)
    mask = jnp.asarray(np.broadcast_to(np.arange(4)[:, None] != 1, (2, 4, 4)))
    out = masked_attention(q, k, v, mask, softcap=5.0)
    total = lambda *a: masked_attention(*a, mask, softcap=5.0).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(np.asarray(x)).all() for x in (out, *gradients))
    expected = masked_attention(q, k, v, jnp.ones((1, 4, 4), bool), softcap=5.0)
    others = [0, 2, 3]
    np.testing.assert_allclose(np.asarray(out)[:, others], np.asarray(expected)[:, others], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    q, k, v = inputs(70)
    run = lambda q: attention(q, k, v, implementation=implementation).sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(run))(1e4 * q)
    assert np.isfinite(value) and np.isfinite(np.asarray(gradient)).all()


def test_keys_may_differ_in_number_without_a_mask():
    q, k, v = inputs(3, key_time=11)
    actual = attention(q, k, v, causal=False)
    np.testing.assert_allclose(actual, reference(q, k, v, causal=False), atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "segments_window"])
def test_bfloat16(name):
    """Within bfloat16's 8 bits of the float32 result, in the caller's dtype, forward and backward."""
    arrays = [x.astype(jnp.bfloat16) for x in inputs(130)]
    chosen = options(name, 130)
    expected = value_and_gradients([x.astype(jnp.float32) for x in arrays], chosen, "plain")
    for implementation in IMPLEMENTATIONS:
        actual = value_and_gradients(arrays, chosen, implementation)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == jnp.bfloat16
            np.testing.assert_allclose(a.astype(jnp.float32), e, atol=4e-2 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_of_the_gradient(implementation):
    """Three models at once, as training several seeds does; segments not mapped."""
    q, k, v = (jnp.stack([x, 2 * x, -x]) for x in inputs(70))
    segments = segments_of(70)

    def loss(q, k, v):
        return attention(q, k, v, segments=segments, implementation=implementation).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    mapped = jax.jit(jax.vmap(gradient))(q, k, v)
    for i in range(3):
        for a, e in zip(mapped, gradient(q[i], k[i], v[i]), strict=True):
            np.testing.assert_allclose(a[i], e, atol=1e-5, rtol=1e-5)  # up to 20 large; products differ in order


def temporary_bytes(time, implementation, **chosen):
    q, k, v = (jax.ShapeDtypeStruct((1, time, 2, 8), jnp.float32) for _ in range(3))
    run = lambda *a: attention(*a, **chosen, implementation=implementation).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(q, k, v).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chosen", [{}, {"causal": False}, {"window": 300}], ids=str)
def test_blockwise_memory_is_linear_in_time(chosen):
    middle, short, long = (temporary_bytes(time, "blockwise", **chosen) for time in (1024, 2048, 8192))
    assert long < 8192 * 8192  # bytes: even a matrix of booleans would not fit
    assert long < 4.2 * short
    assert middle < 4 * 2 * 1024 * 1024  # its eight blocks may be in work at once: still less than all scores


def test_plain_memory_is_not():
    """So that the test above would notice."""
    assert temporary_bytes(8192, "plain") > 8192 * 8192


def test_auto_is_blockwise_for_long_texts_only():
    def has_loop_or_rule(time):
        q, k, v = inputs(time, batch=1)
        return "custom_vjp" in str(jax.make_jaxpr(attention)(q, k, v))

    assert has_loop_or_rule(512) and not has_loop_or_rule(8)


@pytest.mark.parametrize("how", [{}, {"window": 70}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "splash"])
def test_fewer_queries_than_keys_are_the_last_ones(implementation, how):
    q, k, v = inputs(300, head_dim=16)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 100, 4, 16)), jnp.float32)

    def of_all(q, k, v):
        return jnp.sum(attention(q, k, v, **how, implementation="plain")[:, 200:] * weights)

    def of_the_last(q, k, v):
        return jnp.sum(attention(q[:, 200:], k, v, **how, implementation=implementation) * weights)

    expected, actual = (jax.value_and_grad(each, (0, 1, 2))(q, k, v) for each in (of_all, of_the_last))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4), actual, expected)


def test_errors_show_both_sides():
    q, k, v = inputs(6, key_time=4)
    with pytest.raises(ValueError, match="got 6 and 4"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="got 6 and 4"):
        attention(q, k, v, causal=False, window=3)
    q, k, v = inputs(4, key_time=6)
    with pytest.raises(ValueError, match="got 4 and 6"):
        attention(q, k, v, segments=segments_of(4))
    with pytest.raises(ValueError, match="got T=4 and S=6"):
        attention(q, k, v, causal=False, implementation="blockwise")
    with pytest.raises(ValueError, match=r"query heads \(5\) must be a multiple of key/value heads \(2\)"):
        attention(*inputs(4, heads=5, kv_heads=2))
    with pytest.raises(ValueError, match=r"window \(0\) must be at least 1"):
        attention(*inputs(4), window=0)
