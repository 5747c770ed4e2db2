import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import error_of, random_params

import llm_jax
from llm_jax import engine, model
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.language_model import LanguageModel
from llm_jax.tokenizers import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe


@pytest.fixture(scope="module")
def lm(tiny_run) -> LanguageModel:
    """60 steps of training, byte tokens, no BOS, rope, block_size 32."""
    return llm_jax.load(tiny_run)


def build(tokenizer, **values) -> LanguageModel:
    """Untrained, of random parameters."""
    shape = dict(n_embd=16, n_head=2, n_layer=1, block_size=16, vocab_size=tokenizer.vocab_size)
    cfg = freeze({"model": shape | values})
    return LanguageModel(cfg, random_params(cfg.model), tokenizer)


@pytest.fixture(scope="module")
def bpe() -> LanguageModel:
    """With <|endoftext|> as BOS and EOS."""
    return build(train_bpe(["the cat sees the dog.\n" * 50], 270))


def ends_at_once(bpe) -> LanguageModel:
    """`bpe` with parameters that make the end of text the only token that is ever drawn."""
    values = dict(use_rmsnorm=False, use_bias=True, tie_embeddings=False)
    ending = build(bpe.tokenizer, **values)
    ending.params["final_norm"]["bias"] = jnp.zeros(16).at[0].set(1000.0)
    ending.params["lm_head"]["weight"] = (
        jnp.zeros((bpe.tokenizer.vocab_size, 16)).at[bpe.tokenizer.eos_id, 0].set(1.0)
    )
    return ending


# -- What goes in and what comes out


def test_a_text_gives_a_text_and_a_list_a_list(lm):
    text = lm.generate("the ", max_new_tokens=12)
    assert isinstance(text, str) and text.startswith("the ") and len(text) > 4
    texts = lm.generate(["the ", "a"], max_new_tokens=12)
    assert isinstance(texts, list) and texts[0] == text
    assert lm.generate(("the ", "b"), max_new_tokens=12)[0] == text
    assert lm.generate([], max_new_tokens=12) == []


def test_tokens_give_tokens(lm):
    tokens = np.array([[116, 104, 101, 32], [97, 32, 100, 111]])
    for given in (tokens, tokens.tolist(), jnp.asarray(tokens), tokens.astype(np.uint8), tokens.astype(np.int64)):
        out = lm.generate(given, max_new_tokens=12, stop_tokens=())
        assert isinstance(out, np.ndarray) and out.shape == (2, 16) and out.dtype == np.int32
        np.testing.assert_array_equal(out[:, :4], tokens)
    text = lm.generate("the ", max_new_tokens=12)
    assert lm.tokenizer.decode(out[0]) == text  # the same draw for the same prompt, in tokens and in text


def test_ids_that_only_pad_the_vocabulary_are_never_drawn():
    padded = build(byte_tokenizer(), vocab_size=300)
    out = padded.generate(np.array([[65, 66]] * 4), max_new_tokens=50)
    assert out.max() < 256
    assert padded.logits(out).shape[-1] == 300
    [sample] = padded.generate_detailed(out[:1, :2], max_new_tokens=10)
    np.testing.assert_allclose(padded.score([*out[0, :2].tolist(), *sample.tokens])[1:], sample.logprobs, atol=1e-4)


def test_logits(lm):
    tokens = np.array([[116, 104, 101]])
    logits = lm.logits(tokens)
    assert logits.shape == (1, 3, 256) and logits.dtype == jnp.float32
    expected = model.Transformer(lm.config.model).apply({"params": lm.params}, jnp.asarray(tokens))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert lm.logits(np.zeros((1, 40), int)).shape == (1, 40, 256)  # rope goes on past block_size
    learned = build(byte_tokenizer(), use_rope=False)
    assert "17 tokens" in error_of(learned.logits, np.zeros((1, 17), int))


def test_no_new_tokens_give_the_prompt(lm):
    assert lm.generate("the ", max_new_tokens=0) == "the "
    np.testing.assert_array_equal(lm.generate(np.array([[1, 2]]), max_new_tokens=0), [[1, 2]])


def test_the_defaults_are_the_configs(lm):
    assert lm.generate("the ") == lm.generate(
        "the ", max_new_tokens=100, temperature=1.0, top_k=None, top_p=None, seed=0, stop_tokens=None
    )


ODD_PROMPTS = [
    "é",
    "e\u0301",
    "🙂",
    "\0",
    "\r\n\t",
    "naïve → ☕",
    "\ufffd",
    "\ufeffx",
    "<|endoftext|>",
    " " * 12,
    "\u200d",
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_prompt_begins_the_text_whatever_it_is(lm, bpe, seed):
    for one in (lm, bpe):
        texts = one.generate(ODD_PROMPTS, max_new_tokens=12, seed=seed, stop_tokens=())
        for prompt, text in zip(ODD_PROMPTS, texts, strict=True):
            assert text.startswith(prompt) and text != prompt


# -- Randomness


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_be_another_s_equal(lm, seed):
    with pytest.raises(InputError, match="seed"):
        lm.generate("the ", seed=seed)


def test_the_seed_decides(lm):
    a, again, b = (lm.generate("the ", max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert a == again != b


def test_a_text_does_not_depend_on_its_neighbours(lm):
    both = lm.generate(["a longer prompt of other length", "the "], seed=0, max_new_tokens=12)
    assert both[1] == lm.generate("the ", seed=0, max_new_tokens=12)
    twice = lm.generate(["the ", "the "], seed=3, max_new_tokens=12)
    assert twice[0] == twice[1]


def test_samples_differ_and_the_first_is_generates(lm):
    samples = lm.generate_detailed("the ", num_samples=2, max_new_tokens=12, seed=5)
    assert samples[0].text != samples[1].text
    assert samples[0].text == lm.generate("the ", max_new_tokens=12, seed=5)
    assert samples[0].tokens == lm.generate_detailed("the ", num_samples=1, max_new_tokens=12, seed=5)[0].tokens


def test_sampling_arguments_act(lm):
    greedy = lm.generate("the ", max_new_tokens=12, temperature=0.0)
    assert greedy == lm.generate("the ", max_new_tokens=12, temperature=0.0, seed=9)
    assert greedy == lm.generate("the ", max_new_tokens=12, top_k=1, seed=9)
    assert greedy == lm.generate("the ", max_new_tokens=12, top_p=1e-6, seed=9)
    assert greedy != lm.generate("the ", max_new_tokens=12, seed=9)
    # Off is off: masks that keep everything change nothing.
    free = lm.generate("the ", max_new_tokens=12, seed=9)
    assert free == lm.generate("the ", max_new_tokens=12, seed=9, top_k=256, top_p=1.0)
    assert free == lm.generate("the ", max_new_tokens=12, seed=9, top_k=10**12)
    assert free == lm.generate("the ", max_new_tokens=12, seed=9, min_p=0.0, repetition_penalty=1.0, logit_bias={})
    assert greedy == lm.generate("the ", max_new_tokens=12, min_p=1.0, seed=9)
    letters = lm.generate("the ", max_new_tokens=12, seed=9, logit_bias={token: -math.inf for token in range(97)})
    assert free != letters and all(ord(letter) >= 97 for letter in letters.removeprefix("the "))
    # What repeats without a penalty does not with one.
    for penalty in ("presence_penalty", "frequency_penalty"):
        changed = lm.generate("the ", max_new_tokens=12, temperature=0.0, **{penalty: 1e4}).removeprefix("the ")
        assert len(set(changed)) == len(changed) > len(set(greedy.removeprefix("the ")))
    assert greedy != lm.generate("the ", max_new_tokens=12, temperature=0.0, repetition_penalty=1e4)


# -- Details, pieces, scores


def test_details_are_of_what_generate_makes(lm):
    request = dict(max_new_tokens=30, seed=3)
    [sample] = lm.generate_detailed("the ", top_logprobs=3, **request)
    assert sample.text == lm.generate("the ", **request) and sample.stop_reason == "length"
    ids = [*lm.tokenizer.encode("the "), *sample.tokens]
    assert lm.tokenizer.decode(ids) == sample.text and len(sample.tokens) == len(sample.logprobs) == 30
    expected = jax.nn.log_softmax(lm.logits([ids]))[0, 3:-1]
    np.testing.assert_allclose(sample.logprobs, np.asarray(expected)[np.arange(30), sample.tokens], atol=1e-4)
    for top, row in zip(sample.top_logprobs, expected, strict=True):
        assert [*top] == np.argsort(-row)[:3].tolist()
    np.testing.assert_allclose(lm.score(ids)[3:], sample.logprobs, atol=1e-4)
    [none] = lm.generate_detailed("the ", max_new_tokens=0)
    assert none == ("the ", [], [], [], "length")


def test_details_of_several_prompts_come_prompt_by_prompt(lm):
    samples = lm.generate_detailed(["the ", "a"], num_samples=3, max_new_tokens=12)
    assert [sample.text for sample in samples[3:]] == [
        sample.text for sample in lm.generate_detailed("a", num_samples=3, max_new_tokens=12)
    ]
    assert len({sample.text for sample in samples}) == 6
    rows = lm.generate_detailed(np.array([[116, 104]]), max_new_tokens=5)
    assert rows[0].text.startswith("th") and len(rows[0].tokens) == 5


def test_an_iterator_of_stops_is_a_list(lm, unchecked):
    request = dict(max_new_tokens=40, seed=2)
    for name, values in (("stop_strings", ["e", "a "]), ("stop_tokens", [101, 97])):
        stream = lm.stream("the ", **request, **{name: iter(values)})
        assert "the " + "".join(stream) == lm.generate("the ", **request, **{name: values})


def test_stop_reasons(lm, bpe):
    assert ends_at_once(bpe).generate_detailed("the ", max_new_tokens=5)[0][1:] == (
        [bpe.tokenizer.eos_id], [0.0], [{}], "stop_token"
    )  # fmt: skip
    free = lm.generate("the ", max_new_tokens=40, seed=1)
    stop = free[20:23]
    at = free.index(stop, 4)
    [sample] = lm.generate_detailed("the ", max_new_tokens=40, seed=1, stop_strings=["\0never", stop])
    assert sample.stop_reason == "stop_string" and sample.text == free[:at]
    assert lm.tokenizer.decode(sample.tokens) == free[4 : at + 3]  # up to the token that completed it
    assert len(sample.logprobs) == len(sample.top_logprobs) == len(sample.tokens)


def test_stop_strings_end_each_row_where_it_has_one(lm):
    prompts = ["the ", "a", "dog"]
    free = lm.generate(prompts, max_new_tokens=40, seed=2)
    cut = lm.generate(prompts, max_new_tokens=40, seed=2, stop_strings=["e", "a "])
    for prompt, whole, text in zip(prompts, free, cut, strict=True):
        new = whole.removeprefix(prompt)
        first = min((new.index(stop) for stop in ("e", "a ") if stop in new), default=len(new))
        assert text == prompt + new[:first]
    assert cut != free
    tokens = lm.generate(np.array([[116, 104]]), max_new_tokens=40, seed=2, stop_strings=[" "])[0]
    end = tokens.tolist().index(32, 2)
    assert (tokens[end:] == 32).all()  # padded with the token that completed it


def test_a_stream_is_generate_in_pieces_and_the_first_needs_no_second_call(lm, monkeypatch):
    request = dict(max_new_tokens=40, seed=4, stop_strings=["zq"])
    assert "the " + "".join(lm.stream("the ", **request)) == lm.generate("the ", **request)
    pieces = [*lm.stream("the ", max_new_tokens=40)]
    assert len(pieces) > 2 and all(pieces)

    def fail(*args, **kwargs):
        raise AssertionError("a second call")

    monkeypatch.setattr(engine, "_decode", fail)
    [first] = lm.generate("the ", max_new_tokens=1, temperature=0.0)[4:]
    assert next(lm.stream("the ", max_new_tokens=40, temperature=0.0)) == first


def test_a_wrong_stream_is_an_error_before_its_first_piece(lm):
    assert "temperature" in error_of(lm.stream, "the ", temperature=-1.0)
    assert "num_samples" in error_of(lm.stream, "the ", num_samples=2)
    assert "one text" in error_of(lm.stream.__func__.__wrapped__, lm, ["the "])


@pytest.mark.parametrize("length", [1, 2, 31, 33, 300])
def test_scores_are_the_log_probabilities_of_the_tokens(lm, length):
    """Past block_size too."""
    text = ("the cat sees the dog and " * 20)[:length]
    ids = lm.tokenizer.encode(text)
    scores = lm.score(text)
    assert scores.shape == (length - 1,) and scores.dtype == np.float32
    expected = np.asarray(jax.nn.log_softmax(lm.logits([ids])))[0]
    np.testing.assert_allclose(scores, expected[np.arange(length - 1), ids[1:]], atol=1e-4)
    np.testing.assert_array_equal(scores, lm.score(ids))


def test_scores_of_learned_positions_and_of_nothing(bpe):
    learned = build(byte_tokenizer(), use_rope=False)
    assert learned.score("x" * 16).shape == (15,)
    assert "17 tokens" in error_of(learned.score, "x" * 17)
    assert "empty" in error_of(learned.score, "")
    assert "vocabulary" in error_of(learned.score, [256])
    assert bpe.score("").shape == (0,)


# -- Ways to load


def test_weights_in_int8_score_nearly_as_well(lm, tiny_run):
    rounded = llm_jax.load(tiny_run, weights="int8", cache_dtype="int8")
    text = "def the(cat):\n    return dog\n" * 4
    assert 0 < abs(rounded.score(text).mean() - lm.score(text).mean()) < 0.01
    assert rounded.generate("the ", max_new_tokens=20).startswith("the ")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded.params))


def test_another_dtype(lm, tiny_run):
    half = llm_jax.load(tiny_run, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    assert half.generate("the ", max_new_tokens=20).startswith("the ")
    assert 0 < np.abs(half.score("the cat sees the dog") - lm.score("the cat sees the dog")).max() < 0.3


def test_stretched_positions_see_more(lm, tiny_run):
    """Interpolated by 2, position 2n is what n was: of a text of every second token the scores are the same."""
    stretched = llm_jax.load(tiny_run, rope_scaling="linear", rope_factor=2.0)
    cfg = stretched.config.model
    assert (cfg.block_size, cfg.rope_original_length) == (64, 32)
    positions = jnp.arange(20)[None]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 20)))
    plain, doubled = (
        model.Transformer(each.config.model).apply({"params": each.params}, tokens, positions * times)[0]
        for each, times in ((lm, 1), (stretched, 2))
    )
    np.testing.assert_allclose(plain, doubled, atol=1e-4)
    assert len(stretched.generate(np.zeros((1, 50), int), max_new_tokens=20, long_prompt="error")[0]) == 70


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(weights="int4"), "weights ('int4') must be one of int8"),
        (dict(cache_dtype="float16"), "cache_dtype ('float16')"),
        (dict(dtype="float16"), "'float16'"),
        (dict(rope_scaling="linear"), "rope_factor (None)"),
        (dict(rope_factor=2.0), "rope_scaling (None)"),
        (dict(rope_scaling="linear", rope_factor=0.5), "rope_factor (0.5)"),
        (dict(rope_scaling="linear", rope_factor=1.0), "rope_factor (1.0)"),
        (dict(rope_scaling="linear", rope_factor=math.inf), "rope_factor (inf)"),
        (dict(rope_scaling="linear", rope_factor=math.nan), "rope_factor (nan)"),
        (dict(rope_scaling="stretch", rope_factor=2.0), "'stretch'"),
    ],
    ids=str,
)
def test_a_way_to_load_that_there_is_not(tiny_run, how, words):
    assert words in error_of(llm_jax.load, tiny_run, **how)


# -- Special tokens and ends


def test_an_end_of_text_ends_the_row_and_is_not_in_the_text(bpe):
    ending = ends_at_once(bpe)
    eos = bpe.tokenizer.eos_id
    assert ending.generate(["the ", "dog"], max_new_tokens=6) == ["the ", "dog"]
    out = ending.generate(np.array([[5, 6]]), max_new_tokens=3)
    np.testing.assert_array_equal(out, [[5, 6, eos, eos, eos]])
    assert ending.generate("the ", max_new_tokens=6, stop_tokens=()) == "the "  # six of them, none shown


def test_stop_tokens_are_the_callers_where_given(lm):
    free = lm.generate(np.array([[116, 104]]), max_new_tokens=12, seed=1)[0]
    stop = int(free[5])
    first = free[2:].tolist().index(stop) + 3
    out = lm.generate(np.array([[116, 104]]), max_new_tokens=12, seed=1, stop_tokens=[stop])[0]
    np.testing.assert_array_equal(out, [*free[:first], *[stop] * (14 - first)])
    np.testing.assert_array_equal(
        lm.generate(np.array([[116, 104]]), max_new_tokens=12, seed=1, stop_tokens=()), [free]
    )


def test_an_empty_prompt_starts_from_bos_or_is_an_error(lm, bpe):
    assert isinstance(bpe.generate("", max_new_tokens=4), str)
    bos = np.array([[bpe.tokenizer.bos_id]])
    tokens = bpe.generate(bos, max_new_tokens=4, seed=0)[0]
    assert bpe.generate("", max_new_tokens=4, seed=0) == bpe.tokenizer.decode(tokens)
    assert "empty" in error_of(lm.generate, "")
    message = error_of(lm.generate, ["the ", ""])
    assert "empty" in message and "prompt 1 of 2" in message


def test_a_prompt_gets_bos_where_the_tokenizer_says_so(bpe):
    tokenizer = train_bpe(["the cat sees the dog.\n" * 50], 270)
    tokenizer.add_bos = True
    with_bos = LanguageModel(bpe.config, bpe.params, tokenizer)
    tokens = np.array([[tokenizer.bos_id, *tokenizer.encode("the ")]])
    expected = tokenizer.decode(bpe.generate(tokens, max_new_tokens=12)[0])
    assert with_bos.generate("the ", max_new_tokens=12) == expected
    assert bpe.generate("the ", max_new_tokens=12) != expected


# -- Chats

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "héllo {{ 1 + 1 }}"}]


def chat_model(template: str | None = CHATML, **settings) -> LanguageModel:
    """Bytes, then <s>, </s> (256, 257), <|im_start|>, <|im_end|>; untrained."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    settings = dict(bos_token="<s>", eos_token="</s>") | settings
    return build(Tokenizer(backend, chat_template=template, **settings), block_size=64)


@pytest.fixture(scope="module")
def chatter() -> LanguageModel:
    return chat_model()


def test_a_chat_is_continued_after_the_template_s_text(chatter):
    start, end = 258, 259
    expected = [start, *"user\nhéllo {{ 1 + 1 }}".encode(), end, *b"\n", start, *b"assistant\n"]
    assert chatter.encode_chat(HELLO).ids == expected
    settings = dict(max_new_tokens=20, seed=3, stop_tokens=())
    [sample] = chatter.generate_detailed([expected], **settings)
    answer = chatter.chat(HELLO, **settings)
    assert answer == chatter.tokenizer.decode(sample.tokens) != ""
    assert answer == "".join(chatter.stream_chat(HELLO, **settings))
    assert chatter.chat(tuple(HELLO), **settings | {"seed": 4}) != answer
    assert chatter.chat(HELLO, max_new_tokens=0) == ""


def test_the_answer_keeps_its_blanks_and_ends_at_a_stop(chatter):
    spaces = chatter.chat(HELLO, max_new_tokens=3, logit_bias={ord(" "): 1e9})
    assert spaces == "   "
    assert chatter.chat(HELLO, max_new_tokens=3, logit_bias={257: 1e9}) == ""  # </s>, without its name
    assert chatter.chat(HELLO, max_new_tokens=3, logit_bias={ord("a"): 1e9}, stop_tokens=[ord("a")]) == "a"
    assert chatter.chat(HELLO, max_new_tokens=5, logit_bias={ord("a"): 1e9}, stop_strings=["aaa"]) == ""


def test_an_answer_begins_after_a_prompt_that_ends_in_the_replacement_character():
    echo = chat_model("{{ messages[-1].content }}")
    letters = dict(max_new_tokens=3, logit_bias={ord("a"): 1e9})
    assert echo.chat([{"role": "user", "content": "x\ufffd"}], **letters) == "aaa"


def test_a_chat_does_not_change_how_texts_are_tokenized(chatter):
    assert chatter.tokenizer.split_special_tokens
    chatter.encode_chat(HELLO)
    assert chatter.tokenizer.encode("<|im_end|>") == list(b"<|im_end|>")
    assert chatter.tokenizer.backend.encode_special_tokens


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "add_bos, template, count",
    [(True, "{{ bos_token }}x", 1), (True, "x", 1), (False, "{{ bos_token }}x", 1), (False, "x", 0)],
)
def test_bos_is_there_once(add_bos, template, count, split):
    one = chat_model(template, add_bos=add_bos, split_special_tokens=split)
    assert one.encode_chat(HELLO).ids == [256] * count + [ord("x")]


def test_a_template_sees_the_special_tokens():
    assert chat_model("{{ bos_token }}{{ eos_token }}").encode_chat(HELLO).text == "<s></s>"
    none = chat_model("{{ bos_token is defined }}", bos_token=None)
    assert none.encode_chat(HELLO).text == "False"


def test_a_person_s_mistakes_in_a_chat(chatter, unchecked):
    without = error_of(chat_model(None).chat, HELLO)
    assert "no chat template" in without and "generate" in without
    assert "message 0 has no 'content'" in error_of(chatter.chat, [{"role": "user"}])
    assert "no way" in error_of(chat_model("{{ raise_exception('no way') }}").chat, HELLO)
    assert "empty" in error_of(chat_model("", bos_token=None).chat, HELLO)
    assert "temperature" in error_of(chatter.stream_chat, HELLO, temperature=-1.0)  # before the first piece
    with pytest.raises(TypeError, match="did you mean 'seed'"):
        chatter.chat(HELLO, sed=1)
    padded = chat_model()
    padded._vocab_size = 258  # of a tokenizer with more tokens than the model has embeddings
    assert "<|im_end|>" in error_of(padded.chat, HELLO)


def test_a_saved_model_keeps_its_template(chatter, tmp_path):
    chatter.save(tmp_path)
    loaded = llm_jax.load(tmp_path)
    settings = dict(max_new_tokens=8, stop_tokens=())
    assert loaded.chat(HELLO, **settings) == chatter.chat(HELLO, **settings)


# -- Long prompts


@pytest.mark.parametrize("use_rope", [True, False])
def test_a_long_prompt_is_seen_by_its_tail_or_an_error(use_rope):
    short = build(byte_tokenizer(), use_rope=use_rope)  # block_size 16
    assert short.generate("x" * 16, max_new_tokens=1, long_prompt="error").startswith("x" * 16)
    message = error_of(short.generate, "x" * 17, max_new_tokens=1, long_prompt="error")
    assert "17 tokens" in message and "block_size (16)" in message and "keep_tail" in message
    # One layer: with rope as without, what comes next is decided by the last 16 tokens.
    texts = [short.generate(head + "the cat sees the", max_new_tokens=8, temperature=0.0) for head in ("a" * 9, "b")]
    assert texts[0][9:] == texts[1][1:] and len(texts[0]) > 25


def test_learned_positions_go_on_past_block_size():
    short = build(byte_tokenizer(), use_rope=False)
    for length in (10, 30):
        tokens = short.generate(np.arange(length)[None], max_new_tokens=12, temperature=0.0)[0].tolist()
        for end in range(length, length + 12):
            tail = tokens[max(0, end - 16) : end]
            seen = np.array([tail + [0] * (16 - len(tail))])  # what follows a token is never seen by it
            assert tokens[end] == int(np.argmax(short.logits(seen)[0, len(tail) - 1]))


# -- A person's mistakes


@pytest.mark.parametrize(
    "request_, words",
    [
        (dict(temperature=float("nan")), "temperature (nan)"),
        (dict(temperature=float("inf")), "temperature (inf)"),
        (dict(temperature=-0.5), "temperature (-0.5)"),
        (dict(top_k=0), "top_k (0)"),
        (dict(top_k=-3), "top_k (-3)"),
        (dict(top_p=0.0), "top_p (0.0)"),
        (dict(top_p=1.01), "top_p (1.01)"),
        (dict(top_p=float("nan")), "top_p (nan)"),
        (dict(min_p=-0.1), "min_p (-0.1)"),
        (dict(min_p=float("nan")), "min_p (nan)"),
        (dict(repetition_penalty=0.0), "repetition_penalty (0.0)"),
        (dict(presence_penalty=float("nan")), "presence_penalty (nan)"),
        (dict(frequency_penalty=float("inf")), "frequency_penalty (inf)"),
        (dict(min_new_tokens=-1), "min_new_tokens (-1)"),
        (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens (9)"),
        (dict(logit_bias={256: 1.0}), "token 256 is not in the vocabulary (0 to 255)"),
        (dict(logit_bias={3: float("inf")}), "token 3 (inf)"),
        (dict(max_new_tokens=-1), "max_new_tokens (-1)"),
        (dict(long_prompt="cut"), "long_prompt ('cut')"),
        (dict(stop_strings=["a", ""]), "stop_strings (['a', ''])"),
        (dict(temperature=1e39), "temperature (1e+39)"),
        (dict(presence_penalty=1e39), "presence_penalty (1e+39)"),
        (dict(frequency_penalty=-1e38), "frequency_penalty (-1e+38)"),
        (dict(repetition_penalty=1e-38), "repetition_penalty (1e-38)"),
        (dict(logit_bias={70: 1e39}), "token 70 (1e+39)"),
        (dict(logit_bias=dict.fromkeys(range(256), -math.inf)), "forbids every token"),
        (
            dict(logit_bias={i: -math.inf for i in range(256) if i != 5}, stop_tokens=[5], min_new_tokens=4),
            "besides stop_tokens",
        ),
        (dict(stop_strings="a"), "stop_strings ('a')"),
        (dict(stop_tokens=[256]), "stop_tokens"),
        (dict(stop_tokens=[-1]), "stop_tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_request_out_of_range_is_one_line_with_the_value(lm, request_, words):
    for context in ("the ", ["the "], np.array([[1, 2]])):
        assert words in error_of(lm.generate, context, **request_)
    assert words in error_of(lm.generate_detailed, "the ", num_samples=2, **request_)


@pytest.mark.parametrize(
    "request_, words",
    [
        (dict(top_k=2.5), "top_k (2.5)"),
        (dict(seed=1.5), "seed (1.5)"),
        (dict(max_new_tokens=2.5), "max_new_tokens (2.5)"),
        (dict(min_new_tokens=1.5), "min_new_tokens (1.5)"),
        (dict(draft="lookup", draft_tokens=2.5), "draft_tokens (2.5)"),
        (dict(stop_tokens=[1.5]), "stop_tokens (1.5)"),
        (dict(stop_tokens=5), "stop_tokens (5)"),
        (dict(logit_bias={1.5: 2.0}), "token (1.5)"),
        (dict(temperature=None), "temperature (None)"),
        (dict(temperature="0.5"), "temperature ('0.5')"),
        (dict(top_p="0.9"), "top_p ('0.9')"),
        (dict(max_new_tokens=None), "max_new_tokens (None)"),
        (dict(logit_bias={3: "a"}), "token 3 ('a')"),
        (dict(logit_bias=[1.0]), "logit_bias ([1.0])"),
        (dict(stop_strings=None), "stop_strings (None)"),
        (dict(stop_tokens=np.int64(3)), "stop_tokens (3)"),
    ],
    ids=str,
)
def test_a_request_of_the_wrong_kind_is_one_line(lm, unchecked, request_, words):
    assert words in error_of(lm.generate, "the ", **request_)


def test_parameters_that_are_replaced_in_place_count(lm):
    changed = LanguageModel(lm.config, jax.tree.map(jnp.copy, lm.params), lm.tokenizer)
    before = changed.generate_detailed("the ", max_new_tokens=3, temperature=0.0)[0]
    changed.params["embed"]["tokens"] = changed.params["embed"]["tokens"][::-1]
    after = changed.generate_detailed("the ", max_new_tokens=3, temperature=0.0)[0]
    assert after.logprobs != before.logprobs
    scores = changed.score(changed.tokenizer.encode("the ") + after.tokens)
    np.testing.assert_allclose(scores[-3:], after.logprobs, atol=1e-4)


def test_an_unknown_setting_is_named(lm):
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        lm.generate_detailed("the ", temprature=1.0)


def test_rows_that_end_within_a_character(lm):
    """Its last byte comes with the continuation; the row's text is that of all its ids."""
    for row, next_ in (([0xE2, 0x82], 0xAC), ([97, 0xE2], 65), ([0xEF, 0xBF, 0xBD], 65), ([97, 0xE2], 0xE2)):
        bias = {i: -math.inf for i in range(256) if i != next_}
        for max_new_tokens in (0, 1, 3):
            [sample] = lm.generate_detailed([row], max_new_tokens=max_new_tokens, logit_bias=bias)
            assert sample.text == lm.tokenizer.decode([*row, *[next_] * max_new_tokens])
    assert lm.generate("x\ufffd", max_new_tokens=2, logit_bias=bias | {65: 0.0}).count("\ufffd") >= 1
    only_a = {i: -math.inf for i in range(256) if i != 65}
    assert lm.generate("x\ufffd", max_new_tokens=2, logit_bias=only_a) == "x\ufffdAA"


@pytest.mark.parametrize(
    "details, words",
    [
        (dict(num_samples=0), "num_samples (0)"),
        (dict(top_logprobs=-1), "top_logprobs (-1)"),
        (dict(top_logprobs=257), "top_logprobs (257)"),
    ],
)
def test_details_out_of_range(lm, details, words):
    assert words in error_of(lm.generate_detailed, "the ", **details)


@pytest.mark.parametrize(
    "tokens, words",
    [
        (np.array([[1, 256]]), "token 256 is not in the vocabulary (0 to 255)"),
        (np.array([[-1, 2]]), "token -1"),
        (np.array([1, 2]), "[B, T]"),
        (np.zeros((1, 1, 1), int), "[B, T]"),
        (np.array([[1.0, 2.0]]), "float64"),
        (np.array([[True]]), "bool"),
        (np.zeros((2, 0), int), "no token"),
        (np.zeros((0, 2), int), "no token"),
        ([[1, 2], [3]], "different lengths"),
    ],
    ids=str,
)
def test_tokens_that_are_none_are_one_line(lm, tokens, words):
    assert words in error_of(lm.generate, tokens)
    assert words in error_of(lm.logits, tokens)


@pytest.mark.parametrize("tokens", [["the ", 3], None, [["a"]]], ids=str)
def test_what_is_neither_text_nor_tokens_is_one_line(lm, tokens):
    """Past the annotations, which only tests check."""
    assert "[B, T]" in error_of(lm.generate.__func__.__wrapped__, lm, tokens)


def test_half_a_surrogate_pair_and_a_character_outside_the_vocabulary_are_one_line(lm):
    assert "surrogate" in error_of(lm.generate, "a\ud800")
    assert "'z'" in error_of(build(char_tokenizer("abc")).generate, "abz")


# -- Save and load


def test_what_is_saved_is_loaded_bit_for_bit(lm, bpe, tmp_path):
    for name, one in (("lm", lm), ("bpe", bpe)):
        one.save(tmp_path / name)
        loaded = llm_jax.load(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, one.params)
        assert loaded.config == one.config
        assert loaded.generate("the ", max_new_tokens=12) == one.generate("the ", max_new_tokens=12)
    assert "holds a run already" in error_of(lm.save, tmp_path / "lm")


def test_bfloat16_parameters_are_saved_as_they_are(tmp_path):
    half = build(byte_tokenizer(), param_dtype="bfloat16", compute_dtype="bfloat16")
    half.save(tmp_path / "half")
    loaded = llm_jax.load(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, half.params)
    assert loaded.generate("the ", max_new_tokens=12) == half.generate("the ", max_new_tokens=12)


def test_load_takes_the_step_that_is_asked_for(tiny_run):
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert min(losses, key=losses.get) == 60

    def scale(step):
        return llm_jax.load(tiny_run, step=step).params["final_norm"]["weight"].tolist()

    assert scale("best") == scale("last") == scale(60) == scale("60") != scale(40)
    assert "step 20" in error_of(llm_jax.load, tiny_run, step=20)  # the newest two are kept
    assert "'frist'" in error_of(llm_jax.load, tiny_run, step="frist")


def test_a_folder_that_is_no_run_is_one_line(tmp_path, lm):
    missing = error_of(llm_jax.load, tmp_path / "nothing")
    assert "nothing" in missing and "is not there" in missing
    assert "no config.json" in error_of(llm_jax.load, tmp_path)
    lm.save(tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    whole = config.read_text()
    for wrong in ("{", "[]", "3", '{"model": {"n_embd": "x"}}', '{"model": 3}', '{"modell": {}}'):
        config.write_text(wrong)
        assert "config" in error_of(llm_jax.load, tmp_path / "run")
    config.write_text(whole)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "run" / "elsewhere")
    assert "no checkpoint" in error_of(llm_jax.load, tmp_path / "run")
