import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops
from llm_jax.ops import experts as module

COUNTS = [[3, 0, 9, 1], [13, 0, 0, 0], [0, 0, 0, 13], [4, 4, 4, 1]]


def some(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def written_out(x, weights, counts):
    ends = np.cumsum(counts)
    parts = [x[end - count : end] @ weights[e] for e, (count, end) in enumerate(zip(counts, ends, strict=True))]
    return np.concatenate(parts)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("largest", [1, 4, 128], ids="blocks of {}".format)
def test_each_row_is_multiplied_by_its_expert(monkeypatch, counts, largest):
    monkeypatch.setattr(module, "LARGEST_BLOCK", largest)
    x, weights = some(13, 6), some(4, 6, 5, seed=1)
    expected = written_out(np.asarray(x), np.asarray(weights), counts)
    found = jax.jit(ops.grouped_linear)(x, weights, jnp.array(counts))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_blocks_and_jaxs_own_ragged_product_agree_with_gradients(counts):
    """What a CPU does and what accelerators do."""
    x, weights, pull = some(13, 6), some(4, 6, 5, seed=1), some(13, 5, seed=2)

    def value_and_gradients(product):
        out, back = jax.vjp(lambda x, w: product(x, w, jnp.array(counts)), x, weights)
        return out, *back(pull)

    ragged = value_and_gradients(lambda *args: module._ragged(*args, precision=jax.lax.Precision.HIGHEST))
    for found, expected in zip(value_and_gradients(ops.grouped_linear), ragged, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_it_works_under_vmap_and_in_bfloat16():
    x, weights, counts = some(2, 13, 6), some(4, 6, 5, seed=1), jnp.array(COUNTS[:2])
    both = jax.vmap(ops.grouped_linear, (0, None, 0))(x, weights, counts)
    for i in range(2):
        np.testing.assert_allclose(both[i], ops.grouped_linear(x[i], weights, counts[i]), rtol=1e-5, atol=1e-6)
    low = ops.grouped_linear(x[0].astype(jnp.bfloat16), weights.astype(jnp.bfloat16), counts[0])
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), both[0], atol=0.1)


@pytest.mark.parametrize("normalize", [True, False])
def test_routes_are_the_likeliest_experts(normalize):
    logits = some(7, 5)
    weights, experts = ops.route(logits, k=2, normalize=normalize)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.argsort(-probabilities, axis=-1)[:, :2]
    np.testing.assert_array_equal(experts, expected)
    kept = np.take_along_axis(probabilities, expected, -1)
    np.testing.assert_allclose(weights, kept / kept.sum(-1, keepdims=True) if normalize else kept, rtol=1e-5)


def test_sorting_by_expert_is_stable():
    places, counts = ops.sort_by_expert(jnp.array([[2, 0], [0, 3], [2, 0]]), 4)
    assert places.tolist() == [1, 2, 5, 0, 4, 3] and counts.tolist() == [3, 0, 2, 1]
