"""The device mesh, and where arrays lie on it."""

from collections.abc import Callable, Sequence
from typing import Any

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


def one_device(mesh: Mesh) -> Mesh:
    """The first device of the mesh, for what each device of it does by itself."""
    return Mesh(mesh.devices.flat[:1].reshape(1), mesh.axis_names)


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


def sum_over_rows(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`function`(params, batch, key), called on each device for its own rows; its results are summed, once.

    Left to XLA, a sum over the batch in each turn of a loop is a sum over the devices in each turn. None: no devices
    to sum over.
    """
    if mesh is None or mesh.size == 1:
        return function

    def on_device(*arguments: Any) -> Any:
        return jax.lax.psum(function(*arguments), "data")

    whole = PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, split_batch(mesh).spec, whole),
        out_specs=whole,
        check_vma=False,
    )


def is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"
