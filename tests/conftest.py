"""8 fake CPU devices, annotations of shape and type checked, a tiny config, and no silent skips in CI."""

import contextlib
import gc
import importlib.metadata
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's newer emitters of fused loops compile at half the speed of the older ones; jax 0.12 has only the newer. The
# processes of `clean_env` take no XLA_FLAGS, and compile as a user's; those of commands.py take this.
if importlib.metadata.version("jax").split(".")[:2] in (["0", minor] for minor in ("7", "8", "9", "10")):
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from commands import REPOSITORY, Commands

# By jax.config and not by XLA_FLAGS, so that processes which a test starts see the machine as it is.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
# Every `fit` compiles functions of its own, mostly the same as the last one's: a quarter of the time this way.
_compiled = tempfile.TemporaryDirectory(prefix="llm_jax_compiled_")
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
check_types = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float, as typing says
jaxtyping.install_import_hook("llm_jax", "conftest.check_types")

# What may be missing on a CI machine. Any other skip there is a test that silently stopped testing.
ALLOWED_SKIPS = (
    r"no GPU",
    r"no TPU",
    r"\S+ (is )?not installed",
    r"extra not installed",
    r"LLM_JAX_ASSETS (is )?not set",
    r"LLM_JAX_NANOGPT not set",
)
_other_skips: list[str] = []


def _note_skip(report):
    if report.skipped and isinstance(report.longrepr, tuple):  # an expected failure has another longrepr
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.match(allowed, reason) for allowed in ALLOWED_SKIPS):
            _other_skips.append(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = pytest_collectreport = _note_skip


def pytest_sessionfinish(session):
    if os.environ.get("CI") and _other_skips:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if os.environ.get("CI") and _other_skips:
        terminalreporter.section("CI fails: skips for a reason that tests/conftest.py does not list", red=True)
        for line in _other_skips:
            terminalreporter.write_line(line)


@pytest.fixture(scope="module", autouse=True)
def forget_what_is_compiled():
    """Else a process holds the programs of a thousand tests, some GiB of them."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def unchecked():
    """Annotations, which only tests check, are not in the way of values of the wrong kind."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def only_one_device():
    """`jax.devices()` is the first device alone: as most machines are, and faster than 8 fakes on 2 cores."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda backend=None: first)
        yield


@pytest.fixture
def one_device():
    with only_one_device():
        yield


def error_of(function, *args, **kwargs) -> str:
    """The one line of the mistake that the call is told of."""
    from llm_jax.errors import InputError

    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def gpt2_tokenizer(text, vocab_size):
    """GPT-2's kind, which llama.cpp knows, of few tokens: bytes, merges of the text, an end of text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from llm_jax.tokenizers import Tokenizer

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text] * 9, trainer)
    return Tokenizer(backend, eos_token="<|endoftext|>", split_special_tokens=False)


def random_params(cfg, seed=0):
    """Spread far enough that one token leads by much: rounding could turn a near tie either way."""
    from llm_jax.model import param_shapes

    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(cfg))


def sentences(seed: int, num_bytes: int) -> str:
    """A text with something to learn in it, not all of it ASCII, the same for the same seed."""
    rng = random.Random(seed)
    words = "the a cat dog bird naïve sees hears likes small old → ☕ quick".split()
    text = ""
    while len(text.encode()) < num_bytes:
        text += " ".join(rng.choices(words, k=rng.randint(3, 8))) + ".\n"
    return text


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file of 12 kB."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(sentences(0, 12_000), encoding="utf-8")
    return path


def tiny_config(text: Path, cache: Path, **changes):
    """`text` with configs/tiny.py's shape, one layer, 6 steps; `changes` as {"model.n_layer": 4} or model={...}."""
    from llm_jax.config import default

    config = default()
    config.update(
        {
            "model": dict(n_embd=32, n_head=4, n_layer=1, block_size=32),
            "data": dict(path=str(text), tokenizer="byte", cache_dir=str(cache)),
            "optim": dict(peak_lr=3e-3, warmup_steps=2),
            "train": dict(batch_size=8, num_steps=6, eval_every=3, eval_batches=2, save_every=2, log_every=1),
            "sample": dict(prompt="the ", max_new_tokens=8),
        }
    )
    for name, value in changes.items():
        config.update_from_flattened_dict({name: value}) if "." in name else config.update({name: value})
    return config


@pytest.fixture
def tiny(tiny_text, tmp_path):
    """`tiny(**{"model.n_layer": 4})`: a ConfigDict, its token cache in this test's folder."""
    return lambda **changes: tiny_config(tiny_text, tmp_path / "cache", **changes)


@pytest.fixture(scope="session")
def tiny_run(tiny_text, tmp_path_factory) -> Path:
    """The folder of a finished run of 60 steps, for tests that only read it."""
    from llm_jax.train import fit

    folder = tmp_path_factory.mktemp("tiny_run")
    every = {"train.num_steps": 60, "train.eval_every": 20, "train.save_every": 20, "train.log_every": 20}
    with only_one_device():
        fit(tiny_config(tiny_text, folder / "cache", **every), workdir=folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def clean_env(tmp_path_factory) -> dict[str, str]:
    """The environment for a child process: this checkout's llm_jax, a cache for all of them, and no fake devices."""
    settings = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in settings}
    paths = [str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "LLM_JAX_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def run_python(clean_env, tmp_path):
    """`run_python(*arguments, **environment)`: python in a process of its own, in this test's folder."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean_env | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Real processes of `python -m llm_jax.<name>`: `commands.run("main", *arguments, cwd=folder)`."""
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()
