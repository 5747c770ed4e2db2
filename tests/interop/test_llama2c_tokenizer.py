"""tokenizer.bin of llama2.c: files that no one would write. That its ids are the model's: test_stories.py."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jax.errors import InputError
from llm_jax.interop.llama2c import load_tokenizer

ROWS = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)] + [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
ROWS += [(" a", -1.0), ("ab", -2.0), (" ", -3.0), ("a", -4.0), ("b", -5.0), ("é", -6.0)]
SOUND = struct.pack("<i", 7) + b"".join(
    struct.pack("<fi", score, len(text.encode())) + text.encode() for text, score in ROWS
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, len(SOUND)), st.binary(max_size=5)),
    min_size=1,
    max_size=4,
)


def test_a_sound_file(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(SOUND)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.bin")
    assert tokenizer.encode("ab é") == [259, 263, 261, 264]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.vocab_size) == (1, 2, True, 265)


def check_opens_or_is_refused(file, changes):
    content = bytearray(SOUND)
    for kind, at, part in changes:
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = part
        else:
            content[at : at + len(part)] = part if kind == "set" else b""
    file.write_bytes(content)
    try:
        tokenizer = load_tokenizer(file)
    except InputError as error:
        assert "\n" not in str(error) and str(file) in str(error)
        return
    tokenizer.decode(tokenizer.encode("ab é 🙂"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES)
def test_a_changed_file_opens_or_is_refused(tmp_path, changes):
    check_opens_or_is_refused(tmp_path / "tokenizer.bin", changes)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES)
def test_ten_thousand_changed_files_open_or_are_refused(tmp_path, changes):
    check_opens_or_is_refused(tmp_path / "tokenizer.bin", changes)
