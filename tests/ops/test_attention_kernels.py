"""Splash attention against the plain form, interpreted; cuDNN's where there is a GPU; and the choice between them."""

import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops
from llm_jax.ops.attention import _choose, _why_not_cudnn

STATIC = ("causal", "window", "softcap", "implementation")


def inputs(time, dtype=jnp.float32, *, heads=4, kv_heads=2, head_dim=16):
    rng = np.random.default_rng(0)
    q = 2 * rng.standard_normal((2, time, heads, head_dim))
    k, v = rng.standard_normal((2, 2, time, kv_heads, head_dim))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def segments_of(time):
    return jnp.asarray(np.sort(np.random.default_rng(9).integers(0, 4, (2, time)), axis=1), jnp.int32)


@jax.jit
def weighted(out):
    """A loss that treats no two places alike."""
    return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


def value_and_gradients(arrays, implementation, segments=None, **how):
    def loss(q, k, v):
        out = ops.attention(q, k, v, segments=segments, implementation=implementation, **how)
        return weighted(out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients


CASES = {
    "odd length": (100, {}),
    "one block": (256, {}),
    "blocks": (384, {}),
    "full, odd length": (200, {"causal": False}),
    "window over blocks": (384, {"window": 150}),
    "window of 1": (100, {"window": 1}),
    "softcap": (100, {"softcap": 1.5}),
    "segments, odd length": (200, {"segments": True}),
    "segments, full, softcap": (130, {"segments": True, "causal": False, "softcap": 2.0}),
    "segments, window": (384, {"segments": True, "window": 70}),
}


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_plain(case):
    time, how = CASES[case]
    how = how | ({"segments": segments_of(time)} if how.get("segments") else {})
    arrays = inputs(time)
    for actual, expected in zip(
        value_and_gradients(arrays, "splash", **how), value_and_gradients(arrays, "plain", **how), strict=True
    ):
        # Where a query sees one key alone, rounding leaves 1e-6 of a gradient that is 0.
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)


def test_splash_of_bfloat16_and_of_one_key_head():
    arrays = inputs(128, jnp.bfloat16, kv_heads=1)
    exact = value_and_gradients([x.astype(jnp.float32) for x in arrays], "plain")
    for actual, expected in zip(value_and_gradients(arrays, "splash"), exact, strict=True):
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=0.02 * float(jnp.abs(expected).max()))


def device_of(platform, **facts):
    return mock.Mock(spec=jax.Device, platform=platform, **facts)


def gpu(capability="9.0"):
    return device_of("gpu", device_kind="a GPU", compute_capability=capability)


HALF = inputs(128, jnp.bfloat16)


@pytest.mark.parametrize(
    ("reason", "device", "arrays", "how"),
    [
        ("compute capability 8.0 or more, and a GPU has 7.5", gpu("7.5"), HALF, {}),
        ("compute capability", gpu("gfx90a"), HALF, {}),
        ("not float32", gpu(), inputs(128), {}),
        ("not 12", gpu(), inputs(128, jnp.bfloat16, head_dim=12), {}),
        ("at most 128 channels", gpu(), inputs(128, jnp.bfloat16, head_dim=160), {}),
        ("no soft-cap", gpu(), HALF, {"softcap": 1.0}),
        ("segments", gpu(), HALF, {"segments": segments_of(128)}),
    ],
)
def test_where_cudnn_cannot_serve_auto_says_once_why(reason, device, arrays, how):
    how = {"segments": None, "softcap": None} | how
    with pytest.raises(ValueError, match=reason):
        ops.attention(*arrays, implementation="cudnn", device=device, **how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert [_choose(*arrays[:2], device, causal=True, **how) for _ in range(3)] == ["blockwise"] * 3
    assert len(caught) == 1 and reason in str(caught[0].message)


def test_auto_takes_the_kernel_of_the_device():
    nothing = {"segments": None, "softcap": None}
    tpu, cpu = device_of("tpu"), device_of("cpu")
    q, k, _ = HALF
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [_choose(q, k, device, causal=True, **nothing) for device in (gpu(), gpu("12.0"), tpu, cpu)] == [
            "cudnn",
            "cudnn",
            "splash",
            "blockwise",
        ]
        assert _choose(q[:, :32], k[:, :32], tpu, causal=True, **nothing) == "plain"
        assert _choose(q[:, :64], k, gpu(), causal=False, **nothing) == "plain"
        assert _choose(q[:, :64], k, tpu, causal=True, **nothing) == "splash"
    assert _why_not_cudnn(q, k, gpu(), **nothing) is None
    assert "as many queries as keys" in _why_not_cudnn(q[:, :64], k, gpu(), **nothing)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("how", [{}, {"causal": False}, {"window": 70}], ids=str)
@pytest.mark.parametrize("time", [128, 201])
def test_cudnn_equals_plain(time, how):
    arrays = inputs(time, jnp.bfloat16)
    exact = value_and_gradients([x.astype(jnp.float32) for x in arrays], "plain", **how)
    for actual, expected in zip(value_and_gradients(arrays, "cudnn", **how), exact, strict=True):
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=0.03 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("implementation", ["blockwise", "splash"])
def test_on_several_devices_each_attends_in_its_own_texts(implementation):
    """By shard_map, inside a model."""
    from llm_jax import model, sharding
    from llm_jax.config_rules import freeze

    shape = dict(n_embd=32, n_head=4, n_kv_head=2, n_layer=1, block_size=64, vocab_size=17)
    cfg = freeze({"model": shape | {"attention": implementation}}).model
    mesh = sharding.make_mesh(freeze({}).mesh, jax.devices()[:4])
    params = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 17, (8, 64)).astype(np.int32)

    def loss(network, params, tokens):
        return weighted(network.apply({"params": params}, tokens)[0])

    losses = [
        jax.jit(jax.value_and_grad(lambda p, t, network=network: loss(network, p, t)))
        for network in (model.Transformer(cfg, mesh), model.Transformer(cfg))
    ]
    split = jax.device_put(tokens, sharding.split_batch(mesh))
    (value, gradient), expected = losses[0](params, split), losses[1](params, tokens)
    np.testing.assert_allclose(value, expected[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected[1])
    compiled = losses[0].lower(params, split).compile().as_text()
    assert "all-gather" not in compiled  # of queries and keys: each device has its own
