"""Tokenizers in GGUF files beside llama.cpp's own, and back as they were."""

import json
import urllib.request

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, pre_tokenizers

from llm_jax.errors import InputError
from llm_jax.interop.gguf import write_gguf
from llm_jax.interop.gguf_tokenizer import PRE, gguf_metadata, stop_tokens, tokenizer_from_gguf
from llm_jax.sentencepiece import BYTE, BYTE_PIECES, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary, build
from llm_jax.tokenizers import Tokenizer, _byte_alphabet, train_bpe

TEXTS = [
    "It's WE'LL don't DON'T  12345 and 3.1415, 1234567 1 22",
    "Привет, мир! Съешь ещё булок.\n\n\n  你好，世界2024年 日本語テキスト",
    "emoji 🎉👩‍🚀 naïve café camelCase HTTPServer ÀÉ x\t\ty\r\n  end  ",
    "a" + " " * 15 + "b" + " " * 40 + "c\n" + " " * 16 + "d",
    "    def f(x):\n        return x ** 2  # ½ ²\n\n",
    "<|end|>the<|end|> the <|end|>\n$1+2=3^4~5|6<7>8`9\\/n'",
    " ",
    "",
]


def ids_of_llama_cpp(metadata, path):
    """For each text, by a model of one small layer."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp not installed")
    size, shape = len(metadata["tokenizer.ggml.tokens"]), {"attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8)}
    shape |= {"attn_output": (8, 8), "ffn_gate": (8, 8), "ffn_up": (8, 8), "ffn_down": (8, 8)}
    shape |= {"attn_norm": (8,), "ffn_norm": (8,)}
    tensors = [(f"blk.0.{name}.weight", of, "F32") for name, of in shape.items()]
    tensors += [("token_embd.weight", (size, 8), "F32"), ("output_norm.weight", (8,), "F32")]
    numbers = {"context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8}
    numbers |= {"attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    header = {"general.architecture": "llama"} | {f"llama.{name}": value for name, value in numbers.items()}
    write_gguf(path, header | metadata, tensors, (np.ones(of, np.float32) for _, of, _ in tensors))
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = str(path), 64, 0, 0
    server = xllamacpp.Server(params)
    found = []
    for text in TEXTS:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        with urllib.request.urlopen(f"{server.listening_address}/tokenize", body, timeout=60) as answer:
            found.append(json.load(answer)["tokens"])
    return found


@pytest.fixture(scope="module")
def byte_level():
    """Metadata whose merges cross every boundary that a kind of splitting may set."""
    trained = hf.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = hf.trainers.BpeTrainer(vocab_size=900, initial_alphabet=_byte_alphabet(), show_progress=False)
    texts = [text.replace("<|end|>", "") for text in TEXTS]
    lines = [line for text in texts for line in (text, text.lower(), text[3:], text[::-1])]
    trained.train_from_iterator(lines * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [NORMAL] * len(tokens) + [CONTROL, USER_DEFINED]
    return {
        "model": "gpt2",
        "tokens": [*tokens, "<|end|>", "булок"],
        "token_type": np.array(kinds, np.int32),
        "merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": len(tokens),
        "add_bos_token": False,
    }


@pytest.mark.parametrize("names", PRE, ids=lambda names: names[0])
def test_each_kind_of_splitting_is_llama_cpp_s(byte_level, names, tmp_path):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (byte_level | {"pre": names[0]}).items()}
    tokenizer = tokenizer_from_gguf(metadata)
    written = gguf_metadata(tokenizer, tokenizer.vocab_size)
    assert written.keys() == metadata.keys()
    for key, value in metadata.items():
        np.testing.assert_array_equal(written[key], value)
    expected = ids_of_llama_cpp(metadata, tmp_path / "model.gguf")
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text.replace("<|end|>", "")


def test_the_kinds_of_splitting_differ(byte_level):
    """Else the test above would show nothing."""
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in byte_level.items()}
    found = {}
    for names, how in PRE.items():
        tokenizer = tokenizer_from_gguf(prefixed | {"tokenizer.ggml.pre": names[0]})
        found[names[0]] = str([tokenizer.encode(text) for text in TEXTS] + [how[0], how[2]])
    assert len(set(found.values())) == len(found)


def sentencepiece_like(**how):
    """Llama's and Mistral's kind: words by their scores, runs of spaces of one score, bytes for the rest."""
    words = ["▁t", "he", "▁the", "an", "▁an", "▁and", "▁a", "re", "tu", "rn", "▁retu", "▁re", "▁return", "''", "in"]
    words += ["на", "ст", "при", "ещё", "12", "34", "1234"]
    runs = ["▁" * length for length in [*range(2, 15), 16]]
    characters = sorted({character for word in words for character in word})
    rows = [("<unk>", UNKNOWN, 0), ("<s>", CONTROL, 0), ("<|end|>", CONTROL, 0)]
    rows += [(piece, BYTE, 0) for piece in BYTE_PIECES]
    rows += [(word, NORMAL, -rank) for rank, word in enumerate(words)] + [(run, NORMAL, -1e9) for run in runs]
    rows += [(character, NORMAL, -100 - rank) for rank, character in enumerate(characters)]
    pieces, kinds, scores = zip(*rows, strict=True)
    return Tokenizer(
        build(Vocabulary(pieces, scores, kinds), **how),
        bos_token="<s>",
        eos_token="<|end|>",
        add_bos=True,
        split_special_tokens=False,
    )


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_ids_are_llama_cpp_s(tmp_path, adds_space):
    metadata = gguf_metadata(sentencepiece_like(), 350) | {"tokenizer.ggml.add_space_prefix": adds_space}
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    expected = ids_of_llama_cpp(metadata, tmp_path / "model.gguf")
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.encode(text) == ids, text
    written = gguf_metadata(tokenizer, 350)
    for key in metadata:
        np.testing.assert_array_equal(written[key], metadata[key])
    assert tokenizer_from_gguf(written).fingerprint() == tokenizer.fingerprint()


def test_symbols_of_users_with_blanks_are_found(tmp_path):
    """Which files have as a text has them: Gemma's runs of spaces and lines."""
    metadata = gguf_metadata(sentencepiece_like(), 340) | {"tokenizer.ggml.add_space_prefix": False}
    metadata["tokenizer.ggml.tokens"][-3:] = [" " * 15, "\n\n", "é ca"]
    metadata["tokenizer.ggml.token_type"][-3:] = USER_DEFINED
    tokenizer = tokenizer_from_gguf(metadata)
    expected = ids_of_llama_cpp(metadata, tmp_path / "model.gguf")
    assert {337, 338, 339} <= set(sum(expected, []))
    assert [tokenizer.encode(text) for text in TEXTS] == expected
    assert gguf_metadata(tokenizer, 340)["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]


def published(**parts):
    """The same pieces in other programs' way of writing a tokenizer.json."""
    spec = json.loads(sentencepiece_like().backend.to_str())
    return Tokenizer(hf.Tokenizer.from_str(json.dumps(spec | parts)), eos_token="<|end|>", split_special_tokens=False)


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@pytest.mark.parametrize(
    "parts, adds_space",
    [
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, True),  # transformers 5
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}, False),
        ({"normalizer": REPLACE, "pre_tokenizer": SPLIT}, False),  # Gemma
    ],
)
def test_published_ways_to_write_blanks_are_known(parts, adds_space):
    tokenizer = published(**parts)
    metadata = gguf_metadata(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.add_space_prefix"] is adds_space
    again = tokenizer_from_gguf(metadata)
    for text in TEXTS:
        if not text.startswith((" ", "<")):
            assert again.encode(text) == tokenizer.encode(text)
    first = sentencepiece_like(prefix_everywhere=False)
    assert gguf_metadata(first, 350)["tokenizer.ggml.add_space_prefix"] is True


def test_a_byte_that_is_merged_has_its_own_name_in_the_file():
    """Gemma's tabulator: "\\t" in tokenizer.json, and <0x09> in the files."""
    metadata = gguf_metadata(sentencepiece_like(), 338)
    metadata["tokenizer.ggml.tokens"][-1] = "\t\t"
    metadata["tokenizer.ggml.token_type"][-1] = NORMAL
    metadata["tokenizer.ggml.scores"][-1] = -0.5
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("\t\t\t")[1:] == [337, 3 + 9]
    assert tokenizer.backend.id_to_token(3 + 9) == "\t" and tokenizer.decode([3 + 9]) == "\t"
    assert gguf_metadata(tokenizer, 338)["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda spec: spec["model"]["merges"].pop(), "does not merge"),
        (lambda spec: spec["model"]["merges"].append(["<0x41>", "h"]), "merges '<0x41>' and 'h'"),
        (lambda spec: spec["normalizer"]["normalizers"].append({"type": "NFC"}), "NFC.*no counterpart"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace.*no counterpart"),
        (lambda spec: spec.update(normalizer=None), "does not write blanks"),
        (lambda spec: spec["model"].update(unk_token=None), "for what is unknown"),
    ],
    ids=["less", "more", "normalizer", "pre-tokenizer", "blanks", "unknown"],
)
def test_what_has_no_counterpart_is_named(change, words):
    spec = json.loads(sentencepiece_like().backend.to_str())
    spec["model"]["vocab"]["<0x41>h"] = len(spec["model"]["vocab"])
    change(spec)
    tokenizer = Tokenizer(hf.Tokenizer.from_str(json.dumps(spec)), eos_token="<|end|>")
    with pytest.raises(InputError, match=words) as error:
        gguf_metadata(tokenizer, 400)
    assert "\n" not in str(error.value)


JUNK = (None, 5, -1, 2**40, "x", "", True, 1.5, [], ["a"], ["a"] * 340, [5] * 340, np.zeros(3), np.zeros(340))
JUNK += (np.full(340, 9), np.full(340, np.nan), np.zeros((2, 2)), np.array(["a"] * 340))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_keys_of_any_type_are_read_or_refused(byte_level, kind):
    sound = {f"tokenizer.ggml.{key}": value for key, value in (byte_level | {"pre": "gpt-2"}).items()}
    if kind == "llama":
        sound = gguf_metadata(sentencepiece_like(), 340)
    loaded = refused = 0
    for key in [*sound, "tokenizer.chat_template"]:
        missing = {name: value for name, value in sound.items() if name != key}
        for metadata in [missing, *(sound | {key: value} for value in JUNK)]:
            try:
                tokenizer_from_gguf(metadata).encode("ab é")
                stop_tokens(metadata)
                loaded += 1
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
    assert loaded > 10 and refused > 50


@pytest.mark.parametrize(
    "key, value",
    [
        ("token_type", np.full(340, 9)),
        ("token_type", np.full(340, 1.0)),
        ("scores", np.full(340, np.nan)),
        ("eos_token_id", True),
        ("eot_token_id", 340),
        ("add_bos_token", 1),
        ("chat_template", 5),
    ],
    ids=str,
)
def test_values_of_a_wrong_kind_are_refused(key, value):
    name = f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}"
    metadata = gguf_metadata(sentencepiece_like(), 340) | {name: value}
    with pytest.raises(InputError, match=name):
        tokenizer_from_gguf(metadata)
        stop_tokens(metadata)


def test_our_own_way_of_splitting_has_no_counterpart():
    with pytest.raises(InputError, match="splits text has no counterpart"):
        gguf_metadata(train_bpe(["a b"], 258), 258)
