"""rope against transformers' rotary embedding, closed forms, and its defining law."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import ops
from llm_jax.ops import RopeScaling, precompute_freqs_cis, rope_frequencies

rope, apply_rope = jax.jit(ops.rope), jax.jit(ops.apply_rope)  # one compilation, not one for each op

NO_PARITY = "transformers not installed: pip install llm_jax[parity]"

# (ours, transformers' spelling); the numbers of Llama 3.1, and YaRN's of a Qwen config.
SCALINGS = {
    "default": (None, {"rope_type": "default"}),
    "linear": (RopeScaling("linear", 4.0, 2048), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, 32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "yarn_betas": (
        RopeScaling("yarn", 16.0, 4096, beta_fast=20.0, beta_slow=2.0),
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "original_max_position_embeddings": 4096,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim, theta", [(16, 10000.0), (64, 500000.0), (128, 1000000.0)])
def test_equals_transformers(name, head_dim, theta):
    """Frequencies, attention scaling and rotated vectors of LlamaRotaryEmbedding, to 1e-5."""
    pytest.importorskip("transformers", reason=NO_PARITY)
    torch = pytest.importorskip("torch", reason="torch not installed: pip install llm_jax[parity]")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    ours, theirs = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    embedding = LlamaRotaryEmbedding(config=config)
    inv_freq, scale = rope_frequencies(head_dim, theta, ours)
    last_bits = 4 * np.finfo(np.float32).eps  # theirs are computed in float32, ours rounded to it
    np.testing.assert_allclose(inv_freq, embedding.inv_freq.numpy(), rtol=last_bits)
    assert scale == pytest.approx(embedding.attention_scaling, rel=1e-6)

    x = np.random.default_rng(0).standard_normal((2, 7, 2, head_dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [3, 5, 100, 101, 1000, 1001, 1500]])
    cos, sin = embedding(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2)
    # With their frequencies, to 1e-5 at every position.
    actual = rope(jnp.asarray(x), jnp.asarray(positions), jnp.asarray(embedding.inv_freq.numpy()), scale=scale)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)
    # With ours, as much more as those last bits turn a pair of channels: position times frequency, at most 1.
    actual = np.asarray(rope(jnp.asarray(x), jnp.asarray(positions), inv_freq, scale=scale))
    turned = 2**0.5 * np.abs(x).max() * scale * last_bits * positions[..., None, None]
    assert (np.abs(actual - expected.numpy()) <= 1e-5 + turned).all()


def test_ntk_keeps_the_fastest_channel_and_slows_the_slowest_by_factor():
    plain = np.asarray(rope_frequencies(32, 10000.0)[0])
    scaled, scale = rope_frequencies(32, 10000.0, RopeScaling("ntk", 8.0, 2048))
    scaled = np.asarray(scaled)
    assert scale == 1.0
    np.testing.assert_allclose(scaled[0], 1.0)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8.0, rtol=1e-6)
    theta = 10000.0 * 8.0 ** (32 / 30)
    np.testing.assert_allclose(scaled, [theta ** (-2 * i / 32) for i in range(16)], rtol=1e-6)


def test_yarn_scale_is_the_published_attention_factor():
    assert rope_frequencies(64, 1e4, RopeScaling("yarn", 4.0, 2048))[1] == 0.1 * math.log(4.0) + 1.0


def test_scores_depend_only_on_distance():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16)).astype(np.float32)
    inv_freq, _ = rope_frequencies(16, 100.0)

    def score(t, s):
        return np.sum(rope(q, np.array([[t]]), inv_freq) * rope(k, np.array([[s]]), inv_freq))

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_quarter_turn_by_hand():
    """Angle pi/2 takes (x1, x2) to (-x2, x1), the pair being channels i and i + R; the rest passes."""
    x = np.array([1, 2, 3, 4, 5, 6], np.float32).reshape(1, 1, 6)
    turned = rope(x, np.array([1]), np.array([math.pi / 2, 0.0]), scale=2.0)
    np.testing.assert_allclose(np.asarray(turned).ravel(), [-6.0, 4.0, 2.0, 8.0, 5.0, 6.0], atol=1e-6)


def test_apply_rope_is_rope_at_positions_from_zero():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, 3, 8)), jnp.float32)
    freqs_cis = precompute_freqs_cis(8, 12, theta=100.0)
    assert freqs_cis.shape == (12, 4) and freqs_cis.dtype == jnp.complex64
    positions = np.broadcast_to(np.arange(9), (2, 9))
    expected = rope(x, positions, rope_frequencies(8, 100.0)[0])
    np.testing.assert_allclose(apply_rope(x, freqs_cis), expected, atol=1e-6)
    np.testing.assert_allclose(np.asarray(freqs_cis)[3, 1], np.exp(1j * 3 * 100.0 ** (-2 / 8)), atol=1e-6)
    assert apply_rope(x.astype(jnp.bfloat16), freqs_cis).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_dtype_jit_vmap(dtype, tolerance):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((3, 5, 2, 8)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 50, (3, 5)))
    inv_freq, _ = rope_frequencies(8, 100.0)
    expected = ops.rope(x, positions, inv_freq)
    one_row = lambda row, at: rope(row, at, inv_freq)  # noqa: E731
    for result in (
        rope(x.astype(dtype), positions, inv_freq),
        jax.vmap(one_row)(x.astype(dtype), positions),
    ):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=tolerance, rtol=tolerance)


def test_errors_show_both_sides():
    x = np.ones((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match="5 rotated pairs need 10 channels, the head has 8"):
        rope(x, np.zeros((1, 4), int), np.ones(5, np.float32))
    with pytest.raises(ValueError, match="x has 4 positions, freqs_cis only 3"):
        apply_rope(x, precompute_freqs_cis(8, 3))
    with pytest.raises(ValueError, match=r"head_dim \(7\) must be even"):
        rope_frequencies(7, 100.0)
    with pytest.raises(ValueError, match="'dynamic' is not one of"):
        rope_frequencies(8, 100.0, RopeScaling("linear", 2.0, 8)._replace(kind="dynamic"))
