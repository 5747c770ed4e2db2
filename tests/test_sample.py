"""`python -m llm_jax.sample` from outside: what it prints, and how it answers mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

import llm_jax
from llm_jax import model, run_folder, tokenizers
from llm_jax.config_rules import freeze
from llm_jax.report import read_metrics


SPEED = r"((> )?\d+ tokens: the first after \d+\.\d\d s(, then [\d,]+\.\d tokens/s)?\n)*(> )?"


@pytest.fixture(scope="module")
def sample(commands, tiny_run):
    """`sample("--seed=1")`: the standard output of a command that succeeds, and tells its speed besides."""

    def run(*arguments, workdir=tiny_run, stdin=b""):
        result = commands.run("sample", f"--workdir={workdir}", *arguments, cwd=tiny_run, stdin=stdin)
        assert result.returncode == 0 and re.fullmatch(SPEED, result.stderr), result
        return result.stdout

    return run


@pytest.fixture(scope="module")
def untrained_bpe(tmp_path_factory):
    """A run folder whose tokenizer has BOS."""
    tokenizer = tokenizers.train_bpe(["a cat sees a bird.\n" * 20], 270)
    shape = dict(n_embd=16, n_head=2, n_layer=1, block_size=16, vocab_size=tokenizer.vocab_size)
    cfg = freeze({"model": shape})
    params = jax.jit(model.init_params, static_argnums=0)(cfg.model, jax.random.key(0))
    folder = tmp_path_factory.mktemp("bpe") / "run"
    llm_jax.LanguageModel(cfg, params, tokenizer).save(folder)
    return folder


def test_a_seed_is_repeatable_and_another_gives_another_text(sample):
    first = sample("--prompt=the ", "--seed=3")
    assert first.startswith("the ") and first.endswith("\n") and len(first.encode()) > 60
    assert sample("--prompt=the ", "--seed=3") == first
    assert sample("--prompt=the ", "--seed=4") != first
    assert sample("--prompt=the ") == sample("--prompt=the ", "--seed=0") != first


def test_json_is_one_string_a_line_and_the_same_text(sample):
    request = ["--prompt=the ", "--num_samples=3"]
    plain = sample(*request)
    texts = [json.loads(line) for line in sample(*request, "--json").splitlines()]
    assert len(texts) == len(set(texts)) == 3
    assert all(text.startswith("the ") for text in texts)
    assert any("\n" in text for text in texts)  # else lines would be no question
    assert plain == "".join(text + "\n" for text in texts)
    # The first of several is the one that is asked for alone.
    assert sample("--prompt=the ") == texts[0] + "\n"


def test_the_defaults_are_those_of_generate(sample, tiny_run):
    lm = llm_jax.load(tiny_run)
    assert sample("--prompt=a cat") == lm.generate("a cat") + "\n"
    assert sample() == lm.generate("\n") + "\n"


def test_flags_are_the_arguments_of_generate(sample, tiny_run):
    penalties = dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)
    request = dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, seed=5, min_new_tokens=3, **penalties)
    flags = [f"--{name}={value}" for name, value in request.items()]
    assert sample("--prompt=a cat", *flags) == llm_jax.load(tiny_run).generate("a cat", **request) + "\n"


def test_flags_that_are_lists(sample, tiny_run):
    lm = llm_jax.load(tiny_run)
    request = dict(max_new_tokens=60, seed=2)
    flags = ["--prompt=a cat", "--max_new_tokens=60", "--seed=2"]
    plain = lm.generate("a cat", **request)
    a, b = plain[15:17], plain[30]
    assert sample(*flags, f"--stop={a}", "--stop=never") == plain[: plain.index(a, 5)] + "\n"
    stopped = lm.generate("a cat", **request, stop_tokens=[ord(b), 7])
    assert sample(*flags, f"--stop_tokens={ord(b)},7") == stopped + "\n"
    assert sample(*flags, "--stop_tokens=") == lm.generate("a cat", **request, stop_tokens=()) + "\n"
    bias = {32: float("-inf"), 97: 2.5}
    assert sample(*flags, "--logit_bias=32:-inf,97:2.5") == lm.generate("a cat", **request, logit_bias=bias) + "\n"


def test_flags_that_load(sample, tiny_run):
    plain = sample("--prompt=the ", "--temperature=0")
    assert sample("--prompt=the ", "--temperature=0", "--draft=lookup", "--draft_tokens=3") == plain
    assert sample("--prompt=the ", "--temperature=0", f"--draft={tiny_run}") == plain
    how = dict(weights="int8", cache_dtype="int8", rope_scaling="linear", rope_factor=2.0)
    expected = llm_jax.load(tiny_run, **how).generate("the ", temperature=1.3)
    assert sample("--prompt=the ", "--temperature=1.3", *(f"--{k}={v}" for k, v in how.items())) == expected + "\n"
    assert expected != llm_jax.load(tiny_run).generate("the ", temperature=1.3)


def test_a_prompt_in_a_file_or_on_standard_input(sample, tmp_path):
    prompt = "the cat\nsees ☕\n"
    (tmp_path / "prompt.txt").write_text(prompt)
    expected = sample(f"--prompt={prompt}")
    assert sample(f"--prompt_file={tmp_path}/prompt.txt") == expected
    assert sample("--prompt_file=-", stdin=prompt.encode()) == expected


def test_a_conversation_goes_on_with_what_was_said(sample, tiny_run):
    lm = llm_jax.load(tiny_run)
    first = lm.generate("the cat\n", max_new_tokens=20)
    second = lm.generate(first + "\na dog\n", max_new_tokens=20)
    shown = first.removeprefix("the cat\n") + "\n" + second.removeprefix(first + "\na dog\n") + "\n"
    assert sample("--interactive", "--max_new_tokens=20", stdin=b"the cat\na dog\n") == shown


def test_a_conversation_survives_a_mistake(commands, tiny_run):
    flags = ["--interactive", "--max_new_tokens=5", "--long_prompt=error"]
    typed = f"{'x' * 40}\nthe cat\n".encode()
    result = commands.run("sample", f"--workdir={tiny_run}", *flags, cwd=tiny_run, stdin=typed)
    assert result.returncode == 0 and "error: a prompt of 41 tokens" in result.stderr
    text = llm_jax.load(tiny_run).generate("the cat\n", max_new_tokens=5)
    assert result.stdout == text.removeprefix("the cat\n") + "\n"


def test_text_is_shown_as_it_comes(clean_env, tiny_run):
    """A reader sees some of it while the rest is not there: of 64 calls some are seen apart."""
    request = ["--prompt=the ", "--max_new_tokens=1000", "--stop_tokens="]
    command = [sys.executable, "-m", "llm_jax.sample", f"--workdir={tiny_run}", *request]
    with subprocess.Popen(command, env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert os.read(process.stdout.fileno(), 10**6).startswith(b"the ")
        sizes = [len(piece) for piece in iter(lambda: os.read(process.stdout.fileno(), 10**6), b"")]
        assert process.wait() == 0
    assert len(sizes) > 5 and sum(sizes) >= 900


def test_each_way_to_be_greedy(sample):
    greedy = sample("--prompt=the ", "--temperature=0")
    assert sample("--prompt=the ", "--temperature=0", "--seed=9") == greedy
    assert sample("--prompt=the ", "--top_k=1", "--seed=9") == greedy
    assert sample("--prompt=the ", "--top_p=1e-9", "--seed=9") == greedy
    assert sample("--prompt=the ", "--seed=9") != greedy


@pytest.mark.parametrize("prompt", ["naïve → ☕ 𝄞 é", " ", "\t\n"], ids=ascii)
def test_the_prompt_comes_back_as_it_was_given(sample, prompt):
    request = [f"--prompt={prompt}"]
    assert sample(*request).startswith(prompt)
    assert json.loads(sample(*request, "--json")).startswith(prompt)
    assert sample(f"--prompt={prompt}", "--max_new_tokens=0") == prompt + "\n"


def test_an_empty_prompt_starts_from_bos_where_there_is_one(sample, untrained_bpe):
    text = sample("--prompt=", "--max_new_tokens=20", workdir=untrained_bpe)
    assert len(text) > 1 and "<|endoftext|>" not in text


def test_a_long_prompt(sample, commands, tiny_run):
    prompt = "the cat sees a dog. " * 4
    assert len(prompt) > 32  # block_size
    assert sample(f"--prompt={prompt}").startswith(prompt)
    result = commands.run(
        "sample", f"--workdir={tiny_run}", f"--prompt={prompt}", "--long_prompt=error", cwd=tiny_run
    )
    assert result.returncode == 2 and "80 tokens" in result.stderr and "(32)" in result.stderr


def test_step_picks_the_checkpoint(sample, tiny_run):
    steps = sorted(int(path.name) for path in (tiny_run / "checkpoints").iterdir())
    assert len(steps) >= 2
    by_step = {step: sample("--prompt=the ", f"--step={step}") for step in steps}
    assert len(set(by_step.values())) == len(steps)
    losses = {line["step"]: line["val_loss"] for line in read_metrics(tiny_run) if "val_loss" in line}
    best = min(steps, key=lambda step: (losses[step], -step))
    assert sample("--prompt=the ", "--step=last") == by_step[steps[-1]]
    assert sample("--prompt=the ", "--step=best") == by_step[best] == sample("--prompt=the ")


def test_a_terminal_without_unicode(run_python, tiny_run):
    """In a process of its own, as a shell starts it: text alone on standard output, nothing on the other."""
    request = ["--prompt=naïve ☕ ", "--max_new_tokens=0"]
    result = run_python("-m", "llm_jax.sample", f"--workdir={tiny_run}", *request, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("na?ve ? ")


def test_help(run_python):
    result = run_python("-m", "llm_jax.sample", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    plain = "workdir step prompt max_new_tokens temperature top_k top_p seed num_samples long_prompt prompt_file stop"
    for flag in (plain + " min_p repetition_penalty presence_penalty frequency_penalty min_new_tokens").split():
        assert f"--{flag}:" in result.stdout
    assert "--[no]json:" in result.stdout


# -- Mistakes


@pytest.fixture(scope="module")
def folders(tiny_run, tmp_path_factory):
    """What a person may name instead of a run."""
    root = tmp_path_factory.mktemp("folders")
    (root / "run").symlink_to(tiny_run)
    (root / "empty").mkdir()
    (root / "file.txt").write_text("text\n")
    (root / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    cfg, tokenizer = run_folder.read_config(tiny_run), tokenizers.byte_tokenizer()
    run_folder.write_run(root / "unsaved", cfg, tokenizer)
    run_folder.write_run(root / "saving", cfg, tokenizer)
    (root / "saving" / "checkpoints").mkdir()
    for name, text in {"broken": '{"model": {', "foreign": '{"hidden_size": 64}', "list": "[]"}.items():
        shutil.copytree(root / "unsaved", root / name)
        (root / name / "config.json").write_text(text)
    shutil.copytree(tiny_run, root / "wider")
    config_file = root / "wider" / "config.json"
    config_file.write_text(config_file.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    shutil.copytree(root / "unsaved", root / "wordless")
    (root / "wordless" / "tokenizer.json").unlink()
    return root


MISTAKES = [
    (["--workdir=missing"], ["'missing'", "runs/small"]),
    (["--workdir=empty"], ["'empty'", "no run", "config.json", "runs/small"]),
    (["--workdir=file.txt"], ["'file.txt'", "runs/small"]),
    (["--workdir="], ["workdir ''"]),
    (["--workdir=unsaved"], ["'unsaved'", "no checkpoint", "train.save_every"]),
    (["--workdir=saving"], ["saving", "no checkpoint", "train.save_every"]),
    (["--workdir=broken"], ["broken/config.json"]),
    (["--workdir=foreign"], ["foreign/config.json", "'hidden_size'"]),
    (["--workdir=list"], ["list/config.json"]),
    (["--workdir=wider"], ["does not fit", "it holds the shapes [", "the config makes [", "config.json"]),
    (["--workdir=wordless"], ["wordless/tokenizer.json"]),
    (["--step=nearest"], ["'nearest'", "best, last, "]),
    (["--step=59"], ["'59'", "best, last, ", "60"]),
    (["--step="], ["''", "best, last, "]),
    (["--top_k=0"], ["top_k (0)", "1 or more"]),
    (["--top_k=-3"], ["top_k (-3)", "1 or more"]),
    (["--top_k=many"], ["top_k", "many", "int"]),
    (["--top_p=0"], ["top_p (0.0)", "above 0"]),
    (["--top_p=1.01"], ["top_p (1.01)", "at most 1"]),
    (["--top_p=nan"], ["top_p (nan)", "at most 1"]),
    (["--min_p=2"], ["min_p (2.0)", "at most 1"]),
    (["--repetition_penalty=0"], ["repetition_penalty (0.0)", "above 0"]),
    (["--frequency_penalty=nan"], ["frequency_penalty (nan)", "finite"]),
    (["--min_new_tokens=101"], ["min_new_tokens (101)", "max_new_tokens (100)"]),
    (["--temperature=-0.1"], ["temperature (-0.1)", "0 (greedy) or more"]),
    (["--temperature=nan"], ["temperature (nan)", "finite"]),
    (["--temperature=inf"], ["temperature (inf)", "finite"]),
    (["--max_new_tokens=-1"], ["max_new_tokens (-1)", "at least 0"]),
    (["--max_new_tokens=1000000000000"], ["max_new_tokens (1000000000000)", "at most 16777216"]),
    (["--prompt="], ["prompt is empty", "at least one character"]),
    (["--num_samples=0"], ["num_samples", "0", "positive"]),
    (["--seed=-1"], ["seed", "-1"]),
    (["--seed=4294967296"], ["seed", "4294967295"]),  # would be seed 0 again
    (["--long_prompt=cut"], ["long_prompt", "cut", "keep_tail|error"]),
    (["--topk=3"], ["--topk", "--top_k"]),
    (["--prompt_file=nowhere.txt"], ["nowhere.txt", "can't be read"]),
    (["--prompt_file=file.txt", "--prompt=a"], ["--prompt and --prompt_file (file.txt)"]),
    (["--prompt_file=empty"], ["empty", "can't be read"]),
    (["--prompt_file=latin.txt"], ["latin.txt", "UTF-8 (byte 3)"]),
    (["--stop="], ["stop_strings", "at least one character"]),
    (["--stop_tokens=a"], ["--stop_tokens (a)"]),
    (["--stop_tokens=256"], ["stop_tokens ([256])", "0 to 255"]),
    (["--logit_bias=3"], ["--logit_bias (3)", "13:-inf"]),
    (["--logit_bias=300:1"], ["token 300"]),
    (["--weights=int4"], ["weights", "int4"]),
    (["--rope_factor=2"], ["rope_factor (2.0)", "rope_scaling (None)"]),
    (["--draft=missing"], ["'missing'"]),
    (["--draft=lookup", "--draft_tokens=0"], ["draft_tokens (0)"]),
    (["--interactive", "--json"], ["--interactive", "--json"]),
    (["--config.model.n_embd=3"], ["--config.model.n_embd"]),
    (["def"], ["'def'", "--name=value"]),
]


@pytest.mark.parametrize("arguments, told", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line(commands, folders, arguments, told):
    result = commands.run("sample", "--workdir=run", *arguments, cwd=folders)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [part for part in told if part not in result.stderr] == []


def test_a_closed_pipe_is_no_error(clean_env, tiny_run):
    command = [sys.executable, "-m", "llm_jax.sample", f"--workdir={tiny_run}", "--prompt=the", "--max_new_tokens=4"]
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "bash", *command],
        env=clean_env, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


def test_no_workdir(commands, folders):
    result = commands.run("sample", "--prompt=the", cwd=folders)
    assert (result.returncode, result.stdout) == (2, "") and "--workdir=" in result.stderr
