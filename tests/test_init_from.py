"""Training from another model's weights, with its shape and its tokenizer."""

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.config import default
from llm_jax.errors import InputError
from llm_jax.report import read_metrics

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 200


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return file


def config(text, **train):
    cfg = default()
    cfg.data.path = str(text)
    cfg.data.val_fraction = 0.2
    cfg.optim.warmup_steps = 1
    cfg.optim.peak_lr = 1e-3
    cfg.train.update(dict(batch_size=8, num_steps=4, seq_len=16, eval_batches=2, log_every=1) | train)
    cfg.sample.max_new_tokens = 0
    return cfg


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory):
    """A run of a byte tokenizer, as a Hugging Face folder."""
    cfg = config(text, num_steps=60, save_every=0)
    cfg.model.update(dict(n_embd=32, n_head=4, n_kv_head=2, n_layer=2, block_size=48))
    cfg.data.tokenizer = "byte"
    cfg.optim.peak_lr = 3e-3
    folder = tmp_path_factory.mktemp("pretrained")
    lm = llm_jax.fit(cfg, workdir=folder / "run")
    lm.save_pretrained(folder / "hf")
    return folder / "hf", read_metrics(folder / "run")[-1]["val_loss_full"], jax.device_get(lm.params)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_run_starts_from_the_models_weights_and_continues_its_own(pretrained, text, tmp_path, runs):
    source, val_loss, params = pretrained
    cfg = config(text, init_from=str(source), seeds=runs)
    cfg.optim.peak_lr = 1e-9  # to see where it starts
    started = llm_jax.fit(cfg, workdir=tmp_path / "run")
    assert started.config.model.n_embd == 32 and started.config.model.block_size == 48
    assert started.config.model.family == "llama" and started.tokenizer.vocab_size == 256
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), started.params, params)
    first = next(line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line)
    assert first == pytest.approx(val_loss, rel=0.1)
    cfg.train.num_steps = 6
    again = llm_jax.fit(cfg, workdir=tmp_path / "run")
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == sorted([*range(1, 7)] * runs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again.params, params)


def test_a_run_that_has_begun_continues_without_the_model(pretrained, text, tmp_path):
    copy = tmp_path / "moved"
    llm_jax.load(pretrained[0]).save_pretrained(copy)
    llm_jax.fit(config(text, init_from=str(copy)), workdir=tmp_path / "run")
    copy.rename(tmp_path / "elsewhere")
    llm_jax.fit(config(text, init_from=str(copy), num_steps=5), workdir=tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model.n_embd": 64}, ["model.n_embd (64, there 32)", "configs/finetune.py"]),
        ({"data.tokenizer": "char"}, ["data.tokenizer ('char')", "train.init_from"]),
        ({"train.seq_len": 49}, ["train.seq_len (49)", "model.block_size (48)"]),
        ({"train.init_from": "nowhere"}, ["nowhere"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_does_not_fit_the_model_is_one_line(pretrained, text, tmp_path, values, words):
    cfg = config(text, init_from=str(pretrained[0]))
    cfg.update_from_flattened_dict(values)
    with pytest.raises(InputError) as error:
        llm_jax.fit(cfg, workdir=tmp_path / "run")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
