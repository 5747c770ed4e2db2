"""Text from a model: python -m llm_jax.sample --workdir=runs/small --prompt="def " --temperature=0.8 --top_p=0.95

Standard output holds the text alone, as it comes, each sample ending with a newline; how fast it came is told on
standard error. With --interactive each line that is typed is added to the text, which the model goes on with, until
the end of input (Ctrl-D); Ctrl-C ends a continuation early.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from llm_jax import flags
from llm_jax.config import CACHE_DTYPES, DTYPES, MAX_SEED, WEIGHTS, SampleConfig
from llm_jax.errors import InputError
from llm_jax.progress import say
from llm_jax.sampling_rules import check_sampling

_WORKDIR = absl_flags.DEFINE_string(
    "workdir", None, "Folder of a run, or any other model: a Hugging Face folder, a GGUF file, llama2.c's .bin."
)
_TOKENIZER = absl_flags.DEFINE_string("tokenizer", None, "Path of one to take in the place of the model's own.")
_STEP = absl_flags.DEFINE_string("step", "best", "Checkpoint: best (by val_loss), last, or a number.")
_DTYPE = absl_flags.DEFINE_enum("dtype", None, DTYPES, "Of parameters and computation. Default: as trained.")
_WEIGHTS = absl_flags.DEFINE_enum("weights", None, WEIGHTS, "Rounded to this. Default: as they are.")
_CACHE_DTYPE = absl_flags.DEFINE_enum("cache_dtype", None, CACHE_DTYPES, "Of keys and values of earlier tokens.")
_ROPE_SCALING = absl_flags.DEFINE_string(
    "rope_scaling", None, "How positions are stretched: linear, ntk, llama3 or yarn; with --rope_factor."
)
_ROPE_FACTOR = absl_flags.DEFINE_float("rope_factor", None, "How many times block_size the model then sees.")
_PROMPT = absl_flags.DEFINE_string("prompt", SampleConfig.prompt, "Text to continue.")
_PROMPT_FILE = absl_flags.DEFINE_string("prompt_file", None, "File that holds it instead; -: standard input.")
_INTERACTIVE = absl_flags.DEFINE_bool("interactive", False, "Continues what is typed, line by line.")
_MAX_NEW_TOKENS = absl_flags.DEFINE_integer("max_new_tokens", SampleConfig.max_new_tokens, "Tokens to add.")
_TEMPERATURE = absl_flags.DEFINE_float("temperature", SampleConfig.temperature, "0 is greedy.")
_TOP_K = absl_flags.DEFINE_integer("top_k", SampleConfig.top_k, "Keep the k likeliest tokens. Default: all.")
_TOP_P = absl_flags.DEFINE_float(
    "top_p", SampleConfig.top_p, "Keep the likeliest tokens of probability p. Default: all."
)
_MIN_P = absl_flags.DEFINE_float(
    "min_p", SampleConfig.min_p, "Then those at least this times as likely as the likeliest."
)
_REPETITION_PENALTY = absl_flags.DEFINE_float(
    "repetition_penalty",
    SampleConfig.repetition_penalty,
    "Divides the logits of tokens that the text holds already (multiplies negative ones).",
)
_PRESENCE_PENALTY = absl_flags.DEFINE_float(
    "presence_penalty",
    SampleConfig.presence_penalty,
    "Subtracted from the logits of tokens that were added already.",
)
_FREQUENCY_PENALTY = absl_flags.DEFINE_float(
    "frequency_penalty", SampleConfig.frequency_penalty, "The same, for each time."
)
_LOGIT_BIAS = absl_flags.DEFINE_list(
    "logit_bias", [], "What is added to the logits of tokens, such as 13:-inf,198:2.5."
)
_STOP_TOKENS = absl_flags.DEFINE_list(
    "stop_tokens", None, "Ids that end the text. Default: the tokenizer's end of text; empty: none."
)
_STOP = absl_flags.DEFINE_multi_string("stop", [], "Text that ends it, and is not shown; may be given several times.")
_MIN_NEW_TOKENS = absl_flags.DEFINE_integer(
    "min_new_tokens", SampleConfig.min_new_tokens, "So many before a stop token may come."
)
_SEED = absl_flags.DEFINE_integer(
    "seed", 0, "The same seed gives the same text.", lower_bound=0, upper_bound=MAX_SEED
)
_NUM_SAMPLES = absl_flags.DEFINE_integer("num_samples", 1, "Continuations of the prompt.", lower_bound=1)
_LONG_PROMPT = absl_flags.DEFINE_enum("long_prompt", "keep_tail", ["keep_tail", "error"], "Past the context.")
_DRAFT = absl_flags.DEFINE_string(
    "draft", None, "Guesses ahead, for speed: folder of a smaller model of the same tokenizer, or lookup."
)
_DRAFT_TOKENS = absl_flags.DEFINE_integer("draft_tokens", None, "How many. Default: as generate's.")
_JSON = absl_flags.DEFINE_bool("json", False, "One JSON string a line.")


def main() -> None:
    if _WORKDIR.value is None:
        raise InputError("no --workdir given; for example --workdir=runs/small")
    numeric = dict(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        presence_penalty=_PRESENCE_PENALTY.value,
        frequency_penalty=_FREQUENCY_PENALTY.value,
        min_new_tokens=_MIN_NEW_TOKENS.value,
    )
    check_sampling(**numeric)  # before the model is loaded
    settings = numeric | dict(
        logit_bias=_logit_bias(_LOGIT_BIAS.value),
        stop_tokens=_stop_tokens(_STOP_TOKENS.value),
        stop_strings=_STOP.value,
        seed=_SEED.value,
        long_prompt=_LONG_PROMPT.value,
    )
    if _INTERACTIVE.value and (_JSON.value or _NUM_SAMPLES.value > 1 or _PROMPT_FILE.value == "-"):
        raise InputError("--interactive shows one text as it comes: without --json, --num_samples, --prompt_file=-")
    if absl_flags.FLAGS["prompt"].present and _PROMPT_FILE.value is not None:
        raise InputError(f"--prompt and --prompt_file ({_PROMPT_FILE.value}) both give the prompt; leave one out")
    prompt = _PROMPT.value if _PROMPT_FILE.value is None else _read(_PROMPT_FILE.value)
    with flags.importing():
        from llm_jax.cache import cache_folder, keep_compiled_programs
        from llm_jax.language_model import load

    keep_compiled_programs(cache_folder())
    language_model = load(
        _WORKDIR.value,
        step=_STEP.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        cache_dtype=_CACHE_DTYPE.value,
        rope_scaling=_ROPE_SCALING.value,
        rope_factor=_ROPE_FACTOR.value,
        tokenizer=_TOKENIZER.value,
    )
    if _DRAFT.value is not None:
        settings["draft"] = "lookup" if _DRAFT.value == "lookup" else load(_DRAFT.value)
    if _DRAFT_TOKENS.value is not None:
        settings["draft_tokens"] = _DRAFT_TOKENS.value
    if _INTERACTIVE.value:
        given = absl_flags.FLAGS["prompt"].present or _PROMPT_FILE.value is not None
        _converse(language_model, prompt if given else "", settings)
    else:
        _sample(language_model, prompt, settings)


def _sample(language_model: Any, prompt: str, settings: dict[str, Any]) -> None:
    speed, streams = _Speed(), _NUM_SAMPLES.value == 1 and not _JSON.value
    rows, pieces = language_model.start(prompt, num_samples=_NUM_SAMPLES.value, **settings)
    if streams:
        print(prompt, end="", flush=True)
    for piece, *_ in pieces:
        speed.note(rows)
        if streams:
            print(piece, end="", flush=True)
    if streams:
        print(flush=True)
    else:
        for row in rows:
            print(json.dumps(row.text) if _JSON.value else row.text, flush=True)
    speed.tell(rows)


def _converse(language_model: Any, text: str, settings: dict[str, Any]) -> None:
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        speed = _Speed()
        try:
            rows, pieces = language_model.start(text + line, **settings)
        except InputError as error:  # of this line alone
            say(f"error: {error}")
            continue
        text += line
        try:
            for [piece] in pieces:
                speed.note(rows)
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # enough of this one
            pass
        print(flush=True)
        text += "\n"
        speed.tell(rows)


class _Speed:
    """Tells how fast text came: the first token, and those after the second call, which may have compiled."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._calls: list[tuple[float, int]] = []  # (seconds, tokens) after the first two

    def note(self, rows: list[Any]) -> None:
        if len(self._calls) < 2:
            self._calls.append((time.monotonic(), sum(len(row.tokens) for row in rows)))

    def tell(self, rows: list[Any]) -> None:
        count = sum(len(row.tokens) for row in rows)
        if not count:
            return
        seconds, counted = self._calls[-1]
        speed = f", then {(count - counted) / (time.monotonic() - seconds):,.1f} tokens/s" if count > counted else ""
        say(f"{count} tokens: the first after {self._calls[0][0] - self._start:.2f} s{speed}")


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise InputError(f"--prompt_file ({path}) can't be read ({error.strerror}); give a text file, or -") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt_file ({path}) is not UTF-8 (byte {error.start}); give a text file") from None


def _stop_tokens(texts: list[str] | None) -> list[int] | None:
    if texts is None:
        return None
    texts = [text for text in texts if text]
    if not all(text.isdecimal() for text in texts):
        raise InputError(f"--stop_tokens ({','.join(texts)}) must be ids of tokens, such as 0,13")
    return [int(text) for text in texts]


def _logit_bias(texts: list[str]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in (text.split(":") for text in texts)}
    except ValueError:
        raise InputError(f"--logit_bias ({','.join(texts)}) must be token:number, such as 13:-inf,198:2.5") from None


if __name__ == "__main__":
    flags.run(main)
