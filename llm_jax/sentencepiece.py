"""SentencePiece vocabularies as backends of the tokenizers library: tokenizer.model files, or pieces with scores.

Kudo and Richardson 2018, "SentencePiece". The file is a protobuf; of its messages only what is needed here is read.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf
from tokenizers import decoders, models, normalizers

from llm_jax.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the kind of a piece
SPACE = "▁"
MAX_BYTES = 1 << 28
MAX_MERGE_WORK = 1 << 28  # characters compared to find merges; the largest published vocabulary takes a tenth


class Vocabulary(NamedTuple):
    """Pieces by id, and what is done to a text before they are looked for."""

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    is_unigram: bool = False
    adds_space: bool = True  # before a text
    merges_spaces: bool = False  # several to one, and none at the ends
    charsmap: bytes = b""  # normalization, precompiled
    bos_id: int | None = None
    eos_id: int | None = None

    def name(self, i: int | None) -> str | None:
        return self.pieces[i] if i is not None and 0 <= i < len(self.pieces) else None


def build(vocabulary: Vocabulary) -> hf.Tokenizer:
    """The backend that gives the ids that SentencePiece gives.

    But where a space is added before a text, it is added behind each special token and each symbol that users defined
    too, as llama.cpp and transformers do.

    Raises:
        InputError: lists of different lengths, a piece twice, pieces too long to find merges for.
    """
    pieces, scores, kinds = vocabulary.pieces, vocabulary.scores, vocabulary.kinds
    if not len(pieces) == len(scores) == len(kinds):
        raise InputError(f"{len(pieces)} pieces have {len(scores)} scores and {len(kinds)} kinds; give one each")
    if len(set(pieces)) != len(pieces):
        raise InputError("a piece is there twice")
    unknown = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    byte_fallback = BYTE in kinds
    if vocabulary.is_unigram and unknown is None:
        raise InputError("a unigram vocabulary needs a piece for what is unknown, and has none")
    if vocabulary.is_unigram:
        pairs = list(zip(pieces, map(float, scores), strict=True))
        backend = hf.Tokenizer(models.Unigram(pairs, unk_id=unknown, byte_fallback=byte_fallback))
    else:
        vocab = {piece: i for i, piece in enumerate(pieces) if kinds[i] != UNUSED}
        made = {piece: scores[i] for piece, i in vocab.items() if kinds[i] in (NORMAL, USER_DEFINED)}
        merges = _merges(made, vocab)
        unk = vocabulary.name(unknown)
        bpe = models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
        backend = hf.Tokenizer(bpe)
    steps: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.merges_spaces:
        # Not by the library's Strip, which takes line breaks too.
        steps += [normalizers.Replace(hf.Regex(r"\A +| +\z"), ""), normalizers.Replace(hf.Regex(" {2,}"), " ")]
    if vocabulary.adds_space:
        steps += [normalizers.Prepend(SPACE)]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    first = [decoders.Strip(content=" ", left=1)] if vocabulary.adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    # Blanks are looked for as what they have become; a symbol with a plain one in it never was found.
    findable = [kind if kind != USER_DEFINED or " " not in piece else UNUSED for piece, kind in zip(pieces, kinds)]
    add_tokens(backend, pieces, findable, normalized=not vocabulary.adds_space)
    return backend


def add_tokens(backend: hf.Tokenizer, tokens: Sequence[str], kinds: Sequence[int], *, normalized: bool) -> None:
    """Makes control tokens special, and has those that users defined found in a text before it is split.

    normalized: whether what users defined is looked for in the normalized text.
    """
    for special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
        wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
        names = [token for token, kind in zip(tokens, kinds, strict=True) if kind in wanted]
        add([hf.AddedToken(name, special=special, normalized=normalized and not special) for name in names])


def _merges(scores: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, those with the highest score of what they make first."""
    if sum(len(piece) ** 2 for piece in scores) > MAX_MERGE_WORK:
        raise InputError("the vocabulary has pieces that are too long to be found by merging")
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found, key=lambda merge: merge[:3])]


# -- tokenizer.model


def read_model(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.model.

    Raises:
        InputError: it can't be read, is no SentencePiece model, or of a type other than BPE and unigram.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES} bytes, too many for a tokenizer.model")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); give a SentencePiece model") from None
    try:
        return _vocabulary(data)
    except (ValueError, struct.error) as error:
        raise InputError(f"{path} is no SentencePiece model ({error})") from None


def _vocabulary(data: bytes) -> Vocabulary:
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_expect(value, bytes)))
            pieces.append(_expect(piece.get(1, b""), bytes).decode())
            scores.append(struct.unpack("<f", _expect(piece.get(2, bytes(4)), bytes))[0])
            kinds.append(_expect(piece.get(3, NORMAL), int))
        elif field == 2:
            trainer = dict(_fields(_expect(value, bytes)))
        elif field == 3:
            normalizer = dict(_fields(_expect(value, bytes)))
    if not pieces:
        raise ValueError("it has no pieces")
    kind = trainer.get(3, 1)
    if kind not in (1, 2):
        raise ValueError(f"model_type {kind} is not known; unigram (1) and BPE (2) are")
    if not set(kinds) <= set(range(NORMAL, BYTE + 1)):
        raise ValueError("a piece is of a kind that does not exist")

    def special(field: int, default: int) -> int | None:
        i = _expect(trainer.get(field, default), int)
        return i if i < len(pieces) else None  # -1, which is none, is a large number here

    return Vocabulary(
        pieces,
        scores,
        kinds,
        is_unigram=kind == 1,
        adds_space=bool(normalizer.get(3, 1)),
        merges_spaces=bool(normalizer.get(4, 1)),
        charsmap=_expect(normalizer.get(2, b""), bytes),
        bos_id=special(41, 1),
        eos_id=special(42, 2),
    )


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError("a field has another type than it should")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: an int, or bytes (of 4 or 8 for a fixed-width number)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                raise ValueError("it ends within a number")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number has more than 10 bytes")

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size = varint()
        if size is None or size > len(data) - at:
            raise ValueError(f"a field at byte {at} does not fit in what is left")
        yield key >> 3, data[at : at + size]
        at += size
