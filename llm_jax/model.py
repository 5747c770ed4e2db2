"""The network: one Transformer for every family, made of `layers`; its parameters, its caches, its arithmetic.

Parameters of all blocks are stacked on a leading layer axis. How the layers are executed, a scan or
an unrolled loop, does not change them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax import ops, parallel, sharding
from llm_jax.config import ModelConfig
from llm_jax.layers import AXES, Block, Embed, Head, LayerCache, LayerKind, norm

Params = dict[str, Any]  # {"embed", "blocks", "final_norm", "lm_head"?}; every leaf of blocks starts with L
Cache = tuple[LayerCache, ...]  # one per layer


def layer_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """Of one period of layers; the last one may be cut by n_layer."""
    kinds = []
    for layer in range(min(cfg.n_layer, math.lcm(len(cfg.layer_types), len(cfg.rope_layers)))):
        slides = cfg.layer_types[layer % len(cfg.layer_types)] == "sliding"
        rope = "local" if slides and cfg.rope_local_theta is not None else "scaled"
        if not (cfg.use_rope and cfg.rope_layers[layer % len(cfg.rope_layers)]):
            rope = None
        kinds.append(LayerKind(min(cfg.window, cfg.block_size) if slides else cfg.block_size, rope))
    return tuple(kinds)


def _by_layer(cfg: ModelConfig) -> list[LayerKind]:
    kinds = layer_kinds(cfg)
    return [kinds[layer % len(kinds)] for layer in range(cfg.n_layer)]


class Transformer(nn.Module):
    """Decoder-only transformer: `apply({"params": params}, tokens) -> (float32 logits, None)`.

    `apply(..., method="hidden")` stops before the logits, for a loss that never holds all of them.

    With `use_rope`, a text longer than `block_size` is attended with a window of `block_size`; learned
    positions have no row for it, and it is a ValueError.

    Args:
        mesh: where it will run, texts and parameters split as `sharding` says; None: on the default device.

    Args of a call:
        tokens: ids below vocab_size.
        positions: of each token in its own text; None: 0..T-1. Negative: padding, which a cache ignores.
        cache: from `init_cache`, for a prompt that is padded on the right, or what an earlier call returned, for
            the tokens that follow; keys and values are added to it, and the new cache is returned.
        deterministic: False drops activations out, with the "dropout" rng.
    """

    cfg: ModelConfig
    mesh: jax.sharding.Mesh | None = None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        hidden, output, cache = self.hidden(tokens, positions, cache, deterministic=deterministic)
        return output_logits(self.cfg, hidden, output), cache

    @nn.compact
    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"] | ops.DecodeWeight, Cache | None]:
        """(x after the final norm, the matrix W of logits = final_softcap(x W^T), cache)."""
        cfg = self.cfg
        if positions is None:
            if not cfg.use_rope and tokens.shape[1] > cfg.block_size:
                raise ValueError(f"{tokens.shape[1]} tokens are more than the {cfg.block_size} learned positions")
            with jax.ensure_compile_time_eval():  # known numbers: `ops.rope` makes a table of them, one for all texts
                positions = jnp.arange(tokens.shape[1])[None]
            if cache is not None:
                positions = jnp.broadcast_to(positions, tokens.shape)
        embed = Embed(cfg, self.mesh, name="embed")
        x = nn.Dropout(cfg.dropout, deterministic=deterministic)(embed(tokens, positions))
        # One pytree for all blocks, so that a caller may also pass a tuple of per-layer trees (`split_layers`):
        # decoding then reads each layer's weights where they lie, instead of slicing the stack for every token.
        if self.has_variable("params", "blocks"):
            blocks = self.get_variable("params", "blocks")
        else:
            blocks = self.param("blocks", functools.partial(_init_blocks, cfg))
        dropout_key = None if deterministic or not cfg.dropout else self.make_rng("dropout")
        x, cache = _run_blocks(cfg, self.mesh, blocks, x, positions, cache, dropout_key)
        x = norm(cfg, "final_norm")(x)
        return x, embed.tokens if cfg.tie_embeddings else Head(cfg, name="lm_head")(), cache


def output_logits(
    cfg: ModelConfig, hidden: Float[Array, "B T D"], output: Float[Array, "V D"] | ops.DecodeWeight
) -> Float[Array, "B T V"]:
    """The float32 logits of what `Transformer.hidden` returns."""
    if isinstance(output, ops.DecodeWeight):
        logits = ops.decode_linear(hidden, output)
    else:
        logits = ops.einsum_f32("btd,vd->btv", hidden, output)
    return logits if cfg.final_softcap is None else cfg.final_softcap * jnp.tanh(logits / cfg.final_softcap)


def for_mesh(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> ModelConfig:
    """Replaces "auto" in layer_execution by what is best where a training step will run.

    On a CPU an unrolled step takes 0.85 of a scanned one's time and compiles as fast (6 layers, 128 wide);
    on accelerators a scan keeps compile time independent of depth. And of weights that are gathered for each layer, a
    scan holds one layer's; of unrolled layers XLA's CPU backend gathers them once, and keeps all until the gradient.
    """
    if cfg.layer_execution != "auto":
        return cfg
    unrolls = sharding.is_cpu(mesh) and not sharding.splits_model(mesh)
    return dataclasses.replace(cfg, layer_execution="unrolled" if unrolls else "scan")


def layer_windows(cfg: ModelConfig) -> list[int]:
    """How many tokens each layer sees, itself included."""
    return [kind.window for kind in _by_layer(cfg)]


def _init_blocks(cfg: ModelConfig, key: Array) -> Params:
    def init(key: Array) -> Params:
        x = jnp.zeros((1, 1, cfg.n_embd), cfg.compute_dtype)
        return Block(cfg, layer_kinds(cfg)[0]).init(key, x, jnp.zeros((1, 1), jnp.int32))["params"]

    return jax.vmap(init)(jax.random.split(key, cfg.n_layer))


def _run_blocks(
    cfg: ModelConfig,
    mesh: jax.sharding.Mesh | None,
    blocks: Params | tuple[Params, ...],
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"],
    cache: Cache | None,
    dropout_key: Array | None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    kinds = layer_kinds(cfg)
    layers = jnp.arange(cfg.n_layer)

    def block(kind: LayerKind, params: Params, layer: Array | int, x: Array, cache: Any = None) -> tuple[Array, Any]:
        rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, layer)}
        x, cache = Block(cfg, kind, mesh).apply(
            {"params": params}, x, positions, cache, deterministic=dropout_key is None, rngs=rngs
        )
        return (parallel.constrain(x, mesh) if sharding.splits_model(mesh) else x), cache

    if cache is not None:
        trees = blocks if isinstance(blocks, tuple) else split_layers(blocks, cfg.n_layer)
        new_cache = []
        for layer, params in enumerate(trees):
            x, layer_cache = block(kinds[layer % len(kinds)], params, layer, x, cache[layer])
            new_cache.append(layer_cache)
        return x, tuple(new_cache)

    if cfg.remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(parallel.PRODUCT) if cfg.remat == "dots" else None
        block = jax.checkpoint(block, policy=policy, static_argnums=0)

    def period(x: Array, xs: tuple[Params, Array]) -> tuple[Array, None]:
        params, layers = xs
        for i, kind in enumerate(kinds[: len(layers)]):  # the last period may be cut
            x, _ = block(kind, jax.tree.map(lambda leaf: leaf[i], params), layers[i], x)  # noqa: B023
        return x, None

    if isinstance(blocks, tuple):
        for layer, params in enumerate(blocks):
            x, _ = block(kinds[layer % len(kinds)], params, layer, x)
        return x, None
    n_periods, rest = divmod(cfg.n_layer, len(kinds))
    whole = jax.tree.map(
        lambda leaf: leaf[: cfg.n_layer - rest].reshape(n_periods, len(kinds), *leaf.shape[1:]), (blocks, layers)
    )
    x, _ = jax.lax.scan(period, x, whole, unroll=n_periods if cfg.layer_execution == "unrolled" else 1)
    if rest:
        x, _ = period(x, jax.tree.map(lambda leaf: leaf[-rest:], (blocks, layers)))
    return x, None


def split_layers(blocks: Params, n_layer: int) -> tuple[Params, ...]:
    """The stacked blocks as one tree per layer."""
    return tuple(jax.tree.map(lambda leaf: leaf[layer], blocks) for layer in range(n_layer))


def init_params(cfg: ModelConfig, key: Array) -> Params:
    """Fresh parameters in `param_dtype`; jit it with `static_argnums=0`."""
    return Transformer(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_cache(cfg: ModelConfig, batch: int, length: int, *, dtype: Any = None) -> Cache:
    """An empty cache for `length` tokens a row, per layer no longer than its window; `batch` is the prompt's.

    Args:
        dtype: of keys and values, int8 included; None: compute_dtype.
    """
    dtype = cfg.compute_dtype if dtype is None else dtype
    return tuple(ops.EmptyCache(min(length, window), dtype) for window in layer_windows(cfg))


def grow_cache(cache: Cache, empty: Cache, *, pad: Callable[..., Array] = jnp.pad) -> Cache:
    """The cache with as many slots as the empty one."""
    return tuple(ops.grow_cache(ring, like.length, pad=pad) for ring, like in zip(cache, empty, strict=True))


def split_cache(cache: Cache, lengths: Int[Array, "B"], *, slots: int) -> Cache:
    """A cache that holds `lengths` tokens a row, for a loop that adds up to `slots` more; then `merge_cache`."""
    return tuple(ops.split_cache(ring, lengths, slots=slots) for ring in cache)


def merge_cache(cache: Cache, lengths: Int[Array, "B"]) -> Cache:
    """The rings with all tokens of a `split_cache` in them, `lengths` by now."""
    return tuple(ops.merge_cache(layer, lengths) for layer in cache)


def param_shapes(cfg: ModelConfig) -> Params:
    """`jax.ShapeDtypeStruct` of every parameter, with nothing computed."""
    return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def param_axes(cfg: ModelConfig) -> Params:
    """The axis letters of every parameter, such as "LDNH", as a tree of the parameters' structure.

    Raises:
        ValueError: a parameter that AXES does not list.
    """

    def letters(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> str:
        keys = [entry.key for entry in path]
        name = "/".join(keys[-2:])
        if name not in AXES:
            raise ValueError(
                f"parameter {'/'.join(keys)} {leaf.shape} is not in layers.AXES; list its axis letters there"
            )
        return "L" * (keys[0] == "blocks") + AXES[name]

    return jax.tree_util.tree_map_with_path(letters, param_shapes(cfg))


def count_params(cfg: ModelConfig) -> tuple[int, int]:
    """(all parameters, those outside the token and position embeddings and an untied output projection)."""
    shapes = param_shapes(cfg)
    embeddings = [shapes["embed"], shapes.get("lm_head", {})]
    total, outside = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes, embeddings))
    return total, total - outside


def train_flops_per_token(cfg: ModelConfig, seq_len: int | None = None) -> float:
    """Floating-point operations of the model for each token of a training step, forward and backward.

    6 for each weight that is in a product: every matrix of the blocks and the output projection, not the
    embeddings' look-up. And 12 N H S a layer for attention, S the keys that a query sees, on average over a
    causal text of T tokens (seq_len; None: block_size): half of T, or W - W^2 / (2 T) with a window of W. Nothing
    that is computed a second time for `remat` counts (Chowdhery et al. 2022, "PaLM", appendix B, with causality).
    """
    axes, shapes = (jax.tree.leaves(tree["blocks"]) for tree in (param_axes(cfg), param_shapes(cfg)))
    # Of the letters in a block, D and another one make a matrix; "LD" is a norm or a bias. Of experts' matrices those
    # count that a token goes through.
    share = {True: (cfg.n_expert_per_token / cfg.n_expert) if cfg.n_expert else 1, False: 1}
    in_blocks = sum(
        shape.size * share[{"E", "F"} < set(letters)]
        for letters, shape in zip(axes, shapes, strict=True)
        if {"L", "D"} < set(letters)
    )
    time = seq_len or cfg.block_size
    keys_seen = sum(seen - seen**2 / (2 * time) for seen in (min(window, time) for window in layer_windows(cfg)))
    return 6 * (in_blocks + cfg.vocab_size * cfg.n_embd) + 12 * cfg.n_head * cfg.head_dim * keys_seen
