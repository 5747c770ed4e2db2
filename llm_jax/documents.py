"""Files of text -> pieces of documents.

`find_text` says which files a source has, `pieces` reads one: documents as a stream, never a whole text.
"""

import fnmatch
import glob
import hashlib
import json
import os
import re
import sysconfig
import urllib.request
import uuid
from collections.abc import Container, Iterable, Iterator
from http.client import HTTPException
from pathlib import Path

from llm_jax.config import DataConfig
from llm_jax.errors import InputError

# A piece is what is tokenized at a time; it ends where a document does or, in longer ones, before a line
# break: if there is one after an ASCII letter or digit, where no byte-level BPE's split pattern (GPT-2's,
# GPT-4's, ours) has a token across, so the ids are those of the whole document; else after any mark, which
# is as good for ours and GPT-2's. Text without line breaks is cut anywhere, at the cost of a split token;
# a SentencePiece tokenizer adds its leading space once more per piece.
PIECE_BYTES = 1 << 16

# encodings and pydoc_data are generated: character tables and help text, a fifth of the bytes and no code.
STDLIB_SKIPPED_FOLDERS = set(
    "site-packages dist-packages test tests idle_test __pycache__ encodings pydoc_data".split()
)
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT_SECONDS = 10


def find_text(cfg: DataConfig, cache: Path) -> tuple[list[Path], str, bool]:
    """Candidate files in their order, how to name them in a message, and whether binaries are passed over."""
    if cfg.source == "python_stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(root, "*.py", STDLIB_SKIPPED_FOLDERS)
        if not files:
            raise InputError(f"no Python source in {root}; set data.path to a file or folder of text")
        return files, str(root), True
    if cfg.source == "tinyshakespeare":
        return [_download_shakespeare(cache)], "tinyshakespeare", False
    if cfg.path is None:
        raise InputError("data.path is not set; data.source=text needs a file, a folder or a glob")
    is_one_file = Path(os.path.expanduser(cfg.path)).is_file()
    return expand(cfg.path), cfg.path, not is_one_file


def _walk(folder: Path, pattern: str = "*", skipped: Container[str] = ()) -> list[Path]:
    """Files under `folder` that match, sorted by relative path; hidden files and folders are left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        found += [Path(root, name) for name in fnmatch.filter(names, pattern) if not name.startswith(".")]
    # By parts, so that the order is one on every system; only regular files, a pipe would block.
    return sorted((f for f in found if f.is_file()), key=lambda f: f.relative_to(folder).parts)


def expand(given: str, pattern: str = "*") -> list[Path]:
    """The file, the matching files of the folder, or what the glob finds (folders with their files)."""
    path = Path(os.path.expanduser(given))
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := _walk(path, pattern):
            return files
        kind = "file" if pattern == "*" else f"{pattern} file"
        raise InputError(f"data.path {given} is a folder without any {kind}; give one that has some")
    matches = sorted((Path(match) for match in glob.glob(str(path), recursive=True)), key=lambda m: m.parts)
    files = []
    for match in matches:
        files += _walk(match, pattern) if match.is_dir() else [match] if match.is_file() else []
    if files:
        return list(dict.fromkeys(files))  # "**" finds a folder and the files in it
    if glob.has_magic(given):
        raise InputError(f"data.path {given} matches no file; correct the pattern (and quote it in a shell)")
    raise InputError(f"data.path {given} does not exist; give a file, a folder or a glob")


def pieces(file: Path) -> Iterator[tuple[bytes, bool]]:
    """(piece, ends_document) of all documents in a file; whole characters, never empty."""
    try:
        if file.suffix in DOCUMENTS:
            for text in DOCUMENTS[file.suffix](file):
                blocks = (text[i : i + PIECE_BYTES] for i in range(0, len(text), PIECE_BYTES))
                yield from _cut_document(blocks)
        else:
            with open(file, "rb") as stream:
                yield from _cut_document(iter(lambda: stream.read(PIECE_BYTES), b""))
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); check the file or data.path") from None


_EXACT_CUT = re.compile(rb"(?<=[A-Za-z0-9])(?=\r?\n)")
_LINE_CUT = re.compile(rb"(?<=\S)(?=\r?\n)")
_CUT_SEARCH_BYTES = 1 << 14  # from the end of a block


def _cut_document(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    held = b""
    for block in blocks:
        held += block
        if len(held) > PIECE_BYTES:
            cut = _cut_position(held)
            yield held[:cut], False
            held = held[cut:]
    if held:
        yield held, True


def _cut_position(text: bytes) -> int:
    """Where to cut, leaving something on both sides."""
    for pattern in (_EXACT_CUT, _LINE_CUT):
        for match in reversed(list(pattern.finditer(text, max(1, len(text) - _CUT_SEARCH_BYTES)))):
            return match.start()
    cut = len(text) - 1
    while cut > len(text) - 4 and text[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return cut


def _jsonl_documents(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"] if isinstance(row, dict) and "text" in row else None
                document = text.encode() if isinstance(text, str) else None
            except UnicodeError as error:
                raise InputError(
                    f"{file} line {number} is not Unicode text ({error.reason}); repair the line"
                ) from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file} line {number} is not JSON ({error}); repair the line") from None
            if document is None:
                raise InputError(
                    f'{file} line {number} has no "text" string; each line must be an object with one, as '
                    '{"text": "..."}'
                )
            yield document


def _parquet_documents(file: Path) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file} needs pyarrow to be read; install it with pip install 'llm_jax[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise InputError(f"{file} has no column text, only {', '.join(table.schema_arrow.names)}; rename one")
            for rows in table.iter_batches(batch_size=256, columns=["text"]):
                for text in rows.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise InputError(f"{file} column text holds {type(text).__name__}, not strings; convert it")
                    yield (text or "").encode()
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} is no parquet file ({str(error).splitlines()[0]}); check the file") from None


# Files that hold many documents: suffix -> generator of their UTF-8 texts. Any other file is one document.
DOCUMENTS = {".jsonl": _jsonl_documents, ".parquet": _parquet_documents}


def _download_shakespeare(cache: Path) -> Path:
    file = cache / "tinyshakespeare.txt"
    if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return file
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        raise InputError(
            f"tinyshakespeare can't be downloaded from {SHAKESPEARE_URL} ({' '.join(str(error).split())}); "
            "set data.path to a copy of it or to any other text"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise InputError(
            f"{SHAKESPEARE_URL} has sha256 {found}, not {SHAKESPEARE_SHA256}: not the text that scores refer "
            "to; set data.path to a copy of it or to any other text"
        )
    partial = cache / f".tinyshakespeare.{uuid.uuid4().hex[:8]}"
    partial.write_bytes(content)
    partial.replace(file)
    return file
