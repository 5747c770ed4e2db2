"""ggml's block formats: tensors of 2 to 8 bits a weight made float32, and float32 made Q8_0.

A row is cut into blocks of 32 weights, or of 256 for the K-quants, each with its own scale. The layouts are those of
the structs in llama.cpp's ggml/src/ggml-common.h; the arithmetic is float32, in the order of the `gguf` package,
so that results equal its bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from llm_jax.errors import InputError

# Weights taken at a time: their float32 are 1 MiB, so that they and what leads to them stay in a core's cache.
CHUNK = 1 << 18


class BlockType(NamedTuple):
    """A ggml type: its number in files, the weights of one block and the bytes that these take."""

    ggml_id: int
    block_length: int
    block_bytes: int


TYPES = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "BF16": BlockType(30, 1, 2),
    "Q8_0": BlockType(8, 32, 34),
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
}


def dequantize(raw: UInt8[np.ndarray, "*rows bytes"], type_name: str) -> Float32[np.ndarray, "*rows weights"]:
    """The weights of quantized rows, each a whole number of blocks of `type_name`: Q8_0, Q4_0 … Q6_K of `TYPES`.

    A scale that is infinite or NaN makes its block so, without a warning. A type that is not quantized or not known
    is an InputError, rows that end within a block a ValueError.
    """
    if type_name not in _DECODERS:
        raise InputError(f"{type_name} is no quantized type known here; there are {', '.join(_DECODERS)}")
    _, block_length, block_bytes = TYPES[type_name]
    *rows, row_bytes = raw.shape
    if row_bytes % block_bytes:
        raise ValueError(f"a row of {row_bytes} bytes must be a multiple of {block_bytes}, a block of {type_name}")
    blocks = raw.reshape(-1, block_bytes)
    weights = np.empty((len(blocks), block_length), np.float32)
    step = CHUNK // block_length
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            some = slice(start, start + step)
            weights[some] = _DECODERS[type_name](blocks[some]).reshape(-1, block_length)
    return weights.reshape(*rows, row_bytes // block_bytes * block_length)


def quantize_q8_0(weights: Float[np.ndarray, "*rows weights"]) -> UInt8[np.ndarray, "*rows bytes"]:
    """Q8_0 of rows whose length is a multiple of 32: q = round(x / d), d = max|x| / 127 of each block in float16.

    Halves are rounded away from zero, and q is found with d before its own rounding, as ggml does. A block whose d
    is no finite float16 is an InputError: max|x| past 8.3e6, infinity, NaN.
    """
    _, block_length, block_bytes = TYPES["Q8_0"]
    *rows, row_length = weights.shape
    if row_length % block_length:
        raise ValueError(f"a row of {row_length} weights must be a multiple of {block_length}, a block of Q8_0")
    blocks = weights.reshape(-1, block_length)
    raw = np.empty((len(blocks), block_bytes), np.uint8)
    step = CHUNK // block_length
    for start in range(0, len(blocks), step):
        some = slice(start, start + step)
        raw[some] = _encode_q8_0(blocks[some].astype(np.float32))
    return raw.reshape(*rows, row_length // block_length * block_bytes)


def _encode_q8_0(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(axis=1, keepdims=True)
    d = largest / np.float32(127)
    with np.errstate(over="ignore", divide="ignore"):
        stored, inverse = d.astype("<f2"), 1 / d
    if not np.isfinite(stored).all():
        raise InputError(
            f"a weight of {largest[~np.isfinite(stored)][0]} can't be stored as Q8_0, whose scale is a float16; "
            "store this tensor as F32 or BF16"
        )
    # 0 has no inverse, nor have the least of float32's subnormals, which are 0 as float16.
    scaled = x * np.where(np.isfinite(inverse), inverse, 0)
    whole = np.trunc(scaled)
    q = (whole + np.trunc(2 * (scaled - whole))).astype(np.int8)
    return np.concatenate([stored.view(np.uint8), q.view(np.uint8)], axis=1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """[blocks, 1] float32 of the float16 at byte `at` of each block."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _bit_fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """[..., k] bytes -> [..., 8 / bits, k]: all lowest fields first, then those above them."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8(2**bits - 1)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return _bit_fields(packed, 4).reshape(len(packed), -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """[blocks, 4] bytes -> [blocks, 32], bit i of a block's 32 as the fifth bit of its weight i."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _signed(q: np.ndarray, zero: int) -> np.ndarray:
    """float32 of q - zero, where q is unsigned and both are below 128."""
    return (q.view(np.int8) - np.int8(zero)).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _signed(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


# K-quants: 256 weights in groups of 16 or 32, whose own scales are small integers times the block's float16.


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    scales, minima = (_bit_fields(blocks[:, :16], 4)[:, i, :, None].astype(np.float32) for i in (0, 1))
    q = _bit_fields(blocks[:, 16:80].reshape(n, 2, 32), 2).reshape(n, 16, 16)
    scales, minima = _half(blocks, 80)[..., None] * scales, _half(blocks, 82)[..., None] * minima
    return scales * q.astype(np.float32) - minima


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    scale_low = _bit_fields(blocks[:, 96:104], 4).reshape(n, 16)
    scale_high = _bit_fields(blocks[:, 104:108], 2).reshape(n, 16)
    scales = _half(blocks, 108) * _signed(scale_low | scale_high << 4, 32)
    low = _bit_fields(blocks[:, 32:96].reshape(n, 2, 32), 2).reshape(n, 16, 16)
    high = _bit_fields(blocks[:, :32], 1).reshape(n, 16, 16)
    return scales[..., None] * _signed(low | high << 2, 4)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[blocks, 8, 1] each, of Q4_K and Q5_K: eight scales and eight minima of 6 bits in 12 bytes."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=1)
    scales, minima = _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * minima.astype(np.float32)
    return scales[..., None], minima[..., None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    scales, minima = _scales_and_minima(blocks)
    q = _bit_fields(blocks[:, 16:].reshape(n, 4, 32), 4).reshape(n, 8, 32)
    return scales * q.astype(np.float32) - minima


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    scales, minima = _scales_and_minima(blocks)
    low = _bit_fields(blocks[:, 48:].reshape(n, 4, 32), 4).reshape(n, 8, 32)
    q = low | _bit_fields(blocks[:, 16:48], 1) << 4
    return scales * q.astype(np.float32) - minima


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    n = len(blocks)
    low = _bit_fields(blocks[:, :128].reshape(n, 2, 64), 4).reshape(n, 16, 16)
    high = _bit_fields(blocks[:, 128:192].reshape(n, 2, 32), 2).reshape(n, 16, 16)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales[..., None] * _signed(low | high << 4, 32)


_DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
