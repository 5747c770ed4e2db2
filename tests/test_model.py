"""The network against a numpy model written out in float64, against transformers, and against its own laws."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import layers, model, ops, sharding
from llm_jax.config import MLPS, MeshConfig, ModelConfig
from llm_jax.config_rules import freeze

# Every size its own number, so that a mixed-up axis shows.
SHAPE = dict(n_embd=20, n_head=6, n_kv_head=2, head_dim=4, mlp_dim=28, n_layer=2, block_size=9, vocab_size=13)
COMBINATIONS = [dict(use_rope=r, use_rmsnorm=n) for r in (True, False) for n in (True, False)]
EVERYTHING = dict(use_bias=True, qk_norm=True, tie_embeddings=False)
# What published families differ in.
PUBLISHED = [
    dict(n_layer=5, layer_types=("sliding",) * 2 + ("full",), window=3, rope_local_theta=50.0, norm_placement="both"),
    dict(n_layer=3, rope_layers=(True, False), qk_norm=True, qk_norm_axes="width", norm_placement="post"),
    dict(norm_weight_offset=1.0, embed_scale=4.5, attn_scale=0.3, qk_norm=True, qkv_bias=True),
    dict(n_expert=4, n_expert_per_token=2, norm_placement="both"),
    dict(n_expert=3, n_expert_per_token=1, normalize_experts=False, mlp="relu2"),
    dict(use_rmsnorm=False, use_bias=True, parallel_residual=True, rope_dim=2, attn_out_bias=False, mlp_bias=False),
]
GPT2 = dict(use_rope=False, use_rmsnorm=False)


def ids(values):
    return ",".join(f"{k}={v}" for k, v in values.items()) or "default"


def make(**values) -> ModelConfig:
    return freeze({"model": SHAPE | values}).model


def random_params(cfg, seed=0):
    """Every parameter away from its initial value, so that each one matters to the logits."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        is_scale = "norm" in path[-2].key and path[-1].key == "weight"
        return jnp.asarray(rng.normal(is_scale, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.param_shapes(cfg))


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def forward(cfg, params, tokens, positions=None, key=None, *, deterministic=True):
    rngs = None if key is None else {"dropout": key}
    apply = model.Transformer(cfg).apply
    return apply({"params": params}, tokens, positions, deterministic=deterministic, rngs=rngs)[0]


def some_tokens(cfg, batch=2, length=None, seed=0):
    shape = (batch, length or cfg.block_size)
    return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, shape), jnp.int32)


# -- The whole network, written out

_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
ACTIVATIONS["geglu"] = ACTIVATIONS["gelu_tanh"]


def written_out(cfg, params, tokens, inv_freq=None, rope_scale=1.0):
    """The logits in float64. `inv_freq`: rope's frequencies, by default theta^(-2i/H)."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length = tokens.shape[1]
    if inv_freq is None and cfg.use_rope:
        inv_freq = cfg.rope_theta ** (-np.arange(0, cfg.rope_dim, 2) / cfg.rope_dim)

    def norm(x, weights):
        if not cfg.use_rmsnorm:
            x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
        scaled = scaled * (weights["weight"] + cfg.norm_weight_offset)
        return scaled + weights.get("bias", 0)

    def rope(x, kind):  # [B, T, heads, H], pairs (i, i + R) of the first 2 R channels
        is_local = kind == "sliding" and cfg.rope_local_theta
        frequencies, scale = inv_freq, rope_scale
        if is_local:
            frequencies, scale = cfg.rope_local_theta ** (-np.arange(0, cfg.rope_dim, 2) / cfg.rope_dim), 1
        angle = (np.arange(length)[:, None] * np.asarray(frequencies))[:, None]
        a, b, rest = np.split(x, [cfg.rope_dim // 2, cfg.rope_dim], -1)
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        return np.concatenate([a * cos - b * sin, a * sin + b * cos, rest], -1)

    def attention(x, w, layer):
        kind = cfg.layer_types[layer % len(cfg.layer_types)]
        q, k, v = (np.einsum("btd,dnh->btnh", x, w[n]) + w.get(f"{n}_bias", 0) for n in "qkv")
        if cfg.qk_norm and cfg.qk_norm_axes == "head":
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        elif cfg.qk_norm:
            weights = (jax.tree.map(np.ravel, w[f"{name}_width_norm"]) for name in "qk")
            flat = ((y, y.reshape(*y.shape[:2], -1)) for y in (q, k))
            q, k = (norm(y, n).reshape(heads.shape) for (heads, y), n in zip(flat, weights, strict=True))
        if cfg.use_rope and cfg.rope_layers[layer % len(cfg.rope_layers)]:
            q, k = rope(q, kind), rope(k, kind)
        k, v = (np.repeat(y, cfg.n_head // cfg.n_kv_head, axis=2) for y in (k, v))
        scores = np.einsum("btnh,bsnh->bnts", q, k) * (cfg.attn_scale or cfg.head_dim**-0.5)
        if cfg.attn_softcap:
            scores = cfg.attn_softcap * np.tanh(scores / cfg.attn_softcap)
        distance = np.arange(length)[:, None] - np.arange(length)
        window = cfg.window if kind == "sliding" else cfg.block_size
        scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
        return np.einsum("btnh,nhd->btd", heads, w["o"]) + w.get("o_bias", 0)

    def mlp(x, w):
        up = x @ w["up"] + w.get("up_bias", 0)
        if cfg.mlp in ("swiglu", "geglu"):
            hidden = ACTIVATIONS[cfg.mlp](x @ w["gate"] + w.get("gate_bias", 0)) * up
        else:
            hidden = ACTIVATIONS[cfg.mlp](up)
        return hidden @ w["down"] + w.get("down_bias", 0)

    def mixture(x, w):
        logits = x @ w["router"]
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        shares = np.where(shares >= np.sort(shares, -1)[..., -cfg.n_expert_per_token, None], shares, 0)
        if cfg.normalize_experts:
            shares /= shares.sum(-1, keepdims=True)
        each = [mlp(x, {name: w[name][e] for name in w if name != "router"}) for e in range(cfg.n_expert)]
        return sum(shares[..., e, None] * y for e, y in enumerate(each))

    x = params["embed"]["tokens"][np.asarray(tokens)] * cfg.embed_scale
    if not cfg.use_rope:
        x = x + params["embed"]["positions"][:length]
    for i in range(cfg.n_layer):
        w = jax.tree.map(lambda leaf: leaf[i], params["blocks"])  # noqa: B023
        before, after = (
            lambda x, name, used=used: norm(x, w[name]) if used else x  # noqa: B023
            for used in (cfg.norm_placement != "post", cfg.norm_placement != "pre")
        )
        attended = x + after(attention(before(x, "attn_norm"), w["attn"], i), "attn_post_norm")
        mlp_input = before(x if cfg.parallel_residual else attended, "mlp_norm")
        update = mixture(mlp_input, w["moe"]) if cfg.n_expert else mlp(mlp_input, w["mlp"])
        x = attended + after(update, "mlp_post_norm")
    logits = (
        norm(x, params["final_norm"])
        @ (params["embed"]["tokens"] if cfg.tie_embeddings else params["lm_head"]["weight"]).T
    )
    return cfg.final_softcap * np.tanh(logits / cfg.final_softcap) if cfg.final_softcap else logits


VARIANTS = [
    *COMBINATIONS,
    *[dict(mlp=kind, use_bias=True) for kind in MLPS],
    EVERYTHING,
    EVERYTHING | GPT2,
    dict(attn_softcap=0.5, final_softcap=0.7),
    dict(n_layer=4, layer_types=("sliding", "full"), window=3, rope_theta=100.0, norm_eps=0.1),
    *PUBLISHED,
    dict(n_kv_head=None),
    dict(n_kv_head=1, attention="blockwise"),
]


@pytest.mark.parametrize("values", VARIANTS, ids=ids)
def test_logits_equal_the_network_written_out(values):
    cfg = make(**values)
    params, tokens = random_params(cfg), some_tokens(cfg)
    actual = forward(cfg, params, tokens)
    assert actual.dtype == jnp.float32 and actual.shape == (*tokens.shape, cfg.vocab_size)
    # Logits are of size 1 to 10; float32 against float64 through four sublayers differs by some 1e-6 of that.
    np.testing.assert_allclose(actual, written_out(cfg, params, tokens), atol=1e-4, rtol=1e-4)


def test_rope_scaling_reaches_the_frequencies():
    """Each of the keys has its own value; ops/test_rope.py holds `rope_frequencies` to transformers."""
    llama3 = dict(rope_factor=4.0, rope_original_length=64, rope_low_freq_factor=1.5, rope_high_freq_factor=3.0)
    yarn = dict(rope_factor=2.0, rope_original_length=32, rope_beta_fast=3.0, rope_beta_slow=0.5)
    for kind, values in {"linear": dict(rope_factor=3.0), "llama3": llama3, "yarn": yarn}.items():
        cfg = make(rope_scaling=kind, head_dim=16, **values)
        named = {name.removeprefix("rope_"): value for name, value in values.items()}
        scaling = ops.RopeScaling(kind, **{"original_length": 3} | named)
        inv_freq, scale = ops.rope_frequencies(16, 10000.0, scaling)
        params, tokens = random_params(cfg), some_tokens(cfg)
        expected = written_out(cfg, params, tokens, inv_freq, scale)
        np.testing.assert_allclose(forward(cfg, params, tokens), expected, atol=1e-4, rtol=1e-4)
        assert np.abs(expected - written_out(cfg, params, tokens)).max() > 1e-2  # and they matter


# -- transformers' own models, with random weights copied into our tree


def test_equals_transformers_gpt2():
    torch = pytest.importorskip("torch", reason="torch not installed")
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    cfg = make(
        n_embd=24, head_dim=None, n_kv_head=None, mlp_dim=40, mlp="gelu_tanh", use_bias=True, n_layer=3, **GPT2
    )
    params, tokens = random_params(cfg), some_tokens(cfg)
    oracle = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=13, n_positions=9, n_embd=24, n_layer=3, n_head=6, n_inner=40, layer_norm_epsilon=1e-5
        )
    ).eval()
    blocks, tensor = params["blocks"], lambda leaf: torch.tensor(np.array(leaf))
    qkv = [blocks["attn"][name].reshape(3, 24, 24) for name in "qkv"]
    qkv_bias = [blocks["attn"][f"{name}_bias"].reshape(3, 24) for name in "qkv"]
    with torch.no_grad():
        oracle.transformer.wte.weight.copy_(tensor(params["embed"]["tokens"]))
        oracle.transformer.wpe.weight.copy_(tensor(params["embed"]["positions"]))
        norms = [(oracle.transformer.ln_f, params["final_norm"])]
        for i, block in enumerate(oracle.transformer.h):
            layer = jax.tree.map(lambda leaf: leaf[i], blocks)  # noqa: B023
            norms += [(block.ln_1, layer["attn_norm"]), (block.ln_2, layer["mlp_norm"])]
            block.attn.c_attn.weight.copy_(tensor(jnp.concatenate([w[i] for w in qkv], axis=1)))
            block.attn.c_attn.bias.copy_(tensor(jnp.concatenate([b[i] for b in qkv_bias])))
            block.attn.c_proj.weight.copy_(tensor(layer["attn"]["o"].reshape(24, 24)))
            block.attn.c_proj.bias.copy_(tensor(layer["attn"]["o_bias"]))
            for theirs, ours in ((block.mlp.c_fc, "up"), (block.mlp.c_proj, "down")):
                theirs.weight.copy_(tensor(layer["mlp"][ours]))
                theirs.bias.copy_(tensor(layer["mlp"][f"{ours}_bias"]))
        for theirs, ours in norms:
            theirs.weight.copy_(tensor(ours["weight"]))
            theirs.bias.copy_(tensor(ours["bias"]))
        expected = oracle(torch.tensor(np.array(tokens))).logits.numpy()
    np.testing.assert_allclose(forward(cfg, params, tokens), expected, atol=1e-4)


def test_equals_transformers_llama():
    torch = pytest.importorskip("torch", reason="torch not installed")
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    cfg = make(n_embd=24, head_dim=8, rope_theta=500.0, tie_embeddings=False, n_layer=3, norm_eps=1e-6)
    params, tokens = random_params(cfg), some_tokens(cfg)
    oracle = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=13,
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=1e-6,
            max_position_embeddings=9,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
        )
    ).eval()

    def copy(theirs, ours, *, rows):
        theirs.weight.copy_(torch.tensor(np.array(ours).reshape(rows, -1).T if rows else np.array(ours)))

    with torch.no_grad():
        copy(oracle.model.embed_tokens, params["embed"]["tokens"], rows=None)
        copy(oracle.lm_head, params["lm_head"]["weight"], rows=None)
        copy(oracle.model.norm, params["final_norm"]["weight"], rows=None)
        for i, block in enumerate(oracle.model.layers):
            layer = jax.tree.map(lambda leaf: leaf[i], params["blocks"])  # noqa: B023
            copy(block.input_layernorm, layer["attn_norm"]["weight"], rows=None)
            copy(block.post_attention_layernorm, layer["mlp_norm"]["weight"], rows=None)
            for name, rows in (("q", 24), ("k", 24), ("v", 24), ("o", 48)):  # inputs; 6 heads of 8 are 48
                copy(getattr(block.self_attn, f"{name}_proj"), layer["attn"][name], rows=rows)
            for name, rows in (("gate", 24), ("up", 24), ("down", 28)):
                copy(getattr(block.mlp, f"{name}_proj"), layer["mlp"][name], rows=rows)
        expected = oracle(torch.tensor(np.array(tokens))).logits.numpy()
    np.testing.assert_allclose(forward(cfg, params, tokens), expected, atol=1e-4)


# -- What sees what, by gradient


@functools.partial(jax.jit, static_argnums=0)
def influence(cfg, params):
    """[t, s]: how much the logits of place t change with the embedding at place s; 0 where t can't see s."""
    tokens = jnp.arange(cfg.vocab_size)[None]  # each token once, so that its embedding belongs to one place
    weights = jnp.sin(jnp.arange(cfg.vocab_size) + 1.0)

    def places(table):
        embedded = params | {"embed": params["embed"] | {"tokens": table}}
        return model.Transformer(cfg).apply({"params": embedded}, tokens)[0][0] @ weights

    return jnp.abs(jax.jacrev(places)(params["embed"]["tokens"])).sum(-1)


def band(length, width):
    """[t, s]: 0 <= t - s < width."""
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < width)


@pytest.mark.parametrize("values", COMBINATIONS, ids=ids)
def test_a_place_depends_on_every_earlier_token_and_on_no_later_one(values):
    cfg = make(block_size=13, tie_embeddings=False, **values)
    np.testing.assert_array_equal(influence(cfg, random_params(cfg)) > 0, band(13, 13))


def test_a_token_outside_the_windows_reach_has_no_influence():
    cfg = make(n_layer=2, layer_types=("sliding",), window=3, block_size=13, tie_embeddings=False)
    # Two layers that each see 2 tokens back: 4 back together.
    np.testing.assert_array_equal(influence(cfg, random_params(cfg)) > 0, band(13, 5))


@pytest.mark.parametrize("execution", ["scan", "unrolled"])
def test_layer_i_has_type_i_modulo_the_period(execution):
    values = dict(n_layer=4, layer_types=("sliding", "full"), window=3, block_size=13)
    cfg = make(tie_embeddings=False, layer_execution=execution, **values)
    params = random_params(cfg)
    for i in range(4):  # all other layers' attention is silent
        only = params["blocks"]["attn"]["o"] * (jnp.arange(4) == i)[:, None, None, None]
        silent = params | {"blocks": params["blocks"] | {"attn": params["blocks"]["attn"] | {"o": only}}}
        np.testing.assert_array_equal(influence(cfg, silent) > 0, band(13, 13 if i % 2 else 3))


def test_beyond_block_size_rope_attends_through_a_window_of_block_size():
    short = make(block_size=5)
    windowed = make(block_size=14, layer_types=("sliding",), window=5)
    params, tokens = random_params(short), some_tokens(short, length=14)
    np.testing.assert_array_equal(forward(short, params, tokens), forward(windowed, params, tokens))
    unlimited = forward(make(block_size=14), params, tokens)
    assert np.abs(forward(short, params, tokens) - unlimited)[:, 5:].max() > 1e-3


def test_beyond_block_size_learned_positions_are_an_error():
    cfg = make(**GPT2)
    params = random_params(cfg)
    with pytest.raises(ValueError, match="10 tokens are more than the 9 learned positions"):
        forward(cfg, params, some_tokens(cfg, length=10))


def test_rope_scores_depend_on_distance_only_and_learned_positions_on_place():
    for values, shift_matters in ((dict(), False), (GPT2, True)):
        cfg = make(**values)
        params, tokens = random_params(cfg), some_tokens(cfg, length=4)
        here, there = (forward(cfg, params, tokens, jnp.tile(jnp.arange(4) + i, (2, 1))) for i in (0, 5))
        # Angles of 9 instead of 4 radians lose a few float32 bits.
        assert (np.abs(here - there).max() > 1e-3) == shift_matters
        # numpy's sines where the positions are not given, XLA's where they are; logits reach 3.
        np.testing.assert_allclose(forward(cfg, params, tokens), here, atol=5e-6)


def test_grouped_heads_equal_key_and_value_heads_written_out_for_each_query_head():
    grouped, full = make(), make(n_kv_head=None)
    params, tokens = random_params(grouped), some_tokens(grouped)
    attn = params["blocks"]["attn"]
    repeated = {name: jnp.repeat(attn[name], 3, axis=2) for name in ("k", "v")}
    wide = params | {"blocks": params["blocks"] | {"attn": attn | repeated}}
    np.testing.assert_allclose(forward(full, wide, tokens), forward(grouped, params, tokens), atol=1e-5)


# -- One result however it is computed

WINDOWED = dict(n_layer=4, layer_types=("sliding", "full"), window=3)


@pytest.fixture(scope="module")
def scanned():
    """(config, parameters, logits, gradient) with a scan and everything kept."""
    cfg = make(layer_execution="scan", **WINDOWED)
    params = random_params(cfg)
    return cfg, params, *value_and_gradient(cfg, params)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(cfg, params):
    def loss(params):
        logits = forward(cfg, params, some_tokens(cfg))
        return jnp.mean(jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) * logits), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradient


@pytest.mark.parametrize(
    "values",
    [
        dict(layer_execution="unrolled"),
        dict(layer_execution="scan", remat="block"),
        dict(layer_execution="scan", remat="dots"),
        dict(layer_execution="unrolled", remat="dots"),
        dict(layer_execution="scan", attention="blockwise"),
    ],
    ids=ids,
)
def test_execution_remat_and_attention_change_no_number(values, scanned):
    cfg, params, logits, gradient = scanned
    other_logits, other_gradient = value_and_gradient(dataclasses.replace(cfg, **values), params)
    np.testing.assert_allclose(other_logits, logits, atol=2e-5)  # float32 sums in another order; logits reach 10
    for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # gradients reach 0.1


def test_remat_keeps_less_for_the_backward_pass_and_unrolling_takes_all_periods_at_once(scanned, monkeypatch):
    cfg, params, *_ = scanned

    def kept(remat):
        loss = functools.partial(forward.__wrapped__, dataclasses.replace(cfg, remat=remat), tokens=some_tokens(cfg))
        backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("block") < kept("dots") < kept("none")
    assert kept("none") > 2 * kept("block")
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_recomputed", lambda cfg, function: function)
        everything = kept("none")
    assert kept("none") < 0.8 * everything  # norms and MLP activations are computed again

    def traced(execution):
        changed = dataclasses.replace(cfg, layer_execution=execution)
        return str(jax.make_jaxpr(functools.partial(forward.__wrapped__, changed))(params, some_tokens(cfg)))

    assert "unroll=1" in traced("scan") and "unroll=2" in traced("unrolled")  # two periods


def test_auto_execution_follows_the_mesh_and_a_choice_stays():
    cfg = make()
    one, eight = (sharding.make_mesh(MeshConfig(), jax.devices()[:n]) for n in (1, 8))
    split = sharding.make_mesh(MeshConfig(fsdp=8), jax.devices())
    each = [model.for_mesh(cfg, mesh).layer_execution for mesh in (one, eight, split)]
    assert each == ["unrolled", "unrolled", "scan"]
    chosen = make(layer_execution="scan", attention="blockwise")
    assert model.for_mesh(chosen, eight) == chosen


def test_blocks_may_be_given_layer_by_layer(scanned):
    cfg, params, logits, _ = scanned
    split = params | {"blocks": model.split_layers(params["blocks"], cfg.n_layer)}
    np.testing.assert_allclose(forward(cfg, split, some_tokens(cfg)), logits, atol=2e-5)


@pytest.mark.parametrize("values", [dict(), GPT2 | dict(use_bias=True)], ids=ids)
def test_bfloat16_compute_is_near_float32(values):
    exact, rounded = make(**values), make(compute_dtype="bfloat16", **values)
    params, tokens = random_params(exact), some_tokens(exact)
    expected, actual = forward(exact, params, tokens), forward(rounded, params, tokens)
    assert actual.dtype == jnp.float32
    error = np.sqrt(np.mean((actual - expected) ** 2)) / np.std(expected)
    # A bfloat16 has 8 bits: one rounding is 0.2 % off on average, some ten of them are passed through.
    assert 1e-4 < error < 0.03


# -- Parameters

ALL_VARIANTS = [*COMBINATIONS, *[c | EVERYTHING for c in COMBINATIONS], dict(mlp="gelu", use_bias=True)]


@pytest.mark.parametrize("values", [*ALL_VARIANTS, *PUBLISHED], ids=ids)
def test_axes_cover_every_parameter_and_give_its_shape(values):
    cfg = make(**values | dict(n_layer=3))
    sizes = dict(V=13, C=9, D=20, N=6, K=2, H=4, F=28, L=3, E=cfg.n_expert)
    assert layers.axis_sizes(cfg) == sizes
    shapes = jax.tree.map(lambda leaf: leaf.shape, model.param_shapes(cfg), is_leaf=lambda x: hasattr(x, "shape"))
    expected = jax.tree.map(lambda letters: tuple(sizes[axis] for axis in letters), model.param_axes(cfg))
    assert shapes == expected


def test_a_parameter_without_axes_is_an_error(monkeypatch):
    cfg = make()
    extra = model.param_shapes(cfg)
    extra["blocks"]["mlp"]["scale"] = jax.ShapeDtypeStruct((2, 28), jnp.float32)
    with monkeypatch.context() as patch:
        patch.setattr(model, "param_shapes", lambda cfg: extra)
        with pytest.raises(ValueError, match=r"blocks/mlp/scale \(2, 28\).*AXES"):
            model.param_axes(cfg)
    monkeypatch.delitem(layers.AXES, "mlp/up")
    with pytest.raises(KeyError, match="mlp/up"):
        model.param_axes(cfg)


@pytest.mark.parametrize("values", ALL_VARIANTS, ids=ids)
def test_parameter_count_by_closed_form(values):
    cfg = make(n_layer=3, **values)
    V, C, D, N, K, H, F, L = 13, 9, 20, 6, 2, 4, 28, 3
    gated = cfg.mlp == "swiglu"
    norm_bias = cfg.use_bias and not cfg.use_rmsnorm
    norms = (2 * D * L + D + 2 * H * L * cfg.qk_norm) * (1 + norm_bias)
    matrices = L * (2 * D * N * H + 2 * D * K * H + (2 + gated) * D * F)
    biases = L * (N * H + 2 * K * H + D + (1 + gated) * F + D) * cfg.use_bias
    embeddings = V * D * (1 + (not cfg.tie_embeddings)) + C * D * (not cfg.use_rope)
    inside = norms + matrices + biases
    assert model.count_params(cfg) == (inside + embeddings, inside)


def test_every_parameter_has_a_part_in_the_logits():
    cfg = make(**EVERYTHING, use_rmsnorm=False)
    params = random_params(cfg)
    _, gradient = value_and_gradient(cfg, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        by_layer = leaf if path[0].key == "blocks" else leaf[None]
        largest = jnp.abs(by_layer).reshape(len(by_layer), -1).max(1)
        assert (largest > 1e-6).all(), jax.tree_util.keystr(path)


def test_initial_values_are_gpt2s(key):
    cfg = make(n_embd=64, head_dim=32, mlp_dim=200, vocab_size=300, n_layer=8, **EVERYTHING, use_rmsnorm=False)
    params = jax.jit(model.init_params, static_argnums=0)(cfg, key)
    residual = 0.02 / math.sqrt(16)  # by the root of the number of branches that add to the stream
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name.endswith("bias"):
            assert not leaf.any()
        elif name == "weight" and path[0].key != "lm_head":
            assert (leaf == 1).all()
        else:  # at least 19,200 values: the deviation of their own deviation is 0.5 %
            np.testing.assert_allclose(np.std(leaf), residual if name in ("o", "down") else 0.02, rtol=0.03)
    assert not jnp.array_equal(params["blocks"]["attn"]["q"][0], params["blocks"]["attn"]["q"][1])


@pytest.mark.parametrize("values", [dict(), GPT2], ids=ids)
def test_initial_loss_is_near_that_of_guessing(values, key):
    cfg = make(n_embd=24, vocab_size=200, **values)
    params, tokens = jax.jit(model.init_params, static_argnums=0)(cfg, key), some_tokens(cfg, batch=8)
    nats, count = ops.cross_entropy(forward(cfg, params, tokens)[:, :-1], tokens[:, 1:])
    # Logits have a deviation of 0.02 sqrt(24) = 0.1, which costs half its square.
    np.testing.assert_allclose(nats / count, math.log(200), atol=0.03)


def test_param_dtype_is_the_dtype_of_every_parameter(key):
    params = jax.eval_shape(functools.partial(model.init_params, make(param_dtype="bfloat16", **EVERYTHING)), key)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


# -- Dropout


def test_dropout_acts_in_training_only():
    cfg = make(dropout=0.5)
    params, tokens = random_params(cfg), some_tokens(cfg)
    plain = forward(make(), params, tokens)
    np.testing.assert_array_equal(forward(cfg, params, tokens), plain)
    a, a_again, b = (forward(cfg, params, tokens, None, jax.random.key(i), deterministic=False) for i in (1, 1, 2))
    np.testing.assert_array_equal(a, a_again)
    assert np.abs(a - b).max() > 0.1 and np.abs(a - plain).max() > 0.1


def test_dropout_keeps_half_of_embeddings_and_of_each_branch_and_doubles_it(key):
    """Branches that always add 1, a norm that divides by 1000 whatever comes, and logits that are the stream."""
    cfg = make(
        dropout=0.5, use_bias=True, tie_embeddings=False, n_embd=16, vocab_size=16, block_size=64, norm_eps=1e6
    )
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.param_shapes(cfg))
    params["final_norm"]["weight"] += 1000.0
    params["lm_head"]["weight"] += jnp.eye(16)
    tokens = some_tokens(cfg, batch=4)

    def stream(params):
        return forward(cfg, params, tokens, None, key, deterministic=False)

    embedded = params | {"embed": {"tokens": jnp.ones((16, 16))}}
    values = np.asarray(stream(embedded))
    assert {*np.unique(values.round(3))} == {0.0, 2.0}
    blocks = params["blocks"]
    branches = {"attn": blocks["attn"] | {"o_bias": jnp.ones((2, 16))}}
    branches |= {"mlp": blocks["mlp"] | {"down_bias": jnp.ones((2, 16))}}
    values = np.asarray(stream(params | {"blocks": blocks | branches}))
    # Four independent branches of 0 or 2: mean 4, variance 4; 4096 values, so that these are sure to 0.03 and 0.08.
    assert {*np.unique(values.round(2))} == {0.0, 2.0, 4.0, 6.0, 8.0}
    assert abs(values.mean() - 4) < 0.15 and abs(values.var() - 4) < 0.4


# -- Arithmetic


def product_flops(jaxpr):
    """Floating-point operations of every matrix product in a jaxpr, those of a scan's body once per turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inner = [leaf for leaf in jax.tree.leaves(list(eqn.params.values())) if hasattr(leaf, "jaxpr")]
        total += turns * sum(product_flops(body.jaxpr) for body in inner)
    return total


@pytest.mark.parametrize("values", [GPT2 | dict(mlp="gelu"), EVERYTHING], ids=ids)
def test_flops_are_those_of_the_products_with_attention_at_half(values):
    """Plain attention computes all T x T scores; what a causal kernel needs is half of them."""
    cfg = make(attention="plain", **values)
    tokens = some_tokens(cfg)

    def loss(params):
        logits, _ = model.Transformer(cfg).apply({"params": params}, tokens)
        return ops.cross_entropy(logits, tokens)[0]

    traced = jax.make_jaxpr(jax.value_and_grad(loss))(model.param_shapes(cfg))
    attention = 12 * cfg.n_layer * cfg.n_head * cfg.head_dim * tokens.shape[1]
    assert tokens.shape[1] == cfg.block_size
    assert product_flops(traced.jaxpr) / tokens.size == model.train_flops_per_token(cfg) + attention / 2


def test_flops_of_experts_are_those_of_the_chosen():
    """Two of four are as many as one MLP of twice the width; the router's are besides."""
    experts, dense = make(n_expert=4, n_expert_per_token=2, mlp_dim=28), make(mlp_dim=56)
    router = 6 * experts.n_layer * experts.n_embd * 4
    assert model.train_flops_per_token(experts) == model.train_flops_per_token(dense) + router


def test_flops_of_a_window():
    full, sliding = (
        make(block_size=100, **values) for values in (dict(), dict(layer_types=("full", "sliding"), window=10))
    )
    spared = model.train_flops_per_token(full) - model.train_flops_per_token(sliding)
    keys_seen = (np.mean(np.minimum(np.arange(1, 101), window)) for window in (100, 10))
    one_key = 12 * full.n_head * full.head_dim
    assert spared / one_key == pytest.approx(next(keys_seen) - next(keys_seen), abs=0.5)


def test_gelu_is_x_times_the_normal_distribution():
    x = np.linspace(-9, 9, 1801)
    exact = [0.5 * value * math.erfc(-value / math.sqrt(2)) for value in x]
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    slope = x * density + [0.5 * math.erfc(-value / math.sqrt(2)) for value in x]
    gelu, _ = layers.MLPS["gelu"]
    x32 = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(gelu(x32), exact, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x32), slope, atol=1e-6)
    assert gelu(x32.astype(jnp.bfloat16)).dtype == jnp.bfloat16
