"""Characters, bytes, byte-level BPE or any tokenizer.json: text to ids and back.

Every kind is a Hugging Face `tokenizers` object underneath, so what a run saves is an ordinary
tokenizer.json that any tool opens.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llm_jax import sentencepiece
from llm_jax.chat import read_template
from llm_jax.errors import InputError
from llm_jax.files import read_json, write_whole
from llm_jax.progress import say

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = "chat_template.jinja"
BYTE_SYMBOLS = 256
LETTER = sentencepiece.BYTE_PIECES[ord("A")]

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")
# The order is a preference: the first that is an added token of the file is taken.
BOS_NAMES = ("<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>", END_OF_TEXT)
EOS_NAMES = ("<|end_of_text|>", "<eos>", "</s>", END_OF_TEXT)

# What a token may not cross. A line break is a token of its own and the indentation after it another, and a
# single space goes with the word, digit or punctuation before it, not after as in GPT-2: so a prompt that
# ends in "def " or ":\n" ends as the training text does there, where other splits leave a lone space that no
# word ever followed, or a line break that in training always held the indentation too.
BPE_SPLIT = r"(?:\p{L}+|\p{N}|[^\s\p{L}\p{N}]+)(?: (?!\s))?|\r?\n|[^\S\r\n]+"
CHAR_SPLIT = r"[\s\S]"


def _byte_alphabet() -> list[str]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


class Tokenizer:
    """Text to ids and back.

    `bos_id`, `eos_id`, `pad_id` (for other programs): None where the tokenizer has none. `add_bos`: whether
    the model expects a prompt to begin with BOS; `encode` never puts it there itself. With
    `split_special_tokens` the names of special tokens in a text are ordinary text, as they must be for text of
    unknown origin; without, they become the special ids, which is what foreign tokenizers do by default.
    `chat_template`: what `chat.render` makes a text of messages by; None where the model is no chat model.
    """

    def __init__(
        self,
        backend: hf.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos: bool = False,
        split_special_tokens: bool = True,
        settings: dict | None = None,
        chat_template: str | None = None,
    ):
        # Both are saved in some published files and would cut or fill the corpus without a word.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        self.backend = backend
        self.bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_id = None if eos_token is None else backend.token_to_id(eos_token)
        pad_token = (settings or {}).get("pad_token")
        self.pad_id = None if pad_token is None else backend.token_to_id(pad_token)
        self.add_bos = bool(add_bos) and self.bos_id is not None
        if self.add_bos and backend.post_processor is None and not (":" in bos_token or bos_token.startswith("$")):
            # For other programs, which open the saved file; the library can't spell those two kinds of names.
            special = [(bos_token, self.bos_id)]
            backend.post_processor = processors.TemplateProcessing([bos_token, "$A"], special_tokens=special)
        self.split_special_tokens = split_special_tokens
        self.chat_template = chat_template
        self._settings = settings or {}

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: the largest id and one, also where a file leaves some ids unused."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS; a character outside a character vocabulary is an InputError."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if self._characters is not None:
            return [self._encode_characters(text) for text in texts]
        for text in texts:
            _check_encodable(text)
        if self._is_bytes:
            return [list(text.encode()) for text in texts]
        with _failures_of_the_library("can't encode this text by this tokenizer; use another one"):
            return [row.ids for row in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        """`encode`, with the names of special tokens as their ids, whatever `split_special_tokens` is."""
        if not self.split_special_tokens:
            return self.encode(text)
        return self._of_special_tokens.encode(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 show as U+FFFD."""
        ids = [index(i) for i in ids]
        with _failures_of_the_library("can't decode these ids by this tokenizer; use another one"):
            return self._decode_around_bytes(ids) if self._byte_tokens else self._decode(ids)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each token stands for, 0 for special tokens and unused ids.

        Their sum over a text's ids is the length of the text for char, byte and byte-level BPE; a
        SentencePiece tokenizer counts the space that it puts before a text.
        """
        symbols = set(_byte_alphabet())
        is_byte_level = "ByteLevel" in json.dumps([self._spec["decoder"], self._spec["pre_tokenizer"]])
        # "▁" stands for a space only where the decoder says so; in a character vocabulary it is itself.
        is_sentencepiece = "▁" in json.dumps(self._spec["decoder"], ensure_ascii=False)
        added = self.backend.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(token.encode())
            elif is_byte_level and symbols.issuperset(token):
                lengths[i] = len(token)
            elif is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths[i] = 1
            else:
                lengths[i] = len((token.replace("▁", " ") if is_sentencepiece else token).encode())
        return lengths

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, and tokenizer_config.json as transformers' AutoTokenizer reads it.

        A chat_template.jinja there is removed: the template is in tokenizer_config.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = self.backend.id_to_token
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= self._settings | {
            "bos_token": None if self.bos_id is None else name(self.bos_id),
            "eos_token": None if self.eos_id is None else name(self.eos_id),
            "add_bos_token": self.add_bos,
            "split_special_tokens": self.split_special_tokens,
            "chat_template": self.chat_template,
        }
        if self.chat_template is None:
            del settings["chat_template"]
        write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        write_whole(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)  # of a tokenizer that was here before; it would win

    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text becomes; the same after save and load."""
        spec = {k: self._spec[k] for k in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        spec["own"] = [self.bos_id, self.eos_id, self.add_bos, self.split_special_tokens]
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _of_special_tokens(self) -> "Tokenizer":
        """A copy, since the switch is a state of the backend, which other threads encode with."""
        return Tokenizer(hf.Tokenizer.from_str(self.backend.to_str()), split_special_tokens=False)

    @cached_property
    def _spec(self) -> dict:
        return json.loads(self.backend.to_str())

    def _decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _byte_tokens(self) -> dict[int, bytes]:
        """The byte of each token that stands for one, where the decoder takes such tokens for bytes."""
        if "ByteFallback" not in json.dumps(self._spec["decoder"]) or self.backend.token_to_id(LETTER) is None:
            return {}
        ids = {self.backend.token_to_id(piece): bytes([i]) for i, piece in enumerate(sentencepiece.BYTE_PIECES)}
        ids.pop(None, None)
        return ids

    def _decode_around_bytes(self, ids: Sequence[int]) -> str:
        """The library spoils all of a row of byte tokens for a part that is no UTF-8: such rows are decoded here.

        Else a text that is streamed would lose whole characters to the next one's first byte.
        """
        ids = [i for i in ids if i not in self._special_ids]
        text, head, rest = "", [], []
        for is_byte, row in itertools.groupby(ids, self._byte_tokens.__contains__):
            row = list(row)
            raw = b"".join(map(self._byte_tokens.get, row)) if is_byte else b""
            if _is_utf8(raw):
                rest += row
                continue
            text += self._decode(head + rest)[len(head) :] + raw.decode(errors="replace")
            # A letter goes before what follows, lest a space be cut off it as at the start of a text.
            head, rest = [self.backend.token_to_id(LETTER)], []
        return text + self._decode(head + rest)[len(head) :]

    # The library takes 10 times longer than a dict for these two; a test holds them equal.

    @cached_property
    def _characters(self) -> dict[str, int] | None:
        if not isinstance(self.backend.model, models.WordLevel):
            return None
        split = {"Regex": CHAR_SPLIT}
        is_ours = (self._spec["pre_tokenizer"] or {}).get("pattern") == split
        return self.backend.get_vocab() if is_ours and not self._spec["added_tokens"] else None

    @cached_property
    def _is_bytes(self) -> bool:
        if self.backend.get_vocab_size() != BYTE_SYMBOLS or not isinstance(self.backend.model, models.BPE):
            return False
        model = self._spec["model"]
        is_plain = not model["merges"] and self._spec["normalizer"] is None
        return is_plain and model["vocab"] == {symbol: i for i, symbol in enumerate(_byte_alphabet())}

    def _encode_characters(self, text: str) -> list[int]:
        try:
            return [self._characters[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise InputError(
                f"character {character!a} (U+{ord(character):04X}) is not among the {self.vocab_size} of the "
                "character vocabulary; train with data.tokenizer=byte or bpe to take any text"
            ) from None


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {text[error.start]!a} at {error.start} is half of a surrogate pair, which is no "
            "text; give the text as valid UTF-8"
        ) from None


def char_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """One id per distinct character, in code point order, as nanoGPT's shakespeare_char; no BOS."""
    vocab = {character: i for i, character in enumerate(sorted(set(characters)))}
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # not in vocab: unknown is an error
    backend.pre_tokenizer = pre_tokenizers.Split(hf.Regex(CHAR_SPLIT), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """256 ids, each the byte itself; no BOS."""
    backend = hf.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(_byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` ids, `<|endoftext|>` (bos and eos) and 256 bytes included.

    The same texts give the same tokenizer on every machine. The library queues 256 texts: give a large
    corpus in pieces of some 64 KiB, cut where no token crosses anyway, as before a line break.
    """
    if vocab_size < BYTE_SYMBOLS + 1:
        raise InputError(
            f"data.vocab_size ({vocab_size}) must be at least {BYTE_SYMBOLS + 1} for data.tokenizer=bpe (256 "
            f"bytes and {END_OF_TEXT}); raise it, or set data.tokenizer=byte"
        )
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(hf.Regex(BPE_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer.json, SentencePiece's tokenizer.model, or the folder that holds one of them.

    bos, eos and add_bos come from tokenizer_config.json beside it, else from well-known names among
    its added tokens and from what its own post-processor puts first; the chat template from
    chat_template.jinja beside it, else from tokenizer_config.json.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "tokenizer.model").exists():
        file = path / "tokenizer.model"
    if file.suffix == ".model":
        return _load_sentencepiece(file)
    if not file.exists() and (file.parent / "vocab.json").exists():
        raise InputError(
            f"{file.parent} has its tokenizer as vocab.json, and no tokenizer.json; transformers makes one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    spec = read_json(file, remedy="give a tokenizer.json or a folder that holds one")
    try:
        backend = hf.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:
        if not _is_the_library_s(error):
            raise
        raise InputError(
            f"{file} is not a tokenizer.json of the tokenizers library ({_one_line(error)}); "
            "give one that tokenizers.Tokenizer.from_file opens"
        ) from None
    _check_ids(backend, file)
    settings = _settings_beside(file)
    try:
        _add_missing_tokens(backend, settings, file)
    except InputError as error:
        raise InputError(f"{file.parent}: {error}") from None
    added = {token.content for token in backend.get_added_tokens_decoder().values()}

    def special(key: str, names: Sequence[str]) -> str | None:
        if key in settings:
            name = settings[key]
            if name is not None and backend.token_to_id(name) is None:
                say(f"{key} beside {file} is {name!r}, which is none of its tokens: there is none then")
                return None
            return name
        return next((name for name in names if name in added), None)

    bos_token = special("bos_token", BOS_NAMES)
    add_bos = settings.get("add_bos_token")
    if add_bos is None and bos_token is not None:
        backend.no_padding()  # up to a length that the file says
        with _failures_of_the_library(f"can't encode by {file}; repair it"):
            first = backend.encode("", add_special_tokens=True).ids[:1]
        add_bos = first == [backend.token_to_id(bos_token)]
    return Tokenizer(
        backend,
        bos_token=bos_token,
        eos_token=special("eos_token", EOS_NAMES),
        add_bos=bool(add_bos),
        split_special_tokens=bool(settings.get("split_special_tokens", False)),
        settings=settings,
        chat_template=_chat_template(file.parent, settings),
    )


def _load_sentencepiece(file: Path) -> Tokenizer:
    """BOS comes first unless tokenizer_config.json says otherwise: the models of such files were trained so."""
    vocabulary = sentencepiece.read_model(file)
    settings = _settings_beside(file)
    names = {"bos_token": vocabulary.name(vocabulary.bos_id), "eos_token": vocabulary.name(vocabulary.eos_id)}
    names |= {key: settings[key] for key in names if key in settings}
    legacy = settings.get("legacy")
    if legacy is None:  # what transformers takes it for
        legacy = settings.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast")
    try:
        with _failures_of_the_library("can't make a tokenizer of it"):
            backend = sentencepiece.build(vocabulary, prefix_everywhere=bool(legacy))
            backend.normalizer.normalize_str("a")  # a damaged charsmap shows itself only when it is used
        # tokenizer_config.json has more of a token, and comes first.
        entries = _added_tokens_json(file.parent) | _added_tokens_decoder(settings)
        _add_tokens(backend, entries, _also_special(settings))
        special = [name for name in names.values() if name and backend.token_to_id(name) is not None]
        backend.add_special_tokens([hf.AddedToken(name, special=True, normalized=False) for name in special])
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return Tokenizer(
        backend,
        **names,
        add_bos=bool(settings.get("add_bos_token", True)),
        split_special_tokens=bool(settings.get("split_special_tokens", False)),
        chat_template=_chat_template(file.parent, settings),
        # A tokenizer.json is saved, which transformers would not take as it is if told of these.
        settings={key: value for key, value in settings.items() if key not in ("tokenizer_class", "legacy")},
    )


def _add_missing_tokens(backend: hf.Tokenizer, settings: Mapping[str, Any], file: Path) -> None:
    """What transformers adds to a tokenizer.json by the files beside it."""
    known = backend.get_added_tokens_decoder()
    entries = _added_tokens_json(file.parent) | _added_tokens_decoder(settings)
    entries = {i: entry for i, entry in entries.items() if i not in known or known[i].content != _content(entry)}
    special = _also_special(settings)
    _add_tokens(backend, entries, special, all_are_added=True)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = [settings.get(key) for key in SPECIAL_KEYS]
    for name in dict.fromkeys(name for name in (*named, *special) if isinstance(name, str) and name not in added):
        if backend.token_to_id(name) is not None:
            backend.add_special_tokens([hf.AddedToken(name, special=True, normalized=False)])
        elif name in special:
            say(f"special token {name!r} beside {file} is none of its tokens: it stays ordinary text")


def _added_tokens_decoder(settings: Mapping[str, Any]) -> dict[int, Any]:
    """Tokens by their ids, of tokenizer_config.json."""
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict) or not all(key.isdecimal() and len(key) < 10 for key in listed):
        raise InputError("added_tokens_decoder in tokenizer_config.json must have tokens by their ids")
    return {int(i): entry for i, entry in listed.items()}


def _also_special(settings: Mapping[str, Any]) -> list[Any]:
    also = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    return [_content(token) for token in also] if isinstance(also, list) else []


def _added_tokens_json(folder: Path) -> dict[int, str]:
    file = folder / "added_tokens.json"
    beside = read_json(file, remedy="repair or remove it") if file.exists() else {}
    if not all(type(i) is int for i in beside.values()):
        raise InputError("added_tokens.json must have an id for each token")
    return {i: text for text, i in beside.items()}


def _add_tokens(
    backend: hf.Tokenizer, entries: Mapping[int, Any], special: Sequence[str], *, all_are_added: bool = False
) -> None:
    """Adds what a folder has beyond its tokenizer's file, a text or an object each, by the ids that it gives.

    all_are_added: found in a text before it is split, also those of the vocabulary that are not special.
    """
    texts = {i: text for text, i in backend.get_vocab(with_added_tokens=True).items()}
    for i, entry in sorted(entries.items()):
        text = _content(entry)
        if not isinstance(text, str) or not text or not _is_text(text):
            raise InputError(f"added token {i} is {entry!r:.80}; it must have a text as its content")
        if texts.get(i, text) != text:
            raise InputError(f"added token {text!r} has the id {i}, which {texts[i]!r} has")
        given = entry if isinstance(entry, dict) else {}
        flags = {name: bool(given.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
        flags["special"] |= text in special
        if i not in texts or flags["special"] or all_are_added:
            add = backend.add_special_tokens if flags["special"] else backend.add_tokens
            normalized = all_are_added and bool(given.get("normalized", not flags["special"]))
            add([hf.AddedToken(text, normalized=normalized, **flags)])
        if (found := backend.token_to_id(text)) != i:
            raise InputError(f"added token {text!r} has the id {i}, and {found} would be its; ids must have no gaps")


def _settings_beside(file: Path) -> dict[str, Any]:
    """tokenizer_config.json before special_tokens_map.json, with the special tokens as their texts."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file.parent / name).exists():
            settings |= read_json(file.parent / name, remedy="repair or remove it")
    for key in SPECIAL_KEYS:
        if key in settings:
            token = settings[key] = _content(settings[key])  # an explicit null means that there is none
            if not (token is None or (isinstance(token, str) and _is_text(token))):
                raise InputError(f"{key} beside {file} is {token!r}; it must be a token's text, or null")
    return settings


def _content(token: Any) -> Any:
    """Such files have a token as its text, or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _check_ids(backend: hf.Tokenizer, file: Path) -> None:
    """Arrays are as long as the largest id, which can't be beyond what a file of this size could list."""
    vocab = backend.get_vocab(with_added_tokens=True)
    token, largest = max(vocab.items(), key=lambda item: item[1], default=("", 0))
    if largest > (size := file.stat().st_size) // 2:
        raise InputError(f"{file} gives {token!r} the id {largest}, which is beyond its {size} bytes; repair it")


def _chat_template(folder: Path, settings: dict) -> str | None:
    if (file := folder / CHAT_TEMPLATE).exists():
        return read_template(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # one for each use
        template = next(
            (each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"),
            template,
        )
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"chat_template of {folder / 'tokenizer_config.json'} ({type(template).__name__}) must be a text, or a "
            'list of {"name", "template"} with one named "default"; repair or remove it'
        )
    return template


@contextlib.contextmanager
def _failures_of_the_library(what: str) -> Iterator[None]:
    """As an InputError: a file can say what the library takes, and fails at only when it is used."""
    try:
        yield
    except BaseException as error:
        if not _is_the_library_s(error):
            raise
        raise InputError(f"the tokenizers library {what} ({_one_line(error)})") from None


def _is_the_library_s(error: BaseException) -> bool:
    """It raises Exception itself, and panics with what is no Exception and can't be imported."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_text(text: str) -> bool:
    """JSON can spell half a surrogate pair, which is none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
