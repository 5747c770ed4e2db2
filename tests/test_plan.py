"""Plans for CPU devices, which any machine can make; those for TPUs are in test_tpu.py."""

import json

import jax
import pytest
from conftest import REPOSITORY

from llm_jax import chips, model, planning
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError

MODEL = dict(n_embd=64, n_head=4, n_layer=3, block_size=64, vocab_size=128, mlp_dim=128, tie_embeddings=False)


def plan(sizes=None, chip=None, **changed):
    values = dict(model=MODEL | changed, mesh=sizes or {}, train=dict(batch_size=16), optim=dict(name="adamw"))
    topology = chips.Topology("here", jax.devices(), chip)
    return planning.plan_training(freeze(values), topology)


# Products of attention: two forward, five for the gradient, of which one is of the scores, that are there already.
@pytest.mark.parametrize("execution, products", [("scan", 7), ("unrolled", 6)])
def test_flops_are_those_of_the_closed_formula(execution, products):
    made = plan(dict(data=1, fsdp=8), layer_execution=execution)
    # Without attention, of which the one block of 64 by 64 counts whole, where the formula has half of it.
    attention = 12 * 64 * 32 * 3 * 16 * 64 / 8
    assert made.model_flops == model.train_flops_per_token(freeze(dict(model=MODEL)).model) * 16 * 64 / 8
    assert made.flops - attention * products / 3 == pytest.approx(made.model_flops - attention, rel=1e-6)


def test_layers_that_are_computed_again_cost_their_products_again():
    once, again = plan(dict(data=1, fsdp=8), layer_execution="scan"), plan(dict(data=1, fsdp=8), remat="block")
    in_layers = 3 * (4 * 64 * 64 + 2 * 64 * 128)  # of q, k, v, o, gate, up; not down, whose result nothing needs
    attention = 2 * 2 * 64 * 64 * 64 * 3 * 16 / 8
    extra = again.flops - once.flops
    assert extra == pytest.approx(2 * in_layers * 16 * 64 / 8 + attention, rel=0.1)


def test_a_device_holds_its_part():
    whole, split = plan(dict(data=8)), plan(dict(data=1, fsdp=4, tensor=2))
    assert sum(split.params.values()) < sum(whole.params.values()) / 8 * 1.1
    assert split.optimizer < whole.optimizer / 8 * 1.1
    assert set(whole.params) == {"embed", "attn", "attn_norm", "mlp", "mlp_norm", "final_norm", "lm_head"}
    assert whole.optimizer == pytest.approx(2 * sum(whole.params.values()), rel=0.01)
    assert whole.mesh == {"data": 8} and split.mesh == {"fsdp": 4, "tensor": 2}
    assert "all-gather" in split.collectives and "all-gather" not in whole.collectives
    assert whole.limits is whole.mfu is whole.fits is None  # of CPUs no rate is known


def test_where_the_temporary_memory_goes():
    held = plan(dict(data=1, fsdp=8), remat="block").held
    more = plan(dict(data=1, fsdp=8), layer_execution="scan").held
    assert {"attn", "mlp", "lm_head", "all layers"} <= set(held.by_module)
    assert more.by_module["all layers"] > 2 * held.by_module["all layers"]  # all that the gradient needs, or inputs
    assert held.largest == tuple(sorted(held.largest, reverse=True, key=lambda array: array[0]))


def test_what_bounds_a_step():
    chip = chips.Chip(flops=1e9, memory_bytes=1e12, memory_bandwidth=1e15, link_bandwidth=1e15)
    made = plan(dict(data=1, fsdp=8), chip)
    assert made.fits and made.limits.flops == pytest.approx(made.flops / 1e9)
    assert made.limits.in_turn == pytest.approx(made.limits.flops, rel=1e-3)  # nothing else takes any time
    assert made.tokens_per_second == pytest.approx(16 * 64 / made.seconds)
    assert made.mfu == pytest.approx(made.model_flops / made.flops, rel=1e-3)
    slow = plan(dict(data=1, fsdp=8), chips.Chip(1e15, 1000, 1e15, 1e3))
    sent = sum(sent for _, sent in slow.collectives.values())
    assert slow.limits.links == pytest.approx(sent / 1e3) and slow.fits is False
    assert json.loads(json.dumps(slow.as_dict()))["fits"] is False


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:2", "cpu:0", "cpu", "v5e:2x4; rm", ""])
def test_a_topology_that_does_not_exist(name):
    with pytest.raises(InputError, match="topology"):
        chips.find(name)


def test_more_cpus_than_there_are():
    with pytest.raises(InputError, match="needs 16 CPU devices, and jax has 8"):
        chips.find("cpu:16")


def test_an_unknown_vocabulary_is_asked_for():
    values = dict(model={**MODEL, "vocab_size": None}, data=dict(tokenizer="char"), train=dict(batch_size=16))
    with pytest.raises(InputError, match="model.vocab_size"):
        planning.plan_training(freeze(values), chips.find("cpu:8"))


def test_the_command(commands):
    ran = commands.run(
        "plan", "--config=configs/tiny.py", "--topology=cpu:2", "--config.mesh.fsdp=2", "--json", cwd=REPOSITORY
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["mesh"] == {"fsdp": 2} and told["flops"] > 0 and told["fits"] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--topology=cpu:2"], ["--config"]),
        (["--config=configs/tiny.py"], ["--topology"]),
        (["--config=configs/tiny.py", "--topology=cpu:2", "--config.mesh.fsdp=3"], ["mesh.fsdp (3)", "(2)"]),
        (["--config=configs/tiny.py", "--topology=v5p:9x9x9"], ["v5p:9x9x9"]),
    ],
    ids=["no config", "no topology", "mesh", "no such shape"],
)
def test_a_mistake_is_one_line(commands, arguments, words):
    ran = commands.run("plan", *arguments, cwd=REPOSITORY)
    assert ran.returncode == 2 and ran.stdout == ""
    line = ran.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), ran.stderr
