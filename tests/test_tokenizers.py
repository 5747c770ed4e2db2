import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_jax.continuation import Continuation
from llm_jax.errors import InputError
from llm_jax.tokenizers import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    Tokenizer,
    _byte_alphabet,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)

CODE = "class A:\n    def name(self, x):\n        return x + 10\n\n\ndef other():\r\n\tpass\n" * 50
TEXT = CODE + "naïve Ünïcödé ▁ 日本語 🙂 don't\n"

CHAR = char_tokenizer(TEXT)
BYTE = byte_tokenizer()
BPE = train_bpe([TEXT], 300)
KINDS = pytest.mark.parametrize("tokenizer", [CHAR, BYTE, BPE], ids=["char", "byte", "bpe"])

# Surrogates are no text: UTF-8 has no bytes for them.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
@example(f"a {END_OF_TEXT} b {END_OF_TEXT}")
@example("\r\n\r\n  \t x  # y \r z\x00\ufeff\u2028 \u3000")
@example("e\u0301 \ufb01 \u00c5 \u212b")  # what a Unicode normalization would change
def test_byte_and_bpe_round_trips_are_exact_on_any_unicode(text):
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert BYTE.encode(text) == list(text.encode())


@given(st.text(sorted(set(TEXT))))
def test_char_round_trip(text):
    ids = CHAR.encode(text)
    assert len(ids) == len(text) and CHAR.decode(ids) == text
    assert CHAR.token_bytes()[ids].sum() == len(text.encode())


def test_char_ids_are_sorted_characters():
    tokenizer = char_tokenizer("banana\n")
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("\nabn") == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["xé", "x\ud800"])
def test_char_outside_the_vocabulary_is_named(text):
    with pytest.raises(InputError) as error:
        char_tokenizer("xyz").encode(text)
    message = str(error.value)
    assert ascii(text[1]) in message and f"U+{ord(text[1]):04X}" in message and "bpe" in message
    assert "\n" not in message


def test_half_a_surrogate_pair_is_a_clear_error():
    for tokenizer in (BYTE, BPE):
        with pytest.raises(InputError, match="surrogate"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize("ids, text", [([0xFF, 0x41], "\ufffdA"), ([0xE2, 0x82], "\ufffd")])
def test_invalid_utf8_decodes_to_the_replacement_character(ids, text):
    assert BYTE.decode(ids) == text == bytes(ids).decode(errors="replace")


@KINDS
def test_decode_takes_numpy_ids(tokenizer):
    assert tokenizer.decode(np.asarray(tokenizer.encode("def name"), np.int32)) == "def name"


@KINDS
def test_encode_batch_is_encode_of_each(tokenizer):
    texts = ["def name", "", "class A:\n    pass"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@KINDS
def test_saved_file_means_the_same_to_the_tokenizers_library(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    library = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = library.encode(TEXT).ids
    assert ids == tokenizer.encode(TEXT)
    assert library.decode(ids) == TEXT


@KINDS
def test_load_gives_back_what_was_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.vocab_size == tokenizer.vocab_size
        assert (loaded.bos_id, loaded.eos_id, loaded.add_bos) == (tokenizer.bos_id, tokenizer.eos_id, False)
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert load_tokenizer(tmp_path).encode_batch([TEXT]) == [tokenizer.encode(TEXT)]


def test_fingerprints_differ():
    kinds = [CHAR, BYTE, BPE, char_tokenizer("ab"), char_tokenizer("abc"), train_bpe([TEXT], 290)]
    assert len({tokenizer.fingerprint() for tokenizer in kinds}) == len(kinds)


def test_transformers_opens_the_saved_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    BPE.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.bos_token == theirs.eos_token == END_OF_TEXT
    assert theirs.eos_token_id == BPE.eos_id
    text = TEXT + END_OF_TEXT
    assert theirs.encode(text, add_special_tokens=False) == BPE.encode(text)
    assert theirs.decode(BPE.encode(TEXT)) == TEXT


def test_special_tokens():
    assert CHAR.bos_id is CHAR.eos_id is BYTE.bos_id is BYTE.eos_id is None
    assert BPE.bos_id == BPE.eos_id is not None
    assert not (CHAR.add_bos or BYTE.add_bos or BPE.add_bos)
    assert BPE.token_bytes()[BPE.eos_id] == 0
    assert BPE.decode([BPE.eos_id, *BPE.encode("x"), BPE.eos_id]) == "x"
    assert BPE.eos_id not in BPE.encode(END_OF_TEXT)  # a text can't forge the end of a document


def test_special_token_text_stays_text_after_load(tmp_path):
    BPE.save(tmp_path)
    ids = load_tokenizer(tmp_path).encode(END_OF_TEXT)
    assert ids == BPE.encode(END_OF_TEXT) and len(ids) > 1


@pytest.mark.parametrize("prompt", ["def ", "class A:\n", "def name(self):\n    ", "x = 1\n\n"])
def test_a_prompt_is_tokenized_as_the_text_that_it_begins(prompt):
    text = prompt + ("    pass\n" if prompt.endswith(":\n") else "name = 1\n")
    ids = BPE.encode(prompt)
    assert BPE.encode(text)[: len(ids)] == ids


def test_bpe_keeps_an_indentation_whole():
    assert len(BPE.encode("\n        ")) == 2 and len(BPE.encode("def ")) == 1


def test_bpe_vocab_size_is_exact_and_holds_every_byte():
    assert BPE.vocab_size == 300
    smallest = train_bpe(["aaaa"], 257)
    assert smallest.vocab_size == 257
    assert sorted(smallest.token_bytes()) == [0] + [1] * 256
    with pytest.raises(InputError, match=r"vocab_size \(256\) must be at least 257.*byte"):
        train_bpe(["aaaa"], 256)


def test_alphabet_is_the_library_s():
    assert sorted(_byte_alphabet()) == sorted(hf.pre_tokenizers.ByteLevel.alphabet())


def test_bpe_training_is_the_same_in_every_process():
    program = (
        "import sys; from llm_jax.tokenizers import train_bpe;print(train_bpe([sys.stdin.read()], 300).fingerprint())"
    )
    for hash_seed in "12":
        found = subprocess.run(
            [sys.executable, "-c", program],
            input=TEXT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert found.stdout.strip() == BPE.fingerprint()


def foreign(folder: Path, added: list[str], config: dict | None = None, bos_first: str | None = None) -> Path:
    """A tokenizer.json such as other tools write: special tokens are parsed, some put BOS first."""
    backend = hf.Tokenizer.from_str(BYTE.backend.to_str())
    backend.add_special_tokens(added)
    backend.enable_truncation(3)
    backend.enable_padding(length=3, pad_id=0)
    if bos_first:
        backend.post_processor = hf.processors.TemplateProcessing(
            single=f"{bos_first} $A", special_tokens=[(bos_first, backend.token_to_id(bos_first))]
        )
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    "added, config, bos, eos",
    [
        (["<|endoftext|>"], None, 256, 256),
        (["<s>", "</s>"], None, 256, 257),
        (["<|end_of_text|>", "<|begin_of_text|>"], None, 257, 256),
        (["<bos>", "<eos>"], {}, 256, 257),
        (["<a>", "<b>"], None, None, None),
        (["<a>", "<b>", "<s>"], {"bos_token": "<a>", "eos_token": {"content": "<b>"}}, 256, 257),
        (["<|endoftext|>"], {"bos_token": None, "eos_token": "<|endoftext|>"}, None, 256),
    ],
)
def test_bos_and_eos_of_a_foreign_tokenizer(added, config, bos, eos, tmp_path):
    tokenizer = load_tokenizer(foreign(tmp_path, added, config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    assert not tokenizer.add_bos
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.bos_id, again.eos_id) == (bos, eos)


@pytest.mark.parametrize("config, add_bos", [(None, True), ({"add_bos_token": False}, False)])
def test_add_bos_of_a_foreign_tokenizer(config, add_bos, tmp_path):
    tokenizer = load_tokenizer(foreign(tmp_path, ["<s>", "</s>"], config, bos_first="<s>"))
    assert tokenizer.add_bos is add_bos
    assert tokenizer.encode("abcdef") == list(b"abcdef")  # no BOS, not cut to 3
    assert tokenizer.encode("a") == list(b"a")  # not filled up to 3
    assert tokenizer.encode("a<s>") == [97, 256]
    assert tokenizer.token_bytes()[256] == 0


@pytest.mark.parametrize(
    "written, template",
    [
        (None, None),
        ("{{ a }}", "{{ a }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_chat_template_of_a_foreign_tokenizer(written, template, tmp_path):
    tokenizer = load_tokenizer(foreign(tmp_path, ["<s>"], {"chat_template": written}))
    assert tokenizer.chat_template == template
    (tmp_path / CHAT_TEMPLATE).write_text("é {{ wins }}\n", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "é {{ wins }}\n"
    tokenizer.save(tmp_path)  # what was there before no longer counts
    assert load_tokenizer(tmp_path).chat_template == template
    assert ("chat_template" in json.loads((tmp_path / "tokenizer_config.json").read_text())) == bool(template)


def test_a_chat_template_decides_no_ids():
    backend = hf.Tokenizer.from_str(BPE.backend.to_str())
    chatter = Tokenizer(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, chat_template="x")
    assert chatter.fingerprint() == BPE.fingerprint()


@pytest.mark.parametrize("written", [3, {"default": "x"}, [], [{"name": "other", "template": "x"}], ["x"]])
def test_a_chat_template_of_another_form_is_one_line(written, tmp_path):
    file = foreign(tmp_path, ["<s>"], {"chat_template": written})
    with pytest.raises(InputError, match="chat_template.*must be a text") as error:
        load_tokenizer(file)
    assert "tokenizer_config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_chat_template_file_that_is_no_text(tmp_path):
    foreign(tmp_path, ["<s>"])
    file = tmp_path / CHAT_TEMPLATE
    for content, message in ((b"\xff", "is not UTF-8"), (b"x" * (2**20 + 1), "1048577 bytes")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load_tokenizer(tmp_path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match="can't be read"):
        load_tokenizer(tmp_path)


def test_names_of_special_tokens_as_ids_when_asked_for():
    assert BPE.encode_special(f"def {END_OF_TEXT}") == [*BPE.encode("def "), BPE.eos_id]
    assert BPE.eos_id not in BPE.encode(END_OF_TEXT)
    for tokenizer in (CHAR, BYTE):
        assert tokenizer.encode_special("def") == tokenizer.encode("def")


def test_token_bytes_of_a_sentencepiece_tokenizer(tmp_path):
    vocab = ["<s>", "▁", "▁a", "é", "<0x0A>"]
    backend = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(vocab)}, [], byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_bytes().tolist() == [0, 1, 2, 2, 1]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "can't be read"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "no JSON object"),
        (b'{"a": 1}', "is not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer(content, message, tmp_path):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(InputError, match=message) as error:
            load_tokenizer(path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def of_byte_tokens() -> hf.Tokenizer:
    """Llama's way: a letter or two and the rest as bytes, a space before a text, a special token."""
    vocab = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    model = hf.models.BPE({token: i for i, token in enumerate(vocab)}, [("▁", "a")], byte_fallback=True)
    backend = hf.Tokenizer(model)
    backend.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    steps = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    backend.decoder = hf.decoders.Sequence([*steps, hf.decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    return backend


def test_part_of_a_row_of_byte_tokens_may_be_no_text(tmp_path):
    """The library makes � of every byte of such a row, of whole characters too."""
    of_byte_tokens().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "a é日 a🙂 a"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    raw = " a é日 a🙂 a".encode()
    assert tokenizer.token_bytes()[ids].sum() == len(raw)
    for cut in range(len(ids)):
        whole = raw[: tokenizer.token_bytes()[ids[:cut]].sum()].decode(errors="replace")
        assert tokenizer.decode(ids[:cut]) == whole[1:]
        assert tokenizer.decode([*ids[:cut], tokenizer.bos_id]) == whole[1:]
    broken = [i for i in ids if i != 1 + 0xC3]  # the first byte of é is gone
    assert tokenizer.decode(broken) == "a \ufffd日 a🙂 a"
    continuation = Continuation(tokenizer, [tokenizer.bos_id])
    assert "".join(continuation.add([i]) for i in ids) + continuation.finish() == text


def test_a_saved_tokenizer_puts_bos_first_for_other_programs(tmp_path):
    backend = of_byte_tokens()
    Tokenizer(backend, bos_token="<s>", add_bos=True).save(tmp_path)
    assert hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids == [0, 259]
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path))("a").input_ids == [0, 259]


# -- Files that no one would write


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////9hYmM="}}, "can't encode"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, "can't encode"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, "2147483648, which is beyond its"),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}, "is not a tokenizer.json"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 5}, "decoder": 3}, "is not a tokenizer.json"),
    ],
    ids=str,
)
def test_what_the_library_fails_at_is_one_line(changes, message, tmp_path):
    """The first one by a panic, which is no Exception."""
    spec = json.loads(hf.Tokenizer(hf.models.BPE({"a": 0, "b": 1}, [])).to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path).encode("ab")
    assert "\n" not in str(error.value)


def test_brackets_without_end_are_no_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_padding_is_off_before_anything_is_encoded(tmp_path):
    foreign(tmp_path, ["<s>"])
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["padding"]["strategy"] = {"Fixed": 10**15}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).encode("ab") == [97, 98]


@pytest.mark.parametrize(
    "config", [{"bos_token": 5}, {"eos_token": ["</s>"]}, {"bos_token": {"content": {}}}, {"eos_token": "\ud800"}]
)
def test_settings_of_another_type_are_refused(config, tmp_path):
    foreign(tmp_path, ["<s>"], config)
    with pytest.raises(InputError, match="must be a token's text, or null"):
        load_tokenizer(tmp_path)


def test_tokens_that_only_the_settings_list_are_added(tmp_path):
    listed = {
        "256": {"content": "<s>", "special": True},
        "257": {"content": "<|im_end|>", "special": True},
        "258": {"content": "  ", "special": False},
    }
    foreign(tmp_path, ["<s>"], {"added_tokens_decoder": listed, "eos_token": "<|im_end|>", "pad_token": "<s>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a  b<|im_end|>") == [97, 258, 98, 257]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (257, 256)
    assert tokenizer.decode([97, 258, 98, 257]) == "a  b"
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.encode("a  b<|im_end|>") == [97, 258, 98, 257]


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"97": {"content": "a", "special": False}}},  # ordinary so far
        {"eos_token": "h", "pad_token": "i"},
        {"additional_special_tokens": ["h"]},
        {"added_tokens_decoder": {"257": {"content": "h a", "normalized": True}}},
    ],
    ids=str,
)
def test_ids_are_those_of_transformers_where_the_settings_say_more_than_the_file(config, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    foreign(tmp_path, ["<s>"], {"bos_token": "<s>"} | config)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a hat", "<s>hi, hat a", "oh a"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "listed, message",
    [
        ({"97": {"content": "<x>"}}, "which 'a' has"),
        ({"256": {"content": "<x>"}}, "which '<s>' has"),
        ({"300": {"content": "<x>"}}, "no gaps"),
        ({"257": {"special": True}}, "a text as its content"),
        ({"x": "<x>"}, "by their ids"),
        ([], "by their ids"),
    ],
)
def test_tokens_of_the_settings_that_have_no_place(listed, message, tmp_path):
    foreign(tmp_path, ["<s>"], {"added_tokens_decoder": listed})
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_a_special_token_that_is_none_is_told_of(tmp_path, capsys):
    foreign(tmp_path, ["<s>"], {"eos_token": "</s>"})
    assert load_tokenizer(tmp_path).eos_id is None
    assert "eos_token" in (told := capsys.readouterr().err) and "'</s>'" in told


def test_a_tokenizer_of_two_files_is_told_how_to_become_one(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="transformers makes one"):
        load_tokenizer(tmp_path)


def test_special_tokens_map_is_read_where_the_settings_say_nothing(tmp_path):
    foreign(tmp_path, ["<a>", "<b>", "<s>"], {"eos_token": "<s>"})
    content = {"bos_token": {"content": "<a>"}, "eos_token": "<b>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 258)


SPEC = of_byte_tokens().to_str()
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, len(SPEC)), st.binary(max_size=6))
    | st.tuples(st.just("insert"), st.integers(0, len(SPEC)), st.sampled_from([b"9" * 9, b"null", b"{}", b"[" * 9])),
    min_size=1,
    max_size=4,
)


def check_opens_or_is_refused(folder, changes):
    content = bytearray(SPEC.encode())
    for kind, at, part in changes:
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = part
        else:
            content[at : at + len(part)] = part if kind == "set" else b""
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("a é a"))
        assert len(tokenizer.token_bytes()) == tokenizer.vocab_size <= len(content)
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES)
def test_a_changed_file_opens_or_is_refused(tmp_path, changes):
    check_opens_or_is_refused(tmp_path, changes)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES)
def test_ten_thousand_changed_files_open_or_are_refused(tmp_path, changes):
    check_opens_or_is_refused(tmp_path, changes)
