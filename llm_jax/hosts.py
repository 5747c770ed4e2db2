"""One run on several processes, each with its own devices: what they must have in common, and what each has."""

import contextlib
import functools
import hashlib
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import sharding
from llm_jax.distributed import REMEDY, PeerLost
from llm_jax.errors import InputError

# What errors say when another process does not answer: Gloo's, NCCL's, and the coordination service's.
LOST = re.compile(r"gloo|nccl|connection (reset|closed|refused)|heartbeat|coordination|UNAVAILABLE|DEADLINE", re.I)
SPARE = 0.2  # of the parameters' size: for what a model that generates holds besides
SEEN_SECONDS = 30  # until a file that one machine wrote is seen by others: network file systems remember a while


def is_first() -> bool:
    """Whether this process is the one that writes what a run has once: logs, config, samples."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The first process's value, in all."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def of_all(value: float) -> list[float]:
    """The value of each process, in all."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.float32(value)).tolist()


def check_same(values: Mapping[str, str]) -> None:
    """Raises InputError, in all processes, where one of them has another value than the first.

    Args:
        values: what it is -> its text, of which a digest is compared.
    """
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in values.values()]
    there = multihost_utils.process_allgather(np.stack(digests))  # [process, value, byte]
    for process, digest in enumerate(there):
        for i, name in enumerate(values):
            if (digest[i] != there[0, i]).any():
                raise InputError(f"process {process} has another {name} than process 0; give all the same")


def check_shared(workdir: Path) -> None:
    """Raises InputError, in all processes, where one does not see the file that the first writes into the folder."""
    if jax.process_count() == 1:
        return
    number = secrets.randbelow(2**31)
    if is_first():
        (workdir / f".{number}.tmp").touch()
    file = workdir / f".{agree(number)}.tmp"
    until = time.monotonic() + SEEN_SECONDS
    while not (seen := file.is_file()) and time.monotonic() < until:
        time.sleep(0.5)
    there = of_all(float(seen))
    if is_first():
        file.unlink()
    if 0 in there:
        raise InputError(
            f"workdir {str(workdir)!r} of process {there.index(0)} is not that of process 0; give a folder that all "
            "of them see"
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that devices of this process have, in order."""
    indices = sharding.split_batch(mesh).addressable_devices_indices_map((batch_size, mesh.shape["context"]))
    return np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in indices.values()]))


def place_batch(batch: Any, batch_size: int, *, mesh: Mesh, axis: int = 0) -> Any:
    """Arrays of the mesh with `batch_size` rows along `axis`; those of `batch` hold the `local_rows`."""
    at = sharding.split_batch(mesh, axis=axis)
    if jax.process_count() == 1:
        return jax.device_put(batch, at)
    rows = local_rows(mesh, batch_size)

    def place(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[axis].indices(batch_size)
            start = int(np.searchsorted(rows, first))  # they lie side by side in `local` too
            return local[(*index[:axis], slice(start, start + last - first), *index[axis + 1 :])]

        return jax.make_array_from_callback((*local.shape[:axis], batch_size, *local.shape[axis + 1 :]), at, part)

    return jax.tree.map(place, batch)


def everywhere(tree: Any, mesh: Mesh) -> Any | None:
    """Arrays of the mesh, whole on a device of this process; None where they do not fit there.

    All processes must call it.
    """
    stats = mesh.local_devices[0].memory_stats() or {}
    free = stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else math.inf  # a CPU does not say
    if (1 + SPARE) * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) > min(of_all(free)):
        return None
    if jax.process_count() == 1:
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, min(leaf.devices(), key=lambda device: device.id)), tree
        )
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _replicate(mesh)(tree))


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))


class Votes:
    """A number that each process may change, and the largest of them, which all learn at the same call.

    It is the largest of `behind` calls ago: nobody waits for it, but with `now`.
    """

    def __init__(self, mesh: Mesh, *, behind: int) -> None:
        self._count, self._behind = mesh.size, behind
        self._at = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda votes: votes.max(), out_shardings=sharding.replicated(mesh))
        self._cast: deque[jax.Array] = deque()

    def largest(self, number: int, *, now: bool = False) -> int:
        if jax.process_count() == 1:
            return number
        vote = np.full(1, number, np.int32)
        self._cast.append(self._largest(jax.make_array_from_callback((self._count,), self._at, lambda index: vote)))
        if now:
            return max(int(each) for each in self._cast)
        return int(self._cast.popleft()) if len(self._cast) > self._behind else 0


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Around what all processes do together: raises PeerLost where another one is gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # some of jaxlib's errors are turned into ValueError
        if jax.process_count() == 1 or isinstance(error, InputError) or not LOST.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:120]
        what = (
            "lost another"
            if "DEADLINE" not in str(error)
            else "waited too long for another, as where a disk is full,"
        )
        raise PeerLost(
            f"process {jax.process_index()} {what} of the {jax.process_count()} processes ({reason}); {REMEDY}"
        ) from error
