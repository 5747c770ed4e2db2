"""GGUF, llama.cpp's file of one model: metadata and tensors, read without trust, written tensor by tensor.

The format: ggml/docs/gguf.md of llama.cpp, versions 2 and 3, which differ for big-endian files only. A file is
"GGUF", a version, the counts of tensors and of keys; each key with a typed value; each tensor's name, dimensions,
type and offset; then the tensors' bytes, each at a multiple of the alignment.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt8

from llm_jax.errors import InputError
from llm_jax.files import written_whole
from llm_jax.interop.gguf_quants import CHUNK, TYPES, dequantize, quantize_q8_0

MAGIC = b"GGUF"
WRITTEN_VERSION = 3
DEFAULT_ALIGNMENT = 32
# The format asks for a multiple of 8; 65536 is the largest page that a mapped file is likely to be aligned to.
ALIGNMENTS = (8, 1 << 16)
MAX_DIMS = 4
# Objects of Python take more memory than their bytes in a file: so many keys and so many tensors are some MB. The
# largest published models have some 60 keys and 3,000 tensors.
MAX_ENTRIES = 1 << 14
# A vocabulary of 262,144 tokens with its merges takes 20 MB. Text is the one thing that takes more memory than its
# part of the file: strings of Python are up to 8 times as large, short ones most.
MAX_HEADER_BYTES = 1 << 28
# The fewest bytes of a key (a name's length, a type, a value) and of a tensor (a name's length, rank, type, offset).
MIN_KEY_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
MIN_STRING_BYTES = 8

# Value types of metadata by their number in the file.
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {
    0: np.dtype(np.uint8),
    1: np.dtype(np.int8),
    2: np.dtype(np.uint16),
    3: np.dtype(np.int16),
    4: np.dtype(np.uint32),
    5: np.dtype(np.int32),
    6: np.dtype(np.float32),
    BOOL: np.dtype(np.bool_),
    10: np.dtype(np.uint64),
    11: np.dtype(np.int64),
    12: np.dtype(np.float64),
}
NUMBER_IDS = {dtype: i for i, dtype in NUMBERS.items()}

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
WRITTEN_TYPES = (*DTYPES, "Q8_0")
TYPE_NAMES = {block.ggml_id: name for name, block in TYPES.items()}
# Types that no reader is here for; named, so that a person can see what the file holds.
OTHER_TYPE_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in numpy's order, the last axis contiguous; `offset` from the file's start.

    `type` is a name of `gguf_quants.TYPES`; else, of a tensor that can't be read here, ggml's name or "type 77",
    and `num_bytes` is None.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int | None


@dataclass(frozen=True, eq=False)
class GGUF:
    """An open file, whose tensors are mapped and not read until they are asked for.

    `metadata`: str, int, float or bool; an array is a list of str or a numpy array. The file must not be cut
    while this or an array from it is in use: as with any mapped file, the process would be killed.
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    _bytes: np.ndarray = field(repr=False)

    def raw(self, name: str) -> UInt8[np.ndarray, "bytes"]:
        """A tensor's bytes as they are in the file: a view, not to be written to."""
        info = self._info(name)
        return self._bytes[info.offset : info.offset + info.num_bytes]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor of F32, F16 or BF16 as a view in that dtype, not to be written to; a quantized one as float32."""
        info, raw = self._info(name), self.raw(name)
        if info.type in DTYPES:
            return raw.view(DTYPES[info.type]).reshape(info.shape)
        rows = info.shape[:-1]
        return dequantize(raw.reshape(*rows, info.num_bytes // math.prod(rows)), info.type)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.path} has no tensor {_shown(name)}; give a file of a whole model")
        info = self.tensors[name]
        if info.num_bytes is None:
            raise InputError(
                f"{self.path}: tensor {_shown(name)} is stored as {info.type}, which can't be read here; "
                f"convert the file to one of {', '.join(TYPES)}"
            )
        return info


def read_gguf(path: str | Path) -> GGUF:
    """Opens a file of version 2 or 3, little-endian, and checks all of its header; see `GGUF`.

    Whatever is wrong with it is an InputError: a count, length or offset that the file has no room for (found before
    anything of that size is allocated), names given twice, tensors that overlap, nested arrays, text that is no
    UTF-8, one part of a split model.
    """
    path = Path(path)
    header = _Header(path, _mapped(path))
    if (magic := bytes(header.take(len(MAGIC), "the first word"))) != MAGIC:
        raise header.refusal(f"it begins with {magic!r}, not {MAGIC!r}")
    version = header.unsigned(4, "the version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            raise header.refusal("it is big-endian, and only little-endian files are read")
        raise header.refusal(f"it is of version {version}, and versions 2 and 3 are read")
    num_tensors = header.unsigned(8, "the number of tensors")
    num_keys = header.unsigned(8, "the number of keys")
    header.check_count(num_keys, MIN_KEY_BYTES, "keys")
    header.check_count(num_tensors, MIN_TENSOR_BYTES, "tensors")
    metadata = {}
    for i in range(num_keys):
        key = header.string(f"the name of key {i}")
        if key in metadata:
            raise header.refusal(f"key {_shown(key)} is there twice")
        metadata[key] = header.value(f"key {_shown(key)}")
    parts = metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise InputError(
            f"{path} is one part of a model in {_shown(parts)} files (split.count); "
            "join them with `llama-gguf-split --merge`, and give the file that it writes"
        )
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if problem := _alignment_problem(alignment):
        raise header.refusal(problem)
    tensors: dict[str, TensorInfo] = {}
    for i in range(num_tensors):
        info = header.tensor(i)
        if info.name in tensors:
            raise header.refusal(f"tensor {_shown(info.name)} is there twice")
        tensors[info.name] = info
    return GGUF(path, metadata, header.placed(tensors, alignment), header.bytes)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes version 3, one tensor in memory at a time; the file takes its name when it is whole.

    `metadata`: str, bool, int (stored as uint32), float (as float32), a numpy scalar or a numpy array of one axis
    (as their own dtype), a list of str; `general.alignment` is obeyed.
    `tensors`: name, shape in numpy's order and type of each, F32, F16, BF16 or Q8_0; `arrays`: theirs in the same
    order, of any float dtype, made one by one as this function asks for them.
    InputError: a shape that the type can't have, or a finite weight that would become infinite.
    ValueError: metadata that GGUF has no type for, arrays that are not what `tensors` says.
    """
    path = Path(path)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if problem := _alignment_problem(alignment):
        raise ValueError(problem)
    header = bytearray(MAGIC)
    header += _packed(WRITTEN_VERSION, 4) + _packed(len(tensors), 8) + _packed(len(metadata), 8)
    for key, value in metadata.items():
        header += _packed_string(key) + _packed_value(key, value)
    names, offset = set(), 0
    for name, shape, type_name in tensors:
        if type_name not in WRITTEN_TYPES:
            raise ValueError(f"tensor {_shown(name)}: {type_name} can't be written, only {', '.join(WRITTEN_TYPES)}")
        if name in names:
            raise ValueError(f"tensor {_shown(name)} is given twice")
        names.add(name)
        if problem := _shape_problem(shape, type_name):
            raise InputError(f"{path}: tensor {_shown(name)} {problem}; write it as another type")
        header += _packed_string(name) + _packed(len(shape), 4)
        header += b"".join(_packed(dim, 8) for dim in reversed(shape))
        header += _packed(TYPES[type_name].ggml_id, 4) + _packed(offset, 8)
        offset = _aligned(offset + _num_bytes(shape, type_name), alignment)
    with written_whole(path) as stream:
        stream.write(header.ljust(_aligned(len(header), alignment), b"\0"))
        for (name, shape, type_name), array in zip(tensors, arrays, strict=True):
            if array.shape != tuple(shape):
                raise ValueError(f"tensor {_shown(name)} is of shape {array.shape}, and was to be {tuple(shape)}")
            weights = array.reshape(-1)
            for start in range(0, weights.size, CHUNK):
                stream.write(_encoded(weights[start : start + CHUNK], type_name, f"{path}: tensor {_shown(name)}"))
            # The last one too: llama.cpp reads whole multiples of the alignment.
            stream.write(bytes(-_num_bytes(shape, type_name) % alignment))


class _Header:
    """Takes a header's fields in order, each only after what is left of the file has been found to hold it."""

    def __init__(self, path: Path, file_bytes: np.ndarray):
        self.path, self.bytes, self.at = path, file_bytes, 0
        self._view = memoryview(file_bytes)
        self._end = min(len(file_bytes), MAX_HEADER_BYTES)

    def refusal(self, problem: str) -> InputError:
        return InputError(f"{self.path} is no GGUF file that can be read: {problem}; download or convert it again")

    def check_room(self, num_bytes: int, what: str) -> None:
        left = self._end - self.at
        if num_bytes > left:
            room = "of the file" if self._end == len(self.bytes) else f"of the {self._end} that a header may take"
            raise self.refusal(f"{what} at byte {self.at} needs {num_bytes} bytes, and {left} {room} are left")

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count > MAX_ENTRIES:
            raise self.refusal(f"it says that it holds {count} {what}, and at most {MAX_ENTRIES} are read")
        self.check_room(count * min_bytes, f"{count} {what}")

    def take(self, num_bytes: int, what: str) -> memoryview:
        self.check_room(num_bytes, what)
        self.at += num_bytes
        return self._view[self.at - num_bytes : self.at]

    def unsigned(self, num_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(num_bytes, what), "little")

    def strings(self, count: int, what: str) -> list[str]:
        """A loop without calls: a vocabulary and its merges are some 500,000 of them."""
        self.check_room(count * MIN_STRING_BYTES, what)
        view, end, found = self._view, self._end, []
        try:
            for _ in range(count):
                start = self.at + 8
                stop = start + int.from_bytes(view[self.at : start], "little")
                if stop > end:
                    self.check_room(stop - self.at, what)
                found.append(str(view[start:stop], "utf-8"))
                self.at = stop
        except UnicodeDecodeError:
            raise self.refusal(f"{what} at byte {self.at} is no UTF-8") from None
        return found

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def numbers(self, count: int, type_id: int, what: str) -> np.ndarray:
        dtype = NUMBERS[type_id]
        taken = self.take(count * dtype.itemsize, what)
        if type_id == BOOL:  # a byte that is neither 0 nor 1 would be no bool of numpy's
            return np.frombuffer(taken, np.uint8) != 0
        return np.frombuffer(taken, dtype.newbyteorder("<")).astype(dtype)

    def value(self, what: str) -> Any:
        type_id = self.unsigned(4, what)
        if type_id == STRING:
            return self.string(what)
        if type_id in NUMBERS:
            return self.numbers(1, type_id, what)[0].item()
        if type_id != ARRAY:
            raise self.refusal(f"{what} has a value of type {type_id}, and there are 0 to {max(NUMBERS)}")
        item_id, count = self.unsigned(4, what), self.unsigned(8, what)
        if item_id == STRING:
            return self.strings(count, what)
        if item_id in NUMBERS:
            return self.numbers(count, item_id, what)
        nested = "arrays, which are not read" if item_id == ARRAY else f"type {item_id}, which does not exist"
        raise self.refusal(f"{what} is an array of {nested}")

    def tensor(self, i: int) -> TensorInfo:
        """The next tensor, its offset still from the start of the data."""
        name = self.string(f"the name of tensor {i}")
        what = f"tensor {_shown(name)}"
        num_dims = self.unsigned(4, what)
        if num_dims > MAX_DIMS:  # before their numbers are made objects
            raise self.refusal(f"{what} has {num_dims} dimensions, and at most {MAX_DIMS} are read")
        layout = f"<{num_dims}QIQ"
        *dims, type_id, offset = struct.unpack(layout, self.take(struct.calcsize(layout), what))
        shape = tuple(reversed(dims))
        type_name = TYPE_NAMES.get(type_id)
        if problem := _shape_problem(shape, type_name):
            raise self.refusal(f"{what} {problem}")
        if type_name is None:
            return TensorInfo(name, shape, OTHER_TYPE_NAMES.get(type_id, f"type {type_id}"), offset, None)
        return TensorInfo(name, shape, type_name, offset, _num_bytes(shape, type_name))

    def placed(self, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """The tensors with offsets from the start of the file, each inside it and after the one before it."""
        data = _aligned(self.at, alignment)
        file_bytes, previous, end = len(self.bytes), None, 0
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            what, stop = f"tensor {_shown(info.name)}", info.offset + (info.num_bytes or 0)
            if info.offset % alignment:
                raise self.refusal(f"{what} begins at {info.offset}, no multiple of the alignment, {alignment}")
            if data + stop > file_bytes:
                raise self.refusal(f"{what} ends at byte {data + stop}, and the file at {file_bytes}")
            if info.offset < end:
                raise self.refusal(f"{what} begins at {info.offset}, within {previous}, which ends at {end}")
            previous, end = what, stop
        return {
            info.name: TensorInfo(info.name, info.shape, info.type, data + info.offset, info.num_bytes)
            for info in tensors.values()
        }


def _mapped(path: Path) -> np.ndarray:
    remedy = "give a .gguf file"
    try:
        if not path.is_file():
            raise InputError(f"{path} is no file; {remedy}")
        if not path.stat().st_size:
            raise InputError(f"{path} is empty; {remedy}")
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); {remedy}") from None


def _shown(value: Any) -> str:
    """A value of a file as part of a line of ours: no line break, and not too long."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:70]}…"


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _alignment_problem(alignment: Any) -> str | None:
    low, high = ALIGNMENTS
    if isinstance(alignment, int) and low <= alignment <= high and not alignment & (alignment - 1):
        return None
    return f"general.alignment is {_shown(alignment)}, and must be a power of two from {low} to {high}"


def _shape_problem(shape: Sequence[int], type_name: str | None) -> str | None:
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dimensions, and at most {MAX_DIMS} can be stored"
    if not all(shape):
        return f"of shape {tuple(shape)} is empty"
    if type_name is not None:
        row_length, block_length = shape[-1] if shape else 1, TYPES[type_name].block_length
        if row_length % block_length:
            return f"has rows of {row_length} weights, and those of {type_name} are multiples of {block_length}"
    return None


def _num_bytes(shape: Sequence[int], type_name: str) -> int:
    block = TYPES[type_name]
    return math.prod(shape) // block.block_length * block.block_bytes


def _packed(number: int, num_bytes: int) -> bytes:
    return number.to_bytes(num_bytes, "little")


def _packed_string(text: str) -> bytes:
    encoded = text.encode()
    return _packed(len(encoded), 8) + encoded


def _packed_value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _packed(STRING, 4) + _packed_string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        header = _packed(ARRAY, 4) + _packed(STRING, 4) + _packed(len(value), 8)
        return header + b"".join(map(_packed_string, value))
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise ValueError(f"{key} ({value}) is no uint32; give a numpy scalar of the type that is meant")
        value = np.uint32(value)
    elif isinstance(value, float) and not isinstance(value, np.float64):
        value = np.float32(value)
    if not isinstance(value, np.generic | np.ndarray) or value.dtype not in NUMBER_IDS or value.ndim > 1:
        raise ValueError(f"{key} ({_shown(value)}) has no type of GGUF; give str, bool, int, float or numpy numbers")
    type_id = NUMBER_IDS[value.dtype]
    numbers = value.astype(value.dtype.newbyteorder("<")).tobytes()
    if value.ndim == 0:
        return _packed(type_id, 4) + numbers
    return _packed(ARRAY, 4) + _packed(type_id, 4) + _packed(value.size, 8) + numbers


def _encoded(weights: np.ndarray, type_name: str, what: str) -> UInt8[np.ndarray, "bytes"]:
    if type_name == "Q8_0":
        try:
            return quantize_q8_0(weights)
        except InputError as error:
            raise InputError(f"{what}: {error}") from None
    with np.errstate(over="ignore"):
        encoded = np.ascontiguousarray(weights, DTYPES[type_name])
    lost = ~np.isfinite(encoded)
    lost &= np.isfinite(weights)
    if lost.any():
        raise InputError(f"{what}: {weights[lost][0]} is too large for {type_name}; write this tensor as F32 or BF16")
    return encoded.view(np.uint8)
