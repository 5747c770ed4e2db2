"""What a GGUF file's metadata and tensors are called, by architecture, as llama.cpp reads them <-> ModelConfig."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.interop import gguf_rope
from llm_jax.interop.network import WRONG_KIND, check_counts, differences, period
from llm_jax.interop.tensors import Row, Shape, row

Metadata = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`, which llama.cpp has a graph for.

    family: of Hugging Face, that it is written as there; the first is what a file of it is taken for.
    fixed: fields of all its models; defaults: of a file that does not tell.
    slides: the period of layers with a window, if a file gives one; None: a file may not.
    biases: fields of biases that it may have.
    """

    name: str
    families: tuple[str, ...]
    rows: tuple[Row, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slides: tuple[str, ...] | None = None
    biases: tuple[str, ...] = ()


# -- Tensors

LAYER = "blk.{layer}."


def _both(ours: str, foreign: str, layout: str = "linear") -> list[Row]:
    """A matrix and its bias."""
    biases = " ".join(f"{name}_bias" for name in ours.split())
    vector = "interleaved_vector" if layout == "interleaved" else "vector"
    return [row(ours, f"{LAYER}{foreign}.weight", layout), row(biases, f"{LAYER}{foreign}.bias", vector)]


def _norms(**names: str) -> list[Row]:
    return [
        row(f"{ours}/{kind}", f"{LAYER}{foreign}.{kind}", "vector")
        for ours, foreign in names.items()
        for kind in ("weight", "bias")
    ]


def _qk_norms(kind: str) -> list[Row]:
    return [row(f"attn/{h}_{kind}/weight", f"{LAYER}attn_{h}_norm.weight", "vector") for h in "qk"]


ENDS = (
    row("embed/tokens", "token_embd.weight", "table"),
    row("embed/positions", "position_embd.weight", "table"),
    row("final_norm/weight", "output_norm.weight", "vector"),
    row("final_norm/bias", "output_norm.bias", "vector"),
    row("lm_head/weight", "output.weight", "table"),
)
MLP = (*_both("mlp/gate", "ffn_gate"), *_both("mlp/up", "ffn_up"), *_both("mlp/down", "ffn_down"))
EXPERTS = (
    row("moe/router", f"{LAYER}ffn_gate_inp.weight"),
    row("moe/gate", f"{LAYER}ffn_gate_exps.weight", "experts"),
    row("moe/up", f"{LAYER}ffn_up_exps.weight", "experts"),
    row("moe/down", f"{LAYER}ffn_down_exps.weight", "experts"),
)
PRE_NORMS = _norms(attn_norm="attn_norm", mlp_norm="ffn_norm")
FUSED = (*_both("attn/q attn/k attn/v", "attn_qkv"), *_both("attn/o", "attn_output"))


def _rows(norms: list[Row], *, qk: str = "linear", mlp: tuple[Row, ...] = MLP) -> tuple[Row, ...]:
    attention = [*_both("attn/q", "attn_q", qk), *_both("attn/k", "attn_k", qk), *_both("attn/v", "attn_v")]
    return (*ENDS, *norms, *attention, *_both("attn/o", "attn_output"), *mlp)


# llama.cpp turns the pairs of channels (2i, 2i + 1) in some architectures, and (i, i + H/2) in others.
LLAMA_ROWS = _rows(PRE_NORMS, qk="interleaved", mlp=(*MLP, *EXPERTS))
POST_NORMS = _norms(attn_post_norm="post_attention_norm", mlp_post_norm="post_ffw_norm")
GEMMA = {"mlp": "geglu"}
GPT = {"use_rmsnorm": False, "use_bias": True}

ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(
            "llama",
            ("llama", "mistral", "mixtral"),
            LLAMA_ROWS,
            biases=("qkv_bias", "attn_out_bias", "mlp_bias"),
        ),
        Architecture("qwen2", ("qwen2",), _rows(PRE_NORMS), biases=("qkv_bias",)),
        Architecture("qwen3", ("qwen3",), (*_rows(PRE_NORMS), *_qk_norms("norm")), {"qk_norm": True}),
        Architecture(
            "smollm3",
            ("smollm3",),
            _rows(PRE_NORMS, qk="interleaved"),
            {"rope_layers": (True, True, True, False)},
            biases=("qkv_bias", "attn_out_bias", "mlp_bias"),
        ),
        Architecture("gemma", ("gemma",), _rows(PRE_NORMS), GEMMA),
        Architecture(
            "gemma2",
            ("gemma2",),
            _rows(PRE_NORMS + POST_NORMS),
            GEMMA | {"norm_placement": "both"},
            {"attn_softcap": 50.0, "final_softcap": 30.0},
            slides=("sliding", "full"),
        ),
        Architecture(
            "gemma3",
            ("gemma3_text",),
            (*_rows(PRE_NORMS + POST_NORMS), *_qk_norms("norm")),
            GEMMA | {"norm_placement": "both", "qk_norm": True},
            {"rope_theta": 1_000_000.0},
            slides=("sliding",) * 5 + ("full",),
        ),
        Architecture(
            "olmo2",
            ("olmo2",),
            (*_rows(POST_NORMS), *_qk_norms("width_norm")),
            {"norm_placement": "post", "qk_norm": True, "qk_norm_axes": "width"},
        ),
        Architecture(
            "phi3",
            ("phi3",),
            (
                *ENDS,
                *PRE_NORMS,
                *FUSED,
                row("mlp/gate mlp/up", f"{LAYER}ffn_up.weight"),
                row("mlp/down", f"{LAYER}ffn_down.weight"),
            ),
            slides=("sliding",),
        ),
        Architecture(
            "gpt2",
            ("gpt2",),
            (*ENDS, *PRE_NORMS, *FUSED, *_both("mlp/up", "ffn_up"), *_both("mlp/down", "ffn_down")),
            GPT | {"use_rope": False, "mlp": "gelu_tanh"},
        ),
        Architecture(
            "gptneox",
            ("gpt_neox",),
            (*ENDS, *PRE_NORMS, *FUSED, *_both("mlp/up", "ffn_up"), *_both("mlp/down", "ffn_down")),
            GPT | {"mlp": "gelu"},
        ),
        Architecture(
            "qwen3moe",
            ("qwen3_moe",),
            (*_rows(PRE_NORMS, mlp=EXPERTS), *_qk_norms("norm")),
            {"qk_norm": True},
        ),
        Architecture(
            "olmoe",
            ("olmoe",),
            (*_rows(PRE_NORMS, mlp=EXPERTS), *_qk_norms("width_norm")),
            {"qk_norm": True, "qk_norm_axes": "width", "normalize_experts": False},
        ),
    )
}

# -- Metadata

# Key, behind the architecture's name and a dot -> field.
KEYS = {
    "context_length": "block_size",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "mlp_dim",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_kv_head",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.layer_norm_epsilon": "norm_eps",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "rope_dim",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_softcap",
    "final_logit_softcapping": "final_softcap",
    "expert_count": "n_expert",
    "expert_used_count": "n_expert_per_token",
    "expert_feed_forward_length": "mlp_dim",  # the later one holds, where both are there
    "attention.sliding_window": "window",
    "rope.scaling.factor": "rope_factor",
    "rope.scaling.original_context_length": "rope_original_length",
    "rope.scaling.attn_factor": "rope_attention_factor",
    "rope.scaling.yarn_beta_fast": "rope_beta_fast",
    "rope.scaling.yarn_beta_slow": "rope_beta_slow",
    "use_parallel_residual": "parallel_residual",
    "rope.freq_base_swa": "rope_local_theta",
}
# Read by functions here, or of no consequence.
OTHER_KEYS = {
    "vocab_size",
    "attention.value_length",
    "rope.scaling.type",
    "rope.scale_linear",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "attention.sliding_window_pattern",
}
LOCAL_THETA = 10000.0
# Layers of the models that llama.cpp scales attention otherwise in: Gemma 2 and 3 of 27 billion parameters.
ODD_SCALES = {"gemma2": 46, "gemma3": 62}


def read_model(
    metadata: Metadata, shapes: Mapping[str, Shape], read: Callable[[str], np.ndarray]
) -> tuple[Architecture, ModelConfig]:
    """The architecture and model of a file.

    Args:
        shapes: of its tensors, by name.
        read: a tensor by its name, for the few that hold settings.

    Raises:
        InputError: an architecture, a key or a value that is not known here.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(f"general.architecture ({name!r}) is not known; known are {', '.join(ARCHITECTURES)}")
    arch = ARCHITECTURES[name]
    try:
        return arch, _read(arch, metadata, shapes, read)
    except InputError:
        raise
    except WRONG_KIND as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise InputError(f"its metadata has a value of a wrong kind ({reason})") from None


def _read(
    arch: Architecture, metadata: Metadata, shapes: Mapping[str, Shape], read: Callable[[str], np.ndarray]
) -> ModelConfig:
    name = arch.name
    given = {
        key.removeprefix(f"{name}."): gguf_rope.as_written(value)
        for key, value in metadata.items()
        if key.startswith(f"{name}.")
    }
    for key, value in given.items():
        if key not in KEYS and key not in OTHER_KEYS:
            raise InputError(f"{name}.{key} ({value!r}) is not known, and may change what the model computes")
    if "token_embd.weight" not in shapes:
        raise InputError("tensor token_embd.weight is missing")
    fields: dict[str, Any] = arch.defaults | arch.fixed
    fields |= {KEYS[key]: given[key] for key in KEYS if key in given}
    for key, field in (("expert_count", "n_expert"), ("attention.sliding_window", "window")):
        if given.get(key) == 0:
            fields[field] = None
    if fields.get("n_expert") is None:
        fields.pop("n_expert_per_token", None)
    if "n_embd" not in fields or "n_head" not in fields or "n_layer" not in fields or "block_size" not in fields:
        raise InputError(f"{name}'s embedding_length, block_count, context_length or attention.head_count is missing")
    check_counts(fields["n_layer"], fields.get("n_expert"))
    head_dim = fields.get("head_dim") or _number(name, fields, "n_embd") // _number(name, fields, "n_head")
    if given.get("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{name}.attention.value_length must be attention.key_length ({head_dim})")
    fields |= {"vocab_size": shapes["token_embd.weight"][0], "tie_embeddings": "output.weight" not in shapes}
    if not arch.fixed.get("use_bias"):
        fields |= {
            "qkv_bias": "blk.0.attn_q.bias" in shapes,
            "attn_out_bias": "blk.0.attn_output.bias" in shapes,
            "mlp_bias": "blk.0.ffn_down.bias" in shapes,
        }
    if name == "gptneox":
        fields.setdefault("parallel_residual", True)
    if name.startswith("gemma"):
        fields["embed_scale"] = _number(name, fields, "n_embd") ** 0.5
    if fields.get("use_rope", True):
        fields.setdefault("rope_theta", 10000.0)
        fields |= gguf_rope.read_scaling(name, given, fields, shapes, read)
    pattern = given.get("attention.sliding_window_pattern")
    if pattern is not None and not (type(pattern) is int and pattern == len(arch.slides or ())):
        raise InputError(f"{name}.attention.sliding_window_pattern ({pattern!r}) is not known of {name}")
    fields |= _layers(arch, fields)
    if name in ODD_SCALES and _number(name, fields, "n_layer") == ODD_SCALES[name]:
        fields["attn_scale"] = (fields["n_embd"] / fields["n_head"]) ** -0.5
    fields["family"] = "mixtral" if name == "llama" and fields.get("n_expert") else arch.families[0]
    try:
        return freeze({"model": fields}).model
    except InputError as error:
        raise InputError(f"its metadata: {error}") from None


def write_model(model: ModelConfig) -> tuple[Architecture, dict[str, Any], dict[str, np.ndarray]]:
    """(architecture, metadata, tensors that hold settings) of a model; norms are to be stored with an offset of 0.

    Raises:
        InputError: llama.cpp has no architecture of this shape; it names the fields that the nearest has otherwise.
    """
    nearest: tuple[int, str] | None = None
    of_family = [arch for arch in ARCHITECTURES.values() if model.family in arch.families]
    for arch in of_family or ARCHITECTURES.values():
        metadata, factors = _metadata(arch, model)
        shapes: dict[str, Shape] = {"token_embd.weight": (model.vocab_size, model.n_embd)}
        shapes |= {name: array.shape for name, array in factors.items()}
        present = {"output.weight": not model.tie_embeddings}
        present |= {
            f"blk.0.{tensor}.bias": getattr(model, field) and field in arch.biases
            for field, tensor in (("qkv_bias", "attn_q"), ("attn_out_bias", "attn_output"), ("mlp_bias", "ffn_down"))
        }
        shapes |= {name: () for name, is_there in present.items() if is_there}
        try:
            back = read_model(metadata, shapes, factors.__getitem__)[1]
        except InputError:  # it has not even this shape
            continue
        # llama3 scaling with other numbers than the published ones is read as the factors that it makes.
        own = model if back.rope_scaling == model.rope_scaling else gguf_rope.listed(model, factors)
        wrong = differences(own, back)
        if not wrong:
            _check_sizes(arch, model)
            return arch, metadata, factors
        if nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{', '.join(wrong)} has no counterpart in {arch.name}"
    reason = f": {nearest[1]}, the nearest" if nearest else ""
    raise InputError(f"llama.cpp knows no architecture of this model's shape{reason}")


def _check_sizes(arch: Architecture, model: ModelConfig) -> None:
    """What llama.cpp takes for granted of some architectures."""
    width = model.n_head * model.head_dim
    if any(row.ours == ("attn/q", "attn/k", "attn/v") for row in arch.rows) and width != model.n_embd:
        raise InputError(
            f"llama.cpp's {arch.name} needs model.n_head * model.head_dim ({width}) to be n_embd ({model.n_embd})"
        )
    if arch.name == "olmoe" and model.n_kv_head != model.n_head:
        raise InputError(
            f"llama.cpp's olmoe needs model.n_kv_head ({model.n_kv_head}) to be model.n_head ({model.n_head})"
        )


def _number(name: str, fields: Mapping[str, Any], field: str) -> int:
    if not isinstance(fields[field], int) or fields[field] < 1:
        raise InputError(f"{name}: {field} ({fields[field]!r}) must be a whole number, 1 or more")
    return fields[field]


def _layers(arch: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """layer_types, window and what goes with them."""
    if fields.get("window") is None or arch.slides is None:
        if fields.get("window") is not None:
            raise InputError(f"{arch.name}.attention.sliding_window ({fields['window']}) is not known of {arch.name}")
        return {"rope_local_theta": None}
    layers = range(_number(arch.name, fields, "n_layer"))
    own: dict[str, Any] = {"layer_types": period([arch.slides[layer % len(arch.slides)] for layer in layers])}
    own["rope_local_theta"] = fields.get("rope_local_theta", LOCAL_THETA) if arch.name == "gemma3" else None
    return own


def _metadata(arch: Architecture, model: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    keys: dict[str, Any] = {
        "context_length": model.block_size,
        "embedding_length": model.n_embd,
        "block_count": model.n_layer,
        "feed_forward_length": model.mlp_dim,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_kv_head,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "vocab_size": model.vocab_size,
    }
    keys["attention.layer_norm_rms_epsilon" if model.use_rmsnorm else "attention.layer_norm_epsilon"] = model.norm_eps
    if model.n_expert is not None:
        keys |= {"expert_count": model.n_expert, "expert_used_count": model.n_expert_per_token}
        if arch.name == "qwen3moe":
            keys["expert_feed_forward_length"] = model.mlp_dim
    if arch.name == "gptneox":
        keys["use_parallel_residual"] = model.parallel_residual
    if arch.slides is not None and model.window is not None:
        keys["attention.sliding_window"] = model.window
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch.name == "gemma2" and getattr(model, KEYS[key]) is not None:
            keys[key] = getattr(model, KEYS[key])
    factors: dict[str, np.ndarray] = {}
    if model.use_rope:
        keys |= {"rope.dimension_count": model.rope_dim, "rope.freq_base": model.rope_theta}
        scaling, factors = gguf_rope.write_scaling(model)
        keys |= scaling
    return {"general.architecture": arch.name} | {f"{arch.name}.{key}": value for key, value in keys.items()}, factors
