"""`bench attention`: every implementation of `ops.attention`, forward and backward, beside torch's SDPA."""

import functools
import os
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import cpu, ops, programs, sharding
from llm_jax.bench import torch_peers
from llm_jax.bench.contenders import Contender, Worker, WorkerError, alternate, mebibytes, missing, ratios, table
from llm_jax.config import MeshConfig
from llm_jax.errors import InputError
from llm_jax.progress import say

Shape = tuple[int, int, int, int]  # B, T, N, H
SDPA = "torch SDPA"
BY_CORE = "auto by core"  # a device for each core of a CPU, with rows of its own, as narrow models train (cpu.py)
KERNELS = {"gpu": ("cudnn",), "tpu": ("splash",)}  # elsewhere they can't run, or are only interpreted


def parse_shape(text: str) -> Shape:
    """(16, 256, 8, 16) of "B16T256N8H16"."""
    match = re.fullmatch(r"B(\d+)T(\d+)N(\d+)H(\d+)", text)
    if match is None or 0 in (shape := tuple(map(int, match.groups()))):
        raise InputError(f"--shapes ({text!r}) must be batch, length, heads and head_dim, such as B16T256N8H16")
    return shape


def measure(
    shapes: Sequence[Shape], *, dtype: str, peers: bool, rounds: int, steps: int | None
) -> dict[str, Any]:
    """The JSON object of `bench attention`; tells its progress and a table on standard error."""
    huge_pages, left_out = cpu.huge_pages(os.environ), {}
    ours = Worker(Ours, dtype, 1, environment=huge_pages)
    device, by_core, sdpa = ours.call("device"), None, None
    num_devices = min(cpu.cores(), cpu.MAX_DEVICES)
    if device["platform"] == "cpu" and num_devices > 1 and not cpu.devices_are_set(os.environ):
        by_core = Worker(Ours, dtype, num_devices, environment=huge_pages | {cpu.NUM_DEVICES: str(num_devices)})
    if peers:
        try:
            if absent := missing("torch"):
                raise InputError(absent)
            sdpa = Worker(torch_peers.Attention, device["platform"], cpu.cores(), dtype)
        except (InputError, WorkerError) as error:
            left_out[SDPA] = str(error)
            say(f"{SDPA} is left out: {error}")
    measured = []
    for i, shape in enumerate(shapes):
        name = "B{}T{}N{}H{}".format(*shape)
        facts, contenders = {}, []
        for implementation in ("auto", "plain", "blockwise", *KERNELS.get(device["platform"], ())):
            try:
                facts[implementation] = ours.call("compile", implementation, shape)
            except WorkerError as error:
                left_out[f"{implementation} {name}"] = str(error)
                say(f"{implementation} is left out at {name}: {error}")
            else:
                contenders.append(Contender(implementation, ours, implementation, shape, steps=steps))
        if by_core and shape[0] % num_devices == 0:
            facts[BY_CORE] = by_core.call("compile", "auto", shape)
            contenders.append(Contender(BY_CORE, by_core, "auto", shape, steps=steps))
        if sdpa:
            facts[SDPA] = {}
            contenders.append(Contender(SDPA, sdpa, shape, steps=steps))
        alternate(contenders, rounds, what=f"{name} ({i + 1} of {len(shapes)}) ")
        for contender in contenders:
            facts[contender.name] |= {"seconds": contender.seconds, "calls_per_round": contender.steps}
            if sdpa:
                facts[contender.name]["times_of_sdpa"] = [1 / ratio for ratio in ratios(contender, contenders[-1])]
        measured.append({"shape": dict(zip("BTNH", shape, strict=True)), "contenders": facts})
        for worker in filter(None, (ours, by_core)):
            worker.call("forget")
    say(_table(measured))
    return {
        "bench": "attention",
        "device": device,
        "threads": cpu.cores(),
        "dtype": dtype,
        "shapes": measured,
        "left_out": left_out,
    }


def _table(measured: Sequence[dict[str, Any]]) -> str:
    rows = [("", "B", "T", "N", "H", "ms a call", "x of SDPA", "temporary MiB", "compile s")]
    for each in measured:
        for name, of in each["contenders"].items():
            rows.append(
                (
                    name,
                    *map(str, each["shape"].values()),
                    f"{1000 * statistics.median(of['seconds']):,.2f}",
                    f"{statistics.median(of['times_of_sdpa']):.2f}" if "times_of_sdpa" in of else "-",
                    mebibytes(of.get("temporary_bytes")),
                    f"{of['compile_seconds']:.1f}" if "compile_seconds" in of else "-",
                )
            )
    return table(rows)


class Ours:
    """`ops.attention`, causal, forward and backward, by the first devices, each with rows of its own."""

    def __init__(self, dtype: str, num_devices: int) -> None:
        jax.config.update("jax_enable_compilation_cache", False)  # compile time is a first run's
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves an accelerator's memory to the peer too
        self._device, self._dtype = jax.devices()[0], dtype
        self._mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:num_devices])
        self.forget()

    def device(self) -> dict[str, Any]:
        return {"platform": self._device.platform, "kind": self._device.device_kind, "count": 1}

    def forget(self) -> None:
        """Frees the programs and arrays of the shapes so far."""
        self._programs, self._arrays = {}, {}

    def compile(self, implementation: str, shape: Shape) -> dict[str, Any]:
        """Temporary bytes are XLA's plan, `memory_analysis()`: beside arguments and results, and exact."""
        attention = functools.partial(ops.attention, implementation=implementation, device=self._device)
        rows = sharding.split_batch(self._mesh)
        if self._mesh.size > 1:
            specs = dict(in_specs=(rows.spec,) * 3, out_specs=rows.spec)
            attention = jax.shard_map(attention, mesh=self._mesh, check_vma=False, **specs)

        def forward_backward(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
            out, backward = jax.vjp(attention, q, k, v)
            return out, backward(d_out)

        if shape not in self._arrays:
            rng = np.random.default_rng(0)
            arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), self._dtype) for _ in range(4)]
            self._arrays[shape] = jax.device_put(arrays, rows)
        start = time.perf_counter()
        jitted = jax.jit(forward_backward, compiler_options=programs.step_options(self._mesh))
        program = jitted.lower(*self._arrays[shape]).compile()
        seconds = time.perf_counter() - start
        self._programs[implementation, shape] = program
        jax.block_until_ready(program(*self._arrays[shape]))  # what can't run fails now
        return {"compile_seconds": seconds, "temporary_bytes": program.memory_analysis().temp_size_in_bytes}

    def time(self, implementation: str, shape: Shape, steps: int) -> float:
        program, arrays = self._programs[implementation, shape], self._arrays[shape]
        jax.block_until_ready(program(*arrays))
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(program(*arrays))  # calls that need nothing of each other might overlap
        return time.perf_counter() - start
