"""Safetensors in Hugging Face folders, read and written one tensor at a time."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from llm_jax.errors import InputError
from llm_jax.files import read_json, write_whole
from llm_jax.interop.families import Family
from llm_jax.interop.tensors import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # as transformers cuts them
REPAIR = "repair it, or get it again"
READABLE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Constants that older versions of transformers saved with the weights.
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


class Safetensors:
    """The tensors of a folder's safetensors file, or files where there is an index; each is read when it is used."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # by the tensor's name
        self._bytes: dict[str, np.ndarray] = {}
        for name in self._file_names(folder):
            try:
                file = safetensors.safe_open(folder / name, framework="numpy")
                names = list(file.keys())
                self._bytes |= _map(folder / name)
            # The library takes some headers of another form than it writes.
            except (safetensors.SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
                raise InputError(f"{folder / name} can't be opened as safetensors ({_one_line(error)})") from None
            for tensor in names:
                if tensor in self._files:
                    raise InputError(f"{folder}: tensor {tensor} is in two files")
                self._files[tensor] = file

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A view of the file, not to be written to. Raises InputError for one that is no float of 16 or 32 bits."""
        dtype = self._files[name].get_slice(name).get_dtype()
        if dtype not in READABLE:
            raise InputError(f"tensor {name} has dtype {dtype}; known are {', '.join(READABLE)}")
        return self._bytes[name].view(READABLE[dtype]).reshape(self.shape(name))

    @staticmethod
    def _file_names(folder: Path) -> list[str]:
        if not (folder / INDEX).is_file():
            if (folder / SINGLE).is_file():
                return [SINGLE]
            pickled = next(folder.glob("pytorch_model*.bin"), None)
            remedy = f"; {pickled.name} may run code when it is opened, and is not" if pickled else ""
            raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}{remedy}")
        places = read_json(folder / INDEX, remedy=REPAIR).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InputError(f"{folder / INDEX} has no weight_map of file names")
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{folder / INDEX} names {name!r}, which is no safetensors file of the folder")
        return names


def _map(path: Path) -> dict[str, np.ndarray]:
    """The bytes of each tensor in the file, whose header the library has checked: its length, JSON, then tensors."""
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8:start]))
    offsets = {name: info["data_offsets"] for name, info in header.items() if name != "__metadata__"}
    return {name: raw[start + begin : start + end] for name, (begin, end) in offsets.items()}


def find_tensors(family: Family, groups: Sequence[Sequence[Tensor]], names: set[str]) -> dict[str, str]:
    """The name in the file of each tensor of a model. A file of the family's base class leaves out the first part.

    Raises:
        InputError: one is missing, or there is one that is not known.
    """
    wanted = [tensor.name for group in groups for tensor in group]
    prefix = family.rows[0].foreign.split(".")[0] + "."
    is_base = not any(name.startswith(prefix) for name in names)
    found = {name: name.removeprefix(prefix) if is_base else name for name in wanted}
    if missing := [name for name in wanted if found[name] not in names]:
        raise InputError(f"tensor {found[missing[0]]} is missing ({len(missing)} of {len(wanted)} are)")
    # Tied to the embeddings by the config, whatever it holds.
    output = next(row.foreign for row in family.rows if row.ours == ("lm_head/weight",))
    for name in sorted(names - set(found.values()) - {output}):
        if not BUFFERS.search(name):
            raise InputError(f"tensor {name} is not known of {family.model_type}, and may change what it computes")
    return found


def write_safetensors(
    folder: Path, sizes: Mapping[str, int], tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int
) -> None:
    """Writes model.safetensors beside config.json, or with more bytes several files and an index; one is in memory.

    sizes: bytes of each tensor, in the order in which they come.
    """
    shards = list(_shards(sizes, max_shard_bytes))
    file_names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    tensors = iter(tensors)
    for file_name, names in zip(file_names, shards, strict=True):
        held = dict(next(tensors) for _ in names)
        assert list(held) == names
        safetensors.numpy.save_file(held, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod((folder / "config.json").stat().st_mode)  # the library keeps it to its owner
        del held
    if len(shards) > 1:
        places = {name: file for file, names in zip(file_names, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > max_shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
