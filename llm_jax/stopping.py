"""SIGINT and SIGTERM while a run trains: it is saved and stops between two steps, in all of its processes."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llm_jax import hosts
from llm_jax.programs import IN_FLIGHT

ONE_SIGNAL_SECONDS = 1  # a launcher, and the parent of several processes, may pass on what has come directly too


class Interrupted(KeyboardInterrupt):
    """A second signal came before the first one's save: nothing was saved since the last checkpoint."""

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted before saving; the same command continues from the last checkpoint")
        self.signum = signum


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the state of `step` is saved, and the same call continues from it."""

    def __init__(self, signum: int, step: int, workdir: Path) -> None:
        super().__init__(f"stopped at step {step}, saved in {workdir}; the same command continues from there")
        self.signum = signum


class Stop:
    """The first signal that came, and what the processes of the run agree on."""

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.signum, self.seconds = 0, -math.inf
        self._votes = hosts.Votes(mesh, behind=IN_FLIGHT)

    def agreed(self, *, now: bool = False) -> int:
        """The signal to stop for, in all processes at the same call; 0: none. With `now` those that just came too."""
        return self._votes.largest(self.signum, now=now)


@contextlib.contextmanager
def stop_signals(mesh: jax.sharding.Mesh) -> Iterator[Stop]:
    """Notes the first SIGINT or SIGTERM, for the loop to act on between two steps; a second one interrupts."""
    stop = Stop(mesh)
    if threading.current_thread() is not threading.main_thread():  # only there does Python allow handlers
        yield stop
        return

    def note(signum: int, frame: Any) -> None:
        now = time.monotonic()
        if stop.signum and now > stop.seconds + ONE_SIGNAL_SECONDS:
            raise Interrupted(signum)
        if not stop.signum:
            stop.signum, stop.seconds = signum, now

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
