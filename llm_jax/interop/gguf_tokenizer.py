"""A GGUF file's vocabulary as a Tokenizer, and back: byte-level BPE, split as llama.cpp does, and SentencePiece."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, normalizers

from llm_jax.errors import InputError
from llm_jax.sentencepiece import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    add_tokens,
    build,
    merges_of,
)
from llm_jax.tokenizers import Tokenizer

# Control tokens that end an answer, whatever the file calls its end of text.
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_SPLIT = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_AHEAD = r"[^\r\n\p{L}\p{N}]?"
TEKKEN_SPLIT = (
    rf"{_AHEAD}{_UPPER}*{_LOWER}+|{_AHEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp does with a file that does not say.
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")


def _splits(*patterns: str) -> dict[str, Any]:
    each = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*each, last]}


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}

# tokenizer.ggml.pre -> (normalizer, pre-tokenizer, whether a token that is there whole is taken without merges), as
# published tokenizer.json have them; the first name of several that mean the same is written.
PRE: dict[tuple[str, ...], tuple[str | None, dict[str, Any], bool]] = {
    ("gpt-2", "phi-2", "mpt", "jais"): (None, _BYTE_LEVEL, False),
    ("olmo",): ("NFC", _BYTE_LEVEL, False),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (
        None,
        {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]},
        False,
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"): (None, _splits(LLAMA3_SPLIT), True),
    ("dbrx", "smaug-bpe"): (None, _splits(LLAMA3_SPLIT), False),
    ("qwen2", "deepseek-r1-qwen"): ("NFC", _splits(QWEN2_SPLIT), False),
    ("stablelm2", "hunyuan"): (None, _splits(QWEN2_SPLIT), False),
    ("tekken",): (None, _splits(TEKKEN_SPLIT), True),
    ("default",): (None, _splits(*DEFAULT_SPLITS), False),
}
ADDS_BOS = ("llama-bpe", "tekken")  # where the file does not say


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata.

    Raises:
        InputError: a kind that is not known here, or lists that do not belong together.
    """
    kind = _get(metadata, "model", str)
    tokens = _get(metadata, "tokens", list)
    kinds = _get(metadata, "token_type", np.ndarray, np.full(len(tokens), NORMAL))
    if kinds.shape != (len(tokens),) or kinds.dtype.kind not in "iu":
        raise InputError(f"tokenizer.ggml.token_type must have {len(tokens)} numbers, one for each token")
    if len(kinds) and not (kinds.min() >= 0 and kinds.max() <= BYTE):
        raise InputError(f"tokenizer.ggml.token_type must have numbers from 0 to {BYTE}")
    kinds = np.maximum(kinds, NORMAL)  # 0 is not told
    if len(set(tokens)) != len(tokens):
        raise InputError("tokenizer.ggml.tokens has a token twice")
    if kind == "gpt2":
        return _byte_level(metadata, tokens, kinds.tolist())
    if kind == "llama":
        return _sentencepiece(metadata, tokens, kinds.tolist())
    raise InputError(f"tokenizer.ggml.model ({kind!r}) must be gpt2 or llama")


def stop_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The ids that end a text; None where the file names none."""
    tokens = _get(metadata, "tokens", list)
    names = ("eos", "eot", "eom")
    given = {i for name in names if (i := _special_id(metadata, name, tokens)) is not None}
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    controls = [token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
    given |= {tokens.index(token) for token in END_OF_TURN if token in controls}
    return tuple(sorted(given)) or None


def gguf_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer, its list of tokens filled up to the model's vocabulary.

    Raises:
        InputError: llama.cpp has no counterpart of it.
    """
    spec = json.loads(tokenizer.backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise InputError(f"a tokenizer of type {spec['model']['type']} has no counterpart in GGUF here")
    added = tokenizer.backend.get_added_tokens_decoder()
    vocab = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens = [vocab.get(i, f"[UNUSED{i}]") for i in range(max(vocab_size, tokenizer.vocab_size))]
    kinds = [
        (CONTROL if added[i].special else USER_DEFINED) if i in added else NORMAL if i in vocab else UNUSED
        for i in range(len(tokens))
    ]
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in spec["model"]["merges"]]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    metadata: dict[str, Any] = {
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "add_bos_token": tokenizer.add_bos,
    } | {name: i for name, i in ids.items() if i is not None}
    is_sentencepiece = spec["model"]["byte_fallback"]
    metadata |= _of_sentencepiece(spec, tokens, merges, kinds) if is_sentencepiece else _of_byte_level(spec, merges)
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()} | template


def _of_byte_level(spec: Mapping[str, Any], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    found = [names[0] for names, how in PRE.items() if how == _how(spec)]
    if not found or "ByteLevel" not in json.dumps(spec["decoder"]):
        splitting = json.dumps(spec["pre_tokenizer"])
        raise InputError(
            f"the way this tokenizer splits text has no counterpart in llama.cpp, which knows "
            f"{', '.join(names[0] for names in PRE)}: {splitting[:200]}"
        )
    return {"model": "gpt2", "pre": found[0], "merges": [" ".join(merge) for merge in merges]}


def _of_sentencepiece(
    spec: Mapping[str, Any], tokens: list[str], merges: Sequence[Sequence[str]], kinds: list[int]
) -> dict[str, Any]:
    """Scores that bring about the merges, since llama.cpp joins the two neighbours whose joint has the highest.

    Where the tokenizer puts a space before a text, llama.cpp puts one behind each special token too.
    """
    adds_space = _adds_space(spec)
    ids = {token: i for i, token in enumerate(tokens)}
    for byte, name in enumerate(BYTE_PIECES):
        if name not in ids and byte < 128 and chr(byte) in ids:  # Gemma's tabulator, which others are merged from
            ids[name] = ids.pop(chr(byte))
            tokens[ids[name]] = name
        if name not in ids:
            raise InputError(f"the tokenizer has no {name} for a byte, which llama.cpp needs: it has no counterpart")
        kinds[ids[name]] = BYTE
    unknown = spec["model"]["unk_token"]
    if unknown not in ids:
        raise InputError("the tokenizer has no token for what is unknown, and no counterpart in llama.cpp")
    kinds[ids[unknown]] = UNKNOWN
    pairs = [(left, right) for left, right in merges]
    scores = np.full(len(tokens), -len(pairs) - 1, np.float32)
    for rank, group in enumerate(_of_one_score(pairs)):
        scores[[ids[token] for token in group]] = -rank
    added = {token["content"] for token in spec["added_tokens"]}  # found before anything is merged
    own, made = (
        {pair for pair in some if not added & {*pair, "".join(pair)}}
        for some in (pairs, merges_of(Vocabulary(tokens, scores.tolist(), kinds)))
    )
    if own != made:
        left, right = min(own ^ made)
        does = "merges" if (left, right) in own else "does not merge"
        raise InputError(
            f"the tokenizer {does} {left!r} and {right!r}, and llama.cpp merges what makes a token: no counterpart"
        )
    # Users' tokens are looked for in the text as it is.
    plain = [token.replace(SPACE, " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, kinds)]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": plain,
        "scores": scores,
        "token_type": np.array(kinds, np.int32),
        "unknown_token_id": ids[unknown],
        "add_space_prefix": adds_space,
    }


def _of_one_score(merges: Sequence[tuple[str, str]]) -> list[list[str]]:
    """What is merged, in order; together what has one score: the runs of one character, of Llama and Mistral.

    Their merges lie between each other's, all but those of two single characters, which are the first or the last.
    """
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    groups: list[dict[str, None]] = []
    end = -1
    for rank, (left, right) in enumerate(merges):
        if rank > end:
            groups.append({})
        groups[-1][left + right] = None
        end = max(end, last[left + right])
    for i in [i for i, group in enumerate(groups) if len(group) > 1]:
        pair = {next(iter(groups[i]))[0] * 2: None}
        for beside in groups[max(i - 1, 0) : i + 2]:
            if beside == pair:
                groups[i] |= pair
                beside.clear()
    return [list(group) for group in groups if group]


def _adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether a space goes before a text; all else that is done to a text must be that blanks are written as "▁"."""
    adds_space = is_written = False
    for step in _steps(spec["normalizer"], "normalizers"):
        match step:
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                is_written = True
            case {"type": "Prepend", "prepend": "▁"} | {"type": "Replace", "pattern": {"Regex": _}, "content": "▁"}:
                adds_space = True
            case _:
                raise InputError(f"the tokenizer's normalizer {_shown(step)} has no counterpart in llama.cpp")
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Metaspace", "replacement": "▁" | " ", "prepend_scheme": scheme, "split": False}:
                is_written |= step["replacement"] == "▁"
                adds_space |= scheme != "never"
            case {"type": "Split", "pattern": {"String": " "}} if is_written:
                pass  # Gemma's, where no blank is left
            case _:
                raise InputError(f"the tokenizer's pre-tokenizer {_shown(step)} has no counterpart in llama.cpp")
    if not is_written:
        raise InputError("the tokenizer does not write blanks as '▁', and has no counterpart in llama.cpp")
    return adds_space


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the steps that it consists of."""
    if part is None:
        return []
    return [step for one in part[key] for step in _steps(one, key)] if part["type"] == "Sequence" else [part]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:200]


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
        raise InputError(f"tokenizer.ggml.{name} is missing or no {kind.__name__}{' of texts' * (kind is list)}")
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    pre = _get(metadata, "pre", str, "default")
    names = next((names for names in PRE if pre in names), None)
    if names is None:
        known = ", ".join(name for names in PRE for name in names)
        raise InputError(f"tokenizer.ggml.pre ({pre!r}) is not known; known are {known}")
    normalizer, splitting, ignore_merges = PRE[names]
    # Unused ones only fill the list up to the model's vocabulary.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    merges = []
    for merge in _get(metadata, "merges", list):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(f"tokenizer.ggml.merges has {merge[:40]!r}, of tokens that are not there")
        merges.append((left, right))
    backend = hf.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    # By the library's own JSON, so that what is written can be compared with what is known.
    spec = json.loads(backend.to_str()) | {"pre_tokenizer": splitting}
    backend = hf.Tokenizer.from_str(json.dumps(spec))
    if normalizer is not None:
        backend.normalizer = getattr(normalizers, normalizer)()
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, tokens, kinds, normalized=False)
    return Tokenizer(
        backend,
        **_special(metadata, tokens, adds_bos=names[0] in ADDS_BOS),
        split_special_tokens=False,
    )


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    scores = _get(metadata, "scores", np.ndarray)
    if scores.shape != (len(tokens),) or scores.dtype.kind not in "iuf" or not np.isfinite(scores).all():
        raise InputError(f"tokenizer.ggml.scores must have {len(tokens)} finite numbers, one for each token")
    special = _special(metadata, tokens, adds_bos=True)
    # llama.cpp leaves the blanks of a text as they are.
    adds_space = _get(metadata, "add_space_prefix", bool, True)
    if UNKNOWN not in kinds:
        kinds = [*kinds]
        kinds[_special_id(metadata, "unknown", tokens) or 0] = UNKNOWN  # as llama.cpp takes it, of whatever type
    # Users' tokens have plain blanks in such files, and are looked for where blanks are written as "▁".
    pieces = [token.replace(" ", SPACE) if kind == USER_DEFINED else token for token, kind in zip(tokens, kinds)]
    backend = build(Vocabulary(pieces, scores.tolist(), kinds, adds_space=adds_space))
    return Tokenizer(backend, **special, split_special_tokens=False)


def _special(metadata: Mapping[str, Any], tokens: Sequence[str], *, adds_bos: bool) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name in ("bos", "eos"):
        i = _special_id(metadata, name, tokens)
        named[f"{name}_token"] = None if i is None else tokens[i]
    add_bos = _get(metadata, "add_bos_token", bool, adds_bos)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise InputError(f"tokenizer.chat_template ({type(template).__name__}) must be a text")
    return named | {"add_bos": add_bos, "chat_template": template}


def _special_id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> int | None:
    i = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if i is not None and not (type(i) is int and 0 <= i < len(tokens)):
        shown = i if type(i) is int else type(i).__name__
        raise InputError(f"tokenizer.ggml.{name}_token_id ({shown}) is not among the {len(tokens)} tokens")
    return i


def _how(spec: Mapping[str, Any]) -> tuple[str | None, dict[str, Any], bool]:
    """(normalizer, pre-tokenizer, ignore_merges) of a tokenizer.json, written as in PRE."""
    normalizer = spec["normalizer"] and spec["normalizer"]["type"]
    return normalizer, _plain(spec["pre_tokenizer"]), bool(spec["model"].get("ignore_merges"))


def _plain(splitting: Any) -> Any:
    if not isinstance(splitting, dict):
        return splitting
    if splitting["type"] == "Sequence":
        return {"type": "Sequence", "pretokenizers": [_plain(each) for each in splitting["pretokenizers"]]}
    # Where tokens lie in the text is not asked for.
    return splitting | ({"trim_offsets": True} if splitting["type"] == "ByteLevel" else {})
