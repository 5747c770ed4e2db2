import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import model, ops, optim, sharding
from llm_jax.config import MeshConfig, OptimConfig
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError


def optim_config(**values) -> OptimConfig:
    return freeze({"optim": values}).optim


# -- Schedules


def rates(num_steps, **values):
    schedule = optim.make_schedule(optim_config(**values), num_steps=num_steps)
    return np.array([schedule(step) for step in range(num_steps)])


def test_cosine_goes_up_a_line_to_the_peak_and_down_to_the_final_rate():
    lr = rates(110, peak_lr=1.0, final_lr=0.1, warmup_steps=10)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)  # the first update already learns
    # 0.1 + 0.9 (1 + cos(pi n / 100)) / 2 after n of the 100 steps that are left
    np.testing.assert_allclose(lr[10:], 0.55 + 0.45 * np.cos(np.pi * np.arange(1, 101) / 100), rtol=1e-5)
    assert lr.argmax() == 9 and lr[-1] == np.float32(0.1)


def test_constant_stays_at_the_peak():
    lr = rates(20, peak_lr=0.5, schedule="constant", warmup_steps=4)
    np.testing.assert_allclose(lr, [0.125, 0.25, 0.375, *[0.5] * 17], rtol=1e-6)


def test_final_rate_defaults_to_a_tenth_and_warmup_may_be_absent_or_longer_than_the_run():
    assert rates(50, peak_lr=1.0, warmup_steps=0)[-1] == np.float32(0.1)
    assert rates(50, peak_lr=1.0, warmup_steps=0)[0] < 1.0
    np.testing.assert_allclose(rates(5, peak_lr=1.0, warmup_steps=10), np.arange(1, 6) / 10, rtol=1e-6)


def test_linear_goes_up_a_line_to_the_peak_and_down_a_line_to_the_final_rate():
    lr = rates(110, schedule="linear", peak_lr=1.0, final_lr=0.1, warmup_steps=10)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:], 1 - 0.9 * np.arange(1, 101) / 100, rtol=1e-6)
    assert lr[-1] == np.float32(0.1)
    assert rates(110, schedule="linear", peak_lr=1.0, final_lr=0.0)[-1] == 0


def test_wsd_stays_at_the_peak_and_falls_a_line_over_the_last_part_of_all_steps():
    lr = rates(100, schedule="wsd", peak_lr=1.0, final_lr=0.2, warmup_steps=10, decay_fraction=0.4)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_array_equal(lr[10:60], 1)
    np.testing.assert_allclose(lr[60:], 1 - 0.8 * np.arange(1, 41) / 40, rtol=1e-6)
    assert lr[-1] == np.float32(0.2)


def test_wsd_has_at_least_one_step_of_decay_and_none_before_the_warmup_ends():
    short = rates(10, schedule="wsd", peak_lr=1.0, final_lr=0.0, warmup_steps=0, decay_fraction=0.01)
    np.testing.assert_array_equal(short, [1] * 9 + [0])
    long = rates(10, schedule="wsd", peak_lr=1.0, final_lr=0.0, warmup_steps=6, decay_fraction=0.9)
    np.testing.assert_allclose(long, [*np.arange(1, 7) / 6, 0.75, 0.5, 0.25, 0], rtol=1e-6, atol=1e-7)
    none = rates(5, schedule="wsd", peak_lr=1.0, warmup_steps=10)
    np.testing.assert_allclose(none, np.arange(1, 6) / 10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_schedule_is_the_same_when_traced(kind):
    schedule = optim.make_schedule(optim_config(schedule=kind, warmup_steps=3), num_steps=10)
    traced = jax.vmap(schedule)(jnp.arange(12))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, [schedule(step) for step in range(12)], rtol=1e-6)


# -- Updates

PARAMS = {"matrix": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "norm": jnp.array([[1.0, 1.0], [1.0, 2.0]])}
AXES = {"matrix": "DF", "norm": "LD"}
GRADS = [
    {"matrix": jnp.array([[3.0, 0.0], [-4.0, 12.0]]), "norm": jnp.zeros((2, 2))},  # norm 13: clipped
    {"matrix": jnp.array([[0.1, 0.2], [0.3, 0.0]]), "norm": jnp.array([[0.1, 0.0], [0.0, -0.4]])},  # norm 0.56
]


def run(cfg, grads, params=PARAMS, axes=AXES, num_steps=10):
    optimizer = optim.make_optimizer(cfg, num_steps=num_steps, axes=axes)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
def test_two_updates_equal_adamw_written_out(grad_clip):
    """Loshchilov and Hutter 2019, algorithm 2, in float64; clipping by the norm over all parameters."""
    b1, b2, decay, eps = 0.9, 0.95, 0.1, 1e-8
    cfg = optim_config(
        peak_lr=0.1, schedule="constant", warmup_steps=4, b1=b1, b2=b2, weight_decay=decay, grad_clip=grad_clip
    )
    expected = {name: np.asarray(value, np.float64) for name, value in PARAMS.items()}
    m, v = ({name: 0.0 for name in PARAMS} for _ in range(2))
    for t, grads in enumerate(GRADS, 1):
        norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in grads.values()))
        shrink = min(1.0, grad_clip / norm) if grad_clip else 1.0
        for name in PARAMS:
            g = np.asarray(grads[name], np.float64) * shrink
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            step = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            own_decay = decay if name == "matrix" else 0.0
            expected[name] = expected[name] - 0.1 * t / 4 * (step + own_decay * expected[name])
    actual = run(cfg, GRADS)
    for name in PARAMS:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-6)  # a few float32 roundings


def test_with_zero_gradient_a_matrix_decays_and_a_stacked_norm_scale_stays():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    cfg = optim_config(peak_lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.1)
    after = run(cfg, [zero])
    np.testing.assert_array_equal(after["norm"], PARAMS["norm"])
    np.testing.assert_allclose(after["matrix"], PARAMS["matrix"] * (1 - 0.1 * 0.1), rtol=1e-6)
    no_decay = run(optim_config(peak_lr=0.1, weight_decay=0.0), [zero])
    np.testing.assert_array_equal(no_decay["matrix"], PARAMS["matrix"])


MATRICES = {"tokens", "positions", "q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize("untied", [False, True])
def test_in_a_model_exactly_the_weight_matrices_decay(untied):
    cfg = freeze(
        {
            "model": dict(
                n_embd=16,
                n_head=2,
                n_layer=2,
                block_size=8,
                vocab_size=11,
                use_rope=untied,
                use_rmsnorm=False,
                use_bias=True,
                qk_norm=True,
                tie_embeddings=not untied,
            )
        }
    )
    # Ones, so that biases, which start at zero, would show a decay.
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), model.param_shapes(cfg.model))
    zero = jax.tree.map(jnp.zeros_like, params)
    decaying = optim_config(peak_lr=0.1, warmup_steps=0, weight_decay=0.1)
    after = run(decaying, [zero], params, model.param_axes(cfg.model))
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
        if (leaf != 1).any()
    }
    names = {path.split("/")[-1] for path in moved}
    assert names == (MATRICES - {"positions"} | {"weight"} if untied else MATRICES)
    assert {path for path in moved if path.endswith("weight")} == ({"lm_head/weight"} if untied else set())


# -- Any optimizer of optax by its name


def test_sgd_takes_the_schedule():
    after = run(optim_config(name="sgd", peak_lr=0.1, warmup_steps=4, grad_clip=0.0), GRADS)
    for name in PARAMS:
        expected = PARAMS[name] - 0.025 * GRADS[0][name] - 0.05 * GRADS[1][name]
        np.testing.assert_allclose(after[name], expected, rtol=1e-6)


def test_lion_takes_the_betas_and_decays_weight_matrices_only():
    """Chen et al. 2023, algorithm 2."""
    b1, b2, decay, lr = 0.8, 0.6, 0.5, 0.1
    cfg = dict(peak_lr=lr, schedule="constant", warmup_steps=0, b1=b1, b2=b2, weight_decay=decay, grad_clip=0.0)
    after = run(optim_config(name="lion", **cfg), GRADS)
    for name in PARAMS:
        expected, m = np.asarray(PARAMS[name], np.float64), 0.0
        for grads in GRADS:
            g = np.asarray(grads[name], np.float64)
            own_decay = decay if name == "matrix" else 0.0
            expected = expected - lr * (np.sign(b1 * m + (1 - b1) * g) + own_decay * expected)
            m = b2 * m + (1 - b2) * g
        np.testing.assert_allclose(after[name], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adafactor", "lamb", "nadamw", "rmsprop", "adagrad", "novograd"])
def test_optimizers_with_and_without_betas_decay_and_mask_train(name):
    optim.check_name(name)
    after = run(optim_config(name=name, peak_lr=0.1, warmup_steps=0), GRADS)
    assert all(np.isfinite(after[key]).all() and (after[key] != PARAMS[key]).any() for key in PARAMS)


def test_the_decay_of_an_optimizer_that_calls_its_mask_otherwise():
    of = {
        decay: run(optim_config(name="lars", peak_lr=0.1, warmup_steps=0, weight_decay=decay), GRADS)
        for decay in (0.0, 0.5)
    }
    changed = {key for key in PARAMS if (of[0.0][key] != of[0.5][key]).any()}
    assert changed == {key for key in PARAMS if optim.decays(AXES[key])}


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd", "adafactor"])
def test_the_names_of_the_documentation_are_known(name):
    optim.check_name(name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("addamw", ["is no optimizer of optax", "adamw"]),
        ("Lion", ["is no optimizer of optax", "lion"]),
        ("no_such_thing", ["is no optimizer of optax", "adamw", "muon"]),
        ("linear_schedule", ["is in optax, but is no optimizer"]),
        ("clip", ["is in optax, but is no optimizer"]),
        ("scale_by_adam", ["is in optax, but is no optimizer", "adam"]),
        ("MaskedNode", ["is in optax, but is no optimizer"]),
        ("losses", ["is in optax, but is no optimizer"]),
        ("", ["is no optimizer of optax"]),
        ("lbfgs", ["cannot train here", "value_fn"]),
        ("rprop", ["cannot train here"]),  # a schedule is no rate to it
    ],
)
def test_another_name_is_refused_in_one_line(name, words):
    with pytest.raises(InputError) as error:
        optim.check_name(name)
    message = str(error.value)
    assert "\n" not in message
    for word in (f"optim.name ({name!r})", *words):
        assert word in message


# -- Muon

MUON_SHAPES = {"LDNH": (2, 8, 3, 4), "LNHD": (2, 3, 4, 8), "LDF": (2, 8, 12), "LFD": (2, 12, 8), "VD": (5, 8)}
MUON_SHAPES |= {"LD": (2, 8), "LNH": (2, 3, 4)}
MUON_AXES = {letters: letters for letters in MUON_SHAPES}


def muon_params(seed):
    keys = iter(jax.random.split(jax.random.key(seed), len(MUON_SHAPES)))
    return {letters: jax.random.normal(next(keys), shape) for letters, shape in MUON_SHAPES.items()}


@pytest.fixture
def exact_orthogonalize(monkeypatch):
    """Singular values of 1 to rounding: what any good coefficients give, so that two libraries may be compared."""
    coefficients = [(15 / 8, -5 / 4, 3 / 8)] * 16
    monkeypatch.setattr(optim.ops, "orthogonalize", functools.partial(ops.orthogonalize, coefficients=coefficients))
    return coefficients


def test_muon_equals_optax_with_the_same_axes_and_adamw_for_the_rest(exact_orthogonalize):
    """Heads, momentum, its bias correction, scale, decay, schedule, clipping."""
    spec = optax.contrib.MuonDimensionNumbers
    axes = {"LDNH": spec(1, 3), "LNHD": spec(2, 3), "LDF": spec(1, 2), "LFD": spec(1, 2)}
    cfg = optim_config(
        name="muon", peak_lr=0.1, adamw_lr=0.02, warmup_steps=2, b2=0.95, muon_momentum=0.9, weight_decay=0.3
    )
    schedule = optim.make_schedule(cfg, num_steps=10)
    muon = optax.contrib.muon(
        schedule,
        ns_coeffs=tuple(exact_orthogonalize),
        ns_steps=len(exact_orthogonalize),
        beta=0.9,
        weight_decay=0.3,
        muon_weight_dimension_numbers={name: axes.get(name) for name in MUON_SHAPES},
        consistent_rms=0.2,
    )
    decayed = {name: name in (*axes, "VD") for name in MUON_SHAPES}
    adamw = optax.adamw(lambda count: schedule(count) / 5, b1=0.9, b2=0.95, weight_decay=0.3, mask=decayed)
    ours = optim.make_optimizer(cfg, num_steps=10, axes=MUON_AXES)
    after = {}
    for optimizer in (muon, adamw, ours):
        params, chain = muon_params(0), optax.chain(optax.clip_by_global_norm(1.0), optimizer)
        state = chain.init(params)
        for step in range(1, 5):
            updates, state = jax.jit(chain.update)(muon_params(step), state, params)
            params = optax.apply_updates(params, updates)
        after[optimizer] = params
    for name in MUON_SHAPES:
        expected = after[muon if name in axes else adamw][name]
        np.testing.assert_allclose(after[ours][name], expected, atol=1e-4, err_msg=name)
        assert np.abs(expected - muon_params(0)[name]).max() > 0.03


def test_devices_divide_muons_matrices_among_them():
    """The same updates, by fewer products: of 2 to 6 matrices in each of these parameters one, or padding."""
    cfg = optim_config(name="muon", warmup_steps=0)
    updates, flops = [], []
    for count in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:count])
        params, gradients = jax.device_put((muon_params(0), muon_params(1)), sharding.replicated(mesh))
        optimizer = optim.make_optimizer(cfg, num_steps=10, axes=MUON_AXES, mesh=mesh)
        update = jax.jit(optimizer.update).lower(gradients, optimizer.init(params), params).compile()
        updates.append(update(gradients, optimizer.init(params), params)[0])
        flops.append(update.cost_analysis()["flops"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *updates)
    assert flops[1] < flops[0] / 2


def first_update(**values):
    cfg = optim_config(name="muon", warmup_steps=0, schedule="constant", weight_decay=0.0, **values)
    zeros = jax.tree.map(jnp.zeros_like, muon_params(0))
    return run(cfg, [muon_params(1)], zeros, MUON_AXES)


def test_muons_updates_are_as_large_as_adamws(exact_orthogonalize):
    after = first_update(peak_lr=0.1)
    size = {name: float(jnp.sqrt(jnp.mean(jnp.square(value)))) / 0.1 for name, value in after.items()}
    for name in ("LDNH", "LNHD", "LDF", "LFD"):
        assert size[name] == pytest.approx(0.2, rel=1e-3)
    for name in ("VD", "LD", "LNH"):
        assert size[name] == pytest.approx(1.0, rel=1e-3)  # AdamW's first step is the sign


def test_every_head_has_a_matrix_of_its_own(exact_orthogonalize):
    after = first_update(peak_lr=1.0)
    for name, at in (("LDNH", np.s_[1, :, 2, :]), ("LNHD", np.s_[1, 2])):
        u, _, vt = np.linalg.svd(np.asarray(muon_params(1)[name][at], np.float64), full_matrices=False)
        np.testing.assert_allclose(after[name][at], -0.2 * 8**0.5 * u @ vt, atol=1e-3)


@pytest.mark.parametrize("adamw_lr, ratio", [(None, 1.0), (0.02, 0.2)])
def test_adamw_lr_is_the_rate_of_what_is_no_matrix(adamw_lr, ratio):
    plain, apart = first_update(peak_lr=0.1), first_update(peak_lr=0.1, adamw_lr=adamw_lr)
    for name in MUON_SHAPES:
        factor = ratio if name in ("VD", "LD", "LNH") else 1.0
        np.testing.assert_allclose(apart[name], factor * plain[name], rtol=1e-5)


def test_in_a_model_muon_takes_the_matrices_of_the_blocks_alone():
    values = dict(n_embd=16, n_head=2, n_layer=2, block_size=8, vocab_size=11, qk_norm=True, tie_embeddings=False)
    cfg = freeze({"model": values | dict(use_rope=False, use_rmsnorm=False, use_bias=True)})
    found = {}
    for path, letters in jax.tree_util.tree_leaves_with_path(model.param_axes(cfg.model)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = optim.matrix_axes(name, letters)
    matrices = {name.removeprefix("blocks/"): at for name, at in found.items() if at}
    assert matrices == {
        "attn/q": (1, 3),
        "attn/k": (1, 3),
        "attn/v": (1, 3),
        "attn/o": (2, 3),
        "mlp/gate": (1, 2),
        "mlp/up": (1, 2),
        "mlp/down": (1, 2),
    }
    assert {"embed/tokens", "embed/positions", "lm_head/weight", "blocks/attn/q_bias"} <= {*found}


@pytest.mark.parametrize("letters", ["LDD", "LDX", "FF", "LVF", "HDF", "VDH"])
def test_a_tensor_whose_letters_do_not_say_input_and_output_is_refused_by_name(letters):
    with pytest.raises(ValueError, match=rf"parameter blocks/new/weight with axes {letters}.*MATRICES"):
        cfg = optim_config(name="muon")
        optim.make_optimizer(cfg, num_steps=1, axes={"blocks": {"new": {"weight": letters}}})


def test_muon_trains_a_quadratic_in_bfloat16_parameters():
    """The state takes the parameters' dtype, and the direction is found in float32."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), muon_params(0))
    cfg = optim_config(name="muon", peak_lr=0.1, warmup_steps=0, schedule="constant")
    optimizer = optim.make_optimizer(cfg, num_steps=10, axes=MUON_AXES)
    state = optimizer.init(params)
    updates, new_state = optimizer.update(params, state, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(lambda leaf: leaf.dtype, new_state)
    after = optax.apply_updates(params, updates)
    for name in MUON_SHAPES:
        assert after[name].dtype == jnp.bfloat16
        assert jnp.sum(jnp.square(after[name])) < jnp.sum(jnp.square(params[name]))
