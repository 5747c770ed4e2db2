import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax import data
from llm_jax.data import Batch, eval_batches, train_batches
from llm_jax.errors import InputError

TOKENS = np.arange(1003, dtype=np.uint16)  # each token tells its place


def starts(batches, first_sample, count, batch_size):
    """Where the windows of samples first_sample, ... begin."""
    samples = range(first_sample, first_sample + count)
    return [int(batches[i // batch_size].tokens[i % batch_size, 0]) for i in samples]


def test_batch_shapes_and_targets():
    batch = train_batches(TOKENS, block_size=10, batch_size=4, seed=0)[0]
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == (4, 10)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.mask.dtype) == (np.int32, np.int32, np.float32)
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
    assert np.diff(batch.tokens).min() == np.diff(batch.tokens).max() == 1
    assert batch.mask.min() == 1


@pytest.mark.parametrize("few_windows", [0, 1000], ids=["grain's shuffle", "few windows"])
def test_batch_depends_on_seed_and_step_alone(monkeypatch, few_windows):
    monkeypatch.setattr(data, "FEW_WINDOWS", few_windows)

    def make(seed):
        return train_batches(TOKENS, block_size=10, batch_size=4, seed=seed)

    in_order, out_of_order = make(5), make(5)
    expected = [in_order[step] for step in range(120)]
    for step in (119, 3, 60, 3, 0, 100):
        np.testing.assert_array_equal(out_of_order[step].tokens, expected[step].tokens)
    np.testing.assert_array_equal(make(5)[77].tokens, expected[77].tokens)
    assert any((make(6)[step].tokens != expected[step].tokens).any() for step in range(3))
    make(0)[10**9], make(2**40)[0]  # any seed, any step


def test_neighbouring_seeds_share_no_epoch(monkeypatch):
    """grain's own epochs are seed, seed + 1, ..."""
    monkeypatch.setattr(data, "FEW_WINDOWS", 0)
    num_windows, orders = (len(TOKENS) - 10) // 10, set()
    for seed in range(5):
        batches = train_batches(TOKENS, block_size=10, batch_size=1, seed=seed)
        for epoch in range(5):
            found = np.array(starts(batches, epoch * num_windows, num_windows, 1))
            orders.add(tuple(found // 10))
    assert len(orders) == 25


def test_batch_does_not_depend_on_the_process():
    program = (
        "import numpy as np; from llm_jax.data import train_batches;"
        "b = train_batches(np.arange(1003), block_size=10, batch_size=4, seed=5);"
        "print(b[77].tokens[:, 0].tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "3"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    here = train_batches(TOKENS, block_size=10, batch_size=4, seed=5)[77].tokens[:, 0].tolist()
    assert json.loads(found.stdout) == here


@pytest.mark.parametrize("few_windows", [0, 1000], ids=["grain's shuffle", "few windows"])
def test_an_epoch_is_a_permutation_of_shifted_windows(monkeypatch, few_windows):
    monkeypatch.setattr(data, "FEW_WINDOWS", few_windows)
    block_size, batch_size, num_windows = 10, 4, (len(TOKENS) - 10) // 10  # 99: epochs end inside batches
    batches = train_batches(TOKENS, block_size=block_size, batch_size=batch_size, seed=1)
    orders, offsets = [], []
    for epoch in range(20):
        found = np.array(starts(batches, epoch * num_windows, num_windows, batch_size))
        (offset,) = set(found % block_size)
        assert sorted(found) == list(range(offset, offset + num_windows * block_size, block_size))
        orders.append(tuple(found // block_size))
        offsets.append(offset)
    assert len(set(orders)) == 20  # another permutation each time
    assert len(set(offsets)) > 5 and max(offsets) > 6 and min(offsets) < 3
    assert offsets[0] or offsets[1]


@pytest.mark.parametrize("length", [11, 12, 19, 20, 21, 25, 30, 31])
def test_short_corpora(length):
    batches = train_batches(TOKENS[:length], block_size=10, batch_size=1, seed=0)
    num_windows = max(1, (length - 10) // 10)
    found = [starts(batches, epoch * num_windows, num_windows, 1) for epoch in range(200)]
    offsets = {start % 10 if num_windows > 1 else start for start in itertools.chain(*found)}
    assert all(start + 10 < length for start in itertools.chain(*found))
    assert offsets == set(range(min(10, length - 10 * num_windows)))


@pytest.mark.parametrize("length", [800, 4_000_000])
def test_training_batches_are_cheap(length):
    batches = train_batches(np.zeros(length, np.uint16), block_size=256, batch_size=16, seed=0)
    batches[0]
    start = time.thread_time()
    for step in range(200):
        batches[step]
    # 0.25 ms measured; of this thread's own time, whatever else the machine does
    assert (time.thread_time() - start) / 200 < 2e-3


@pytest.mark.parametrize("length", [2, 10, 11, 12, 21, 40, 41, 42, 81, 1003])
def test_every_token_after_the_first_is_predicted_once(length):
    batches = eval_batches(TOKENS[:length], block_size=10, batch_size=4)
    assert len(batches) == -(-(length - 1) // 40) == len(list(batches))
    targets = []
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == (4, 10)
        assert (batch.tokens.dtype, batch.targets.dtype, batch.mask.dtype) == (np.int32, np.int32, np.float32)
        seen = batch.mask == 1
        assert set(np.unique(batch.mask)) <= {0, 1}
        np.testing.assert_array_equal(batch.targets[seen], batch.tokens[seen] + 1)
        targets += batch.targets[seen].tolist()
    assert targets == list(range(1, length))
    np.testing.assert_array_equal(batches[-1].mask, batch.mask)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_max_batches_is_a_fixed_evenly_spaced_part():
    batches = eval_batches(TOKENS, block_size=10, batch_size=4, max_batches=5)
    assert len(batches) == 5
    found = np.concatenate([batch.tokens[:, 0] for batch in batches])
    assert all(batch.mask.min() == 1 for batch in batches)
    assert found[0] == 0 and set(np.diff(found)) == {50}  # 100 full windows, every fifth
    again = eval_batches(TOKENS, block_size=10, batch_size=4, max_batches=5)
    np.testing.assert_array_equal(again[3].tokens, batches[3].tokens)
    uneven = eval_batches(TOKENS, block_size=10, batch_size=4, max_batches=7)
    found = np.concatenate([batch.tokens[:, 0] for batch in uneven])
    assert set(np.diff(found)) == {30, 40} and found[-1] >= 950
    everything = eval_batches(TOKENS, block_size=10, batch_size=4, max_batches=1000)
    assert sum(batch.mask.sum() for batch in everything) == len(TOKENS) - 1


def test_too_few_tokens_for_a_context():
    with pytest.raises(InputError, match="8 tokens.* 9;.* smaller model.block_size"):
        train_batches(np.arange(8), block_size=8, batch_size=1, seed=0)
    train_batches(np.arange(9), block_size=8, batch_size=1, seed=0)
    with pytest.raises(InputError, match="1 tokens.* larger data.val_fraction"):
        eval_batches(np.arange(1), block_size=8, batch_size=1)
    eval_batches(np.arange(2), block_size=8, batch_size=1)


@pytest.mark.parametrize("rows", [[0, 1], [2], [0, 3]])
def test_rows_of_a_batch_are_those_of_the_whole_batch(rows):
    """What each of several processes reads: together all, and none twice."""
    shape = dict(block_size=10, batch_size=4)
    for make in (
        lambda **of: train_batches(TOKENS, **shape, seed=0, **of),
        lambda **of: eval_batches(TOKENS, **shape, **of),
    ):
        whole, part = make(), make(rows=rows)
        assert len(whole) == len(part)
        last = min(len(whole), 60) - 1  # of the evaluation's it is filled up
        for step in (0, 1, last):
            for all_rows, own_rows in zip(whole[step], part[step], strict=True):
                np.testing.assert_array_equal(own_rows, all_rows[rows])
