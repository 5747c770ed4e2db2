"""cross_entropy and linear_cross_entropy against float64 numpy and closed forms."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import ops

cross_entropy = jax.jit(ops.cross_entropy, static_argnames="z_loss")  # one compilation, not one for each op

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((3, 5, 11)) * 4
TARGETS = RNG.integers(0, 11, (3, 5))
MASK = RNG.integers(0, 2, (3, 5)) * RNG.uniform(0.5, 2.0, (3, 5))
LOGITS32, TARGETS32, MASK32 = (
    jnp.asarray(LOGITS, jnp.float32),
    jnp.asarray(TARGETS),
    jnp.asarray(MASK, jnp.float32),
)


def reference(mask, z_loss):
    log_z = np.log(np.exp(LOGITS).sum(-1))
    nats = log_z - np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0] + z_loss * log_z**2
    return (nats * mask).sum(), mask.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_float64(masked, z_loss):
    expected = reference(MASK if masked else np.ones((3, 5)), z_loss)
    actual = cross_entropy(LOGITS32, TARGETS32, MASK32 if masked else None, z_loss=z_loss)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert actual[0].dtype == actual[1].dtype == jnp.float32


def test_uniform_logits_cost_log_v():
    nats, count = cross_entropy(np.zeros((7, 65), np.float32), np.arange(7))
    np.testing.assert_allclose(float(nats) / float(count), np.log(65), rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot():
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = (softmax - np.eye(11)[TARGETS]) * MASK[..., None]
    actual = jax.jit(jax.grad(lambda x: ops.cross_entropy(x, TARGETS32, MASK32)[0]))(LOGITS32)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_masked_token_may_hold_anything():
    targets, logits, mask = TARGETS.copy(), LOGITS.astype(np.float32), np.ones((3, 5), np.float32)
    targets[0, 0], logits[0, 0], mask[0, 0] = -100, np.nan, 0.0
    np.testing.assert_allclose(
        cross_entropy(logits, targets, mask), cross_entropy(LOGITS32, TARGETS32, mask), rtol=1e-6
    )


def test_sums_add_up_over_parts():
    whole = cross_entropy(LOGITS32, TARGETS32, MASK32)
    parts = [cross_entropy(*(np.asarray(x)[i] for x in (LOGITS32, TARGETS32, MASK32))) for i in range(3)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_dtype_jit_vmap(dtype, tolerance):
    expected = reference(MASK, 0.0)
    np.testing.assert_allclose(cross_entropy(LOGITS32.astype(dtype), TARGETS32, MASK32), expected, rtol=tolerance)
    nats, count = jax.jit(jax.vmap(ops.cross_entropy))(LOGITS32.astype(dtype), TARGETS32, MASK32)
    assert nats.shape == (3,) and nats.dtype == jnp.float32
    np.testing.assert_allclose((np.sum(nats), np.sum(count)), expected, rtol=tolerance)


# -- Without the logits: 3 x 5 rows, 6 wide, a vocabulary of 11

HIDDEN, WEIGHT = RNG.standard_normal((3, 5, 6)), RNG.standard_normal((11, 6))
HIDDEN32, WEIGHT32 = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(WEIGHT, jnp.float32)
# All at once; chunks of 2 places (the last one filled up); chunks of the least size, one place.
CHUNKS = {1: 10**6, 3: 3 * 2 * 11, 5: 1}
OPTIONS = [dict(), dict(z_loss=0.01), dict(softcap=1.5), dict(z_loss=0.01, softcap=1.5)]


def by_logits(hidden, weight, targets, mask=None, *, z_loss=0.0, softcap=None):
    """The plain form."""
    logits = ops.einsum_f32("...d,vd->...v", hidden, weight)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return ops.cross_entropy(logits, targets, mask, z_loss=z_loss)


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def some_rows(shape):
    """(hidden, targets)"""
    return jnp.asarray(RNG.standard_normal((*shape, 6)), jnp.float32), jnp.asarray(RNG.integers(0, 11, shape))


def gradient_of(loss, targets=TARGETS32, **options):
    """jit of (hidden, weight, mask) -> ((nats, count), their gradient by nats)."""
    by_arrays = lambda hidden, weight, mask: loss(hidden, weight, targets, mask, **options)
    return jax.jit(jax.value_and_grad(by_arrays, argnums=(0, 1, 2), has_aux=True))


def linear_reference(hidden, weight, mask, z_loss=0.0, softcap=None):
    """((nats, count), gradient by hidden, weight and mask) in float64, the gradient written out."""
    products = hidden @ weight.T
    logits = softcap * np.tanh(products / softcap) if softcap else products
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(11)[TARGETS]
    nats = (log_z - (logits * one_hot).sum(-1, keepdims=True) + z_loss * log_z**2)[..., 0]
    d_logits = (np.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - one_hot) * mask[..., None]
    d_products = d_logits * (1 - (logits / softcap) ** 2) if softcap else d_logits
    d_weight = np.einsum("btv,btd->vd", d_products, hidden)
    return ((nats * mask).sum(), mask.sum()), (d_products @ weight, d_weight, nats * (mask != 0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_elements", CHUNKS.values(), ids=CHUNKS)
def test_linear_equals_float64(chunk_elements, options):
    options = options | dict(chunk_elements=chunk_elements)
    actual = gradient_of(ops.linear_cross_entropy, **options)(HIDDEN32, WEIGHT32, MASK32)
    options.pop("chunk_elements")
    expected = linear_reference(HIDDEN, WEIGHT, MASK, **options)
    jax.tree.map(close, actual, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("chunk_elements", CHUNKS.values(), ids=CHUNKS)
def test_linear_without_gradient_mask_or_right_target(chunk_elements):
    loss = jax.jit(functools.partial(ops.linear_cross_entropy, chunk_elements=chunk_elements))
    (expected, count), _ = linear_reference(HIDDEN, WEIGHT, np.ones((3, 5)))
    np.testing.assert_allclose(loss(HIDDEN32, WEIGHT32, TARGETS32), (expected, count), rtol=1e-5)
    mask = np.ones((3, 5), bool)
    mask[0, 0] = False
    expected = linear_reference(HIDDEN, WEIGHT, mask.astype(float))
    actual = loss(HIDDEN32, WEIGHT32, jnp.where(mask, TARGETS32, -100), jnp.asarray(mask))
    np.testing.assert_allclose(actual, expected[0], rtol=1e-5)


@pytest.mark.parametrize("rows", [(), (7,), (2, 3, 5)], ids=str)
def test_linear_takes_rows_of_any_shape_and_its_mean_has_the_means_gradient(rows):
    def mean_of(loss):
        def mean(*arrays, **options):
            nats, count = loss(*arrays, **options)
            return nats / count, count

        return mean

    hidden, targets = some_rows(rows)
    arrays = (hidden, WEIGHT32, jnp.asarray(RNG.uniform(0.5, 2.0, rows), jnp.float32))
    expected = gradient_of(mean_of(by_logits), targets)(*arrays)
    actual = gradient_of(mean_of(ops.linear_cross_entropy), targets, chunk_elements=1)(*arrays)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("chunks, chunk_elements", CHUNKS.items(), ids=CHUNKS)
def test_linear_holds_one_chunk_and_computes_each_product_once(chunks, chunk_elements):
    def loss(hidden, weight):
        return ops.linear_cross_entropy(hidden, weight, TARGETS32, MASK32, chunk_elements=chunk_elements)

    places = -(-5 // chunks)
    for program, products in ((loss, 1), (jax.grad(loss, argnums=(0, 1), has_aux=True), 3)):
        text = str(jax.make_jaxpr(program)(HIDDEN32, WEIGHT32))
        assert text.count("dot_general[") == products
        assert ("scan[" in text) == (chunks > 1)
        assert {*re.findall(r"f32\[([\d,]+),11\]", text)} - {"6"} == {f"3,{places}"}  # [6, 11] is the weight's


def test_linear_accumulates_in_float32_whatever_the_dtype():
    """256 rows, one at a time, each of which adds as much as any other: bfloat16 sums would stand still."""
    hidden, weight = (jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16) for shape in ((256, 6), (11, 6)))
    hidden = jnp.abs(hidden)
    targets = jnp.zeros(256, jnp.int32)
    mask = jnp.ones(256)
    (nats, count), gradient = gradient_of(ops.linear_cross_entropy, targets, chunk_elements=1)(hidden, weight, mask)
    expected = gradient_of(by_logits, targets)(hidden.astype(jnp.float32), weight.astype(jnp.float32), mask)
    assert nats.dtype == count.dtype == jnp.float32
    assert [g.dtype for g in gradient] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose((nats, count), expected[0], rtol=1e-6)
    for actual, exact in zip(gradient, expected[1], strict=True):  # a bfloat16 is off by 2^-9 at most
        np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=2**-8, atol=2**-8 * np.abs(exact).max())


@pytest.mark.parametrize("chunk_elements", CHUNKS.values(), ids=CHUNKS)
def test_linear_under_vmap_of_runs_scan_of_micro_batches_and_remat(chunk_elements):
    runs = [jnp.stack([x, x + 0.5]) for x in (HIDDEN32, WEIGHT32, MASK32)]
    grad = gradient_of(ops.linear_cross_entropy, chunk_elements=chunk_elements)
    expected = [gradient_of(by_logits)(*(x[i] for x in runs)) for i in (0, 1)]
    jax.tree.map(close, jax.jit(jax.vmap(grad))(*runs), jax.tree.map(lambda *x: jnp.stack(x), *expected))

    def in_micro_batches(hidden, weight, mask):  # 3 of one row of 5 places
        @jax.checkpoint
        def add(total, micro_batch):
            hidden, targets, mask = micro_batch
            loss = ops.linear_cross_entropy(hidden, weight, targets, mask, chunk_elements=chunk_elements)
            return jax.tree.map(jnp.add, total, loss), None

        return jax.lax.scan(add, (0.0, 0.0), (hidden, TARGETS32, mask))[0]

    accumulated = jax.jit(jax.value_and_grad(in_micro_batches, argnums=(0, 1, 2), has_aux=True))
    jax.tree.map(close, accumulated(*(x[0] for x in runs)), expected[0])


ACROSS = {"sequences": ((16, 32), ("data",)), "time": ((16, 32), (None, "data")), "rows": ((128,), ("data",))}


@pytest.mark.parametrize("rows, spec", ACROSS.values(), ids=ACROSS)
def test_linear_on_eight_devices_takes_each_ones_rows_where_they_are(rows, spec):
    """Sums are added over the devices; nothing else is sent, and a chunk has a part on each device."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec(*spec)), NamedSharding(mesh, PartitionSpec())
    hidden, targets = some_rows(rows)
    chunk_elements = targets.size * 11 // 4

    def loss(hidden, weight, targets):
        return ops.linear_cross_entropy(hidden, weight, targets, chunk_elements=chunk_elements)

    program = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
        in_shardings=(split, whole, split),
        out_shardings=(whole, (split, whole)),
    )
    expected = gradient_of(by_logits, targets)(hidden, WEIGHT32, jnp.ones(rows))
    actual = program(hidden, WEIGHT32, targets)
    expected = expected[0], expected[1][:2]
    jax.tree.map(close, actual, expected)
    text = program.lower(hidden, WEIGHT32, targets).compile().as_text()
    assert "all-reduce(" in text
    assert not re.search(r"(all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", text)
    shapes = {*re.findall(r"f32\[([\d,]+),11\]", text)} - {"6"}  # [6, 11] is the weight's
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == targets.size // 4 // 8


def test_linear_needs_an_eighth_of_the_memory():
    """At GPT-2's vocabulary, by what XLA reserves beside arguments and results (which hold the gradients)."""
    like = jax.ShapeDtypeStruct
    arrays = like((8, 1024, 768), jnp.float32), like((50257, 768), jnp.float32), like((8, 1024), jnp.int32)

    def temporary_bytes(loss):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(by_logits) >= 8 * temporary_bytes(ops.linear_cross_entropy)
