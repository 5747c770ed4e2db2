"""PyTorch's side: transformers' models trained, and torch's scaled_dot_product_attention.

torch and transformers are imported in the worker that runs them, never in the command's own process.
"""

import os
import time
import warnings
from typing import Any

from llm_jax.bench.contenders import HostMemory, differences, missing, random_batches
from llm_jax.config import Config, ModelConfig
from llm_jax.errors import InputError

# Our mlp -> (transformers' name of the activation, whether the MLP is gated). The tanh form of GELU is torch's own
# function, faster than the GPT-2 default "gelu_new", which writes it out.
ACTIVATIONS = {
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_pytorch_tanh", False),
    "relu2": ("relu2", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu_pytorch_tanh", True),
}


def obstacle(cfg: ModelConfig) -> str | None:
    """One line on what is not installed, or else on what transformers can't express; None if nothing."""
    return missing("torch", "transformers") or inexpressible(cfg)


def inexpressible(cfg: ModelConfig) -> str | None:
    """One line that names the keys which no transformers model used here can take, None if there are none.

    With LayerNorm it is GPT-2, with RMSNorm Llama, or with qk_norm Qwen3. How rope scales its frequencies is not
    compared: it changes numbers, not work.
    """
    needed: dict[str, Any] = {"attn_softcap": None, "final_softcap": None, "window": None}
    gated = ACTIVATIONS[cfg.mlp][1]
    if cfg.use_rmsnorm:
        needed |= {"use_rope": True, "dropout": 0.0, "mlp": cfg.mlp if gated else "swiglu"}
        family = "Llama"
        if cfg.qk_norm:
            needed["use_bias"] = False
            family = "Qwen3"
    else:
        needed |= {"use_rope": False, "use_bias": True, "qk_norm": False, "mlp": "gelu" if gated else cfg.mlp}
        needed |= {"n_kv_head": cfg.n_head, "head_dim": cfg.n_embd // cfg.n_head}
        family = "GPT-2"
    if (cfg.param_dtype, cfg.compute_dtype) == ("bfloat16", "float32"):
        needed["compute_dtype"] = "bfloat16"
    wrong = differences(cfg, needed)
    return f"for transformers' {family} " + ", ".join(wrong) if wrong else None


def build(cfg: ModelConfig) -> Any:
    """transformers' model of this shape, with SDPA attention, float32, randomly initialised."""
    import transformers

    activation, _ = ACTIVATIONS[cfg.mlp]
    shared = dict(
        vocab_size=cfg.vocab_size,
        tie_word_embeddings=cfg.tie_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    if not cfg.use_rmsnorm:
        config = transformers.GPT2Config(
            n_positions=cfg.block_size,
            n_embd=cfg.n_embd,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            n_inner=cfg.mlp_dim,
            activation_function=activation,
            layer_norm_epsilon=cfg.norm_eps,
            embd_pdrop=cfg.dropout,
            resid_pdrop=cfg.dropout,
            attn_pdrop=0.0,
            **shared,
        )
    else:
        family = transformers.Qwen3Config if cfg.qk_norm else transformers.LlamaConfig
        config = family(
            max_position_embeddings=cfg.block_size,
            hidden_size=cfg.n_embd,
            num_hidden_layers=cfg.n_layer,
            num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.n_kv_head,
            head_dim=cfg.head_dim,
            intermediate_size=cfg.mlp_dim,
            hidden_act=activation,
            rms_norm_eps=cfg.norm_eps,
            attention_bias=cfg.use_bias,
            **({} if cfg.qk_norm else {"mlp_bias": cfg.use_bias}),
            **shared,
        )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class Training:
    """A transformers model that trains as our side does: same shape, dtype, batches, clipping, decay; AdamW.

    Its loss is transformers' own, which predicts T - 1 of a window's T tokens; the last position's logits are
    computed all the same, so that a step is T tokens' work as ours is. Parameters are AdamW's masters in
    `param_dtype`; bfloat16 compute is autocast. Activations are never recomputed, whatever model.remat says.
    """

    def __init__(self, cfg: Config, platform: str, threads: int, compiled: bool) -> None:
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compile time is a first run's
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # by that
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch, self._device = torch, _device(torch, platform)
        torch.set_num_threads(threads)
        torch.manual_seed(cfg.train.seed)
        self._memory = HostMemory()
        param_dtype, self._compute_dtype = (
            getattr(torch, name) for name in (cfg.model.param_dtype, cfg.model.compute_dtype)
        )
        model = build(cfg.model).to(self._device, param_dtype).train()
        self._autocast = param_dtype != self._compute_dtype
        self._params = list(model.parameters())
        decay = cfg.optim.weight_decay
        groups = [
            {"params": [p for p in self._params if p.dim() >= 2], "weight_decay": decay},
            {"params": [p for p in self._params if p.dim() < 2], "weight_decay": 0.0},
        ]
        rates = dict(lr=cfg.optim.peak_lr, betas=(cfg.optim.b1, cfg.optim.b2))
        self._optimizer = torch.optim.AdamW(groups, fused=True, **rates)
        self._cfg, self._model = cfg.train, torch.compile(model) if compiled else model
        self._grad_clip = cfg.optim.grad_clip
        micro_batches = (torch.from_numpy(tokens).long() for tokens, _, _ in random_batches(cfg))
        pinned = (tokens.pin_memory() if self._device == "cuda" else tokens for tokens in micro_batches)
        self._batches = list(pinned)
        start = time.perf_counter()
        self._loss = self._run(1)
        self._first_step_seconds = time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": sum(p.numel() for p in self._params),
            "optimizer": "adamw",
            "first_step_seconds": self._first_step_seconds,
            "first_loss": self._loss,
        }

    def time(self, steps: int) -> float:
        self._memory.restart()
        self._run(1)
        start = time.perf_counter()
        self._run(steps)
        return time.perf_counter() - start

    def _run(self, steps: int) -> float:
        torch = self._torch
        for i in range(steps):
            tokens = self._batches[i % len(self._batches)].to(self._device, non_blocking=True)
            for micro_batch in tokens.chunk(self._cfg.accumulation_steps):
                with torch.autocast(self._device, self._compute_dtype, enabled=self._autocast):
                    loss = self._model(input_ids=micro_batch, labels=micro_batch).loss
                (loss / self._cfg.accumulation_steps).backward()
            if self._grad_clip:
                torch.nn.utils.clip_grad_norm_(self._params, self._grad_clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for all of it

    def peak_memory(self) -> int | None:
        if self._device == "cuda":
            return self._torch.cuda.max_memory_allocated()
        return self._memory.peak()


class Decoding:
    """transformers' `generate`, greedy, of a model of our shape; compiled: with a static cache."""

    def __init__(self, cfg: ModelConfig, platform: str, threads: int, prompt_tokens: int, compiled: bool) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._torch, self._device = torch, _device(torch, platform)
        torch.set_num_threads(threads)
        self._model = build(cfg).to(self._device, getattr(torch, cfg.compute_dtype)).eval()
        self._settings = {"cache_implementation": "static"} if compiled else {}
        if compiled:
            # For each batch size anew: by default the second would get slower code, for any size.
            self._model.forward = torch.compile(self._model.forward, fullgraph=True, dynamic=False)
        self._vocab_size, self._prompt_tokens = cfg.vocab_size, prompt_tokens

    def time(self, batch: int, new_tokens: int, steps: int) -> float:
        self._run(batch, new_tokens)
        start = time.perf_counter()
        for _ in range(steps):
            self._run(batch, new_tokens)
        return time.perf_counter() - start

    def _run(self, batch: int, new_tokens: int) -> None:
        generator = self._torch.Generator().manual_seed(0)
        shape = (batch, self._prompt_tokens)
        tokens = self._torch.randint(0, self._vocab_size, shape, generator=generator).to(self._device)
        with self._torch.inference_mode():
            out = self._model.generate(
                tokens,
                attention_mask=self._torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **self._settings,
            )
        assert out.shape[1] == self._prompt_tokens + new_tokens
        if self._device == "cuda":
            self._torch.cuda.synchronize()


class Attention:
    """torch's SDPA, causal, forward and backward."""

    def __init__(self, platform: str, threads: int, dtype: str) -> None:
        import torch

        self._torch, self._device, self._dtype = torch, _device(torch, platform), getattr(torch, dtype)
        torch.set_num_threads(threads)
        self._shape = None

    def time(self, shape: tuple[int, int, int, int], steps: int) -> float:
        """Seconds of `steps` calls for [B, T, N, H], in the layout that SDPA takes, [B, N, T, H]."""
        torch = self._torch
        if shape != self._shape:
            batch, length, heads, head_dim = self._shape = shape
            generator = torch.Generator(self._device).manual_seed(0)
            options = dict(device=self._device, dtype=self._dtype, generator=generator)
            *qkv, self._d_out = (torch.randn(batch, heads, length, head_dim, **options) for _ in range(4))
            self._qkv = [x.requires_grad_() for x in qkv]
        self._run(1)
        start = time.perf_counter()
        self._run(steps)
        return time.perf_counter() - start

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            out = self._torch.nn.functional.scaled_dot_product_attention(*self._qkv, is_causal=True)
            self._torch.autograd.grad(out, self._qkv, self._d_out)
        if self._device == "cuda":
            self._torch.cuda.synchronize()


def _device(torch: Any, platform: str) -> str:
    """torch's name for the kind of device that JAX uses.

    Raises:
        InputError: torch has none of that kind.
    """
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise InputError(f"the torch {torch.__version__} installed here does not run on JAX's platform, {platform}")
