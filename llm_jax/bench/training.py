"""`bench train`: the programs that `fit` runs, on random tokens, beside transformers; time to a loss."""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from llm_jax import cpu, model, programs, sharding
from llm_jax.bench import torch_peers
from llm_jax.bench.contenders import (
    Contender,
    HostMemory,
    Worker,
    WorkerError,
    alternate,
    mebibytes,
    random_batches,
    ratios,
    table,
)
from llm_jax.config import Config, as_dict
from llm_jax.config_rules import freeze, split_runs
from llm_jax.data import Batch
from llm_jax.errors import InputError
from llm_jax.progress import say
from llm_jax.report import read_metrics
from llm_jax.tokenizers import BYTE_SYMBOLS, load_tokenizer

PEERS = {"eager": ("transformers eager", False), "compiled": ("transformers compiled", True)}


def measure(
    cfg: Config, *, peers: Sequence[str], rounds: int, steps: int | None, peak_flops: float | None
) -> dict[str, Any]:
    """The JSON object of `bench train` for a config `with_vocabulary`; tells progress and a table on standard error.

    Raises:
        InputError: a config that these devices can't train.
    """
    say(f"llm_jax: compiling, a vocabulary of {cfg.model.vocab_size:,}")
    environment = cpu.huge_pages(os.environ) | cpu.devices(os.environ, cfg)  # as llm_jax.main has them
    ours = Worker(Ours, cfg, environment=environment)
    facts = {"llm_jax": ours.call("facts")}
    device = facts["llm_jax"].pop("device")
    peak_flops = peak_flops or ours.call("measure_peak_flops")
    workers, left_out = {"llm_jax": ours}, {}
    reason = _why_no_peer(cfg, device) if peers else None
    if reason:
        say(f"no peer runs: {reason}")
    for peer in peers:
        name, compiled = PEERS[peer]
        if reason:
            left_out[name] = reason
            continue
        say(f"{name}: {'compiling' if compiled else 'starting'}")
        try:
            worker = Worker(torch_peers.Training, cfg, device["platform"], cpu.cores(), compiled)
            facts[name] = worker.call("facts")
            workers[name] = worker
        except (InputError, WorkerError) as error:
            left_out[name] = str(error)
            say(f"{name} is left out: {error}")
    contenders = [Contender(name, worker, steps=steps) for name, worker in workers.items()]
    alternate(contenders, rounds)

    tokens = cfg.train.batch_size * cfg.seq_len
    flops_per_token = facts["llm_jax"].pop("flops_per_token")
    for contender in contenders:
        of = facts[contender.name]
        per_second = tokens / contender.median
        of |= {
            "compile_seconds": max(0.0, of["first_step_seconds"] - contender.median),
            "step_seconds": contender.seconds,
            "steps_per_round": contender.steps,
            "tokens_per_second": per_second,
            "mfu": per_second * flops_per_token / peak_flops,
            "peak_memory_bytes": workers[contender.name].call("peak_memory"),
            "speedup_of_llm_jax": ratios(contenders[0], contender),
        }
        workers[contender.name].close()
    say(_table(facts))
    return {
        "bench": "train",
        "device": device,
        "threads": cpu.cores(),
        "tokens_per_step": tokens,
        "flops_per_token": flops_per_token,
        "peak_flops": peak_flops,
        "contenders": facts,
        "left_out": left_out,
        "config": as_dict(cfg),
    }


def _table(facts: dict[str, dict[str, Any]]) -> str:
    rows = [("", "tokens/s", "ms a step", "MFU", "peak MiB", "compile s", "parameters", "llm_jax is")]
    for name, of in facts.items():
        rows.append(
            (
                name,
                f"{of['tokens_per_second']:,.0f}",
                f"{1000 * statistics.median(of['step_seconds']):,.1f}",
                f"{of['mfu']:.1%}",
                mebibytes(of["peak_memory_bytes"]),
                f"{of['compile_seconds']:.1f}",
                f"{of['parameters']:,}",
                "" if name == "llm_jax" else f"{statistics.median(of['speedup_of_llm_jax']):.2f} x as fast",
            )
        )
    return table(rows)


def with_vocabulary(config: ConfigDict) -> Config:
    """Frozen, with the model.vocab_size that is known without the corpus.

    Raises:
        InputError: a config that can't be, one of several runs, or a vocabulary that only its corpus would tell.
    """
    if config.data.path is None:
        config.data.source = "python_stdlib"  # nothing is read, so a source that needs a path needs none here
    cfg = freeze(config)
    if len(split_runs(cfg)) > 1:
        raise InputError("one run is measured; leave train.seeds and optim.peak_lrs out")
    vocab_size = cfg.model.vocab_size
    if vocab_size is None and cfg.data.tokenizer == "char":
        raise InputError(
            "no corpus is read, so how many characters it has is unknown; set it, for example "
            "--config.model.vocab_size=65 (tinyshakespeare's)"
        )
    if vocab_size is None:
        ready = {"byte": BYTE_SYMBOLS, "bpe": cfg.data.vocab_size}
        vocab_size = ready.get(cfg.data.tokenizer) or load_tokenizer(Path(cfg.data.tokenizer)).vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def _why_no_peer(cfg: Config, device: dict[str, Any]) -> str | None:
    if reason := torch_peers.obstacle(cfg.model):
        return reason
    if device["count"] > 1 and device["platform"] != "cpu":
        return f"it runs on one device, and the mesh has {device['count']}"
    return None


def seconds_to_loss(config_file: str, changes: Sequence[str], target: float) -> dict[str, Any]:
    """Wall time of `python -m llm_jax.main` until an evaluation over the whole validation split is at most `target`.

    From the start of the process, with compiling (no cache of it), evaluating and saving as the config says;
    tokens that are cached stay so. `seconds` is None where the run ends above the target.
    """
    flags = [f"--config={config_file}", *(f"--config.{change}" for change in changes)]
    flags.append(f"--config.train.eval_batches={10**9}")  # more than there are: the whole split, at every evaluation
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_jax.main", *flags, f"--workdir={folder}"],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        )
        try:
            evaluations, ended = [], None
            while ended is None and not any(line["val_loss"] <= target for line in evaluations):
                time.sleep(0.05)
                ended = process.poll()  # before reading, so that nothing that it wrote is missed
                evaluations = [line for line in read_metrics(folder) if "val_loss" in line]
            seconds = time.monotonic() - start
        finally:
            process.kill()
            process.wait()
    if ended:
        raise InputError(f"training for --target_loss ended with exit code {ended}")
    best = min(evaluations, key=lambda line: line["val_loss"])
    reached = best["val_loss"] <= target
    return {
        "target_loss": target,
        "seconds": seconds if reached else None,
        "step": best["step"],
        "val_loss": best["val_loss"],
    }


class Ours:
    """Our side: the init and the training step that `fit` compiles for this config, on this machine's devices."""

    def __init__(self, cfg: Config) -> None:
        jax.config.update("jax_enable_compilation_cache", False)  # compile time is a first run's
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves an accelerator's memory to the peer too
        self._device = jax.devices()[0]
        self._memory = HostMemory()
        mesh = sharding.make_mesh(cfg.mesh, jax.devices())
        programs.check_trainable(cfg, mesh)
        init, self._train_fn, *_ = programs.make_programs(cfg, mesh, np.ones(cfg.model.vocab_size, np.int32))
        self._cfg, self._mesh = cfg, mesh
        self._batches = [Batch(*arrays) for arrays in random_batches(cfg)]
        self._state = jax.block_until_ready(init())
        start = time.perf_counter()
        self._loss = self._run(1)
        self._first_step_seconds = time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self._state.params)),
            "optimizer": self._cfg.optim.name,
            "flops_per_token": model.train_flops_per_token(self._cfg.model, self._cfg.seq_len),
            "first_step_seconds": self._first_step_seconds,
            "first_loss": self._loss,
            "device": {
                "platform": self._device.platform,
                "kind": self._device.device_kind,
                "count": self._mesh.size,
            },
        }

    def time(self, steps: int) -> float:
        self._memory.restart()
        self._run(1)
        start = time.perf_counter()
        self._run(steps)
        return time.perf_counter() - start

    def _run(self, steps: int) -> float:
        """As `fit` does: each batch put on the devices when its step is due, and few steps kept waiting."""
        in_flight = deque()
        for i in range(steps):
            batch = jax.device_put(self._batches[i % len(self._batches)], sharding.split_batch(self._mesh))
            self._state, metrics = self._train_fn(self._state, batch)
            in_flight.append(metrics)
            if len(in_flight) > programs.IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def peak_memory(self) -> int | None:
        stats = self._device.memory_stats()  # None on a CPU
        return stats["peak_bytes_in_use"] if stats else self._memory.peak()

    def measure_peak_flops(self) -> float:
        """A large product's floating-point operations per second in the compute dtype, times the devices (a CPU's
        share its cores, which the product takes all)."""
        on_cpu = self._device.platform == "cpu"
        size = 1024 if on_cpu else 8192
        a = jax.random.normal(jax.random.key(0), (size, size), self._cfg.model.compute_dtype)
        product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            jax.block_until_ready(product(a))
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds) * (1 if on_cpu else self._mesh.size)
