"""Plans of the sampler for a CPU device, against closed forms; test_tpu.py has one for a TPU."""

import jax
import pytest
from conftest import REPOSITORY

from llm_jax import chips, model, planning_decode
from llm_jax.config_rules import freeze

MODEL = dict(n_embd=64, n_head=4, n_kv_head=2, n_layer=2, block_size=64, vocab_size=128, mlp_dim=128)
WEIGHTS = 2 * (64 * 64 * 3 + 3 * 64 * 128)  # q, o, k and v of half the width; gate, up, down; of two layers
CHIP = chips.Chip(flops=1e12, memory_bytes=1e9, memory_bandwidth=1e9, link_bandwidth=1e9)


def plan(**how):
    lengths = dict(batch_size=3, prompt_tokens=30, new_tokens=200) | how
    return planning_decode.plan_decode(
        freeze(dict(model=MODEL)), chips.Topology("here", jax.devices(), CHIP), **lengths
    )


@pytest.fixture(scope="module")
def planned():
    return plan()


def test_flops_are_those_of_the_closed_formula(planned):
    # The prompt's bucket is 32 tokens, for which attention is plain; only the last one's logits are computed.
    attention = 4 * 64 * 32 * 2
    assert planned.prefill.flops == 3 * (32 * (2 * WEIGHTS + attention) + 2 * 128 * 64)
    # Sixteen tokens a call, each of which sees a cache of 64 slots, its window, and the call's own sixteen.
    attention = 4 * 64 * (64 + 16) * 2
    assert planned.decode.flops == pytest.approx(3 * 16 * (2 * (WEIGHTS + 128 * 64) + attention), rel=1e-6)
    assert (planned.prefill.tokens, planned.decode.tokens) == (3 * 30, 3 * 16)


def test_bytes_of_weights_and_cache(planned):
    params = sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes(freeze(dict(model=MODEL)).model)))
    assert planned.weights == 4 * params
    assert planned.cache == 3 * 2 * 2 * 64 * 32 * 4  # rows, layers, keys and values, slots, two heads of 16, float32
    assert planned.decode.peak > planned.weights + planned.cache
    assert planned.peak == max(planned.prefill.peak, planned.decode.peak) and planned.fits


def test_a_step_reads_the_weights_and_the_cache_each_time(planned):
    least = 16 * (4 * (WEIGHTS + 128 * 64) + planned.cache)
    assert least < planned.decode.traffic < 2 * least  # 2.7 times with the branches of penalties and draws
    assert planned.decode.limits.memory == pytest.approx(planned.decode.traffic / 1e9)
    assert planned.decode.tokens_per_second == pytest.approx(3 * 16 / planned.decode.limits.seconds)


def test_int8_takes_less(planned):
    small = plan(weights="int8", cache_dtype="int8")
    assert small.weights < 0.35 * planned.weights and small.cache < 0.35 * planned.cache


def test_the_command(commands):
    how = ["--decode", "--batch_size=2", "--prompt_tokens=20", "--new_tokens=30"]
    ran = commands.run("plan", "--config=configs/tiny.py", "--topology=cpu:2", *how, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    assert "one device of 2" in ran.stdout and "2 rows of 20 tokens and 30 new ones" in ran.stdout
    assert all(word in ran.stdout for word in ("weights", "cache", "peak", "The prompts", "16 new tokens"))
