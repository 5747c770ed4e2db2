"""A path that holds a model -> config, tokenizer and parameters."""

import functools
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import model, run_folder
from llm_jax.config import Config
from llm_jax.config_rules import freeze, in_dtype
from llm_jax.errors import InputError
from llm_jax.files import read_json
from llm_jax.interop import gguf, gguf_model, gguf_rope, gguf_tokenizer, hf, hf_config, hf_generation, llama2c
from llm_jax.interop.tensors import Part, Place, check_shapes, parts, read_slices, tensors
from llm_jax.progress import byte_bar, say
from llm_jax.tokenizers import Tokenizer, load_tokenizer


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


class Source(NamedTuple):
    """A model on disk, or anywhere. `part` reads a part of one parameter when it is asked for."""

    name: str
    config: Config
    tokenizer: Tokenizer
    part: Part
    restore: run_folder.Restore | None = None  # all of them, from a run's checkpoint


def open_model(path: str | Path, *, step: int | str = "best", tokenizer: Tokenizer | None = None) -> Source:
    """A run's workdir, a Hugging Face folder, a GGUF file or llama2.c's model.bin; or a name of the Hugging Face hub.

    Args:
        step: of a run, "best" (by val_loss) | "last" | a number.
        tokenizer: in the place of the model's own.

    Raises:
        InputError: there is no model, or one that is not known here.
    """
    given = os.path.expanduser(path)
    path = Path(given)
    if HUB_NAME.fullmatch(given) and not path.parent.exists():  # runs/small of a folder runs is a mistyped path
        path = _download(given)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(len(gguf.MAGIC)) == gguf.MAGIC
        if is_gguf:
            return _open_gguf(path, tokenizer)
        if path.suffix == ".bin":
            return _open_llama2c(path, tokenizer)
        raise InputError(
            f"{str(path)!r} holds no model; give the folder that training wrote, such as runs/small, a Hugging Face "
            "folder, a GGUF file or llama2.c's .bin"
        )
    file = path / "config.json"
    if file.is_file() and "model_type" in read_json(file, remedy="give the folder of a model"):
        return _open_hf(path, tokenizer)
    return _open_run(given, step, tokenizer)


def _download(name: str) -> Path:
    """The folder of a model of the hub, in its library's cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"{name!r} is not there; if it is a name of the Hugging Face hub, install its library: "
            "pip install 'llm_jax[hub]'"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name!r} is no path, and can't be had from the Hugging Face hub ({reason})") from None


def load_params(source: Source, dtype: str | None = None, placed: Any = None) -> tuple[Config, model.Params]:
    """The parameters in the dtype (None: as the config says), and the config with it.

    Args:
        placed: their tree, of the shardings to lie on; None: on the first device. Of a file, what no device of this
            process is to hold is not read, but of quantized tensors.

    Raises:
        InputError: a tensor has another shape than its config makes, or a dtype that is not known here.
    """
    config = in_dtype(source.config, dtype)
    if source.restore is not None:
        return config, jax.tree.map(lambda leaf: leaf.astype(config.model.param_dtype), source.restore(placed))
    shapes = model.param_shapes(config.model)
    if placed is None:
        placed = jax.tree.map(lambda leaf: jnp.zeros(()).sharding, shapes)
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    try:
        with byte_bar(num_bytes, "reading the model") as bar:

            def read(path: Any, leaf: jax.ShapeDtypeStruct, at: jax.sharding.Sharding) -> jax.Array:
                array = _read(_name(path), source.part, leaf, at)
                bar.update(math.prod(leaf.shape) * leaf.dtype.itemsize)
                return array

            return config, jax.tree_util.tree_map_with_path(read, shapes, placed)
    except InputError as error:
        raise InputError(f"{source.name}: {error}") from None


def _read(path: str, part: Part, leaf: jax.ShapeDtypeStruct, at: jax.sharding.Sharding) -> jax.Array:
    """A parameter on the devices: each slice is read once, whatever the number of devices that hold it."""
    of_device = {
        device: tuple(range(*each.indices(size)) for each, size in zip(index, leaf.shape, strict=True))
        for device, index in at.addressable_devices_indices_map(leaf.shape).items()
    }
    slices = list(dict.fromkeys(of_device.values()))
    read = dict(zip(slices, read_slices(path, part, leaf.dtype, slices), strict=True))
    arrays = [jax.device_put(read[axes], device) for device, axes in of_device.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, at, arrays)


def _name(path: Any) -> str:
    return "/".join(entry.key for entry in path)


def param_shapes(cfg: model.ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by its path: "blocks/attn/q"."""
    leaves = jax.tree_util.tree_leaves_with_path(model.param_shapes(cfg))
    return {_name(path): leaf.shape for path, leaf in leaves}


def _open_run(workdir: str, step: int | str, tokenizer: Tokenizer | None) -> Source:
    cfg, own, restore = run_folder.open_run(workdir, step=step)
    whole = functools.cache(lambda: restore(None))
    return Source(workdir, cfg, tokenizer or own, lambda path, place: part_of(whole())(path, place), restore)


def part_of(params: model.Params) -> Part:
    """Parts of parameters in memory."""

    def part(path: str, place: Place) -> np.ndarray:
        leaf = params
        for name in path.split("/"):
            leaf = leaf[name]
        return np.asarray(leaf[place])

    return part


def _open_hf(folder: Path, tokenizer: Tokenizer | None) -> Source:
    config = read_json(folder / "config.json", remedy="give the folder of a model")
    try:
        family, cfg = hf_config.read_config(config)
        sample, unknown = hf_generation.read_generation(folder, config)
        cfg = freeze({"model": vars(cfg), "sample": sample})
        weights = hf.Safetensors(folder)
        groups = list(tensors(family.rows, param_shapes(cfg.model)))
        names = hf.find_tensors(family, groups, weights.names)
        check_shapes(groups, lambda name: weights.shape(names[name]))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    if unknown:
        say(f"{folder}: generation_config.json's {', '.join(unknown)} is not known here, and not in config.sample")
    part = parts(groups, lambda name: weights.read(names[name]))
    return Source(str(folder), cfg, tokenizer or load_tokenizer(folder), part)


def _open_gguf(path: Path, tokenizer: Tokenizer | None) -> Source:
    file = gguf.read_gguf(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    try:
        arch, cfg = gguf_model.read_model(file.metadata, shapes, file.read)
        groups = list(tensors(arch.rows, param_shapes(cfg)))
        wanted = {tensor.name for group in groups for tensor in group}
        if missing := sorted(wanted - shapes.keys()):
            raise InputError(f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are)")
        if unknown := sorted(shapes.keys() - wanted - set(gguf_rope.FACTORS)):
            raise InputError(f"tensor {unknown[0]} is not known of {arch.name}, and may change what it computes")
        check_shapes(groups, shapes.__getitem__)
        tokenizer = tokenizer or gguf_tokenizer.tokenizer_from_gguf(file.metadata)
        config = freeze({"model": vars(cfg), "sample": {"stop_tokens": gguf_tokenizer.stop_tokens(file.metadata)}})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Source(str(path), config, tokenizer, parts(groups, file.read))


def _open_llama2c(path: Path, tokenizer: Tokenizer | None) -> Source:
    weights = llama2c.Llama2c(path)
    if tokenizer is None:
        if not path.with_name("tokenizer.bin").is_file():
            raise InputError(f"{path} holds no tokenizer, nor is there a tokenizer.bin beside it; give tokenizer=")
        tokenizer = llama2c.load_tokenizer(path.with_name("tokenizer.bin"))
    cfg = freeze({"model": vars(weights.config)})
    return Source(str(path), cfg, tokenizer, parts(tensors(llama2c.ROWS, param_shapes(cfg.model)), weights.read))
