"""SentencePiece vocabularies beside the package sentencepiece, and files that no one would write."""

import io
import struct

import pytest
from hypothesis import HealthCheck, given, settings
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
    except InputError as error:
        assert "\n" not in str(error)
        return
    tokenizer.decode(tokenizer.encode("ab a"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_a_changed_file_opens_or_is_refused(tmp_path, changes):
    opens_or_refuses(tmp_path, mutate(VALID, changes))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_ten_thousand_changed_files_open_or_are_refused(tmp_path, changes):
    opens_or_refuses(tmp_path, mutate(VALID, changes))
