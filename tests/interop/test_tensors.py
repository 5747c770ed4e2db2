"""Parameters of ours in foreign tensors."""

import numpy as np

from llm_jax.interop import tensors


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
