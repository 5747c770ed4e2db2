"""Accelerators that a program can be compiled for without having one, and what they can do at most."""

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from llm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, from Google Cloud's pages on each TPU (2025)."""

    flops: float  # of bfloat16 products, a second
    memory_bytes: float  # that a program may have, as libtpu says where one needs more
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that it sends to others, over all of its links


CHIPS = {
    "v4": Chip(275e12 / 2, 15.25 * 2**30, 1228e9 / 2, 300e9 / 2),  # libtpu has each of its two cores as a device
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str
    devices: Sequence[Any]  # what `jax.sharding.Mesh` takes
    chip: Chip | None  # None: a CPU, of which nothing is known


def number_of_cpus(name: str) -> int | None:
    """8 of "cpu:8"; None for others."""
    match = re.fullmatch(r"cpu:([1-9]\d{0,3})", name)
    return int(match[1]) if match else None


def find(name: str) -> Topology:
    """The devices of a topology such as "v5p:4x4x4", "v5e:1x1", "2xv5e:2x4" (two slices) or "cpu:8".

    jax must see no accelerator, and for "cpu:8" as many CPU devices as that (JAX_NUM_CPU_DEVICES).

    Raises:
        InputError: there is no such topology, or libtpu, which knows them, is not installed.
    """
    import jax
    from jax.experimental import topologies

    count = number_of_cpus(name)
    if count is not None:
        devices = jax.devices("cpu")
        if len(devices) < count:
            raise InputError(f"topology {name!r} needs {count} CPU devices, and jax has {len(devices)}")
        return Topology(name, devices[:count], None)
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\w+):(\d+(?:x\d+){1,2})", name)
    slices, kind, shape = found.groups() if found else (None, None, None)
    if kind not in CHIPS:
        raise InputError(
            f"topology ({name!r}) must be one of {', '.join(CHIPS)} with its shape, such as v5p:4x4x4 or v5e:2x4, "
            "several slices as 2xv5e:2x4, or cpu:8"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"topology {name!r} needs TPUs' compiler; in an environment of its own: pip install 'llm_jax[tpu]'"
        )
    # One chip is less than a host has, and must be asked for.
    how = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    if slices and int(slices) > 1:
        how["num_slices"] = int(slices)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **how)
    except Exception as error:  # of many kinds, by version
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"topology ({name!r}) is not known to libtpu ({reason})") from None
    return Topology(name, described.devices, CHIPS[kind])
