"""`python -m llm_jax.bench` from outside, with and without PyTorch; its rounds, its workers, its peers."""

import json
import math
import os
import signal

import pytest
from commands import REPOSITORY

from llm_jax import model
from llm_jax.bench import contenders, llama_cpp, torch_peers, training
from llm_jax.config import MLPS
from llm_jax.config_rules import freeze
from llm_jax.cpu import cores
from llm_jax.errors import InputError

TINY = REPOSITORY / "configs" / "tiny.py"
SMALLER = "--config.model.n_embd=16 --config.model.n_layer=1 --config.model.block_size=16".split()
QUICK = ["--rounds=2", "--steps=2"]
SHARED_KEYS = {"bench", "device", "threads", "left_out", "hardware", "load_average", "versions"}
TIMED_KEYS = {
    "parameters", "optimizer", "first_loss", "first_step_seconds", "compile_seconds", "step_seconds",
    "steps_per_round", "tokens_per_second", "mfu", "peak_memory_bytes", "speedup_of_llm_jax",
}  # fmt: skip


@pytest.fixture
def bench(commands, tmp_path):
    """`bench("train", "--rounds=2")`: the JSON object on standard output, the text on standard error."""

    def run(*arguments, **env):
        result = commands.start("bench", *arguments, cwd=tmp_path, env=env).wait(timeout=400)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("\n") == 1  # whatever the libraries in the workers print
        return json.loads(result.stdout), result.stderr

    return run


def torch_or_skip(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"{package} not installed")


# -- The commands


@pytest.mark.slow
def test_train_beside_transformers(bench):
    torch_or_skip("torch", "transformers")
    result, told = bench("train", f"--config={TINY}", *SMALLER, *QUICK, "--peers=eager", "--peak_flops=1e9")
    assert result.keys() == SHARED_KEYS | {
        "tokens_per_step", "flops_per_token", "peak_flops", "contenders", "config"
    }  # fmt: skip
    assert (result["bench"], result["left_out"], result["tokens_per_step"]) == ("train", {}, 8 * 16)
    assert result["device"]["platform"] == "cpu" and result["peak_flops"] == 1e9
    assert {"jax", "torch", "transformers"} <= result["versions"].keys()
    cfg = freeze(result["config"]).model
    assert cfg.vocab_size == 256 and result["flops_per_token"] == model.train_flops_per_token(cfg)
    ours, theirs = result["contenders"]["llm_jax"], result["contenders"]["transformers eager"]
    assert ours["parameters"] == theirs["parameters"] == model.count_params(cfg)[0]
    for of in (ours, theirs):
        assert of.keys() == TIMED_KEYS
        assert len(of["step_seconds"]) == 2 and of["steps_per_round"] == 2
        assert of["first_loss"] == pytest.approx(math.log(256), abs=0.1)  # the same task, not yet learnt
        assert of["tokens_per_second"] == pytest.approx(8 * 16 / (sum(of["step_seconds"]) / 2))
        assert of["mfu"] == pytest.approx(of["tokens_per_second"] * result["flops_per_token"] / 1e9)
        assert of["peak_memory_bytes"] > 0 and of["compile_seconds"] >= (of is ours) * 0.1
    pairs = zip(theirs["step_seconds"], ours["step_seconds"], strict=True)
    assert theirs["speedup_of_llm_jax"] == pytest.approx([their / our for their, our in pairs])
    assert "round 2/2" in told and "0:00 left" in told
    assert "tokens/s" in told and f"{ours['parameters']:,}" in told


@pytest.mark.slow
def test_attention_beside_torch(bench):
    torch_or_skip("torch")
    result, told = bench("attention", "--shapes=B2T64N2H8,B1T128N2H8", *QUICK, "--dtype=bfloat16")
    assert result.keys() == SHARED_KEYS | {"dtype", "shapes"}
    assert (result["dtype"], result["left_out"]) == ("bfloat16", {})
    assert [each["shape"] for each in result["shapes"]] == [dict(B=2, T=64, N=2, H=8), dict(B=1, T=128, N=2, H=8)]
    for each in result["shapes"]:
        assert {"auto", "plain", "blockwise", "torch SDPA"} <= each["contenders"].keys()
        for name, of in each["contenders"].items():
            assert len(of["seconds"]) == 2 and min(of["seconds"]) > 0
            assert (name == "torch SDPA") == (of["times_of_sdpa"] == [1, 1])
            assert (name == "torch SDPA") or of["temporary_bytes"] > 0
    by_core = ["auto by core" in each["contenders"] for each in result["shapes"]]
    assert by_core == [cores() > 1 and each["shape"]["B"] % min(cores(), 8) == 0 for each in result["shapes"]]
    assert "B1T128N2H8 (2 of 2) round 2/2" in told and "x of SDPA" in told


DECODE = [f"--config={TINY}", *SMALLER, "--config.data.tokenizer=byte", "--batch_sizes=1,3", "--rounds=2"]
LENGTHS = ["--prompt_tokens=4", "--new_tokens=12"]


def check_decode(result, told, names):
    assert result.keys() == SHARED_KEYS | {"prompt_tokens", "new_tokens", "batches", "config"}
    assert [each["batch_size"] for each in result["batches"]] == [1, 3]
    for each in result["batches"]:
        assert [*each["contenders"]] == names and len(each["bytes_per_second"]) == 2
        for name, of in each["contenders"].items():
            assert len(of["seconds"]) == len(of["first_token_seconds"]) == 2 and min(of["seconds"]) > 0
            assert of["tokens_per_second"] > 0 and ("share_of_bandwidth" in of) == name.startswith("llm_jax")
        exact, rounded = (each["contenders"][name]["bytes_per_step"] for name in ("llm_jax", "llm_jax int8"))
        cfg = freeze(result["config"]).model
        # All parameters, which are tied, and keys and values of 4 + 12 / 2 tokens.
        cache = each["batch_size"] * 10 * 2 * cfg.n_kv_head * cfg.head_dim * cfg.n_layer * 4
        assert exact == 4 * model.count_params(cfg)[0] + cache and cache < rounded < exact
    assert "of bandwidth" in told and "batch 3 round 2/2" in told


@pytest.mark.slow
def test_decode_alone(bench):
    result, told = bench("decode", *DECODE, *LENGTHS, "--peers=none")
    check_decode(result, told, ["llm_jax", "llm_jax top-k top-p", "llm_jax int8"])
    assert result["left_out"] == {}


@pytest.mark.slow
def test_decode_beside_transformers(bench):
    torch_or_skip("torch", "transformers")
    result, told = bench("decode", *DECODE, *LENGTHS, "--peers=eager")
    check_decode(result, told, ["llm_jax", "llm_jax top-k top-p", "llm_jax int8", "transformers eager"])


@pytest.mark.slow
def test_decode_beside_llama_cpp(bench):
    for package in ("xllamacpp", "gguf"):
        pytest.importorskip(package, reason=f"{package} not installed")
    # Q8_0 has blocks of 32 weights.
    values = "data.tokenizer=bpe data.vocab_size=512 model.n_embd=32 model.mlp_dim=64".split()
    larger = [f"--config.{value}" for value in values]
    result, told = bench("decode", *DECODE, *larger, *LENGTHS, "--peers=llama_cpp")
    names = ["llm_jax", "llm_jax top-k top-p", "llm_jax int8", "llama.cpp", "llama.cpp Q8_0"]
    check_decode(result, told, names)
    assert result["left_out"] == {} and "xllamacpp" in result["versions"]


HIDE_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = ("torch", "transformers")
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in hidden else find(name, *more)
"""


@pytest.mark.parametrize(
    "arguments, files, reason",
    [
        (["train", f"--config={TINY}", *SMALLER], {"sitecustomize.py": HIDE_TORCH}, "pip install -e '.[parity]'"),
        (["attention", "--shapes=B1T64N1H8"], {"sitecustomize.py": HIDE_TORCH}, "pip install -e '.[parity]'"),
        (["attention", "--shapes=B1T64N1H8"], {"torch.py": "raise OSError('broken')"}, "OSError: broken"),
    ],
    ids=["train, hidden", "attention, hidden", "attention, broken"],
)
def test_without_torch(run_python, tmp_path, arguments, files, reason):
    """One line says why no peer runs, and ours is measured."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    environment = dict(PYTHONPATH=paths, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    done = run_python("-m", "llm_jax.bench", *arguments, *QUICK, timeout=400, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(reason) == 1 and "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert result["left_out"] and all(reason in why for why in result["left_out"].values())
    measured = result["contenders"] if arguments[0] == "train" else result["shapes"][0]["contenders"]
    assert measured and not measured.keys() & {"transformers eager", "transformers compiled", "torch SDPA"}


@pytest.mark.slow
def test_an_interrupt_is_no_traceback(commands, tmp_path):
    endless = ["--shapes=B1T64N1H8", "--rounds=1000000", "--steps=1", "--peers=none"]
    process = commands.start("bench", "attention", *endless, cwd=tmp_path)
    result = process.signal_when(signal.SIGINT, lambda: "round 1/" in process.stderr.read_text())
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.endswith("\ninterrupted\n") and "Traceback" not in result.stderr


def test_help_has_the_formula(commands, tmp_path):
    result = commands.run("bench", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "flops a token = 6 x weights in products + 12 x N x H x T/2 x layers" in result.stdout
    for flag in "config dtype peak_flops peers rounds shapes steps target_loss".split():
        assert f"--{flag}:" in result.stdout


# -- Time to a loss


@pytest.mark.slow
def test_time_to_a_loss(tiny_text, bench):
    """And a config that no transformers model can take: ours is measured alone."""
    changes = ["train.num_steps=1000000", "train.eval_every=10", f"data.path={tiny_text}", "model.mlp=relu2"]
    flags = [f"--config.{change}" for change in changes]
    result, told = bench("train", f"--config={TINY}", *SMALLER, *flags, *QUICK, "--target_loss=4.5")
    reached = result["to_loss"]
    assert reached.keys() == {"target_loss", "seconds", "step", "val_loss"}
    assert reached["target_loss"] == 4.5 >= reached["val_loss"] and reached["seconds"] > 1
    assert reached["step"] in range(10, 500, 10)
    assert list(result["contenders"]) == ["llm_jax"] and len(result["left_out"]) == 2
    assert "model.mlp (relu2)" in told or "not installed" in told


@pytest.fixture
def pretended_run(tmp_path, monkeypatch):
    """`pretended_run([2.0, 1.5], code)`: in the place of the training command, one that evaluates so and ends so."""

    def pretend(losses, code):
        lines = [json.dumps({"step": 10 * i, "val_loss": loss}) for i, loss in enumerate(losses, 1)]
        command = tmp_path / "python"
        command.write_text(
            "#!/bin/sh\n"
            'for argument; do case "$argument" in --workdir=*) cd "${argument#*=}";; esac; done\n'
            'echo "$@" > ' + f"{tmp_path}/arguments\n"
            + "".join(f"echo '{line}' >> metrics.jsonl; sleep 0.3\n" for line in lines)
            + f"exit {code}\n"
        )  # fmt: skip
        command.chmod(0o755)
        monkeypatch.setattr(training.sys, "executable", str(command))
        return training.seconds_to_loss("small.py", ["train.seed=1"], 1.6)

    return pretend


def test_time_to_a_loss_ends_with_the_first_evaluation_below(pretended_run, tmp_path):
    reached = pretended_run([2.0, 1.5, 1.4, 1.3], 0)
    assert (reached["step"], reached["val_loss"]) == (20, 1.5) and 0.3 <= reached["seconds"] < 0.9
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("-m llm_jax.main --config=small.py --config.train.seed=1 ")
    assert f"--config.train.eval_batches={10**9}" in arguments  # the whole split


def test_time_to_a_loss_that_is_not_reached(pretended_run):
    missed = pretended_run([2.0, 1.7, 1.8], 0)
    assert missed == {"target_loss": 1.6, "seconds": None, "step": 20, "val_loss": 1.7}
    with pytest.raises(InputError, match="exit code 2"):
        pretended_run([], 2)


# -- Mistakes

TRAIN = ["train", f"--config={TINY}"]
MISTAKES = [
    ([], ["no command", "train, attention"]),
    (["trian"], ["'trian'", "train, attention"]),
    (["train", "attention"], ["'attention'", "--name=value"]),
    (["train"], ["no --config", "--config=configs/small.py"]),
    (["train", "--config=missing.py"], ["missing.py"]),
    (["decode"], ["no --config", "--config=configs/smollm2_135m.py"]),
    (["decode", *TRAIN[1:], "--batch_sizes=1,x"], ["--batch_sizes (1,x)"]),
    (["decode", *TRAIN[1:], "--batch_sizes=0"], ["--batch_sizes (0)"]),
    (["decode", *TRAIN[1:], "--new_tokens=1"], ["new_tokens", "1"]),
    (["decode", *TRAIN[1:], "--new_tokens=5000"], ["--new_tokens (16 + 5000)", "block_size"]),
    (["decode", *TRAIN[1:], "--steps=3"], ["--steps belongs to bench train and attention"]),
    (["train", *TRAIN[1:], "--batch_sizes=1"], ["--batch_sizes belongs to bench decode"]),
    ([*TRAIN, "--config.model.n_embd=7"], ["model.n_embd (7)", "model.n_head"]),
    ([*TRAIN, "--config.model.n_emb=8"], ["model.n_emb", "model.n_embd"]),
    ([*TRAIN, "--config.data.tokenizer=char"], ["characters", "--config.model.vocab_size=65"]),
    ([*TRAIN, "--config.data.tokenizer=missing.json"], ["missing.json"]),
    ([*TRAIN, "--config.data.tokenizer=char", "--target_loss=1"], ["characters"]),  # before anything is trained
    ([*TRAIN, "--config.mesh.data=1000"], ["mesh.data (1000)", "-1"]),  # told by the worker
    ([*TRAIN, "--config.optim.name=addamw"], ["optim.name ('addamw')", "adamw"]),
    ([*TRAIN, "--config.model.attention=cudnn"], ["model.attention ('cudnn')", "auto"]),
    ([*TRAIN, "--rounds=0"], ["rounds", "0"]),
    ([*TRAIN, "--steps=0"], ["steps", "0"]),
    ([*TRAIN, "--peers=nanogpt"], ["peers", "nanogpt", "none|eager|compiled|llama_cpp|all"]),
    ([*TRAIN, "--peak_flops=0"], ["peak_flops", "0"]),
    ([*TRAIN, "--dtype=bfloat16"], ["--dtype", "bench attention", "bench train"]),
    (["attention", f"--config={TINY}"], ["--config", "bench train", "bench attention"]),
    (["attention", "--config.model.n_embd=8"], ["--config.", "bench train"]),
    (["attention", "--peers=compiled"], ["--peers", "compiled", "eager"]),
    (["attention", "--peers=llama_cpp"], ["--peers (llama_cpp)", "eager"]),
    ([*TRAIN, "--peers=llama_cpp"], ["--peers (llama_cpp)", "doesn't train", "eager"]),
    (["attention", "--dtype=float16"], ["dtype", "float16"]),
    (["attention", "--shapes=16x256"], ["'16x256'", "B16T256N8H16"]),
    (["attention", "--shapes=B0T256N8H16"], ["'B0T256N8H16'"]),
    (["attention", "--shapes="], ["''"]),
]


@pytest.mark.parametrize("arguments, told", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line(commands, tmp_path, arguments, told):
    result = commands.run("bench", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, ""), result
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and [part for part in told if part not in line] == []
    assert "Traceback" not in result.stderr and "training tokens" not in result.stderr


# -- Peers


@pytest.mark.parametrize(
    "values",
    [
        dict(use_rmsnorm=False, use_rope=False, use_bias=True, mlp="gelu"),
        dict(use_rmsnorm=False, use_rope=False, use_bias=True, mlp="gelu_tanh", tie_embeddings=False, mlp_dim=40),
        dict(),
        dict(n_kv_head=2, head_dim=12, tie_embeddings=False, use_bias=True, mlp="geglu", mlp_dim=40),
        dict(qk_norm=True, n_kv_head=2),
    ],
    ids=lambda values: ",".join(values) or "default",
)
def test_a_peer_has_our_shape(values):
    torch_or_skip("torch", "transformers")
    cfg = freeze({"model": dict(n_embd=32, n_head=4, n_layer=2, block_size=24, vocab_size=50) | values}).model
    assert torch_peers.inexpressible(cfg) is None
    peer = torch_peers.build(cfg)
    assert sum(p.numel() for p in peer.parameters()) == model.count_params(cfg)[0]
    assert peer.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "values, named",
    [
        (dict(use_rope=False), "model.use_rope (False)"),
        (dict(use_rmsnorm=False), "model.use_rope (True)"),
        (dict(dropout=0.1), "model.dropout (0.1)"),
        (dict(mlp="gelu"), "model.mlp (gelu)"),
        (dict(attn_softcap=10.0), "model.attn_softcap (10.0)"),
        (dict(layer_types=("sliding",), window=8), "model.window (8)"),
        (dict(qk_norm=True, use_bias=True), "model.use_bias (True)"),
        (dict(param_dtype="bfloat16"), "model.compute_dtype (float32)"),
        (dict(use_rmsnorm=False, use_rope=False), "model.use_bias (False)"),
        (dict(use_rmsnorm=False, use_rope=False, use_bias=True, n_kv_head=4), "model.n_kv_head (4)"),
    ],
    ids=lambda value: str(value),
)
def test_what_no_peer_has_is_named(values, named):
    told = torch_peers.inexpressible(freeze({"model": values}).model)
    assert named in told and "\n" not in told


@pytest.mark.parametrize(
    "values, named",
    [
        (dict(use_bias=True), "model.use_bias (True)"),
        (dict(use_rmsnorm=False), "model.use_rmsnorm (False)"),
        (dict(mlp="geglu"), "model.mlp (geglu)"),
        (dict(compute_dtype="bfloat16"), "model.compute_dtype (bfloat16)"),
        (dict(layer_types=("sliding",), window=8), "model.window (8)"),
        (dict(vocab_size=64), "model.vocab_size (64)"),
    ],
    ids=lambda value: str(value),
)
def test_what_llama_cpp_has_not_is_named(values, named, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda *packages, extra: None)
    told = llama_cpp.obstacle(freeze({"model": dict(vocab_size=512) | values}).model)
    assert named in told and "\n" not in told
    assert llama_cpp.obstacle(freeze({"model": dict(vocab_size=512)}).model) is None


def test_every_mlp_has_a_name_in_transformers():
    assert set(torch_peers.ACTIVATIONS) == set(MLPS)


def test_a_peers_micro_batches_give_the_gradient_of_the_batch(tiny):
    torch_or_skip("torch", "transformers")
    grads = []
    for accumulation_steps in (1, 4):
        changes = {"train.accumulation_steps": accumulation_steps, "model.vocab_size": 64, "optim.grad_clip": 0}
        peer = torch_peers.Training(freeze(tiny(**changes)), "cpu", 1, False)
        peer._optimizer.zero_grad = lambda **how: None  # leaves the gradients to look at
        peer._run(1)
        grads.append([p.grad for p in peer._params])
    assert len(grads[0]) > 10
    for whole, accumulated in zip(*grads, strict=True):
        peer._torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-6)


# -- Rounds and workers


class Clock(contenders.Worker):
    """Takes `seconds` a step, and writes down who was asked for how many."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def call(self, method, *arguments):
        assert method == "time"
        self.log.append((self.name, *arguments))
        return self.seconds * arguments[-1]


def test_rounds_alternate():
    log = []
    fast, slow = (contenders.Contender(name, Clock(name, s, log), steps=3) for name, s in (("fast", 1), ("slow", 2)))
    contenders.alternate([fast, slow], 3)
    assert log == [("fast", 3), ("slow", 3), ("slow", 3), ("fast", 3), ("fast", 3), ("slow", 3)]
    assert fast.seconds == [1, 1, 1] and contenders.ratios(fast, slow) == [2, 2, 2]


def test_a_round_is_as_long_as_it_should_be():
    for seconds, steps in ((0.001, 2500), (1.0, 2), (60.0, 1)):
        assert contenders.Contender("any", Clock("any", seconds, []), "which").steps == steps


class Subject:
    def __init__(self, start):
        print("made")
        self.value = start

    def add(self, number):
        print("added")
        self.value += number
        return self.value

    def fail(self, message):
        raise {"mistake": InputError, "bug": KeyError}[message](message)

    def die(self):
        os._exit(3)


def test_a_worker_keeps_its_state_and_is_silent_on_standard_output(capfd):
    worker = contenders.Worker(Subject, 5)
    assert [worker.call("add", 1), worker.call("add", 2)] == [6, 8]
    with pytest.raises(InputError, match="mistake"):
        worker.call("fail", "mistake")
    with pytest.raises(contenders.WorkerError, match="KeyError: 'bug'") as caught:
        worker.call("fail", "bug")
    assert "test_bench.py" in caught.value.__notes__[0]  # where it happened
    assert worker.call("add", 0) == 8  # it goes on after either
    with pytest.raises(contenders.WorkerError, match="exit code 3"):
        worker.call("die")
    out, err = capfd.readouterr()
    assert out == "" and "made\nadded\n" in err  # libraries may warn before


def test_a_worker_has_its_own_environment(monkeypatch):
    monkeypatch.setenv("BOTH", "parent's")
    before = dict(os.environ)
    worker = contenders.Worker(os.getenv, "WORKER", environment={"WORKER": "its own"})
    assert [worker.call("__str__"), dict(os.environ) == before] == ["its own", True]
    worker.close()
    worker = contenders.Worker(os.getenv, "BOTH", environment={"BOTH": "its own"})
    assert [worker.call("__str__"), dict(os.environ) == before] == ["its own", True]
    worker.close()


def test_a_worker_ends():
    worker = contenders.Worker(list, "ab")
    assert worker.call("pop") == "b"
    worker.close()
    assert not worker._process.is_alive()
    with pytest.raises(contenders.WorkerError, match="TypeError: 'int' object is not iterable"):
        contenders.Worker(list, 1)


def test_memory_is_the_highest_since_the_restart(run_python):
    """In a process of its own: from a large one the kernel takes pages away meanwhile."""
    code = """
import numpy as np
from llm_jax.bench.contenders import HostMemory
memory = HostMemory()
if memory.peak() is not None:
    memory.restart()
    before = memory.peak()
    np.ones(400 << 20, np.uint8)
    after = memory.peak()
    memory.restart()
    print(after - before, memory.peak() - before)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("/proc not installed: nothing tells a process's memory")
    during, afterwards = map(int, done.stdout.split())
    assert 390 << 20 < during < 450 << 20 and afterwards < 50 << 20
