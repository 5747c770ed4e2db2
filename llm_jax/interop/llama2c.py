"""llama2.c's model.bin (its first format, of float32 and no magic number): a Llama as one header and its arrays."""

import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llm_jax.config import ModelConfig
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.files import written_whole
from llm_jax.interop.network import differences
from llm_jax.interop.tensors import row
from llm_jax.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Vocabulary, build
from llm_jax.tokenizers import Tokenizer

HEADER = ("n_embd", "mlp_dim", "n_layer", "n_head", "n_kv_head", "vocab_size", "block_size")  # int32 each
MAGIC = 0x616B3432  # of its later formats
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# In the order of the file, in which all layers' arrays of a kind lie together.
ROWS = (
    row("embed/tokens", "token_embedding", "table"),
    row("attn_norm/weight", "rms_att.{layer}", "vector"),
    row("attn/q", "wq.{layer}", "interleaved"),
    row("attn/k", "wk.{layer}", "interleaved"),
    row("attn/v", "wv.{layer}"),
    row("attn/o", "wo.{layer}"),
    row("mlp_norm/weight", "rms_ffn.{layer}", "vector"),
    row("mlp/gate", "w1.{layer}"),
    row("mlp/down", "w2.{layer}"),
    row("mlp/up", "w3.{layer}"),
    row("final_norm/weight", "rms_final", "vector"),
    row("lm_head/weight", "wcls", "table"),
)


class Llama2c:
    """A file's header as ModelConfig, and its arrays, read where they lie.

    Raises:
        InputError: another format, or a size that the header does not make.
    """

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            header = np.fromfile(path, "<i4", len(HEADER))
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror})") from None
        if len(header) < len(HEADER) or header[0] == MAGIC:
            raise InputError(f"{path} is not of llama2.c's first format, which its export.py writes with --version 0")
        values = dict(zip(HEADER, header.tolist(), strict=True))
        tied, values["vocab_size"] = values["vocab_size"] > 0, abs(values["vocab_size"])
        if min(values.values()) < 1 or max(values.values()) * 4 > size:
            raise InputError(f"{path} is no model.bin of llama2.c: its header has {header.tolist()}")
        try:
            self.config = _config(tie_embeddings=tied, **values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        self._offsets: dict[str, tuple[int, tuple[int, ...]]] = {}
        offset = len(HEADER) * 4
        for name, shape in _arrays(self.config):
            self._offsets[name] = offset, shape
            offset += math.prod(shape) * 4
        if size != offset:
            raise InputError(f"{path} has {size} bytes, and its header makes {offset}")
        self._file = np.memmap(path, np.uint8, "r")

    def read(self, name: str) -> np.ndarray:
        offset, shape = self._offsets[name]
        return self._file[offset : offset + math.prod(shape) * 4].view("<f4").reshape(shape)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer.bin of llama2.c: the longest piece's length, then of each piece its score, length and bytes.

    Raises:
        InputError: the file can't be read, or does not end where its last piece does.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from None
    pieces, scores, at = [], [], 4
    while at < len(data):
        if len(data) - at < 8:
            raise InputError(f"{path} is no tokenizer.bin of llama2.c: it ends within a piece")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise InputError(f"{path} is no tokenizer.bin of llama2.c: a piece of {length} bytes at byte {at}")
        pieces.append(data[at : at + length].decode(errors="replace").replace(" ", SPACE))
        scores.append(score)
        at += length
    kinds = [BYTE if BYTE_PIECE.fullmatch(piece) else NORMAL for piece in pieces]
    pieces[:3], kinds[:3] = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    if len(pieces) < 3:
        raise InputError(f"{path} is no tokenizer.bin of llama2.c: it has {len(pieces)} pieces")
    try:
        backend = build(Vocabulary(pieces, scores, kinds))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", add_bos=True, split_special_tokens=False)


def check(model: ModelConfig) -> None:
    """Raises InputError for a model that the format can't hold, with the fields that it has no place for."""
    values = {name: getattr(model, name) for name in HEADER}
    if wrong := differences(model, _config(tie_embeddings=model.tie_embeddings, **values)):
        raise InputError(f"{', '.join(wrong)} has no counterpart in llama2.c's model.bin")


def write(path: Path, model: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a model.bin of the tensors, which come in the order of ROWS."""
    header = [getattr(model, name) for name in HEADER]
    if not model.tie_embeddings:
        header[HEADER.index("vocab_size")] *= -1
    tensors = iter(tensors)
    with written_whole(path) as file:
        file.write(np.array(header, "<i4").tobytes())
        for name, _ in _arrays(model):
            if name in ("freq_cis_real", "freq_cis_imag"):
                angles = np.arange(model.block_size)[:, None] * _inv_freq(model)
                array = np.cos(angles) if name == "freq_cis_real" else np.sin(angles)
            else:
                given, array = next(tensors)
                assert given == name, (given, name)
            file.write(array.astype("<f4").tobytes())


def _config(**values: int | bool) -> ModelConfig:
    return freeze({"model": values}).model


def _inv_freq(model: ModelConfig) -> np.ndarray:
    return model.rope_theta ** (-np.arange(0, model.head_dim, 2) / model.head_dim)


def _arrays(model: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of everything behind the header, in order. The tables of angles are there for older readers."""
    width, hidden, layers = model.n_embd, model.mlp_dim, model.n_layer
    queries, keys = model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    by_layer = {
        "rms_att": (width,),
        "wq": (queries, width),
        "wk": (keys, width),
        "wv": (keys, width),
        "wo": (width, queries),
        "rms_ffn": (width,),
        "w1": (hidden, width),
        "w2": (width, hidden),
        "w3": (hidden, width),
    }
    angles = (model.block_size, model.head_dim // 2)
    return [
        ("token_embedding", (model.vocab_size, width)),
        *[(f"{name}.{layer}", shape) for name, shape in by_layer.items() for layer in range(layers)],
        ("rms_final", (width,)),
        ("freq_cis_real", angles),
        ("freq_cis_imag", angles),
        *([] if model.tie_embeddings else [("wcls", (model.vocab_size, width))]),
    ]
