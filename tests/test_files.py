import pytest

from llm_jax.files import write_whole, written_whole


def test_a_file_appears_and_is_replaced_whole(tmp_path):
    file = tmp_path / "a.bin"
    for content in (b"first", b"2nd"):
        before = file.read_bytes() if file.exists() else None
        with written_whole(file) as stream:
            stream.write(content)
            stream.flush()
            assert (file.read_bytes() if file.exists() else None) == before
        assert file.read_bytes() == content
    write_whole(file, "ä")
    assert file.read_text(encoding="utf-8") == "ä"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_what_is_not_finished_leaves_the_file_as_it_was(tmp_path, stop):
    file = tmp_path / "a.bin"
    file.write_bytes(b"before")
    with pytest.raises(stop):
        with written_whole(file) as stream:
            stream.write(b"half of it")
            raise stop
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
