"""An exported model continues as the model does, with no model code."""

import json
import shutil

import jax
import jaxtyping
import numpy as np
import pytest
from conftest import error_of, random_params

import llm_jax
from llm_jax.config_rules import freeze
from llm_jax.language_model import LanguageModel
from llm_jax.tokenizers import byte_tokenizer

pytest.importorskip("flatbuffers", reason="flatbuffers not installed: pip install llm_jax[export]")


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """jaxtyping can't compare the symbols that stand for lengths."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def lm():
    shape = dict(n_embd=16, n_head=4, n_kv_head=2, n_layer=2, block_size=24, vocab_size=260)
    cfg = freeze({"model": shape | dict(layer_types=("sliding", "full"), window=9, qk_norm=True)})
    return LanguageModel(cfg, random_params(cfg.model), byte_tokenizer())


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    lm.export(path)
    return path


def test_it_continues_as_the_model_does(lm, folder):
    """Of any number of prompts and samples, any length, past the windows and the first cache."""
    exported = llm_jax.load_exported(folder)
    for prompts, request in [
        ("the ", dict(temperature=0.0)),
        (["a", "the cat sees", "x" * 100], dict(temperature=1.2, top_k=9, top_p=0.9, seed=5, max_new_tokens=60)),
        ("a longer one", dict(presence_penalty=1.0, logit_bias={65: -np.inf}, stop_tokens=[66], max_new_tokens=200)),
    ]:
        assert exported.generate(prompts, **request) == lm.generate(prompts, **request)
    pieces = [*exported.stream("the ", max_new_tokens=40, stop_strings=["e"])]
    assert "the " + "".join(pieces) == lm.generate("the ", max_new_tokens=40, stop_strings=["e"])
    ours, theirs = (each.generate_detailed("dog", num_samples=3, max_new_tokens=20) for each in (exported, lm))
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens and a.text == b.text
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.slow
def test_rounded_weights_and_cache_go_along(tiny_run, tmp_path):
    lm = llm_jax.load(tiny_run, weights="int8", cache_dtype="int8")
    lm.export(tmp_path / "small")
    assert llm_jax.load_exported(tmp_path / "small").generate("the ") == lm.generate("the ")
    assert (tmp_path / "small" / "params.safetensors").stat().st_size < sum(
        leaf.nbytes for leaf in jax.tree.leaves(lm.params)
    )


@pytest.mark.slow
def test_it_runs_without_model_code(run_python, lm, folder):
    code = f"""
import llm_jax, sys
print(repr(llm_jax.load_exported({str(folder)!r}).generate("the ", temperature=0.0)))
print([name for name in sys.modules if name in ("llm_jax.model", "llm_jax.engine", "orbax", "optax")])
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    text, modules = result.stdout.splitlines()
    assert text == repr(lm.generate("the ", temperature=0.0)) and modules == "[]"


@pytest.mark.slow
def test_programs_for_other_platforms(lm, tmp_path):
    """They are made here, and refused where they can't run."""
    lm.export(tmp_path / "both", platforms=["cpu", "cuda", "tpu"])
    assert json.loads((tmp_path / "both" / "export.json").read_text())["platforms"] == ["cpu", "cuda", "tpu"]
    assert llm_jax.load_exported(tmp_path / "both").generate("the ") == lm.generate("the ")
    lm.export(tmp_path / "tpu", platforms=["tpu"])
    message = error_of(llm_jax.load_exported, tmp_path / "tpu")
    assert "tpu" in message and "platforms=['cpu']" in message


def test_what_cannot_be_is_one_line(lm, folder, tmp_path):
    assert "'metal'" in error_of(lm.export, tmp_path / "x", platforms=["metal"])
    assert "'metal'" in error_of(lm.export.__func__.__wrapped__, lm, tmp_path / "x", platforms="metal")
    assert "already" in error_of(lm.export, folder)
    assert not (tmp_path / "x").exists()
    exported = llm_jax.load_exported(folder)
    assert "draft" in error_of(exported.generate, "a", draft="lookup")
    assert "top_logprobs" in error_of(exported.generate_detailed, "a", top_logprobs=2)
    assert "temperature" in error_of(exported.generate, "a", temperature=-1.0)
    assert "no export" in error_of(llm_jax.load_exported, tmp_path)
    for name, content in (("export.json", b"{"), ("export.json", b"[]"), ("params.safetensors", b"\xff" * 99)):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        (broken / name).write_bytes(content)
        assert "broken" in error_of(llm_jax.load_exported, broken)
    facts = json.loads((folder / "export.json").read_text())
    shutil.rmtree(broken)
    shutil.copytree(folder, broken)
    (broken / "export.json").write_text(json.dumps(facts | {"format": 3}))
    assert "format 3" in error_of(llm_jax.load_exported, broken)
