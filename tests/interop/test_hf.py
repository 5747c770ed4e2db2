"""Hugging Face folders of every family beside transformers: logits, greedy tokens, a ragged batch, and back."""

import numpy as np
import pytest
from reference import CASES, FIRST_FAST, SECOND_FAST, TOKENS, VOCAB, logits_of, make, torch, transformers

import llm_jax


@pytest.mark.parametrize("name, i", CASES)
def test_logits_are_those_of_transformers(name, i):
    reference, lm = make(name, i)
    expected, found = logits_of(reference, TOKENS), lm.logits(TOKENS)
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def greedy(reference, prompts):
    """(tokens, raw logits) of 32 greedy tokens by transformers, prompts padded on the left."""
    longest = max(map(len, prompts))
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([[0] * (longest - len(prompt)) + list(prompt.encode()) for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(256, VOCAB)),  # ours draws no id that stands for no text
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, longest:].numpy(), torch.stack(out.logits, 1)[..., :256]


@pytest.mark.slow
@pytest.mark.parametrize("name, i", FIRST_FAST)
def test_greedy_tokens_of_a_ragged_batch_are_those_of_transformers(name, i):
    """As text of several lengths here, padded on the left there; up to where two tokens are nearly as likely."""
    reference, lm = make(name, i)
    prompts = ["".join(map(chr, TOKENS[i % 2, :length] % 128)) for i, length in enumerate((3, 11, 24, 30))]
    if lm.config.model.rope_scaling == "longrope":  # there the longest text of a batch decides for all of them
        alone = [greedy(reference, [prompt]) for prompt in prompts]
        tokens, logits = (np.concatenate(each) for each in zip(*alone, strict=True))
    else:
        tokens, logits = greedy(reference, prompts)
    top = np.sort(logits, axis=-1)[..., -2:]
    samples = lm.generate_detailed(prompts, max_new_tokens=32, temperature=0.0, stop_tokens=())
    compared = 0
    for row, sample in enumerate(samples):
        clear = top[row, :, 1] - top[row, :, 0] > 1e-3
        certain = 32 if clear.all() else int(np.argmin(clear))
        assert sample.tokens[:certain] == tokens[row, :certain].tolist()
        compared += certain
    assert compared > 40  # of 128


def test_longrope_turns_texts_within_the_original_length_by_the_short_factors():
    reference, lm = make("phi3", 0)
    short, long = TOKENS[:, :24], TOKENS[:, :25]
    for tokens in (short, long):
        expected = logits_of(reference, tokens)
        assert np.abs(lm.logits(tokens) - expected).max() <= 2e-4 * np.abs(expected).max()
        scores = [lm.score(row.tolist()) for row in tokens]
        allowed = torch.log_softmax(torch.tensor(expected[..., :256]), -1).numpy()
        expected = np.take_along_axis(allowed[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert np.abs(lm.logits(long)[:, :24] - lm.logits(short)).max() > 0.01


@pytest.mark.parametrize("name, i", SECOND_FAST)
def test_exported_weights_are_bitwise_the_same_and_transformers_opens_them(name, i, tmp_path):
    reference, lm = make(name, i)
    lm.save_pretrained(tmp_path / "out", **({"max_shard_bytes": 40_000} if i else {}))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(back) is type(reference)
    own, theirs = back.state_dict(), reference.state_dict()
    assert own.keys() == theirs.keys()
    for key, value in theirs.items():
        assert own[key].dtype == value.dtype and torch.equal(own[key], value), key
    np.testing.assert_array_equal(logits_of(back, TOKENS), logits_of(reference, TOKENS))
    again = llm_jax.load(tmp_path / "out")
    assert again.config == lm.config
