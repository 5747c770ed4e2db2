"""stories260K, a trained Llama, as a Hugging Face folder, as GGUF and in llama2.c's format: one model, one text."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.interop import llama2c
from llm_jax.interop.gguf import read_gguf

if "LLM_JAX_ASSETS" not in os.environ:
    pytest.skip("LLM_JAX_ASSETS not set", allow_module_level=True)
FOLDER = Path(os.environ["LLM_JAX_ASSETS"]) / "stories260K"
PUBLISHED = (FOLDER / "greedy_200.txt").read_text().removesuffix("\n")
TEXTS = [PUBLISHED, "Once upon a time,  there was 123 things.\nПривет 你好 🎉 the end ", " x", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By format; llama2.c's with its tokenizer.bin beside it."""
    folder = tmp_path_factory.mktemp("llama2c")
    shutil.copy(FOLDER / "stories260K.bin", folder / "model.bin")
    shutil.copy(FOLDER / "tok512.bin", folder / "tokenizer.bin")
    paths = {"hf": FOLDER / "hf", "gguf": FOLDER / "stories260K-f32.gguf", "bin": folder / "model.bin"}
    return {name: llm_jax.load(path) for name, path in paths.items()}


@pytest.mark.parametrize("name", ["hf", "gguf", "bin"])
def test_greedy_text_is_the_published_one(models, name):
    """200 tokens from BOS alone."""
    assert models[name].generate("", max_new_tokens=200, temperature=0.0, stop_tokens=()) == PUBLISHED


@pytest.mark.parametrize("name", ["gguf", "bin"])
def test_logits_and_ids_agree(models, name):
    tokens = [models["hf"].encode_prompt(PUBLISHED)[:256]]
    np.testing.assert_allclose(models[name].logits(tokens), models["hf"].logits(tokens), atol=1e-4)
    for text in TEXTS:
        assert models[name].tokenizer.encode(text) == models["hf"].tokenizer.encode(text)
        assert models[name].tokenizer.decode(models["hf"].tokenizer.encode(text)) == text


def test_ids_are_those_of_sentencepiece(models):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece not installed")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "hf" / "tokenizer.model"))
    for text in TEXTS:
        assert models["hf"].tokenizer.encode(text) == processor.encode(text)


def test_q8_0_is_the_model_of_its_rounded_weights(models):
    """Which the package gguf dequantizes."""
    gguf = pytest.importorskip("gguf", reason="gguf not installed")
    path = FOLDER / "stories260K-q8_0.gguf"
    lm = llm_jax.load(path)
    found = {name: read_gguf(path).read(name) for name in read_gguf(path).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        np.testing.assert_array_equal(found[tensor.name].astype(np.float32).ravel(), expected.ravel())
    tokens = [lm.encode_prompt(PUBLISHED)[:256]]
    exact = models["hf"].logits(tokens)
    difference = np.abs(lm.logits(tokens) - exact).max()
    assert 1e-3 < difference < 0.05 * np.abs(exact).max()  # rounded, and nothing worse


def test_llama2c_is_written_as_it_was_but_for_the_last_digits_of_its_angles(models, tmp_path):
    from llm_jax import pretrained, published

    original = FOLDER / "stories260K.bin"
    source = pretrained.open_model(original, tokenizer=models["hf"].tokenizer)
    published.save_llama2c(source, tmp_path / "out.bin")
    ours, theirs = (np.fromfile(path, np.float32, offset=28) for path in (tmp_path / "out.bin", original))
    angles = 2 * 512 * 4
    np.testing.assert_array_equal(ours[:-angles], theirs[:-angles])
    np.testing.assert_allclose(ours[-angles:], theirs[-angles:], atol=5e-5)


def test_llama2c_files_that_are_wrong_are_one_line(tmp_path):
    data = (FOLDER / "stories260K.bin").read_bytes()
    for content, words in [
        (b"", "first format"),
        (data[:20], "first format"),
        (data[:-4], f"has {len(data) - 4} bytes"),
        (data + b"\0", f"has {len(data) + 1} bytes"),
        (data[:4] + b"\xff\xff\xff\x7f" + data[8:], "header"),
        (bytes(4) + data[4:], "header"),
        (llama2c.MAGIC.to_bytes(4, "little") + data[4:], "first format"),
    ]:
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(llm_jax.InputError) as error:
            llm_jax.load(tmp_path / "model.bin", tokenizer=llama2c.load_tokenizer(FOLDER / "tok512.bin"))
        assert words in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "model.bin").write_bytes(data)
    assert llm_jax.load(tmp_path / "model.bin", tokenizer=FOLDER / "hf").tokenizer.bos_id == 1
    with pytest.raises(llm_jax.InputError, match="tokenizer"):
        llm_jax.load(tmp_path / "model.bin")
    tok = (FOLDER / "tok512.bin").read_bytes()
    for content in (b"", tok[:-1], tok[:9], tok[:8] + b"\xff\xff\xff\x7f" + tok[12:]):
        (tmp_path / "tokenizer.bin").write_bytes(content)
        with pytest.raises(llm_jax.InputError, match="tokenizer.bin"):
            llm_jax.load(tmp_path / "model.bin")
