"""Parameters laid out for decoding: a tree per layer, every matrix as `ops.DecodeWeight`, in the compute dtype."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax import layers, model, ops
from llm_jax.config import ModelConfig

# Module -> matrices that are multiplied by at once. On a CPU a product with a small matrix takes one core.
PRODUCTS = {"attn": [("q", "k", "v"), ("o",)], "mlp": [("gate", "up"), ("up",), ("down",)]}


def lay_out(cfg: ModelConfig, params: model.Params, *, int8: bool = False) -> model.Params:
    """What `model.Transformer` takes in the place of `params`, and decodes with faster.

    int8: matrices rounded to int8, each output by its own scale. Embeddings that are tied to the output are one
    matrix, with nothing copied where their dtype is the compute dtype.
    """
    laid_out = {name: jax.tree.map(jnp.asarray, tree) for name, tree in params.items() if name != "blocks"}
    laid_out["embed"] = laid_out["embed"] | {"tokens": _quantized_or_cast(cfg, int8, laid_out["embed"]["tokens"])}
    if "lm_head" in params:
        laid_out["lm_head"] = {"weight": _quantized_or_cast(cfg, int8, laid_out["lm_head"]["weight"])}
    laid_out["blocks"] = tuple(_layer(cfg, int8, params["blocks"], layer) for layer in range(cfg.n_layer))
    return laid_out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(cfg: ModelConfig, int8: bool, blocks: model.Params, layer: Array) -> model.Params:
    laid_out = jax.tree.map(lambda leaf: leaf[layer], blocks)
    for module, products in PRODUCTS.items():
        for names in products:
            if not set(names) <= laid_out.get(module, {}).keys():
                continue  # an MLP without gate; joined already; experts, which lie as they are
            matrices = [laid_out[module].pop(name) for name in names]
            # The model's width D is on one side: the inputs where it comes first.
            inputs = -1 if names in (("o",), ("down",)) else 0
            flat = [m.reshape(-1, m.shape[-1]) if inputs else m.reshape(m.shape[0], -1) for m in matrices]
            joined = jnp.concatenate([matrix.T for matrix in flat])
            laid_out[module][layers.joined(names)] = _quantized_or_cast(cfg, int8, joined)
    return laid_out


def _quantized_or_cast(cfg: ModelConfig, int8: bool, matrix: Array) -> ops.DecodeWeight:
    return jax.jit(ops.quantize)(matrix) if int8 else ops.DecodeWeight(matrix.astype(cfg.compute_dtype))
