"""train.micro_batch: by hand, and as large as the devices' memory lets it be."""

import json

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax import auto_fit, planning, sharding
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError

MODEL = dict(n_embd=32, n_head=4, n_layer=2, block_size=64, vocab_size=256)


def choose(micro_batch, memory_bytes):
    cfg = freeze(dict(model=MODEL, train=dict(batch_size=16, micro_batch=micro_batch), mesh=dict(data=2)))
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:2])
    peak = planning.peak_bytes(planning.compile_step(cfg, mesh)[1])
    return auto_fit.choose_micro_batch(cfg, mesh, memory_bytes=memory_bytes(peak)), mesh


def test_all_rows_at_once_where_they_fit():
    cfg, _ = choose(0, lambda peak: 2 * peak)
    assert (cfg.train.micro_batch, cfg.train.accumulation_steps) == (16, 1)


def test_fewer_rows_where_they_do_not_fit(capsys):
    cfg, mesh = choose(0, lambda peak: 0.7 * peak)
    assert cfg.train.micro_batch in (2, 4, 8)  # a row for each of two devices at least
    assert cfg.train.micro_batch * cfg.train.accumulation_steps == 16
    largest, _ = choose(2 * cfg.train.micro_batch, lambda peak: peak)
    assert planning.peak_bytes(planning.compile_step(largest, mesh)[1]) > 0.7 * 0.9 * planning.peak_bytes(
        planning.compile_step(freeze(dict(model=MODEL, train=dict(batch_size=16), mesh=dict(data=2))), mesh)[1]
    )
    assert "train.micro_batch" in capsys.readouterr().err


def test_where_nothing_fits_it_is_told(capsys):
    with pytest.raises(InputError, match=r"not even a micro-batch of 2 rows.*GiB"):
        choose(0, lambda peak: 1000)


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
    compile_step, tried = planning.compile_step, []

    def refuse(cfg, mesh):
        tried.append(cfg.train.micro_batch)
        if cfg.train.micro_batch == 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 34.0G of 31.2G hbm")
        return compile_step(cfg, mesh)

    cfg = freeze(dict(model=MODEL, train=dict(batch_size=16, micro_batch=0), mesh=dict(data=2)))
    monkeypatch.setattr(planning, "compile_step", refuse)
    chosen = auto_fit.choose_micro_batch(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:2]), memory_bytes=1e12)
    assert chosen.train.micro_batch == 8 and tried == [16, 8]


def test_several_runs_have_no_plan():
    cfg = freeze(dict(model=MODEL, train=dict(batch_size=16, micro_batch=0, seeds=2)))
    with pytest.raises(InputError, match="of one run"):
        auto_fit.choose_micro_batch(cfg, sharding.make_mesh(cfg.mesh, jax.devices()))


def test_a_number_is_taken_as_it_is():
    cfg, _ = choose(4, lambda peak: 1)
    assert (cfg.train.micro_batch, cfg.train.accumulation_steps) == (4, 4)
    assert freeze(llm_jax.config.as_dict(cfg)) == cfg


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(micro_batch=3), r"batch_size \(16\) must be a multiple of train.micro_batch \(3\)"),
        (dict(micro_batch=4, accumulation_steps=2), r"micro_batch \(4\) and train.accumulation_steps \(2\) both"),
        (dict(micro_batch=0, accumulation_steps=2), r"micro_batch \(0\) and train.accumulation_steps \(2\) both"),
        (dict(micro_batch=-1), r"micro_batch \(-1\) must be 0 or more"),
    ],
)
def test_both_ways_to_say_it_and_impossible_ones(given, message):
    with pytest.raises(InputError, match=message):
        freeze(dict(train=dict(batch_size=16) | given))


def test_losses_do_not_change(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a cat sees a bird.\n" * 900)

    def fit(micro_batch, folder):
        config = llm_jax.config.default()
        config.model.update(MODEL)
        config.data.update(dict(path=str(tmp_path / "text.txt"), tokenizer="byte", cache_dir=str(tmp_path / "cache")))
        config.train.update(dict(batch_size=64, num_steps=4, eval_every=0, save_every=0, log_every=1))
        config.train.micro_batch, config.sample.max_new_tokens = micro_batch, 0
        llm_jax.fit(config, workdir=tmp_path / folder)
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        recorded = json.loads((tmp_path / folder / "config.json").read_text())["train"]
        return [line["loss"] for line in lines if "loss" in line], recorded["micro_batch"]

    whole, none = fit(None, "whole")
    assert none is None
    config = freeze(dict(model=MODEL, train=dict(batch_size=64)))
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    peak = planning.peak_bytes(planning.compile_step(config, mesh)[1])
    monkeypatch.setattr(auto_fit, "device_memory", lambda mesh: 0.9 * peak)
    parts, chosen = fit(0, "parts")
    assert chosen < 64
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
