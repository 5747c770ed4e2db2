import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import model, optim
from llm_jax.config import OptimConfig, freeze


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


@pytest.mark.parametrize("kind", ["cosine", "constant"])
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
