"""A model in the formats of other tools: written one tensor at a time, and there when all of it is."""

import contextlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config
from llm_jax.errors import InputError
from llm_jax.files import write_whole
from llm_jax.interop import gguf, gguf_model, gguf_tokenizer, hf, hf_config, hf_generation, llama2c
from llm_jax.interop.tensors import Part, Place, join, tensors
from llm_jax.pretrained import Source, param_shapes
from llm_jax.progress import byte_bar
from llm_jax.tokenizers import Tokenizer

HF_DTYPES = ("float32", "bfloat16", "float16")
# dtype -> GGUF's name of it, and llama.cpp's number of a file of it
GGUF_TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "q8_0": ("Q8_0", 7), "bfloat16": ("BF16", 32)}
MAX_SHARD_BYTES = hf.MAX_SHARD_BYTES


def save_hf(
    source: Source, folder: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a Hugging Face folder that transformers opens.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None: config.model.param_dtype.
        max_shard_bytes: of a file of weights, unless one tensor has more.

    Raises:
        InputError: no published family has the model's shape; the folder is there already.
    """
    config, tokenizer = source.config, source.tokenizer
    family, hf_json = hf_config.write_config(config.model)
    groups = list(tensors(family.rows, param_shapes(config.model)))
    offset = config.model.norm_weight_offset - family.fixed.get("norm_weight_offset", 0.0)
    hf_json |= {"dtype": dtype or config.model.param_dtype, "torch_dtype": dtype or config.model.param_dtype}
    dtype = jnp.dtype(dtype or config.model.param_dtype)
    sizes = {tensor.name: math.prod(tensor.shape) * dtype.itemsize for group in groups for tensor in group}
    special = _special_ids(config, tokenizer)
    with _new_folder(folder) as partial, byte_bar(sum(sizes.values()), f"writing {folder.name}") as bar:
        tokenizer.save(partial)
        write_whole(partial / "config.json", json.dumps(hf_json | special, indent=2) + "\n")
        generation = hf_generation.write_generation(vars(config.sample)) | special
        write_whole(partial / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        written = _counted(join(groups, _moved_norms(source.part, offset), dtype), bar)
        hf.write_safetensors(partial, sizes, written, max_shard_bytes=max_shard_bytes)


def save_gguf(source: Source, path: Path, *, dtype: str | None = None) -> None:
    """Writes a GGUF file that llama.cpp runs; vectors in float32.

    Args:
        dtype: of matrices, "float32", "bfloat16", "float16" or "q8_0", in which those whose rows are no multiple of
            its blocks of 32 are float16, as llama.cpp has it; None: config.model.param_dtype.

    Raises:
        InputError: llama.cpp knows no architecture of this shape, or not this kind of tokenizer; the file is there.
    """
    config = source.config
    type_name, file_type = GGUF_TYPES[dtype or config.model.param_dtype]
    arch, metadata, factors = gguf_model.write_model(config.model)
    metadata = {"general.name": path.stem} | metadata | {"general.file_type": file_type}
    metadata |= gguf_tokenizer.gguf_metadata(source.tokenizer, config.model.vocab_size)
    groups = list(tensors(arch.rows, param_shapes(config.model)))
    part = _moved_norms(source.part, config.model.norm_weight_offset)
    listed = [(name, array.shape, "F32") for name, array in factors.items()]
    listed += [(tensor.name, tensor.shape, _type(type_name, tensor.shape)) for group in groups for tensor in group]
    arrays = itertools.chain(factors.items(), join(groups, part, np.dtype(np.float32)))
    _check_new(path)
    with byte_bar(sum(math.prod(shape) * 4 for _, shape, _ in listed), f"writing {path.name}") as bar:
        gguf.write_gguf(path, metadata, listed, (array for _, array in _counted(arrays, bar)))


def _type(wanted: str, shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted


def save_llama2c(source: Source, path: Path) -> None:
    """Writes llama2.c's model.bin, in float32; its tokenizer is not written.

    Raises:
        InputError: the model has what the format can't hold; the file is there already.
    """
    model = source.config.model
    llama2c.check(model)
    groups = list(tensors(llama2c.ROWS, param_shapes(model)))
    total = sum(math.prod(tensor.shape) * 4 for group in groups for tensor in group)
    part = _moved_norms(source.part, model.norm_weight_offset)
    _check_new(path)
    with byte_bar(total, f"writing {path.name}") as bar:
        llama2c.write(path, model, _counted(join(groups, part, np.dtype(np.float32)), bar))


def _moved_norms(part: Part, offset: float) -> Part:
    """With `offset` added to the weights of norms: it is what they are stored without here, and not there."""
    if not offset:
        return part

    def moved(path: str, place: Place) -> np.ndarray:
        array = part(path, place)
        # In float32: near 0 a bfloat16 has digits that it has not near 1.
        return array.astype(np.float32) + np.float32(offset) if path.endswith("norm/weight") else array

    return moved


def _special_ids(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    stop = config.sample.stop_tokens
    stop = tokenizer.eos_id if stop is None else stop[0] if len(stop) == 1 else list(stop)
    # Explicitly none where there is none: its reader has other defaults, some of them beyond the vocabulary.
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop, "pad_token_id": tokenizer.pad_id}


def _check_new(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{str(path)!r} is there already; write to another path")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder under another name, which becomes `folder` when all has gone well and is removed otherwise."""
    _check_new(folder)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        yield partial
        partial.chmod(0o777 & ~_umask())
        partial.replace(folder)
    except OSError as error:  # a full disk, a folder that is not ours
        raise InputError(f"{str(folder)!r} cannot be written ({error.strerror}); write to another path") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """What new folders leave out; mkdtemp leaves out all but the owner's."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _counted(arrays: Iterable[tuple[str, np.ndarray]], bar: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in arrays:
        yield name, array
        bar.update(array.nbytes)
