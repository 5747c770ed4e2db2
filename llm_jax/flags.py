"""Between the commands and the library: flag parsing, one-line errors, exit codes."""

import contextlib
import difflib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from llm_jax.distributed import BUG, TRY_AGAIN, PeerLost, is_started, leave
from llm_jax.errors import InputError
from llm_jax.progress import silence_standard_output

CONFIG_CHANGES = "config.group.key"  # the flag that collects them all, each as "group.key=value"


def run(main: Callable[..., Any], *, subcommands: Sequence[str] = (), arguments: Sequence[str] = ()) -> NoReturn:
    """Parses the flags, runs a command and exits.

    Where it has subcommands, `main` is given the one that was named; where it has arguments, such as SRC and DST,
    all of them.

    0: done. 2: a person's mistake, told in one line on standard error. 75: another process of the run was lost, and
    the same command goes on. 130 or 143: ended by SIGINT or SIGTERM, 141: by a closed pipe. Anything else that goes
    wrong is our bug, and keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # else orbax tells each of its steps, and grain of older jax
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal's encoding has not
        signal.signal(signal.SIGTERM, lambda signum, frame: leave(128 + signum))
        try:
            main(*argv[1:])
        except InputError as error:
            _mistake(error)
        except PeerLost as error:
            print(f"error: {error}", file=sys.stderr)
            leave(TRY_AGAIN, at_once=True)  # before XLA ends it with a trace
        except BrokenPipeError:  # who read our output has had enough: `... | head`
            silence_standard_output()  # else Python complains at its own exit
            leave(128 + signal.SIGPIPE)
        except KeyboardInterrupt as stop:
            print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
            leave(128 + getattr(stop, "signum", signal.SIGINT))
        except Exception:  # a bug: its traceback is told, as Python would
            if not is_started():
                raise
            traceback.print_exc()  # but Python's own exit would wait for the other processes
            leave(BUG)

    app.run(guarded, flags_parser=functools.partial(parse, subcommands=subcommands, arguments=arguments))


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports: SIGINT and SIGTERM end the process at once, since an exception inside jaxlib's crashes it."""

    def leave(signum: int, frame: Any) -> NoReturn:
        os._exit(128 + signum)

    before = {signum: signal.signal(signum, leave) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def parse(argv: Sequence[str], *, subcommands: Sequence[str] = (), arguments: Sequence[str] = ()) -> list[str]:
    """absl's parsing, where every mistake is one line and --config.group.key=value needs no flag of its own."""
    try:
        given = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        rest = flags.FLAGS([argv[0], *map(_config_change, given)])
        if subcommands and (len(rest) == 1 or rest[1] not in subcommands):
            given = f"unknown command {rest[1]!r}" if len(rest) > 1 else "no command given"
            raise InputError(f"{given}; it is one of {', '.join(subcommands)}")
        if len(rest) <= len(arguments):
            raise InputError(f"{arguments[len(rest) - 1]} is missing; give {' '.join(arguments)}")
        if unexpected := rest[1 + bool(subcommands) + len(arguments) :]:
            raise InputError(f"unexpected argument {unexpected[0]!r}; flags are written --name=value")
        return rest
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        _mistake(f"unknown flag --{error.flagname}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
    except (flags.Error, InputError) as error:
        _mistake(error)
    except SystemExit:  # --help has been printed; absl would leave with a failure's code
        sys.exit(0)


def _config_change(argument: str) -> str:
    """`--config.key=value`, `--config.key` (true) and `--noconfig.key` (false) as a value of CONFIG_CHANGES."""
    match = re.fullmatch(r"--?(?:config\.([^=]*)(=.*)?|noconfig\.([^=]*))", argument, re.DOTALL)
    if match is None or CONFIG_CHANGES not in flags.FLAGS:
        return argument
    key, value, false_key = match.groups()
    return f"--{CONFIG_CHANGES}=" + (f"{key}{value or '=True'}" if false_key is None else f"{false_key}=False")


def _mistake(error: Exception | str) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    leave(2)
