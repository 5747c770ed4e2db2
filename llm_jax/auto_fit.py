"""How many rows of a batch a device can take at a time: `train.micro_batch=0`."""

import dataclasses
import math
import os

import jax

from llm_jax import hosts, planning
from llm_jax.config import Config, as_dict
from llm_jax.config_rules import freeze
from llm_jax.errors import InputError
from llm_jax.progress import say
from llm_jax.sharding import row_parts

SPARE = 0.1  # of a device's memory: for what is not the step's, such as batches on their way


def choose_micro_batch(cfg: Config, mesh: jax.sharding.Mesh, *, memory_bytes: float | None = None) -> Config:
    """With train.micro_batch=0 the config with the largest micro-batch that fits, by the compiled step's own account.

    The batch of a step, and so the losses, are the same for each.

    Args:
        memory_bytes: of a device; None: what this one says that it has.

    Raises:
        InputError: not even a row for each device fits.
    """
    if cfg.train.micro_batch != 0:
        return cfg
    memory = (1 - SPARE) * min(hosts.of_all(device_memory(mesh) if memory_bytes is None else memory_bytes))
    parts, batch_size = row_parts(mesh), cfg.train.batch_size
    for micro_batch in (rows for rows in range(batch_size, 0, -1) if batch_size % rows == 0 and rows % parts == 0):
        tried = _with(cfg, micro_batch)
        try:
            peak = planning.peak_bytes(planning.compile_step(tried, mesh)[1])
        except jax.errors.JaxRuntimeError as error:
            if not planning.is_out_of_memory(error):
                raise
            peak = math.inf  # the compiler has found out
        if peak <= memory:
            say(f"train.micro_batch: {micro_batch} rows at a time, {peak / 2**30:.2f} GiB on each device")
            return tried
    raise InputError(
        f"not even a micro-batch of {parts} rows fits on these devices, of which each has {memory / 2**30:.2f} GiB "
        "for it; split the model further (mesh.fsdp), set model.remat=block, or take a smaller model"
    )


def _with(cfg: Config, micro_batch: int) -> Config:
    steps = cfg.train.batch_size // micro_batch
    train = dataclasses.replace(cfg.train, micro_batch=micro_batch, accumulation_steps=steps)
    return freeze(as_dict(dataclasses.replace(cfg, train=train)))


def device_memory(mesh: jax.sharding.Mesh) -> float:
    """Bytes of a device of this process; CPU devices share the machine's."""
    stats = mesh.local_devices[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / mesh.size
