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


@pytest.mark.parametrize("execution", ["scan", "unrolled"])
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_flops_are_those_of_the_closed_formula_and_of_what_is_computed_again(execution, remat):
    sizes = dict(mlp_dim=256, block_size=16)
    made = plan(dict(data=1, fsdp=8), layer_execution=execution, remat=remat, **sizes)
    tokens = 16 * 16 / 8
    assert made.model_flops == model.train_flops_per_token(freeze(dict(model=MODEL | sizes)).model) * tokens
    # One of attention's products; the formula has six of them, by half. There are two forward and five for the
    # gradient, of which one is of the scores again, in which a compiler may find those that are there.
    product = 2 * 64 * 16 * 3 * tokens
    once = made.model_flops - 6 * product / 2 + 7 * product
    in_layers = 2 * 3 * (4 * 64 * 64 + 2 * 64 * 256) * tokens  # not the last product, whose result nothing needs
    again = {"none": 0, "dots": product, "block": in_layers + 2 * product}[remat]
    assert made.flops == pytest.approx(once + again, rel=0.02)
    assert made.recomputed_flops == pytest.approx(again, abs=0.02 * made.flops)


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


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:2", "cpu:0", "cpu", "0xv5e:2x4", "v5e:2x4; rm", ""])
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
        (["--config=configs/tiny.py", "--topology=cpu:2", "--decode", "--search"], ["--search", "--decode"]),
        (["--config=configs/tiny.py", "--topology=cpu:2", "--search", "--json"], ["--search", "--json"]),
    ],
    ids=["no config", "no topology", "mesh", "no such shape", "decode and search", "search and json"],
)
def test_a_mistake_is_one_line(commands, arguments, words):
    ran = commands.run("plan", *arguments, cwd=REPOSITORY)
    assert ran.returncode == 2 and ran.stdout == ""
    line = ran.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), ran.stderr
