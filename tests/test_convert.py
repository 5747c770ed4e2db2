"""python -m llm_jax.convert: any format to any other."""

import jax
import numpy as np
import pytest
from conftest import gpt2_tokenizer

import llm_jax
from llm_jax.config_rules import freeze
from llm_jax.model import init_params
from llm_jax.tokenizers import byte_tokenizer

SHAPE = dict(n_embd=32, n_head=4, n_kv_head=2, n_layer=2, mlp_dim=64, block_size=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Llama's run, with a tokenizer of GPT-2's kind."""
    tokenizer = gpt2_tokenizer("the cat and the dog", 270)
    cfg = freeze({"model": SHAPE | dict(vocab_size=tokenizer.vocab_size)})
    params = jax.jit(init_params, static_argnums=0)(cfg.model, jax.random.key(0))
    folder = tmp_path_factory.mktemp("small") / "run"
    llm_jax.LanguageModel(cfg, params, tokenizer).save(folder)
    return folder


@pytest.mark.slow
def test_a_model_goes_through_every_format_and_comes_back_bitwise(commands, run, tmp_path):
    expected = llm_jax.load(run)
    places = ["hf", "model.gguf", "again", "model.bin", "last", "back"]
    source = run
    for place in places:
        arguments = ["--to=run"] if place == "back" else []
        if source.suffix == ".bin":  # it holds no tokenizer
            arguments.append(f"--tokenizer={tmp_path / 'hf'}")
        result = commands.run("convert", str(source), place, *arguments, cwd=tmp_path)
        assert result.returncode == 0 and result.stdout == "", result.stderr
        assert f"wrote {place}" in result.stderr
        source = tmp_path / place
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(places)  # nothing half-done is left
    found = llm_jax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.tokenizer.encode("the cat sat") == expected.tokenizer.encode("the cat sat")
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode & 0o044  # as readable as other files


def test_dtypes(commands, run, tmp_path):
    exact = llm_jax.load(run).params["blocks"]["mlp"]["up"]
    cases = (("hf", "bfloat16", 2**-8), ("m.gguf", "float16", 2**-11), ("q.gguf", "q8_0", 2**-6))
    for place, dtype, largest in cases:
        result = commands.run("convert", str(run), place, f"--dtype={dtype}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rounded = np.asarray(llm_jax.load(tmp_path / place, dtype="float32").params["blocks"]["mlp"]["up"])
        worst = np.abs(rounded - exact).max() / np.abs(exact).max()
        assert 0 < worst <= largest


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["SRC is missing"]),
        (["{run}"], ["DST is missing"]),
        (["{run}", "out", "more"], ["'more'"]),
        (["nowhere", "out"], ["nowhere"]),
        (["{run}", "{run}"], ["there already"]),
        (["{run}", "out.bin", "--dtype=q8_0"], ["--dtype=q8_0", "llama2c"]),
        (["{run}", "out", "--dtype=int4"], ["int4"]),
        (["{odd}", "out"], ["model.mlp ('relu2'", "no published family"]),
        (["{odd}", "out.gguf"], ["model.mlp ('relu2'", "llama.cpp"]),
        (["{odd}", "out.bin"], ["model.mlp ('relu2'", "llama2.c"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line_and_leaves_nothing(commands, run, tmp_path, arguments, words):
    odd = tmp_path / "odd"
    cfg = freeze({"model": SHAPE | dict(vocab_size=256, mlp="relu2")})
    params = jax.jit(init_params, static_argnums=0)(cfg.model, jax.random.key(0))
    llm_jax.LanguageModel(cfg, params, byte_tokenizer()).save(odd)
    given = [argument.format(run=run, odd=odd) for argument in arguments]
    result = commands.run("convert", *given, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
