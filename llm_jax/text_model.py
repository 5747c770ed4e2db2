"""Text from whatever continues tokens: prompts, settings and stop strings in; text, pieces of it, details out."""

import abc
import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax import chat, decoding, generate
from llm_jax.config import MAX_SEED, SampleConfig
from llm_jax.continuation import UNKNOWN, Continuation
from llm_jax.errors import InputError
from llm_jax.sampling_rules import check_sampling, number, whole_number
from llm_jax.tokenizers import Tokenizer

# Fields of generate.SamplingConfig that settings of `generate` become as they are.
NUMERIC = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
DRAFT_TOKENS = 4
MAX_BIAS = 1e30

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray


class Sample(NamedTuple):
    """One continuation of `generate_detailed`."""

    text: str  # as `generate` returns it
    tokens: list[int]  # of the continuation, the one included that ended it
    logprobs: list[float]  # of each, by the unmodified model (temperature 1, no mask), in nats
    top_logprobs: list[dict[int, float]]  # of each, {likely token: its log-probability}
    stop_reason: str  # "length" | "stop_token" | "stop_string"


class Encoded(NamedTuple):
    """A whole text and its ids, where they are not what `TextModel.encode_prompt` makes of it."""

    text: str
    ids: list[int]


class TextModel(abc.ABC):
    """What `LanguageModel` and an exported model have in common. A subclass says what continues tokens: `_engine`."""

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, block_size: int, stop_tokens: Sequence[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._stop_tokens = eos if stop_tokens is None else tuple(stop_tokens)
        self._vocab_size, self._block_size = vocab_size, block_size
        self._num_ids = min(tokenizer.vocab_size, vocab_size)  # ids from there on stand for no text

    @abc.abstractmethod
    def _engine(self, length: int, draft: Any, draft_tokens: int) -> decoding.Engine:
        """For texts of at most `length` tokens, prompt included; checks the draft. Nothing is generated yet."""

    def generate(
        self,
        context: Prompts,
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
        stop_strings: Sequence[str] = (),
        min_new_tokens: int = SampleConfig.min_new_tokens,
        long_prompt: str = "keep_tail",
        draft: Any = None,
        draft_tokens: int = DRAFT_TOKENS,
    ) -> str | list[str] | np.ndarray:
        """The context with its continuation: a text for a text, a list for a list, int32 [B, T + new] for [B, T].

        A prompt's text depends on the prompt and the seed alone, not on the rest of its list: exactly so in float32.
        In bfloat16, and with weights="int8", two tokens that are nearly as likely can change places with the size of
        the list, and with a draft. Returned text holds no special token; a token row is padded with the token that
        ended it.

        Args:
            temperature: 0 is greedy.
            top_k, top_p: keep the k likeliest tokens, then those that make up probability p; None: all.
            min_p: then those at least this times as likely as the likeliest.
            repetition_penalty: what the logit of a token that the text holds already is divided by, or multiplied
                with where it is negative; 1: none.
            presence_penalty, frequency_penalty: what is subtracted from the logit of a token that the continuation
                holds already, once and for each time.
            logit_bias: token -> what is added to its logit; -inf forbids it.
            stop_tokens: ids that end a row; None: the model's own, else the tokenizer's end of text; (): none.
            stop_strings: texts that end a row, which is cut before the first of them in its continuation.
            min_new_tokens: as many tokens come before a stop token may; stop strings are not held up.
            long_prompt: what becomes of a prompt longer than block_size. "keep_tail": the model sees its
                tail (with rope: all of it, through a window of block_size). "error": InputError.
            draft: what guesses `draft_tokens` tokens ahead, which are then read all at once (speculative decoding):
                a smaller model of the same tokenizer, or "lookup": what followed where the text had the same end
                before. It changes the time, not the text (see above): a guess is kept where this model draws the
                same. It pays where reading the weights is most of a step and guesses are right; looking up costs more
                than it gains in a text that does not repeat itself. Nothing is guessed where a text outgrows learned
                positions.

        Raises:
            InputError: a value outside its range, a token outside the vocabulary, an empty prompt for a
                tokenizer without a beginning-of-text token.
        """
        rows = self._generate(
            context,
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
            stop_strings=stop_strings,
            min_new_tokens=min_new_tokens,
            long_prompt=long_prompt,
            draft=draft,
            draft_tokens=draft_tokens,
        )
        if isinstance(context, str):
            return rows[0].text
        if _is_texts(context):
            return [row.text for row in rows]
        out = np.zeros((len(rows), self._checked_tokens(context).shape[1] + max_new_tokens), np.int32)
        for i, row in enumerate(rows):
            padding = out.shape[1] - len(row.prompt) - len(row.tokens)
            out[i] = [*row.prompt, *row.tokens, *row.tokens[-1:] * padding]
        return out

    def generate_detailed(
        self, context: Prompts, *, num_samples: int = 1, top_logprobs: int = 0, **settings: Any
    ) -> list[Sample]:
        """`num_samples` continuations of each prompt, all of the first prompt's before the second's, with details.

        The first of a prompt is what `generate` makes of it. The prompt is read once for all of them (by an exported
        model for each).

        Args:
            top_logprobs: how many of the likeliest tokens are told with each token.
            settings: of `generate`.
        """
        if whole_number("num_samples", num_samples) < 1:
            raise InputError(f"num_samples ({num_samples}) must be 1 or more")
        if not 0 <= whole_number("top_logprobs", top_logprobs) <= self._num_ids:
            raise InputError(f"top_logprobs ({top_logprobs}) must be at least 0 and at most {self._num_ids}")
        rows = self._generate(context, num_samples=num_samples, top_logprobs=top_logprobs, **settings)
        return [Sample(row.text, row.tokens, row.logprobs, row.top_logprobs, row.stop_reason) for row in rows]

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """The continuation that `generate` makes of the prompt, in pieces of whole characters as they come.

        The first is there as soon as the first token is. Settings of `generate`; a wrong one is an error here, not at
        the first piece.
        """
        if not isinstance(prompt, str):
            raise InputError(f"a stream continues one text, got {type(prompt).__name__}")
        if given := settings.keys() & {"num_samples", "top_logprobs"}:
            raise InputError(f"a stream has no {sorted(given)[0]}; generate_detailed does")
        rows, pieces = self.start(prompt, num_samples=1, top_logprobs=0, **settings)
        return (piece for [piece] in pieces if piece)

    def chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> str:
        """The answer to messages ({"role": "user", "content": "..."}, ...) by the model's chat template.

        It is the continuation alone, without special tokens and with its blanks. The tokens that end it are
        stop_tokens, as in `generate`; settings are those of `generate`.

        Raises:
            InputError: a model without a chat template; a wrong setting; else as `chat.render`.
        """
        return "".join(self.stream_chat(messages, **settings))

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Iterator[str]:
        """The answer of `chat`, in pieces as `stream` gives them."""
        rows, pieces = self.start(self.encode_chat(messages), num_samples=1, top_logprobs=0, **settings)
        return (piece for [piece] in pieces if piece)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Encoded:
        """What `chat` continues, for `start`: the template's text up to where the answer begins.

        Names of special tokens in it are special tokens, those in a message too: take them out of messages of unknown
        origin. BOS is put first where the tokenizer says so and the template has not written it.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise InputError("this model has no chat template; use generate, which continues any text")
        name = lambda token: None if token is None else tokenizer.backend.id_to_token(token)
        text = chat.render(
            tokenizer.chat_template,
            messages,
            bos_token=name(tokenizer.bos_id),
            eos_token=name(tokenizer.eos_id),
        )
        ids = tokenizer.encode_special(text)
        return Encoded(text, self._prompt_ids(ids, add_bos=tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]))

    def _generate(self, context: Any, **settings: Any) -> "list[Row]":
        rows, pieces = self.start(context, **settings)
        for _ in pieces:
            pass
        return rows

    def start(
        self,
        context: Any,
        *,
        num_samples: int = 1,
        top_logprobs: int = 0,
        max_new_tokens: int = SampleConfig.max_new_tokens,
        top_k: int | None = SampleConfig.top_k,
        top_p: float | None = SampleConfig.top_p,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        min_new_tokens: int = SampleConfig.min_new_tokens,
        long_prompt: str = "keep_tail",
        draft: Any = None,
        draft_tokens: int = DRAFT_TOKENS,
        **numeric: float,
    ) -> "tuple[list[Row], Iterator[list[str]]]":
        """What the others are made of: rows, and the pieces of text that each call adds to them when asked for.

        Settings are those of `generate_detailed`, and all is checked here.

        `numeric` are the fields of `generate.SamplingConfig` that go there as they are.
        """
        if unknown := numeric.keys() - set(NUMERIC):
            name = sorted(unknown)[0]
            near = difflib.get_close_matches(name, inspect.signature(self.generate).parameters, 1)
            raise TypeError(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        numeric = {name: getattr(SampleConfig, name) for name in NUMERIC} | numeric
        check_sampling(
            max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p, min_new_tokens=min_new_tokens, **numeric
        )
        for name, value in (("seed", seed), ("num_samples", num_samples), ("top_logprobs", top_logprobs)):
            whole_number(name, value)
        whole_number("draft_tokens", draft_tokens)
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed ({seed}) must be at least 0 and at most {MAX_SEED}")
        if isinstance(stop_strings, str) or not isinstance(stop_strings, Iterable):
            raise InputError(f"stop_strings ({stop_strings!r}) must be a list of texts")
        stop_strings = [*stop_strings]
        if not all(isinstance(stop, str) and stop for stop in stop_strings):
            raise InputError(f"stop_strings ({stop_strings!r}) must be texts of at least one character, in a list")
        if stop_tokens is None:
            stop_tokens = self._stop_tokens
        if not isinstance(stop_tokens, Iterable):
            raise InputError(f"stop_tokens ({stop_tokens}) must be a list of ids")
        stop_tokens = [whole_number("stop_tokens", token) for token in stop_tokens]
        if not all(0 <= token < self._vocab_size for token in stop_tokens):
            raise InputError(f"stop_tokens ({stop_tokens}) must be in the vocabulary (0 to {self._vocab_size - 1})")
        bias = self._dense_bias(logit_bias or {}, never=stop_tokens if min_new_tokens else ())
        if long_prompt not in ("keep_tail", "error"):
            raise InputError(f"long_prompt ({long_prompt!r}) must be 'keep_tail' or 'error'")
        texts, prompts = self._prompts(context)
        longest = max((len(prompt) for prompt in prompts), default=0)
        if long_prompt == "error" and longest > self._block_size:
            raise InputError(
                f"a prompt of {longest} tokens is longer than block_size ({self._block_size}); shorten it, or "
                "long_prompt='keep_tail' lets the model see its tail"
            )
        engine = self._engine(longest + max_new_tokens, draft, draft_tokens)
        count = len(prompts) * num_samples
        everywhere = functools.partial(np.full, count)
        request = decoding.Request(
            prompts=prompts,
            numbers=[*range(num_samples)] * len(prompts),
            sampling=generate.SamplingConfig(
                top_k=everywhere(min(top_k or self._vocab_size, self._vocab_size), np.int32),
                top_p=everywhere(1.0 if top_p is None else top_p, np.float32),
                logit_bias=np.broadcast_to(bias, (count, self._vocab_size)),
                min_new_tokens=everywhere(min_new_tokens, np.int32),
                **{name: everywhere(value, np.float32) for name, value in numeric.items()},
            ),
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            num_samples=num_samples,
            top_logprobs=top_logprobs,
        )
        is_text = isinstance(context, str | Encoded) or _is_texts(context)
        rows = [
            Row(prompt, text, Continuation(self.tokenizer, prompt, stop_strings, is_text=is_text))
            for text, prompt in zip(texts, prompts, strict=True)
            for _ in range(num_samples)
        ]
        return rows, self._pieces(rows, request, engine)

    def _pieces(self, rows: "list[Row]", request: decoding.Request, engine: decoding.Engine) -> Iterator[list[str]]:
        if not rows:
            return
        for new in decoding.run(engine, request) if request.max_new_tokens else ():
            yield [row.add(each, request.stop_tokens) for row, each in zip(rows, new, strict=True)]
            request.stopped[:] = [row.continuation.is_stopped for row in rows]
        yield [row.finish() for row in rows]

    def _prompts(self, context: Any) -> tuple[list[str], list[list[int]]]:
        """The text and the ids of each prompt; of a row of ids the text is what it stands for."""
        if isinstance(context, str):
            return [context], [self.encode_prompt(context)]
        if isinstance(context, Encoded):
            return [context.text], [context.ids]
        if not _is_texts(context):
            prompts = self._checked_tokens(context).tolist()
            # A last character may go on in the continuation, which then has all of it.
            return [self.tokenizer.decode(prompt).removesuffix(UNKNOWN) for prompt in prompts], prompts
        prompts = []
        for i, text in enumerate(context):
            try:
                prompts.append(self.encode_prompt(text))
            except InputError as error:
                raise InputError(f"prompt {i} of {len(context)}: {error}") from None
        return list(context), prompts

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that `generate` continues, BOS included where the tokenizer says so."""
        return self._prompt_ids(self.tokenizer.encode(text), add_bos=self.tokenizer.add_bos)

    def _prompt_ids(self, ids: list[int], *, add_bos: bool) -> list[int]:
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = (begin if add_bos else []) + ids
        if not ids and not begin:
            raise InputError(
                "the prompt is empty and this tokenizer has no beginning-of-text token to start from; "
                "give at least one character"
            )
        if ids and (largest := max(ids)) >= self._vocab_size:
            raise InputError(
                f"the text becomes token {largest} ({self.tokenizer.backend.id_to_token(largest)!r}), and this model "
                f"has embeddings of {self._vocab_size}"
            )
        return ids or begin

    def _dense_bias(self, logit_bias: Mapping[int, float], *, never: Sequence[int]) -> Float[np.ndarray, "V"]:
        """By token; `never` are those that may not be drawn anyway, and some other token must be left."""
        bias = np.zeros(self._vocab_size, np.float32)
        if not isinstance(logit_bias, Mapping):
            raise InputError(f"logit_bias ({logit_bias!r}) must be a dict of token -> number")
        for token, value in logit_bias.items():
            whole_number("logit_bias: token", token)
            number(f"logit_bias of token {token}", value)
            if not 0 <= token < len(bias):
                raise InputError(f"logit_bias: token {token} is not in the vocabulary (0 to {len(bias) - 1})")
            if not (value == -math.inf or abs(value) <= MAX_BIAS):
                raise InputError(
                    f"logit_bias of token {token} ({value}) must be -inf, or finite and at most {MAX_BIAS:.0e}"
                )
            bias[token] = value
        allowed = bias[: self._num_ids] > -np.inf
        allowed[[token for token in never if token < self._num_ids]] = False
        if not allowed.any():
            besides = " besides stop_tokens, which min_new_tokens holds up" if len(never) else ""
            raise InputError(f"logit_bias forbids every token{besides}; leave at least one")
        return bias

    def _checked_tokens(self, tokens: Any) -> np.ndarray:
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise InputError("tokens must be integers of shape [B, T], got rows of different lengths") from None
        vocab_size = self._vocab_size
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


@dataclasses.dataclass
class Row:
    """One row of `TextModel.start`, as it grows."""

    prompt: list[int]
    text: str  # the prompt's, as it was given: a tokenizer may not give it back exactly
    continuation: Continuation
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    stop_reason: str = "length"

    def add(self, new: decoding.NewTokens, stop_tokens: Sequence[int]) -> str:
        piece = self.continuation.add(new.tokens)
        count = self.continuation.num_tokens - len(self.tokens)
        for field, values in zip(new._fields, new, strict=True):
            getattr(self, field).extend(values[:count])
        if self.continuation.is_stopped:
            self.stop_reason = "stop_string"
        elif self.tokens[-1] in stop_tokens:
            self.stop_reason = "stop_token"
        self.text += piece
        return piece

    def finish(self) -> str:
        piece = self.continuation.finish()
        if self.continuation.is_stopped:
            self.stop_reason = "stop_string"
        self.text += piece
        return piece


def _is_texts(context: Any) -> bool:
    return isinstance(context, list | tuple) and all(isinstance(text, str) for text in context)
