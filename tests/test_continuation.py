"""Pieces of text: whole characters, stop strings cut exactly, and together what decoding all at once gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.continuation import UNKNOWN, Continuation
from llm_jax.tokenizers import byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["the cat sees the dog → ☕🙂\n" * 50], 290)


def pieces(tokenizer, prompt, ids, stops=(), sizes=None):
    """One piece for each call, and the last."""
    continuation, out = Continuation(tokenizer, prompt, stops), []
    for size in sizes or [1] * len(ids):
        out.append(continuation.add(ids[:size]))
        ids = ids[size:]
    return continuation, [*out, continuation.finish()]


def test_a_character_is_given_when_its_last_byte_is_there():
    _, out = pieces(BYTES, [*b"a"], [*"é🙂b".encode()])
    assert out == ["", "é", "", "", "", "🙂", "b", ""]


def test_bytes_that_are_no_character_are_given_when_that_is_certain():
    _, out = pieces(BYTES, [], [0xF0, 0x9F, ord("a"), 0xFF, 0xC3])
    assert out == ["", "", UNKNOWN + "a", "", UNKNOWN, UNKNOWN]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_together_are_the_text(tokenizer, data):
    """Random ids, most of which are broken characters; pieces of any size; texts longer than the window."""
    prompt = tokenizer.encode(data.draw(st.text(alphabet="ab é🙂", max_size=12)))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=200))
    if data.draw(st.booleans()):
        ids = tokenizer.encode("the cat sees ☕🙂 → the dog\n" * 8)
    sizes, left = [], len(ids)
    while left:
        sizes.append(data.draw(st.integers(1, min(left, 20))))
        left -= sizes[-1]
    _, out = pieces(tokenizer, prompt, ids, sizes=sizes)
    start, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    assert start + "".join(out) == whole


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
@pytest.mark.parametrize("stop", ["dog", "t", "🙂", "es th", "\n", "sees the dog →", "☕"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stop_string_cuts_the_text_where_it_begins(tokenizer, stop, size):
    """It may lie across tokens, within one, or across characters of several bytes."""
    text = " cat sees the dog → ☕🙂\nthe cat"
    ids = tokenizer.encode(text)
    sizes = [size] * (len(ids) // size) + [len(ids) % size]
    continuation, out = pieces(tokenizer, tokenizer.encode("the"), ids, [stop, "zebra"], sizes=sizes)
    before = text.split(stop)[0]
    assert "".join(out) == before and continuation.is_stopped
    # Up to the token that completes it, and not one more.
    done = tokenizer.decode(ids[: continuation.num_tokens])
    assert stop in done and stop not in tokenizer.decode(ids[: continuation.num_tokens - 1])


def test_what_may_begin_a_stop_string_is_held_back():
    continuation, out = pieces(BYTES, [], [*b"ab--x--"], ["--end"])
    assert out == ["a", "b", "", "", "--x", "", "", "--"] and not continuation.is_stopped
    _, out = pieces(BYTES, [], [*b"aab"], ["aab", "ab"])
    assert "".join(out) == ""


def test_the_prompt_holds_no_stop_string():
    continuation, out = pieces(BYTES, [*b"stop st"], [*b"op now stop"], ["stop"])
    assert "".join(out) == "op now " and continuation.is_stopped


def test_after_a_stop_string_nothing_is_added():
    continuation = Continuation(BYTES, [], ["x"])
    assert continuation.add([*b"abx"]) == "ab" and continuation.add([*b"cd"]) == "" and continuation.finish() == ""
    assert continuation.num_tokens == 3
    assert np.isscalar(continuation.num_tokens)
