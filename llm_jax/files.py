"""Files that are whole at any moment."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
