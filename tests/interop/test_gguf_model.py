"""GGUF files of every architecture: back as they were, and run by llama.cpp."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import gpt2_tokenizer
from mutations import with_other_values
from reference import CASES, MODELS, TOKENS, VOCAB, make

import llm_jax
from llm_jax import pretrained, published
from llm_jax.config_rules import in_dtype
from llm_jax.errors import InputError
from llm_jax.interop import gguf_model
from llm_jax.interop.gguf import read_gguf
from llm_jax.tokenizers import byte_tokenizer

# What llama.cpp has no way to be told.
REFUSED = {
    ("mistral", 1): "model.window (7",
    ("qwen2", 1): "model.window (7",
    ("qwen3", 1): "model.qkv_bias (True",
    ("smollm3", 1): "model.rope_layers",
    ("gemma2", 1): "model.attn_scale (0.1",
    ("gemma3_text", 1): "model.attn_scale (0.1",
    ("olmo2", 1): "model.qkv_bias (True",
    ("gpt_neox", 1): "model.qkv_bias (False",
    ("mixtral", 1): "model.window (7",
    ("qwen3_moe", 1): "model.qkv_bias (True",
    ("phi3", 1): "model.n_head * model.head_dim (84)",
    ("olmoe", 1): "model.normalize_experts (True",
}
TEXT = "the cat and the dog, and the bird on the tree over this other quick brown fox jumping"
WRITTEN = [case for case in CASES if case.values not in REFUSED]


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_tokenizer(TEXT, VOCAB)


def written(lm, path, tokenizer, **how):
    source = pretrained.Source("it", lm.config, tokenizer, pretrained.part_of(lm.params))
    published.save_gguf(source, path, **how)
    return path


@pytest.mark.parametrize("name, i", WRITTEN)
def test_a_file_has_the_same_model(name, i, tokenizer, tmp_path):
    _, lm = make(name, i)
    back = llm_jax.load(written(lm, tmp_path / "model.gguf", tokenizer))
    np.testing.assert_allclose(back.logits(TOKENS), lm.logits(TOKENS), rtol=1e-4, atol=1e-4)
    if not lm.config.model.norm_weight_offset:  # Gemma's norms are written as what they multiply by
        jax.tree.map(np.testing.assert_array_equal, back.params, lm.params)
    assert back.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    if lm.config.model.rope_scaling != "llama3":  # which is read as the factors that it makes, in fewer digits
        again = written(back, tmp_path / "again.gguf", back.tokenizer)
        assert again.read_bytes().replace(b"again", b"model") == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize("name, i", [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in REFUSED])
def test_what_llama_cpp_has_no_counterpart_of_is_named(name, i, tokenizer, tmp_path):
    _, lm = make(name, i)
    with pytest.raises(InputError) as error:
        written(lm, tmp_path / "model.gguf", tokenizer)
    assert REFUSED[name, i] in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_every_value_of_the_metadata_may_be_another(name, tokenizer, tmp_path):
    """Each a number, a text, a list, ... in the place of each: read, or told of."""
    _, lm = make(name, 0)
    file = read_gguf(written(lm, tmp_path / "model.gguf", tokenizer))
    sound = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer")}
    shapes = {name: info.shape for name, info in file.tensors.items()}
    opened = 0
    for changed in with_other_values(sound):
        try:
            gguf_model.read_model(
                {key: value for key, value in changed.items() if value is not None}, shapes, file.read
            )
            opened += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert opened > len(sound)  # the values that mean nothing here, and those that are as good


def test_every_family_is_written():
    assert {case.values[0] for case in WRITTEN} == set(MODELS)


@pytest.mark.parametrize("dtype, largest", [("float16", 2e-3), ("bfloat16", 2e-2), ("q8_0", 2e-2)])
def test_other_types_round_matrices_alone(dtype, largest, tokenizer, tmp_path):
    _, lm = make("llama", 0)
    back = llm_jax.load(written(lm, tmp_path / "model.gguf", tokenizer, dtype=dtype))
    norms = [tree["blocks"]["attn_norm"]["weight"] for tree in (back.params, lm.params)]
    np.testing.assert_array_equal(*norms)
    for ours, theirs in zip(jax.tree.leaves(back.params), jax.tree.leaves(lm.params), strict=True):
        assert np.abs(ours - theirs).max() <= largest * np.abs(theirs).max()
    assert (np.asarray(back.params["blocks"]["attn"]["q"]) != lm.params["blocks"]["attn"]["q"]).any()


def test_the_published_llama3_factors_are_known(tokenizer, tmp_path):
    _, lm = make("llama", 1)
    scaling = dict(rope_factor=32.0, rope_original_length=8192, block_size=131072, rope_theta=500000.0)
    cfg = dataclasses.replace(lm.config, model=dataclasses.replace(lm.config.model, **scaling))
    source = pretrained.Source("it", cfg, tokenizer, pretrained.part_of(lm.params))
    published.save_gguf(source, tmp_path / "model.gguf")
    back = llm_jax.load(tmp_path / "model.gguf").config.model
    assert back == cfg.model


def test_tokens_that_only_fill_the_vocabulary_are_unused(tokenizer, tmp_path):
    _, lm = make("llama", 0)
    back = llm_jax.load(written(lm, tmp_path / "model.gguf", gpt2_tokenizer(TEXT, VOCAB - 7)))
    assert back.tokenizer.vocab_size == VOCAB - 7 and back.config.model.vocab_size == VOCAB


def test_norms_of_a_bfloat16_gemma_keep_their_digits(tokenizer, tmp_path):
    """Written as what they multiply by: 1 and more, which a bfloat16 has fewer digits for."""
    _, lm = make("gemma", 0)
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), lm.params)
    half = llm_jax.LanguageModel(in_dtype(lm.config, "bfloat16"), params, tokenizer)
    half.save_gguf(tmp_path / "model.gguf", dtype="float32")
    found = read_gguf(tmp_path / "model.gguf").read("output_norm.weight")
    np.testing.assert_array_equal(found, np.asarray(params["final_norm"]["weight"], np.float32) + 1)


def test_a_weight_beyond_float16_is_named(tmp_path):
    _, lm = make("llama", 0)
    params = jax.tree.map(lambda leaf: leaf * 1e6, lm.params)
    source = pretrained.Source("it", lm.config, lm.tokenizer, pretrained.part_of(params))
    with pytest.raises(InputError, match="too large for float16"):
        published.save_hf(source, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_counterpart_is_named(tmp_path):
    _, lm = make("llama", 0)
    with pytest.raises(InputError, match="splits text.*no counterpart"):
        written(lm, tmp_path / "model.gguf", byte_tokenizer())


def serve(path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp not installed")
    params = xllamacpp.CommonParams()
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 128, 1, 0, 0
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.model.path = str(path)
    return xllamacpp.Server(params)


@pytest.mark.slow
@pytest.mark.parametrize("name, i", WRITTEN)
def test_llama_cpp_has_the_same_probabilities(name, i, tokenizer, tmp_path):
    """Of its five likeliest next tokens; for a token that is no whole character it tells none."""
    _, lm = make(name, i)
    server = serve(written(lm, tmp_path / "model.gguf", tokenizer))
    # LongRoPE's factors are chosen by the length that a cache has room for there, by the text's here.
    lengths = (27, 30, 35, 50, 70) if lm.config.model.rope_scaling == "longrope" else (1, 2, 5, 12, 30, 50, 70)
    tolerance = 2e-2 if "gelu" in lm.config.model.mlp or "geglu" in lm.config.model.mlp else 5e-3  # GELU in float16
    compared = 0
    for length in lengths:
        prompt = TOKENS[0, :length].tolist()
        answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "temperature": 0, "logprobs": 5})
        logprobs = answer["choices"][0]["logprobs"]
        if logprobs is not None:
            ours = jax.nn.log_softmax(lm.logits([prompt])[0, -1])
            for token in logprobs["content"][0]["top_logprobs"]:
                assert token["logprob"] == pytest.approx(float(ours[token["id"]]), abs=tolerance)
                compared += 1
    assert compared >= 10
