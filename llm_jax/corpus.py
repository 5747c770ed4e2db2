"""Text on disk -> memory-mapped token arrays.

`prepare` reads a source (`documents.py` finds it and cuts it into pieces), tokenizes it once into a cache named by
content and tokenizer, and opens it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_jax import documents
from llm_jax.cache import cache_folder
from llm_jax.config import DataConfig
from llm_jax.errors import InputError
from llm_jax.progress import byte_bar
from llm_jax.tokenizers import (
    BPE_SPLIT,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)

FORMAT = 2  # of the cache: raise it whenever the same corpus and tokenizer would give other files
BATCH_BYTES = 1 << 20  # encoded at once, over all cores; takes up to 350 bytes of memory per byte of text
BPE_TRAINING_BYTES = 256 << 20  # more text does not change a vocabulary of this size noticeably

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 256 * 4
SHARD_CHUNK = 1 << 22  # tokens hashed or copied at a time


class Corpus(NamedTuple):
    """A tokenized corpus. `content_hash` depends on the documents alone, not on paths or the tokenizer."""

    tokenizer: Tokenizer
    train: np.ndarray  # 1-D memory map, uint16 or uint32
    val: np.ndarray  # the last val_fraction of the corpus
    content_hash: str


def prepare(cfg: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Finds the corpus, tokenizes it unless the cache has it, and opens both splits.

    The tokenizer is cfg.tokenizer's where none is given.
    Every call reads the corpus once to hash it, so a changed file is noticed. Two processes may
    prepare the same corpus at once: each writes a folder of its own and the first rename wins.
    """
    cache = cache_folder(cfg.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(cache, error) from None
    return (_prepare_shards if cfg.source == "bin" else _prepare_text)(cfg, cache, tokenizer)


def _unwritable(cache: Path, error: OSError) -> InputError:
    return InputError(f"cache folder {cache} can't be written ({error.strerror}); set data.cache_dir to another")


def _prepare_text(cfg: DataConfig, cache: Path, tokenizer: Tokenizer | None) -> Corpus:
    kind = cfg.tokenizer if tokenizer is None else "ready"
    if tokenizer is None and kind not in ("char", "bpe"):
        tokenizer = _ready_tokenizer(kind)
    text = _scan(*documents.find_text(cfg, cache), collect_characters=kind == "char")
    _check_content(cfg, text.content_hash)
    border = int(text.num_bytes * (1 - cfg.val_fraction))
    trained = {"char": ["char"], "bpe": ["bpe", BPE_SPLIT, cfg.vocab_size]}
    name = tokenizer.fingerprint() if tokenizer else trained[kind]

    def build(folder: Path) -> None:
        built = tokenizer
        if kind == "char":
            built = char_tokenizer(text.characters)
        elif kind == "bpe":
            built = train_bpe(_bpe_texts(text, border), cfg.vocab_size)
        built.save(folder)
        _tokenize(text, built, border, folder)

    return _open_or_build(cache, [text.content_hash, name, cfg.val_fraction], text.content_hash, build)


def _ready_tokenizer(given: str) -> Tokenizer:
    """One that needs no training: bytes, or an existing tokenizer.json."""
    if given == "byte":
        return byte_tokenizer()
    path = Path(os.path.expanduser(given))
    if not path.exists():
        raise InputError(
            f"data.tokenizer ({given!r}) is neither char, byte nor bpe, nor a file; give one of them or the path of "
            "a tokenizer.json"
        )
    return load_tokenizer(path)


def _check_content(cfg: DataConfig, found: str) -> None:
    if cfg.content_hash is not None and cfg.content_hash != found:
        raise InputError(
            f"data.content_hash is {cfg.content_hash} but the {cfg.source} corpus found here has {found}; "
            "give the same text, or a new workdir without data.content_hash"
        )


def _open_or_build(cache: Path, key: list, content_hash: str, build: Callable[[Path], None]) -> Corpus:
    """The corpus in `cache`, made by `build(folder)` in a temporary folder unless it is there and whole.

    `build` writes train.bin, val.bin and the tokenizer's files.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()[:32]
    folder = cache / digest
    corpus = _open(folder, content_hash)
    if corpus is None:
        partial = cache / f".{digest}.{uuid.uuid4().hex[:8]}"
        try:
            partial.mkdir()
        except OSError as error:
            raise _unwritable(cache, error) from None
        try:
            build(partial)
            sizes = {name: (partial / name).stat().st_size for name in ("train.bin", "val.bin")}
            meta = {"format": FORMAT, "content_hash": content_hash, "sizes": sizes}
            (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            _place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        corpus = _open(folder, content_hash)
    return corpus


def _place(made: Path, folder: Path) -> None:
    """Renames a folder into the cache, unless another process was faster: its files are the same."""
    with contextlib.suppress(OSError):
        made.rename(folder)
        return
    if _open(folder, "") is None:  # cut short, by a power failure say
        old = made.with_name(f"{made.name}.old")
        folder.rename(old)
        made.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _open(folder: Path, content_hash: str) -> Corpus | None:
    try:
        sizes = json.loads((folder / "meta.json").read_bytes())["sizes"]
    except (OSError, ValueError):
        return None
    if any(not (folder / n).exists() or (folder / n).stat().st_size != size for n, size in sizes.items()):
        return None
    tokenizer = load_tokenizer(folder)
    dtype = _dtype(tokenizer)

    def array(name: str) -> np.ndarray:  # an empty file can't be mapped
        return np.memmap(folder / name, dtype, mode="r") if sizes[name] else np.empty(0, dtype)

    return Corpus(tokenizer, array("train.bin"), array("val.bin"), content_hash)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


# ---------------------------------------------------------------------------------------------------
# Text: what the corpus is


class _Text(NamedTuple):
    files: list[Path]
    num_bytes: int
    num_documents: int
    content_hash: str
    characters: set[str]


class _NotText(Exception):
    """A file isn't UTF-8, or was found in a folder and holds a NUL byte."""


class _ContentHash:
    """sha256 of documents in order; each one's length follows it, so that borders count too."""

    def __init__(self, other: "_ContentHash | None" = None):
        self._hash = other._hash.copy() if other else hashlib.sha256()
        self.num_bytes = other.num_bytes if other else 0
        self.num_documents = other.num_documents if other else 0
        self._length = 0

    def update(self, piece: bytes, ends_document: bool) -> None:
        self._hash.update(piece)
        self.num_bytes += len(piece)
        self._length += len(piece)
        if ends_document:
            self._hash.update(self._length.to_bytes(8, "little"))
            self.num_documents += 1
            self._length = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _scan(files: list[Path], name: str, pass_over_binary: bool, *, collect_characters: bool) -> _Text:
    """Reads everything once: which files are text, how much there is, its hash, its characters."""
    kept, skipped = [], 0
    total, characters = _ContentHash(), set()
    size = sum(file.stat().st_size for file in files if file.exists())
    with byte_bar(size, "read") as bar:
        for file in files:
            trial, seen = _ContentHash(total), set()
            try:
                for piece, ends_document in documents.pieces(file):
                    if pass_over_binary and b"\0" in piece:
                        raise _NotText(f"{file} holds a NUL byte")
                    text = _decode(piece, file)
                    if collect_characters:
                        seen.update(text)
                    trial.update(piece, ends_document)
                    bar.update(len(piece))
            except _NotText as error:
                if not pass_over_binary:
                    raise InputError(f"{error}; data.path takes UTF-8 text, so convert it first") from None
                skipped += 1
                continue
            kept.append(file)
            total = trial
            characters |= seen
    if skipped:
        print(f"{skipped} of {len(files)} files in {name} are not UTF-8 text: skipped", file=sys.stderr)
    if not total.num_bytes:
        what = "holds no text" if len(files) > 1 or skipped else "is empty"
        raise InputError(f"corpus {name} {what}; set data.path to a file, folder or glob with UTF-8 text")
    return _Text(kept, total.num_bytes, total.num_documents, total.hexdigest(), characters)


def _decode(piece: bytes, file: Path) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise _NotText(f"{file} is not UTF-8 (byte 0x{piece[error.start]:02x})") from None


# ---------------------------------------------------------------------------------------------------
# Pieces -> tokens


def _split_pieces(files: list[Path], border: int) -> Iterator[tuple[str, bytes, bool]]:
    """("train" or "val", piece, ends_document), split at byte `border` or the next character's start."""
    position = 0
    for file in files:
        for piece, ends_document in documents.pieces(file):
            cut = min(max(border - position, 0), len(piece))
            while 0 < cut < len(piece) and piece[cut] & 0xC0 == 0x80:
                cut += 1
            position += len(piece)
            if 0 < cut < len(piece):
                yield "train", piece[:cut], False
                yield "val", piece[cut:], ends_document
            else:
                yield "train" if cut else "val", piece, ends_document


def _bpe_texts(text: _Text, border: int) -> Iterator[str]:
    size = min(border, BPE_TRAINING_BYTES)
    done = 0
    with byte_bar(size, "train bpe") as bar:
        for split, piece, _ in _split_pieces(text.files, border):
            if split == "val" or done >= size:
                return
            done += len(piece)
            bar.update(len(piece))
            yield piece.decode()


def _groups(pieces: Iterable[tuple[str, bytes, bool]]) -> Iterator[list[tuple[str, bytes, bool]]]:
    group, num_bytes = [], 0
    for item in pieces:
        group.append(item)
        num_bytes += len(item[1])
        if num_bytes >= BATCH_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _tokenize(text: _Text, tokenizer: Tokenizer, border: int, folder: Path) -> None:
    """Writes train.bin and val.bin. BOS begins each document where the tokenizer puts it before a prompt too;
    eos follows each one where there are several."""
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    end = [tokenizer.eos_id] if text.num_documents > 1 and tokenizer.eos_id is not None else []
    dtype = _dtype(tokenizer)
    seen = _ContentHash()  # of what is tokenized now, not of what was there when the key was made
    with (
        open(folder / "train.bin", "wb") as train,
        open(folder / "val.bin", "wb") as val,
        byte_bar(text.num_bytes, "tokenize") as bar,
    ):
        outputs = {"train": train, "val": val}
        begins_document = True
        for group in _groups(_split_pieces(text.files, border)):
            rows = tokenizer.encode_batch([piece.decode() for _, piece, _ in group])
            for ids, (split, piece, ends_document) in zip(rows, group, strict=True):
                ids = begin * begins_document + ids + end * ends_document
                outputs[split].write(np.asarray(ids, dtype).tobytes())
                begins_document = ends_document
                seen.update(piece, ends_document)
                bar.update(len(piece))
    if seen.hexdigest() != text.content_hash:
        raise InputError("the corpus changed while it was being read; start again when it is at rest")


# ---------------------------------------------------------------------------------------------------
# Shards of tokens, as nanoGPT and llm.c write them


_VAL_SHARD = re.compile(r"(?<![A-Za-z])val(?![A-Za-z])")  # val.bin, fineweb_val_000001.bin; not medieval.bin


def _prepare_shards(cfg: DataConfig, cache: Path, tokenizer: Tokenizer | None) -> Corpus:
    if cfg.path is None:
        raise InputError("data.path is not set; data.source=bin needs a .bin file, a folder or a glob of them")
    if tokenizer is None and cfg.tokenizer in ("char", "bpe"):
        raise InputError(
            f"data.tokenizer={cfg.tokenizer} can't be used with data.source=bin, which has no text; set it "
            "to byte or to the tokenizer.json that the shards were written with"
        )
    tokenizer = tokenizer or _ready_tokenizer(cfg.tokenizer)
    files = documents.expand(cfg.path, "*.bin")
    train = [(file, _open_shard(file)) for file in files if not _VAL_SHARD.search(file.name)]
    val = [(file, _open_shard(file)) for file in files if _VAL_SHARD.search(file.name)]
    if not sum(len(tokens) for _, tokens in train):
        raise InputError(
            f"data.path {cfg.path} has no training tokens, only {len(val)} shards named val; add a train.bin"
        )
    digest = hashlib.sha256()
    for _, tokens in train + val:
        for start in range(0, len(tokens), SHARD_CHUNK):
            digest.update(tokens[start : start + SHARD_CHUNK].tobytes())
        digest.update(len(tokens).to_bytes(8, "little"))
    digest.update(len(val).to_bytes(8, "little"))  # a shard moved to the other split is another corpus
    content_hash = digest.hexdigest()
    _check_content(cfg, content_hash)

    def build(folder: Path) -> None:
        total = sum(len(tokens) for _, tokens in train)
        border = total if val else int(total * (1 - cfg.val_fraction))
        tokenizer.save(folder)
        position = 0
        with open(folder / "train.bin", "wb") as train_file, open(folder / "val.bin", "wb") as val_file:
            for file, tokens in train + val:
                for start in range(0, len(tokens), SHARD_CHUNK):
                    chunk = tokens[start : start + SHARD_CHUNK]
                    if chunk.max() >= tokenizer.vocab_size:
                        raise InputError(
                            f"{file} has token {chunk.max()}, but {cfg.tokenizer} has {tokenizer.vocab_size} "
                            "ids; set data.tokenizer to the tokenizer.json that the shards were written with"
                        )
                    cut = min(max(border - position, 0), len(chunk))
                    train_file.write(chunk[:cut].astype(_dtype(tokenizer)).tobytes())
                    val_file.write(chunk[cut:].astype(_dtype(tokenizer)).tobytes())
                    position += len(chunk)

    key = ["bin", content_hash, tokenizer.fingerprint(), None if val else cfg.val_fraction]
    return _open_or_build(cache, key, content_hash, build)


def _open_shard(file: Path) -> np.ndarray:
    """The tokens of one shard: llm.c's, which begins with a header, or nanoGPT's, which has none."""
    size = file.stat().st_size
    if size == 0:
        return np.empty(0, "<u2")
    header = np.fromfile(file, "<i4", count=3)
    if size < LLMC_HEADER_BYTES or header[0] != LLMC_MAGIC:
        if size % 2:
            raise InputError(f"{file} has {size} bytes, but uint16 tokens take an even number; write it again")
        return np.memmap(file, "<u2", mode="r")
    version, count = int(header[1]), int(header[2])
    if version != LLMC_VERSION:
        raise InputError(f"{file} is an llm.c shard of version {version}; only version {LLMC_VERSION} is uint16")
    if size != LLMC_HEADER_BYTES + 2 * count:
        raise InputError(
            f"{file} has {size} bytes, but its header promises {count} tokens, which make "
            f"{LLMC_HEADER_BYTES + 2 * count}; copy it again"
        )
    return np.memmap(file, "<u2", mode="r", offset=LLMC_HEADER_BYTES)
