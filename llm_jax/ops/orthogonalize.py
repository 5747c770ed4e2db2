"""The nearest orthogonal matrix, by products alone: what Muon does to a momentum."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (a, b, c) of each odd polynomial p(x) = a x + b x^3 + c x^5, applied in turn to every singular value. Each is
# the best for the interval that the one before leaves, the first for [0.01, 1]: its largest |p(x) - 1| is the
# least possible (Amsel et al. 2025, "The Polar Express", arXiv 2505.16932; there from 0.001). In a training of
# shakespeare_char_cpu 2 % of the momentum's singular values per head and 4 to 17 % of an MLP matrix are below
# 0.01, and a fourth polynomial, from 0.003, gave the same loss.
COEFFICIENTS = (
    (8.09336851, -23.6204303, 17.4461517),
    (3.63658555, -2.72192675, 0.536546288),
    (2.66129999, -1.97715452, 0.452616407),
)


def orthogonalize(
    x: Float[Array, "*B M N"], *, coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS
) -> Float[Array, "*B M N"]:
    """U V^T of each matrix U S V^T, to the accuracy of the polynomials; a zero matrix stays zero.

    The polynomials see every singular value divided by an upper bound of the largest, the Schatten 8-norm,
    which is at most min(M, N)^(1/8) times too large (Grishina et al. 2025, arXiv 2506.10935, use the 4-norm).
    With the default coefficients a singular value of at least 0.01 of that bound ends within 0.73 to 1.27, and a
    smaller one is multiplied by at most 78.

    All but the first and the last product are of min(M, N)^2 matrices: x = f(x x^T) x, and each polynomial acts
    on the Gram matrix (there, appendix F). That needs float32 products, whatever the dtype of x.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, coefficients=coefficients).mT
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    size = x.shape[-2]
    # By the largest entry first: squares of gradients of 1e-20 are zero in float32.
    peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True).astype(jnp.float32)
    y = x.astype(jnp.float32) / jnp.where(peak == 0, 1, peak)
    gram = dot(y, y.mT)
    trace = jnp.maximum(jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None], 1)  # below 1 only for zeros
    gram = gram / trace
    square = dot(gram, gram)
    # For eigenvalues that sum to 1, the norm is at least size^-1.5.
    bound = jnp.sqrt(jnp.maximum(jnp.linalg.norm(square, axis=(-2, -1), keepdims=True), size**-1.5))
    gram, square = gram / bound, square / bound**2
    for i, (a, b, c) in enumerate(coefficients):
        square = dot(gram, gram) if i else square
        polynomial = a * jnp.eye(size) + b * gram + c * square
        factor = dot(polynomial, factor) if i else polynomial
        if i < len(coefficients) - 1:
            gram = dot(polynomial, dot(gram, polynomial))
    return dot(factor / jnp.sqrt(trace * bound), y).astype(x.dtype)
