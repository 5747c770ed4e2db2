"""Characters, bytes, byte-level BPE or any tokenizer.json: text to ids and back.

Every kind is a Hugging Face `tokenizers` object underneath, so what a run saves is an ordinary
tokenizer.json that any tool opens.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax import sentencepiece
from llm_jax.chat import read_template
from llm_jax.errors import InputError
from llm_jax.files import write_whole

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = "chat_template.jinja"
BYTE_SYMBOLS = 256

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

    `bos_id`, `eos_id`: None where the tokenizer has none. `add_bos`: whether the model expects a
    prompt to begin with BOS; `encode` never puts it there itself. With `split_special_tokens` the
    names of special tokens in a text are ordinary text, as they must be for text of unknown origin;
    without, they become the special ids, which is what foreign tokenizers do by default.
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
        self.add_bos = bool(add_bos) and self.bos_id is not None
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
        return [row.ids for row in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        """`encode`, with the names of special tokens as their ids, whatever `split_special_tokens` is."""
        if not self.split_special_tokens:
            return self.encode(text)
        return self._of_special_tokens.encode(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids` without special tokens; bytes that are no UTF-8 show as U+FFFD."""
        return self.backend.decode([index(i) for i in ids], skip_special_tokens=True)

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
    spec = _read_json(file, "tokenizer", remedy="give a tokenizer.json or a folder that holds one")
    try:
        backend = hf.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:  # the library raises no narrower class, and panics by one that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{file} is not a tokenizer.json of the tokenizers library ({_one_line(error)}); "
            "give one that tokenizers.Tokenizer.from_file opens"
        ) from None
    settings_file = file.parent / "tokenizer_config.json"
    settings = {}
    if settings_file.exists():
        settings = _read_json(settings_file, "tokenizer", remedy="repair or remove it")
    added = {token.content for token in backend.get_added_tokens_decoder().values()}

    def special(key: str, names: Sequence[str]) -> str | None:
        if key in settings:
            return _name(settings[key])
        return next((name for name in names if name in added), None)

    bos_token = special("bos_token", BOS_NAMES)
    add_bos = settings.get("add_bos_token")
    if add_bos is None and bos_token is not None:
        add_bos = backend.encode("", add_special_tokens=True).ids[:1] == [backend.token_to_id(bos_token)]
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
    settings_file = file.with_name("tokenizer_config.json")
    settings = {}
    if settings_file.exists():
        settings = _read_json(settings_file, "tokenizer", remedy="repair or remove it")
    names = {"bos_token": vocabulary.name(vocabulary.bos_id), "eos_token": vocabulary.name(vocabulary.eos_id)}
    names |= {key: _name(settings[key]) for key in names if key in settings}
    try:
        backend = sentencepiece.build(vocabulary)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return Tokenizer(
        backend,
        **names,
        add_bos=bool(settings.get("add_bos_token", True)),
        split_special_tokens=bool(settings.get("split_special_tokens", False)),
        chat_template=_chat_template(file.parent, settings),
        settings=settings,
    )


def _name(token: Any) -> str | None:
    """tokenizer_config.json has a token as its text, or as an object; an explicit null means that there is none."""
    return token["content"] if isinstance(token, dict) else token


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


def _read_json(file: Path, what: str, *, remedy: str) -> dict:
    try:
        spec = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{what} file {file} can't be read ({error.strerror}); {remedy}") from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise InputError(f"{what} file {file} is not JSON ({_one_line(error)}); {remedy}") from None
    if not isinstance(spec, dict):
        raise InputError(f"{what} file {file} holds no JSON object; {remedy}")
    return spec


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
