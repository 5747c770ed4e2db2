"""Contenders, each in a process of its own, timed in alternating rounds."""

import ctypes
import importlib.util
import multiprocessing
import os
import re
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import Config, ModelConfig
from llm_jax.errors import InputError
from llm_jax.progress import say

NUM_BATCHES = 8  # different ones, taken in turn
ROUND_SECONDS = 2.5  # of one contender: long beside a scheduler's tick, short beside a machine's drift


def missing(*packages: str, extra: str = "parity") -> str | None:
    """One line on what to install, None if nothing."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed; pip install -e '.[{extra}]' brings it" if absent else None


def differences(cfg: ModelConfig, needed: Mapping[str, Any]) -> list[str]:
    """What a peer would need otherwise, a phrase for each key."""
    return [
        f"model.{name} ({getattr(cfg, name)}) would have to be {value}"
        for name, value in needed.items()
        if getattr(cfg, name) != value
    ]


class WorkerError(Exception):
    """Something else than a person's mistake went wrong in a worker; the traceback from there is a note."""


class Worker:
    """`make(*arguments)` in a process of its own, whose methods `call` runs.

    So two libraries share neither threads nor memory, and each one's memory can be read from outside it. What
    they print goes to standard error. InputError is raised here as there, anything else as WorkerError.
    `environment` are variables that it has besides this process's.
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy jax's or torch's threads half
        self._connection, there = context.Pipe()
        # A daemon ends with this process, however it ends.
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        before = dict(os.environ)
        os.environ.update(environment or {})
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        there.close()
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            error, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise WorkerError(f"its process died with exit code {self._process.exitcode}") from None
        if error is None:
            return answer
        kind, line = error
        if kind == InputError.__name__:
            raise InputError(line)
        failed = WorkerError(f"{kind}: {line}")
        failed.add_note(answer)
        raise failed


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    os.dup2(2, 1)

    def answer(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            value = function(*arguments)
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            connection.send(((type(error).__name__, line), traceback.format_exc()))
            return None
        connection.send((None, None if function is make else value))
        return value

    contender = answer(make, *arguments)
    while contender is not None:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        answer(getattr(contender, method), *arguments)


class Contender:
    """What is timed: `worker.time(*what, steps)` returns seconds; `seconds` has those of one step, round by round."""

    def __init__(self, name: str, worker: Worker, *what: Any, steps: int | None = None) -> None:
        self.name, self.seconds = name, []
        self._worker, self._what = worker, what
        self.steps = steps or max(1, round(ROUND_SECONDS / self._step_seconds(self._enough_steps())))

    def time(self) -> None:
        self.seconds.append(self._step_seconds(self.steps))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def _step_seconds(self, steps: int) -> float:
        return self._worker.call("time", *self._what, steps) / steps

    def _enough_steps(self) -> int:
        """How many steps take about a tenth of a round: enough to tell how many fill one."""
        return max(1, round(ROUND_SECONDS / 10 / self._step_seconds(1)))


def alternate(contenders: Sequence[Contender], rounds: int, *, what: str = "") -> None:
    """Times each contender once a round, every other round backwards, so that drift weighs on all alike."""
    start = time.monotonic()
    for i in range(rounds):
        for contender in contenders if i % 2 == 0 else reversed(contenders):
            contender.time()
        left = (time.monotonic() - start) / (i + 1) * (rounds - i - 1)
        each = ", ".join(f"{c.name} {milliseconds(c.seconds[-1])}" for c in contenders)
        say(f"{what}round {i + 1}/{rounds}: {each} | {int(left) // 60}:{int(left) % 60:02d} left")


def ratios(ours: Contender, peer: Contender) -> list[float]:
    """Per round: how many times as fast as the peer we were. Their median cancels what both rounds shared."""
    return [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left and numbers to the right; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"


def random_batches(cfg: Config) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, targets, mask) of NUM_BATCHES batches, the same for every contender of `bench train`."""
    rng = np.random.default_rng(0)
    shape = (NUM_BATCHES, cfg.train.batch_size, cfg.seq_len + 1)
    windows = rng.integers(0, cfg.model.vocab_size, shape, dtype=np.int32)
    return [(w[:, :-1], w[:, 1:], np.ones(w[:, 1:].shape, np.float32)) for w in windows]


class HostMemory:
    """Resident memory of this process above what it had when this was made, by Linux's /proc; elsewhere None."""

    def __init__(self) -> None:
        self._start = _resident("VmRSS")

    def restart(self) -> None:
        """From here on `peak` is the highest since; what compiling has freed is given back before."""
        if self._start is not None:
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # glibc's
                libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark

    def peak(self) -> int | None:
        return None if self._start is None else max(0, _resident("VmHWM") - self._start)


def _resident(field: str) -> int | None:
    status = Path("/proc/self/status")
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) if status.exists() else None
