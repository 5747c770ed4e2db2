"""config.json of a Hugging Face folder <-> fields of ModelConfig. What is not known is refused by name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.config import LAYER_TYPES, ModelConfig
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.interop import hf_generation, hf_rope
from llm_jax.interop.families import FAMILIES, FULL, SLIDING, Family
from llm_jax.interop.network import WRONG_KIND, check_counts, differences, period, named, shown

FAMILY = {family.model_type: family for family in FAMILIES}
# (activation, whether it is of a gated MLP) -> our mlp
MLPS = {
    ("silu", True): "swiglu",
    ("swish", True): "swiglu",
    ("gelu_pytorch_tanh", True): "geglu",
    ("gelu_new", False): "gelu_tanh",
    ("gelu_pytorch_tanh", False): "gelu_tanh",
    ("gelu_fast", False): "gelu_tanh",
    ("gelu", False): "gelu",
    ("relu2", False): "relu2",
}
# What parameters become; float16 has too few exponents to train.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}

# Of no consequence for logits: how it was made and trained, how others should run it, and its special tokens, which
# the tokenizer and generation_config.json tell.
IGNORED = hf_generation.KEYS | set(
    "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path _num_labels architectures "
    "attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop author auto_map bos_token_id "
    "cache_implementation chunk_size_feed_forward classifier_dropout created_date custom_pipelines dtype embd_pdrop "
    "embedding_dropout eos_token_id finetuned finetuning_task gradient_checkpointing hidden_dropout "
    "hidden_dropout_prob id2label initializer_range is_decoder is_llama_config label2id license max_sequence_length "
    "model_type n_ctx n_special output_attentions output_hidden_states output_past output_router_logits pad_token_id "
    "predict_special_tokens prefix pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict "
    "router_aux_loss_coef router_jitter_noise sep_token_id summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class torch_dtype "
    "transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version use_cache".split()
)
NEEDED = {"is_causal": (None, True)}  # of every family


def read_config(config: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family of a config.json, and its model.

    Raises:
        InputError: an architecture, a key or a value that is not known here; a value of the wrong kind.
    """
    family = _family(config)
    try:
        return family, _read(family, config)
    except InputError:
        raise
    except WRONG_KIND as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise InputError(f"config.json has a value of a wrong kind ({reason})") from None


def _read(family: Family, config: Mapping[str, Any]) -> ModelConfig:
    for key, other in (*family.aliases.items(), ("_sliding_window_pattern", "sliding_window_pattern")):
        _check_alike(config, key, other)
    _check_alike(config, "dtype", "torch_dtype")
    config = {family.aliases.get(key, key): value for key, value in config.items()}
    needed = NEEDED | dict(family.needed)
    known = {*family.keys, *family.defaults, *needed, *IGNORED, *_other_keys(family)}
    for key, value in config.items():
        if key not in known and not _is_unset(value):
            raise InputError(
                f"config.json: {named(key)} ({shown(value)}) is not known of {family.model_type}, and may change "
                "what it computes"
            )
    given = dict(family.defaults) | {key: value for key, value in config.items() if key in known}
    if "_sliding_window_pattern" in config:
        given["sliding_window_pattern"] = config["_sliding_window_pattern"]
    for key, values in needed.items():
        if key in given and given[key] not in values:
            raise InputError(f"config.json: {key} ({shown(given[key])}) must be {' or '.join(map(repr, values))}")
    fields: dict[str, Any] = dict(family.fixed)
    for key, ours in family.keys.items():
        if given.get(key) is None and key not in family.defaults:
            raise InputError(f"config.json of {family.model_type} has no {key}; it must say")
        fields |= dict.fromkeys(ours, given[key])
    try:
        check_counts(fields["n_layer"], fields.get("n_expert"))
    except InputError as error:
        raise InputError(f"config.json: {error}") from None
    fields["mlp"] = _mlp(family, given)
    if fields.get("use_rope", True):
        fields |= hf_rope.read_rope(family, given)
        fields |= _layers(family, given)
        if SLIDING not in fields.get("layer_types", ()):
            fields.pop("rope_local_theta", None)
    if "query_pre_attn_scalar" in family.defaults and family.lists_layer_types:
        fields["attn_scale"] = _attn_scale(given)
    if family.scales_embeddings:
        fields["embed_scale"] = given["hidden_size"] ** 0.5
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"config.json: dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    stored = DTYPES[dtype or "float32"]
    fields |= {"family": family.model_type, "param_dtype": stored, "compute_dtype": stored}
    try:
        return freeze({"model": fields}).model
    except InputError as error:
        raise InputError(f"config.json: {error}") from None


def write_config(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a model is one of, by its `family` or the first of its shape, and its config.json.

    What its config.json says is read back and compared, so nothing of the model can be lost. The weights of norms
    are the caller's to move from `norm_weight_offset` to the family's.

    Raises:
        InputError: no family has all of the model's fields; it names those that the nearest has otherwise.
    """
    nearest: tuple[int, str] | None = None
    if model.family is not None and model.family not in FAMILY:
        raise InputError(f"model.family ({model.family!r}) must be one of {', '.join(FAMILY)}, or left out")
    for family in FAMILIES if model.family is None else [FAMILY[model.family]]:
        config = _config(family, model)
        try:
            wrong = differences(model, read_config(config)[1])
        except InputError:  # it can't even say this shape
            continue
        if not wrong:
            return family, config
        if nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{', '.join(wrong)} has no counterpart in {family.model_type}"
    reason = f": {nearest[1]}, the nearest" if nearest else ""
    raise InputError(f"no published family has this model's shape{reason}; it can be saved as a run's folder")


def _family(config: Mapping[str, Any]) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    family = FAMILY.get(model_type) if isinstance(model_type, str) else None
    if not isinstance(architectures, list | None):
        raise InputError(f"config.json: architectures ({shown(architectures)}) must be a list")
    architecture = architectures[0] if architectures else None
    if family is None or (architecture is not None and architecture not in (family.architecture, _base(family))):
        raise InputError(
            f"config.json: model_type {model_type!r:.80} with architecture {architecture!r:.80} is not known; known "
            f"are {', '.join(FAMILY)}, as language models"
        )
    if config.get("quantization_config"):
        raise InputError("config.json: quantization_config is not known; give the model that it was made from")
    return family


def _base(family: Family) -> str:
    """Without the output projection's class: files of it are the same, with shorter names."""
    return family.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


def _other_keys(family: Family) -> set[str]:
    """Keys that functions below read."""
    keys = {family.activation}
    if family.fixed.get("use_rope", True):
        keys |= hf_rope.keys(family)
    if family.local_theta is not None:
        keys |= {"_sliding_window_pattern"}
    if family.lists_layer_types:
        keys |= {"layer_types"}
    return keys


def _check_alike(config: Mapping[str, Any], key: str, other: str) -> None:
    """Of two keys that mean the same."""
    if config.get(key) is not None and config.get(other) is not None and config[key] != config[other]:
        raise InputError(
            f"config.json: {key} ({shown(config[key])}) and {other} ({shown(config[other])}) mean the same, and are "
            "not the same"
        )


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _is_gated(family: Family) -> bool:
    return any({"mlp/gate", "moe/gate"} & {*each.ours} for each in family.rows)


def _attn_scale(given: Mapping[str, Any]) -> float | None:
    scalar, head_dim = given["query_pre_attn_scalar"], given["head_dim"]
    return None if scalar == head_dim else scalar**-0.5


def _mlp(family: Family, given: Mapping[str, Any]) -> str:
    activation = given.get(family.activation)
    is_gated = _is_gated(family)
    if family.model_type == "gemma":
        # Its first config.json said "gelu" and meant the approximation, and says so under another key since.
        later = given.get("hidden_activation")
        activation = later or ("gelu_pytorch_tanh" if activation == "gelu" else activation)
    if (activation, is_gated) not in MLPS:
        there = ", ".join(name for name, gated in MLPS if gated == is_gated)
        raise InputError(f"config.json: {family.activation} ({shown(activation)}) must be one of {there}")
    return MLPS[activation, is_gated]


def _layers(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """layer_types, window, rope_layers."""
    fields: dict[str, Any] = {}
    n_layer = given["num_hidden_layers"]
    if "no_rope_layers" in family.defaults:
        ropes = given["no_rope_layers"]  # 1 for a layer that has it
        if ropes is None:
            ropes = [(layer + 1) % given["no_rope_layer_interval"] != 0 for layer in range(n_layer)]
        given = {**given, "no_rope_layers": ropes}
        fields["rope_layers"] = period([bool(has) for has in _for_each_layer("no_rope_layers", ropes, n_layer)])
    if family.layer_types is None:
        return fields
    kinds = given.get("layer_types") if family.lists_layer_types else None
    if kinds is None:
        kinds = family.layer_types(given)
    else:
        kinds = [str(kind).removesuffix("_attention") for kind in _for_each_layer("layer_types", kinds, n_layer)]
        if unknown := set(kinds) - set(LAYER_TYPES):
            raise InputError(f"config.json: layer_types has {sorted(unknown)[0]!r}; known are full and sliding")
    fields["layer_types"] = period(kinds)
    if SLIDING in kinds:
        fields["window"] = given["sliding_window"]
    return fields


def _for_each_layer(key: str, values: Any, n_layer: int) -> Sequence[Any]:
    if not isinstance(values, list) or len(values) != n_layer:
        raise InputError(f"config.json: {key} must be a list of num_hidden_layers ({n_layer}) values")
    return values


def _config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """config.json of a model as one of the family; what the family can't say is left out."""
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    config |= {key: getattr(model, fields[0]) for key, fields in family.keys.items()}
    is_gated = _is_gated(family)
    names = {(mlp, gated): name for (name, gated), mlp in reversed(MLPS.items())}
    activation = names.get((model.mlp, is_gated), family.defaults[family.activation])
    config[family.activation] = activation
    if family.model_type == "gemma":
        config["hidden_activation"] = activation
    config["dtype"] = config["torch_dtype"] = model.param_dtype
    if not family.fixed.get("use_rope", True):
        return config
    if "query_pre_attn_scalar" in family.defaults and family.lists_layer_types:
        scalar = model.head_dim if model.attn_scale is None else model.attn_scale**-2
        whole = round(scalar)
        config["query_pre_attn_scalar"] = whole if math.isclose(scalar, whole, rel_tol=1e-9) else scalar
    config |= hf_rope.write_rope(family, model)
    if family.layer_types is not None:
        kinds = [model.layer_types[layer % len(model.layer_types)] for layer in range(model.n_layer)]
        config["sliding_window"] = model.window
        if "use_sliding_window" in family.defaults:
            config["use_sliding_window"] = model.window is not None
        if "max_window_layers" in family.defaults:
            config["max_window_layers"] = kinds.count(FULL)
        if family.lists_layer_types:
            config["layer_types"] = [f"{kind}_attention" for kind in kinds]
    if "original_max_position_embeddings" in family.defaults:
        config["original_max_position_embeddings"] = model.rope_original_length or model.block_size
    if "no_rope_layers" in family.defaults:
        ropes = [model.rope_layers[layer % len(model.rope_layers)] for layer in range(model.n_layer)]
        config["no_rope_layers"] = [int(has_rope) for has_rope in ropes]
    return config
