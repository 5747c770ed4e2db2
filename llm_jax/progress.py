"""How work that takes long shows itself on standard error: a live line for a person, plain lines for a log file."""

import contextlib
import os
import sys

from tqdm.auto import tqdm

LOG_SECONDS = 30  # between two lines in a log file

_silent = False


def in_notebook() -> bool:
    return "ipykernel" in sys.modules


def is_live() -> bool:
    """Whether a line can be drawn over: a terminal or a notebook, not a file."""
    return not _silent and (sys.stderr.isatty() or in_notebook())


def say_nothing() -> None:
    """From now on: another process of the same run talks."""
    global _silent
    _silent = True


def say(text: str) -> None:
    """A line of talk on standard error, above the live line; nothing, where nobody reads it any more."""
    if _silent:
        return
    with contextlib.suppress(BrokenPipeError):
        tqdm.write(text, file=sys.stderr)


def silence_standard_output() -> None:
    """For when its reader has gone: what is still printed goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def byte_bar(total: int, what: str) -> tqdm:
    """A bar of `total` bytes that goes away when it is done; in a log file a line now and then, if it takes long."""
    plain = dict(
        bar_format="{desc}: {percentage:.0f}%, {remaining} left\n",
        mininterval=LOG_SECONDS,
        maxinterval=2 * LOG_SECONDS,
        delay=LOG_SECONDS,
    )
    how = {"disable": True} if _silent else {} if is_live() else plain
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, **how)
