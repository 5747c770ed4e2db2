"""ops/linear.py against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops


def arrays(dtype=jnp.float32, widths=(3, 4)):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, widths[0]), widths, (2, 5, widths[1])
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def test_linear_is_numpys_product():
    x, weight, _ = arrays()
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(ops.linear(x, weight), expected, rtol=1e-6, atol=1e-6)
    assert ops.linear(x[0, 0], weight).shape == (4,) and ops.linear(x[:0], weight).shape == (0, 5, 4)


@pytest.mark.parametrize("widths", [(3, 4), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_gradient_is_the_products(dtype, widths):
    x, weight, d_out = arrays(dtype, widths)
    out, vjp = jax.vjp(jax.jit(ops.linear), x, weight)
    x64, weight64, d_out64 = (np.asarray(each, np.float64) for each in (x, weight, d_out))
    expected = x64 @ weight64, d_out64 @ weight64.T, np.einsum("btd,btf->df", x64, d_out64)
    # The order of sums in f32; then, of bfloat16, one rounding. (jax 0.12's own einsum sums d_weight in bfloat16.)
    rtol = 0 if dtype == jnp.float32 else 2**-8
    for a, b in zip((out, *vjp(d_out)), expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=2e-6)


def test_linear_gradient_has_each_operands_own_dtype():
    x, weight, _ = arrays()
    grads = jax.grad(lambda x, weight: ops.linear(x, weight).sum(), argnums=(0, 1))(x, weight.astype(jnp.bfloat16))
    assert [each.dtype for each in grads] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("widths", [(3, 4), (4, 3)], ids=str)
def test_linear_under_vmap(widths):
    x, weight, d_out = arrays(widths=widths)
    weights = jnp.stack([weight, 2 * weight])
    out, vjp = jax.vjp(jax.vmap(ops.linear), x, weights)
    np.testing.assert_allclose(out, jnp.einsum("btd,bdf->btf", x, weights), rtol=1e-5, atol=1e-6)
    expected = jnp.einsum("btd,btf->bdf", x, d_out)
    np.testing.assert_allclose(vjp(d_out)[1], expected, rtol=1e-5, atol=1e-6)


def test_linear_has_no_large_operand_transposed():
    """Of a two-layer network [300, 16] -> [300, 64] -> [300, 16], as XLA's CPU backend compiles its gradient."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 100, 16), (16, 64), (64, 16))]

    def compiled(product):
        def loss(x, up, down):
            return jnp.sum(jnp.sin(product(jnp.sin(product(x, up)), down)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text()

    transposed = r"f32\[64,300\]|f32\[300,64\]\{0,1"
    assert re.search(transposed, compiled(lambda x, weight: jnp.einsum("btd,df->btf", x, weight)))
    assert not re.search(transposed, compiled(ops.linear))
