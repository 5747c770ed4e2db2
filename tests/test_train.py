"""The loop, on one fake device except where a test says 8."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future

import jax
import numpy as np
import pytest
from conftest import error_of, only_one_device, tiny_config
from ml_collections import ConfigDict

import llm_jax
from llm_jax import checkpoint, programs, sharding, stopping, train, train_step
from llm_jax.config import MeshConfig, as_dict
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.stopping import Interrupted, Stopped, stop_signals
from llm_jax.tokenizers import train_bpe
from llm_jax.train import fit

STEPS = 6  # evaluations at 3 and 6, checkpoints (which evaluate too) at 2, 4 and 6
TRAINING_KEYS = ["step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "wall_seconds"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tiny_text, cache):
    return lambda **changes: tiny_config(tiny_text, cache, **changes)


@pytest.fixture(scope="module")
def unstopped(tiny_text, cache, tmp_path_factory):
    """The folder of a run that went through; to be read, or copied."""
    folder = tmp_path_factory.mktemp("unstopped")
    with only_one_device():
        fit(tiny_config(tiny_text, cache), workdir=folder)
    return folder


@pytest.fixture
def copy(unstopped, tmp_path):
    """A copy of that run; `copy(until=4)` as if it had been killed after step 4 was saved."""

    def make(until=STEPS):
        workdir = tmp_path / "copy"
        shutil.copytree(unstopped, workdir)
        for step in range(until + 1, STEPS + 1):
            shutil.rmtree(workdir / "checkpoints" / str(step), ignore_errors=True)
        return workdir

    return make


def lines(workdir, timing=False):
    parsed = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timing or k not in TRAINING_KEYS[4:]} for line in parsed]


def assert_same_run(workdir, other):
    assert lines(workdir) == lines(other)
    a, b = (llm_jax.load(folder, step="last") for folder in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def steps_saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def after_logging(monkeypatch, step, act):
    """Calls `act` when the training line of `step` has been written."""
    log = train.Report.log

    def logging(self, logged, values):
        log(self, logged, values)
        if logged == step and "loss" in values:
            act()

    monkeypatch.setattr(train.Report, "log", logging)


# -- What a run leaves


def test_metrics_lines_have_the_keys_and_the_order_of_the_interface(unstopped):
    written = lines(unstopped, timing=True)
    expected = []
    for step in range(1, STEPS + 1):
        expected.append((step, TRAINING_KEYS))
        if step % 3 == 0 or step % 2 == 0:
            expected.append((step, ["step", "val_loss", "bits_per_byte"]))
    expected.append((STEPS, ["step", "val_loss_full", "bits_per_byte_full"]))
    assert [(line["step"], list(line)) for line in written] == expected
    training = [line for line in written if "loss" in line]
    assert all(math.isfinite(value) and value > 0 for line in written for value in line.values())
    assert training[-1]["loss"] < training[0]["loss"]
    seconds = [line["wall_seconds"] for line in training]
    assert seconds == sorted(seconds)


def test_the_folder_holds_what_the_interface_lists(unstopped):
    names = {path.name for path in unstopped.iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"} <= names
    assert not [name for name in names if "tmp" in name] and "profile" not in names
    assert (unstopped / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert steps_saved(unstopped) == [4, 6]


def test_the_config_in_the_folder_is_resolved_and_is_the_runs(unstopped, config):
    saved = json.loads((unstopped / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 256 and saved["model"]["head_dim"] == 8
    assert len(saved["data"]["content_hash"]) == 64 and saved["data"]["source"] == "text"
    given = json.loads(json.dumps(as_dict(freeze(config()))))  # which has lists for tuples
    changed = {(group, k) for group in saved for k in saved[group] if saved[group][k] != given[group][k]}
    assert changed == {("model", "vocab_size"), ("data", "content_hash")}
    assert freeze(saved) == llm_jax.load(unstopped).config


def test_val_loss_full_is_the_mean_over_every_token_after_the_first_once(unstopped, tiny_text):
    lm = llm_jax.load(unstopped, step="last")
    text = tiny_text.read_bytes()
    tokens = np.frombuffer(text[int(len(text) * 0.9) :], np.uint8).astype(int)
    while tokens[0] & 0xC0 == 0x80:  # the split is moved to the next character
        tokens = tokens[1:]
    nats = []
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        padded = np.zeros((1, 32), int)  # one shape, one program; what follows is never seen
        padded[0, : len(window) - 1] = window[:-1]
        logprobs = np.asarray(jax.nn.log_softmax(lm.logits(padded)[0]))
        nats += [-logprobs[i, target] for i, target in enumerate(window[1:])]
    assert len(nats) == len(tokens) - 1
    last = lines(unstopped)[-1]
    np.testing.assert_allclose(last["val_loss_full"], np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(last["bits_per_byte_full"], np.mean(nats) / math.log(2), rtol=1e-5)  # a byte a token


# -- Stop and continue


@pytest.mark.parametrize("signum, after", [(signal.SIGINT, 2), (signal.SIGTERM, 4)], ids=["SIGINT", "SIGTERM"])
def test_a_run_that_was_stopped_and_continued_equals_the_unstopped_one(
    signum, after, config, unstopped, tmp_path, one_device
):
    handler = signal.getsignal(signum)
    with pytest.MonkeyPatch.context() as patch:
        after_logging(patch, after, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Stopped, match=f"stopped at step {after + 1}") as stopped:
            fit(config(), workdir=tmp_path / "run")
    assert stopped.value.signum == signum and signal.getsignal(signum) == handler
    assert steps_saved(tmp_path / "run")[-1] == after + 1
    assert lines(tmp_path / "run")[-1]["step"] <= after + 1
    fit(config(), workdir=tmp_path / "run")
    assert_same_run(tmp_path / "run", unstopped)


@pytest.mark.parametrize("end", ["", '{"step": 7, "lo'])
def test_a_killed_run_continues_from_its_last_checkpoint(end, config, unstopped, copy, one_device):
    """All later lines are there, and perhaps a part of one more."""
    workdir = copy(until=4)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(end)
    before = lines(unstopped, timing=True)
    fit(config(), workdir=workdir)
    assert_same_run(workdir, unstopped)
    after = lines(workdir, timing=True)
    kept = [line for line in before if line["step"] <= 4]
    assert after[: len(kept)] == kept
    assert after[len(kept)]["wall_seconds"] > kept[-2]["wall_seconds"]  # time goes on where it was


def test_a_run_killed_before_its_last_line_writes_it(config, unstopped, copy, one_device):
    workdir = copy()
    whole = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    fit(config(), workdir=workdir)
    assert (workdir / "metrics.jsonl").read_text() == whole


def test_eight_devices_continue_one_devices_run_with_its_losses(config, unstopped, copy):
    assert len(jax.devices()) == 8
    workdir = copy(until=4)
    lm = fit(config(), workdir=workdir)
    assert [list(line) for line in lines(workdir)] == [list(line) for line in lines(unstopped)]
    for one, eight in zip(lines(unstopped), lines(workdir), strict=True):
        np.testing.assert_allclose([*eight.values()], [*one.values()], rtol=1e-5)
    assert lm.generate("the ", max_new_tokens=8, temperature=0.0).startswith("the ")


# -- What waits, and what is told before


def test_evaluation_keeps_few_batches_waiting(config, tmp_path, one_device, monkeypatch):
    """With more than 32, XLA's CPU client with several devices hangs."""
    made, get, waiting, most = programs.make_programs, jax.device_get, 0, 0

    def make_programs(*arguments):
        def eval_step(params, batch):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            return of_run.eval_step(params, batch)

        of_run = made(*arguments)
        return of_run._replace(eval_step=eval_step)

    def is_sums(leaf):
        return isinstance(leaf, train_step.EvalSums)

    def device_get(tree):
        nonlocal waiting
        waiting -= sum(map(is_sums, jax.tree.leaves(tree, is_leaf=is_sums)))
        return get(tree)

    monkeypatch.setattr(train, "make_programs", make_programs)
    monkeypatch.setattr(jax, "device_get", device_get)
    fit(config(**{"model.block_size": 8, "train.num_steps": 1}), workdir=tmp_path)
    assert (waiting, most) == (0, programs.IN_FLIGHT + 1)


def test_an_attention_that_cannot_serve_here_is_told_before_anything_is_made(config, tmp_path, one_device):
    with pytest.raises(InputError, match=r"model\.attention \('cudnn'\): .*; 'auto' takes what can$"):
        fit(config(**{"model.attention": "cudnn"}), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_keeps_few_steps_waiting(config, tmp_path, one_device, monkeypatch):
    ready, waiting, most = jax.block_until_ready, 0, 0

    def not_compiled_ahead(of_run, *_):
        def step(state, batch):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            return of_run.train_step(state, batch)

        return of_run._replace(train_step=step)

    def block_until_ready(tree):
        nonlocal waiting
        waiting -= isinstance(tree, dict) and "grad_norm" in tree
        return ready(tree)

    monkeypatch.setattr(train, "_compile_ahead", not_compiled_ahead)
    monkeypatch.setattr(jax, "block_until_ready", block_until_ready)
    fit(config(**{"train.num_steps": 9, "train.eval_every": 0, "train.save_every": 0}), workdir=tmp_path)
    assert (waiting, most) == (0, programs.IN_FLIGHT + 1)


def test_batches_are_made_ahead_of_their_steps():
    class AtOnce(Executor):
        def submit(self, function):
            future = Future()
            future.set_result(function())
            return future

    made = []
    ahead = [made[-1] - step for step, _ in train._ahead(AtOnce(), made.append, range(6))]
    assert ahead == [min(train.BATCHES_AHEAD, 5 - step) for step in range(6)] and train.BATCHES_AHEAD > 0


# -- Muon, and the average of the parameters


def test_a_run_by_muon_with_an_average_evaluates_keeps_and_returns_the_average(config, tmp_path, one_device):
    values = {"optim.name": "muon", "optim.ema_decay": 0.8, "sample.temperature": 0.0}
    workdir, other = tmp_path / "run", tmp_path / "other"
    lm = fit(config(**values), workdir=workdir)
    saved = jax.device_get(lm.params)
    for step in ("last", "best", 6):
        jax.tree.map(np.testing.assert_array_equal, llm_jax.load(workdir, step=step).params, saved)
    raw = checkpoint_tree(workdir, 6, "params", lm)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(raw), jax.tree.leaves(saved), strict=True))

    # The evaluation of step 6 and of the whole split are the average's, the first on 2 batches.
    shape = dict(block_size=32, batch_size=8)
    corpus = train.prepare(llm_jax.load(workdir).config.data)
    for name, max_batches in (("val_loss", 2), ("val_loss_full", None)):
        nats = count = 0
        for batch in train.data.eval_batches(corpus.val, **shape, max_batches=max_batches):
            logprobs = jax.nn.log_softmax(lm.logits(batch.tokens))
            nats -= float((np.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0] * batch.mask).sum())
            count += batch.mask.sum()
        line = [line for line in lines(workdir) if name in line][-1]
        np.testing.assert_allclose(line[name], nats / count, rtol=1e-5)

    # Continued from step 4 it is the same, bit for bit, and the finished run is returned with its average.
    shutil.copytree(workdir, other)
    shutil.rmtree(other / "checkpoints" / "6")
    fit(config(**values), workdir=other)
    assert_same_run(other, workdir)
    for name in ("params", "ema"):
        a, b = (checkpoint_tree(folder, 6, name, lm) for folder in (workdir, other))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    again = fit(config(**values), workdir=other)
    jax.tree.map(np.testing.assert_array_equal, again.params, saved)

    again.save(tmp_path / "saved")  # a model alone has one tree, whatever the run it comes from kept
    jax.tree.map(np.testing.assert_array_equal, llm_jax.load(tmp_path / "saved").params, saved)


def checkpoint_tree(workdir, step, name, lm):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), lm.params)
    with checkpoint.open_checkpoints(workdir / "checkpoints", create=False) as manager:
        return checkpoint.restore(manager, step, {name: like})[name]


def test_without_an_average_a_checkpoint_holds_parameters_and_optimizer_state_alone(unstopped):
    names = {path.name for path in (unstopped / "checkpoints" / "6").iterdir() if path.is_dir()}
    assert {name for name in names if not name.startswith("_")} - {"metrics"} == {"params", "opt_state"}


def test_an_average_of_bfloat16_parameters_is_loaded_as_it_was_returned(config, tmp_path, one_device):
    lm = fit(config(**{"model.param_dtype": "bfloat16", "optim.ema_decay": 0.8}), workdir=tmp_path / "run")
    loaded = llm_jax.load(tmp_path / "run", step="last")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jax.numpy.bfloat16.dtype}


# -- The same run or another one


def test_a_finished_run_is_returned_untouched_with_every_key_that_may_differ(
    config, copy, tiny_text, tmp_path, one_device, monkeypatch
):
    workdir = copy()
    shutil.copy(tiny_text, tmp_path / "moved.txt")
    changes = {
        "train.eval_every": 5,
        "train.save_every": 5,
        "train.log_every": 5,
        "train.sample_every": 5,
        "train.keep_checkpoints": 1,
        "train.profile_steps": 1,
        "train.accumulation_steps": 2,
        "model.attention": "plain",
        "model.layer_execution": "scan",
        "model.remat": "block",
        "data.path": str(tmp_path / "moved.txt"),
        "data.tokenizer": str(workdir / "tokenizer.json"),
        "data.cache_dir": str(tmp_path / "other_cache"),
        "train.micro_batch": 4,
        "mesh.data": 1,
        "train.num_steps": 5,
    } | {f"mesh.{axis}": 1 for axis in ("fsdp", "tensor", "context", "expert", "num_slices")}
    assert {*changes, "data.source"} == train.MAY_DIFFER  # with a path it is "text": the next test changes it
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(train.data, "train_batches", lambda *args, **kwargs: [])  # no batch to train on
    lm = fit(config(**changes), workdir=workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, lm.params, llm_jax.load(workdir, step=6).params)


@pytest.mark.parametrize(
    "key, there, here",
    [
        ("model.n_head", "4", "2"),
        ("optim.peak_lr", "0.003", "0.1"),
        ("optim.name", "'adamw'", "'muon'"),
        ("optim.ema_decay", "0.0", "0.5"),
        ("train.batch_size", "8", "4"),
        ("train.seed", "0", "3"),
        ("train.eval_batches", "2", "1"),
        ("data.val_fraction", "0.1", "0.2"),
        ("data.tokenizer", "'byte'", "'char'"),  # by its content: the same under another name is no difference
    ],
)
def test_another_config_is_an_error_with_both_values(key, there, here, config, unstopped, one_device):
    before = (unstopped / "config.json").read_bytes()
    message = error_of(fit, config(**{key: json.loads(here.replace("'", '"'))}), workdir=unstopped)
    assert f"{key} {there} there and {here} here" in message and str(unstopped) in message
    assert (unstopped / "config.json").read_bytes() == before


def test_micro_batches_of_a_run_with_dropout_stay(config, tmp_path, one_device):
    """Each has a mask of its own: other micro-batches, other numbers."""
    given = {"model.dropout": 0.1, "train.num_steps": 1}
    fit(config(**given), workdir=tmp_path)
    message = error_of(fit, config(**given, **{"train.accumulation_steps": 2}), workdir=tmp_path)
    assert "train.accumulation_steps 1 there and 2 here" in message


def test_the_same_path_with_another_tokenizer_is_an_error(config, tmp_path, one_device):
    path, workdir = tmp_path / "t" / "tokenizer.json", tmp_path / "run"
    train_bpe(["the cat " * 50], 260).save(path.parent)
    given = {"data.tokenizer": str(path), "train.num_steps": 1, "model.vocab_size": 300}
    fit(config(**given), workdir=workdir)
    kept = (workdir / "tokenizer.json").read_bytes()
    train_bpe(["a dog " * 50], 260).save(path.parent)
    assert "another tokenizer" in error_of(fit, config(**given), workdir=workdir)
    assert (workdir / "tokenizer.json").read_bytes() == kept


def test_a_loss_that_is_no_number_ends_the_run_and_costs_no_checkpoint(config, tmp_path, one_device):
    huge = {"optim.peak_lr": 1e30, "optim.grad_clip": 0.0, "train.num_steps": 20}
    message = error_of(fit, config(**huge), workdir=tmp_path / "run")
    assert "diverged" in message and "optim.peak_lr" in message
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(steps_saved(tmp_path / "run")) <= 1  # of the first two steps, which were finite


def test_evaluation_takes_no_more_memory_than_a_micro_batch(config, tmp_path, one_device, monkeypatch):
    """With accumulation; its lines are those of whole batches."""
    shapes, make = set(), train.make_programs

    def noting(*args):
        made = make(*args)
        return made._replace(
            eval_step=lambda params, batch: shapes.add(batch.tokens.shape) or made.eval_step(params, batch)
        )

    monkeypatch.setattr(train, "make_programs", noting)
    fit(config(**{"train.accumulation_steps": 4}), workdir=tmp_path / "parts")
    assert shapes == {(2, 32)}
    fit(config(), workdir=tmp_path / "whole")
    for parts, whole in zip(lines(tmp_path / "parts"), lines(tmp_path / "whole"), strict=True):
        np.testing.assert_allclose([*parts.values()], [*whole.values()], rtol=1e-5)


def test_a_saved_model_is_not_continued(config, unstopped, tmp_path, one_device):
    llm_jax.load(unstopped).save(tmp_path / "model")
    message = error_of(fit, config(), workdir=tmp_path / "model")
    assert "no opt_state" in message and "remove" not in message


def test_the_same_path_with_another_text_is_an_error(tiny_text, cache, unstopped, tmp_path, one_device):
    changed = tmp_path / tiny_text.name
    changed.write_bytes(tiny_text.read_bytes() + b"the end.\n")
    message = error_of(fit, tiny_config(changed, cache), workdir=unstopped)
    assert "data.content_hash" in message


def test_the_same_text_from_another_source_continues(config, unstopped, copy, one_device):
    """As who has lost the network gives a copy of what was downloaded."""
    workdir = copy()
    saved = json.loads((workdir / "config.json").read_text())
    saved["data"] |= {"source": "tinyshakespeare", "path": None}
    (workdir / "config.json").write_text(json.dumps(saved))
    fit(config(), workdir=workdir)
    assert lines(workdir) == lines(unstopped)


def test_another_config_is_refused_before_the_corpus_is_read(config, unstopped, one_device, monkeypatch):
    monkeypatch.setattr(train, "prepare", lambda cfg: pytest.fail("read"))
    message = error_of(fit, config(**{"data.vocab_size": 300, "optim.peak_lr": 0.5}), workdir=unstopped)
    assert "data.vocab_size" in message and "optim.peak_lr" in message


def test_a_run_that_another_process_made_meanwhile_is_not_continued_as_one_s_own(
    config, tmp_path, one_device, monkeypatch
):
    prepare = train.prepare

    def other_meanwhile(cfg, tokenizer):
        monkeypatch.setattr(train, "prepare", prepare)
        fit(config(**{"train.num_steps": 2}), workdir=tmp_path / "run")
        return prepare(cfg, tokenizer)

    monkeypatch.setattr(train, "prepare", other_meanwhile)
    message = error_of(fit, config(**{"train.num_steps": 2, "optim.peak_lr": 0.5}), workdir=tmp_path / "run")
    assert "another config" in message and "optim.peak_lr" in message
    assert json.loads((tmp_path / "run/config.json").read_text())["optim"]["peak_lr"] != 0.5


def test_a_folder_is_trained_in_by_one_process_at_a_time(config, copy, one_device):
    workdir = copy()
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(workdir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    message = error_of(fit, config(**{"train.num_steps": 8}), workdir=workdir)
    assert "another process trains" in message and str(workdir) in message
    assert before == {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    other.communicate("\n")
    fit(config(**{"train.num_steps": 8}), workdir=workdir)


def test_a_reader_of_the_samples_that_leaves_does_not_end_the_run(config, tmp_path, one_device, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, open(writing, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        fit(config(**{"train.sample_every": 1, "train.num_steps": 3}), workdir=tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    assert capfd.readouterr().err.count("nobody reads standard output") == 1


def test_a_folder_in_the_home_folder(config, tmp_path, one_device, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lm = fit(config(**{"train.num_steps": 1}), workdir="~/runs/x")
    assert (tmp_path / "runs/x/config.json").exists()
    lm.save("~/copy")
    assert llm_jax.load("~/copy").config == llm_jax.load(tmp_path / "runs/x").config


def test_more_steps_continue_a_finished_run(config, unstopped, copy, one_device):
    workdir = copy()
    fit(config(**{"train.num_steps": 8, "train.profile_steps": 0}), workdir=workdir)
    whole = lines(workdir)
    assert whole[: len(lines(unstopped)) - 1] == lines(unstopped)[:-1]
    assert [line["step"] for line in whole if "loss" in line] == [*range(1, 9)]
    assert [line["step"] for line in whole if "val_loss_full" in line] == [8]
    assert whole[-1]["step"] == 8 and "val_loss_full" in whole[-1]
    assert not (workdir / "profile").exists()


def test_fewer_steps_than_an_unfinished_run_has_made_end_it_where_it_is(config, copy, one_device):
    """Its lines may not say that step 3 came after step 4."""
    workdir = copy(until=4)
    kept = [line for line in (workdir / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 4]
    (workdir / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    fit(config(**{"train.num_steps": 3}), workdir=workdir)
    last = lines(workdir)[-1]
    assert last["step"] == 4 and "val_loss_full" in last


# -- Device memory


def on_device(free_last_model=True):
    """Where each live buffer lies -> its shape; an array and its only shard are one buffer."""
    if free_last_model:
        train._free_last_model()  # else that happens in the next `fit`, which then takes the same places again
    gc.collect()
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return {shard.unsafe_buffer_pointer(): shard.shape for shard in shards}


def parameter_shapes(lm):
    return {leaf.shape for leaf in jax.tree.leaves(lm.params)}


def test_a_second_fit_moves_the_first_model_off_the_device(config, copy, one_device):
    workdir = copy()
    first = fit(config(), workdir=workdir)
    buffers = jax.tree.leaves(first.params)
    text = first.generate("the ", max_new_tokens=8)
    second = fit(config(), workdir=workdir)
    assert all(buffer.is_deleted() for buffer in buffers)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second.params))
    assert first.generate("the ", max_new_tokens=8) == text == second.generate("the ", max_new_tokens=8)


def test_a_fit_leaves_the_parameters_on_the_device_and_nothing_of_the_optimizer(config, copy, one_device):
    before = on_device()
    lm = fit(config(), workdir=copy(until=4))
    left = [
        shape
        for at, shape in on_device(free_last_model=False).items()
        if at not in before and shape in parameter_shapes(lm)
    ]
    assert len(left) == len(jax.tree.leaves(lm.params))


def test_an_error_in_the_loop_leaves_no_state_on_the_device(config, copy, one_device, monkeypatch, tmp_path):
    """The error is kept, as a notebook keeps it, and with it the frames that hold the state."""
    shapes = parameter_shapes(llm_jax.load(copy()))
    before = on_device()

    def fail():
        raise RuntimeError("full disk")

    after_logging(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="full disk") as error:
        fit(config(), workdir=tmp_path / "failing")
    assert error.value.__traceback__ is not None
    assert [shape for at, shape in on_device().items() if at not in before and shape in shapes] == []


# -- Talk, samples, traces, compilation


def test_standard_output_holds_the_samples_alone_and_a_trace_is_written(
    config, tmp_path, one_device, monkeypatch, capsys
):
    make, made = train.make_programs, []
    monkeypatch.setattr(train, "make_programs", lambda *args: made.append(make(*args)) or made[0])
    workdir = tmp_path / "run"
    changes = {"train.sample_every": 4, "train.profile_steps": 2, "train.log_every": 0, "train.eval_every": 0}
    lm = fit(config(**changes, **{"train.save_every": 0}), workdir=workdir)
    out, err = capsys.readouterr()
    last = lm.generate("the ", max_new_tokens=8)
    assert out.endswith(f"\n{last}\n") and out.count("the ") >= 2  # after step 4 and at the end
    assert out.startswith("the ") and len(out) <= 2 * (4 + 8 + 1)
    assert "20,064 parameters" in err and "10,800 training tokens" in err and "whole validation split" in err
    assert list(workdir.glob("profile/**/*.xplane.pb"))
    assert [line["step"] for line in lines(workdir)] == [STEPS] * 3  # an interval of 0: only at the end
    # The training step is compiled ahead: what is called cannot compile again.
    assert [program._cache_size() for program in made[0][:3]] == [1, 0, 1]


def test_nothing_is_compiled_again(config, tmp_path, one_device, monkeypatch):
    """Once a step, an evaluation, a save and a sample are through, the rest of the run compiles nothing."""
    compiled, counts = [], {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: event.endswith("backend_compile_duration") and compiled.append(event)
    )
    try:
        log = train.Report.log

        def logging(self, step, line):
            counts.setdefault(step, len(compiled))
            log(self, step, line)

        monkeypatch.setattr(train.Report, "log", logging)
        every = {f"train.{what}_every": 2 for what in ("eval", "save", "sample", "log")}
        fit(config(**every, **{"train.num_steps": 10}), workdir=tmp_path / "run")
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[2] > 0 and counts[4] == counts[10] == len(compiled)


def test_a_mistake_is_told_before_anything_is_written(config, tmp_path):
    workdir = tmp_path / "run"
    assert "rows (8)" in error_of(fit, config(**{"train.batch_size": 6}), workdir=workdir)
    assert "(255)" in error_of(fit, config(**{"model.vocab_size": 255}), workdir=workdir)
    assert "mesh.data (3)" in error_of(fit, config(**{"mesh.data": 3}), workdir=workdir)
    assert "missing.txt" in error_of(fit, config(**{"data.path": "missing.txt"}), workdir=workdir)
    assert "nothing.py" in error_of(fit, tmp_path / "nothing.py", workdir=workdir)
    assert "100001" in error_of(fit, config(**{"model.block_size": 100_000}), workdir=workdir)
    assert "sample.prompt ('')" in error_of(fit, config(**{"sample.prompt": ""}), workdir=workdir)
    assert "optim.name ('addam')" in error_of(fit, config(**{"optim.name": "addam"}), workdir=workdir)
    assert "unknown config key" in error_of(fit, ConfigDict({"modell": {}}), workdir=workdir)
    assert not workdir.exists()


def test_a_first_signal_is_noted_and_a_second_interrupts(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with stop_signals(sharding.make_mesh(MeshConfig(), jax.devices())) as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by a parent
        assert stop.agreed() == signal.SIGTERM
        monkeypatch.setattr(stopping, "ONE_SIGNAL_SECONDS", -1)
        with pytest.raises(Interrupted, match="last checkpoint") as interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.value.signum == signal.SIGTERM  # the exit code's
    assert signal.getsignal(signal.SIGINT) == before


def test_training_in_a_thread_goes_without_signal_handlers():
    noted = []

    def run():
        with stop_signals(sharding.make_mesh(MeshConfig(), jax.devices())) as stop:
            noted.append(stop.agreed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert noted == [0]
