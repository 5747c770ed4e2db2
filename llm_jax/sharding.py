"""The device mesh, and where arrays lie on it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.config import MeshConfig
from llm_jax.errors import InputError


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with one axis, "data", over all devices.

    Raises:
        InputError: `mesh.data` is neither -1 nor the number of devices.
    """
    if cfg.data not in (-1, len(devices)):
        raise InputError(f"mesh.data ({cfg.data}) must be the number of devices ({len(devices)}), or -1 for all")
    return Mesh(np.array(devices), ("data",))


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises InputError where a micro-batch cannot be split evenly over the devices."""
    micro_batch, devices = batch_size // accumulation_steps, mesh.shape["data"]
    if micro_batch % devices:
        raise InputError(
            f"train.batch_size / train.accumulation_steps ({batch_size} / {accumulation_steps} = {micro_batch}) "
            f"must be a multiple of the devices ({devices}); change either"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """One axis over the devices of "data", the rest whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"
