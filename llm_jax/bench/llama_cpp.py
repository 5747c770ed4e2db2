"""llama.cpp's side of `bench decode`: its server's own call, in its own process, by the package xllamacpp.

xllamacpp, and gguf which writes the model's file, are imported in the worker that runs them.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.bench.contenders import differences, missing
from llm_jax.config import ModelConfig
from llm_jax.errors import InputError

SPECIAL = ("<unk>", "<s>", "</s>")  # a SentencePiece vocabulary's first ids; one for each byte follows


def obstacle(cfg: ModelConfig) -> str | None:
    """One line on why llama.cpp can't take this model here, None if it can: Llama in float32, on a CPU."""
    if absent := missing("xllamacpp", "gguf", extra="llama_cpp"):
        return absent
    needed: dict[str, Any] = {"use_rmsnorm": True, "use_rope": True, "mlp": "swiglu", "use_bias": False}
    needed |= {"qk_norm": False, "window": None, "attn_softcap": None, "final_softcap": None}
    needed |= {"param_dtype": "float32", "compute_dtype": "float32"}
    wrong = differences(cfg, needed)
    if cfg.vocab_size < len(SPECIAL) + 256:
        wrong.append(f"model.vocab_size ({cfg.vocab_size}) would have to be {len(SPECIAL) + 256} or more")
    return "for llama.cpp's Llama " + ", ".join(wrong) if wrong else None


def write_gguf(path: Path, cfg: ModelConfig, *, quantized: bool) -> None:
    """A model of this shape and random weights, in float32, or its matrices in blocks of 8 bits, Q8_0."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.n_kv_head)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    kinds = [(text, gguf.TokenType.CONTROL) for text in SPECIAL]
    kinds += [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    kinds += [(f"t{i}", gguf.TokenType.NORMAL) for i in range(len(kinds), cfg.vocab_size)]
    tokens, types = zip(*kinds, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * cfg.vocab_size)
    writer.add_token_types(types)

    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        weights, kind = rng.standard_normal(shape, np.float32) * np.float32(0.02), None
        if quantized and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            weights = gguf.quants.quantize(weights, kind)
        writer.add_tensor(f"{name}.weight", weights, raw_dtype=kind)

    queries, keys = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    add("token_embd", cfg.vocab_size, cfg.n_embd)
    for layer in range(cfg.n_layer):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", cfg.n_embd)
        add(f"{block}.attn_q", queries, cfg.n_embd)
        add(f"{block}.attn_k", keys, cfg.n_embd)
        add(f"{block}.attn_v", keys, cfg.n_embd)
        add(f"{block}.attn_output", cfg.n_embd, queries)
        add(f"{block}.ffn_norm", cfg.n_embd)
        add(f"{block}.ffn_gate", cfg.mlp_dim, cfg.n_embd)
        add(f"{block}.ffn_up", cfg.mlp_dim, cfg.n_embd)
        add(f"{block}.ffn_down", cfg.n_embd, cfg.mlp_dim)
    add("output_norm", cfg.n_embd)
    if not cfg.tie_embeddings:
        add("output", cfg.vocab_size, cfg.n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoding:
    """Greedy, all rows of a batch sent at once and decoded together, with nothing kept of earlier prompts.

    Its cache is in float16, as llama.cpp has it by default, and has room for the longest text asked for so far.
    """

    def __init__(self, cfg: ModelConfig, platform: str, threads: int, prompt_tokens: int, quantized: bool) -> None:
        if platform != "cpu":
            raise InputError(f"llama.cpp is measured on CPUs alone, and JAX's platform is {platform}")
        self._cfg, self._threads, self._quantized = cfg, threads, quantized
        self._prompt_tokens, self._batch, self._room, self._server = prompt_tokens, 0, 0, None

    def time(self, batch: int, new_tokens: int, steps: int) -> float:
        if batch != self._batch or self._prompt_tokens + new_tokens > self._room:
            self._server = None  # frees the last one's memory first
            self._batch, self._room = batch, self._prompt_tokens + new_tokens
            self._server = self._serve()
        self._run(new_tokens)
        start = time.perf_counter()
        for _ in range(steps):
            self._run(new_tokens)
        return time.perf_counter() - start

    def _serve(self) -> Any:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.n_parallel, params.n_ctx, params.kv_unified = self._batch, self._batch * self._room, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.n_gpu_layers = 0
        params.cache_prompt, params.cache_ram_mib = False, 0
        params.verbosity = 0
        with tempfile.TemporaryDirectory() as folder:  # whose file lives on for as long as it is mapped
            path = Path(folder) / "model.gguf"
            write_gguf(path, self._cfg, quantized=self._quantized)
            params.model.path = str(path)
            return xllamacpp.Server(params)

    def _run(self, new_tokens: int) -> None:
        rng = np.random.default_rng(0)
        shape = (self._batch, self._prompt_tokens)
        prompts = rng.integers(len(SPECIAL), self._cfg.vocab_size, shape).tolist()
        answer = self._server.handle_completions(
            {"prompt": prompts, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        )
        rows = [row["finish_reason"] for row in answer["choices"]]
        assert rows == ["length"] * self._batch and answer["usage"]["completion_tokens"] == new_tokens, answer
