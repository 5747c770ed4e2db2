"""Hugging Face folders of every family beside transformers: logits, greedy tokens, a ragged batch, and back."""

import copy

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
MODELS |= {
    "mixtral": (
        "MixtralConfig",
        SMALL | dict(num_local_experts=4, num_experts_per_tok=2),
        OTHER | dict(num_local_experts=3, num_experts_per_tok=3, sliding_window=7, tie_word_embeddings=True),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
        OTHER
        | dict(num_experts=6, num_experts_per_tok=4, moe_intermediate_size=36, norm_topk_prob=True)
        | dict(attention_bias=True)
        | YARN,
    ),
    "olmoe": (
        "OlmoeConfig",
        SMALL | dict(num_experts=4, num_experts_per_tok=2),
        {k: v for k, v in MHA.items() if k != "head_dim"}
        | dict(num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=True),
    ),
}
CASES = [pytest.param(name, i, id=f"{name}-{i}") for name, (_, *shapes) in MODELS.items() for i in range(len(shapes))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(name, i) -> the reference, and the folder that it was saved in; the second shapes in several files."""
    models = {}

    def make(name, i):
        if (name, i) not in models:
            kind, *shapes = MODELS[name]
            config = getattr(transformers, kind)(**copy.deepcopy(shapes[i]))
            config._attn_implementation = "eager"
            torch.manual_seed(i)
            reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in reference.parameters():
                    parameter.normal_(0, STD)
            folder = tmp_path_factory.mktemp(f"{name}{i}")
            reference.save_pretrained(folder, **({"max_shard_size": "40KB"} if i else {}))
            byte_tokenizer().save(folder)
            assert (folder / "model.safetensors.index.json").exists() == bool(i)
            models[name, i] = reference, folder, llm_jax.load(folder)
        return models[name, i]

    return make


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor(np.asarray(tokens))).logits.float().numpy()


TOKENS = np.random.default_rng(0).integers(0, 256, (2, 80))


@pytest.mark.parametrize("name, i", CASES)
def test_logits_are_those_of_transformers(made, name, i):
    reference, _, lm = made(name, i)
    expected, found = logits_of(reference, TOKENS), lm.logits(TOKENS)
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def greedy(reference, prompts):
    """(tokens, raw logits) of 32 greedy tokens by transformers, prompts padded on the left."""
    longest = max(map(len, prompts))
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([[0] * (longest - len(prompt)) + list(prompt.encode()) for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(256, VOCAB)),  # ours draws no id that stands for no text
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, longest:].numpy(), torch.stack(out.logits, 1)[..., :256]


@pytest.mark.parametrize("name, i", CASES)
def test_greedy_tokens_of_a_ragged_batch_are_those_of_transformers(made, name, i):
    """As text of several lengths here, padded on the left there; up to where two tokens are nearly as likely."""
    reference, _, lm = made(name, i)
    prompts = ["".join(map(chr, TOKENS[i % 2, :length] % 128)) for i, length in enumerate((3, 11, 24, 30))]
    if lm.config.model.rope_scaling == "longrope":  # there the longest text of a batch decides for all of them
        alone = [greedy(reference, [prompt]) for prompt in prompts]
        tokens, logits = (np.concatenate(each) for each in zip(*alone, strict=True))
    else:
        tokens, logits = greedy(reference, prompts)
    top = np.sort(logits, axis=-1)[..., -2:]
    samples = lm.generate_detailed(prompts, max_new_tokens=32, temperature=0.0, stop_tokens=())
    compared = 0
    for row, sample in enumerate(samples):
        clear = top[row, :, 1] - top[row, :, 0] > 1e-3
        certain = 32 if clear.all() else int(np.argmin(clear))
        assert sample.tokens[:certain] == tokens[row, :certain].tolist()
        compared += certain
    assert compared > 40  # of 128


def test_longrope_turns_texts_within_the_original_length_by_the_short_factors(made):
    reference, _, lm = made("phi3", 0)
    short, long = TOKENS[:, :24], TOKENS[:, :25]
    for tokens in (short, long):
        expected = logits_of(reference, tokens)
        assert np.abs(lm.logits(tokens) - expected).max() <= 2e-4 * np.abs(expected).max()
        scores = [lm.score(row.tolist()) for row in tokens]
        allowed = torch.log_softmax(torch.tensor(expected[..., :256]), -1).numpy()
        expected = np.take_along_axis(allowed[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert np.abs(lm.logits(long)[:, :24] - lm.logits(short)).max() > 0.01


@pytest.mark.parametrize("name, i", CASES)
def test_exported_weights_are_bitwise_the_same_and_transformers_opens_them(made, name, i, tmp_path):
    reference, _, lm = made(name, i)
    lm.save_pretrained(tmp_path / "out", **({"max_shard_bytes": 40_000} if i else {}))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(back) is type(reference)
    own, theirs = back.state_dict(), reference.state_dict()
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        assert own[key].dtype == value.dtype and torch.equal(own[key], value), key
    np.testing.assert_array_equal(logits_of(back, TOKENS), logits_of(reference, TOKENS))
    again = llm_jax.load(tmp_path / "out")
    assert again.config == lm.config
