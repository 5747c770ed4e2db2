"""Every knob, its default and its meaning: nothing else in the package holds a default.

`default()` gives an editable `ml_collections.ConfigDict` for `configs/*.py` and the command line; `freeze` of
config_rules.py turns it, once, into the frozen dataclasses that the rest of the package reads.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from llm_jax.errors import InputError

MLPS = ("gelu", "gelu_tanh", "swiglu", "geglu", "relu2")
ROPE_SCALINGS = ("linear", "ntk", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full", "sliding")
DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = (*DTYPES, "int8")  # of keys and values when decoding
WEIGHTS = ("int8",)  # what matrices may be rounded to when decoding
ATTENTIONS = ("auto", "plain", "blockwise", "cudnn", "splash")
LAYER_EXECUTIONS = ("auto", "scan", "unrolled")
REMATS = ("none", "block", "dots")
NORM_PLACEMENTS = ("pre", "post", "both")
QK_NORM_AXES = ("head", "width")
SOURCES = ("python_stdlib", "text", "bin", "tinyshakespeare")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
MAX_STEPS = 2**31 - 1  # an int32 counts them
MAX_SIZE = 2**24  # of an axis; the longest published context has 10 million tokens
MAX_HEAD_DIM = 2**16  # the largest published is 512; a table of frequencies is made of it
MAX_SEED = 2**32 - 1  # jax and grain take no more bits: a larger one would be another's equal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the network. Each modern part is a switch back to GPT-2's."""

    n_embd: int = 128  # width of the residual stream
    n_head: int = 8
    n_layer: int = 6
    block_size: int = 256  # context length in tokens
    family: str | None = None  # published family that it came from, and is exported as; None: the first of its shape
    use_rope: bool = True  # False: learned absolute positions, as GPT-2
    use_rmsnorm: bool = True  # False: LayerNorm
    n_kv_head: int | None = None  # grouped-query attention; None: as many as n_head
    head_dim: int | None = None  # None: n_embd / n_head
    mlp: str = "swiglu"  # gelu (erf) | gelu_tanh | swiglu | geglu | relu2
    mlp_dim: int | None = None  # None: 4 n_embd; 8/3 n_embd, down to a multiple of 8, for the gated kinds
    n_expert: int | None = None  # MLPs of mlp_dim to choose from for each token; None: one, for all
    n_expert_per_token: int = 2
    normalize_experts: bool = True  # the chosen ones' weights sum to 1; False: to their share of all
    norm_eps: float = 1e-5
    vocab_size: int | None = None  # None: the tokenizer's; larger pads it
    qk_norm: bool = False  # norm of queries and keys before rope
    qk_norm_axes: str = "head"  # head (each by itself) | width (all heads as one)
    norm_placement: str = "pre"  # pre (of what attention and MLP read) | post (of what they add) | both
    norm_weight_offset: float = 0.0  # added to every norm's weight; Gemma's are stored as their distance from 1
    parallel_residual: bool = False  # attention and MLP read the same x, instead of one after the other
    use_bias: bool = False  # in projections and LayerNorm
    qkv_bias: bool | None = None  # in those of queries, keys and values; None: use_bias
    attn_out_bias: bool | None = None  # in attention's output; None: use_bias
    mlp_bias: bool | None = None  # in the MLP; None: use_bias
    tie_embeddings: bool = True  # the output projection is the token embedding
    embed_scale: float = 1.0  # multiplies token embeddings, not the output projection they are tied to
    dropout: float = 0.0  # on embeddings and residual branches
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None  # of sliding layers, whose positions are not scaled then; None: as others
    rope_dim: int | None = None  # the first channels of each head, which turn; None: all
    rope_layers: tuple[bool, ...] = (True,)  # one period of layers that have rope
    rope_scaling: str | None = None  # None | linear | ntk | llama3 | yarn | longrope
    rope_factor: float = 1.0  # how many times longer than the trained context
    rope_original_length: int | None = None  # the trained context; None: block_size / rope_factor
    rope_low_freq_factor: float = 1.0  # llama3
    rope_high_freq_factor: float = 4.0  # llama3
    rope_beta_fast: float = 32.0  # yarn
    rope_beta_slow: float = 1.0  # yarn
    rope_attention_factor: float | None = None  # yarn, longrope: multiplies queries and keys; None: by rope_factor
    rope_short_factors: tuple[float, ...] | None = None  # longrope: divide the frequency of each pair of channels,
    rope_long_factors: tuple[float, ...] | None = None  # these of texts longer than rope_original_length
    layer_types: tuple[str, ...] = ("full",)  # one period of full | sliding
    window: int | None = None  # tokens that a sliding layer sees, itself included
    attn_scale: float | None = None  # multiplies attention scores; None: head_dim^-0.5
    attn_softcap: float | None = None  # c tanh(x / c) on attention scores
    final_softcap: float | None = None  # the same on the logits
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: str = "auto"  # auto (the fastest that fits) | plain | blockwise | cudnn | splash
    layer_execution: str = "auto"  # auto | scan | unrolled
    remat: str = "none"  # kept for the backward pass: none (all but what is cheap) | block (its input) | dots


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "python_stdlib"  # python_stdlib | text | bin | tinyshakespeare
    path: str | None = None  # file, folder or glob; a path implies source "text" unless it is "bin"
    tokenizer: str = "bpe"  # char | byte | bpe | path of a tokenizer.json
    vocab_size: int = 1024  # tokens of a bpe trained here
    val_fraction: float = 0.1  # the last part of the corpus, by bytes
    content_hash: str | None = None  # identifies the corpus; None: whatever is found, recorded with the run
    cache_dir: str | None = None  # of tokens and compiled programs; None: $LLM_JAX_CACHE, else ~/.cache/llm_jax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The update rule, its rate over the steps, and the average of the parameters."""

    name: str = "adamw"  # adamw | muon | any other optimizer that optax has: lion, adafactor, sgd, ...
    schedule: str = "cosine"  # cosine | linear | wsd (constant, then a line) | constant, after a linear warm-up
    peak_lr: float = 1e-3
    peak_lrs: tuple[float, ...] | None = None  # a run for each of them, all in one program, instead of peak_lr
    final_lr: float | None = None  # of the last step, unless the schedule is constant; None: peak_lr / 10
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd: the last part of all steps, in which the rate falls
    weight_decay: float = 0.1  # on weight matrices only; times the rate; where the optimizer has one
    b1: float = 0.9  # AdamW's, under Muon of the parameters left to it, and of others that have one
    b2: float = 0.99
    muon_momentum: float = 0.95
    adamw_lr: float | None = None  # muon: peak rate of the parameters left to AdamW; None: peak_lr
    grad_clip: float = 1.0  # global norm; 0: off
    ema_decay: float = 0.0  # evaluate and keep an average of the parameters over 1 / (1 - ema_decay) steps; 0: off


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. Intervals count optimizer steps; 0 means only at the end."""

    batch_size: int = 16  # sequences of one optimizer step, over all devices and micro-batches
    seq_len: int | None = None  # tokens of a sequence; None: model.block_size
    accumulation_steps: int = 1  # micro-batches one step is split into
    micro_batch: int | None = None  # sequences of one of them; 0: as many as fit; None: by accumulation_steps
    num_steps: int = 1000
    eval_every: int = 250  # checkpoints are evaluated besides
    eval_batches: int = 16  # batches of the fixed part of the validation split
    save_every: int = 250
    keep_checkpoints: int = 2  # newest ones; the best by val_loss is kept besides
    log_every: int = 10
    sample_every: int = 0
    seed: int = 0
    init_from: str | None = None  # a model that llm_jax.load opens: its shape, tokenizer and weights at step 0
    seeds: int = 1  # runs with the seeds seed, seed + 1, ..., all in one program
    profile_steps: int = 0  # steps traced with jax.profiler into <workdir>/profile, after the first ten


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How text is sampled: during training as set here, elsewhere the defaults of `generate`."""

    prompt: str = "\n"
    max_new_tokens: int = 100
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # then the likeliest of them that make up probability p
    min_p: float = 0.0  # then those at least this times as likely as the likeliest
    repetition_penalty: float = 1.0  # divides logits of tokens in the text (multiplies negative ones); 1: none
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the continuation holds
    frequency_penalty: float = 0.0  # the same, for each time
    min_new_tokens: int = 0  # so many before a stop token may come
    stop_tokens: tuple[int, ...] | None = None  # ids that end a text; None: the tokenizer's end of text


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis takes; -1 takes what is left."""

    data: int = (
        -1
    )  # copies of the model, each with its rows; with `llm_jax.main` a CPU's cores may be devices (cpu.py)
    fsdp: int = 1  # rows too, and the width of each weight, which is gathered when it is needed (ZeRO 3)
    tensor: int = 1  # heads, the MLP's width and the vocabulary
    context: int = 1  # the tokens of a text; keys and values are gathered
    expert: int = 1  # rows too, and experts
    num_slices: int | None = None  # of TPUs, joined by a slower network; "data" divides over them. None: as there are

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "num_slices"}


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def seq_len(self) -> int:
        """Tokens of a training sequence."""
        return self.train.seq_len or self.model.block_size


def default() -> ConfigDict:
    """A locked ConfigDict with every key at its default; optional keys are typed placeholders."""
    groups = {}
    for group in dataclasses.fields(Config):
        values = {}
        for field in dataclasses.fields(group.type):
            kind, optional = field_type(field)
            values[field.name] = (
                config_dict.FieldReference(field.default, field_type=kind) if optional else field.default
            )
        groups[group.name] = ConfigDict(values)
    return ConfigDict(groups).lock()


def as_dict(config: Config) -> dict[str, Any]:
    """The nested dict of config.json; `freeze` of it is the same Config."""
    return dataclasses.asdict(config)


def all_keys() -> list[str]:
    """Every key, dotted: "model.n_embd" and so on."""
    return [f"{g.name}.{f.name}" for g in dataclasses.fields(Config) for f in dataclasses.fields(g.type)]


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The message for a key that is not among the known ones; it names the nearest that is."""
    # The last part alone finds `optim.peak_lr` for `train.peak_lr` and for `peak_lr`.
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, 1, 0.75) or [
        last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, 1, 0.6)
    ]
    remedy = f"did you mean {near[0]!r}?" if near else "llm_jax/config.py lists them all"
    return f"unknown config key {key!r}; {remedy}"


def check_keys(keys: Iterable[str]) -> None:
    """Raises InputError for a dotted key (`optim.peak_lr`) that no config has, naming the nearest one."""
    known = all_keys()
    for key in keys:
        if key not in known:
            raise InputError(unknown_key(key, known))


def field_type(field: dataclasses.Field) -> tuple[type, bool]:
    """The plain type of a field, and whether it may be None."""
    optional = isinstance(field.type, types.UnionType)
    kind = typing.get_args(field.type)[0] if optional else field.type
    return typing.get_origin(kind) or kind, optional


def item_type(field: dataclasses.Field) -> type:
    """The type of a tuple field's items."""
    kind = typing.get_args(field.type)[0]
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
