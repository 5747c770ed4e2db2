"""Norms against float64 formulas and the gradient written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops

rms_norm = jax.jit(ops.rms_norm, static_argnames="eps")  # one compilation, not one for each op
layer_norm = jax.jit(ops.layer_norm, static_argnames="eps")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 5, 16)) * 3 + 1
WEIGHT, BIAS, D_OUT = RNG.standard_normal(16), RNG.standard_normal(16), RNG.standard_normal((4, 5, 16))
X32, WEIGHT32, BIAS32, D_OUT32 = (jnp.asarray(a, jnp.float32) for a in (X, WEIGHT, BIAS, D_OUT))


def test_rms_norm_equals_its_formula():
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(X32, WEIGHT32, eps=1e-5), expected * WEIGHT, rtol=1e-5)
    np.testing.assert_allclose(rms_norm(X32, None, eps=1e-5), expected, rtol=1e-5)


def test_rms_norm_gradient_equals_the_hand_written_backward():
    """With y = x r w, r = rsqrt(mean x^2 + eps): dx = r (w dy) - x r^3 mean(x w dy); dw = sum x r dy."""
    eps = 0.1  # large, so that forgetting it shows
    r = 1 / np.sqrt((X**2).mean(-1, keepdims=True) + eps)
    weighted = WEIGHT * D_OUT
    dx = r * weighted - X * r**3 * (X * weighted).mean(-1, keepdims=True)
    dw = (X * r * D_OUT).sum((0, 1))
    _, vjp = jax.vjp(lambda x, w: rms_norm(x, w, eps=eps), X32, WEIGHT32)
    actual_dx, actual_dw = vjp(D_OUT32)
    np.testing.assert_allclose(actual_dx, dx, atol=1e-5)
    np.testing.assert_allclose(actual_dw, dw, rtol=1e-5, atol=1e-5)


def test_layer_norm_equals_its_formula():
    centred = X - X.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer_norm(X32, WEIGHT32, BIAS32, eps=1e-5), expected * WEIGHT + BIAS, atol=1e-5)
    np.testing.assert_allclose(layer_norm(X32, WEIGHT32, None, eps=1e-5), expected * WEIGHT, atol=1e-5)
    np.testing.assert_allclose(layer_norm(X32, None, None, eps=1e-5), expected, atol=1e-5)


def test_equal_torch():
    torch = pytest.importorskip("torch", reason="torch not installed: pip install llm_jax[parity]")
    x, weight, bias = (torch.tensor(np.asarray(a)) for a in (X32, WEIGHT32, BIAS32))
    expected = torch.nn.functional.layer_norm(x, (16,), weight, bias, 1e-5)
    np.testing.assert_allclose(layer_norm(X32, WEIGHT32, BIAS32, eps=1e-5), expected.numpy(), atol=1e-5)
    expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
    np.testing.assert_allclose(rms_norm(X32, WEIGHT32, eps=1e-5), expected.numpy(), atol=1e-5)


def test_invariance():
    """rms_norm forgets the scale of x, layer_norm also its mean."""
    np.testing.assert_allclose(rms_norm(8 * X32, None, eps=0.0), rms_norm(X32, None, eps=0.0), rtol=1e-5)
    np.testing.assert_allclose(
        layer_norm(8 * X32 + 3, None, None, eps=0.0), layer_norm(X32, None, None, eps=0.0), atol=1e-5
    )


@pytest.mark.parametrize("norm", [ops.rms_norm, lambda x, w, eps: ops.layer_norm(x, w, w, eps=eps)])
def test_bfloat16_is_rounded_only_at_the_end(norm):
    """Not compiled, because a compiler may keep float32 between bfloat16 ops by itself."""
    x, weight = X32.astype(jnp.bfloat16), WEIGHT32.astype(jnp.bfloat16)
    expected = norm(x.astype(jnp.float32), weight.astype(jnp.float32), eps=1e-5).astype(jnp.bfloat16)
    result = norm(x, weight, eps=1e-5)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("norm", [rms_norm, lambda x, w, eps: layer_norm(x, w, w, eps=eps)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)])
def test_dtype_jit_vmap(norm, dtype, tolerance):
    expected = norm(X32, WEIGHT32, eps=1e-5)
    one = lambda x: norm(x, WEIGHT32.astype(dtype), eps=1e-5)  # noqa: E731
    for result in (jax.jit(one)(X32.astype(dtype)), jax.vmap(jax.vmap(one))(X32.astype(dtype))):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=tolerance, rtol=tolerance)
