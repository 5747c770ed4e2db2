"""`python -m llm_jax.main` from outside: files, streams, exit codes, being stopped and going on, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import REPOSITORY

from llm_jax.config_rules import freeze

TINY = REPOSITORY / "configs" / "tiny.py"
# A constant rate after the warm-up leaves train.num_steps out of the program, which then is compiled once.
SIZES = (
    "--config.model.n_embd=16 --config.model.n_layer=1 --config.model.block_size=16 --config.train.eval_batches=2 "
    "--config.train.log_every=1 --config.sample.max_new_tokens=8 --config.optim.warmup_steps=100 "
    "--config.optim.schedule=constant"
).split()
PROMPT = "--config.sample.prompt=the "
TIMING = ("wall_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 12 kB whose byte-level loss changes from batch to batch."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"the cat {i} sees {i * i} birds, naïve ones.\n" for i in range(320)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def arguments(text):
    """The command that the tests stop and continue; dropout, so that random keys have to continue too."""
    return [
        f"--config={TINY}",
        f"--config.data.path={text}",
        *SIZES,
        PROMPT,
        "--config.model.dropout=0.1",
        "--config.train.num_steps=120",
        "--config.train.eval_every=40",
        "--config.train.save_every=30",
    ]


@pytest.fixture(scope="module")
def unstopped(commands, arguments, tmp_path_factory):
    """(folder, result) of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("unstopped")
    result = commands.run("main", *arguments, "--workdir=run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run", result


@pytest.fixture(scope="module")
def short(text):
    """20 steps of the same without dropout, evaluated and saved at their end."""
    return [
        f"--config={TINY}",
        f"--config.data.path={text}",
        *SIZES,
        PROMPT,
        "--config.train.num_steps=20",
        "--config.train.eval_every=0",
        "--config.train.save_every=0",
        "--config.train.sample_every=10",
    ]


@pytest.fixture(scope="module")
def short_run(commands, short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    result = commands.run("main", *short, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def metrics(workdir, *, timing=False):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timing or k not in TIMING} for line in lines]


def last_step(workdir):
    """The step of the last whole line of a run that may be under way."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


# -- What a run leaves


def test_files_of_a_run(unstopped):
    workdir, _ = unstopped
    assert freeze(json.loads((workdir / "config.json").read_text())).model.vocab_size == 256
    assert json.loads((workdir / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert 120 in steps and len(steps) in (2, 3)  # the last two, and the best if it is neither
    assert not (workdir / "profile").exists()


def test_metrics_lines(unstopped):
    workdir, _ = unstopped
    lines = metrics(workdir, timing=True)
    training = [line for line in lines if "loss" in line]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "wall_seconds"}
    assert all(set(line) == keys for line in training)
    assert [line["step"] for line in training] == list(range(1, 121))
    evaluations = [line for line in lines if "val_loss" in line]
    assert all(set(line) == {"step", "val_loss", "bits_per_byte"} for line in evaluations)
    assert {40, 80, 120} <= {line["step"] for line in evaluations}
    assert set(lines[-1]) == {"step", "val_loss_full", "bits_per_byte_full"} and lines[-1]["step"] == 120
    assert len(lines) == len(training) + len(evaluations) + 1
    assert training[-1]["loss"] < training[0]["loss"] - 0.5  # it learns
    assert [line["wall_seconds"] for line in training] == sorted(line["wall_seconds"] for line in training)


def test_standard_output_is_the_sample_alone(commands, unstopped):
    workdir, result = unstopped
    again = commands.run(
        "sample", f"--workdir={workdir}", "--step=last", "--prompt=the ", "--max_new_tokens=8", cwd=workdir
    )
    assert result.stdout == again.stdout and result.stdout.startswith("the ") and result.stdout.endswith("\n")
    for told in ("parameters", "loss", "tokens/s", "left", "val_loss"):
        assert told in result.stderr


def test_the_same_command_again_returns_at_once(commands, arguments, unstopped):
    workdir, _ = unstopped
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if "tokenizer" not in path.name}
    result = commands.run("main", *arguments, "--workdir=run", cwd=workdir.parent)
    assert (result.returncode, result.stdout) == (0, "")
    assert "already trained for 120 steps" in result.stderr and "tokens/s" not in result.stderr
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if "tokenizer" not in path.name}
    kept = {path for path in before if path.name not in ("run", "config.json")}
    assert {path: before[path] for path in kept} == {path: after.get(path) for path in kept}
    assert after.keys() == before.keys()


def test_default_workdir_has_the_stem_of_the_text(short_run):
    folder, result = short_run
    assert [path.name for path in (folder / "runs").iterdir()] == ["tiny-book"]
    assert [line["step"] for line in metrics(folder / "runs" / "tiny-book") if "loss" in line] == list(range(1, 21))
    assert len(list((folder / "runs" / "tiny-book" / "checkpoints").iterdir())) == 1
    assert result.stdout.count("the ") >= 2  # train.sample_every=10


def test_default_workdir_without_a_text_is_the_config(commands, tmp_path):
    few = ["--config.train.num_steps=2", "--config.data.val_fraction=0.001"]
    result = commands.run("main", f"--config={TINY}", *SIZES, PROMPT, *few, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_default_workdir_of_a_glob_is_its_folder_s(commands, short, tmp_path):
    (tmp_path / "books").mkdir()
    shutil.copy(short[1].partition("path=")[2], tmp_path / "books" / "one.txt")
    process = commands.start("main", *short, "--config.data.path=books/*.txt", cwd=tmp_path)
    process.signal_when(signal.SIGKILL, lambda: any((tmp_path / "runs").glob("*/config.json")))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-books"]


def test_changes_reach_the_run_whatever_their_type_and_place(commands, short, tmp_path):
    changes = {
        "train.num_steps=3": 3,
        "optim.peak_lr=2e-3": 2e-3,
        "model.use_rope=false": False,
        "model.use_bias": True,
        "model.n_kv_head=2": 2,
        "sample.top_p=0.5": 0.5,
        "sample.top_k=None": None,
        "model.layer_types=('full',)": ["full"],
        "model.mlp=gelu": "gelu",
    }
    before = [f"--config.{change}" for change in changes]
    extra = ["--noconfig.model.tie_embeddings", "--config.data.path=None", f"--config.data.path={short[1][19:]}"]
    process = commands.start("main", *before, *short[:1], *SIZES, PROMPT, *extra, "--workdir=run", cwd=tmp_path)
    process.signal_when(signal.SIGKILL, lambda: (tmp_path / "run" / "config.json").exists())
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    for change, value in changes.items():
        group, key = change.partition("=")[0].split(".")
        assert recorded[group][key] == value, change
    assert recorded["model"]["tie_embeddings"] is False


def test_more_steps_continue_a_finished_run(commands, short, short_run, tmp_path):
    shutil.copytree(short_run[0] / "runs" / "tiny-book", tmp_path / "run")
    result = commands.run("main", *short, "--workdir=run", "--config.train.num_steps=24", cwd=tmp_path)
    assert result.returncode == 0 and "continues after step 20" in result.stderr
    lines = metrics(tmp_path / "run")
    assert lines[:21] == metrics(short_run[0] / "runs" / "tiny-book")[:21]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 25))
    assert [line["step"] for line in lines if "val_loss_full" in line] == [24]


def test_another_config_for_the_same_run_is_refused(commands, short, short_run):
    folder, _ = short_run
    before = (folder / "runs" / "tiny-book" / "config.json").read_text()
    result = commands.run("main", *short, "--config.optim.peak_lr=0.5", cwd=folder)
    message = mistake(result)
    assert "optim.peak_lr 0.003 there and 0.5 here" in message and "another workdir" in message
    assert (folder / "runs" / "tiny-book" / "config.json").read_text() == before


def test_keys_that_only_say_how_may_change(commands, short, short_run, tmp_path):
    shutil.copytree(short_run[0] / "runs" / "tiny-book", tmp_path / "run")
    how = "train.num_steps=21 train.accumulation_steps=4 train.eval_every=7"
    changes = [f"--config.{change}" for change in how.split()]
    result = commands.run("main", *short, *changes, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0 and last_step(tmp_path / "run") == 21, result.stderr


# -- The same numbers, computed otherwise


@pytest.mark.parametrize(
    "how, env",
    [
        ([], {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}),
        (["--config.train.accumulation_steps=4"], {}),
    ],
    ids=["8 devices", "accumulation"],
)
def test_losses_equal_those_of_one_device(commands, short, short_run, tmp_path, how, env):
    result = commands.run("main", *short, *how, "--workdir=run", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert ("on 8 x cpu" in result.stderr) == bool(env)
    expected = metrics(short_run[0] / "runs" / "tiny-book")
    found = metrics(tmp_path / "run")
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, like in zip(found, expected, strict=True):
        assert line == pytest.approx(like, rel=1e-5 if "loss" in line else 1e-4)


# -- Stopped, and going on


def test_sigint_and_sigterm_save_and_the_same_command_continues(commands, arguments, unstopped, tmp_path):
    workdir = tmp_path / "run"
    for signum, code, step in ((signal.SIGINT, 130, 35), (signal.SIGTERM, 143, 70)):
        process = commands.start("main", *arguments, "--workdir=run", cwd=tmp_path)
        result = process.signal_when(signum, lambda step=step: last_step(workdir) >= step)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr and "saved" in result.stderr and not result.stdout
        stopped = last_step(workdir)
        # Nothing done is lost: the checkpoint is of the last step that was logged.
        assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == stopped
        assert stopped < 120
    result = commands.run("main", *arguments, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0 and f"continues after step {stopped}" in result.stderr
    assert metrics(workdir) == metrics(unstopped[0])
    assert result.stdout == unstopped[1].stdout


@pytest.mark.slow
def test_sigkill_at_any_moment_costs_only_time(commands, arguments, unstopped, tmp_path):
    workdir, stderr = tmp_path / "run", lambda: process.stderr.read_text()
    moments = {
        "before the first step": lambda: "training tokens" in stderr(),
        "before the first checkpoint": lambda: last_step(workdir) >= 7,
        "while saving": lambda: any("tmp" in path.name for path in (workdir / "checkpoints").glob("*")),
        "after a checkpoint": lambda: last_step(workdir) >= 65,
        "at the last step": lambda: last_step(workdir) >= 120,
    }
    for moment, reached in moments.items():
        process = commands.start("main", *arguments, "--workdir=run", cwd=tmp_path)
        result = process.signal_when(signal.SIGKILL, reached)
        assert result.returncode == -signal.SIGKILL, (moment, result)
    # As a kill while a line is written leaves it.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12')
    result = commands.run("main", *arguments, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert metrics(workdir) == metrics(unstopped[0])
    assert result.stdout == unstopped[1].stdout
    assert not any("tmp" in path.name for path in workdir.rglob("*"))


@pytest.mark.slow
def test_sigkill_after_any_time(commands, arguments, unstopped, tmp_path):
    killed = 0
    for tenths in range(1, 40, 3):
        process = commands.start("main", *arguments, "--workdir=run", cwd=tmp_path)
        time.sleep(tenths / 10)
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait().returncode == -signal.SIGKILL
    assert killed > 3
    result = commands.run("main", *arguments, "--workdir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "run") == metrics(unstopped[0])


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_before_the_first_step(commands, arguments, tmp_path, signum, code):
    process = commands.start("main", *arguments, "--workdir=run", cwd=tmp_path)
    result = process.signal_when(signum, lambda: "training tokens" in process.stderr.read_text())
    assert result.returncode == code and "Traceback" not in result.stderr and not result.stdout, result


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc not installed")
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_jax_is_imported(arguments, clean_env, tmp_path, signum, code):
    # pytest in the background of a shell ignores SIGINT, and so would the process without the first line.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv[0] = 'main'; runpy.run_module('llm_jax.main', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=clean_env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.002)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=90)
    assert (process.returncode, stdout) == (code, "") and "Traceback" not in stderr, stderr
    assert not (tmp_path / "runs").exists()


# -- Mistakes


def mistake(result):
    """The one line that a person's mistake is answered with."""
    assert result.returncode == 2, result
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result
    return result.stderr


@pytest.fixture
def files(tmp_path, text):
    """A folder with right and wrong files to name on a command line; what a test leaves in it is checked."""
    shutil.copy(text, tmp_path / "book.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short\n")
    (tmp_path / "latin1.txt").write_bytes("naïve\n".encode("latin-1") * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "syntax.py").write_text("def get_config(:\n    pass\n")
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "none.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "dict.py").write_text("def get_config():\n    return {'model': {}}\n")
    body = "from llm_jax.config import default\ndef get_config():\n    c = default()\n    {}\n    return c\n"
    (tmp_path / "misspelt.py").write_text(body.format("c.model.n_embed = 64"))
    (tmp_path / "mistyped.py").write_text(body.format("c.model.n_embd = 'wide'"))
    (tmp_path / "updated.py").write_text(body.format("c.update({'model': {'n_embed': 64}})"))
    (tmp_path / "dotted.py").write_text(body.format("c['model.n_embd'] = 64"))
    return tmp_path


BAD_CONFIGS = [
    ([], ["--config="]),
    (["--config="], ["--config="]),
    (["--config=missing.py"], ["missing.py", "No such file", "configs/"]),
    (["--config=folder"], ["folder", "directory"]),
    (["--config=syntax.py"], ["syntax.py", "line 1"]),
    (["--config=nothing.py"], ["nothing.py", "get_config"]),
    (["--config=none.py"], ["none.py", "get_config", "NoneType"]),
    (["--config=dict.py"], ["dict.py", "get_config", "dict"]),
    (["--config=misspelt.py"], ["misspelt.py", "'n_embed'", "'model.n_embd'"]),
    (["--config=mistyped.py"], ["mistyped.py", "n_embd", "wide", "int"]),
    (["--config=updated.py"], ["updated.py", "'n_embed'", "'model.n_embd'"]),
    (["--config=dotted.py"], ["dotted.py", "config.model.n_embd"]),
    (["--config.train.num_steps=3"], ["--config="]),
    (["--config"], ["--config"]),
    (["--flagfile=missing"], ["missing"]),
]

BAD_ARGUMENTS = [
    # Flags
    (["stray"], ["'stray'", "--name=value"]),
    (["--", "stray"], ["'stray'"]),
    (["--nonsense=3"], ["--nonsense", "--help"]),
    (["--workdri=x"], ["--workdri", "--workdir"]),
    # Keys
    (["--config.model.n_embed=3"], ["'model.n_embed'", "'model.n_embd'"]),
    (["--config.optim.peak_lrr=3"], ["'optim.peak_lrr'", "'optim.peak_lr'"]),
    (["--config.train.peak_lr=3"], ["'train.peak_lr'", "'optim.peak_lr'"]),
    (["--config.modell.n_embd=3"], ["'modell.n_embd'", "'model.n_embd'"]),
    (["--config.n_embd=3"], ["'n_embd'", "'model.n_embd'"]),
    (["--noconfig.model.use_ropes"], ["'model.use_ropes'", "'model.use_rope'"]),
    (["--config.model"], ["'model'", "config.py"]),
    (["--config.model=3"], ["'model'", "config.py"]),
    (["--config.model.n_embd.x=3"], ["'model.n_embd.x'", "'model.n_embd'"]),
    (["--config.=3"], ["''", "config.py"]),
    # Types
    (["--config.model.n_embd=wide"], ["model.n_embd", "'wide'", "int", "--config.model.n_embd="]),
    (["--config.model.n_embd=3.5"], ["model.n_embd", "'3.5'", "int"]),
    (["--config.model.n_embd="], ["model.n_embd", "''", "int"]),
    (["--config.model.n_embd"], ["model.n_embd", "int", "--config.model.n_embd="]),
    (["--config.model.n_embd=None"], ["model.n_embd", "'None'", "int"]),
    (["--config.model.n_embd", "64"], ["'64'", "--name=value"]),
    (["--config.model.n_kv_head=few"], ["model.n_kv_head", "'few'", "int or None"]),
    (["--config.optim.peak_lr=fast"], ["optim.peak_lr", "'fast'", "float"]),
    (["--config.model.use_rope=maybe"], ["model.use_rope", "'maybe'", "bool"]),
    (["--config.model.layer_types=('full', 3)"], ["model.layer_types", "'3'", "sliding"]),
    (["--config.model.mlp=swigl"], ["model.mlp", "'swigl'", "swiglu"]),
    # Rules
    (["--config.model.n_embd=30"], ["model.n_embd (30)", "model.n_head (4)", "model.head_dim"]),
    (["--config.model.n_layer=0"], ["model.n_layer (0)", "1 or more"]),
    (["--config.optim.peak_lr=-1e-3"], ["optim.peak_lr (-0.001)", "above 0"]),
    (["--config.optim.peak_lr=nan"], ["optim.peak_lr (nan)", "finite"]),
    (["--config.optim.weight_decay=inf"], ["optim.weight_decay (inf)", "finite"]),
    (["--config.model.dropout=nan"], ["model.dropout (nan)", "finite"]),
    (["--config.train.num_steps=0"], ["train.num_steps (0)", "1 or more"]),
    (["--config.train.batch_size=8", "--config.train.accumulation_steps=3"], ["(8)", "multiple", "(3)"]),
    (["--config.model.rope_theta=1"], ["model.rope_theta (1.0)", "above 1"]),
    (["--config.model.rope_beta_fast=0.5"], ["model.rope_beta_fast (0.5)", "model.rope_beta_slow (1.0)"]),
    (["--config.model.rope_low_freq_factor=4"], ["model.rope_high_freq_factor (4.0)", "rope_low_freq_factor (4.0)"]),
    (["--config.mesh.data=3"], ["mesh.data (3)", "(1)", "-1"]),
    (["--config.sample.top_k=0"], ["sample.top_k (0)", "1 or more"]),
    (["--config.sample.top_p=1.5"], ["sample.top_p (1.5)", "at most 1"]),
    (["--config.sample.temperature=nan"], ["sample.temperature (nan)", "finite"]),
    (["--config.sample.max_new_tokens=-1"], ["sample.max_new_tokens (-1)", "at least 0"]),
    (["--config.sample.prompt="], ["sample.prompt ('')", "at least one character"]),
    (["--config.data.tokenizer=char", "--config.sample.prompt=☕"], ["sample.prompt", "U+2615", "byte"]),
    (["--config.model.vocab_size=10"], ["model.vocab_size (10)", "(256)"]),
    # Text
    (["--config.data.path=missing.txt"], ["missing.txt", "does not exist", "file"]),
    (["--config.data.path=empty.txt"], ["empty.txt", "empty", "data.path"]),
    (["--config.data.path=short.txt"], ["9 tokens", "33", "model.block_size", "more text"]),
    (["--config.data.path=latin1.txt"], ["latin1.txt", "UTF-8"]),
    (["--config.data.path=folder"], ["folder", "without any file"]),
    (["--config.data.path=*.nope"], ["*.nope", "no file"]),
    (["--config.data.path="], ["data.path ('')"]),
    (["--config.data.path=None", "--config.data.source=text"], ["--config.data.path="]),
    (["--config.data.source=wikipedia"], ["data.source ('wikipedia')", "tinyshakespeare"]),
    (["--config.data.tokenizer=missing.json"], ["missing.json", "tokenizer.json"]),
    (["--config.data.val_fraction=1"], ["data.val_fraction (1.0)", "below 1"]),
    # Folders
    (["--workdir=book.txt"], ["'book.txt'", "--workdir"]),
    (["--config.data.cache_dir=book.txt"], ["book.txt", "data.cache_dir"]),
    (["--config.data.cache_dir=/proc"], ["/proc", "can't be written", "data.cache_dir"]),
    (["--config.data.path=~nobody-of-that-name/x"], ["~nobody-of-that-name/x", "does not exist"]),
]


@pytest.mark.parametrize(
    "arguments, told",
    BAD_CONFIGS + [([f"--config={TINY}", "--config.data.path=book.txt", *bad], told) for bad, told in BAD_ARGUMENTS],
    ids=lambda value: " ".join(value[2:] if "--config.data.path=book.txt" in value else value) or "nothing",
)
def test_a_mistake_is_one_line_and_leaves_nothing(commands, files, arguments, told):
    before = sorted(files.rglob("*"))
    message = mistake(commands.run("main", *arguments, cwd=files))
    assert [part for part in told if part not in message] == []
    assert sorted(path for path in files.rglob("*") if "__pycache__" not in path.parts) == before


def test_a_batch_that_does_not_divide_over_the_devices(commands, files):
    arguments = [f"--config={TINY}", "--config.data.path=book.txt", "--config.train.batch_size=12"]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    message = mistake(commands.run("main", *arguments, cwd=files, env=env))
    assert "train.batch_size" in message and "12" in message and "rows (8)" in message
    assert not (files / "runs").exists()


def test_tinyshakespeare_offline_fails_at_once(commands, files):
    # Nothing listens there.
    env = {"https_proxy": "http://127.0.0.1:9", "LLM_JAX_CACHE": str(files / "cache")}
    start = time.monotonic()
    arguments = [f"--config={TINY}", "--config.data.source=tinyshakespeare"]
    message = mistake(commands.run("main", *arguments, cwd=files, env=env))
    assert "tinyshakespeare" in message and "data.path" in message
    assert time.monotonic() - start < 20
    assert not (files / "runs").exists()


def test_a_mistake_in_a_process_of_its_own(run_python, text):
    """As a shell sees it: what importing jax and grain prints is not on standard error either."""
    result = run_python("-m", "llm_jax.main", f"--config={TINY}", "--config.data.path=missing.txt")
    assert "missing.txt" in mistake(result)


def test_a_mistake_in_the_flags_is_told_without_loading_jax(run_python, tmp_path):
    (tmp_path / "fake" / "jax").mkdir(parents=True)
    (tmp_path / "fake" / "jax" / "__init__.py").write_text("raise SystemExit('jax was loaded')\n")
    path = os.pathsep.join([str(tmp_path / "fake"), str(REPOSITORY)])
    result = run_python("-m", "llm_jax.main", f"--config={TINY}", "--config.model.n_embed=3", PYTHONPATH=path)
    assert "'model.n_embd'" in mistake(result)


def test_help(run_python):
    result = run_python("-m", "llm_jax.main", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for shown in ("python -m llm_jax.main", "--config", "--config.group.key=value", "--workdir"):
        assert shown in result.stdout
