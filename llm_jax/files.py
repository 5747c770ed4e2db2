"""Files that are whole at any moment."""

from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes or replaces a file, so that a kill leaves it as it was or as it will be, never cut."""
    partial = file.with_name(f".{file.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
