"""Models of every published family with random weights, made by transformers: the oracle of the tests beside."""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.tokenizers import byte_tokenizer

torch = pytest.importorskip("torch", reason="torch not installed")
transformers = pytest.importorskip("transformers", reason="transformers not installed")

VOCAB = 300  # 256 bytes, and ids that stand for no text
STD = 0.2
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
OTHER = SMALL | dict(num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3, head_dim=14)
MHA = OTHER | dict(num_key_value_heads=6)


def roped(theta=10000.0, **scaling):
    return dict(rope_parameters=dict(rope_theta=theta, rope_type="default") | scaling)


def gemma3_rope(factor):
    return dict(
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=factor, rope_theta=5000.0),
            "sliding_attention": dict(rope_type="default", rope_theta=100.0),
        }
    )


LLAMA3 = roped(500.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["rope_parameters"]["original_max_position_embeddings"] = 24
YARN = roped(1000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=24)

LONGROPE = dict(original_max_position_embeddings=24)
LONGROPE |= roped(1000.0, rope_type="longrope", short_factor=[1.0, 1.1, 1.2] * 2, long_factor=[1.0, 2.0, 5.0] * 2)

# (config class, its arguments): two shapes of each family, with its quirks on.
MODELS = {
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=VOCAB, n_embd=40, n_head=4, n_layer=3, n_positions=96),
        dict(vocab_size=VOCAB, n_embd=35, n_head=5, n_layer=2, n_positions=96, n_inner=50, tie_word_embeddings=False),
    ),
    "llama": (
        "LlamaConfig",
        SMALL | roped(),
        OTHER | LLAMA3 | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=0.01),
    ),
    "mistral": ("MistralConfig", SMALL | dict(sliding_window=None), OTHER | dict(sliding_window=7)),
    "qwen2": (
        "Qwen2Config",
        SMALL | YARN,
        OTHER | dict(use_sliding_window=True, sliding_window=7, max_window_layers=2, tie_word_embeddings=True),
    ),
    "qwen3": (
        "Qwen3Config",
        SMALL | dict(head_dim=16),
        OTHER | dict(attention_bias=True, tie_word_embeddings=True) | YARN,
    ),
    "smollm3": (
        "SmolLM3Config",
        SMALL | dict(num_hidden_layers=4),
        OTHER | dict(no_rope_layers=[1, 0, 0, 1, 0], use_sliding_window=True, sliding_window=7),
    ),
    "gemma": ("GemmaConfig", SMALL | dict(head_dim=16), OTHER | dict(num_key_value_heads=1)),
    "gemma2": (
        "Gemma2Config",
        SMALL | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=16),
        OTHER | dict(sliding_window=5, query_pre_attn_scalar=100, attn_logit_softcapping=3.0),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        SMALL | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=16, num_hidden_layers=6),
        OTHER | dict(num_hidden_layers=8, sliding_window=5, query_pre_attn_scalar=100) | gemma3_rope(4.0),
    ),
    "olmo2": ("Olmo2Config", SMALL, MHA | dict(attention_bias=True)),
    "phi3": (
        "Phi3Config",
        SMALL | LONGROPE,
        OTHER
        | dict(sliding_window=7, original_max_position_embeddings=96)
        | roped(500.0, partial_rotary_factor=0.58),
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | dict(hidden_size=64),
        {k: v for k, v in OTHER.items() if k not in ("num_key_value_heads", "head_dim")}
        | dict(hidden_size=96, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True)
        | roped(300.0, partial_rotary_factor=0.5),
    ),
}
TWO_EXPERTS = dict(num_experts_per_tok=2)
MODELS |= {
    "mixtral": (
        "MixtralConfig",
        SMALL | dict(num_local_experts=4, num_experts_per_tok=2),
        OTHER | dict(num_local_experts=3, num_experts_per_tok=3, sliding_window=7, tie_word_embeddings=True),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL | dict(head_dim=16, num_experts=4, moe_intermediate_size=20, norm_topk_prob=True, **TWO_EXPERTS),
        OTHER
        | dict(num_experts=6, num_experts_per_tok=4, moe_intermediate_size=36)
        | dict(attention_bias=True)
        | YARN,
    ),
    "olmoe": (
        "OlmoeConfig",
        SMALL | dict(num_key_value_heads=4, num_experts=4, num_experts_per_tok=2),
        {k: v for k, v in MHA.items() if k != "head_dim"}
        | dict(num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=True),
    ),
}
CASES = [pytest.param(name, i, id=f"{name}-{i}") for name, (_, *shapes) in MODELS.items() for i in range(len(shapes))]
# The same with one shape of each in the first pass and the other in the slow one.
FIRST_FAST, SECOND_FAST = (
    [
        case if case.values[1] == fast else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in CASES
    ]
    for fast in (0, 1)
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 80))

_folders = tempfile.TemporaryDirectory(prefix="llm_jax_reference_")


@functools.cache
def make(name, i):
    """(the reference, our model of the folder that it was saved in); the second shapes in several files."""
    kind, *shapes = MODELS[name]
    config = getattr(transformers, kind)(**copy.deepcopy(shapes[i]))
    torch.manual_seed(i)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, STD)
    folder = Path(_folders.name) / f"{name}-{i}"
    reference.save_pretrained(folder, **({"max_shard_size": "40KB"} if i else {}))
    byte_tokenizer().save(folder)
    assert (folder / "model.safetensors.index.json").exists() == bool(i)
    return reference, llm_jax.load(folder)


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor(np.asarray(tokens))).logits.float().numpy()
