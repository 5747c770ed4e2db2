"""Pure functions of arrays: importable into anyone's JAX code, and each file can be lifted alone.

Letters used in every shape of the package:

    B batch            T query time      S key time       N query heads    K key/value heads
    G = N // K         H head dim        D model width    F MLP width      V vocabulary
    L layers           R rotated channel pairs of a head (R <= H/2)                  E experts

Arrays are positional, everything else is keyword-only. Reductions, softmax, norms and angles are
computed in float32 and the caller's dtype is returned. A float32 product is a float32 product on
every platform: accelerators would otherwise round its operands to bfloat16 or TF32.

The functions `rope`, `attention` and `linear` win over the submodules of the same name; the modules themselves
are `sys.modules["llm_jax.ops.rope"]`.
"""

from llm_jax.ops.attention import MASK_VALUE, SPLASH_BLOCKS, attention, cached_attention, einsum_f32, masked_attention
from llm_jax.ops.experts import grouped_linear, mix_experts, route, sort_by_expert
from llm_jax.ops.kv_cache import (
    EmptyCache,
    LayerCache,
    TwoLevelCache,
    cache_positions,
    fill_cache,
    grow_cache,
    merge_cache,
    split_cache,
    update_cache,
)
from llm_jax.ops.linear import DecodeWeight, decode_embed, decode_linear, linear, quantize
from llm_jax.ops.losses import cross_entropy, linear_cross_entropy
from llm_jax.ops.norms import layer_norm, rms_norm
from llm_jax.ops.orthogonalize import orthogonalize
from llm_jax.ops.rope import RopeScaling, apply_rope, precompute_freqs_cis, rope, rope_frequencies
from llm_jax.ops.sampling import draw, masked_draw, min_p_mask, penalize, top_k_mask, top_p_mask

__all__ = [
    "MASK_VALUE",
    "SPLASH_BLOCKS",
    "DecodeWeight",
    "EmptyCache",
    "LayerCache",
    "RopeScaling",
    "TwoLevelCache",
    "apply_rope",
    "attention",
    "cache_positions",
    "cached_attention",
    "cross_entropy",
    "decode_embed",
    "decode_linear",
    "draw",
    "einsum_f32",
    "fill_cache",
    "grouped_linear",
    "grow_cache",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "masked_attention",
    "masked_draw",
    "merge_cache",
    "min_p_mask",
    "mix_experts",
    "penalize",
    "orthogonalize",
    "precompute_freqs_cis",
    "quantize",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "route",
    "sort_by_expert",
    "top_k_mask",
    "top_p_mask",
    "split_cache",
    "update_cache",
]
