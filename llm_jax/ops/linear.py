"""Products with a weight matrix: for training, and for decoding from weights that are laid out for it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


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


class DecodeWeight(NamedTuple):
    """A weight matrix as decoding reads it, a row of inputs for each output; int8 rows are multiples of a scale.

    On two CPU cores one row of x times such a matrix reads 22 GB/s, times its transpose 14.
    """

    weight: Float[Array, "F D"] | Int8[Array, "F D"]
    scale: Float[Array, "F"] | None = None


def decode_linear(x: Float[Array, "*B D"], matrix: DecodeWeight) -> Float[Array, "*B F"]:
    """x @ weight.T in float32. With int8 weights each row of x is rounded to int8 too, by its own scale.

    Reverse mode through int8 is zero.
    """
    *lead, width = x.shape
    rows = x.reshape(-1, width)
    if matrix.scale is None:
        out = _by_outputs(matrix.weight, rows, jnp.float32, jax.lax.Precision.HIGHEST)
    else:
        count = rows.shape[0]
        rows, scale = _int8_rows(rows)
        # XLA's CPU backend has an int8 kernel for two rows and more: 9 instead of 140 ms for 106 million weights.
        rows = jnp.pad(rows, ((0, 0 if isinstance(count, int) and count > 1 else 1), (0, 0)))
        if rows.shape[0] in (2, 3, 4):  # 3072 x 576 weights and two rows on two Zen 4 cores: 12 instead of 9 GB/s
            out = jnp.einsum("bd,fd->bf", rows, matrix.weight, preferred_element_type=jnp.int32)
        else:
            out = _by_outputs(matrix.weight, rows, jnp.int32, None)
        out = out[:count]
        out = out.astype(jnp.float32) * scale[:, None] * matrix.scale
    return out.reshape(*lead, matrix.weight.shape[0])


def decode_embed(tokens: Int[Array, "*B"], matrix: DecodeWeight) -> Float[Array, "*B D"]:
    """The rows of `tokens`."""
    rows = matrix.weight[tokens]
    return rows if matrix.scale is None else rows.astype(jnp.float32) * matrix.scale[tokens][..., None]


def quantize(weight: Float[Array, "F D"]) -> DecodeWeight:
    """To int8, each output's row by the scale of its largest weight."""
    return DecodeWeight(*_int8_rows(weight))


def _by_outputs(weight, rows, dtype, precision):
    # As it stands: XLA's CPU backend would turn the product around and pack the weights, 12.9 instead of 14.5 GB/s
    # for 8 rows.
    return _transposed(jnp.einsum("fd,bd->fb", weight, rows, precision=precision, preferred_element_type=dtype))


def _int8_rows(x: Float[Array, "B D"]) -> tuple[Int8[Array, "B D"], Float[Array, "B"]]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1.0)[:, None]).astype(jnp.int8), scale
