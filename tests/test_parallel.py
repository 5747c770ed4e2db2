"""Training on meshes that split the model, beside one device; and what is sent there, by the compiled text."""

import functools
import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import data, hlo_cost, ops, parallel, programs, sharding
from llm_jax.config_rules import freeze

MODEL = dict(n_embd=32, n_head=4, n_layer=2, block_size=64, vocab_size=96, mlp_dim=64)
GROUPED = MODEL | dict(n_head=8, n_kv_head=4, qk_norm=True, layer_types=("sliding", "full"), window=20)
GROUPED |= dict(tie_embeddings=False, use_bias=True, final_softcap=9.0)
EXPERTS = MODEL | dict(n_expert=4, mlp_dim=32)
GPT2 = MODEL | dict(use_rope=False, use_rmsnorm=False, use_bias=True, mlp="gelu")
STEPS, ROWS = 20, 16


def make(model, sizes, **train):
    """(programs, mesh, config) of a run on as many devices as the mesh takes; all of them if a size is left."""
    optim = {name: train.pop(name) for name in ("name", "ema_decay") if name in train}
    cfg = freeze(
        dict(
            model=model,
            mesh=dict(data=1) | sizes,
            optim=dict(peak_lr=1e-2, warmup_steps=2) | optim,
            train=dict(batch_size=ROWS, num_steps=STEPS) | train,
        )
    )
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[: math.prod(cfg.mesh.sizes.values())])
    programs.check_trainable(cfg, mesh)
    return programs.make_programs(cfg, mesh, np.ones(96, np.int32)), mesh, cfg


@functools.cache
def batches():
    """Of a text in which every other token follows from the one before."""
    tokens = np.random.default_rng(0).integers(0, 96, 20_000).astype(np.int32)
    tokens[1::2] = (tokens[::2] * 7 + 1) % 96
    return data.train_batches(tokens, block_size=64, batch_size=ROWS, seed=0)


def train(model, sizes, **options):
    """(losses of all steps and of an evaluation, the last state)"""
    made, mesh, _ = make(model, sizes, **options)
    state, losses = made.init(), []
    for step in range(STEPS):
        state, metrics = made.train_step(state, jax.device_put(batches()[step], sharding.split_batch(mesh)))
        losses.append(float(metrics["loss"]))
    sums = made.eval_step(state.eval_params, jax.device_put(batches()[STEPS], sharding.split_batch(mesh)))
    return np.array([*losses, sums.nats / sums.tokens]), state


@functools.cache
def on_one_device(model, **options):
    losses, _ = train(MODELS[model], dict(data=1), **options)
    assert losses[-1] < 0.9 * losses[0]  # or there is nothing to compare
    return losses


MODELS = {"eight heads": MODEL | dict(n_head=8), "llama": MODEL, "grouped": GROUPED, "experts": EXPERTS, "gpt2": GPT2}
# Of the meshes each with a model, and some of all axes at once.
CASES = [
    ("llama", dict(data=8), {}),
    ("llama", dict(fsdp=8), {}),
    ("grouped", dict(fsdp=8), {}),
    ("llama", dict(tensor=4), {}),
    ("eight heads", dict(tensor=8), {}),
    ("grouped", dict(tensor=4), {}),
    ("grouped", dict(fsdp=2, tensor=4), {}),
    ("gpt2", dict(fsdp=2, tensor=4), {}),
    ("llama", dict(data=2, context=4), {}),
    ("grouped", dict(context=4, data=2), {}),
    ("gpt2", dict(context=8), {}),
    ("experts", dict(expert=4), {}),
    ("experts", dict(data=2, expert=4), {}),
    ("experts", dict(fsdp=2, expert=2, tensor=2), {}),
    ("grouped", dict(fsdp=2, tensor=2, context=2), {}),
    ("llama", dict(data=2, fsdp=2, tensor=2), dict(name="muon")),
    ("llama", dict(data=2, fsdp=4, num_slices=2), {}),
    ("llama", dict(data=2, fsdp=2, context=2), dict(accumulation_steps=2)),
    ("llama", dict(fsdp=4), dict(ema_decay=0.9)),
]


def ids(value):
    return " ".join(f"{key} {size}" for key, size in value.items()) if isinstance(value, dict) else value


@pytest.mark.slow
@pytest.mark.parametrize("model, sizes, options", CASES, ids=ids)
def test_losses_of_20_steps_are_those_of_one_device(model, sizes, options):
    losses, state = train(MODELS[model], sizes, **options)
    np.testing.assert_allclose(losses, on_one_device(model, **options), rtol=1e-5)
    # Every matrix is a part of itself on each device, and with it what the optimizer keeps of it.
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if model == "experts":
        up = state.params["blocks"]["moe"]["up"]
        assert up.addressable_shards[0].data.size * np.prod(list(sizes.values())) == up.size * sizes.get("data", 1)
    elif model != "gpt2":  # whose learned positions, which are not split, are large beside so small a model
        assert held < total * (1 / (sizes.get("fsdp", 1) * sizes.get("tensor", 1)) + 0.03)


def loss_and_gradient(model, sizes):
    """Of the first batch."""
    made, mesh, cfg = make(MODELS[model] | dict(layer_execution="scan"), sizes)
    loss_fn = programs.make_loss_fn(cfg.model, mesh)
    batch = jax.device_put(batches()[0], sharding.split_batch(mesh))
    loss = lambda params: loss_fn(params, batch, None)[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(made.init().params)
    return value, jax.tree.map(np.asarray, gradient)


@pytest.mark.parametrize(
    "model, sizes",
    [
        ("grouped", dict(fsdp=2, tensor=2, context=2)),
        ("gpt2", dict(data=2, fsdp=2, tensor=2)),
        ("experts", dict(fsdp=2, tensor=2, expert=2)),
    ],
    ids=ids,
)
def test_the_gradient_is_that_of_one_device(model, sizes):
    value, gradient = loss_and_gradient(model, sizes)
    expected, theirs = loss_and_gradient(model, dict(data=1))
    np.testing.assert_allclose(value, expected, rtol=1e-6)

    largest_of_all = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))

    def check(path, own, other):
        close = 2e-5 * np.abs(other).max() + 1e-9 * largest_of_all  # of keys' biases it is 0 but for rounding
        np.testing.assert_allclose(own, other, rtol=0, atol=close, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, gradient, theirs)


def test_sums_and_gathers_over_a_torus_are_those_over_a_line(monkeypatch):
    """Stage by stage, as on TPUs."""
    expected = loss_and_gradient("llama", dict(fsdp=8))
    monkeypatch.setattr(sharding, "lines", lambda mesh: (4, 2))
    monkeypatch.setattr(sharding, "torus_axes", lambda mesh: 3)
    found = loss_and_gradient("llama", dict(fsdp=8))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)
    sent, _ = collectives(MODEL, dict(fsdp=8))
    whole = {4 * 32 * 32: 8, 4 * 32 * 64: 6, 4 * 96 * 32: 2}  # of two layers, and the table's
    expected = whole | {size / 4: count for size, count in whole.items()}
    assert {size: count for (kind, size), count in sent.items() if kind == "reduce-scatter"} == expected


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block", "dots"])
@pytest.mark.parametrize("name", ["grouped", "experts"])
def test_layers_in_a_scan_or_unrolled_and_computed_again_have_one_gradient(name, remat):
    expected = on_one_device(name)
    for execution in ("scan", "unrolled"):
        model = MODELS[name] | dict(layer_execution=execution, remat=remat)
        made, mesh, _ = make(model, dict(fsdp=2, tensor=2))
        state = made.init()
        for step in range(2):
            state, metrics = made.train_step(state, jax.device_put(batches()[step], sharding.split_batch(mesh)))
        np.testing.assert_allclose(metrics["loss"], expected[1], rtol=1e-5)


@pytest.mark.slow
def test_dropout_draws_one_mask_whatever_the_mesh():
    model = MODEL | dict(dropout=0.2)
    losses = [train(model, sizes)[0] for sizes in (dict(data=1), dict(fsdp=2, tensor=2, context=2))]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def arguments(made, mesh):
    """Of a training step, as shapes where they lie."""
    like = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    state = jax.tree.map(like, jax.eval_shape(made.init), made.placed)
    return state, jax.tree.map(lambda leaf: like(leaf, sharding.split_batch(mesh)), batches()[0])


def collectives(model, sizes):
    """(kind, bytes of the whole) -> how often a step does it; and the programs."""
    made, mesh, _ = make(model, sizes)
    text = made.train_step.lower(*arguments(made, mesh)).compile().as_text()
    found = Counter()
    for each in hlo_cost.analyse(text).collectives:
        if each.group_size > 1:
            found[each.kind, max(each.operand_bytes, each.result_bytes)] += each.times
    return found, made


def test_fsdp_gathers_each_weight_once_a_pass_and_sums_each_gradient_once():
    found, made = collectives(MODEL | dict(tie_embeddings=False), dict(fsdp=8))
    shapes = jax.eval_shape(made.init).params
    layer = Counter(leaf.size * 4 // 2 for leaf in jax.tree.leaves(shapes["blocks"]) if leaf.ndim > 2)
    table = 96 * 32 * 4
    gathers = {("all-gather", size): 2 * 2 * count for size, count in layer.items()}  # 2 layers, 2 passes
    gathers["all-gather", table] = 2  # token embeddings forward, the output matrix for both passes at once
    sums = {("reduce-scatter", size): 2 * count for size, count in layer.items()} | {("reduce-scatter", table): 2}
    assert {key: count for key, count in found.items() if key[0] != "all-reduce"} == gathers | sums
    # Losses, norms and the gradient's norm: nothing of the size of a matrix, or of what goes through the layers.
    assert max(size for kind, size in found if kind == "all-reduce") < 1024 < 64 * 32 * 4


def test_tensor_sends_the_sums_of_rows_and_no_weight():
    found, _ = collectives(MODEL | dict(tie_embeddings=False), dict(tensor=4))
    sent = sum(size * count for (kind, size), count in found.items())
    rows = ROWS * 64 * 32 * 4
    # In each of 2 layers after attention and the MLP, and before them for the gradient; the embeddings of all tokens,
    # and the gradient of the last layer's output.
    assert 0 <= sent - rows * (2 * (2 + 2) + 2) < rows / 4  # the rest: a few numbers for each token's loss
    assert {kind for kind, _ in found} == {"all-reduce"}


@pytest.mark.parametrize("vocab_size", [16, 64], ids=["the table is sent", "tokens are sent"])
def test_a_lookup_in_a_split_table_and_its_gradient(vocab_size):
    mesh = sharding.make_mesh(freeze(dict(mesh=dict(data=1, fsdp=2, tensor=4))).mesh, jax.devices())
    table = jax.random.normal(jax.random.key(0), (vocab_size, 8))
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, vocab_size)
    weights = jax.random.normal(jax.random.key(2), (4, 6, 8))

    def loss(look_up, table):
        return jnp.sum(look_up(table) * weights)

    split = jax.jit(jax.value_and_grad(functools.partial(loss, lambda t: parallel.embed(t, tokens, mesh=mesh))))
    value, gradient = split(table)
    expected, expected_gradient = jax.value_and_grad(functools.partial(loss, lambda t: t[tokens]))(table)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    text = split.lower(table).compile().as_text()
    assert ("all-to-all" in text) == (vocab_size == 64)


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=2, context=2), dict(data=2, fsdp=4)], ids=ids)
def test_the_loss_in_chunks_of_rows_and_of_its_weights_gradient(sizes):
    """Groups of rows, chunks of a group and steps of the gradient, none of which divides evenly."""
    mesh = sharding.make_mesh(freeze(dict(mesh=dict(data=1) | sizes)).mesh, jax.devices())
    keys = iter(jax.random.split(jax.random.key(0), 4))
    hidden, weight = jax.random.normal(next(keys), (8, 14, 8)), jax.random.normal(next(keys), (26, 8))
    targets = jax.random.randint(next(keys), (8, 14), 0, 26)
    mask = (jax.random.uniform(next(keys), (8, 14)) < 0.8).astype(jnp.float32)

    def check(dtype, **close):
        leaves = hidden.astype(dtype), weight.astype(dtype)
        split = functools.partial(parallel.linear_cross_entropy, softcap=5.0, chunk_elements=3 * 26, mesh=mesh)
        plain = functools.partial(ops.linear_cross_entropy, softcap=5.0)
        value = lambda loss, *x: 0.5 * loss(*x, targets, mask)[0]
        both = jax.jit(jax.value_and_grad(value, argnums=(1, 2)), static_argnums=0)
        found, gradients = both(split, *leaves)
        expected, theirs = both(plain, *(leaf.astype(jnp.float32) for leaf in leaves))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        for own, other in zip(gradients, theirs, strict=True):
            np.testing.assert_allclose(own.astype(jnp.float32), other, rtol=0, **close)

    check(jnp.float32, atol=1e-5)
    check(jnp.bfloat16, atol=0.05)


def test_gradients_in_bfloat16_are_summed_in_float32():
    made, mesh, _ = make(MODEL | dict(tie_embeddings=False, compute_dtype="bfloat16"), dict(data=2, fsdp=4))
    text = made.train_step.lower(*arguments(made, mesh)).as_text()
    dtypes = re.findall(r'"stablehlo.(?:all_reduce|reduce_scatter)".*?\^bb0\(%\w+: tensor<(\w+)>', text, re.S)
    assert len(dtypes) >= 2 * (7 + 2) and set(dtypes) == {"f32"}  # along fsdp and data, of a layer and two tables


@pytest.mark.slow
def test_a_run_continues_on_any_mesh(tmp_path):
    """As one that was never stopped, on one device."""
    (tmp_path / "text.txt").write_text("a cat sees a bird, and the bird a cat.\n" * 200)

    def fit(sizes, folder, steps):
        config = llm_jax.config.default()
        config.model.update(dict(n_embd=32, n_head=4, n_layer=2, block_size=16, vocab_size=256))
        config.data.update(dict(path=str(tmp_path / "text.txt"), tokenizer="byte", cache_dir=str(tmp_path / "cache")))
        config.train.update(dict(batch_size=8, num_steps=steps, eval_every=0, save_every=0, log_every=1))
        # Other schedules go by the number of steps.
        config.optim.update(dict(name="adamw", warmup_steps=2, schedule="constant"))
        config.sample.max_new_tokens = 0
        config.mesh.update(dict(data=1) | sizes)
        llm_jax.fit(config, workdir=tmp_path / folder)
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    whole = fit(dict(data=8), "whole", 12)
    stopped = [
        fit(sizes, "stopped", steps)
        for sizes, steps in (
            (dict(fsdp=8), 3),
            (dict(fsdp=2, tensor=4), 6),
            (dict(data=8), 9),
            (dict(context=2, fsdp=4), 12),
        )
    ][-1]
    assert len(whole) == len(stopped) == 12
    np.testing.assert_allclose(stopped, whole, rtol=1e-5)
