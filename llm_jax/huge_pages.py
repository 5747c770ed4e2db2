"""Huge pages for the arrays of a CPU.

XLA allocates and frees a step's temporary memory in every step. By default glibc maps and unmaps such blocks, so
that the kernel fills them with zeros and maps them again, 4 KiB at a time: a quarter of a small model's step on two
cores. Told to ask for huge pages and to keep what is freed, it does so only once. glibc reads this as a process
starts and never again, hence by the environment of a process that has yet to start.
"""

import os
import platform
import sys
from collections.abc import Mapping
from itertools import pairwise

VARIABLE = "GLIBC_TUNABLES"  # glibc manual, "Memory Allocation Tunables"; hugetlb is known from glibc 2.35 on
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",  # madvise for transparent huge pages
        f"glibc.malloc.mmap_threshold={1 << 33}",  # bytes; smaller blocks come from the heap,
        f"glibc.malloc.trim_threshold={1 << 34}",  # which shrinks only when so much of it is free
    )
)


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `given` for a process that uses huge pages: none elsewhere than on Linux with glibc,
    or where a person has set the tunables."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or VARIABLE in given:
        return {}
    return {VARIABLE: TUNABLES}


def restart(module: str) -> None:
    """Starts this process again with huge pages, unless it has them or is no `python -m <module>`."""
    added = environment(os.environ)
    if added and sys.executable and ("-m", module) in pairwise(sys.orig_argv):
        sys.stdout.flush(), sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})
