"""LanguageModel: a model with its tokenizer, as a notebook uses it."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax import checkpoint, decode_weights, decoding, engine, export, model, pretrained, published, run_folder
from llm_jax.config import CACHE_DTYPES, WEIGHTS, Config, ModelConfig
from llm_jax.config_rules import stretched
from llm_jax.errors import InputError
from llm_jax.text_model import TextModel
from llm_jax.tokenizers import Tokenizer, load_tokenizer

MAX_DRAFT_TOKENS = 64


def load(
    path: str | Path,
    *,
    step: int | str = "best",
    dtype: str | None = None,
    weights: str | None = None,
    cache_dtype: str | None = None,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
) -> "LanguageModel":
    """Opens the model at `path`: the workdir of a run, a Hugging Face folder, or llama2.c's model.bin.

    Args:
        step: of a run, the checkpoint: "best" (by val_loss) | "last" | a number.
        dtype: of parameters and computation, "float32" or "bfloat16"; None: as they are stored (float16 as float32).
        weights: "int8": `generate` multiplies by weights rounded to int8, each output's row with a scale of its own,
            and rounds what it multiplies too; `logits` and `score` do as well, `params` are kept besides, and the
            experts of a mixture stay as they are. None: all do.
        cache_dtype: of keys and values of earlier tokens, "float32", "bfloat16" or "int8"; None: `dtype`. Where
            prompts and new tokens of a list outgrow learned positions, nothing is kept, nor rounded so.
        rope_scaling, rope_factor: lets the model see that many times its block_size, by "linear", "ntk", "llama3" or
            "yarn".
        tokenizer: in the place of the model's own; or the path of a tokenizer.json, tokenizer.model or their folder.

    Raises:
        InputError: there is no model or no such checkpoint, it is of a family that is not known here, or its files
            are damaged; a value that is not among these.
    """
    for name, value, choices in (("weights", weights, WEIGHTS), ("cache_dtype", cache_dtype, CACHE_DTYPES)):
        if value is not None and value not in choices:
            raise InputError(f"{name} ({value!r}) must be one of {', '.join(choices)}")
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(os.path.expanduser(tokenizer))
    source = pretrained.open_model(path, step=step, tokenizer=tokenizer)
    config, params = pretrained.load_params(source, dtype)
    config = stretched(config, rope_scaling=rope_scaling, rope_factor=rope_factor)
    return LanguageModel(config, params, source.tokenizer, weights=weights, cache_dtype=cache_dtype)


class LanguageModel(TextModel):
    """Parameters, their config, and the tokenizer they were trained with; `weights`, `cache_dtype` as in `load`."""

    def __init__(
        self,
        config: Config,
        params: model.Params,
        tokenizer: Tokenizer,
        *,
        weights: str | None = None,
        cache_dtype: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            vocab_size=config.model.vocab_size,
            block_size=config.model.block_size,
            stop_tokens=config.sample.stop_tokens,
        )
        self.config = config
        self.params = params
        self.weights = weights
        self.cache_dtype = cache_dtype
        self._laid_out: tuple[list[Array], model.Params] | None = None  # the parameters' leaves, and they laid out

    def logits(self, tokens: Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray) -> Float[Array, "B T V"]:
        """Scores of every next token, float32; column t predicts token t + 1."""
        tokens = self._checked_tokens(tokens)
        self._check_positions(tokens.shape[1])
        return _logits(self.config.model, self._inference_params(), jnp.asarray(tokens))

    def score(self, text: str | Sequence[int]) -> Float[np.ndarray, "n"]:
        """The log-probability, in nats, of each token of a text but the first, given those before it.

        The tokens are those that `generate` would start from (`encode_prompt`, with BOS where the model wants it), or
        the given ids. Their sum is the log-probability of the text after its first token.

        Raises:
            InputError: a text of no token, ids outside the vocabulary, more tokens than there are learned positions.
        """
        ids = self.encode_prompt(text) if isinstance(text, str) else self._checked_tokens([text])[0]
        self._check_positions(len(ids))
        tokens = np.zeros(decoding.bucket(len(ids)), np.int32)
        tokens[: len(ids)] = ids
        if not self.config.model.use_rope:
            tokens = tokens[: self.config.model.block_size]
        program = self._program(0)
        logprobs = _score(program.cfg, program.num_ids, self._inference_params(), tokens, np.int32(len(ids)))
        return np.asarray(logprobs)[: len(ids) - 1]

    def save(self, path: str | Path) -> None:
        """Writes a run's folder that `load` opens: config.json, tokenizer.json and one checkpoint.

        Raises:
            InputError: the folder holds a run already.
        """
        path = Path(os.path.expanduser(path))
        if (path / "config.json").exists():
            raise InputError(f"{str(path)!r} holds a run already; save to another folder")
        run_folder.make_folder(path)
        with checkpoint.open_checkpoints(path / "checkpoints") as manager:
            checkpoint.save(manager, 0, {"params": self.params}, val_loss=None)
        run_folder.write_run(path, self.config, self.tokenizer)

    def save_gguf(self, path: str | Path, *, dtype: str | None = None) -> None:
        """Writes a GGUF file that llama.cpp runs, its tokenizer and chat template with it.

        Args:
            dtype: of matrices, "float32", "bfloat16", "float16" or "q8_0"; None: as the parameters are.

        Raises:
            InputError: llama.cpp has no architecture of this shape (it names the fields that have no counterpart), or
                does not split text as the tokenizer does; the file is there.
        """
        if dtype is not None and dtype not in published.GGUF_TYPES:
            raise InputError(f"dtype ({dtype!r}) must be one of {', '.join(published.GGUF_TYPES)}")
        published.save_gguf(self._source(), Path(os.path.expanduser(path)), dtype=dtype)

    def _source(self) -> pretrained.Source:
        return pretrained.Source("the model", self.config, self.tokenizer, pretrained.part_of(self.params))

    def save_pretrained(
        self, folder: str | Path, *, dtype: str | None = None, max_shard_bytes: int = published.MAX_SHARD_BYTES
    ) -> None:
        """Writes a Hugging Face folder that transformers opens with equal logits.

        As `config.model.family`, or the first published family that has this model's shape.

        Args:
            dtype: "float32", "bfloat16" or "float16"; None: as the parameters are.
            max_shard_bytes: of a file of weights, unless one tensor has more.

        Raises:
            InputError: no family has this shape (it names the fields that have no counterpart); the folder is there.
        """
        if dtype is not None and dtype not in published.HF_DTYPES:
            raise InputError(f"dtype ({dtype!r}) must be one of {', '.join(published.HF_DTYPES)}")
        folder = Path(os.path.expanduser(folder))
        published.save_hf(self._source(), folder, dtype=dtype, max_shard_bytes=max_shard_bytes)

    def export(self, path: str | Path, *, platforms: Sequence[str] = ()) -> None:
        """Writes a folder that `llm_jax.load_exported` opens: compiled forms, parameters, tokenizer.

        With `weights` and `cache_dtype` as this model has them, and room for a text of any length in its cache.

        Args:
            platforms: of "cpu", "cuda", "rocm", "tpu", whichever this machine has; none: the one it runs on.
        """
        if not self.config.model.use_rope:
            raise InputError("a model with learned positions can't be exported yet; its tokens move past block_size")
        path = os.path.expanduser(path)
        how = dict(stop_tokens=self._stop_tokens, platforms=platforms)
        export.export(path, self._program(0), self._decode_params(), self.tokenizer, **how)

    def _engine(self, length: int, draft: Any, draft_tokens: int) -> engine.ModelEngine:
        self._check_draft(draft, draft_tokens, length)
        program = self._program(length)
        cfg = self.config.model
        grows_longer = cfg.rope_scaling == "longrope" and length > cfg.rope_original_length
        # Past learned positions nothing is kept, and nothing gained by a guess. Where longrope's frequencies change,
        # tokens that are read at once would all be read by the last one's.
        if draft is None or program.slides or grows_longer:
            return engine.ModelEngine(program, self._decode_params())
        if draft == "lookup":
            return engine.ModelEngine(program, self._decode_params(), guesses=engine.Guesses(draft_tokens))
        guesses = engine.Guesses(draft_tokens, draft._program(length))
        params = draft._decode_params()
        return engine.ModelEngine(program, self._decode_params(), guesses=guesses, draft_params=params)

    def _program(self, length: int) -> engine.Program:
        cfg = self.config.model
        num_ids = min(self.tokenizer.vocab_size, cfg.vocab_size)
        slides = not cfg.use_rope and length > cfg.block_size
        return engine.Program(cfg, num_ids, cache_dtype=self.cache_dtype, slides=slides)

    def _check_draft(self, draft: Any, draft_tokens: int, length: int) -> None:
        if not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise InputError(f"draft_tokens ({draft_tokens}) must be at least 1 and at most {MAX_DRAFT_TOKENS}")
        if draft is None or draft == "lookup":
            return
        if not isinstance(draft, LanguageModel):
            raise InputError(f"draft ({draft!r}) must be a LanguageModel or 'lookup'")
        if draft.tokenizer.fingerprint() != self.tokenizer.fingerprint():
            raise InputError("the draft has another tokenizer than this model; its tokens would mean something else")
        cfg, own = draft.config.model, self.config.model
        if cfg.vocab_size != own.vocab_size:
            raise InputError(f"the draft has a vocab_size of {cfg.vocab_size}, this model of {own.vocab_size}")
        if not cfg.use_rope and length > cfg.block_size:
            raise InputError(
                f"prompt and new tokens ({length}) are more than the draft's {cfg.block_size} learned positions"
            )

    def _decode_params(self) -> model.Params:
        leaves = jax.tree.leaves(self.params)
        if self._laid_out is None or any(new is not old for new, old in zip(leaves, self._laid_out[0], strict=True)):
            laid_out = decode_weights.lay_out(self.config.model, self.params, int8=self.weights == "int8")
            self._laid_out = leaves, laid_out
        return self._laid_out[1]

    def _inference_params(self) -> model.Params:
        """What `logits` and `score` multiply by: rounded weights where `generate` does."""
        return self.params if self.weights is None else self._decode_params()

    def _check_positions(self, length: int) -> None:
        cfg = self.config.model
        if not cfg.use_rope and length > cfg.block_size:
            raise InputError(
                f"{length} tokens are more than this model's {cfg.block_size} learned positions; give fewer"
            )


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: model.Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return model.Transformer(cfg).apply({"params": params}, tokens)[0]


SCORED = 128  # positions whose logits are held at a time


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    cfg: ModelConfig, num_ids: int, params: model.Params, tokens: Int[Array, "T"], length: Int[Array, ""]
) -> Float[Array, "T-1"]:
    positions = None
    if cfg.rope_scaling == "longrope":  # which asks how long a text is; without, they are known numbers
        positions = jnp.arange(len(tokens))
        positions = jnp.where(positions < length, positions, -1)[None]
    hidden, output, _ = model.Transformer(cfg).apply({"params": params}, tokens[None], positions, method="hidden")

    def logprob(position: tuple[Array, Array]) -> Array:
        hidden, target = position
        logits = model.output_logits(cfg, hidden[None, None], output)[0, 0]
        logits = jnp.where(jnp.arange(cfg.vocab_size) < num_ids, logits, -jnp.inf)  # as when generating
        return logits[target] - jax.nn.logsumexp(logits)

    return jax.lax.map(logprob, (hidden[0, :-1], tokens[1:]), batch_size=SCORED)
