"""Parameters of ours in foreign tensors."""

import json

import numpy as np
import pytest
from conftest import error_of

from llm_jax.interop import hf, tensors


def write_safetensors(folder, header, data):
    """A file with that header, whatever it says."""
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_a_safetensors_file_is_mapped_wherever_its_tensors_lie(tmp_path):
    values = np.arange(6, dtype=np.float32)
    header = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "__metadata__": {"of": "a file whose header has an odd length " + "x" * 3},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [24, 24]},
    }
    for filling in range(4):
        header["__metadata__"]["of"] += "x" * (filling > 0)
        write_safetensors(tmp_path, header, values.tobytes())
        file = hf.Safetensors(tmp_path)
        np.testing.assert_array_equal(file.read("a"), values[:4].reshape(2, 2))
        np.testing.assert_array_equal(file.read("b"), values[4:])
        assert file.read("none").shape == (0,)


@pytest.mark.parametrize("entry", [["F32", [4], [0, 16]], {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]}])
def test_a_header_of_another_form_is_an_error(entry, tmp_path):
    write_safetensors(tmp_path, {"a": entry}, bytes(16))
    assert "can't be opened as safetensors" in error_of(hf.Safetensors, tmp_path)


def test_slices_read_nothing_else():
    """Of a parameter split over devices of several processes, each takes from the file what its devices hold."""
    stacked = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    read = []

    class Layer:
        def __init__(self, layer):
            self.layer = layer

        def __getitem__(self, index):
            read.append(stacked[self.layer][index])
            return read[-1]

    slices = [(range(3), range(2), range(6)), (range(1, 3), range(2, 4), range(3, 6))]
    arrays = tensors.read_slices("blocks/attn/q", lambda path, place: Layer(*place), np.dtype(np.float64), slices)
    np.testing.assert_array_equal(arrays[0], stacked[:, :2])
    np.testing.assert_array_equal(arrays[1], stacked[1:, 2:, 3:])
    assert sum(part.size for part in read) == sum(array.size for array in arrays)
