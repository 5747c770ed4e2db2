"""Between the commands and the library: flag parsing, one-line errors, exit codes."""

import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from llm_jax.config import check_keys
from llm_jax.errors import InputError


def run(main: Callable[[], Any]) -> NoReturn:
    """Parses the flags, runs a command and exits.

    0: done. 2: a person's mistake, told in one line on standard error. 130 or 143: ended by SIGINT or
    SIGTERM. Anything else that goes wrong is our bug, and keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # else jax and orbax tell each of their steps
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
        try:
            main()
        except InputError as error:
            _mistake(error)
        except KeyboardInterrupt as stop:
            print(f"\n{stop or 'interrupted'}", file=sys.stderr)
            sys.exit(128 + getattr(stop, "signum", signal.SIGINT))

    app.run(guarded, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """absl's parsing, with `--config.group.key` checked against the known keys and every mistake one line."""
    try:
        check_keys(
            argument.removeprefix("--").removeprefix("-").partition("=")[0].removeprefix("config.")
            for argument in argv[1:]
            if argument.startswith(("--config.", "-config."))
        )
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            raise InputError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        return rest
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        _mistake(f"unknown flag --{error.flagname}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
    except (flags.Error, InputError, OSError, TypeError, ValueError) as error:
        _mistake(error)


def _mistake(error: Exception | str) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
