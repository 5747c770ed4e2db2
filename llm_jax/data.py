"""Tokens -> batches: the batch of a step is a pure function of (tokens, seed, step)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import grain
import numpy as np

from llm_jax.errors import InputError

# grain shuffles by walking a domain of some fixed size until it lands inside the range: 12 us a sample for
# 1,000 windows, 6 ms for two. Below this a permutation in memory costs nothing.
FEW_WINDOWS = 1024


class Batch(NamedTuple):
    """`targets[b, t]` is the token after `tokens[b, t]`; `mask` is 0 where there is nothing to predict."""

    tokens: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    mask: np.ndarray  # float32 [B, T]


def train_batches(
    tokens: np.ndarray, *, block_size: int, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.MapDataset:
    """Endless random access: `batches[step]` is a Batch that depends on (tokens, seed, step) alone.

    An epoch is a permutation of the windows of `block_size` tokens, whose common start is an offset in
    [0, block_size) drawn for (seed, epoch). Batch s holds samples s * batch_size onwards of the epochs
    one after the other, so one batch may end an epoch and begin the next.

    `rows` of each batch are read and no others, for a process that has these; None: all.
    """
    rows = range(batch_size) if rows is None else rows
    length = len(tokens)
    if length < block_size + 1:
        raise InputError(
            f"the training split has {length} tokens, but one context takes model.block_size + 1 = "
            f"{block_size + 1}; use a smaller model.block_size, a smaller train.seq_len, or more text"
        )
    # grain's epochs are seed, seed + 1, ...: mixed, since else the epochs of neighbouring seeds would be the same.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # As many in each epoch, so that the epoch follows from the index: the largest offset must leave room.
    num_windows = max(1, (length - block_size) // block_size)
    offsets = min(block_size, length - num_windows * block_size)

    few = num_windows < FEW_WINDOWS

    @lru_cache(maxsize=8)
    def epoch_of(epoch: int) -> tuple[int, np.ndarray | None]:
        rng = np.random.default_rng((seed, epoch))
        return int(rng.integers(offsets)), rng.permutation(num_windows) if few else None

    def window(index: int, place: int) -> np.ndarray:
        offset, order = epoch_of(index // num_windows)
        start = offset + int(order[place] if few else place) * block_size
        return np.asarray(tokens[start : start + block_size + 1], np.int32)

    ones = np.ones((len(rows), block_size), np.float32)
    places = grain.MapDataset.range(num_windows)
    windows = (places if few else places.shuffle(seed=seed)).repeat(None).map_with_index(window)

    def batch(step: int) -> Batch:
        tokens = np.stack([windows[step * batch_size + row] for row in rows])
        return Batch(tokens[:, :-1], tokens[:, 1:], ones)

    return grain.MapDataset.range(len(windows) // batch_size).map(batch)


def eval_batches(
    tokens: np.ndarray,
    *,
    block_size: int,
    batch_size: int,
    max_batches: int | None = None,
    rows: Sequence[int] | None = None,
) -> Sequence[Batch]:
    """Windows side by side: every token after the first is a target once, each with mask 1.

    All batches have one shape: the last window and the last batch are filled up with mask 0.
    `max_batches` takes that many batches of full windows, evenly spaced and always the same, if there
    are more windows than that. Batches are cut when they are asked for, of each but these `rows` (None: all).
    """
    if len(tokens) < 2:
        raise InputError(
            f"the validation split has {len(tokens)} tokens, but at least 2 are needed to predict one; use a "
            "larger data.val_fraction or more text"
        )
    num_predicted = len(tokens) - 1
    places = range(-(-num_predicted // block_size))
    if max_batches is not None and len(places) > max_batches * batch_size:
        wanted, full = max_batches * batch_size, num_predicted // block_size
        places = [i * full // wanted for i in range(wanted)]
    return _EvalBatches(tokens, places, block_size, batch_size, range(batch_size) if rows is None else rows)


class _EvalBatches(Sequence):
    def __init__(
        self, tokens: np.ndarray, places: Sequence[int], block_size: int, batch_size: int, rows: Sequence[int]
    ):
        self._tokens, self._places, self._rows = tokens, places, rows
        self._block_size, self._batch_size = block_size, batch_size

    def __len__(self) -> int:
        return -(-len(self._places) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        index = range(len(self))[index]  # IndexError past the end, which iteration relies on
        shape = (len(self._rows), self._block_size)
        batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        for row, number in enumerate(self._rows):
            if index * self._batch_size + number >= len(self._places):  # the last batch is filled up
                continue
            place = self._places[index * self._batch_size + number]
            window = self._tokens[place * self._block_size : (place + 1) * self._block_size + 1]
            length = len(window) - 1
            batch.tokens[row, :length] = window[:-1]
            batch.targets[row, :length] = window[1:]
            batch.mask[row, :length] = 1
        return batch
