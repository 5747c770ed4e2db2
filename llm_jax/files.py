"""Files that are written whole, so that they are whole at any moment, and JSON of any origin."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llm_jax.errors import InputError


def read_json(file: Path, *, remedy: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        InputError: it can't be read, is no JSON, or holds something else.
    """
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8; thousands of brackets
        raise InputError(f"{file} is not JSON ({' '.join(str(error).split())}); {remedy}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object; {remedy}")
    return values


def write_whole(file: Path, text: str) -> None:
    """Writes or replaces a file, so that a kill leaves it as it was or as it will be, never cut."""
    with written_whole(file) as partial:
        partial.write(text.encode())


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[BinaryIO]:
    """The file, open for writing under another name until all is written; removed if that fails."""
    partial = file.with_name(f".{file.name}.tmp")
    try:
        with partial.open("wb") as opened:
            yield opened
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
