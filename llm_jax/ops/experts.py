"""A mixture of experts: which experts each token goes to, and products of rows with their own expert's weights.

No token is dropped: rows are sorted by expert, and experts take as many as come.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

LARGEST_BLOCK = 128  # rows that are multiplied at once


def route(logits: Float[Array, "M E"], *, k: int, normalize: bool) -> tuple[Float32[Array, "M k"], Int[Array, "M k"]]:
    """(weights, experts): the k likeliest experts of each token, with their probabilities among all E.

    normalize: so that the k make 1. Jiang et al. 2024, "Mixtral of Experts"; without, as in OLMoE.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), k)
    return weights / jnp.sum(weights, axis=-1, keepdims=True) if normalize else weights, experts


def sort_by_expert(experts: Int[Array, "M k"], n_expert: int) -> tuple[Int[Array, "Mk"], Int[Array, "E"]]:
    """(places, counts): the order of the M k choices by expert, as indices of the flat ones; the number of each."""
    flat = experts.reshape(-1)
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=n_expert)


def grouped_linear(
    x: Float[Array, "M D"], weights: Float[Array, "E D F"], counts: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """The first counts[0] rows of x times weights[0], the next counts[1] times weights[1], and so on; they sum to M.

    On a CPU in blocks of rows, where `jax.lax.ragged_dot` multiplies every row by every expert. Reverse mode only.
    """
    return jax.lax.platform_dependent(
        x, weights, counts, cpu=_in_blocks, default=functools.partial(_ragged, precision=jax.lax.Precision.HIGHEST)
    )


def mix_experts(
    x: Float[Array, "M D"],
    logits: Float[Array, "M E"],
    weights: Any,
    mlp: Callable[..., Float[Array, "_ D"]],
    *,
    k: int,
    normalize: bool,
    first: int | Int[Array, ""] = 0,
    count: int | None = None,
) -> Float32[Array, "M D"]:
    """sum_j w_j mlp_j(x) over the k experts j that the router's logits choose for each row, w as of `route`.

    Args:
        mlp: (product, rows, weights) -> rows, where `product(rows, weight)` takes each row times its expert's part of
            a weight with a leading axis of experts.
        first, count: the experts whose weights these are; choices of others add nothing. None: all.
    """
    shares, chosen = route(logits, k=k, normalize=normalize)
    every = count is None
    count = logits.shape[1] if every else count
    if not every:  # choices of others go behind all of these, as one more expert's
        chosen = jnp.where((chosen >= first) & (chosen < first + count), chosen - first, count)
    places, counts = sort_by_expert(chosen, count + (not every))
    counts = counts[:count]
    is_here = jnp.arange(len(places))[:, None] < jnp.sum(counts)

    def masked(rows: Array) -> Array:
        return rows if every else jnp.where(is_here, rows, 0)

    out = masked(mlp(lambda rows, weight: grouped_linear(masked(rows), weight, counts), x[places // k], weights))
    out = out[jnp.argsort(places)].reshape(*shares.shape, -1)
    return jnp.sum(out.astype(jnp.float32) * shares[..., None], axis=1)


def _ragged(x, weights, counts, *, precision):
    # TPUs' kernel takes no precision beyond bfloat16's of bfloat16.
    precision = precision if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(x, weights, counts.astype(jnp.int32), precision=precision)


def _block_rows(rows: int, n_expert: int) -> int:
    """A power of two near an expert's share: larger blocks are mostly padding, smaller ones read weights again."""
    share = max(1, rows // n_expert)
    return min(LARGEST_BLOCK, 1 << (share - 1).bit_length())


def _blocks(rows: int, counts: Int[Array, "E"]) -> tuple[int, Int[Array, "n"], Int[Array, "n"], Int[Array, "n"]]:
    """(rows of a block; and of each block its expert, its first row, and how many rows are the expert's).

    As many blocks as can be needed; those that are not begin behind the last row.
    """
    n_expert = counts.shape[0]
    size = _block_rows(rows, n_expert)
    number = rows // size + min(n_expert, rows)
    blocks = -(-counts // size)
    ends, row_ends = jnp.cumsum(blocks), jnp.cumsum(counts)
    block = jnp.arange(number)
    expert = jnp.minimum(jnp.searchsorted(ends, block, side="right"), n_expert - 1)
    offset = (block - (ends - blocks)[expert]) * size
    first = jnp.where(block < ends[-1], (row_ends - counts)[expert] + offset, rows)
    return size, expert, first, jnp.clip(row_ends[expert] - first, 0, size)


@jax.custom_vjp
def _in_blocks(x, weights, counts):
    return _products(x, weights, counts, transposed=False)


def _products(x, weights, counts, *, transposed):
    """Rows times their expert's weights, or times what those are transposed."""
    rows, width = x.shape[0], weights.shape[1 if transposed else 2]
    size, experts, firsts, _ = _blocks(rows, counts)
    x = jnp.pad(x, ((0, size), (0, 0)))
    equation = "mf,df->md" if transposed else "md,df->mf"

    def step(out, block):
        expert, first = block
        here = jax.lax.dynamic_slice_in_dim(x, first, size)
        product = jnp.einsum(equation, here, weights[expert], precision=jax.lax.Precision.HIGHEST)
        # Rows behind the expert's own are written again by the next block.
        return jax.lax.dynamic_update_slice_in_dim(out, product, first, 0), None

    out, _ = jax.lax.scan(step, jnp.zeros((rows + size, width), x.dtype), (experts, firsts))
    return out[:rows]


def _forward(x, weights, counts):
    return _in_blocks(x, weights, counts), (x, weights, counts)


def _backward(residuals, d_out):
    x, weights, counts = residuals
    d_x = _products(d_out, weights, counts, transposed=True)
    size, experts, firsts, owned = _blocks(x.shape[0], counts)
    x, d_out = (jnp.pad(each, ((0, size), (0, 0))) for each in (x, d_out))

    def step(d_weights, block):
        expert, first, own = block
        here = jnp.where(jnp.arange(size)[:, None] < own, jax.lax.dynamic_slice_in_dim(x, first, size), 0)
        d_here = jax.lax.dynamic_slice_in_dim(d_out, first, size)
        product = jnp.einsum(
            "md,mf->df",
            here,
            d_here,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return d_weights.at[expert].add(product), None

    d_weights, _ = jax.lax.scan(step, jnp.zeros(weights.shape, jnp.float32), (experts, firsts, owned))
    return d_x.astype(x.dtype), d_weights.astype(weights.dtype), np.zeros(counts.shape, jax.dtypes.float0)


_in_blocks.defvjp(_forward, _backward)
