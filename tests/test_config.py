import dataclasses
import json

import pytest

from llm_jax import config
from llm_jax.config import Config, as_dict, default
from llm_jax.config_file import load_file
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError

FIELDS = {
    f"{group.name}.{field.name}": field
    for group in dataclasses.fields(Config)
    for field in dataclasses.fields(group.type)
}
OPTIONAL = [key for key, field in FIELDS.items() if field.default is None]


def set_keys(values):
    nested = {}
    for key, value in values.items():
        group, name = key.split(".")
        nested.setdefault(group, {})[name] = value
    return nested


def error_of(values) -> str:
    with pytest.raises(InputError) as error:
        freeze(set_keys(values))
    assert "\n" not in str(error.value)
    return str(error.value)


# -- Defaults


def test_the_dataclasses_are_the_only_home_of_defaults():
    frozen = as_dict(Config())
    assert {group: dict(values) for group, values in default().to_dict().items()} == frozen
    assert default().is_locked


def test_two_defaults_share_nothing():
    changed = default()
    changed.model.n_kv_head = 2
    changed.train.num_steps = 7
    assert default().model.n_kv_head is None and default().train.num_steps == Config().train.num_steps


def test_what_follows_from_other_keys_is_filled_in():
    frozen = freeze(set_keys({"model.n_embd": 96, "model.n_head": 6, "optim.peak_lr": 2e-3}))
    assert (frozen.model.head_dim, frozen.model.n_kv_head) == (16, 6)
    assert frozen.model.mlp_dim == 256  # 8/3 * 96
    assert frozen.optim.final_lr == 2e-4
    assert freeze({"model": {"mlp": "gelu"}}).model.mlp_dim == 512
    assert freeze({"model": {"n_embd": 128}}).model.mlp_dim == 336  # 341.3 down to a multiple of 8
    assert freeze({"data": {"path": "x.txt"}}).data.source == "text"
    assert freeze({"data": {"path": "x", "source": "bin"}}).data.source == "bin"
    scaled = freeze({"model": {"block_size": 256, "rope_scaling": "linear", "rope_factor": 4.0}})
    assert scaled.model.rope_original_length == 64


def test_what_is_set_is_not_filled_in():
    given = {"model.head_dim": 20, "model.n_kv_head": 2, "model.mlp_dim": 77, "optim.final_lr": 0.0}
    frozen = as_dict(freeze(set_keys(given)))
    assert {key: frozen[key.split(".")[0]][key.split(".")[1]] for key in given} == given


# -- Round trip

VARIED = {
    "model.n_layer": 4,
    "model.layer_types": ("sliding", "full"),
    "model.window": 16,
    "model.n_kv_head": 2,
    "model.rope_scaling": "yarn",
    "model.rope_factor": 2.5,
    "model.final_softcap": 30.0,
    "model.param_dtype": "bfloat16",
    "data.path": "naïve folder/*.txt",
    "sample.prompt": 'a "quoted"\n☕',
    "sample.top_k": 5,
    "mesh.data": 2,
}


@pytest.mark.parametrize("values", [{}, VARIED], ids=["default", "varied"])
def test_freeze_of_the_json_of_a_frozen_config_is_that_config(values):
    frozen = freeze(set_keys(values))
    assert freeze(json.loads(json.dumps(as_dict(frozen)))) == frozen
    hash(frozen)  # static argument of jit


def test_a_config_dict_and_its_plain_dict_freeze_alike():
    given = default()
    given.update(set_keys(VARIED))
    assert freeze(given) == freeze(given.to_dict()) == freeze(set_keys(VARIED))


@pytest.mark.parametrize("key", OPTIONAL)
def test_an_optional_key_can_be_set_and_unset(key):
    """A plain None in a ConfigDict could not be set from the command line."""
    given_values = {"model.rope_scaling": "linear", "sample.top_p": 0.5, "optim.peak_lrs": (0.5, 1.0)}
    given_values |= {"model.rope_short_factors": (1.5,) * 8, "model.rope_long_factors": (2.5,) * 8}
    given_values |= {"sample.stop_tokens": (2,)}
    needed_values = {
        "model.window": {"model.layer_types": ("sliding",)},
        "model.rope_local_theta": {"model.layer_types": ("sliding",), "model.window": 4},
        "model.rope_attention_factor": {"model.rope_scaling": "yarn"},
        "model.rope_short_factors": {"model.rope_scaling": "longrope", "model.rope_long_factors": (1.0,) * 8},
        "model.rope_long_factors": {"model.rope_scaling": "longrope", "model.rope_short_factors": (1.0,) * 8},
    }
    value = given_values.get(key) or config.field_type(FIELDS[key])[0](8)
    needed = needed_values.get(key, {})
    given = default()
    given.update(set_keys(needed))
    given.update(set_keys({key: value}))
    group, name = key.split(".")
    assert getattr(getattr(freeze(given), group), name) == value
    given.update(set_keys({name: FIELDS[name].default for name in needed} | {key: None}))
    assert freeze(given) == freeze({})
    with pytest.raises(TypeError):
        given[group][name] = object()


# -- Types


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_the_wrong_type_names_key_value_and_type(key):
    kind, optional = config.field_type(FIELDS[key])
    wrong = {str: 3, int: 2.5, float: "fast", bool: 1, tuple: "full"}[kind]
    message = error_of({key: wrong})
    assert message == f"{key} ({wrong!r}) must be of type {kind.__name__}{' or None' if optional else ''}"
    if not optional:
        assert key in error_of({key: None})


def test_booleans_are_no_numbers_and_integers_are_floats():
    assert "must be of type int" in error_of({"train.num_steps": True})
    assert "must be of type float" in error_of({"optim.peak_lr": True})
    assert freeze(set_keys({"model.rope_theta": 500000})).model.rope_theta == 500000.0
    assert isinstance(freeze(set_keys({"model.rope_theta": 500000})).model.rope_theta, float)
    assert freeze(set_keys({"model.layer_types": ["full", "full"]})).model.layer_types == ("full", "full")
    assert "must be a tuple of str" in error_of({"model.layer_types": [1]})


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if config.field_type(field)[0] is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(key, value):
    assert error_of({key: value}) == f"{key} ({value}) must be a finite number"


# -- Rules: each error shows the values on both sides and the rule

RULES = [
    ({"model.n_embd": 100, "model.n_head": 8}, ["model.n_embd (100)", "model.n_head (8)", "multiple", "head_dim"]),
    ({"model.n_embd": 24, "model.n_head": 8}, ["model.head_dim (3)", "even"]),
    ({"model.head_dim": 7}, ["model.head_dim (7)", "even"]),
    ({"model.n_kv_head": 3}, ["model.n_head (8)", "model.n_kv_head (3)"]),
    ({"model.n_layer": 0}, ["model.n_layer (0)", "1 or more"]),
    ({"model.block_size": -1}, ["model.block_size (-1)", "1 or more"]),
    ({"model.mlp": "swish"}, ["model.mlp ('swish')", "swiglu"]),
    ({"model.norm_eps": 0.0}, ["model.norm_eps (0.0)", "above 0"]),
    ({"model.attn_softcap": -1.0}, ["model.attn_softcap (-1.0)", "above 0"]),
    ({"model.dropout": 1.0}, ["model.dropout (1.0)", "below 1"]),
    ({"model.dropout": -0.1}, ["model.dropout (-0.1)", "at least 0"]),
    ({"model.rope_scaling": "cubic"}, ["model.rope_scaling ('cubic')", "yarn"]),
    ({"model.rope_scaling": "yarn", "model.use_rope": False}, ["model.rope_scaling ('yarn')", "model.use_rope"]),
    ({"model.rope_factor": 2.0}, ["model.rope_factor (2.0)", "rope_scaling"]),
    ({"model.rope_factor": 0.5, "model.rope_scaling": "ntk"}, ["model.rope_factor (0.5)", "1 or more"]),
    ({"model.layer_types": ()}, ["model.layer_types ()", "sliding"]),
    ({"model.layer_types": ("local",), "model.window": 4}, ["model.layer_types ('local',)", "sliding"]),
    ({"model.rope_local_theta": 10.0}, ["model.rope_local_theta (10.0)", "'sliding'", "('full',)"]),
    ({"model.rope_local_theta": 10.0, "model.use_rope": False}, ["model.rope_local_theta (10.0)", "use_rope=True"]),
    ({"model.rope_dim": 6, "model.use_rope": False}, ["model.rope_dim (6)", "use_rope=True"]),
    ({"model.rope_dim": 7}, ["model.rope_dim (7)", "even"]),
    ({"model.rope_dim": 18}, ["model.rope_dim (18)", "model.head_dim (16)"]),
    ({"model.rope_layers": ()}, ["model.rope_layers ()", "True"]),
    ({"model.rope_layers": (True, False), "model.use_rope": False}, ["model.rope_layers ((True, False))", "use_rop"]),
    ({"model.rope_attention_factor": 1.5}, ["model.rope_attention_factor (1.5)", "yarn"]),
    ({"model.qk_norm_axes": "width"}, ["model.qk_norm_axes ('width')", "qk_norm=True"]),
    ({"model.qk_norm_axes": "row", "model.qk_norm": True}, ["model.qk_norm_axes ('row')", "head, width"]),
    ({"model.norm_placement": "before"}, ["model.norm_placement ('before')", "pre, post, both"]),
    ({"model.n_expert": 2, "model.n_expert_per_token": 3}, ["n_expert_per_token (3)", "model.n_expert (2)"]),
    ({"model.n_expert": 2, "model.use_bias": True}, ["model.n_expert (2)", "model.mlp_bias=False"]),
    ({"model.embed_scale": 0.0}, ["model.embed_scale (0.0)", "above 0"]),
    ({"model.layer_types": ("sliding",)}, ["model.window (None)", "('sliding',)"]),
    ({"model.window": 4}, ["model.window (4)", "('full',)"]),
    ({"model.compute_dtype": "float16"}, ["model.compute_dtype ('float16')", "bfloat16"]),
    ({"model.param_dtype": "f32"}, ["model.param_dtype ('f32')", "float32"]),
    ({"model.attention": "flash"}, ["model.attention ('flash')", "plain"]),
    ({"model.layer_execution": "loop"}, ["model.layer_execution ('loop')", "unrolled"]),
    ({"model.remat": "all"}, ["model.remat ('all')", "block"]),
    ({"data.source": "web"}, ["data.source ('web')", "python_stdlib"]),
    ({"data.source": "text"}, ["data.source 'text'", "data.path"]),
    ({"data.source": "bin"}, ["data.source 'bin'", "data.path"]),
    ({"data.val_fraction": 0.0}, ["data.val_fraction (0.0)", "above 0"]),
    ({"data.val_fraction": 1.0}, ["data.val_fraction (1.0)", "below 1"]),
    ({"optim.schedule": "step"}, ["optim.schedule ('step')", "cosine"]),
    ({"optim.adamw_lr": 0.0}, ["optim.adamw_lr (0.0)", "above 0"]),
    ({"optim.decay_fraction": 0.0}, ["optim.decay_fraction (0.0)", "above 0"]),
    ({"optim.decay_fraction": 1.5}, ["optim.decay_fraction (1.5)", "at most 1"]),
    ({"optim.muon_momentum": 1.0}, ["optim.muon_momentum (1.0)", "below 1"]),
    ({"optim.ema_decay": 1.0}, ["optim.ema_decay (1.0)", "below 1"]),
    ({"optim.peak_lr": -1e-3}, ["optim.peak_lr (-0.001)", "above 0"]),
    ({"optim.final_lr": -1.0}, ["optim.final_lr (-1.0)", "0 or more"]),
    ({"optim.warmup_steps": -1}, ["optim.warmup_steps (-1)", "0 or more"]),
    ({"optim.weight_decay": -1.0}, ["optim.weight_decay (-1.0)", "0 or more"]),
    ({"optim.grad_clip": -1.0}, ["optim.grad_clip (-1.0)", "0 or more"]),
    ({"optim.b2": 1.0}, ["optim.b2 (1.0)", "below 1"]),
    ({"train.batch_size": 0}, ["train.batch_size (0)", "1 or more"]),
    ({"train.num_steps": 0}, ["train.num_steps (0)", "1 or more"]),
    ({"train.num_steps": 2**31}, ["train.num_steps (2147483648)", "at most 2147483647"]),
    ({"train.eval_every": -1}, ["train.eval_every (-1)", "0 or more"]),
    ({"train.batch_size": 6, "train.accumulation_steps": 4}, ["batch_size (6)", "accumulation_steps (4)"]),
    ({"sample.temperature": -1.0}, ["sample.temperature (-1.0)", "0 (greedy) or more"]),
    ({"sample.top_k": 0}, ["sample.top_k (0)", "1 or more"]),
    ({"sample.top_p": 0.0}, ["sample.top_p (0.0)", "at most 1"]),
    ({"sample.top_p": 1.5}, ["sample.top_p (1.5)", "at most 1"]),
    ({"sample.max_new_tokens": -1}, ["sample.max_new_tokens (-1)", "at least 0"]),
    ({"mesh.data": -1, "mesh.fsdp": -1}, ["mesh.data and mesh.fsdp", "one of them"]),
    ({"mesh.tensor": 0}, ["mesh.tensor (0)", "1 or more"]),
    ({"mesh.data": 0}, ["mesh.data (0)", "1 or more"]),
]


@pytest.mark.parametrize("values, words", RULES, ids=lambda x: ",".join(x))
def test_an_impossible_value_is_one_line_with_value_and_rule(values, words):
    message = error_of(values)
    assert [word for word in words if word not in message] == []


# -- Names


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("optim.peek_lr", "optim.peak_lr"),
        ("model.n_layers", "model.n_layer"),
        ("train.steps", "train.num_steps"),
        ("sample.max_tokens", "sample.max_new_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(key, nearest):
    for message in (error_of({key: 1}), _check_error(key)):
        assert repr(key) in message and repr(nearest) in message


def test_a_key_in_the_wrong_group_is_found():
    assert "'optim.peak_lr'" in _check_error("train.peak_lr")
    assert "'optim.peak_lr'" in _check_error("peak_lr")


def test_an_unknown_key_without_a_neighbour_says_where_they_are_listed():
    assert "llm_jax/config.py" in error_of({"model.zzzz": 1})
    assert "unknown config key 'modell'" in _freeze_error({"modell": {}})


def test_a_group_that_is_no_group():
    assert "model" in _freeze_error({"model": 3})


def _check_error(key):
    with pytest.raises(InputError) as error:
        config.check_keys(["optim.peak_lr", key])
    return str(error.value)


def _freeze_error(values):
    with pytest.raises(InputError) as error:
        freeze(values)
    return str(error.value)


# -- Files


def load_error(path) -> str:
    with pytest.raises(InputError) as error:
        load_file(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_config_files(tmp_path):
    path = tmp_path / "mine.py"
    assert "mine.py" in load_error(path)
    path.write_text("x = 1\n")
    assert "no get_config()" in load_error(path)
    body = "from llm_jax.config import default\ndef get_config():\n    c = default()\n    c.optim.{}\n    return c\n"
    path.write_text(body.format("peek_lr = 1.0"))
    assert "'peek_lr'" in load_error(path) and "'optim.peak_lr'" in load_error(path)
    path.write_text(body.format("peek_lr = 1.0").replace("optim", "optin"))
    assert "'optin'" in load_error(path) and "'optim'" in load_error(path)
    path.write_text(body.format("peak_lr = 'fast'"))
    assert "'peak_lr'" in load_error(path) and "float" in load_error(path)
    path.write_text(body.format("peak_lr = 0.5"))
    assert freeze(load_file(str(path))).optim.peak_lr == 0.5


@pytest.mark.parametrize(
    "code, told",
    [
        ("def get_config():\n    return None.nothing\n", "line 2: AttributeError: "),
        ("def get_config():\n    open('/nothing')\n", "line 2: FileNotFoundError: "),
        ("\n\nimport nothing_such\n", "line 3: ModuleNotFoundError: "),
        ("def get_config(:\n", "line 1 is not Python"),
        ("\0", "null bytes"),
    ],
)
def test_a_config_files_own_mistake_is_told_with_its_line(tmp_path, code, told):
    path = tmp_path / "mine.py"
    path.write_text(code)
    assert told in load_error(path) and "None" not in load_error(path).replace("NoneType", "")


def test_a_config_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from llm_jax.config import default as get_config\n")
    assert load_file("~/mine.py") == default()
