import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import model, ops, programs, train_step
from llm_jax.config_rules import freeze
from llm_jax.data import Batch
from llm_jax.sharding import make_mesh, split_batch

COMBINATIONS = [(r, n) for r in (True, False) for n in (True, False)]
BYTES = np.ones(19, np.int32)


def make(**values):
    given = {
        "model": dict(n_embd=16, n_head=2, n_layer=1, block_size=8, vocab_size=19),
        "optim": dict(peak_lr=1e-2, warmup_steps=2),
        "train": dict(batch_size=8, num_steps=20),
    }
    for key, value in values.items():
        group, name = key.split("__")
        given[group][name] = value
    return freeze(given)


def some_batch(seed=0, mask=None) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 19, (8, 9)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 8), np.float32) if mask is None else mask)


def compiled(cfg, num_devices=1):
    mesh = make_mesh(cfg.mesh, jax.devices()[:num_devices])
    init, train_fn, eval_fn, _ = programs.make_programs(cfg, mesh, BYTES)
    return init, train_fn, eval_fn, functools.partial(jax.device_put, device=split_batch(mesh))


def uneven_mask():
    """Micro-batches (rows a, a + 2, ...) of 12 and 1 places, of 4 x 8 each."""
    mask = np.zeros((8, 8), np.float32)
    mask[0::2, :3] = 1
    mask[1, 5] = 1
    return mask


def one_update(cfg, batch, optimizer, *, accumulation_steps=1, loss_fn=None, step=0):
    params = jax.jit(model.init_params, static_argnums=0)(cfg.model, jax.random.key(0))
    make_step = train_step.make_train_step(
        loss_fn or programs.make_loss_fn(cfg.model, make_mesh(cfg.mesh, jax.devices()[:1])),
        optimizer,
        lambda count: jnp.float32(0.5),
        accumulation_steps=accumulation_steps,
        run_key=jax.random.key(1),
    )
    state = train_step.init_state(params, optimizer)._replace(step=jnp.int32(step))
    return state, *jax.jit(make_step)(state, batch)


@pytest.mark.parametrize("accumulation_steps", [2, 8])
def test_accumulated_micro_batches_equal_the_one_batch_also_with_uneven_masks(accumulation_steps):
    """By SGD with rate 1: the update is the gradient. Adam's first step would only show its signs."""
    cfg, batch = make(), some_batch(mask=uneven_mask())
    _, whole, metrics = one_update(cfg, batch, optax.sgd(1.0))
    _, parts, part_metrics = one_update(cfg, batch, optax.sgd(1.0), accumulation_steps=accumulation_steps)
    for name in metrics:
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # gradients are of size 1e-2 to 1


def test_metrics_and_update_are_those_of_the_mean_loss_over_the_mask():
    cfg, mask = make(), uneven_mask()
    batch = some_batch(mask=mask)
    before, after, metrics = one_update(cfg, batch, optax.sgd(1.0))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.Transformer(cfg.model).apply({"params": params}, jnp.asarray(batch.tokens))[0]
        logprobs = jax.nn.log_softmax(logits)
        nats = -jnp.take_along_axis(logprobs, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(nats * mask) / 13

    value, gradient = loss(before.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert {*metrics} == {"loss", "learning_rate", "grad_norm"}
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["learning_rate"] == 0.5 and after.step == 1
    expected = jax.tree.map(lambda p, g: p - g, before.params, gradient)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), after.params, expected)


@pytest.mark.parametrize("values", [dict(model__final_softcap=0.5), dict(model__tie_embeddings=False)], ids=str)
def test_the_loss_is_taken_without_all_the_logits(values, monkeypatch):
    """With fewer elements in a chunk than a batch has logits, to the same numbers."""
    cfg, batch = make(**values), some_batch(mask=uneven_mask())
    params = jax.jit(model.init_params, static_argnums=0)(cfg.model, jax.random.key(0))

    def by_logits(params, batch, key):
        logits = model.Transformer(cfg.model).apply({"params": params}, batch.tokens)[0]
        return ops.cross_entropy(logits, batch.targets, batch.mask)

    def all_of(loss_fn):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        traced = str(jax.make_jaxpr(gradient)(params, batch, None)), str(jax.make_jaxpr(loss_fn)(params, batch, None))
        return ["f32[8,8,19]" in text for text in traced], jax.jit(gradient)(params, batch, None)

    monkeypatch.setattr(programs, "CHUNK_ELEMENTS", 3 * 19)
    loss_fn = programs.make_loss_fn(cfg.model, make_mesh(cfg.mesh, jax.devices()))  # 8: one for each text
    held, actual = all_of(loss_fn)
    plainly_held, expected = all_of(by_logits)
    assert held == [False, False] and plainly_held == [True, True]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)


def test_a_batch_with_nothing_to_predict_changes_nothing():
    before, after, metrics = one_update(make(), some_batch(mask=np.zeros((8, 8), np.float32)), optax.sgd(1.0))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_the_dropout_key_depends_on_the_step_and_on_the_micro_batch():
    """A stand-in network whose logits for the right answer are a random number: the loss shows the key."""

    def draw(rows, key):
        return jax.random.normal(key, (*rows.shape, 19))

    def loss_fn(params, batch, key):
        logits = draw(batch.tokens, key) + params["final_norm"]["weight"].sum() * 0
        return ops.cross_entropy(logits, batch.targets, batch.mask)

    rows = np.tile(some_batch().tokens[:1], (8, 1))
    batch = Batch(rows, rows, np.ones((8, 8), np.float32))

    def loss(**kwargs):
        return float(one_update(make(), batch, optax.sgd(0.0), loss_fn=loss_fn, **kwargs)[2]["loss"])

    assert loss() == loss() and loss() != loss(step=1)
    key = jax.random.fold_in(jax.random.key(1), 0)
    logits = [draw(rows[:4], jax.random.fold_in(key, i)) for i in (0, 1)]
    nats = optax.softmax_cross_entropy_with_integer_labels(jnp.concatenate(logits), rows)
    np.testing.assert_allclose(loss(accumulation_steps=2), nats.mean(), rtol=1e-6)


@pytest.mark.parametrize("use_rope, use_rmsnorm", COMBINATIONS)
def test_loss_falls_on_a_repeated_batch_and_nothing_is_compiled_twice(use_rope, use_rmsnorm):
    cfg = make(model__use_rope=use_rope, model__use_rmsnorm=use_rmsnorm, train__num_steps=30, optim__peak_lr=3e-2)
    init, train_fn, eval_fn, put = compiled(cfg)
    state, losses = init(), []
    for _ in range(30):
        state, metrics = train_fn(state, put(some_batch()))
        losses.append(float(metrics["loss"]))
        eval_fn(state.params, put(some_batch(1)))
    # Random tokens: only memory of the batch brings the loss below ln 19 = 2.94.
    assert losses[0] > 2.8 and losses[-1] < 1.5
    assert train_fn._cache_size() == eval_fn._cache_size() == 1


@pytest.mark.parametrize("settings", [{}, {"optim__name": "muon"}, {"model__dropout": 0.2}], ids=str)
def test_eight_devices_give_one_devices_losses_with_and_without_accumulation(settings):
    def losses(num_devices, **values):
        init, train_fn, _, put = compiled(make(train__batch_size=16, **settings, **values), num_devices)
        state, out = init(), []
        for step in range(20):
            halves = some_batch(2 * step, uneven_mask()), some_batch(2 * step + 1)  # devices with more and less
            batch = Batch(*(np.concatenate(pair) for pair in zip(*halves, strict=True)))
            state, metrics = train_fn(state, put(batch))
            assert len(state.params["final_norm"]["weight"].sharding.device_set) == num_devices
            out.append(float(metrics["loss"]))
        return out

    np.testing.assert_allclose(losses(8), losses(1), rtol=1e-5)
    twice = {"train__accumulation_steps": 2}  # its masks of dropout are others
    np.testing.assert_allclose(losses(8, **twice), losses(1, **twice), rtol=1e-5)
    if "model__dropout" not in settings:
        np.testing.assert_allclose(losses(1, **twice), losses(1), rtol=1e-5)


def test_devices_sum_their_gradients_once_a_step():
    """And not in each turn of the loop over micro-batches."""
    cfg = make(train__batch_size=16, train__accumulation_steps=4)
    init, train_fn, _, put = compiled(cfg, 2)
    batch = Batch(*(np.concatenate(pair) for pair in zip(some_batch(), some_batch(1), strict=True)))
    program = train_fn.lower(init(), put(batch)).compile().as_text()
    entry = program[program.index("\nENTRY ") :]
    assert program.count(" all-reduce(") == entry.count(" all-reduce(") > 0
    assert " while(" in entry


def test_devices_sum_gradients_of_bfloat16_parameters_in_float32():
    init, train_fn, _, put = compiled(make(model__param_dtype="bfloat16"), 8)
    traced = str(jax.make_jaxpr(train_fn.__wrapped__)(init(), put(some_batch())))
    sums = [line.split(" = ")[0] for line in traced.splitlines() if " = psum" in line]
    assert sums and not any("bf16" in line for line in sums), sums


def test_the_states_buffers_are_donated():
    init, train_fn, _, put = compiled(make())
    state = init()
    new_state, _ = train_fn(state, put(some_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new_state))


def test_the_seed_decides_the_initial_parameters():
    def norm(seed):
        return float(jnp.sum(jnp.abs(compiled(make(train__seed=seed))[0]().params["blocks"]["attn"]["q"])))

    assert norm(0) == norm(0) != norm(1)


def test_eval_step_sums_nats_tokens_and_bytes_over_the_mask():
    mask, logits = uneven_mask(), jax.random.normal(jax.random.key(0), (8, 8, 19))
    batch, token_bytes = some_batch(mask=mask), np.arange(19, dtype=np.int32)

    def loss_fn(params, batch, key):
        assert key is None  # no dropout
        return ops.cross_entropy(logits, batch.targets, batch.mask)

    sums = jax.jit(train_step.make_eval_step(loss_fn, token_bytes))({}, batch)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    np.testing.assert_allclose(sums.nats, (nats * mask).sum(), rtol=1e-6)
    assert sums.tokens == 13 and sums.bytes == (batch.targets * mask).sum()


# -- The average of the parameters


def test_the_average_is_the_weighted_mean_of_the_parameters_after_each_update():
    decay = 0.9
    init, train_fn, _, put = compiled(make(optim__ema_decay=decay))
    state, seen = init(), []
    for step in range(5):
        state, _ = train_fn(state, put(some_batch(step)))
        seen.append(jax.tree.map(np.array, state.params))
        weights = decay ** np.arange(step, -1, -1.0)
        expected = jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *seen)  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, expected)
        if not step:
            # Nothing of the initial parameters, and of no zeros: one rounding of a weight of 1.
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-7), state.ema, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.eval_params, state.ema)


def test_without_an_average_the_state_holds_nothing_more_and_training_is_the_same():
    init, train_fn, _, put = compiled(make())
    averaged_init, averaged_fn, _, _ = compiled(make(optim__ema_decay=0.99))
    state, averaged = init(), averaged_init()
    for step in range(3):
        (state, metrics), (averaged, same) = (
            function(s, put(some_batch(step))) for function, s in ((train_fn, state), (averaged_fn, averaged))
        )
        # Two programs, so that XLA may add up a norm in another order.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics, same)
    assert state.ema is None and state.eval_params is state.params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.params, averaged.params)
    extra = len(jax.tree.leaves(averaged)) - len(jax.tree.leaves(state))
    assert extra == len(jax.tree.leaves(state.params))
    assert averaged_fn._cache_size() == 1


def test_the_average_of_bfloat16_parameters_moves_by_less_than_bfloat16_shows():
    def stay(state, batch):
        return state._replace(step=state.step + 1), {}

    params = {"w": jnp.full(3, 1.5, jnp.bfloat16)}
    state = train_step.init_state(params, optax.sgd(1.0), average=True)
    state = state._replace(step=jnp.int32(10**6), ema=jax.tree.map(jnp.ones_like, state.ema))
    state, _ = train_step.with_average(stay, 0.9999)(state, some_batch())
    np.testing.assert_allclose(state.ema["w"], 1 + 0.5e-4, rtol=1e-6)
    assert state.ema["w"].dtype == jnp.float32 and state.eval_params["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_bfloat16_compute_parameters_and_optimizer_state_stay_float32(name):
    cfg = make(model__compute_dtype="bfloat16", optim__name=name, optim__ema_decay=0.9)
    init, train_fn, _, put = compiled(cfg)
    state, _ = train_fn(init(), put(some_batch()))
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) > 3 * len(jax.tree.leaves(state.params)) and set(floats) == {jnp.dtype("float32")}


def test_bfloat16_gradients_add_up_in_float32():
    """512 gradients of 1: a sum in bfloat16 would stop at 256."""
    params = {"w": jnp.zeros(2, jnp.bfloat16)}
    batch = Batch(*(np.ones((512, 1), dtype) for dtype in (np.int32, np.int32, np.float32)))
    optimizer = optax.sgd(1.0)
    step = train_step.make_train_step(
        lambda params, batch, key: (params["w"][0].astype(jnp.float32) * batch.mask.sum(), batch.mask.sum()),
        optimizer,
        lambda count: jnp.float32(1.0),
        accumulation_steps=512,
        run_key=jax.random.key(0),
    )
    state, _ = jax.jit(step)(train_step.init_state(params, optimizer), batch)
    assert state.params["w"].tolist() == [-1.0, 0.0] and state.params["w"].dtype == jnp.bfloat16
