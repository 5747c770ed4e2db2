"""The rules of a config: what a value and a combination of values must be, and what follows from others.

`freeze` holds a config to all of them; what makes one config of another holds that one to them too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from llm_jax.config import (
    ATTENTIONS,
    DTYPES,
    LAYER_EXECUTIONS,
    LAYER_TYPES,
    MAX_HEAD_DIM,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
    MLPS,
    NORM_PLACEMENTS,
    QK_NORM_AXES,
    REMATS,
    ROPE_SCALINGS,
    SCHEDULES,
    SOURCES,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    field_type,
    item_type,
    unknown_key,
)
from llm_jax.errors import InputError
from llm_jax.sampling_rules import MAX_NEW_TOKENS, check_sampling, number


MIN_ROPE_TURNS = 1e-6  # in the original length, of a channel that is no longer scaled; published are 1 and more


def freeze(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Checks types, names and rules, fills in what follows from other keys, returns the dataclasses.

    Args:
        config: a ConfigDict from `default()`, or the nested dict of a run's config.json.

    Raises:
        InputError: unknown key (with the nearest right one), wrong type, impossible combination.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    _reject_unknown(values, [group.name for group in dataclasses.fields(Config)], prefix="")
    groups = {}
    for group in dataclasses.fields(Config):
        given = values.get(group.name) or {}
        if not isinstance(given, Mapping):
            raise InputError(f"{group.name} ({given!r}) must be a group of keys")
        _reject_unknown(given, [field.name for field in dataclasses.fields(group.type)], prefix=f"{group.name}.")
        groups[group.name] = group.type(
            **{
                field.name: _checked(f"{group.name}.{field.name}", field, given[field.name])
                for field in dataclasses.fields(group.type)
                if field.name in given
            }
        )
    frozen = Config(**groups)
    if frozen.train.init_from is None:
        check_seq_len(frozen)
    return dataclasses.replace(
        frozen,
        model=_model(frozen.model),
        data=_data(frozen.data),
        optim=_optim(frozen.optim),
        train=_train(frozen.train),
        sample=_sample(frozen.sample),
        mesh=_mesh(frozen.mesh),
    )


def split_runs(config: Config) -> tuple[Config, ...]:
    """The config of each run that `train.seeds` and `optim.peak_lrs` ask for, as if it trained alone."""
    peak_lrs = config.optim.peak_lrs or (config.optim.peak_lr,)
    return tuple(
        dataclasses.replace(
            config,
            optim=_optim(dataclasses.replace(config.optim, peak_lr=peak_lr, peak_lrs=None)),
            train=dataclasses.replace(config.train, seed=config.train.seed + i, seeds=1),
        )
        for peak_lr in peak_lrs
        for i in range(config.train.seeds)
    )


def in_dtype(cfg: Config, dtype: str | None) -> Config:
    """With parameters and computation in the dtype; None: as they are."""
    if dtype is None:
        return cfg
    return dataclasses.replace(
        cfg, model=_model(dataclasses.replace(cfg.model, param_dtype=dtype, compute_dtype=dtype))
    )


def stretched(cfg: Config, *, rope_scaling: str | None, rope_factor: float | None) -> Config:
    """The config of a trained model that sees rope_factor times its block_size; both None: as it is."""
    if (rope_scaling is None) != (rope_factor is None):
        raise InputError(
            f"rope_scaling ({rope_scaling!r}) and rope_factor ({rope_factor}) go together: how positions are "
            f"stretched ({', '.join(ROPE_SCALINGS)}), and how much"
        )
    if rope_scaling is None:
        return cfg
    m = cfg.model
    if m.rope_scaling is not None:
        raise InputError(f"this model has rope_scaling {m.rope_scaling!r} already; leave rope_scaling out")
    length = m.block_size * number("rope_factor", rope_factor)
    if not m.block_size + 1 <= length <= MAX_NEW_TOKENS:
        raise InputError(
            f"rope_factor ({rope_factor}) times block_size ({m.block_size}) must be from {m.block_size + 1} to "
            f"{MAX_NEW_TOKENS}"
        )
    scaled = dataclasses.replace(
        m,
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        rope_original_length=m.block_size,
        block_size=round(length),
    )
    return dataclasses.replace(cfg, model=_model(scaled))


def _reject_unknown(given: Mapping[str, Any], known: Sequence[str], *, prefix: str) -> None:
    for key in given:
        if key not in known:
            raise InputError(unknown_key(prefix + key, [prefix + name for name in known]))


def _as_float(value: int) -> float:
    """Infinite where it is beyond a float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _checked(key: str, field: dataclasses.Field, value: Any) -> Any:
    kind, optional = field_type(field)
    if value is None and optional:
        return None
    if kind is tuple and isinstance(value, list | tuple):
        of = item_type(field)
        value = tuple(_as_float(item) if of is float and type(item) is int else item for item in value)
        if not all(type(item) is of for item in value):  # True is no number
            raise InputError(f"{key} {value!r} must be a tuple of {of.__name__}")
        if of is float and not all(map(math.isfinite, value)):
            raise InputError(f"{key} {value!r} must hold finite numbers")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key} ({value!r}) must be of type {kind.__name__}{' or None' if optional else ''}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{key} ({value}) must be a finite number")
    return value


def _model(m: ModelConfig) -> ModelConfig:
    for name in (
        "n_embd",
        "n_head",
        "n_layer",
        "block_size",
        "n_kv_head",
        "head_dim",
        "mlp_dim",
        "vocab_size",
        "window",
        "rope_dim",
        "n_expert",
        "n_expert_per_token",
    ):
        _at_least("model", m, name, 1)
        _at_most("model", m, name, MAX_HEAD_DIM if name in ("head_dim", "rope_dim") else MAX_SIZE)
    for name in (
        "norm_eps",
        "rope_theta",
        "rope_local_theta",
        "rope_attention_factor",
        "attn_scale",
        "attn_softcap",
        "final_softcap",
        "embed_scale",
    ):
        _above_zero("model", m, name)
    _one_of("model", m, "mlp", MLPS)
    _one_of("model", m, "rope_scaling", (None, *ROPE_SCALINGS))
    _one_of("model", m, "param_dtype", DTYPES)
    _one_of("model", m, "compute_dtype", DTYPES)
    _one_of("model", m, "attention", ATTENTIONS)
    _one_of("model", m, "layer_execution", LAYER_EXECUTIONS)
    _one_of("model", m, "remat", REMATS)
    _one_of("model", m, "norm_placement", NORM_PLACEMENTS)
    _one_of("model", m, "qk_norm_axes", QK_NORM_AXES)
    if not 0 <= m.dropout < 1:
        raise InputError(f"model.dropout ({m.dropout}) must be at least 0 and below 1")
    if m.head_dim is None and m.n_embd % m.n_head:
        raise InputError(
            f"model.n_embd ({m.n_embd}) must be a multiple of model.n_head ({m.n_head}); "
            "set model.head_dim to separate them"
        )
    head_dim = m.head_dim or m.n_embd // m.n_head
    rope_dim = m.rope_dim or head_dim
    if m.use_rope and rope_dim % 2:
        name = "head_dim" if m.rope_dim is None else "rope_dim"
        raise InputError(f"model.{name} ({rope_dim}) must be even for rope, which rotates pairs of channels")
    if rope_dim > head_dim:
        raise InputError(f"model.rope_dim ({rope_dim}) must be at most model.head_dim ({head_dim})")
    n_kv_head = m.n_kv_head or m.n_head
    if m.n_head % n_kv_head:
        raise InputError(f"model.n_head ({m.n_head}) must be a multiple of model.n_kv_head ({n_kv_head})")
    gated = m.mlp in ("swiglu", "geglu")
    # Three matrices of 8/3 n_embd are as many parameters as two of 4 n_embd (Shazeer 2020, "GLU Variants").
    mlp_dim = m.mlp_dim or (max(8, 8 * m.n_embd // 3 // 8 * 8) if gated else 4 * m.n_embd)

    for name, unset in (
        ("rope_scaling", None),
        ("rope_local_theta", None),
        ("rope_dim", None),
        ("rope_layers", (True,)),
    ):
        if getattr(m, name) != unset and not m.use_rope:
            raise InputError(f"model.{name} ({getattr(m, name)!r}) needs model.use_rope=True")
    if not m.rope_layers:
        raise InputError("model.rope_layers () must hold one or more of True, False")
    if m.rope_attention_factor is not None and m.rope_scaling not in ("yarn", "longrope"):
        raise InputError(
            f"model.rope_attention_factor ({m.rope_attention_factor}) needs model.rope_scaling='yarn' or 'longrope', "
            f"got {m.rope_scaling!r}"
        )
    for name in ("rope_short_factors", "rope_long_factors"):
        factors = getattr(m, name)
        if (factors is not None) != (m.rope_scaling == "longrope"):
            raise InputError(f"model.{name} ({factors}) and rope_scaling='longrope' go together; set both or neither")
        if factors is not None and not (len(factors) == rope_dim // 2 and min(factors) > 0):
            raise InputError(f"model.{name} {factors} must hold rope_dim / 2 ({rope_dim // 2}) numbers above 0")
    if not m.rope_factor >= 1:
        raise InputError(f"model.rope_factor ({m.rope_factor}) must be 1 or more")
    if m.use_rope and not m.rope_theta > 1:
        raise InputError(f"model.rope_theta ({m.rope_theta}) must be above 1: the channels' wavelengths grow with it")
    for fast, slow in (("rope_beta_fast", "rope_beta_slow"), ("rope_high_freq_factor", "rope_low_freq_factor")):
        if not getattr(m, fast) > getattr(m, slow) >= MIN_ROPE_TURNS:
            raise InputError(
                f"model.{fast} ({getattr(m, fast)}) must be above model.{slow} ({getattr(m, slow)}), and that "
                f"{MIN_ROPE_TURNS} or more"
            )
    if m.rope_scaling is None and m.rope_factor != 1:
        raise InputError(
            f"model.rope_factor ({m.rope_factor}) needs a model.rope_scaling, one of {', '.join(ROPE_SCALINGS)}"
        )
    _at_least("model", m, "rope_original_length", 1)
    _at_most("model", m, "rope_original_length", MAX_SIZE)
    original = m.rope_original_length
    if m.rope_scaling is not None and original is None:
        original = max(1, round(m.block_size / m.rope_factor))
    if m.rope_scaling == "longrope" and original < 2:
        raise InputError(f"model.rope_original_length ({original}) must be 2 or more for rope_scaling='longrope'")

    if not m.layer_types or any(kind not in LAYER_TYPES for kind in m.layer_types):
        raise InputError(f"model.layer_types {m.layer_types} must hold one or more of {', '.join(LAYER_TYPES)}")
    if ("sliding" in m.layer_types) != (m.window is not None):
        raise InputError(
            f"model.window ({m.window}) and 'sliding' in model.layer_types {m.layer_types} go together; "
            "set both or neither"
        )
    if m.rope_local_theta is not None and "sliding" not in m.layer_types:
        raise InputError(
            f"model.rope_local_theta ({m.rope_local_theta}) is for 'sliding' layers, and model.layer_types "
            f"{m.layer_types} has none"
        )
    if m.qk_norm_axes == "width" and not m.qk_norm:
        raise InputError("model.qk_norm_axes ('width') needs model.qk_norm=True")
    if m.n_expert is not None and m.n_expert_per_token > m.n_expert:
        raise InputError(
            f"model.n_expert_per_token ({m.n_expert_per_token}) must be at most model.n_expert ({m.n_expert})"
        )
    if m.n_expert is not None and (m.use_bias if m.mlp_bias is None else m.mlp_bias):
        raise InputError(f"model.n_expert ({m.n_expert}) needs model.mlp_bias=False: experts have no biases")
    biases = {
        name: m.use_bias if getattr(m, name) is None else getattr(m, name)
        for name in ("qkv_bias", "attn_out_bias", "mlp_bias")
    }
    return dataclasses.replace(
        m,
        head_dim=head_dim,
        n_kv_head=n_kv_head,
        mlp_dim=mlp_dim,
        rope_dim=rope_dim if m.use_rope else None,
        rope_original_length=original,
        **biases,
    )


def _data(d: DataConfig) -> DataConfig:
    _one_of("data", d, "source", SOURCES)
    if d.path == "":
        raise InputError("data.path ('') must be a file, folder or glob; leave it out for data.source's own text")
    if d.path is not None and d.source != "bin":
        d = dataclasses.replace(d, source="text")
    if d.path is None and d.source in ("text", "bin"):
        raise InputError(f"data.source {d.source!r} reads files; set --config.data.path=FILE_OR_FOLDER")
    if not 0 < d.val_fraction < 1:
        raise InputError(f"data.val_fraction ({d.val_fraction}) must be above 0 and below 1")
    _at_least("data", d, "vocab_size", 1)
    return d


def _optim(o: OptimConfig) -> OptimConfig:
    # Whether there is an optimizer of that name is for optim.py to say, which knows optax.
    _one_of("optim", o, "schedule", SCHEDULES)
    _above_zero("optim", o, "peak_lr")
    if o.peak_lrs is not None and not (o.peak_lrs and all(0 < peak_lr < math.inf for peak_lr in o.peak_lrs)):
        raise InputError(f"optim.peak_lrs {o.peak_lrs} must hold one or more numbers above 0")
    if o.peak_lrs is not None and len(set(o.peak_lrs)) < len(o.peak_lrs):
        raise InputError(f"optim.peak_lrs {o.peak_lrs} must differ from each other; train.seeds repeats a rate")
    if o.peak_lrs is not None and len(o.peak_lrs) == 1:
        o = dataclasses.replace(o, peak_lr=o.peak_lrs[0], peak_lrs=None)
    _above_zero("optim", o, "adamw_lr")
    if not 0 < o.decay_fraction <= 1:
        raise InputError(f"optim.decay_fraction ({o.decay_fraction}) must be above 0 and at most 1")
    for name in ("final_lr", "warmup_steps", "weight_decay", "grad_clip"):
        _at_least("optim", o, name, 0)
    for name in ("b1", "b2", "muon_momentum", "ema_decay"):
        if not 0 <= getattr(o, name) < 1:
            raise InputError(f"optim.{name} ({getattr(o, name)}) must be at least 0 and below 1")
    if o.final_lr is None and o.peak_lrs is None:  # of several runs each has its own
        o = dataclasses.replace(o, final_lr=o.peak_lr / 10)
    return o


def check_seq_len(cfg: Config) -> None:
    if cfg.seq_len > cfg.model.block_size:
        raise InputError(
            f"train.seq_len ({cfg.train.seq_len}) must be at most model.block_size ({cfg.model.block_size})"
        )


def _train(t: TrainConfig) -> TrainConfig:
    for name in ("batch_size", "seq_len", "accumulation_steps", "num_steps", "eval_batches", "keep_checkpoints"):
        _at_least("train", t, name, 1)
    _at_least("train", t, "seeds", 1)
    for name in ("eval_every", "save_every", "log_every", "sample_every", "seed", "profile_steps"):
        _at_least("train", t, name, 0)
    if t.init_from == "":
        raise InputError("train.init_from ('') must be a model to start from; set --config.train.init_from=MODEL")
    if t.num_steps > MAX_STEPS:
        raise InputError(f"train.num_steps ({t.num_steps}) must be at most {MAX_STEPS}")
    if t.seed + t.seeds - 1 > MAX_SEED:
        raise InputError(f"train.seed + train.seeds - 1 ({t.seed + t.seeds - 1}) must be at most {MAX_SEED}")
    if t.micro_batch is not None:
        t = _with_micro_batches(t)
    if t.batch_size % t.accumulation_steps:
        raise InputError(
            f"train.batch_size ({t.batch_size}) must be a multiple of "
            f"train.accumulation_steps ({t.accumulation_steps})"
        )
    return t


def _with_micro_batches(t: TrainConfig) -> TrainConfig:
    _at_least("train", t, "micro_batch", 0)
    if t.micro_batch and t.batch_size % t.micro_batch:
        raise InputError(
            f"train.batch_size ({t.batch_size}) must be a multiple of train.micro_batch ({t.micro_batch})"
        )
    steps = t.batch_size // t.micro_batch if t.micro_batch else 1
    if t.accumulation_steps not in (1, steps):
        raise InputError(
            f"train.micro_batch ({t.micro_batch}) and train.accumulation_steps ({t.accumulation_steps}) both say how "
            "a batch is divided; set one of them"
        )
    return dataclasses.replace(t, accumulation_steps=steps)


def _sample(s: SampleConfig) -> SampleConfig:
    request = dataclasses.asdict(s)
    del request["prompt"], request["stop_tokens"]
    check_sampling(**request, prefix="sample.")
    if s.stop_tokens is not None and not all(token >= 0 for token in s.stop_tokens):
        raise InputError(f"sample.stop_tokens {s.stop_tokens} must be ids of tokens, 0 or more")
    return s


def _mesh(m: MeshConfig) -> MeshConfig:
    _at_least("mesh", m, "num_slices", 1)
    for name, size in m.sizes.items():
        if size != -1:
            _at_least("mesh", m, name, 1)
    if len(open_axes := [name for name, size in m.sizes.items() if size == -1]) > 1:
        raise InputError(f"mesh.{' and mesh.'.join(open_axes)} are -1, what is left; one of them may be")
    return m


def _at_least(group: str, values: Any, name: str, least: float) -> None:
    value = getattr(values, name)
    if value is not None and value < least:
        raise InputError(f"{group}.{name} ({value}) must be {least} or more")


def _at_most(group: str, values: Any, name: str, most: float) -> None:
    value = getattr(values, name)
    if value is not None and value > most:
        raise InputError(f"{group}.{name} ({value}) must be at most {most}")


def _above_zero(group: str, values: Any, name: str) -> None:
    value = getattr(values, name)
    if value is not None and value <= 0:
        raise InputError(f"{group}.{name} ({value}) must be above 0")


def _one_of(group: str, values: Any, name: str, choices: Sequence[Any]) -> None:
    value = getattr(values, name)
    if value not in choices:
        raise InputError(f"{group}.{name} ({value!r}) must be one of {', '.join(map(str, choices))}")
