"""cross_entropy against float64 numpy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops

cross_entropy = jax.jit(ops.cross_entropy, static_argnames="z_loss")  # one compilation, not one for each op

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((3, 5, 11)) * 4
TARGETS = RNG.integers(0, 11, (3, 5))
MASK = RNG.integers(0, 2, (3, 5)) * RNG.uniform(0.5, 2.0, (3, 5))
LOGITS32, TARGETS32, MASK32 = (
    jnp.asarray(LOGITS, jnp.float32),
    jnp.asarray(TARGETS),
    jnp.asarray(MASK, jnp.float32),
)


def reference(mask, z_loss):
    log_z = np.log(np.exp(LOGITS).sum(-1))
    nats = log_z - np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0] + z_loss * log_z**2
    return (nats * mask).sum(), mask.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_float64(masked, z_loss):
    expected = reference(MASK if masked else np.ones((3, 5)), z_loss)
    actual = cross_entropy(LOGITS32, TARGETS32, MASK32 if masked else None, z_loss=z_loss)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual[0].dtype == actual[1].dtype == jnp.float32


def test_uniform_logits_cost_log_v():
    nats, count = cross_entropy(np.zeros((7, 65), np.float32), np.arange(7))
    np.testing.assert_allclose(float(nats) / float(count), np.log(65), rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot():
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = (softmax - np.eye(11)[TARGETS]) * MASK[..., None]
    actual = jax.jit(jax.grad(lambda x: ops.cross_entropy(x, TARGETS32, MASK32)[0]))(LOGITS32)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_masked_token_may_hold_anything():
    targets, logits, mask = TARGETS.copy(), LOGITS.astype(np.float32), np.ones((3, 5), np.float32)
    targets[0, 0], logits[0, 0], mask[0, 0] = -100, np.nan, 0.0
    np.testing.assert_allclose(
        cross_entropy(logits, targets, mask), cross_entropy(LOGITS32, TARGETS32, mask), rtol=1e-6
    )


def test_sums_add_up_over_parts():
    whole = cross_entropy(LOGITS32, TARGETS32, MASK32)
    parts = [cross_entropy(*(np.asarray(x)[i] for x in (LOGITS32, TARGETS32, MASK32))) for i in range(3)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_dtype_jit_vmap(dtype, tolerance):
    expected = reference(MASK, 0.0)
    np.testing.assert_allclose(
        cross_entropy(LOGITS32.astype(dtype), TARGETS32, MASK32), expected, rtol=tolerance
    )
    nats, count = jax.jit(jax.vmap(ops.cross_entropy))(LOGITS32.astype(dtype), TARGETS32, MASK32)
    assert nats.shape == (3,) and nats.dtype == jnp.float32
    np.testing.assert_allclose((np.sum(nats), np.sum(count)), expected, rtol=tolerance)
