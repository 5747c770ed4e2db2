import hashlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import corpus as corpus_module
from llm_jax import documents
from llm_jax.config import DataConfig
from llm_jax.corpus import Corpus, prepare
from llm_jax.tokenizers import Tokenizer, byte_tokenizer, train_bpe

LINES = "".join(f"line {i} of naïve text 🙂\n" for i in range(2000))


@pytest.fixture
def text(tmp_path):
    """`text(content, tokenizer=...)`: the corpus of one file, in this test's cache."""

    def corpus(content: str, **config) -> Corpus:
        file = tmp_path / "input.txt"
        file.write_bytes(content.encode())
        return prepare(DataConfig(source="text", path=str(file), cache_dir=str(tmp_path / "cache"), **config))

    return corpus


@pytest.fixture
def folder(tmp_path):
    """`folder({name: bytes}, ...)`: the corpus of a folder with these files, by bytes."""

    def corpus(files: dict[str, bytes], path: str = "", **config) -> Corpus:
        root = tmp_path / "corpus"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        settings = {"source": "text", "tokenizer": "byte", "val_fraction": 0.0} | config
        return prepare(DataConfig(path=str(root / path), cache_dir=str(tmp_path / "cache"), **settings))

    return corpus


def read_bytes(corpus: Corpus) -> bytes:
    return np.concatenate([corpus.train, corpus.val]).astype(np.uint8).tobytes()


def digest(*documents: bytes) -> str:
    return hashlib.sha256(b"".join(d + len(d).to_bytes(8, "little") for d in documents)).hexdigest()


# ---------------------------------------------------------------------------------------------------
# Splits and tokens


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_train_then_val_is_the_text(text, tokenizer):
    corpus = text(LINES, tokenizer=tokenizer, vocab_size=300)
    decode = corpus.tokenizer.decode
    train, val = decode(corpus.train), decode(corpus.val)
    assert train + val == LINES
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == np.uint16 and corpus.train.ndim == 1
    # The border is a byte count, moved forward to the next character.
    assert 0 <= len(train.encode()) - int(len(LINES.encode()) * 0.9) < 4


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(0, 0.9))
@settings(deadline=None, max_examples=100)
def test_border_never_cuts_a_character(tmp_path_factory, content, val_fraction):
    file = tmp_path_factory.mktemp("border") / "a.txt"
    file.write_bytes(content.encode())
    size = len(content.encode())
    border = int(size * (1 - val_fraction))
    parts = {"train": b"", "val": b""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 3)
        for split, piece, _ in corpus_module._split_pieces([file], border):
            parts[split] += piece
            piece.decode()
    assert parts["train"] + parts["val"] == content.encode()
    assert border <= len(parts["train"]) < border + 4


def test_split_is_nanogpt_s_on_tinyshakespeare(tmp_path):
    assets = os.environ.get("LLM_JAX_ASSETS")
    if not assets:
        pytest.skip("LLM_JAX_ASSETS not set")
    file = Path(assets, "tinyshakespeare.txt")
    whole = file.read_text()
    # data/shakespeare_char/prepare.py of nanoGPT, which prints 65, 1,003,854 and 111,540
    stoi = {ch: i for i, ch in enumerate(sorted(set(whole)))}
    train, val = whole[: int(len(whole) * 0.9)], whole[int(len(whole) * 0.9) :]
    corpus = prepare(DataConfig(source="text", path=str(file), tokenizer="char", cache_dir=str(tmp_path)))
    assert (corpus.tokenizer.vocab_size, len(corpus.train), len(corpus.val)) == (65, 1003854, 111540)
    np.testing.assert_array_equal(corpus.train, [stoi[ch] for ch in train])
    np.testing.assert_array_equal(corpus.val, [stoi[ch] for ch in val])
    # and the pinned download is this very text
    assert hashlib.sha256(file.read_bytes()).hexdigest() == documents.SHAKESPEARE_SHA256


def test_bpe_is_trained_on_the_training_part_only(text):
    first = text("abcd\n" * 900 + "wxyz\n" * 100, vocab_size=300)
    assert first.tokenizer.fingerprint() == train_bpe(["abcd\n" * 900], 300).fingerprint()


def test_char_vocabulary_is_the_whole_corpus(text):
    corpus = text("a" * 95 + "z" * 5, tokenizer="char")
    assert corpus.tokenizer.vocab_size == 2
    assert list(corpus.val) == [0] * 5 + [1] * 5


def test_end_of_text_follows_each_document_where_there_are_several(folder, text):
    corpus = folder({"a.txt": b"one", "b/c.txt": b"two", "empty.txt": b""}, tokenizer="bpe", vocab_size=257)
    end = corpus.tokenizer.eos_id
    encode = corpus.tokenizer.encode
    assert list(corpus.train) == [*encode("one"), end, *encode("two"), end]
    alone = text("one", vocab_size=257, val_fraction=0.0)
    assert list(alone.train) == encode("one")


def test_bos_begins_each_document_where_a_prompt_begins_with_it(folder, text, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<s>", "</s>"])
    Tokenizer(tokenizer.backend, bos_token="<s>", eos_token="</s>", add_bos=True).save(tmp_path / "t")
    settings = dict(tokenizer=str(tmp_path / "t"), val_fraction=0.0)
    monkeypatch.setattr(documents, "PIECE_BYTES", 2)  # a document in many pieces begins once
    assert list(text("one", **settings).train) == [256, *b"one"]
    corpus = folder({"a.txt": b"one", "b.txt": b"two"}, **settings)
    assert list(corpus.train) == [256, *b"one", 257, 256, *b"two", 257]


def test_a_document_across_the_border_is_cut_in_two(folder):
    corpus = folder({"a": b"0123456789", "b": b"abcdefghij"}, tokenizer="bpe", vocab_size=257, val_fraction=0.25)
    end, encode = corpus.tokenizer.eos_id, corpus.tokenizer.encode
    assert list(corpus.train) == [*encode("0123456789"), end, *encode("abcde")]
    assert list(corpus.val) == [*encode("fghij"), end]
    at_a_border = folder({"b": b"abcdefghij"}, tokenizer="bpe", vocab_size=257, val_fraction=0.5)
    assert list(at_a_border.train) == [*encode("0123456789"), end]
    assert list(at_a_border.val) == [*encode("abcdefghij"), end]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("line", ["return é{i}", "x = [{i}, 'é。']  "])
def test_cutting_long_documents_does_not_change_the_tokens(text, monkeypatch, line, line_end):
    lines = [f"def f{i}(self):{line_end}    " + line.format(i=i) for i in range(3000)]
    content = "".join(line + line_end * (1 + i % 3) for i, line in enumerate(lines))
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 5000)
    monkeypatch.setattr(documents, "_CUT_SEARCH_BYTES", 500)
    corpus = text(content, vocab_size=400, val_fraction=0.0)
    assert corpus.train.tolist() == corpus.tokenizer.encode(content)


def test_large_vocabularies_take_uint32(text, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([f"<{i}>" for i in range(70000)])
    tokenizer.save(tmp_path / "big")
    corpus = text("<69999>x", tokenizer=str(tmp_path / "big"), val_fraction=0.0)
    assert corpus.train.dtype == np.uint32
    assert list(corpus.train) == [256 + 69999, ord("x")]


# ---------------------------------------------------------------------------------------------------
# Sources


def test_folder_is_read_recursively_in_order_without_hidden_and_binary_files(folder, capsys):
    corpus = folder(
        {
            "b.txt": b"2",
            "a/z.py": b"1",
            "c/.hidden": b"no",
            ".git/config": b"no",
            "0.png": b"P\0NG",
            "1.png": b"x" * 3 * documents.PIECE_BYTES + b"\0",
            "latin1.txt": b"caf\xe9",
            "nul.txt": b"a\0b",
            "d.any": b"3",
        }
    )
    assert read_bytes(corpus) == b"123"
    assert "4 of 7 files" in capsys.readouterr().err
    assert corpus.content_hash == digest(b"1", b"2", b"3")  # nothing of the files passed over


def test_globs(folder):
    files = {"a.txt": b"1", "b.md": b"no", "sub/c.txt": b"2", "[x].txt": b"3"}
    assert read_bytes(folder(files, "*.txt")) == b"31"
    assert read_bytes(folder(files, "**/*.txt")) == b"312"
    assert read_bytes(folder(files, "[x].txt")) == b"3"  # a file of that name comes before the pattern


def test_jsonl(folder):
    rows = [{"text": "one"}, {"text": "zwei é \u2028", "other": 1}, {"text": ""}, {"text": "3"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    corpus = folder({"a.jsonl": lines.encode()}, "a.jsonl", tokenizer="bpe", vocab_size=257)
    assert corpus.tokenizer.decode(corpus.train) == "onezwei é \u20283"
    assert (corpus.train == corpus.tokenizer.eos_id).sum() == 3


@pytest.mark.parametrize(
    "line, rule",
    [
        (b'{"txt": "a"}', 'no "text" string'),
        (b'{"text": 3}', 'no "text" string'),
        (b'["text"]', 'no "text" string'),
        (b'{"text": ', "not JSON"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        (b'{"text": "\xff"}', "not Unicode"),
    ],
)
def test_bad_jsonl_line_is_named(folder, line, rule):
    message = error_of(folder, {"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    assert "a.jsonl line 2" in message and rule in message


def test_parquet_without_pyarrow_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'llm_jax[parquet]'" in error_of(folder, {"a.parquet": b"PAR1"})


def test_parquet(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow not installed: pip install llm_jax[parquet]")
    write_table = importlib.import_module("pyarrow.parquet").write_table

    def file(name, columns):
        write_table(pyarrow.table(columns), tmp_path / name)
        return {name: (tmp_path / name).read_bytes()}

    corpus = folder(file("a.parquet", {"text": ["one", None, "é"], "n": [1, 2, 3]}), "a.parquet")
    assert read_bytes(corpus) == "oneé".encode()
    assert "no column text, only body" in error_of(folder, file("b.parquet", {"body": ["one"]}), "b.parquet")
    assert "holds int" in error_of(folder, file("c.parquet", {"text": [1]}), "c.parquet")
    assert "no parquet file" in error_of(folder, {"d.parquet": b"x"}, "d.parquet")


def test_python_stdlib(tmp_path, monkeypatch):
    files = {
        "ast.py": "1",
        "json/decoder.py": "2",
        "test/test_ast.py": "no",
        "unittest/test/x.py": "no",
        "idlelib/idle_test/x.py": "no",
        "site-packages/numpy.py": "no",
        "notes.txt": "no",
        "lib2to3/tests/data/bom.py": "no",
    }
    for name, content in files.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(content)
    monkeypatch.setattr(documents.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    config = DataConfig(tokenizer="byte", val_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    assert read_bytes(prepare(config)) == b"12"
    monkeypatch.setattr(documents.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nothing")})
    assert "data.path" in error_of(prepare, config)


def test_the_real_stdlib_by_bytes(tmp_path):
    corpus = prepare(DataConfig(tokenizer="byte", cache_dir=str(tmp_path)))
    assert 5e6 < len(corpus.train) + len(corpus.val) < 30e6
    assert b"def __init__(self" in corpus.train[:1_000_000].astype(np.uint8).tobytes()


@pytest.mark.slow
def test_the_real_stdlib_by_bpe(tmp_path):
    corpus = prepare(DataConfig(cache_dir=str(tmp_path)))
    assert corpus.tokenizer.vocab_size == 1024
    assert corpus.tokenizer.token_bytes()[corpus.val].sum() / len(corpus.val) > 2.5


class Response:
    def __init__(self, content):
        self.read = lambda: content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_tinyshakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    config = DataConfig(source="tinyshakespeare", tokenizer="byte", cache_dir=str(tmp_path))
    calls = []

    def urlopen(url, timeout):
        calls.append((url, timeout))
        return Response(b"First Citizen:\n")

    monkeypatch.setattr(documents.urllib.request, "urlopen", urlopen)
    message = error_of(prepare, config)
    assert documents.SHAKESPEARE_SHA256 in message and "data.path" in message
    assert not list(tmp_path.iterdir())  # a wrong text is not kept

    monkeypatch.setattr(documents, "SHAKESPEARE_SHA256", hashlib.sha256(b"First Citizen:\n").hexdigest())
    for _ in range(2):
        assert read_bytes(prepare(config)) == b"First Citizen:\n"
    assert len(calls) == 2 and calls[0][1] <= 10
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"First")  # damaged: fetched again
    assert read_bytes(prepare(config)) == b"First Citizen:\n"


@pytest.mark.parametrize("error", [OSError("no\nroute"), TimeoutError("timed out")])
def test_tinyshakespeare_offline_names_data_path(tmp_path, monkeypatch, error):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(documents.urllib.request, "urlopen", urlopen)
    message = error_of(prepare, DataConfig(source="tinyshakespeare", cache_dir=str(tmp_path)))
    assert "set data.path" in message and "https://" in message


# ---------------------------------------------------------------------------------------------------
# Shards of tokens


def nanogpt(tokens) -> bytes:
    return np.asarray(tokens, "<u2").tobytes()


def llmc(tokens, version=1, count=None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens) if count is None else count
    return header.tobytes() + nanogpt(tokens)


@pytest.mark.parametrize("write", [nanogpt, llmc])
def test_shards(folder, write):
    files = {"x_val_000.bin": write([7, 8]), "x_train_001.bin": write([3]), "x_train_000.bin": write([1, 2])}
    corpus = folder(files, source="bin")
    assert (list(corpus.train), list(corpus.val)) == ([1, 2, 3], [7, 8])
    assert isinstance(corpus.train, np.memmap)
    corpus = folder({}, "x_train_*.bin", source="bin", val_fraction=0.4)
    assert (list(corpus.train), list(corpus.val)) == ([1], [2, 3])
    assert list(folder({}, "x_train_000.bin", source="bin").train) == [1, 2]
    assert list(folder({"medieval.bin": write([5])}, "medieval.bin", source="bin", val_fraction=0.0).train) == [5]


def test_shards_of_both_kinds_are_one_corpus_by_content(folder, tmp_path):
    one = folder({"train.bin": nanogpt([1, 2])}, source="bin")
    other = folder({"train.bin": llmc([1, 2])}, source="bin")
    assert one.content_hash == other.content_hash
    two = folder({"train.bin": nanogpt([1]), "train_1.bin": nanogpt([2])}, source="bin")
    (tmp_path / "corpus/train_1.bin").rename(tmp_path / "corpus/val.bin")
    moved = folder({}, source="bin")
    assert len({one.content_hash, two.content_hash, moved.content_hash}) == 3


def test_shards_need_a_tokenizer_that_has_their_ids(folder, tmp_path):
    for kind in ("bpe", "char"):
        assert "tokenizer.json" in error_of(folder, {}, source="bin", tokenizer=kind)
    message = error_of(folder, {"train.bin": nanogpt([1, 256])}, source="bin")
    assert "train.bin has token 256" in message and "256 ids" in message
    train_bpe(["a"], 257).save(tmp_path / "tokenizer")
    corpus = folder({}, source="bin", tokenizer=str(tmp_path / "tokenizer"))
    assert list(corpus.train) == [1, 256]


@pytest.mark.parametrize(
    "content, rule",
    [
        (b"abc", "has 3 bytes, but uint16"),
        (llmc([1, 2], count=3), "promises 3 tokens"),
        (llmc([1, 2], count=-1), "promises -1 tokens"),
        (llmc([1, 2])[:-1], "promises 2 tokens"),
        (llmc([1, 2], version=7), "version 7"),
        (b"", "no training tokens"),
    ],
)
def test_bad_shards(folder, content, rule):
    assert rule in error_of(folder, {"train.bin": content}, source="bin")


# ---------------------------------------------------------------------------------------------------
# Cache and identity


def test_cache_hit_does_not_tokenize_again_and_a_change_does(text, monkeypatch):
    calls = []
    tokenize = corpus_module._tokenize
    monkeypatch.setattr(corpus_module, "_tokenize", lambda *args: calls.append(1) or tokenize(*args))
    first = text(LINES, tokenizer="byte")
    second = text(LINES, tokenizer="byte")
    assert len(calls) == 1
    np.testing.assert_array_equal(first.train, second.train)
    assert first.tokenizer.fingerprint() == second.tokenizer.fingerprint()
    changed = text(LINES.replace("line 7 ", "LINE 7 "), tokenizer="byte")
    assert len(calls) == 2 and changed.content_hash != first.content_hash
    text(LINES, tokenizer="char")
    text(LINES, tokenizer="byte", val_fraction=0.2)
    text(LINES, tokenizer="bpe", vocab_size=270)
    bpe = text(LINES, tokenizer="bpe", vocab_size=271)
    assert len(calls) == 6 and bpe.tokenizer.vocab_size == 271
    assert bpe.content_hash == first.content_hash  # of the text, whatever the tokenizer


def test_a_damaged_cache_entry_is_made_again(text, tmp_path):
    text(LINES, tokenizer="byte")
    (file,) = (tmp_path / "cache").glob("*/train.bin")
    file.write_bytes(b"")
    assert read_bytes(text(LINES, tokenizer="byte")) == LINES.encode()


def test_another_process_that_was_faster_keeps_its_folder(text, tmp_path, monkeypatch):
    """It is done just after this one has looked."""
    look = corpus_module._open

    def other_after(*arguments):
        seen = look(*arguments)
        monkeypatch.setattr(corpus_module, "_open", look)
        text(LINES, tokenizer="byte")  # as the other process
        (folder,) = (tmp_path / "cache").glob("[!.]*/")
        before.append((folder / "train.bin").stat().st_ino)
        return seen

    before = []
    monkeypatch.setattr(corpus_module, "_open", other_after)
    assert read_bytes(text(LINES, tokenizer="byte")) == LINES.encode()
    (file,) = (tmp_path / "cache").glob("*/train.bin")
    assert [file.stat().st_ino] == before and not list((tmp_path / "cache").glob(".*"))


def test_a_failed_preparation_leaves_nothing(text, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus_module, "_tokenize", fail)
    with pytest.raises(KeyboardInterrupt):
        text(LINES, tokenizer="byte")
    assert not list((tmp_path / "cache").iterdir())


def _prepare_and_wait(file: str, cache: str, barrier, results) -> None:
    tokenize = corpus_module._tokenize

    def together(*args):
        barrier.wait(30)  # both have found the cache empty
        tokenize(*args)

    corpus_module._tokenize = together
    corpus = prepare(DataConfig(source="text", path=file, tokenizer="byte", cache_dir=cache))
    results.put(hashlib.sha256(read_bytes(corpus)).hexdigest())


def test_two_processes_at_once(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(tmp_path / "a.txt"), str(tmp_path / "cache"), barrier, results)
    workers = [context.Process(target=_prepare_and_wait, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found == {hashlib.sha256(LINES.encode()).hexdigest()}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_content_hash_is_of_documents_in_order_not_of_paths(folder, tmp_path):
    assert folder({"a": b"one", "b": b"two"}).content_hash == digest(b"one", b"two")
    assert folder({"c": b"three"}, "c").content_hash == digest(b"three")
    assert folder({"d.jsonl": b'{"text": "one"}\n{"text": "two"}'}, "d.jsonl").content_hash == digest(b"one", b"two")
    assert digest(b"one", b"two") != digest(b"on", b"etwo")


def test_content_hash_of_the_config_is_checked(text, folder):
    known = text(LINES, tokenizer="byte").content_hash
    assert text(LINES, tokenizer="byte", content_hash=known).content_hash == known
    message = error_of(text, LINES + "x", tokenizer="byte", content_hash=known)
    other = text(LINES + "x", tokenizer="byte").content_hash
    assert known in message and other in message
    assert known in error_of(folder, {"train.bin": nanogpt([1])}, source="bin", content_hash=known)


def test_a_corpus_that_changes_while_it_is_read(text, tmp_path, monkeypatch):
    scan = corpus_module._scan

    def change_after(*args, **kwargs):
        found = scan(*args, **kwargs)
        (tmp_path / "input.txt").write_text(LINES + "more")
        return found

    monkeypatch.setattr(corpus_module, "_scan", change_after)
    assert "changed" in error_of(text, LINES, tokenizer="byte")


def test_cache_folder(text, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(LINES)
    config = DataConfig(source="text", path=str(file), tokenizer="byte")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLM_JAX_CACHE", raising=False)
    prepare(config)
    assert list((tmp_path / "home/.cache/llm_jax").glob("*/train.bin"))
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "other"))
    prepare(config)
    assert list((tmp_path / "other").glob("*/train.bin"))
    monkeypatch.setenv("LLM_JAX_CACHE", str(file))
    assert "data.cache_dir" in error_of(prepare, config)


# ---------------------------------------------------------------------------------------------------
# What a person gets wrong


def test_missing_and_empty_input(folder, tmp_path):
    assert "does not exist" in error_of(folder, {}, "nothing.txt")
    assert "matches no file" in error_of(folder, {}, "*.txt")
    assert "is empty" in error_of(folder, {"a.txt": b""}, "a.txt")
    assert "holds no text" in error_of(folder, {"b.txt": b""})
    (tmp_path / "corpus/sub").mkdir()
    assert "without any file" in error_of(folder, {}, "sub")
    assert "without any *.bin file" in error_of(folder, {}, "sub", source="bin")
    assert "holds no text" in error_of(folder, {"x/a.png": b"\0"}, "x")
    assert "data.path is not set" in error_of(prepare, DataConfig(source="text", cache_dir=str(tmp_path)))
    assert "data.path is not set" in error_of(
        prepare, DataConfig(source="bin", tokenizer="byte", cache_dir=str(tmp_path))
    )
    assert "neither char, byte nor bpe" in error_of(folder, {"a.txt": b"text"}, "a.txt", tokenizer="bytes")


def test_a_file_given_by_name_must_be_utf8(folder):
    message = error_of(folder, {"latin1.txt": b"caf\xe9"}, "latin1.txt")
    assert "latin1.txt is not UTF-8 (byte 0xe9)" in message
    assert read_bytes(folder({"nul.txt": b"a\0b"}, "nul.txt")) == b"a\0b"


# ---------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_large_file_is_streamed(tmp_path, tokenizer):
    def peak(megabytes: int) -> float:
        """Peak memory of preparing one file, in MB, in a process of its own."""
        file = tmp_path / f"{megabytes}.txt"
        words = np.random.default_rng(0).integers(0, 5000, size=(5000, 10))
        block = "".join(" ".join(f"w{i}" for i in row) + "\n" for row in words).encode()
        with open(file, "wb") as stream:
            while stream.tell() < megabytes * 1e6:
                stream.write(block)
        program = (
            "import resource, sys; from llm_jax.config import DataConfig; from llm_jax.corpus import prepare;"
            f"prepare(DataConfig(source='text', path={str(file)!r}, tokenizer={tokenizer!r},"
            f" vocab_size=1024, cache_dir={str(tmp_path / 'cache')!r}));"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        found = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        return float(found.stdout)

    growth = peak(60) - peak(20)
    print(f"{tokenizer}: {growth:.0f} MB more for 40 MB more text")
    assert growth < 40
