"""Measures what runs on this machine; standard output is one JSON line, everything else goes to standard error.

python -m llm_jax.bench train --config=configs/small.py [--config.group.key=value ...] [--target_loss=1.9]
python -m llm_jax.bench attention [--shapes=B16T256N8H16,B4T1024N8H16] [--dtype=bfloat16]
python -m llm_jax.bench decode --config=configs/smollm2_135m.py [--batch_sizes=1,8] [--new_tokens=64]

Each contender is a process of its own. They take turns: a round times --steps steps of each (by default as many as
take about 2.5 seconds) after one untimed, the next round goes backwards. Ours has huge pages, and in train devices,
as llm_jax.main has (cpu.py), the others the environment as it is: set GLIBC_TUNABLES, and all have that alike. The
JSON has the seconds a step of every round; the table shows medians, and the median of the rounds' own ratios.

train: the very step that llm_jax.main runs for this config, on random tokens: no corpus is read, the vocabulary is
model.vocab_size, else the tokenizer's data.vocab_size. Beside it transformers' GPT-2 (LayerNorm), Llama (RMSNorm) or
Qwen3 (qk_norm) with SDPA: same shape, parameters, dtype, threads, batches, clipping and weight decay, fused AdamW,
eager and with torch.compile (default mode). Its loss predicts T - 1 of T tokens; tokens are counted as T for both.
  MFU         tokens/s x flops a token / --peak_flops, where
              flops a token = 6 x weights in products + 12 x N x H x T/2 x layers:
              all matrices and the output projection, not the embeddings' look-up; attention of N heads of size H over
              T tokens counted at half, being causal (a window W < T sees W - W^2/2T of them); nothing for remat.
  peak MiB    on a CPU: the process's highest resident memory during steps, above what it had after its imports
              (Linux); on an accelerator: the allocator's peak.
  compile s   first step less a usual step, with no cache of compiled code.
With --target_loss, the command of llm_jax.main runs first on the config's own data, evaluated over the whole
validation split every train.eval_every steps, until the loss is reached: wall seconds from the start of the process,
with compiling, evaluating and saving.

attention: causal attention forward and backward, each implementation of llm_jax.ops.attention beside torch's
scaled_dot_product_attention; on a CPU also "auto by core", a device for each core, as narrow models train, where the
batch divides among them. Temporary MiB is XLA's own plan of a device's memory beside arguments and results.

decode: --new_tokens after --prompt_tokens of random ids, by random weights in model.compute_dtype: ours greedy, with
top-k and top-p (other values in each row), and greedy by int8 weights; transformers' generate greedy, eager, compiled
with a static cache, and that with its weights frozen into the program, which packs them once; where xllamacpp is
installed and the config is a Llama in float32, llama.cpp, and that with its matrices in 8 bits. Everything is
compiled before it is timed.
  tokens/s      all new tokens of the batch over the whole call, the prompt's time included.
  ms a step     what each token after the first adds to the call.
  of bandwidth  bytes of weights and of tokens in the cache that a step must read, over its time, over the bytes a
                second that a product of a 512 MiB matrix with a vector reads here.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from llm_jax import flags
from llm_jax.config import DTYPES
from llm_jax.config_file import load_file, override
from llm_jax.errors import InputError
from llm_jax.progress import say

COMMANDS = ("train", "attention", "decode")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "xllamacpp")

_CONFIG = absl_flags.DEFINE_string("config", None, "train, decode: config file, such as configs/small.py.")
_CHANGES = absl_flags.DEFINE_multi_string(
    flags.CONFIG_CHANGES,
    [],
    "train, decode: changes a key, such as --config.train.batch_size=16; llm_jax/config.py lists them all.",
)
_PEAK_FLOPS = absl_flags.DEFINE_float(
    "peak_flops",
    None,
    "train: floating-point operations a second of all devices, for MFU. Default: what a large product in the compute "
    "dtype reaches here.",
    lower_bound=1,
)
_TARGET_LOSS = absl_flags.DEFINE_float("target_loss", None, "train: also the wall time to this validation loss.")
_SHAPES = absl_flags.DEFINE_list(
    "shapes",
    ["B16T256N8H16", "B4T1024N8H16", "B1T4096N8H16", "B4T1024N4H64"],
    "attention: batch, length, heads and size of a head.",
)
_DTYPE = absl_flags.DEFINE_enum("dtype", "float32", DTYPES, "attention: of queries, keys and values.")
_BATCH_SIZES = absl_flags.DEFINE_list("batch_sizes", ["1", "8", "64"], "decode: rows at a time.")
_PROMPT_TOKENS = absl_flags.DEFINE_integer("prompt_tokens", 16, "decode: of each row.", lower_bound=1)
_NEW_TOKENS = absl_flags.DEFINE_integer("new_tokens", 128, "decode: of each row.", lower_bound=2)
_PEERS = absl_flags.DEFINE_enum(
    "peers",
    "all",
    ["none", "eager", "compiled", "llama_cpp", "all"],
    "Beside PyTorch's forms, of which attention has one, eager, and decode two compiled ones; in decode llama.cpp.",
)
_ROUNDS = absl_flags.DEFINE_integer("rounds", 5, "How often each is timed.", lower_bound=1)
_STEPS = absl_flags.DEFINE_integer(
    "steps", None, "Steps, or calls of attention, timed at once. Default: about 2.5 seconds' worth.", lower_bound=1
)

# Flags that only one command reads: given to another, they would do nothing.
OWNERS = {
    "config": ("train", "decode"),
    flags.CONFIG_CHANGES: ("train", "decode"),
    "peak_flops": ("train",),
    "target_loss": ("train",),
    "shapes": ("attention",),
    "dtype": ("attention",),
    "batch_sizes": ("decode",),
    "prompt_tokens": ("decode",),
    "new_tokens": ("decode",),
    "steps": ("train", "attention"),
}


def main(command: str) -> None:
    for name, owners in OWNERS.items():
        if absl_flags.FLAGS[name].present and command not in owners:
            known = " and ".join(owners)
            raise InputError(f"--{name} belongs to bench {known}, and does nothing for bench {command}")
    load = _load_average()
    if load is not None and load > 0.25 * os.cpu_count():
        say(f"load average {load:.1f}: others use this machine, and figures taken beside them say little")
    result = {"train": _train, "attention": _attention, "decode": _decode}[command]()
    print(json.dumps(result | {"hardware": _hardware(), "load_average": load, "versions": _versions()}))


def _train() -> dict[str, Any]:
    if not _CONFIG.value:
        raise InputError("no --config given; for example --config=configs/small.py")
    config = load_file(_CONFIG.value)
    override(config, _CHANGES.value)
    with flags.importing():
        from llm_jax.bench import training

    if _PEERS.value == "llama_cpp":
        raise InputError("--peers (llama_cpp) doesn't train; give eager, compiled, all or none")
    peers = {"none": (), "all": ("eager", "compiled")}.get(_PEERS.value, (_PEERS.value,))
    cfg, to_loss = training.with_vocabulary(config), {}
    if _TARGET_LOSS.value is not None:
        to_loss["to_loss"] = training.seconds_to_loss(_CONFIG.value, _CHANGES.value, _TARGET_LOSS.value)
    timing = dict(rounds=_ROUNDS.value, steps=_STEPS.value)
    return training.measure(cfg, peers=peers, peak_flops=_PEAK_FLOPS.value, **timing) | to_loss


def _attention() -> dict[str, Any]:
    if _PEERS.value in ("compiled", "llama_cpp"):
        raise InputError(f"--peers ({_PEERS.value}) has nothing to run in bench attention; give eager, all or none")
    with flags.importing():
        from llm_jax.bench import attention

    shapes = [attention.parse_shape(text) for text in _SHAPES.value or [""]]
    timing = dict(rounds=_ROUNDS.value, steps=_STEPS.value)
    return attention.measure(shapes, dtype=_DTYPE.value, peers=_PEERS.value != "none", **timing)


def _decode() -> dict[str, Any]:
    if not _CONFIG.value:
        raise InputError("no --config given; for example --config=configs/smollm2_135m.py")
    batch_sizes = [int(text) if text.isdecimal() else 0 for text in _BATCH_SIZES.value or [""]]
    if not all(batch_sizes):
        raise InputError(f"--batch_sizes ({','.join(_BATCH_SIZES.value)}) must be numbers from 1 up, such as 1,8")
    config = load_file(_CONFIG.value)
    override(config, _CHANGES.value)
    with flags.importing():
        from llm_jax.bench import decoding, training

    peers = {"none": (), "all": itertools.chain(*decoding.PEERS.values())} | decoding.PEERS
    return decoding.measure(
        training.with_vocabulary(config),
        peers=tuple(peers[_PEERS.value]),
        batch_sizes=batch_sizes,
        prompt_tokens=_PROMPT_TOKENS.value,
        new_tokens=_NEW_TOKENS.value,
        rounds=_ROUNDS.value,
    )


def _hardware() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{os.cpu_count()} cores, {processor[1] if processor else platform.processor()}"


def _load_average() -> float | None:
    """Processes that ran or waited in the last minute, before this command's own."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    flags.run(main, subcommands=COMMANDS)
