"""SentencePiece vocabularies as backends of the tokenizers library: tokenizer.model files, or pieces with scores.

Kudo and Richardson 2018, "SentencePiece". The file is a protobuf; of its messages only what is needed here is read.
"""

import math
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llm_jax.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the kind of a piece
SPACE = "▁"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MAX_RUN = 32  # of one character, for which an order of merges is looked for
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


def build(vocabulary: Vocabulary, *, prefix_everywhere: bool = True) -> hf.Tokenizer:
    """The backend that gives the ids that SentencePiece gives.

    prefix_everywhere: a space that is added before a text is added behind each special token too (llama.cpp, and
    transformers' legacy=True), else before the text alone.

    Not the same: a text that is one piece that users defined, or begins with one where the space is added before the
    text alone, gets no space (BPE); a charsmap is applied as the library does, to a whole grapheme at a time.

    Raises:
        InputError: lists of different lengths, a piece twice, scores or kinds that no list of merges can express.
    """
    pieces, scores, kinds = vocabulary.pieces, vocabulary.scores, vocabulary.kinds
    if not len(pieces) == len(scores) == len(kinds):
        raise InputError(f"{len(pieces)} pieces have {len(scores)} scores and {len(kinds)} kinds; give one each")
    if len(set(pieces)) != len(pieces):
        raise InputError("a piece is there twice")
    if not all(map(math.isfinite, scores)):
        raise InputError("a piece's score is not a finite number")
    unknown = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    byte_fallback = BYTE in kinds
    if vocabulary.is_unigram and unknown is None:
        raise InputError("a unigram vocabulary needs a piece for what is unknown, and has none")
    if vocabulary.is_unigram:
        pairs = list(zip(pieces, _unigram_scores(vocabulary), strict=True))
        backend = hf.Tokenizer(models.Unigram(pairs, unk_id=unknown, byte_fallback=byte_fallback))
        findable = [kind if kind != USER_DEFINED else NORMAL for kind in kinds]  # by its score
    else:
        vocab = {piece: i for i, piece in enumerate(pieces) if kinds[i] != UNUSED}
        merges = merges_of(vocabulary)
        for part in {part for merge in merges for part in merge} - vocab.keys():
            vocab[part] = vocab.pop(BYTE_PIECES[ord(part)])  # as Gemma's tabulator: one byte, whose id it gets anyway
        unk = vocabulary.name(unknown)
        bpe = models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
        backend = hf.Tokenizer(bpe)
        # They are looked for where blanks are written as "▁"; one with a plain blank in it is never found.
        lost = [kind == USER_DEFINED and " " in piece for piece, kind in zip(pieces, kinds, strict=True)]
        findable = [UNUSED if is_lost else kind for is_lost, kind in zip(lost, kinds, strict=True)]
    defined = [piece for piece, kind in zip(pieces, findable, strict=True) if kind == USER_DEFINED]
    backend.normalizer = _normalizer(vocabulary, vocabulary.adds_space and prefix_everywhere, defined)
    if vocabulary.adds_space and not prefix_everywhere:
        # In two steps, since Metaspace puts nothing before what begins with its sign.
        first, rest = (" ", "first"), (SPACE, "never")
        steps = [pre_tokenizers.Metaspace(sign, scheme, split=False) for sign, scheme in (first, rest)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    first = [decoders.Strip(content=" ", left=1)] if vocabulary.adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    add_tokens(backend, pieces, findable, normalized=True)
    return backend


def _normalizer(vocabulary: Vocabulary, adds_space: bool, defined: Sequence[str]) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.merges_spaces:
        # Not by the library's Strip, which takes line breaks too.
        steps += [normalizers.Replace(hf.Regex(r"\A +| +\z"), ""), normalizers.Replace(hf.Regex(" {2,}"), " ")]
    steps += [normalizers.Replace(" ", SPACE)]
    for piece in defined:
        # SentencePiece spares them; an added token is looked for in what the normalizer has made of the text.
        if (found := normalizers.Sequence(steps).normalize_str(piece)) != piece:
            raise InputError(f"the piece {piece!r} that users defined becomes {found!r} by the file's own normalizer")
    if adds_space and defined:
        # An added token's own text goes through the normalizer too, and must come out as it is.
        own = "|".join(map(re.escape, defined))
        steps += [normalizers.Replace(hf.Regex(rf"\A(?!(?:{own})\z)"), SPACE)]
    elif adds_space:
        steps += [normalizers.Prepend(SPACE)]
    return normalizers.Sequence(steps)


def add_tokens(backend: hf.Tokenizer, tokens: Sequence[str], kinds: Sequence[int], *, normalized: bool) -> None:
    """Makes control tokens special, and has those that users defined found in a text before it is split.

    normalized: whether what users defined is looked for in the normalized text.
    """
    for special, add in ((True, backend.add_special_tokens), (False, backend.add_tokens)):
        wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
        names = [token for token, kind in zip(tokens, kinds, strict=True) if kind in wanted]
        add([hf.AddedToken(name, special=special, normalized=normalized and not special) for name in names])


def merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The list that merges in the order of scores, the best first.

    SentencePiece joins two neighbours wherever what they make is a piece, by its score; a list names both. A part
    that is no piece is one byte, and there is a piece for it as such.

    Raises:
        InputError: no list does what the scores do.
    """
    kinds = dict(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
    scores = dict(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    lengths = {1} | {len(piece) for piece, kind in kinds.items() if kind == NORMAL}
    if sum(len(piece) ** 2 for piece, kind in kinds.items() if kind == NORMAL) > MAX_MERGE_WORK:
        raise InputError("the vocabulary has pieces that are too long to be found by merging")

    def is_joined(part: str) -> bool:
        """Each character is, and each normal piece; what users defined is found before, and stays as it is."""
        kind = kinds.get(part)
        return kind == NORMAL or (len(part) == 1 and kind != USER_DEFINED)

    cuts: dict[str, list[int]] = {}
    for piece, kind in kinds.items():
        if kind in (NORMAL, UNUSED):
            likely = [i for i in range(1, len(piece)) if i in lengths and len(piece) - i in lengths]
            cuts[piece] = [i for i in likely if is_joined(piece[:i]) and is_joined(piece[i:])]
        if kind == UNUSED and cuts[piece]:  # SentencePiece makes it, and takes it apart again in the end
            raise InputError(f"the piece {piece!r} is unused and merged from others, which no list of merges can say")
    by_score: dict[float, list[str]] = {}
    for piece in filter(cuts.get, cuts):
        by_score.setdefault(scores[piece], []).append(piece)
    merges = []
    for score in sorted(by_score, reverse=True):
        if len(by_score[score]) > 1:
            merges += _merges_of_runs(by_score[score], list(cuts))
            continue
        # Of several cuts SentencePiece takes the first in the text. Where two overlap, the end of one is the
        # beginning of the other, and in the first one it is the right part.
        (piece,) = by_score[score]
        pairs = [(piece[:i], piece[i:]) for i in cuts[piece]]
        merges += sorted(pairs, key=lambda pair: not piece.startswith(pair[1]))
    for part in {part for merge in merges for part in merge}:
        is_byte = part not in kinds and part.isascii() and kinds.get(BYTE_PIECES[ord(part)]) == BYTE
        if kinds.get(part, UNUSED) == UNUSED and not is_byte:
            raise InputError(f"the piece {part!r}, which others are merged from, is missing")
    return merges


def _merges_of_runs(tied: Sequence[str], pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Of pieces with one score, the place in the text decides, which a list can say of runs of one character alone.

    Llama's and Mistral's runs of spaces are such: they grow from the left, and doubling comes to the same.
    """
    runs: dict[str, set[str]] = {}
    for piece in tied:
        runs.setdefault(piece[0], set()).add(piece)
    doubled: dict[str, set[str]] = {character: set() for character in runs}
    for piece in pieces:
        for character in {left for left, right in zip(piece, piece[1:], strict=False) if left == right} & runs.keys():
            doubled[character].add(piece)
    if any(set(piece) != {piece[0]} for piece in tied) or doubled != runs or max(map(len, tied)) > MAX_RUN:
        raise InputError(
            f"{len(tied)} pieces have one score, such as {tied[0]!r} and {tied[1]!r}: their place in a text decides "
            "which is merged first, and no list of merges can say so; give the scores of the training"
        )
    merges = []
    for character, own in runs.items():
        lengths = {1} | set(map(len, own))
        ways = [(left, right) for left in lengths for right in lengths if left + right in lengths]
        ways.sort(key=lambda way: (way[0] != way[1], way[0] if way[0] == way[1] else -way[1]))
        pairs = [(character * left, character * right) for left, right in ways]
        model = models.BPE({character * length: length for length in lengths}, pairs)
        for length in range(1, 4 * max(lengths)):
            if [token.id for token in model.tokenize(character * length)] != _grown(length, lengths):
                raise InputError(f"runs of {character!r} have one score, and no list of merges joins them so")
        merges += pairs
    return merges


def _grown(length: int, lengths: set[int]) -> list[int]:
    """A run's parts when the first two neighbours that make a piece are joined, again and again."""
    parts = [1] * length
    i = 0
    while i < len(parts) - 1:
        if parts[i] + parts[i + 1] in lengths:
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            i = 0
        else:
            i += 1
    return parts


def _unigram_scores(vocabulary: Vocabulary) -> list[float]:
    """The library knows no kinds: what is never found in a text gets a score that its characters always beat."""
    rows = list(zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True))
    normal = [float(score) for _, score, kind in rows if kind == NORMAL]
    best, worst = max(normal, default=0.0), min([0.0, *normal])
    longest = max(len(piece) for piece, _, kind in rows if kind not in (NORMAL, USER_DEFINED))
    found = []
    for piece, score, kind in rows:
        if kind == USER_DEFINED:
            score = len(piece.encode()) * best - 0.1  # SentencePiece's own rule
        elif kind != NORMAL:
            score = (longest + 1) * worst - 1
        found.append(float(score))
    return found


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
            trainer |= dict(_fields(_expect(value, bytes)))  # given twice, a message is one
        elif field == 3:
            normalizer |= dict(_fields(_expect(value, bytes)))
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
