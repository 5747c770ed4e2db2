"""The layers: linen modules that declare parameters and call `ops`, and the table of their parameters' axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llm_jax import ops, parallel, sharding
from llm_jax.config import ModelConfig

# Axis letters (ops/__init__.py; C is a learned position) of each parameter, by module and name. Blocks
# add a leading L. Shapes, weight decay and sharding all come from this table.
AXES = {
    "embed/tokens": "VD",
    "embed/positions": "CD",
    "attn_norm/weight": "D",
    "attn_norm/bias": "D",
    "attn/q": "DNH",
    "attn/k": "DKH",
    "attn/v": "DKH",
    "attn/o": "NHD",
    "attn/q_bias": "NH",
    "attn/k_bias": "KH",
    "attn/v_bias": "KH",
    "attn/o_bias": "D",
    "q_norm/weight": "H",
    "q_norm/bias": "H",
    "k_norm/weight": "H",
    "k_norm/bias": "H",
    "q_width_norm/weight": "NH",
    "q_width_norm/bias": "NH",
    "k_width_norm/weight": "KH",
    "k_width_norm/bias": "KH",
    "attn_post_norm/weight": "D",
    "attn_post_norm/bias": "D",
    "mlp_norm/weight": "D",
    "mlp_norm/bias": "D",
    "mlp_post_norm/weight": "D",
    "mlp_post_norm/bias": "D",
    "mlp/gate": "DF",
    "mlp/up": "DF",
    "mlp/down": "FD",
    "mlp/gate_bias": "F",
    "mlp/up_bias": "F",
    "mlp/down_bias": "D",
    "moe/router": "DE",
    "moe/gate": "EDF",
    "moe/up": "EDF",
    "moe/down": "EFD",
    "final_norm/weight": "D",
    "final_norm/bias": "D",
    "lm_head/weight": "VD",
}

LayerCache = ops.EmptyCache | ops.LayerCache | ops.TwoLevelCache


def axis_sizes(cfg: ModelConfig) -> dict[str, int]:
    return {
        "V": cfg.vocab_size,
        "C": cfg.block_size,
        "D": cfg.n_embd,
        "N": cfg.n_head,
        "K": cfg.n_kv_head,
        "H": cfg.head_dim,
        "F": cfg.mlp_dim,
        "L": cfg.n_layer,
        "E": cfg.n_expert,
    }


def _declare(module: nn.Module, name: str, init: nn.initializers.Initializer) -> Array | ops.DecodeWeight:
    """Declares a parameter with the shape that AXES gives it, and returns it in the compute dtype.

    A `DecodeWeight` in its place (decode_weights.py) is returned as it is.
    """
    cfg = module.cfg
    if module.has_variable("params", name) and isinstance(module.get_variable("params", name), ops.DecodeWeight):
        return module.get_variable("params", name)
    return module.param(name, init, _shape(module, name), cfg.param_dtype).astype(cfg.compute_dtype)


def _letters(module: nn.Module, name: str) -> str:
    return AXES[f"{module.name}/{name}"]


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    sizes = axis_sizes(module.cfg)
    return tuple(sizes[axis] for axis in _letters(module, name))


# GPT-2's: every matrix 0.02, the two that write to the residual stream smaller by the root of their number.
_MATRIX = nn.initializers.normal(0.02)


def _residual_matrix(cfg: ModelConfig) -> nn.initializers.Initializer:
    return nn.initializers.normal(0.02 / (2 * cfg.n_layer) ** 0.5)


# The backward pass computes cheap functions again from what goes into them, instead of keeping what comes out and
# what is on the way: GPT-2's block, 6 layers 128 wide, on 16 x 256 tokens takes 280 instead of 427 MiB, and is 1.05
# times as fast on two cores.
def _recomputed(cfg: ModelConfig, function: Callable[..., Array]) -> Callable[..., Array]:
    # In a scan over layers XLA cannot undo it, so nothing need be put in its way.
    return jax.checkpoint(function, prevent_cse=cfg.layer_execution != "scan")


def _norm_weight(module: nn.Module) -> Array:
    """What a norm multiplies by: 1 at first, whatever it is stored as."""
    offset = module.cfg.norm_weight_offset
    weight = _declare(module, "weight", nn.initializers.constant(1.0 - offset)).reshape(-1)  # of all heads as one
    # In float32, as the norm multiplies: near 0 a bfloat16 has digits that it has not near 1.
    return weight.astype(jnp.float32) + offset if offset else weight


class RMSNorm(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        weight = _norm_weight(self)
        return _recomputed(self.cfg, functools.partial(ops.rms_norm, eps=self.cfg.norm_eps))(x, weight)


class LayerNorm(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        weight = _norm_weight(self)
        bias = _declare(self, "bias", nn.initializers.zeros).reshape(-1) if self.cfg.use_bias else None
        return _recomputed(self.cfg, functools.partial(ops.layer_norm, eps=self.cfg.norm_eps))(x, weight, bias)


def norm(cfg: ModelConfig, name: str) -> nn.Module:
    return (RMSNorm if cfg.use_rmsnorm else LayerNorm)(cfg, name=name)


def _qk_norm(cfg: ModelConfig, heads: str, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    if cfg.qk_norm_axes == "head":
        return norm(cfg, f"{heads}_norm")(x)
    return norm(cfg, f"{heads}_width_norm")(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class LayerKind(NamedTuple):
    """What layers of one model differ in, and a program must know when it is compiled."""

    window: int  # tokens that it sees, itself included
    rope: str | None = "scaled"  # None | "scaled" | "local": by rope_local_theta


class Attention(nn.Module):
    """Grouped-query self-attention."""

    cfg: ModelConfig
    kind: LayerKind
    mesh: jax.sharding.Mesh | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cfg = self.cfg
        project = functools.partial(_project, self, mesh=self.mesh)
        q, k, v = project(x, "q", "k", "v", init=_MATRIX, use_bias=cfg.qkv_bias)
        if cfg.qk_norm:
            q, k = _qk_norm(cfg, "q", q), _qk_norm(cfg, "k", k)
        rotate = _rotation(cfg, self.kind, positions)
        q, turned = rotate(q, positions), rotate(k, positions)
        # With longrope a text that grows past the original length turns all keys anew: the cache has them unturned.
        turns_later = cfg.rope_scaling == "longrope"
        k = k if turns_later else turned
        if cfg.attn_scale is not None:  # attention multiplies by head_dim^-0.5
            q = q * jnp.asarray(cfg.attn_scale * cfg.head_dim**0.5, q.dtype)
        if cache is None or isinstance(cache, ops.EmptyCache):
            # A window no shorter than the text is no window, and lets attention take its fastest path.
            time = x.shape[1]  # of a program that is exported for any length it is no number
            window = None if isinstance(time, int) and time <= self.kind.window else self.kind.window
            how = dict(window=window, softcap=cfg.attn_softcap, implementation=cfg.attention)
            if self.mesh is None:
                out = ops.attention(q, turned, v, **how)
            else:
                out = parallel.attention(q, turned, v, mesh=self.mesh, **how)
            if cache is not None:
                cache = ops.fill_cache(cache, k, v, jnp.max(positions, axis=1) + 1)
        else:
            is_ring = isinstance(cache, ops.LayerCache)
            levels = ops.split_cache(cache, positions[:, 0], slots=x.shape[1]) if is_ring else cache
            levels, masks = ops.update_cache(levels, k, v, positions, window=self.kind.window)
            parts = [levels.ring, levels.recent]
            if turns_later:
                parts = [_turned(*each, rotate) for each in zip(parts, ops.cache_positions(levels), strict=True)]
            out = ops.cached_attention(q, parts, masks, softcap=cfg.attn_softcap)
            cache = ops.merge_cache(levels, jnp.max(positions, axis=1) + 1) if is_ring else levels
        out = project(out, "o", init=_residual_matrix(cfg), use_bias=cfg.attn_out_bias, inputs=2)[0]
        return out, cache


def _project(
    module: nn.Module,
    x: Array,
    *names: str,
    init: nn.initializers.Initializer,
    use_bias: bool,
    inputs: int = 1,
    mesh: jax.sharding.Mesh | None,
) -> list[Array]:
    """x times each parameter of `names`, over its first `inputs` axes, which are the last of x; plus its bias.

    Where decode_weights.py has joined the parameters, as one product.
    """
    cfg = module.cfg
    lead = x.shape[: x.ndim - inputs]
    rows = x.reshape(*lead, -1)
    shapes = [_shape(module, name)[inputs:] for name in names]
    widths = [math.prod(shape) for shape in shapes]
    if module.has_variable("params", joined(names)):
        matrix = module.get_variable("params", joined(names))
        ends = np.cumsum(widths)[:-1]
        products = jnp.split(ops.decode_linear(rows, matrix).astype(cfg.compute_dtype), ends, axis=-1)
    elif sharding.splits_model(mesh):
        weights = [_declare(module, name, init) for name in names]
        keeps_apart = cfg.layer_execution == "unrolled" and cfg.remat == "none"
        letters = [_letters(module, name) for name in names]
        products = parallel.linear(x, weights, letters=letters, inputs=inputs, mesh=mesh, keeps_apart=keeps_apart)
    else:
        products = [
            ops.linear(rows, _declare(module, name, init).reshape(-1, width))
            for name, width in zip(names, widths, strict=True)
        ]
    products = [
        checkpoint_name(product.reshape(*lead, *shape), parallel.PRODUCT)
        for product, shape in zip(products, shapes, strict=True)
    ]
    if not use_bias:
        return products
    zeros = nn.initializers.zeros
    return [y + _declare(module, f"{name}_bias", zeros) for y, name in zip(products, names, strict=True)]


def joined(names: Sequence[str]) -> str:
    """What parameters that decoding multiplies by at once are called: it has no other of that name."""
    return "decode_" + "_".join(names)


def _rotation(cfg: ModelConfig, kind: LayerKind, positions: Int[Array, "#B T"]) -> Callable[..., Array]:
    """(heads [B, X, N, H], positions [B, X]) -> the heads turned, as in texts whose last positions are these."""
    if kind.rope is None:
        return lambda heads, positions: heads
    with jax.ensure_compile_time_eval():
        if kind.rope == "local":
            inv_freq, scale = ops.rope_frequencies(cfg.rope_dim, cfg.rope_local_theta)
        elif cfg.rope_scaling == "longrope":
            (short, scale), (inv_freq, _) = (
                ops.rope_frequencies(cfg.rope_dim, cfg.rope_theta, _rope_scaling(cfg, divisors))
                for divisors in (cfg.rope_short_factors, cfg.rope_long_factors)
            )
        else:
            inv_freq, scale = ops.rope_frequencies(cfg.rope_dim, cfg.rope_theta, _rope_scaling(cfg))
    if cfg.rope_scaling == "longrope" and kind.rope == "scaled":
        is_long = jnp.max(positions, axis=1) >= cfg.rope_original_length
        inv_freq = jnp.where(is_long[:, None, None], inv_freq, short)
    return functools.partial(_rope, inv_freq=inv_freq, scale=scale)


def _rope(heads: Array, positions: Array, inv_freq: Array, scale: float) -> Array:
    return ops.rope(heads, positions, inv_freq, scale=scale)


def _turned(part: ops.LayerCache, positions: Int[Array, "B S"], rotate: Callable[..., Array]) -> ops.LayerCache:
    """With its keys turned, which were kept as they are."""
    k = part.k if part.k_scale is None else part.k * part.k_scale[:, :, None]
    return part._replace(k=rotate(k.transpose(0, 3, 1, 2), positions).transpose(0, 2, 3, 1), k_scale=None)


def _rope_scaling(cfg: ModelConfig, divisors: tuple[float, ...] = ()) -> ops.RopeScaling | None:
    if cfg.rope_scaling is None:
        return None
    return ops.RopeScaling(
        divisors=divisors,
        kind=cfg.rope_scaling,
        factor=cfg.rope_factor,
        original_length=cfg.rope_original_length,
        low_freq_factor=cfg.rope_low_freq_factor,
        high_freq_factor=cfg.rope_high_freq_factor,
        beta_fast=cfg.rope_beta_fast,
        beta_slow=cfg.rope_beta_slow,
        attention_factor=cfg.rope_attention_factor,
    )


def _gelu(x: Array) -> Array:
    """x times the normal distribution function, by erf as in PyTorch, with an absolute error of 1e-6.

    jax.nn.gelu takes erfc, which is exact in the left tail, and on a CPU core 2.9 instead of 1.1 ms for 2 million.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


# mlp -> (activation, whether a second "gate" projection goes through it and multiplies the first)
MLPS = {
    "gelu": (_gelu, False),
    "gelu_tanh": (functools.partial(jax.nn.gelu, approximate=True), False),
    "relu2": (lambda x: jnp.square(jax.nn.relu(x)), False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (functools.partial(jax.nn.gelu, approximate=True), True),
}


class MLP(nn.Module):
    cfg: ModelConfig
    mesh: jax.sharding.Mesh | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.cfg
        project = functools.partial(_project, self, use_bias=cfg.mlp_bias, mesh=self.mesh)
        hidden = _activated(cfg, *project(x, *_inner(cfg), init=_MATRIX))
        return project(hidden, "down", init=_residual_matrix(cfg))[0]


def _inner(cfg: ModelConfig) -> tuple[str, ...]:
    """The matrices before the activation."""
    return ("gate", "up") if MLPS[cfg.mlp][1] else ("up",)


def _activated(cfg: ModelConfig, *products: Array) -> Array:
    """Of the products with `_inner`."""
    activation, gated = MLPS[cfg.mlp]
    return _recomputed(cfg, (lambda gate, up: activation(gate) * up) if gated else activation)(*products)


class Experts(nn.Module):
    """A mixture of MLPs: each token goes through the few that a router chooses for it; none is dropped."""

    cfg: ModelConfig
    mesh: jax.sharding.Mesh | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.cfg
        inits = dict.fromkeys(_inner(cfg), _MATRIX) | {"down": _residual_matrix(cfg)}
        weights = {name: _declare(self, name, init) for name, init in inits.items()}
        router = _declare(self, "router", _MATRIX)

        def mlp(product: Callable[..., Array], rows: Array, weights: dict[str, Array]) -> Array:
            def named(rows: Array, name: str) -> Array:
                return checkpoint_name(product(rows, weights[name]), parallel.PRODUCT)

            return named(_activated(cfg, *(named(rows, name) for name in _inner(cfg))), "down")

        how = dict(k=cfg.n_expert_per_token, normalize=cfg.normalize_experts)
        if sharding.splits_model(self.mesh):
            return parallel.experts(x, router, weights, mlp, mesh=self.mesh, **how)
        rows = x.reshape(-1, cfg.n_embd)
        y = ops.mix_experts(rows, ops.linear(rows, router), weights, mlp, **how)
        return y.astype(x.dtype).reshape(x.shape)


class Block(nn.Module):
    """Residual block: attention, then an MLP or experts, or both at once; with norms before or after each."""

    cfg: ModelConfig
    kind: LayerKind
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        cache: LayerCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cfg = self.cfg
        dropout = nn.Dropout(cfg.dropout, deterministic=deterministic)

        def before(name: str, x: Array) -> Array:
            return x if cfg.norm_placement == "post" else norm(cfg, f"{name}_norm")(x)

        def after(name: str, update: Array) -> Array:
            return dropout(update if cfg.norm_placement == "pre" else norm(cfg, f"{name}_post_norm")(update))

        update, cache = Attention(cfg, self.kind, self.mesh, name="attn")(before("attn", x), positions, cache)
        attended = x + after("attn", update)
        mlp_input = before("mlp", x if cfg.parallel_residual else attended)
        mlp = MLP(cfg, self.mesh, name="mlp") if cfg.n_expert is None else Experts(cfg, self.mesh, name="moe")
        return attended + after("mlp", mlp(mlp_input)), cache


class Embed(nn.Module):
    cfg: ModelConfig
    mesh: jax.sharding.Mesh | None

    def setup(self) -> None:
        self.tokens = _declare(self, "tokens", _MATRIX)
        if not self.cfg.use_rope:
            self.positions = _declare(self, "positions", _MATRIX)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        if isinstance(self.tokens, ops.DecodeWeight):
            x = ops.decode_embed(tokens, self.tokens).astype(self.cfg.compute_dtype)
        elif sharding.splits_model(self.mesh):
            x = parallel.embed(self.tokens, tokens, mesh=self.mesh)
        else:
            x = self.tokens[tokens]
        if self.cfg.embed_scale != 1:
            x = x * jnp.asarray(self.cfg.embed_scale, x.dtype)
        return x if self.cfg.use_rope else x + self.positions[positions]


class Head(nn.Module):
    """An output projection of its own, for `tie_embeddings=False`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "V D"] | ops.DecodeWeight:
        return _declare(self, "weight", _MATRIX)
