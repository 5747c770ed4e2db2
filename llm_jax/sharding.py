"""The device mesh, and where arrays lie on it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.config import MeshConfig, ModelConfig
from llm_jax.errors import InputError

# Slowest links first: neighbours along the last axis are neighbours in the machine, and send the most.
AXES = ("data", "fsdp", "expert", "context", "tensor")
ROWS = ("data", "fsdp", "expert")  # texts are divided among these, each text's tokens along "context"
# The axis letter of a parameter (ops/__init__.py) -> the mesh axis that it is split over.
SPLIT = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor", "E": "expert"}
WHOLE = ("D", "DE", "CD")  # too small to be worth sending about: norms and biases, routers, learned positions


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of all devices, with the axes AXES; no group of any axis but "data" has devices of several slices.

    Raises:
        InputError: the sizes don't make the number of devices, or "data" can't be divided over the slices.
    """
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if given > len(devices) or len(devices) % given or (not open_axes and given != len(devices)):
        told = " x ".join(f"mesh.{axis} ({size})" for axis, size in sizes.items() if size not in (1, -1))
        rule = "must divide" if open_axes else "must be"
        raise InputError(
            f"{told or 'mesh.data (1)'} {rule} the number of devices ({len(devices)}); -1 for one of them takes what "
            "is left"
        )
    shape = [len(devices) // given if sizes[axis] == -1 else sizes[axis] for axis in AXES]
    slices = _num_slices(cfg, devices)
    if shape[0] % slices:
        raise InputError(
            f"mesh.data ({shape[0]}) must be a multiple of the slices ({slices}), whose network is too slow for what "
            f"the other axes send; set --config.mesh.data={slices} or a multiple of it"
        )
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), AXES)  # a slice: devices that follow each other
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, "slice_index", 0), []).append(device)
    in_slice = [shape[0] // slices, *shape[1:]]
    return Mesh(np.concatenate([_placed(in_slice, by_slice[index]) for index in sorted(by_slice)]), AXES)


def _placed(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """TPUs so that neighbours along an axis, above all the last, are linked."""
    sides = [len(set(places)) for places in zip(*(device.coords for device in devices), strict=True)]
    if shape[AXES.index("fsdp")] == len(devices) > 2 * max(sides):
        # By rows of the torus, for `lines`. Of 16 and of 2x2x2 JAX would make a ring, and so it does of two rows.
        return np.array(sorted(devices, key=lambda device: tuple(device.coords))).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _num_slices(cfg: MeshConfig, devices: Sequence[jax.Device]) -> int:
    """Of TPUs as they say themselves; others are divided as the config says."""
    if devices[0].platform != "tpu":
        return cfg.num_slices or 1
    there = len({getattr(device, "slice_index", 0) for device in devices})
    if cfg.num_slices not in (None, there):
        raise InputError(
            f"mesh.num_slices ({cfg.num_slices}) must be that of the TPUs ({there}); left out, it is found"
        )
    return there


def splits_model(mesh: Mesh | None) -> bool:
    """Whether a device has but a part of the model, or of a text."""
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in AXES if axis != "data")


def lines(mesh: Mesh) -> tuple[int, int]:
    """(M, m): along "fsdp" come M lines of m TPUs, all along one axis of their torus, side by side in the others.

    (1, n): they do not, or are no TPUs.
    """
    devices = mesh.devices[0, :, 0, 0, 0]
    if devices[0].platform != "tpu":
        return 1, len(devices)
    places = np.array([device.coords for device in devices])
    for length in range(len(devices) - 1, 1, -1):
        if len(devices) % length == 0:
            grid = places.reshape(-1, length, 3)
            along = np.any(grid != grid[:, :1], axis=(0, 1))  # changes in a line
            across = np.any(grid != grid[:1], axis=(0, 1))  # changes from one line to the next
            if along.sum() == 1 and not np.any(along & across):
                return len(grid), length
    return 1, len(devices)


def torus_axes(mesh: Mesh) -> int:
    """How many axes of a torus of TPUs "fsdp" goes along; of two devices an axis is but a link."""
    devices = mesh.devices[0, :, 0, 0, 0]
    if devices[0].platform != "tpu":
        return 0
    return sum(len(set(places)) > 2 for places in zip(*(device.coords for device in devices), strict=True))


def one_device(mesh: Mesh) -> Mesh:
    """The first device of the mesh, for what each device of it does by itself."""
    return Mesh(mesh.devices.flat[:1].reshape([1] * mesh.devices.ndim), mesh.axis_names)


def row_parts(mesh: Mesh) -> int:
    """How many devices have rows of their own."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raises InputError where a micro-batch cannot be split evenly over the devices."""
    micro_batch, devices = batch_size // accumulation_steps, row_parts(mesh)
    if micro_batch % devices:
        raise InputError(
            f"train.batch_size / train.accumulation_steps ({batch_size} / {accumulation_steps} = {micro_batch}) "
            f"must be a multiple of the devices that share its rows ({devices}); change either"
        )


def check_model(cfg: ModelConfig, seq_len: int, mesh: Mesh) -> None:
    """Raises InputError where a part of the model, or of a text, cannot be split evenly over the mesh.

    What is not known yet (a vocabulary that the tokenizer decides) is not checked.
    """
    rules = [
        ("model.n_embd", cfg.n_embd, "fsdp"),
        ("model.n_head", cfg.n_head, "tensor"),
        ("model.n_kv_head", cfg.n_kv_head, "tensor"),
        ("model.mlp_dim", cfg.mlp_dim, "tensor"),
        ("model.vocab_size", cfg.vocab_size, "tensor"),
        ("model.n_expert", cfg.n_expert, "expert"),
        ("train.seq_len (or model.block_size)", seq_len, "context"),
    ]
    for name, size, axis in rules:
        if size is not None and size % (parts := mesh.shape[axis]):
            remedy = f"change either; {-size % parts + size} would do" if axis != "expert" else "change either"
            raise InputError(f"{name} ({size}) must be a multiple of mesh.{axis} ({parts}); {remedy}")
    if cfg.n_expert is None and mesh.shape["expert"] > 1:
        raise InputError(f"mesh.expert ({mesh.shape['expert']}) needs a model with experts (model.n_expert)")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Rows over the devices that share them, along `axis`; of what lies behind it, tokens, over "context"."""
    tokens = ["context"] if mesh.shape["context"] > 1 else []
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS, *tokens))


def param_spec(letters: str) -> PartitionSpec:
    """Where the parts of a parameter lie, by its axis letters; a leading L is the stack of layers."""
    if letters.removeprefix("L") in WHOLE:
        return PartitionSpec()
    return PartitionSpec(*map(SPLIT.get, letters))


def state_shardings(state: Any, axes: Any, mesh: Mesh) -> Any:
    """Where a training state lies: parameters by their letters, and with them what an optimizer keeps of each.

    Args:
        state: arrays or their shapes; a part belongs to a parameter if its path ends in the parameter's.
        axes: the letters of the parameters, in their tree.
    """
    letters_of = {_names(path): letters for path, letters in jax.tree_util.tree_leaves_with_path(axes)}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            letters = letters_of.get(names[start:])
            if letters is not None and len(letters) == leaf.ndim:
                return NamedSharding(mesh, param_spec(letters))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def constrain_params(params: Any, *, axes: Any, mesh: Mesh) -> Any:
    """Gradients or parameters where the parameters lie."""
    return jax.tree.map(
        lambda leaf, letters: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, param_spec(letters))),
        params,
        axes,
    )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def sum_over_rows(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`function`(params, batch, key), called on each device for its own rows; its results are summed, once.

    Left to XLA, a sum over the batch in each turn of a loop is a sum over the devices in each turn. None: no devices
    to sum over.
    """
    if mesh is None or mesh.size == 1:
        return function

    def on_device(*arguments: Any) -> Any:
        return jax.lax.psum(function(*arguments), ROWS)

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
