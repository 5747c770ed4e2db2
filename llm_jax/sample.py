"""Text from a model: python -m llm_jax.sample --workdir=runs/small --prompt="def " --temperature=0.8 --top_p=0.95

Standard output holds the text alone, each sample ending with a newline.
"""

import json

from absl import flags as absl_flags

from llm_jax import flags
from llm_jax.config import MAX_SEED, SampleConfig, check_sampling
from llm_jax.errors import InputError

_WORKDIR = absl_flags.DEFINE_string("workdir", None, "Folder of a run.")
_STEP = absl_flags.DEFINE_string("step", "best", "Checkpoint: best (by val_loss), last, or a number.")
_PROMPT = absl_flags.DEFINE_string("prompt", SampleConfig.prompt, "Text to continue.")
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
_MIN_NEW_TOKENS = absl_flags.DEFINE_integer(
    "min_new_tokens", SampleConfig.min_new_tokens, "So many before the end of text may come."
)
_SEED = absl_flags.DEFINE_integer(
    "seed", 0, "The same seed gives the same text.", lower_bound=0, upper_bound=MAX_SEED
)
_NUM_SAMPLES = absl_flags.DEFINE_integer("num_samples", 1, "Continuations of the prompt.", lower_bound=1)
_LONG_PROMPT = absl_flags.DEFINE_enum("long_prompt", "keep_tail", ["keep_tail", "error"], "Past the context.")
_JSON = absl_flags.DEFINE_bool("json", False, "One JSON string a line.")


def main() -> None:
    if _WORKDIR.value is None:
        raise InputError("no --workdir given; for example --workdir=runs/small")
    request = dict(
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
    check_sampling(**request)  # before the model is loaded
    with flags.importing():
        from llm_jax.cache import cache_folder, keep_compiled_programs
        from llm_jax.language_model import load

    keep_compiled_programs(cache_folder())
    language_model = load(_WORKDIR.value, step=_STEP.value)
    samples = language_model.generate_detailed(
        _PROMPT.value,
        num_samples=_NUM_SAMPLES.value,
        seed=_SEED.value,
        long_prompt=_LONG_PROMPT.value,
        **request,
    )
    for sample in samples:
        print(json.dumps(sample.text) if _JSON.value else sample.text, flush=True)


if __name__ == "__main__":
    flags.run(main)
