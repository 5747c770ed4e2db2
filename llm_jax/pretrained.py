"""A path that holds a model -> config, parameters, tokenizer; and back to a Hugging Face folder."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import model, run_folder
from llm_jax.config import Config, freeze, in_dtype
from llm_jax.errors import InputError
from llm_jax.files import write_whole
from llm_jax.interop import hf, hf_config, llama2c
from llm_jax.interop.tensors import Tensor, fill, join, tensors
from llm_jax.progress import byte_bar
from llm_jax.tokenizers import Tokenizer, load_tokenizer


MAX_SHARD_BYTES = hf.MAX_SHARD_BYTES


class Loaded(NamedTuple):
    config: Config
    params: model.Params
    tokenizer: Tokenizer


def load(
    path: str | Path, *, step: int | str = "best", dtype: str | None = None, tokenizer: Tokenizer | None = None
) -> Loaded:
    """Opens a run's workdir, a Hugging Face folder or llama2.c's model.bin.

    Args:
        step: of a run, "best" (by val_loss) | "last" | a number.
        dtype: of parameters and computation; None: as they are stored.
        tokenizer: in the place of the model's own.

    Raises:
        InputError: there is no model, or one that is not known here.
    """
    path = Path(os.path.expanduser(path))
    loaded = _load(path, step=step, dtype=dtype, tokenizer=tokenizer)
    return loaded if tokenizer is None else loaded._replace(tokenizer=tokenizer)


def _load(path: Path, *, step: int | str, dtype: str | None, tokenizer: Tokenizer | None) -> Loaded:
    if path.is_file():
        return load_llama2c(path, dtype=dtype, tokenizer=tokenizer)
    if (path / "config.json").is_file() and "model_type" in hf.read_json(path / "config.json"):
        return load_hf(path, dtype=dtype)
    cfg, params, tokenizer = run_folder.load_run(path, step=step)
    cfg = in_dtype(cfg, dtype)
    return Loaded(cfg, jax.tree.map(lambda leaf: leaf.astype(cfg.model.param_dtype), params), tokenizer)


def load_hf(folder: Path, *, dtype: str | None = None) -> Loaded:
    """Opens a Hugging Face folder of a family in interop/families.py, each parameter in turn."""
    config = hf.read_json(folder / "config.json")
    try:
        family, cfg = hf_config.read_config(config)
        tokenizer = load_tokenizer(folder)
        cfg = in_dtype(freeze({"model": vars(cfg), "sample": hf.read_generation(folder, config)}), dtype)
        weights = hf.Safetensors(folder)
        shapes = param_shapes(cfg.model)
        groups = list(tensors(family.rows, shapes))
        names = hf.find_tensors(family, groups, weights.names)
        params = _to_device(groups, shapes, lambda name: weights.read(names[name]), cfg.model.param_dtype)
    except (InputError, ValueError) as error:
        raise InputError(f"{folder}: {error}") from None
    return Loaded(cfg, params, tokenizer)


def load_llama2c(path: Path, *, dtype: str | None = None, tokenizer: Tokenizer | None = None) -> Loaded:
    """Opens a model.bin of llama2.c, with the tokenizer or the tokenizer.bin beside it."""
    weights = llama2c.Llama2c(path)
    if tokenizer is None:
        if not path.with_name("tokenizer.bin").is_file():
            raise InputError(f"{path} holds no tokenizer, nor is there a tokenizer.bin beside it; give tokenizer=")
        tokenizer = llama2c.load_tokenizer(path.with_name("tokenizer.bin"))
    cfg = in_dtype(freeze({"model": vars(weights.config)}), dtype)
    shapes = param_shapes(cfg.model)
    params = _to_device(list(tensors(llama2c.ROWS, shapes)), shapes, weights.read, cfg.model.param_dtype)
    return Loaded(cfg, params, tokenizer)


def save_hf(
    folder: str | Path,
    config: Config,
    params: model.Params,
    tokenizer: Tokenizer,
    *,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder that transformers opens; it is there when all of it is.

    Raises:
        InputError: no published family has the model's shape; the folder is there already.
    """
    folder = Path(os.path.expanduser(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} is there already; save to another folder")
    family, hf_json = hf_config.write_config(config.model)
    groups = list(tensors(family.rows, param_shapes(config.model)))
    offset = config.model.norm_weight_offset - family.fixed.get("norm_weight_offset", 0.0)

    def parameter(path: str) -> np.ndarray:
        leaf = params
        for name in path.split("/"):
            leaf = leaf[name]
        array = np.asarray(leaf)
        return array + np.asarray(offset, array.dtype) if offset and path.endswith("norm/weight") else array

    dtype = jnp.dtype(config.model.param_dtype)
    sizes = {tensor.name: math.prod(tensor.shape) * dtype.itemsize for group in groups for tensor in group}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be written ({error.strerror}); choose another folder") from None
    try:
        tokenizer.save(partial)
        write_whole(partial / "config.json", json.dumps(hf_json | _special_ids(config, tokenizer), indent=2) + "\n")
        generation = hf.write_generation(vars(config.sample)) | _special_ids(config, tokenizer)
        write_whole(partial / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        with byte_bar(sum(sizes.values()), f"writing {folder.name}") as bar:
            written = _counted(join(groups, parameter), bar)
            hf.write_safetensors(partial, sizes, written, max_shard_bytes=max_shard_bytes)
        partial.chmod(0o777 & ~_umask())
        partial.replace(folder)
    except OSError as error:  # a full disk
        raise InputError(f"{str(folder)!r} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """What new folders leave out; mkdtemp leaves all but the owner's out."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _special_ids(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    stop = config.sample.stop_tokens
    stop = tokenizer.eos_id if stop is None else stop[0] if len(stop) == 1 else list(stop)
    # Explicitly none where there is none: its reader has other defaults, some of them beyond the vocabulary.
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop, "pad_token_id": None}


def param_shapes(cfg: model.ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by its path: "blocks/attn/q"."""
    leaves = jax.tree_util.tree_leaves_with_path(model.param_shapes(cfg))
    return {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def _to_device(groups: Sequence[list[Tensor]], shapes: Any, read: Any, dtype: str) -> model.Params:
    params: model.Params = {}
    total = sum(math.prod(shape) for shape in shapes.values()) * jnp.dtype(dtype).itemsize
    with byte_bar(total, "reading the model") as bar:
        for path, array in _counted(fill(groups, shapes, read, jnp.dtype(dtype)), bar):
            *parents, name = path.split("/")
            tree = params
            for parent in parents:
                tree = tree.setdefault(parent, {})
            tree[name] = jnp.asarray(array)
    return params


def _counted(arrays: Iterator[tuple[str, np.ndarray]], bar: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in arrays:
        yield name, array
        bar.update(array.nbytes)
