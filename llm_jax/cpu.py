"""What a process that trains on a CPU wants in its environment, before jax and malloc read it."""

import math
import os
import platform
import sys
from collections.abc import Mapping

from llm_jax.config import Config

# Huge pages: XLA allocates and frees a step's temporary memory in every step, and the kernel fills it with zeros and
# maps it each time, 4 KiB at a time. With huge pages the step of small.py took 272 instead of 324 ms on two cores
# (medians of three processes each, in turns), and the processor spent 25 instead of 92 ms of it in the kernel. glibc
# reads whether to ask for them as a process starts and never again (its manual, "Memory Allocation Tunables"; unknown
# before glibc 2.35, and passed over there).
VARIABLE, TUNABLES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
# Devices: XLA splits each operation among the cores, and joins it, thousands of times a step. With a device for each
# core, which has its own rows of the batch, they meet a few times: 0.82 of the time of a step of
# shakespeare_char_cpu.py on two cores of a Xeon, 0.88 of small.py's. Operations of wider models are shared well as
# they are, and the parameters of each device cost time: 256 wide, 1.03 of the time, 384 and 768 up to 1.10.
NUM_DEVICES = "JAX_NUM_CPU_DEVICES"
TOO_WIDE = 256
MAX_DEVICES = 8  # each holds the whole state; measured with two


def huge_pages(given: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `given` for a process that uses huge pages: none elsewhere than on Linux with glibc,
    or where a person has set the tunables."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or VARIABLE in given:
        return {}
    return {VARIABLE: TUNABLES}


def devices(given: Mapping[str, str], cfg: Config, num_processes: int | None = None) -> dict[str, str]:
    """The variables to add to `given` for a process that trains by this config; none where a person has set them.

    As many devices as the mesh wants, if there are as many cores. Else as many as there are cores, or as divide
    the rows of a micro-batch; one for a wide model, or with dropout, whose mask is drawn for all rows at once. Each
    of several processes has its part of what the mesh wants, or one.
    """
    if devices_are_set(given):
        return {}
    rows = cfg.train.batch_size // cfg.train.accumulation_steps
    wanted = math.prod(cfg.mesh.sizes.values())  # below 0 where one of them takes what is left
    if num_processes is not None:
        return {NUM_DEVICES: str(max(1, wanted // num_processes))}
    if not 1 <= wanted <= cores():
        most = 1 if cfg.model.n_embd >= TOO_WIDE or cfg.model.dropout else min(cores(), MAX_DEVICES)
        wanted = max(n for n in range(1, most + 1) if rows % n == 0)
    return {NUM_DEVICES: str(wanted)}


def devices_are_set(given: Mapping[str, str]) -> bool:
    """Whether a person has: jax refuses both variables at once."""
    return NUM_DEVICES in given or "host_platform_device_count" in given.get("XLA_FLAGS", "")


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def restart(module: str) -> None:
    """Starts this process again with huge pages, unless it has them or is no `python -m <module>`."""
    added = huge_pages(os.environ)
    if added and sys.executable and started_as(module):
        sys.stdout.flush(), sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})


def started_as(module: str) -> bool:
    """Whether the interpreter's own -m names the module; a debugger's or a profiler's would be restarted itself."""
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if argument == "-m":
            return next(arguments, None) == module
        if argument in ("-W", "-X"):
            next(arguments, None)
        elif not argument.startswith("-"):
            break
    return False
