"""Weights laid out for decoding are the same model; rounded to int8, nearly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import decode_weights, model, ops
from llm_jax.config_rules import freeze

SHAPE = dict(n_embd=32, n_head=4, n_kv_head=2, n_layer=2, block_size=32, vocab_size=50)


def make(**values):
    cfg = freeze({"model": SHAPE | values}).model
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), model.param_shapes(cfg)
    )


def logits(cfg, params):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (3, 12)))
    return np.asarray(jax.jit(model.Transformer(cfg).apply)({"params": params}, tokens)[0])


@pytest.mark.parametrize(
    "values",
    [
        dict(),
        dict(use_rope=False, use_rmsnorm=False, use_bias=True, mlp="gelu"),
        dict(tie_embeddings=False, qk_norm=True, mlp="geglu", layer_types=("sliding", "full"), window=5),
        dict(qk_norm=True, qk_norm_axes="width", norm_placement="post", qkv_bias=True, embed_scale=2.0),
    ],
    ids=lambda values: ",".join(values) or "default",
)
def test_laid_out_weights_are_the_same_model(values):
    cfg, params = make(**values)
    laid_out = decode_weights.lay_out(cfg, params)
    np.testing.assert_allclose(logits(cfg, laid_out), logits(cfg, params), rtol=1e-4, atol=1e-4)
    matrices = [leaf for leaf in jax.tree.leaves(laid_out["blocks"]) if leaf.ndim == 2 and min(leaf.shape) >= 32]
    gated = cfg.mlp in ("swiglu", "geglu")
    assert len(matrices) == 4 * cfg.n_layer
    # q, k and v in one, gate and up in one.
    assert {leaf.shape[0] for leaf in matrices} == {64, 32, (1 + gated) * cfg.mlp_dim}


def test_tied_embeddings_are_not_copied():
    cfg, params = make()
    laid_out = decode_weights.lay_out(cfg, params)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(laid_out) == size(params)
    assert laid_out["embed"]["tokens"].weight is params["embed"]["tokens"]


def test_int8_rounds_each_output_by_its_own_scale():
    weight = jnp.asarray(np.random.default_rng(0).normal(0, [[1.0], [100.0], [0.0]], (3, 64)), jnp.float32)
    matrix = ops.quantize(weight)
    assert matrix.weight.dtype == jnp.int8 and matrix.scale.shape == (3,)
    restored = np.asarray(matrix.weight) * np.asarray(matrix.scale)[:, None]
    assert (np.abs(restored - weight) <= np.asarray(matrix.scale)[:, None] / 2 * 1.0001).all()
    np.testing.assert_array_equal(restored[2], 0)
    np.testing.assert_allclose(ops.decode_embed(jnp.array([1, 0]), matrix), restored[[1, 0]], rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_int8_products_are_those_of_the_rounded_operands(rows):
    rng = np.random.default_rng(rows)
    weight, x = rng.normal(size=(48, 64)).astype(np.float32), rng.normal(size=(rows, 1, 64)).astype(np.float32)
    x[0] *= 1000
    matrix = ops.quantize(jnp.asarray(weight))
    scale = np.abs(x).max(-1, keepdims=True) / 127
    exact = np.round(x / scale) * scale @ (np.asarray(matrix.weight) * np.asarray(matrix.scale)[:, None]).T
    np.testing.assert_allclose(ops.decode_linear(jnp.asarray(x), matrix), exact, rtol=1e-4, atol=1e-3)
    # And within what rounding both costs of the product itself.
    error = np.abs(np.asarray(ops.decode_linear(jnp.asarray(x), matrix)) - x @ weight.T).max((1, 2))
    assert (error < 0.02 * np.abs(x @ weight.T).max((1, 2))).all() and (error > 0).all()


def test_int8_logits_are_near():
    cfg, params = make()
    expected = logits(cfg, params)
    difference = np.abs(logits(cfg, decode_weights.lay_out(cfg, params, int8=True)) - expected)
    assert 0 < difference.max() < 0.1 * np.abs(expected).max()
    laid_out = decode_weights.lay_out(cfg, params, int8=True)
    matrices = [leaf for leaf in jax.tree.leaves(laid_out) if leaf.ndim == 2]
    assert all(leaf.dtype == jnp.int8 for leaf in matrices)
