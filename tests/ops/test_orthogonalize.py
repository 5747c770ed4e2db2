import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.ops import orthogonalize

COEFFICIENTS = sys.modules["llm_jax.ops.orthogonalize"].COEFFICIENTS
# The odd quintic that is flattest at 1 (Higham 2008, "Functions of Matrices", eq. 8.20), after a few of the others.
CONVERGED = (*COEFFICIENTS, *[(15 / 8, -5 / 4, 3 / 8)] * 6)
SHAPES = [(24, 64), (64, 24), (32, 32), (3, 24, 64), (2, 3, 64, 24), (1, 5), (5, 1)]


def matrices(shape, smallest=0.02, seed=0):
    """Random orthogonal U and V around singular values from 1 down to `smallest`: (float32 matrices, U, S, V^T)."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    s = np.geomspace(1, smallest, min(shape[-2:]))
    return jnp.asarray((u * s) @ vt, jnp.float32), u, s, vt


def polynomials(x, coefficients=COEFFICIENTS):
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_polar_factor_of_a_float64_svd(shape):
    x, u, _, vt = matrices(shape)
    np.testing.assert_allclose(orthogonalize(x, coefficients=CONVERGED), u @ vt, atol=2e-5)
    # With the default coefficients a singular value may be 0.27 away from 1, so an entry too.
    np.testing.assert_allclose(orthogonalize(x), u @ vt, atol=0.27)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_singular_value_goes_through_the_polynomials_after_division_by_the_schatten_8_norm(shape):
    x, u, s, vt = matrices(shape)
    expected = (u * polynomials(s / np.sum(s**8) ** (1 / 8))) @ vt
    np.testing.assert_allclose(orthogonalize(x), expected, atol=5e-5)  # float32: 8 - 23.6 + 17.4 cancel


def test_singular_values_end_near_1_and_a_tiny_one_below():
    x, _, s, _ = matrices((64, 96), smallest=1e-5)
    bound = np.sum(s**8) ** (1 / 8)
    after = np.linalg.svd(np.asarray(orthogonalize(x)), compute_uv=False)
    within = (s / bound >= 0.01).sum()
    assert 20 < within < 60
    assert (np.sort(np.abs(after - 1))[:within] <= 0.2695).all()
    assert after.max() <= 1.2695 and after.min() < 0.01


def test_each_polynomial_is_the_best_on_the_interval_that_the_one_before_leaves():
    """Chebyshev: p is nearest to 1 on [low, high] when its error takes its largest size at four points in turn."""
    low, high = 0.01, 1.0
    for coefficients in COEFFICIENTS:
        x = np.linspace(low, high, 2_000_001)
        error = polynomials(x, [coefficients]) - 1
        turns = [0, *(np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1), len(x) - 1]
        largest = np.abs(error).max()
        np.testing.assert_allclose(error[turns], largest * np.array([-1, 1, -1, 1]), atol=1e-6)
        low, high = 1 - largest, 1 + largest
    assert 0.73 < low < 0.7306


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)], ids=str)
def test_equals_optax_when_given_the_same_coefficients(shape):
    """optax divides by the Frobenius norm: the first polynomial is stretched by the ratio of the norms."""
    x, _, s, _ = matrices(shape)
    theirs = [(3.4445, -4.7750, 2.0315)] * 5  # Keller Jordan's
    ratio = np.sum(s**8) ** (1 / 8) / np.sum(s**2) ** 0.5
    ours = [tuple(theirs[0] * ratio ** np.array([1, 3, 5])), *theirs[1:]]
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
    )
    expected, _ = muon.update(x, muon.init(x))
    np.testing.assert_allclose(orthogonalize(x, coefficients=ours), expected, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    x = matrices((24, 64))[0]
    np.testing.assert_allclose(orthogonalize(x * scale), orthogonalize(x), atol=1e-5)


def test_zeros_stay_zeros_beside_other_matrices_and_a_rank_of_1_is_kept():
    x = jnp.stack([jnp.zeros((4, 6)), jnp.outer(jnp.arange(1.0, 5), jnp.arange(1.0, 7))])
    zeros, one = orthogonalize(x)
    np.testing.assert_array_equal(zeros, 0)
    np.testing.assert_allclose(one, polynomials(1.0) * x[1] / jnp.linalg.norm(x[1]), atol=5e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_jit_vmap(dtype, jit):
    x = matrices((3, 2, 24, 64))[0].astype(dtype)
    function = jax.jit(orthogonalize) if jit else orthogonalize
    y = function(x)
    assert y.dtype == dtype and y.shape == x.shape
    # float32 inside: the result is the float32 one, rounded
    whole = orthogonalize(x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), whole, rtol=0.004, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(function)(x).astype(jnp.float32), whole, rtol=0.004, atol=1e-5)
    one_by_one = [[function(each) for each in row] for row in x]
    np.testing.assert_allclose(jnp.array(one_by_one).astype(jnp.float32), whole, rtol=0.004, atol=1e-5)
