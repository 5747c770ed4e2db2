"""generation_config.json <-> fields of SampleConfig."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import SampleConfig
from llm_jax.errors import InputError
from llm_jax.files import read_json
from llm_jax.interop.network import named, shown

# generation_config.json's key -> SampleConfig's field and the value of either that stands for none
GENERATION = {
    "temperature": ("temperature", None),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", None),
    "repetition_penalty": ("repetition_penalty", None),
}
TOP_K = 50  # what transformers takes where a model is to be sampled and the file does not say
LENGTHS = ("max_new_tokens", "min_new_tokens")
# Its other keys that are of no consequence for a text, by themselves; the second: with these values.
GENERATION_IGNORED = frozenset(
    "_from_model_config bos_token_id cache_config cache_implementation chat_format compile_config "
    "decoder_start_token_id do_sample eos_token_id max_length output_attentions output_hidden_states output_logits "
    "output_scores pad_token_id return_dict_in_generate transformers_version trust_remote_code use_cache".split()
)
GENERATION_NEUTRAL = {
    "diversity_penalty": 0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "length_penalty": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "typical_p": 1,
}


# What an older config.json may say of it.
KEYS = frozenset({*GENERATION, *LENGTHS, "do_sample", "max_length"})


def read_generation(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """How the model's makers sample from it, and what ends a text.

    Returns:
        SampleConfig's fields, and the keys of generation_config.json that are not known here and change a text.
    """
    file = folder / "generation_config.json"
    # Older models have it in config.json.
    given = read_json(file, remedy="repair or remove it") if file.is_file() else _within(config)
    if type(given.get("do_sample") or False) is not bool:
        raise InputError(f"generation_config.json: do_sample ({shown(given['do_sample'])}) must be true or false")
    given = {key: value for key, value in given.items() if value is not None}
    fields: dict[str, Any] = {key: given[key] for key in LENGTHS if key in given}
    if given.get("do_sample"):
        for key, (field, none) in GENERATION.items():
            value = given.get(key, TOP_K if key == "top_k" else None)
            if value is not None:
                fields[field] = None if none is not None and value == none else value
    else:
        fields["temperature"] = 0.0  # greedy, as transformers then is
        if "repetition_penalty" in given:
            fields["repetition_penalty"] = given["repetition_penalty"]
    stop = given.get("eos_token_id", config.get("eos_token_id"))
    if stop is not None:
        fields["stop_tokens"] = tuple(stop) if isinstance(stop, list) else (stop,)
    known = {*GENERATION, *LENGTHS, *GENERATION_IGNORED}
    neutral = [key for key, value in given.items() if GENERATION_NEUTRAL.get(key) == value]
    return fields, [named(key) for key in given if key not in known and key not in neutral]


def _within(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in KEYS if key in config}


def write_generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of SampleConfig's fields; greedy is not to sample."""
    given = {"do_sample": fields["temperature"] > 0, "repetition_penalty": fields["repetition_penalty"]}
    given |= {key: fields[key] for key in LENGTHS if fields[key] != getattr(SampleConfig, key)}
    if given["do_sample"]:
        given |= {key: none if fields[field] is None else fields[field] for key, (field, none) in GENERATION.items()}
    return given
