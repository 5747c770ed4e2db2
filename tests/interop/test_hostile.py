"""Hugging Face folders whose files are damaged: one clear line or a correct load, and no large allocation."""

import functools
import json
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from mutations import CHANGES, mutate, with_other_values

import llm_jax
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.interop import hf, hf_config, hf_generation
from llm_jax.interop.tensors import check_shapes, tensors
from llm_jax.model import init_params
from llm_jax.pretrained import open_model, param_shapes
from llm_jax.tokenizers import load_tokenizer, train_bpe

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_bpe(["the cat"] * 4, 260)
    cfg = freeze({"model": dict(n_embd=8, n_head=2, n_layer=1, mlp_dim=8, block_size=8, vocab_size=260)})
    params = jax.jit(init_params, static_argnums=0)(cfg.model, jax.random.key(0))
    folder = tmp_path_factory.mktemp("small") / "hf"
    llm_jax.LanguageModel(cfg, params, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def error_of(folder):
    with pytest.raises(InputError) as error:
        llm_jax.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def header_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h["model.norm.weight"].update(dtype="I64"), "safetensors"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 1 << 60]), "safetensors"),
        (lambda h: h["model.norm.weight"].update(shape=[1 << 62]), "safetensors"),
        (lambda h: h.pop("model.norm.weight"), "safetensors"),
        (lambda h: h.update({"model.extra": h.pop("model.norm.weight")}), "model.norm.weight is missing"),
        (lambda h: h["model.norm.weight"].update(shape=[2, 4]), "shape [2, 4]"),
        (lambda h: h["model.norm.weight"].update(shape=[16], dtype="F8_E4M3"), "safetensors"),
    ],
    ids=range(7),
)
def test_a_wrong_safetensors_header_is_one_line(copy, change, words):
    header, rest = header_of((copy / "model.safetensors").read_bytes())
    change(header)
    (copy / "model.safetensors").write_bytes(with_header(header, rest))
    assert words in error_of(copy)


def test_names_are_no_paths_and_shards_are_counted(copy, folder):
    (copy / "model.safetensors").unlink()
    index = copy / hf.INDEX
    names = hf.Safetensors(folder).names
    for place, words in (
        ("../hf/model.safetensors", "no safetensors file of the folder"),
        ("/etc/passwd", "no safetensors file of the folder"),
        ("model.bin", "no safetensors file of the folder"),
        ("missing.safetensors", "missing.safetensors can't be opened"),
        (5, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
        assert words in error_of(copy)
    for name in ("a.safetensors", "b.safetensors"):
        (copy / name).write_bytes((folder / "model.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert "is in two files" in error_of(copy)


def test_pickled_weights_are_not_opened(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "pytorch_model.bin may run code" in error_of(copy)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "mamba"}, ["'mamba'", "llama"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"new_trick": 3}, ["new_trick (3)"]),
        ({"hidden_act": "swishy"}, ["hidden_act ('swishy')"]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type ('dynamic')"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, ["odd"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor (0.5)"]),
        ({"rope_parameters": "x"}, ["rope_parameters"]),
        ({"sliding_window": 4}, ["sliding_window (4)"]),
        ({"hidden_size": "8"}, ["n_embd", "'8'"]),
        ({"hidden_size": 10**12}, ["n_embd (1000000000000)"]),
        ({"num_hidden_layers": -1}, ["layers (-1)"]),
        ({"num_hidden_layers": 10**9}, ["layers (1000000000)"]),
        ({"num_attention_heads": 0}, ["n_head (0)"]),
        ({"max_position_embeddings": None}, ["no max_position_embeddings"]),
        ({"dtype": "int8", "torch_dtype": "int8"}, ["dtype ('int8')"]),
        ({"rms_norm_eps": 0.0}, ["norm_eps (0.0)"]),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_a_config_says_that_is_not_known_is_named(copy, values, words):
    config = json.loads((copy / "config.json").read_text()) | values
    (copy / "config.json").write_text(json.dumps(config))
    message = error_of(copy)
    assert all(word in message for word in words), message


def opens_or_refuses(folder, copy, name, changes):
    data = mutate((folder / name).read_bytes(), changes)
    (copy / name).write_bytes(data)
    tracemalloc.start()
    try:
        source = open_model(copy)
        for path, place in (("embed/tokens", ()), ("blocks/attn/q", (0,)), ("final_norm/weight", ())):
            assert isinstance(source.part(path, place), np.ndarray)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        (copy / name).write_bytes((folder / name).read_bytes())
    assert peak < 2 * len(data) + 8 * 2**20  # Python's own objects, and the other files


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_every_value_may_be_another(folder, copy, name):
    """Each a number, a text, a list, ... in the place of each: read, or told of."""
    config = json.loads((copy / "config.json").read_text())
    for changed in with_other_values(json.loads((copy / name).read_text())):
        (copy / name).write_text(json.dumps(changed))
        try:
            if name == "config.json":
                hf_config.read_config(changed)
            elif name == "generation_config.json":
                freeze({"sample": hf_generation.read_generation(copy, config)[0]})
            else:
                load_tokenizer(copy)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.slow
def test_every_value_of_a_config_may_be_another_and_the_model_opens_or_is_refused(folder, copy):
    for changed in with_other_values(json.loads((folder / "config.json").read_text())):
        (copy / "config.json").write_text(json.dumps(changed))
        try:
            open_model(copy)
        except InputError as error:
            assert "\n" not in str(error)


SLOW = settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", FILES)
@settings(SLOW, max_examples=12)
@given(changes=CHANGES)
def test_a_changed_file_opens_or_is_refused(folder, copy, name, changes):
    opens_or_refuses(folder, copy, name, changes)


@pytest.mark.slow
@SLOW
@given(changes=CHANGES)
def test_ten_thousand_changed_safetensors_open_or_are_refused(folder, copy, changes):
    """Without the tracing that a whole model's shapes take."""
    family, cfg = hf_config.read_config(json.loads((folder / "config.json").read_text()))
    data = mutate((folder / "model.safetensors").read_bytes(), changes)
    (copy / "model.safetensors").write_bytes(data)
    groups = list(tensors(family.rows, param_shapes_of(cfg)))
    tracemalloc.start()
    try:
        weights = hf.Safetensors(copy)
        names = hf.find_tensors(family, groups, weights.names)
        check_shapes(groups, lambda name: weights.shape(names[name]))
        for name in names.values():
            assert weights.read(name).size
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 * len(data) + 2**20


@functools.cache
def param_shapes_of(cfg):
    return param_shapes(cfg)


@pytest.mark.slow
@SLOW
@given(changes=CHANGES)
def test_ten_thousand_changed_tokenizers_open_or_are_refused(folder, copy, changes):
    (copy / "tokenizer.json").write_bytes(mutate((folder / "tokenizer.json").read_bytes(), changes))
    try:
        tokenizer = load_tokenizer(copy)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert tokenizer.vocab_size >= 0
