"""Published families: what their config.json and their tensors are called in Hugging Face folders.

A family is data. `hf_config.py` reads it both ways for configs, `tensors.py` for weights.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax.interop.tensors import Row, row

Config = Mapping[str, Any]  # of config.json, with what is left out filled in from Family.defaults
LayerTypes = list[str]  # "full" or "sliding", one for each layer


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    keys: config.json's key -> our fields that have its value.
    defaults: what its reader in transformers takes for a key that is left out.
    fixed: fields that all its models share. Others are at ModelConfig's defaults.
    needed: config.json's key -> the only values of it that are known here.
    aliases: another key -> the one of the above that it means.
    activation: the key of the activation.
    layer_types: of a config that does not list them under "layer_types"; None: all full.
    lists_layer_types: whether a config may do so.
    theta, local_theta: rope's base where a config has none; local: of sliding layers, where they have their own.
    scales_embeddings: by the root of n_embd.
    rotary_fraction: of the channels that turn, where a config does not tell; None: all of them, always.
    """

    model_type: str
    architecture: str
    rows: Sequence[Row]
    keys: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    needed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    layer_types: Callable[[Config], LayerTypes] | None = None
    lists_layer_types: bool = False
    theta: float = 10000.0
    local_theta: float | None = None
    rotary_fraction: float | None = None
    scales_embeddings: bool = False


# -- Tensors

LAYER = "model.layers.{layer}."


def _llama_rows(**norms: str) -> tuple[Row, ...]:
    """Llama's names; `norms`: our norm -> what the family calls it, in the place of Llama's two."""
    norms = norms or {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    attention = [
        made
        for letter in "qkvo"
        for made in (
            row(f"attn/{letter}", f"{LAYER}self_attn.{letter}_proj.weight"),
            row(f"attn/{letter}_bias", f"{LAYER}self_attn.{letter}_proj.bias", "vector"),
        )
    ]
    mlp = [
        made
        for name in ("gate", "up", "down")
        for made in (
            row(f"mlp/{name}", f"{LAYER}mlp.{name}_proj.weight"),
            row(f"mlp/{name}_bias", f"{LAYER}mlp.{name}_proj.bias", "vector"),
        )
    ]
    return (
        row("embed/tokens", "model.embed_tokens.weight", "table"),
        *[row(f"{ours}/weight", f"{LAYER}{name}.weight", "vector") for ours, name in norms.items()],
        *attention,
        *mlp,
        row("final_norm/weight", "model.norm.weight", "vector"),
        row("lm_head/weight", "lm_head.weight", "table"),
    )


def _qk_norm_rows(kind: str) -> tuple[Row, ...]:
    return tuple(row(f"attn/{h}_{kind}/weight", f"{LAYER}self_attn.{h}_norm.weight", "vector") for h in "qk")


SANDWICH = _llama_rows(
    attn_norm="input_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def _both(ours: str, foreign: str, layout: str) -> list[Row]:
    """A matrix and its bias."""
    biases = " ".join(f"{name}_bias" for name in ours.split())
    vector = "heads_vector" if layout == "heads" else "vector"
    return [row(ours, f"{foreign}.weight", layout), row(biases, f"{foreign}.bias", vector)]


def _norm(ours: str, foreign: str) -> list[Row]:
    return [row(f"{ours}/{kind}", f"{foreign}.{kind}", "vector") for kind in ("weight", "bias")]


_BLOCK = "transformer.h.{layer}."
GPT2_ROWS = (
    row("embed/tokens", "transformer.wte.weight", "table"),
    row("embed/positions", "transformer.wpe.weight", "table"),
    *_norm("attn_norm", f"{_BLOCK}ln_1"),
    *_both("attn/q attn/k attn/v", f"{_BLOCK}attn.c_attn", "conv1d"),
    *_both("attn/o", f"{_BLOCK}attn.c_proj", "conv1d"),
    *_norm("mlp_norm", f"{_BLOCK}ln_2"),
    *_both("mlp/up", f"{_BLOCK}mlp.c_fc", "conv1d"),
    *_both("mlp/down", f"{_BLOCK}mlp.c_proj", "conv1d"),
    *_norm("final_norm", "transformer.ln_f"),
    row("lm_head/weight", "lm_head.weight", "table"),
)

_NEOX = "gpt_neox.layers.{layer}."
NEOX_ROWS = (
    row("embed/tokens", "gpt_neox.embed_in.weight", "table"),
    *_norm("attn_norm", f"{_NEOX}input_layernorm"),
    *_both("attn/q attn/k attn/v", f"{_NEOX}attention.query_key_value", "heads"),
    *_both("attn/o", f"{_NEOX}attention.dense", "linear"),
    *_norm("mlp_norm", f"{_NEOX}post_attention_layernorm"),
    *_both("mlp/up", f"{_NEOX}mlp.dense_h_to_4h", "linear"),
    *_both("mlp/down", f"{_NEOX}mlp.dense_4h_to_h", "linear"),
    *_norm("final_norm", "gpt_neox.final_layer_norm"),
    row("lm_head/weight", "embed_out.weight", "table"),
)

PHI3_ROWS = (
    *[each for each in _llama_rows() if not {*each.ours} & {"attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"}],
    row("attn/q attn/k attn/v", f"{LAYER}self_attn.qkv_proj.weight"),
    row("mlp/gate mlp/up", f"{LAYER}mlp.gate_up_proj.weight"),
)


def _expert_rows(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    dense = {"mlp/gate", "mlp/up", "mlp/down"}
    return (
        *[each for each in _llama_rows() if not dense & {name.removesuffix("_bias") for name in each.ours}],
        row("moe/router", f"{LAYER}{router}.weight"),
        row("moe/gate", f"{LAYER}{gate}.weight"),
        row("moe/up", f"{LAYER}{up}.weight"),
        row("moe/down", f"{LAYER}{down}.weight"),
    )


_EXPERT = "mlp.experts.{expert}."
EXPERT_ROWS = _expert_rows("mlp.gate", f"{_EXPERT}gate_proj", f"{_EXPERT}up_proj", f"{_EXPERT}down_proj")
_EXPERT = "block_sparse_moe.experts.{expert}."
MIXTRAL_ROWS = _expert_rows("block_sparse_moe.gate", f"{_EXPERT}w1", f"{_EXPERT}w3", f"{_EXPERT}w2")


# -- Layers with a window, where a config does not list them

FULL, SLIDING = "full", "sliding"


def all_slide(config: Config) -> LayerTypes:
    return [FULL if config["sliding_window"] is None else SLIDING] * config["num_hidden_layers"]


def last_slide(config: Config) -> LayerTypes:
    """Qwen: those from max_window_layers on, if at all."""
    layers = range(config["num_hidden_layers"])
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    return [SLIDING if slides and layer >= config["max_window_layers"] else FULL for layer in layers]


def all_slide_if_used(config: Config) -> LayerTypes:
    return all_slide(config) if config["use_sliding_window"] else [FULL] * config["num_hidden_layers"]


def even_slide(config: Config) -> LayerTypes:
    return [FULL if layer % 2 else SLIDING for layer in range(config["num_hidden_layers"])]


def all_but_every_nth_slide(config: Config) -> LayerTypes:
    period = config["sliding_window_pattern"]
    return [SLIDING if (layer + 1) % period else FULL for layer in range(config["num_hidden_layers"])]


def without_rope_slide(config: Config) -> LayerTypes:
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    return [SLIDING if slides and not has_rope else FULL for has_rope in config["no_rope_layers"]]


# -- Configs

SHAPE = {
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "hidden_size": ("n_embd",),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("n_kv_head",),
    "intermediate_size": ("mlp_dim",),
    "max_position_embeddings": ("block_size",),
    "rms_norm_eps": ("norm_eps",),
    "tie_word_embeddings": ("tie_embeddings",),
}
ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "attn_out_bias")}
MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
# attention_bias adds a bias to attention's output too; Qwen 2 has it on queries, keys and values alone.
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA_FIXED = {"norm_weight_offset": 1.0}
GEMMA_DEFAULTS = LLAMA_DEFAULTS | {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "use_bidirectional_attention": None,
}
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "sliding_window_size": None,  # an older name, which says the same
}
GEMMA_NEEDED = {"use_bidirectional_attention": (None, False)}
SOFTCAPS = {"attn_logit_softcapping": ("attn_softcap",), "final_logit_softcapping": ("final_softcap",)}
EXPERTS = {"num_experts_per_tok": ("n_expert_per_token",), "norm_topk_prob": ("normalize_experts",)}
GPT2_KEYS = {
    "vocab_size": ("vocab_size",),
    "n_embd": ("n_embd",),
    "n_layer": ("n_layer",),
    "n_head": ("n_head",),
    "n_inner": ("mlp_dim",),
    "n_positions": ("block_size",),
    "layer_norm_epsilon": ("norm_eps",),
    "tie_word_embeddings": ("tie_embeddings",),
}
NEOX_KEYS = {
    key if key != "rms_norm_eps" else "layer_norm_eps": fields
    for key, fields in SHAPE.items()
    if key not in ("num_key_value_heads", "head_dim")
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "LlamaForCausalLM",
        _llama_rows(),
        SHAPE | ATTENTION_BIAS | MLP_BIAS,
        LLAMA_DEFAULTS,
        {},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        _llama_rows(),
        SHAPE,
        LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        {},
        layer_types=all_slide,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        _llama_rows(),
        SHAPE,
        QWEN_DEFAULTS,
        {"qkv_bias": True},
        layer_types=last_slide,
        lists_layer_types=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*_llama_rows(), *_qk_norm_rows("norm")),
        SHAPE | ATTENTION_BIAS,
        QWEN_DEFAULTS | {"head_dim": 128},
        {"qk_norm": True},
        layer_types=last_slide,
        lists_layer_types=True,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _llama_rows(),
        SHAPE | ATTENTION_BIAS | MLP_BIAS,
        LLAMA_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": None,  # of Qwen, and without a part in it
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        {},
        layer_types=without_rope_slide,
        lists_layer_types=True,
        theta=2_000_000.0,
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        _llama_rows(),
        SHAPE | ATTENTION_BIAS,
        GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        GEMMA_FIXED,
        GEMMA_NEEDED,
        scales_embeddings=True,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        SANDWICH,
        SHAPE | ATTENTION_BIAS | SOFTCAPS,
        GEMMA2_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        GEMMA_FIXED | {"norm_placement": "both"},
        GEMMA_NEEDED,
        scales_embeddings=True,
        activation="hidden_activation",
        layer_types=even_slide,
        lists_layer_types=True,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        (*SANDWICH, *_qk_norm_rows("norm")),
        SHAPE | ATTENTION_BIAS | SOFTCAPS,
        GEMMA2_DEFAULTS
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window_pattern": 6},
        GEMMA_FIXED | {"norm_placement": "both", "qk_norm": True},
        GEMMA_NEEDED,
        scales_embeddings=True,
        activation="hidden_activation",
        layer_types=all_but_every_nth_slide,
        lists_layer_types=True,
        theta=1_000_000.0,
        local_theta=10000.0,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        (
            *_llama_rows(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
            *_qk_norm_rows("width_norm"),
        ),
        SHAPE | ATTENTION_BIAS,
        LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
        {"norm_placement": "post", "qk_norm": True, "qk_norm_axes": "width"},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        PHI3_ROWS,
        SHAPE,
        LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
        {},
        {"full_attn_mod": (1,), "interpolate_factor": (1,)},
        layer_types=all_slide,
        rotary_fraction=1.0,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2_ROWS,
        GPT2_KEYS,
        {
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        {"use_rope": False, "use_rmsnorm": False, "use_bias": True},
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        activation="activation_function",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        NEOX_ROWS,
        NEOX_KEYS | ATTENTION_BIAS | {"use_parallel_residual": ("parallel_residual",)},
        {
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_emb_base": None,
            "rotary_pct": None,
        },
        {"use_rmsnorm": False, "use_bias": True},
        rotary_fraction=0.25,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        MIXTRAL_ROWS,
        SHAPE | {"num_local_experts": ("n_expert",), "num_experts_per_tok": ("n_expert_per_token",)},
        LLAMA_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {},
        layer_types=all_slide,
        theta=1_000_000.0,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*EXPERT_ROWS, *_qk_norm_rows("norm")),
        {key: fields for key, fields in SHAPE.items() if key != "intermediate_size"}
        | {"moe_intermediate_size": ("mlp_dim",), "num_experts": ("n_expert",)}
        | EXPERTS
        | ATTENTION_BIAS,
        QWEN_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "intermediate_size": None,  # of layers without experts
        },
        {"qk_norm": True},
        {
            "decoder_sparse_step": (1,),
            "mlp_only_layers": (None, []),
            "shared_expert_intermediate_size": (None, 0),
            "use_qk_norm": (True,),
        },
        aliases={"num_local_experts": "num_experts"},
        layer_types=all_slide_if_used,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        (*EXPERT_ROWS, *_qk_norm_rows("width_norm")),
        SHAPE | {"num_experts": ("n_expert",)} | EXPERTS | ATTENTION_BIAS,
        LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        {"qk_norm": True, "qk_norm_axes": "width"},
        {"clip_qkv": (None,)},
        aliases={"num_local_experts": "num_experts"},
    ),
)
