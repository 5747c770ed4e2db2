"""Huge pages for the arrays of a CPU.

XLA allocates and frees a step's temporary memory in every step, and the kernel fills it with zeros and maps it each
time, 4 KiB at a time. With huge pages the step of small.py took 272 instead of 324 ms on two cores (medians of three
processes each, in turns), and the processor spent 25 instead of 92 ms of it in the kernel. glibc reads whether to ask
for them as a process starts and never again, hence by the environment of a process that has yet to start.
"""

import os
import platform
import sys
from collections.abc import Mapping

# glibc's manual, "Memory Allocation Tunables": malloc asks for transparent huge pages. Unknown before glibc 2.35, and
# passed over there.
VARIABLE, TUNABLES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `given` for a process that uses huge pages: none elsewhere than on Linux with glibc,
    or where a person has set the tunables."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or VARIABLE in given:
        return {}
    return {VARIABLE: TUNABLES}


def restart(module: str) -> None:
    """Starts this process again with huge pages, unless it has them or is no `python -m <module>`."""
    added = environment(os.environ)
    if added and sys.executable and _started_as(module):
        sys.stdout.flush(), sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})


def _started_as(module: str) -> bool:
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
