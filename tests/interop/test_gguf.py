"""The container: both ways against the `gguf` package, and files that are wrong, by hand and by chance."""

import math
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jax.errors import InputError
from llm_jax.interop import gguf as ours
from llm_jax.interop.gguf import GGUF, read_gguf, write_gguf
from llm_jax.interop.gguf_quants import TYPES, dequantize, quantize_q8_0

METADATA = {
    "general.architecture": "llama",
    "a.text": "naïve 日本語 🙂\n",
    "an.int": 4096,
    "a.large.int": 2**32 - 1,
    "a.float": 1.5,
    "a.yes": True,
    "a.no": False,
    "tokens": ["<s>", "", "▁a", "é"],
    "scores": np.array([0, -1.5, np.inf], np.float32),
    "types": np.array([1, -3, 6], np.int32),
    "flags": np.array([True, False]),
}
SCALARS = [np.uint8(255), np.int8(-1), np.uint16(65535), np.int16(-2), np.uint32(7), np.int32(-7), np.float32(0.1)]
SCALARS += [np.uint64(2**64 - 1), np.int64(-(2**63)), np.float64(0.1), np.bool_(True)]
METADATA |= {f"scalar.{value.dtype}": value for value in SCALARS}
METADATA |= {f"array.{value.dtype}": np.array([value] * 3) for value in SCALARS}


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="gguf not installed: pip install llm_jax[llama_cpp]")


@pytest.fixture(scope="module")
def stories():
    if "LLM_JAX_ASSETS" not in os.environ:
        pytest.skip("LLM_JAX_ASSETS not set")
    return Path(os.environ["LLM_JAX_ASSETS"]) / "stories260K"


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def plain(value):
    """Metadata as both readers can be compared: arrays as lists."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def save(path, arrays, metadata=None):
    """{name: (array, type)} written by our writer."""
    tensors = [(name, array.shape, type_name) for name, (array, type_name) in arrays.items()]
    write_gguf(path, metadata or {}, tensors, iter(array for array, _ in arrays.values()))
    return path


ARRAYS = {
    "token_embd.weight": (weights(7, 64), "F32"),
    "blk.0.attn_norm.weight": (weights(5), "F32"),  # 20 bytes: padding follows
    "blk.0.attn_q.weight": (weights(3, 96, seed=1), "F16"),
    "blk.0.attn_k.weight": (weights(2, 3, 32, seed=2), "BF16"),
    "blk.0.ffn_up.weight": (weights(3, 2, 2, 64, seed=3), "Q8_0"),
    "output.weight": (weights(9, 32, seed=4), "Q8_0"),
}


def test_what_is_written_is_read(tmp_path):
    file = read_gguf(save(tmp_path / "a.gguf", ARRAYS, METADATA))
    assert {key: plain(value) for key, value in file.metadata.items()} == {k: plain(v) for k, v in METADATA.items()}
    assert list(file.metadata) == list(METADATA) and list(file.tensors) == list(ARRAYS)
    for value in file.metadata.values():
        assert type(value) in (str, int, float, bool, list, np.ndarray)
    for dtype in ("uint8", "int64", "bool", "float32"):
        assert file.metadata[f"array.{dtype}"].dtype == dtype
        assert file.metadata[f"array.{dtype}"].flags.writeable  # nothing of the file
    for name, (array, type_name) in ARRAYS.items():
        info, read = file.tensors[name], file.read(name)
        assert (info.name, info.shape, info.type) == (name, array.shape, type_name)
        _, block_length, block_bytes = TYPES[type_name]
        assert info.num_bytes == len(file.raw(name)) == array.size // block_length * block_bytes
        if type_name == "Q8_0":
            np.testing.assert_array_equal(read, dequantize(quantize_q8_0(array), "Q8_0"))
        else:
            np.testing.assert_array_equal(read, array.astype(ours.DTYPES[type_name]), strict=True)
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_plain_tensors_are_views_of_the_file_and_can_not_be_changed(tmp_path):
    file = read_gguf(save(tmp_path / "a.gguf", ARRAYS))
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        assert type(file.read(name)) is np.ndarray
        assert np.shares_memory(file.read(name), file.raw(name))
        with pytest.raises(ValueError, match="read-only"):
            file.read(name)[...] = 0
    kept = read_gguf(tmp_path / "a.gguf").read("token_embd.weight")  # outlives what it was read from
    np.testing.assert_array_equal(kept, ARRAYS["token_embd.weight"][0])


def test_a_number_and_no_tensors_can_be_stored(tmp_path):
    file = read_gguf(save(tmp_path / "a.gguf", {"x": (np.float32(3).reshape(()), "F32")}))
    assert file.tensors["x"].shape == () and file.read("x") == 3
    vocabulary = read_gguf(save(tmp_path / "b.gguf", {}, {"tokens": ["a"], "none": []}))
    assert vocabulary.metadata == {"tokens": ["a"], "none": []} and vocabulary.tensors == {}


def written_by_gguf(gguf, path, alignment=None):
    """ARRAYS and METADATA in a file of the package's writer."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    kinds = {"uint32": "UINT32", "float32": "FLOAT32", "bool": "BOOL"}
    for key, value in METADATA.items():
        array = np.asarray(value)
        kind = "STRING" if array.dtype.kind == "U" else kinds.get(str(array.dtype), str(array.dtype).upper())
        if type(value) in (int, float):
            kind = "UINT32" if type(value) is int else "FLOAT32"
        kind = gguf.GGUFValueType[kind]
        if array.ndim:
            writer.add_key_value(key, array.tolist(), gguf.GGUFValueType.ARRAY, sub_type=kind)
        elif key != "general.architecture":  # the writer's own first key
            writer.add_key_value(key, plain(value), kind)
    for name, (array, type_name) in ARRAYS.items():
        kind = gguf.GGMLQuantizationType[type_name]
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_our_file_is_the_gguf_package_s_byte_for_byte(gguf, tmp_path):
    theirs = written_by_gguf(gguf, tmp_path / "theirs.gguf")
    assert save(tmp_path / "ours.gguf", ARRAYS, METADATA).read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_is_obeyed_both_ways(gguf, tmp_path, alignment):
    theirs = written_by_gguf(gguf, tmp_path / "theirs.gguf", alignment)
    file = read_gguf(theirs)
    order = ["general.architecture", "general.alignment"]
    metadata = {key: file.metadata.get(key) for key in order} | {k: METADATA[k] for k in METADATA if k not in order}
    assert file.metadata["general.alignment"] == alignment
    assert all(info.offset % alignment == 0 for info in file.tensors.values())
    assert save(tmp_path / "ours.gguf", ARRAYS, metadata).read_bytes() == theirs.read_bytes()


def compare_with_the_package(gguf, path):
    theirs, file = gguf.GGUFReader(path), read_gguf(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: plain(value) for key, value in file.metadata.items()} == fields
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = file.tensors[tensor.name]
        assert (info.type, list(info.shape)) == (tensor.tensor_type.name, tensor.shape.tolist()[::-1])
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        np.testing.assert_array_equal(file.raw(tensor.name), tensor.data.view(np.uint8).ravel())
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        np.testing.assert_array_equal(file.read(tensor.name).astype(np.float32), values, strict=True)


def test_the_package_reads_what_we_write(gguf, tmp_path):
    compare_with_the_package(gguf, save(tmp_path / "a.gguf", ARRAYS, METADATA))


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_published_files(gguf, stories, kind):
    compare_with_the_package(gguf, stories / f"stories260K-{kind}.gguf")


def test_a_published_file_is_the_same_when_copied(stories, tmp_path):
    file = read_gguf(stories / "stories260K-f32.gguf")
    tensors = [(info.name, info.shape, info.type) for info in file.tensors.values()]
    write_gguf(tmp_path / "copy.gguf", file.metadata, tensors, map(file.read, file.tensors))
    copy = read_gguf(tmp_path / "copy.gguf")
    assert {k: plain(v) for k, v in copy.metadata.items()} == {k: plain(v) for k, v in file.metadata.items()}
    for name in file.tensors:
        np.testing.assert_array_equal(copy.read(name), file.read(name))


def test_quantizing_the_published_floats_gives_the_published_q8_0(stories, tmp_path):
    file, published = read_gguf(stories / "stories260K-f32.gguf"), read_gguf(stories / "stories260K-q8_0.gguf")
    tensors = [(info.name, info.shape, info.type) for info in published.tensors.values()]
    assert {kind for _, _, kind in tensors} == {"F32", "F16", "Q8_0"}
    write_gguf(tmp_path / "q8_0.gguf", published.metadata, tensors, map(file.read, published.tensors))
    copy = read_gguf(tmp_path / "q8_0.gguf")
    for name in published.tensors:
        np.testing.assert_array_equal(copy.raw(name), published.raw(name))


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_is_read_from_a_file(tmp_path, type_name):
    _, block_length, block_bytes = TYPES[type_name]
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 2 * block_bytes), np.uint8)
    path = tmp_path / "a.gguf"
    x = tensor("x", (2 * block_length, 3, 2), TYPES[type_name].ggml_id, 0)
    path.write_bytes(build(tensors=[x], data=raw.tobytes()))
    file = read_gguf(path)
    assert file.tensors["x"].shape == (2, 3, 2 * block_length) and file.tensors["x"].type == type_name
    np.testing.assert_array_equal(file.raw("x"), raw.ravel())
    if block_length == 1:
        expected = raw.view({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[type_name])
    else:
        expected = dequantize(raw, type_name)
    np.testing.assert_array_equal(file.read("x"), expected, strict=True)


def test_version_2_and_bools_that_are_not_one(tmp_path):
    path = tmp_path / "a.gguf"
    keys = [key("yes", 7, b"\x02"), key("no", 7, b"\x00"), array("bools", 7, 3, b"\x00\x01\xff")]
    path.write_bytes(build(keys, [tensor("x", (2,), 0, 0)], struct.pack("<2f", 1, 2), version=2))
    file = read_gguf(path)
    assert (file.metadata["yes"], file.metadata["no"]) == (True, False)
    bools = file.metadata["bools"]
    assert bools.dtype == bool and bools.view(np.uint8).tolist() == [0, 1, 1]
    assert file.read("x").tolist() == [1, 2]


# A writer of headers of its own, which lets anything be wrong.


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def key(name, type_id, payload):
    return text(name) + struct.pack("<I", type_id) + payload


def array(name, type_id, count, payload):
    return key(name, 9, struct.pack("<IQ", type_id, count) + payload)


def tensor(name, dims, type_id, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def build(keys=(), tensors=(), data=b"", *, version=3, num_keys=None, num_tensors=None, alignment=32):
    counts = [len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys]
    header = b"GGUF" + struct.pack("<I2Q", version, *counts) + b"".join([*keys, *tensors])
    return header.ljust(-(-len(header) // alignment) * alignment, b"\0") + data


X = tensor("x", (8,), 0, 0)
GOOD = build([key("a", 4, b"\0\0\0\0")], [X], bytes(32))
HUGE = 2**64 - 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"GG", "the first word at byte 0 needs 4 bytes, and 2 of the file are left"),
        (b"PK\x03\x04" + bytes(99), r"begins with b'PK\\x03\\x04', not b'GGUF'"),
        (b"GGUF\x03", "the version at byte 4 needs 4 bytes"),
        (b"GGUF\0\0\0\x03" + bytes(99), "big-endian"),
        (build(version=1), "of version 1, and versions 2 and 3 are read"),
        (build(version=0), "of version 0"),
        (build(version=4), "of version 4"),
        (build()[:20], "the number of keys at byte 16 needs 8 bytes, and 4"),
        (build(num_tensors=HUGE), f"holds {HUGE} tensors, and at most 16384"),
        (build(num_keys=16385), "holds 16385 keys, and at most 16384"),
        (build(num_keys=10), "10 keys at byte 24 needs 130 bytes, and 8"),
        (build(num_tensors=2), "2 tensors at byte 24 needs 48 bytes, and 8"),
        (build([text(b"a" * 20)])[:52], "key 'aaaaaaaaaaaaaaaaaaaa' at byte 52 needs 4 bytes"),
        (build([struct.pack("<Q", HUGE) + bytes(9)]), f"name of key 0 at byte 24 needs {HUGE + 8} bytes"),
        (build([text(b"\xff\xfe") + bytes(9)]), "name of key 0 at byte 24 is no UTF-8"),
        (build([key("a", 8, text(b"\xc3("))]), "key 'a' at byte 37 is no UTF-8"),
        (build([key("a", 8, struct.pack("<Q", 2**63))]), f"key 'a' at byte 37 needs {2**63 + 8} bytes"),
        (build([key("a\nb", 13, bytes(8))]), r"key 'a\\nb' has a value of type 13, and there are 0 to 12"),
        (build([key("a", 0, b"\1"), key("a", 0, b"\2")]), "key 'a' is there twice"),
        (build([array("a", 9, 1, bytes(12))]), "key 'a' is an array of arrays, which are not read"),
        (build([array("a", 13, 1, bytes(12))]), "key 'a' is an array of type 13, which does not exist"),
        (build([array("a", 8, 2**61, bytes(12))]), f"key 'a' at byte 49 needs {2**64} bytes"),
        (build([array("a", 8, 4, bytes(12))]), "key 'a' at byte 49 needs 32 bytes, and 15"),
        (build([array("a", 12, 2**61, bytes(12))]), f"key 'a' at byte 49 needs {2**64} bytes"),
        (build([array("a", 8, 1, text(b"\x80"))]), "key 'a' at byte 49 is no UTF-8"),
        (build([array("a", 8, 2, text("b") + struct.pack("<Q", 99))]), "key 'a' at byte 58 needs 107 bytes, and 38"),
        (build([key("split.count", 2, b"\2\0")]), r"one part of a model in 2 files.*llama-gguf-split --merge"),
        (build([key("split.count", 8, text("two"))]), "one part of a model in 'two' files"),
        (build([key("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment is 48.*power of two"),
        (build([key("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
        (build([key("general.alignment", 4, struct.pack("<I", 4))]), "general.alignment is 4, .* from 8 to 65536"),
        (build([key("general.alignment", 4, struct.pack("<I", 1 << 17))]), "general.alignment is 131072"),
        (build([key("general.alignment", 8, text("32"))]), "general.alignment is '32'"),
        (build(tensors=[text("x") + struct.pack("<I", 5) + bytes(99)]), "tensor 'x' has 5 dimensions, and at most 4"),
        (build(tensors=[text("x") + struct.pack("<I", 2**31) + bytes(99)]), f"tensor 'x' has {2**31} dimensions"),
        (build(tensors=[text("x") + struct.pack("<I", 4) + bytes(16)]), "'x' at byte 37 needs 44 bytes, and 27"),
        (build(tensors=[tensor("x", (8, 0), 0, 0)], data=bytes(32)), r"tensor 'x' of shape \(0, 8\) is empty"),
        (build(tensors=[tensor("x", (33, 32), 8, 0)], data=bytes(2000)), "rows of 33 .* Q8_0 are multiples of 32"),
        (build(tensors=[tensor("x", (32, 256), 12, 0)], data=bytes(9999)), "rows of 32 .* Q4_K are multiples of 256"),
        (build(tensors=[tensor("x", (), 8, 0)], data=bytes(99)), "rows of 1 weights"),
        (build(tensors=[X], data=bytes(31)), "tensor 'x' ends at byte 96, and the file at 95"),
        (build(tensors=[X, X], data=bytes(64)), "tensor 'x' is there twice"),
        (build(tensors=[tensor("x", (2**32, 2**32), 0, 0)], data=bytes(64)), f"'x' ends at byte {2**66 + 96}"),
        (build(tensors=[tensor("x", (2**62,) * 4, 0, 0)], data=bytes(64)), "tensor 'x' ends at byte [0-9]{76}, "),
        (build(tensors=[tensor("x", (8,), 0, 8)], data=bytes(64)), "'x' begins at 8, no multiple of the alignment"),
        (build(tensors=[tensor("x", (8,), 0, 2**64 - 32)], data=bytes(64)), f"ends at byte {2**64 + 64}"),
        (build(tensors=[tensor("x", (8,), 77, 2**40)], data=bytes(64)), f"ends at byte {2**40 + 64}"),
        (
            build(tensors=[tensor("x", (8,), 0, 32), tensor("y", (9,), 0, 0)], data=bytes(64)),
            "tensor 'x' begins at 32, within tensor 'y', which ends at 36",
        ),
        (
            build(tensors=[tensor("x", (8,), 0, 0), tensor("y", (4,), 0, 0)], data=bytes(64)),
            "tensor 'y' begins at 0, within tensor 'x', which ends at 32",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_gguf(path)
    line = str(error.value)
    assert line.startswith(f"{path} is ") and ";" in line and "\n" not in line


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(InputError, match="a.gguf is "):
            read_gguf(path)
    path.write_bytes(GOOD)
    assert read_gguf(path).read("x").tolist() == [0] * 8


def test_a_long_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "MAX_HEADER_BYTES", 1000)
    path = tmp_path / "a.gguf"
    path.write_bytes(build([key("a", 8, text("b" * 2000))]))
    with pytest.raises(InputError, match="needs 2008 bytes, and 963 of the 1000 that a header may take are left"):
        read_gguf(path)
    path.write_bytes(build([key("a", 8, text("b"))], [tensor("x", (500,), 0, 0)], bytes(2000)))
    assert read_gguf(path).read("x").size == 500  # tensors are no header


def test_long_names_are_cut_in_messages(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build([key("é\n" * 5000, 13, bytes(8))]))
    with pytest.raises(InputError) as error:
        read_gguf(path)
    assert len(str(error.value)) < len(str(path)) + 250


def test_what_is_no_file(tmp_path):
    for path, message in ((tmp_path, "is no file"), (tmp_path / "absent.gguf", "is no file")):
        with pytest.raises(InputError, match=message):
            read_gguf(path)


@pytest.mark.parametrize("type_id, name", [(23, "IQ4_XS"), (26, "I32"), (77, "type 77")])
def test_unknown_types_are_refused_when_they_are_read(tmp_path, type_id, name):
    path = tmp_path / "a.gguf"
    path.write_bytes(build(tensors=[tensor("y", (8,), type_id, 0), tensor("x", (8,), 0, 64)], data=bytes(96)))
    file = read_gguf(path)
    assert file.tensors["y"].type == name and file.tensors["y"].num_bytes is None
    assert file.read("x").tolist() == [0] * 8
    for read in (file.read, file.raw):
        with pytest.raises(InputError, match=f"tensor 'y' is stored as {name}, .* F32, .*Q8_0, .*Q6_K"):
            read("y")


def test_other_types_have_ggml_s_names(gguf):
    assert ours.TYPE_NAMES | ours.OTHER_TYPE_NAMES == {int(kind): kind.name for kind in gguf.GGMLQuantizationType}


def test_a_tensor_that_is_not_there(tmp_path):
    file = read_gguf(save(tmp_path / "a.gguf", ARRAYS))
    with pytest.raises(InputError, match="a.gguf has no tensor 'nothing'"):
        file.read("nothing")


# Writing.


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("type_name", ours.WRITTEN_TYPES)
def test_every_float_is_written_as_every_type(tmp_path, dtype, type_name):
    """More than one chunk, transposed."""
    values = weights(96, 4096).T.astype(dtype)
    read = read_gguf(save(tmp_path / "a.gguf", {"x": (values, type_name)})).read("x")
    expected = values.astype(ours.DTYPES.get(type_name, np.float32))
    if type_name == "Q8_0":
        expected = dequantize(quantize_q8_0(expected), "Q8_0")
    np.testing.assert_array_equal(read, expected, strict=True)


@pytest.mark.parametrize(
    "type_name, value, message",
    [
        ("F16", 65520, "65520.* is too large for F16; write this tensor as F32 or BF16"),
        ("BF16", 3.4e38, r"3\.4e\+38 is too large for BF16"),
        ("F32", 1e39, r"1e\+39 is too large for F32"),
        ("Q8_0", 1e7, r"a weight of 10000000\.0 can't be stored as Q8_0"),
        ("Q8_0", np.nan, "a weight of nan can't be stored as Q8_0"),
    ],
)
def test_weights_that_a_type_can_not_hold(tmp_path, type_name, value, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    values = np.ones((2, 32), np.float64)
    values[1, 3] = value
    with pytest.raises(InputError, match=rf"a.gguf: tensor 'x': .*{message}"):
        save(path, {"x": (values, type_name)})
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("type_name", ours.DTYPES)
def test_infinity_and_nan_stay_what_they_are(tmp_path, type_name):
    values = np.array([np.inf, -np.inf, np.nan, 1], np.float32)
    read = read_gguf(save(tmp_path / "a.gguf", {"x": (values, type_name)})).read("x")
    np.testing.assert_array_equal(read.astype(np.float32), values)


@pytest.mark.parametrize(
    "shape, type_name, message",
    [
        ((3, 33), "Q8_0", "has rows of 33 weights, and those of Q8_0 are multiples of 32; write it as another type"),
        ((1, 1, 1, 1, 1), "F32", "has 5 dimensions, and at most 4 can be stored"),
        ((3, 0), "F32", r"of shape \(3, 0\) is empty"),
    ],
)
def test_shapes_that_can_not_be_stored(tmp_path, shape, type_name, message):
    with pytest.raises(InputError, match=f"a.gguf: tensor 'x' {message}"):
        write_gguf(tmp_path / "a.gguf", {}, [("x", shape, type_name)], [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "metadata, tensors, message",
    [
        ({"a": -1}, [], r"a \(-1\) is no uint32"),
        ({"a": 2**32}, [], "is no uint32"),
        ({"a": None}, [], r"a \(None\) has no type of GGUF"),
        ({"a": [1, 2]}, [], "has no type of GGUF"),
        ({"a": ["x", 2]}, [], "has no type of GGUF"),
        ({"a": np.zeros((2, 2), np.float32)}, [], "has no type of GGUF"),
        ({"a": np.zeros(2, np.float16)}, [], "has no type of GGUF"),
        ({"a": np.array(["x"])}, [], "has no type of GGUF"),
        ({"general.alignment": 33}, [], "general.alignment is 33"),
        ({}, [("x", (2,), "Q4_0")], "Q4_0 can't be written, only F32, F16, BF16, Q8_0"),
        ({}, [("x", (2,), "F32"), ("x", (2,), "F32")], "tensor 'x' is given twice"),
        ({}, [("x", (3,), "F32")], r"tensor 'x' is of shape \(2,\), and was to be \(3,\)"),
        ({}, [("x", (2,), "F32"), ("y", (2,), "F32")], "shorter"),
        ({}, [], "longer"),
    ],
)
def test_a_caller_s_mistakes(tmp_path, metadata, tensors, message):
    with pytest.raises(ValueError, match=message) as error:
        write_gguf(tmp_path / "a.gguf", metadata, tensors, [np.zeros(2, np.float32)])
    assert not isinstance(error.value, InputError) and os.listdir(tmp_path) == []


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    shape = (1024, 1024)  # 4 MiB
    tensors = [(f"x{i}", shape, type_name) for i, type_name in enumerate(["F32", "F16", "BF16", "Q8_0"] * 4)]
    tracemalloc.start()
    write_gguf(tmp_path / "a.gguf", {}, tensors, (np.ones(shape, np.float32) for _ in tensors))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The generator's next tensor while the last one is still held, and a chunk's temporaries.
    assert peak < (2 * 4 << 20) + (8 << 20)


# Hostile and damaged files.


def traced(path):
    """What `read_gguf` gives, or its InputError, and the most memory that it took."""
    tracemalloc.start()
    try:
        return read_gguf(path), tracemalloc.get_traced_memory()[1]
    except InputError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SMALL_CONSTANT = 1 << 20  # 2,000 keys or tensors as objects are half of it; 8 times as many are read at most


@pytest.mark.parametrize(
    "content",
    [
        build(num_keys=HUGE, num_tensors=HUGE),
        build(num_keys=16384, data=bytes(16384 * 13)),
        build([array("a", 8, 2**40, b"")]),
        build([array("a", 12, 2**60, b"")]),
        build([key("a", 8, struct.pack("<Q", 2**40))], data=bytes(1 << 20)),
        build([array("a", 10, 1 << 20, bytes(8 << 20))]),
        build([key("\x01" * (4 << 20), 13, b"\0")]),  # repr is 4 times as long
        build(tensors=[tensor("x", (2**40, 2**20), 8, 0)], data=bytes(1 << 20)),
        build(tensors=[tensor(f"{i:x}", (8,), 0, 32 * i) for i in range(2000)], data=bytes(64000)),
        build([key(f"{i:x}", 8, text(f"{i:o}")) for i in range(2000)]),
    ],
    ids=["counts", "zeros", "strings", "numbers", "string", "array", "name", "tensor", "tensors", "keys"],
)
def test_a_header_takes_no_more_memory_than_its_file(tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert traced(path)[1] < 2 * len(content) + SMALL_CONSTANT


def test_lists_of_strings_are_bounded_by_the_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build([array("a", 8, 100_000, b"".join(text(f"{i:x}") for i in range(100_000)))]))
    file, peak = traced(path)
    assert file.metadata["a"][-1] == f"{99_999:x}" and peak < 8 * path.stat().st_size


def small_file():
    """A bit of everything, in 1.8 kB."""
    rng = np.random.default_rng(0)
    keys = [
        key("general.architecture", 8, text("llama")),
        key("general.alignment", 4, struct.pack("<I", 32)),
        key("split.count", 2, struct.pack("<H", 1)),
        *[key(f"k{i}", i, bytes(dtype.itemsize)) for i, dtype in ours.NUMBERS.items()],
        array("tokens", 8, 3, text("<s>") + text("") + text("▁é")),
        *[array(f"a{i}", i, 2, bytes(2 * dtype.itemsize)) for i, dtype in ours.NUMBERS.items()],
    ]
    shapes = {"F32": (3, 2), "F16": (5,), "BF16": (2, 1, 2), "Q8_0": (32, 2), "Q4_1": (64,), "Q5_0": (32, 1, 1, 2)}
    shapes |= {"Q3_K": (256,), "Q4_K": (256, 1)}
    tensors, data = [], b""
    for name, dims in shapes.items():
        ggml_id, block_length, block_bytes = TYPES[name]
        tensors.append(tensor(f"blk.{name}", dims, ggml_id, len(data)))
        data += rng.bytes(math.prod(dims) // block_length * block_bytes)
        data += bytes(-len(data) % 32)
    tensors.append(tensor("other", (8,), 23, len(data)))
    return build(keys, tensors, data + bytes(32))


SMALL = small_file()
HEADER = SMALL.index(b"other") + len(tensor("other", (8,), 23, 0)) - 8
EXTREMES = [0, 1, 2, 3, 8, 9, 13, 31, 33, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
EXTREMES += [2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
PLACES = st.one_of(st.integers(0, HEADER), st.integers(0, len(SMALL)))
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("delete"), PLACES, st.integers(1, 40)),
        st.tuples(st.just("cut"), PLACES, st.none()),
        st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
        st.tuples(st.just("field"), PLACES, st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from(EXTREMES))),
        st.tuples(st.just("repeat"), PLACES, st.integers(1, 200)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(changes):
    content = bytearray(SMALL)
    for kind, place, how in changes:
        place = min(place, len(content))
        if kind == "set":
            content[place : place + len(how)] = how
        elif kind == "insert":
            content[place:place] = how
        elif kind == "delete":
            del content[place : place + how]
        elif kind == "cut":
            del content[place:]
        elif kind == "flip" and place < len(content):
            content[place] ^= 1 << how
        elif kind == "field":
            width, value = how
            content[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "repeat":
            content[place:place] = content[place : place + how]
    return bytes(content)


def check_loads_or_is_refused(path: Path, content: bytes) -> GGUF | None:
    path.write_bytes(content)
    found, peak = traced(path)
    # Some 100 objects of some 100 bytes, and what opening any file takes.
    assert peak < 2 * len(content) + (64 << 10)
    if isinstance(found, InputError):
        assert str(found).startswith(f"{path} is ") and "\n" not in str(found)
        return None
    for name, info in found.tensors.items():
        if info.num_bytes is None:
            with pytest.raises(InputError, match="can't be read here"):
                found.read(name)
        else:
            values = found.read(name)
            assert values.shape == info.shape and values.dtype == ours.DTYPES.get(info.type, np.float32)
            assert info.offset + info.num_bytes <= len(content)
    return found


def test_the_file_that_is_mutated_is_sound(tmp_path):
    file = check_loads_or_is_refused(tmp_path / "a.gguf", SMALL)
    assert len(file.metadata) == 26 and len(file.tensors) == 9
    assert sum(info.num_bytes is None for info in file.tensors.values()) == 1


@pytest.fixture(scope="module")
def mutated_file(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated") / "a.gguf"


@settings(max_examples=300, deadline=None)
@given(MUTATIONS)
def test_a_mutated_file_loads_or_is_refused(mutated_file, changes):
    check_loads_or_is_refused(mutated_file, mutated(changes))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MUTATIONS)
def test_10000_mutated_files_load_or_are_refused(mutated_file, changes):
    check_loads_or_is_refused(mutated_file, mutated(changes))


@pytest.mark.slow
def test_every_byte_of_a_header_may_be_wrong(mutated_file):
    """Set to 0 and 255, and its lowest and highest bit flipped: all places, which chance would not visit."""
    loaded = 0
    for place in range(HEADER):
        for value in {0, 255, SMALL[place] ^ 1, SMALL[place] ^ 128}:
            content = SMALL[:place] + bytes([value]) + SMALL[place + 1 :]
            loaded += check_loads_or_is_refused(mutated_file, content) is not None
    assert 0 < loaded < 4 * HEADER
