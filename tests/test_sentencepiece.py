"""SentencePiece vocabularies beside the package sentencepiece, and files that no one would write."""

import io
import json
import struct

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mutations import CHANGES, mutate

from llm_jax import sentencepiece
from llm_jax.errors import InputError
from llm_jax.tokenizers import load_tokenizer

CORPUS = """Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine.
One day, she saw 12 birds and 345 bees; the bees were "busy". Lily said: "Hello, bees!" They said nothing.
Привет, мир! Это маленькая девочка и её собака. 你好，世界。今天天气很好。 naïve café — it's fine.
def f(x): return x ** 2
""".splitlines()
TEXTS = [
    "Once upon a time there was a bird",
    "12,345 things in 2024",
    "several   blanks    here",
    " a leading blank",
    "  two leading blanks and a trailing one ",
    "Привет, мир! ещё",
    "你好，世界！",
    "emoji 🎉👩‍🚀 and é",
    "<turn>Lily<turn>  says",
    "a.<turn><turn> \n\n a<turn>birds.",
    "a line\nbreak\n\n  and an indent",
    "aaaaaaaaa bbbbbbbb",
    "ﬁne ½ ａｂｃ Å",
    "",
    " ",
]
KINDS = {
    "llama": dict(model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, normalization="identity"),
    "bpe": dict(model_type="bpe", byte_fallback=False, remove_extra_whitespaces=True, normalization="nmt_nfkc"),
    "no space first": dict(model_type="bpe", byte_fallback=True, add_dummy_prefix=False, normalization="identity"),
    "unigram": dict(model_type="unigram", byte_fallback=True, normalization="nmt_nfkc"),
    "unigram of t5": dict(model_type="unigram", byte_fallback=False, normalization="nmt_nfkc"),
    "symbols": dict(
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization="identity",
        add_dummy_prefix=False,  # as Gemma's
        user_defined_symbols=["<turn>", "    ", "▁▁▁"],
    ),
    "symbols behind a space": dict(
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization="identity",
        user_defined_symbols=["<turn>", "▁▁▁", "\n", "a."],
    ),
    "symbols of unigram": dict(
        model_type="unigram", byte_fallback=True, normalization="nmt_nfkc", user_defined_symbols=["<turn>", "bir"]
    ),
}


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("sentencepiece", reason="sentencepiece not installed")


def train(reference, normalization, **how):
    model = io.BytesIO()
    reference.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        vocab_size=420 if how["byte_fallback"] else 170,
        normalization_rule_name=normalization,
        hard_vocab_limit=False,
        minloglevel=2,
        **how,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def pair(request, reference, tmp_path_factory):
    """(the package's processor, our tokenizer of the same file)"""
    model = train(reference, **KINDS[request.param])
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(model)
    return reference.SentencePieceProcessor(model_proto=model), load_tokenizer(file)


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ids_and_text_are_those_of_sentencepiece(pair, text):
    processor, tokenizer = pair
    ids = processor.encode(text)
    assert tokenizer.encode(text) == ids
    if processor.unk_id() not in ids:  # which is a sign of its own there, and nothing here, as special tokens are
        assert tokenizer.decode(ids) == processor.decode(ids)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=st.sampled_from(sorted({*"".join(CORPUS), *" \n🎉"})), max_size=60))
def test_ids_of_any_text_are_those_of_sentencepiece(pair, text):
    processor, tokenizer = pair
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    assume(text not in added)  # alone it gets no space before it, as `build` says
    assert tokenizer.encode(text) == processor.encode(text)


def test_special_tokens_and_settings(reference, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(reference, **KINDS["llama"]))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.decode([1, *tokenizer.encode("Lily"), 2]) == "Lily"
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": false, "eos_token": {"content": "<s>"}, "bos_token": null}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, 1, False)


@pytest.mark.parametrize(
    "settings",
    [{"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}],
    ids=str,
)
def test_ids_around_special_tokens_are_those_of_transformers(reference, tmp_path, settings):
    """legacy: the space before a text also behind every special token. And what was added to the pieces.

    But a blank behind a special token, or at the start, counts for that space in transformers alone.
    """
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    (tmp_path / "tokenizer.model").write_bytes(train(reference, **KINDS["llama"]))
    size = reference.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).vocab_size()
    added = {str(size): "<turn>", str(size + 1): "<end>"}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    settings = settings | {
        "added_tokens_decoder": {i: {"content": text, **flags} for i, text in added.items()},
        "bos_token": "<s>",
        "eos_token": {"content": "<end>", **flags, "__type": "AddedToken"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)
    assert ours.eos_id == theirs.eos_token_id == size + 1
    for text in ("<turn>Lily said<end>\n<s>and  she", "Lily<turn>12", "<s><turn>", "a  b"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert load_tokenizer(tmp_path).decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint() == ours.fingerprint()
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert again.encode("Lily<turn>12") == [1, *ours.encode("Lily<turn>12")]


@pytest.mark.parametrize(
    "beside, words",
    [
        ({"<turn>": 500}, "no gaps"),
        ({"<turn>": "3"}, "an id for each token"),
        ({"<turn>": 3}, "which '▁a' has"),
        ({"": 8}, "a text as its content"),
        ({"<turn>": 8}, None),
    ],
    ids=str,
)
def test_added_tokens_beside_a_model(tmp_path, beside, words):
    (tmp_path / "tokenizer.model").write_bytes(VALID)
    (tmp_path / "added_tokens.json").write_text(json.dumps(beside))
    if words is None:
        assert load_tokenizer(tmp_path).encode("ab<turn>") == [3, 7, 8]
        return
    with pytest.raises(InputError, match=words) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_saved_is_an_ordinary_tokenizer_json(pair, tmp_path):
    _, tokenizer = pair
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    assert again.add_bos == tokenizer.add_bos and again.eos_id == tokenizer.eos_id


# -- Files that no one would write


def field(number, value):
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def piece(text, score=0.0, kind=1):
    return field(1, field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, kind))


VALID = b"".join(
    [piece("<unk>", 0.0, 2), piece("<s>", 0.0, 3), piece("</s>", 0.0, 3)]
    + [piece(text, -i) for i, text in enumerate(["▁a", "ab", "▁", "a", "b"])]
) + field(2, field(3, 2))


def hand_made(*rows):
    """A BPE model of characters and rows of (text, score, kind) behind the special pieces."""
    special = piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("</s>", 0.0, 3)
    characters = b"".join(piece(character, -1000.0 - i) for i, character in enumerate("▁ab"))
    model = special + characters + b"".join(piece(*row) for row in rows) + field(2, field(3, 2))
    return model + field(3, field(1, b"identity") + field(4, 0))


@pytest.mark.parametrize("lengths", [[2, 3, 4], [*range(2, 17)], [*range(2, 15), 16]], ids=str)
def test_runs_of_one_score_grow_from_the_left(reference, tmp_path, lengths):
    """As those of spaces in Llama's and Mistral's files, which have none of 15."""
    model = hand_made(("▁a", -1.0), ("ab", -2.0), *(("▁" * length, -1e9) for length in lengths))
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer, processor = load_tokenizer(tmp_path), reference.SentencePieceProcessor(model_proto=model)
    for length in range(100):
        for text in ("b" + " " * length + "b", " " * length + "ab"):
            assert tokenizer.encode(text) == processor.encode(text)


@given(text=st.text("ab", max_size=12))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_several_ways_to_make_a_piece_the_first_in_the_text_is_taken(reference, tmp_path, text):
    model = hand_made(("ab", -1.0), ("ba", -2.0), ("aba", -3.0), ("bab", -4.0), ("abab", -5.0), ("aab", -6.0))
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(tmp_path).encode(text) == reference.SentencePieceProcessor(model_proto=model).encode(text)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([("ab", -1.0), ("ba", -1.0)], "have one score"),
        ([("▁▁", -1.0), ("▁▁a", -2.0), ("▁▁▁", -1.0)], "have one score"),
        ([("▁" * length, -1.0) for length in (2, 3, 5)], "no list of merges joins them so"),
        ([("ab", -1.0, 5)], "unused"),
        ([("xa", -1.0)], "'x', which others are merged from, is missing"),
        ([("ab", float("nan"))], "finite"),
    ],
    ids=str,
)
def test_what_no_list_of_merges_can_say_is_refused(tmp_path, rows, words):
    (tmp_path / "tokenizer.model").write_bytes(hand_made(*rows))
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_a_character_that_is_a_byte_alone_is_merged(reference, tmp_path):
    """As Gemma's tabulator."""
    pieces = [piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    model = hand_made(("\t\t", -1.0), ("\ta", -2.0)) + b"".join(pieces) + field(2, bytes([0x98, 2, 1]))
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer, processor = load_tokenizer(tmp_path), reference.SentencePieceProcessor(model_proto=model)
    for text in ("\t", "\t\t\t", "b\ta\t", "\té"):
        assert tokenizer.encode(text) == processor.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_hand_made_file_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(VALID)
    assert load_tokenizer(tmp_path).encode("ab") == [3, 7]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "does not fit"),
        (b"\x0a", "ends within a number"),
        (b"\xff" * 11, "more than 10 bytes"),
        (VALID.replace(field(2, field(3, 2)), field(2, field(3, 4))), "model_type 4"),
        (VALID + piece("a"), "twice"),
        (VALID + piece("c", kind=9), "kind that does not exist"),
        (b"not a model at all", "SentencePiece"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_one_line(tmp_path, data, words):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value) and "tokenizer.model" in str(error.value)


def test_a_vocabulary_that_would_take_forever_is_refused():
    pieces = [chr(0x4E00 + i) * 4000 for i in range(100)]
    with pytest.raises(InputError, match="too long"):
        sentencepiece.build(sentencepiece.Vocabulary(pieces, [0.0] * 100, [1] * 100))


def opens_or_refuses(folder, data):
    (folder / "tokenizer.model").write_bytes(data)
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("ab a"))  # where a damaged normalizer may still fail, by some characters
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_a_changed_file_opens_or_is_refused(tmp_path, changes):
    opens_or_refuses(tmp_path, mutate(VALID, changes))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_ten_thousand_changed_files_open_or_are_refused(tmp_path, changes):
    opens_or_refuses(tmp_path, mutate(VALID, changes))
