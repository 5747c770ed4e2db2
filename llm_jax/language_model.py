"""LanguageModel: a model with its tokenizer, as a notebook uses it."""

import functools
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax import checkpoint, generate, model, pretrained
from llm_jax.config import MAX_SEED, Config, ModelConfig, SampleConfig, check_sampling
from llm_jax.errors import InputError
from llm_jax.tokenizers import Tokenizer


def load(path: str | Path, *, step: int | str = "best") -> "LanguageModel":
    """Opens the model at `path`, the workdir of a run.

    Args:
        step: the checkpoint: "best" (by val_loss) | "last" | a number.

    Raises:
        InputError: there is no run or no such checkpoint.
    """
    return LanguageModel(*pretrained.load_run(os.path.expanduser(path), step=step))


class LanguageModel:
    """Parameters, their config, and the tokenizer that they were trained with."""

    def __init__(self, config: Config, params: model.Params, tokenizer: Tokenizer) -> None:
        self.config = config
        self.params = params
        self.tokenizer = tokenizer

    def logits(self, tokens: Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray) -> Float[Array, "B T V"]:
        """Scores of every next token, float32; column t predicts token t + 1."""
        tokens = self._checked_tokens(tokens)
        cfg = self.config.model
        if not cfg.use_rope and tokens.shape[1] > cfg.block_size:
            raise InputError(
                f"{tokens.shape[1]} tokens are more than this model's {cfg.block_size} learned positions; give fewer"
            )
        return _logits(cfg, self.params, jnp.asarray(tokens))

    def generate(
        self,
        context: str | Sequence[str] | Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray,
        *,
        max_new_tokens: int = SampleConfig.max_new_tokens,
        temperature: float = SampleConfig.temperature,
        top_k: int | None = SampleConfig.top_k,
        top_p: float | None = SampleConfig.top_p,
        min_p: float = SampleConfig.min_p,
        repetition_penalty: float = SampleConfig.repetition_penalty,
        presence_penalty: float = SampleConfig.presence_penalty,
        frequency_penalty: float = SampleConfig.frequency_penalty,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        min_new_tokens: int = SampleConfig.min_new_tokens,
        long_prompt: str = "keep_tail",
    ) -> str | list[str] | np.ndarray:
        """The context with its continuation: a text for a text, a list for a list, int32 [B, T + new] for [B, T].

        A prompt's text depends on the prompt and the seed alone, not on the rest of its list. Returned text
        holds no special token; a token row is padded with the stop token that ended it.

        Args:
            temperature: 0 is greedy.
            top_k, top_p: keep the k likeliest tokens, then those that make up probability p; None: all.
            min_p: then those at least this times as likely as the likeliest.
            repetition_penalty: what the logit of a token that the text holds already is divided by, or multiplied
                with where it is negative; 1: none.
            presence_penalty, frequency_penalty: what is subtracted from the logit of a token that the continuation
                holds already, once and for each time.
            logit_bias: token -> what is added to its logit; -inf forbids it.
            stop_tokens: ids that end a row; None: the tokenizer's end of text, (): none.
            min_new_tokens: as many tokens come before a stop token may.
            long_prompt: what becomes of a prompt longer than block_size. "keep_tail": the model sees its
                tail (with rope: all of it, through a window of block_size). "error": InputError.

        Raises:
            InputError: a value outside its range, a token outside the vocabulary, an empty prompt for a
                tokenizer without a beginning-of-text token.
        """
        request = dict(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
            stop_tokens=stop_tokens,
            min_new_tokens=min_new_tokens,
            long_prompt=long_prompt,
        )
        if isinstance(context, str):
            return self._continue_texts([context], [0], **request)[0]
        if isinstance(context, list | tuple) and all(isinstance(text, str) for text in context):
            return self._continue_texts(list(context), [0] * len(context), **request)
        rows = self._checked_tokens(context)
        continued = self._continue(rows.tolist(), [0] * len(rows), **request)
        out = np.zeros((rows.shape[0], rows.shape[1] + max_new_tokens), np.int32)
        for i, (row, new) in enumerate(zip(rows, continued, strict=True)):
            padding = [new[-1]] * (max_new_tokens - len(new)) if new else []
            out[i] = [*row, *new, *padding]
        return out

    def samples(self, prompt: str, *, num_samples: int, **request: Any) -> list[str]:
        """`num_samples` continuations of one prompt, the first as `generate` makes it; the same arguments."""
        parameters = inspect.signature(self.generate).parameters.values()
        request = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | request
        return self._continue_texts([prompt] * num_samples, range(num_samples), **request)

    def save(self, path: str | Path) -> None:
        """Writes a run's folder that `load` opens: config.json, tokenizer.json and one checkpoint.

        Raises:
            InputError: the folder holds a run already.
        """
        path = Path(os.path.expanduser(path))
        if (path / "config.json").exists():
            raise InputError(f"{str(path)!r} holds a run already; save to another folder")
        with checkpoint.open_checkpoints(path / "checkpoints") as manager:
            checkpoint.save(manager, 0, {"params": self.params}, val_loss=None)
        pretrained.write_run(path, self.config, self.tokenizer)

    def _continue_texts(self, texts: Sequence[str], numbers: Sequence[int], **request: Any) -> list[str]:
        prompts = [self.encode_prompt(text) for text in texts]
        continued = self._continue(prompts, numbers, **request)
        return [
            _join(text, self.tokenizer.decode(prompt), self.tokenizer.decode(prompt + new))
            for text, prompt, new in zip(texts, prompts, continued, strict=True)
        ]

    def _continue(
        self,
        prompts: Sequence[list[int]],
        numbers: Sequence[int],
        *,
        max_new_tokens: int,
        top_k: int | None,
        top_p: float | None,
        logit_bias: Mapping[int, float] | None,
        seed: int,
        stop_tokens: Sequence[int] | None,
        min_new_tokens: int,
        long_prompt: str,
        **numeric: float,
    ) -> list[list[int]]:
        """The new tokens of each prompt, the stop token included; `numbers` tells equal prompts' keys apart.

        `numeric` are the fields of `generate.SamplingConfig` that go there as they are.
        """
        check_sampling(
            max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens, **numeric
        )
        bias = self._dense_bias(logit_bias or {})
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed ({seed}) must be at least 0 and at most {MAX_SEED}")
        cfg = self.config.model
        longest = max((len(prompt) for prompt in prompts), default=0)
        if long_prompt not in ("keep_tail", "error"):
            raise InputError(f"long_prompt ({long_prompt!r}) must be 'keep_tail' or 'error'")
        if long_prompt == "error" and longest > cfg.block_size:
            raise InputError(
                f"a prompt of {longest} tokens is longer than block_size ({cfg.block_size}); shorten it, or "
                "long_prompt='keep_tail' lets the model see its tail"
            )
        if not prompts or max_new_tokens == 0:
            return [[] for _ in prompts]
        if stop_tokens is None:
            stop_tokens = () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)
        # A power of two, so that prompts of about the same length share one compiled program.
        width = max(16, 1 << (longest - 1).bit_length())
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        everywhere = functools.partial(np.full, len(prompts))
        out = _generate(
            cfg,
            self.params,
            tokens,
            lengths,
            jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(numbers)),
            generate.SamplingConfig(
                top_k=everywhere(min(top_k or cfg.vocab_size, cfg.vocab_size), np.int32),
                top_p=everywhere(1.0 if top_p is None else top_p, np.float32),
                logit_bias=np.broadcast_to(bias, (len(prompts), cfg.vocab_size)),
                min_new_tokens=everywhere(min_new_tokens, np.int32),
                **{name: everywhere(value, np.float32) for name, value in numeric.items()},
            ),
            max_new_tokens=max_new_tokens,
            slide=not cfg.use_rope and longest + max_new_tokens > cfg.block_size,
            num_ids=min(self.tokenizer.vocab_size, cfg.vocab_size),
            stop_tokens=tuple(int(token) for token in stop_tokens),
        )
        rows, ends = np.asarray(out.tokens), np.asarray(out.lengths)
        return [row[start:end].tolist() for row, start, end in zip(rows, lengths, ends, strict=True)]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that `generate` continues, BOS included where the tokenizer says so."""
        tokenizer = self.tokenizer
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = (begin if tokenizer.add_bos else []) + tokenizer.encode(text)
        if not ids and not begin:
            raise InputError(
                "the prompt is empty and this tokenizer has no beginning-of-text token to start from; "
                "give at least one character"
            )
        return ids or begin

    def _dense_bias(self, logit_bias: Mapping[int, float]) -> Float[np.ndarray, "V"]:
        bias = np.zeros(self.config.model.vocab_size, np.float32)
        for token, value in logit_bias.items():
            if not 0 <= token < len(bias):
                raise InputError(f"logit_bias: token {token} is not in the vocabulary (0 to {len(bias) - 1})")
            if math.isnan(value) or value == math.inf:
                raise InputError(f"logit_bias of token {token} ({value}) must be a finite number, or -inf")
            bias[token] = value
        return bias

    def _checked_tokens(self, tokens: Any) -> np.ndarray:
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise InputError("tokens must be integers of shape [B, T], got rows of different lengths") from None
        vocab_size = self.config.model.vocab_size
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise InputError(
                f"tokens must be integers of shape [B, T], got {tokens.dtype} of shape {list(tokens.shape)}"
            )
        if tokens.size == 0:
            raise InputError(f"tokens of shape {list(tokens.shape)} hold no token; give each row at least one")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise InputError(f"token {worst} is not in the vocabulary (0 to {vocab_size - 1})")
        return tokens.astype(np.int32)


def _join(text: str, prompt: str, whole: str) -> str:
    """The text and what follows it. Decoded together, since a character's bytes may lie on both sides;
    the text itself stays as it was given where a tokenizer does not give it back exactly."""
    return text + whole.removeprefix(prompt)


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: model.Params, tokens: Array) -> Array:
    return model.Transformer(cfg).apply({"params": params}, tokens)[0]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "slide", "num_ids", "stop_tokens"))
def _generate(
    cfg: ModelConfig,
    params: model.Params,
    tokens: Array,
    lengths: Array,
    keys: Array,
    sampling: generate.SamplingConfig,
    *,
    max_new_tokens: int,
    slide: bool,
    num_ids: int,
    stop_tokens: tuple[int, ...],
) -> generate.Generation:
    def apply_fn(params: model.Params, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        logits, cache = model.Transformer(cfg).apply({"params": params}, tokens, positions, cache)
        # Ids that only pad the vocabulary stand for no text.
        return jnp.where(jnp.arange(cfg.vocab_size) < num_ids, logits, -jnp.inf), cache

    # Once, before the loop: inside it each token would slice every layer out of the stack again.
    params = {**params, "blocks": model.split_layers(params["blocks"], cfg.n_layer)}
    request = dict(max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    if slide:
        return generate.generate_uncached(
            apply_fn, params, tokens, lengths, keys, sampling, context=cfg.block_size, **request
        )
    init_cache = functools.partial(model.init_cache, cfg)
    return generate.generate(apply_fn, params, tokens, lengths, keys, sampling, init_cache=init_cache, **request)
