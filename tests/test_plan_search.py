"""The search for a mesh, with plans that a function makes up, and with compiled ones."""

import dataclasses
import math

import jax
import pytest
from conftest import REPOSITORY
from ml_collections import ConfigDict

from llm_jax import chips, plan_search, planning, roofline
from llm_jax.config import default
from llm_jax.config_file import override
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError

CHIP = chips.Chip(flops=1e9, memory_bytes=1e9, memory_bandwidth=1e9, link_bandwidth=1e9)


def configured(changes=(), **model):
    config: ConfigDict = default()
    sizes = dict(n_embd=64, n_head=4, n_layer=2, block_size=64, vocab_size=128, mlp_dim=128)
    override(config, [f"model.{key}={value}" for key, value in (sizes | model).items()])
    override(config, ["train.batch_size=16", "optim.name=adamw", *changes])
    return freeze(config)


def test_candidates_divide_everything_evenly():
    groups = plan_search.candidates(configured(), jax.devices(), CHIP)
    every = [candidate for group in groups for candidate in group]
    assert len({(each.mesh, each.remat, each.micro_batch) for each in every}) == len(every)
    for each in every:
        sizes = dict(each.mesh)
        assert math.prod(sizes.values()) == 8 and sizes["expert"] == 1
        assert 4 % sizes["tensor"] == 0  # heads
        assert each.micro_batch % (sizes["data"] * sizes["fsdp"]) == 0 and 16 % each.micro_batch == 0
    cfg = configured(every[-1].changes)
    assert (cfg.model.remat, cfg.mesh.tensor) == (every[-1].remat, dict(every[-1].mesh)["tensor"])
    assert cfg.train.accumulation_steps == 16 // every[-1].micro_batch
    for group in groups:
        assert [each.micro_batch for each in group] == sorted((each.micro_batch for each in group), reverse=True)
    assert {
        dict(each.mesh)["expert"]
        for group in plan_search.candidates(configured(n_expert=4), jax.devices(), CHIP)
        for each in group
    } == {1, 2, 4}


def test_the_formula_knows_what_saves_memory_and_what_costs_time():
    groups = plan_search.candidates(configured(), jax.devices(), CHIP)
    found = {(each.mesh, each.remat, each.micro_batch): each for group in groups for each in group}
    mesh = {
        axis: (("data", data), ("fsdp", 8 // data), ("expert", 1), ("context", 1), ("tensor", 1))
        for axis, data in (("copies", 8), ("split", 1))
    }
    none, block = (found[mesh["split"], remat, 16] for remat in ("none", "block"))
    assert none.bytes > block.bytes and none.seconds < block.seconds
    assert found[mesh["copies"], "none", 16].bytes > none.bytes > found[mesh["split"], "none", 8].bytes


def made_up(fits, seconds):
    """In the place of `planning.plan_training`: (its plans, what was asked for)."""
    asked = []

    def plan(cfg, topology):
        asked.append(cfg)
        limits = roofline.Limits(seconds(cfg), 0.0, 0.0, 0.0, {})
        peak = 1 if fits(cfg) else 2
        empty = planning.Temporary({}, ())
        return planning.Plan({}, 0.0, {}, 0, 0, empty, peak, 1.5, 1.0, 1.0, 0.0, 1.0, {}, limits, 1e9, 1024, ())

    return plan, asked


def test_the_fastest_that_fits(monkeypatch):
    plan, asked = made_up(lambda cfg: cfg.model.remat == "block", lambda cfg: 1.0 + (cfg.mesh.fsdp != 4))
    monkeypatch.setattr(planning, "plan_training", plan)
    found = plan_search.search(configured, chips.Topology("made up", jax.devices(), CHIP), max_compiles=100)
    assert all(candidate.remat == "block" for candidate, _ in found.best)
    assert dict(found.best[0][0].mesh)["fsdp"] == 4 and len(found.best) == 3
    assert found.outcomes["fit"] + found.outcomes["do not fit"] == len(asked)


def test_what_needs_more_than_what_did_not_fit_is_not_compiled(monkeypatch):
    plan, asked = made_up(lambda cfg: False, lambda cfg: 1.0)
    monkeypatch.setattr(planning, "plan_training", plan)
    found = plan_search.search(configured, chips.Topology("made up", jax.devices(), CHIP), max_compiles=1000)
    assert found.best == () and found.candidates == sum(found.outcomes.values())
    keys = [
        (dataclasses.astuple(cfg.mesh), plan_search.REMATS.index(cfg.model.remat), cfg.train.micro_batch)
        for cfg in asked
    ]
    for i, (mesh, remat, rows) in enumerate(keys):
        assert not any(mesh == m and remat <= r and rows >= n for m, r, n in keys[:i])


def test_what_does_not_compile_is_counted(monkeypatch):
    def refuse(cfg, topology):
        raise InputError("no")

    monkeypatch.setattr(planning, "plan_training", refuse)
    found = plan_search.search(configured, chips.Topology("made up", jax.devices(), CHIP), max_compiles=3)
    assert found.outcomes == {"do not compile": 3} and found.best == ()


def test_nothing_divides():
    with pytest.raises(InputError, match="16.*change the batch"):
        plan_search.search(configured, chips.Topology("made up", jax.devices()[:7], CHIP), max_compiles=3)


def test_the_command(commands):
    how = ["--search", "--max_compiles=1", "--config.model.n_layer=1", "--config.mesh.data=2"]
    ran = commands.run("plan", "--config=configs/tiny.py", "--topology=cpu:2", *how, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    assert "1 fit" in ran.stdout and "1 of 1: mesh" in ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("python -m llm_jax.main")]
    assert len(lines) == 1 and all("--config.model.n_layer=1 " in line for line in lines)
    assert all(line.count("--config.mesh.data=") == 1 for line in lines)
