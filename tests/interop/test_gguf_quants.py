"""Against the `gguf` package, bit for bit, and by hand where it is not installed."""

import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest

from llm_jax.errors import InputError
from llm_jax.interop.gguf_quants import CHUNK, TYPES, dequantize, quantize_q8_0

QUANTIZED = [name for name, block in TYPES.items() if block.block_length > 1]
QUANTIZED_TYPES = pytest.mark.parametrize("type_name", QUANTIZED)


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="gguf not installed: pip install llm_jax[llama_cpp]")


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def half(value):
    return list(np.float16(value).tobytes())


def test_types_are_ggml_s(gguf):
    for name, block in TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert block == (theirs, *gguf.GGML_QUANT_SIZES[theirs])
    assert QUANTIZED == "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split()


@QUANTIZED_TYPES
@pytest.mark.parametrize("rows, blocks", [((), 1), ((3, 5), 2), ((2, 700), 8)])
def test_random_bytes_become_the_oracle_s_floats(gguf, type_name, rows, blocks):
    """Scales of infinity and NaN among them; the last shape is of several chunks with K-quants."""
    ggml_id, block_length, block_bytes = TYPES[type_name]
    raw = random_bytes(*rows, blocks * block_bytes)
    with np.errstate(all="ignore"):
        # The oracle's loop over groups of rows has no case for a tensor of one axis.
        theirs = gguf.quants.dequantize(raw.reshape(-1, raw.shape[-1]), gguf.GGMLQuantizationType(ggml_id))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = dequantize(raw, type_name)
    assert ours.shape == (*rows, blocks * block_length) and ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32).ravel(), theirs.view(np.uint32).ravel())
    if len(rows) == 2 and blocks == 8:
        assert not np.isfinite(ours).all()
        assert block_length == 32 or ours.size > 2 * CHUNK


@pytest.mark.parametrize(
    "type_name, block, weights",
    [
        ("Q8_0", [*half(0.5), *range(32)], np.arange(32) * 0.5),
        ("Q8_0", [*half(-2), *[0x80] * 32], np.full(32, 256)),
        # Low nibbles are the first half of a block, high ones the second.
        ("Q4_0", [*half(2), *[0xF8] * 16], [0] * 16 + [14] * 16),
        ("Q4_1", [*half(2), *half(-1), *[0x31] * 16], [1] * 16 + [5] * 16),
        ("Q5_0", [*half(1), 0xFF, 0xFF, 0, 0, *[0x21] * 16], [1] * 16 + [-14] * 16),
        ("Q5_1", [*half(1), *half(3), 0, 0, 0xFF, 0xFF, *[0x21] * 16], [4] * 16 + [21] * 16),
    ],
)
def test_blocks_by_hand(type_name, block, weights):
    np.testing.assert_array_equal(dequantize(np.array(block, np.uint8), type_name), np.float32(weights))


@QUANTIZED_TYPES
def test_rows_that_are_strided_or_read_only_are_taken(type_name):
    raw = random_bytes(4, 2 * TYPES[type_name].block_bytes)
    strided = np.asfortranarray(raw)
    strided.flags.writeable = False
    np.testing.assert_array_equal(dequantize(strided, type_name), dequantize(raw, type_name))


@QUANTIZED_TYPES
def test_dequantizing_takes_little_memory_beside_its_result(type_name):
    _, block_length, block_bytes = TYPES[type_name]
    raw = random_bytes(64, 8 * CHUNK // 64 // block_length * block_bytes)
    tracemalloc.start()
    weights = dequantize(raw, type_name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weights.size == 8 * CHUNK and peak < weights.nbytes + (8 << 20)


def hard_weights():
    """Rows of 256: ordinary, on the halves between two steps, tiny, zero, and with the largest scale there is."""
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal((2000, 256)) * np.exp(rng.uniform(-20, 12, (2000, 1)))
    halves = rng.integers(-254, 255, (100, 256)) / 2
    halves[:, ::32] = 127  # d = 1
    tiny = rng.integers(0, 1000, (20, 256)) * 2.0**-149
    zeros = np.zeros((1, 256))
    largest = np.full((1, 256), 127 * 65504)
    return np.concatenate([ordinary, halves, -halves, halves / 3, tiny, zeros, -zeros, largest]).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_q8_0_is_the_oracle_s(gguf, dtype):
    weights = hard_weights()
    if dtype != np.float32:  # which would be infinite, or rounded up
        weights = weights[np.abs(weights).max(axis=1) < 60000]
    weights = weights.astype(dtype)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(weights.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(quantize_q8_0(weights), theirs)


def test_q8_0_is_within_half_a_step():
    weights = np.random.default_rng(0).standard_normal((3, 5, 64), np.float32)
    raw = quantize_q8_0(weights)
    assert raw.shape == (3, 5, 68)
    largest = np.abs(weights.reshape(-1, 32)).max(axis=1, keepdims=True)
    # Half of d, and 127 times the error of d's rounding to the 11 bits of a float16.
    error = np.abs(dequantize(raw, "Q8_0") - weights).reshape(-1, 32)
    assert (error <= largest / 127 / 2 + largest * 2**-11).all()
    assert error.max() > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 127 * 65536.0])
def test_q8_0_of_what_it_can_not_hold(value):
    weights = np.ones((2, 64), np.float32)
    weights[1, 40] = value
    with warnings.catch_warnings(), pytest.raises(InputError, match=rf"a weight of {abs(value)} .*float16.*F32"):
        warnings.simplefilter("error")
        quantize_q8_0(weights)


def test_unknown_types_are_told_the_known_ones():
    for name in ("IQ4_XS", "F32", "q8_0"):
        with pytest.raises(InputError, match=f"{name} is no quantized type.*Q8_0, Q4_0, .*Q6_K"):
            dequantize(random_bytes(34), name)


def test_rows_end_with_a_block():
    with pytest.raises(ValueError, match="row of 35 bytes must be a multiple of 34"):
        dequantize(random_bytes(2, 35), "Q8_0")
    with pytest.raises(ValueError, match="row of 33 weights must be a multiple of 32"):
        quantize_q8_0(np.ones((32, 33), np.float32))
