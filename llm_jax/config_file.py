"""A config as a person writes it: a file, and changes to it on a command line."""

import dataclasses
import os
import re
import runpy
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llm_jax.config import Config, all_keys, check_keys, default, field_type, item_type, unknown_key
from llm_jax.errors import InputError


def load_file(path: str) -> ConfigDict:
    """The ConfigDict that a config file's `get_config()` returns. The file is Python, and is run."""
    file = Path(os.path.expanduser(path))
    try:
        file.read_bytes()  # apart, since the file's own code may raise OSError too
    except OSError as error:
        raise InputError(
            f"config file {path!r} cannot be read ({error.strerror}); see configs/ for examples"
        ) from None
    try:
        namespace = runpy.run_path(str(file))
    except SyntaxError as error:
        where = f"config file {path!r}" if error.filename in (None, str(file)) else f"{error.filename!r}"
        line = f" line {error.lineno}" if error.lineno else ""
        raise InputError(f"{where}{line} is not Python ({error.msg}); correct it") from None
    except Exception as error:
        raise _own_mistake(path, file, error) from None
    if "get_config" not in namespace:
        raise InputError(f"config file {path!r} has no get_config(); see configs/small.py")
    try:
        config = namespace["get_config"]()
    except Exception as error:  # ml_collections': unknown key, wrong type; or any of the file's own
        message = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
        key = re.search(r'Key "([\w.]+)" does not exist|Did you mean "[\w.]+" instead of "([\w.]+)"', message)
        if key:
            known = [*all_keys(), *(group.name for group in dataclasses.fields(Config))]
            raise InputError(f"config file {path!r}: {unknown_key(key[1] or key[2], known)}") from None
        if dotted := re.search(r"the key ([\w.]+) contains one", message):
            raise InputError(
                f"config file {path!r}: keys are attributes, so write config.{dotted[1]}, not config[{dotted[1]!r}]"
            ) from None
        if message.startswith("Could not override field"):
            raise InputError(f"config file {path!r}: {message}") from None
        raise _own_mistake(path, file, error) from None
    if not isinstance(config, ConfigDict) or not set(default()) <= set(config):
        raise InputError(
            f"get_config() in config file {path!r} must return a changed llm_jax.config.default(), not a "
            f"{type(config).__name__}; see configs/small.py"
        )
    return config


def _own_mistake(path: str, file: Path, error: Exception) -> InputError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" line {lines[-1]}" if lines else ""
    return InputError(f"config file {path!r}{where}: {type(error).__name__}: {error}")


def override(config: ConfigDict, assignments: Iterable[str]) -> None:
    """Sets keys from a command line's "optim.peak_lr=3e-4", each text read by the type of its key.

    "None" is None for a key that may be None; a tuple is written full,sliding or ('full', 'sliding').

    Raises:
        InputError: unknown key (with the nearest right one), a text that is not of the key's type.
    """
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        check_keys([key])
        group, name = key.split(".")
        field = getattr(Config, group).__dataclass_fields__[name]
        try:
            config[group][name] = _parsed(text, field)
        except ValueError:
            kind, optional = field_type(field)
            raise InputError(
                f"{key} ({text!r}) must be of type {kind.__name__}{' or None' if optional else ''}; "
                f"write --config.{key}=VALUE"
            ) from None


def _parsed(text: str, field: dataclasses.Field) -> Any:
    kind, optional = field_type(field)
    if optional and text == "None":
        return None
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind is tuple:
        return tuple(item_type(field)(item.strip(" '\"")) for item in text.strip("()").split(",") if item.strip())
    return kind(text)
