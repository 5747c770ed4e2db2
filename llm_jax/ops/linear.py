"""A product with a weight matrix."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(x: Float[Array, "*B D"], weight: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """x @ weight in their dtype; f32 operands are multiplied as f32 on every platform.

    Reverse mode only: for JAX's own gradient, in the training step of GPT-2's block, XLA's CPU backend writes d_out
    of 4096 x 512 transposed, and multiplies that by slower code: 21 instead of 4 ms on one core.
    """
    *lead, width = x.shape
    return _product(x.reshape(math.prod(lead), width), weight).reshape(*lead, weight.shape[1])


@jax.custom_vjp
def _product(rows, weight):
    return jnp.matmul(rows, weight, precision=jax.lax.Precision.HIGHEST)


def _forward(rows, weight):
    return _product(rows, weight), (rows, weight)


def _backward(residuals, d_out):
    rows, weight = residuals
    if weight.shape[0] <= weight.shape[1]:
        d_weight = _over_rows(rows, d_out)
    else:  # the wider operand second: 120 instead of 80 GFLOP/s on a CPU core for [512, 128]
        d_weight = _transposed(_over_rows(d_out, rows))
    d_rows = jnp.matmul(d_out, weight.T, precision=jax.lax.Precision.HIGHEST)
    return d_rows.astype(rows.dtype), d_weight.astype(weight.dtype)


def _over_rows(a, b):
    return jnp.einsum("bd,bf->df", a, b, precision=jax.lax.Precision.HIGHEST)


def _transposed(x):
    """For a CPU behind a barrier: XLA would turn the product around instead."""
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(x).T, default=jnp.transpose)


_product.defvjp(_forward, _backward)
