"""How a foreign tensor holds parameters of ours: rows of tables, read for import and for export alike."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.errors import InputError

Shape = tuple[int, ...]
Place = tuple[int, ...]  # which part of a parameter: (), (layer,) or (layer, expert)
Part = Callable[[str, Place], np.ndarray]  # (path, place) -> that part of a parameter
Shapes = Mapping[str, Shape]  # "blocks/attn/q" -> its shape; that of one layer after the leading L
INPUTS = {"attn/o": 2}  # axes that a matrix takes in, the first of its axes; of every other matrix one


class Row(NamedTuple):
    """One kind of foreign tensor.

    ours: the parameters in it, joined along their outputs, as layers.AXES names them.
    foreign: its name, with {layer} and {expert} where there is one for each.
    layout: of LAYOUTS.
    """

    ours: tuple[str, ...]
    foreign: str
    layout: str = "linear"

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters in the tree: those of layers are under blocks."""
        return tuple(f"blocks/{name}" if "{layer}" in self.foreign else name for name in self.ours)


def row(ours: str, foreign: str, layout: str = "linear") -> Row:
    """`ours` in one string: "attn/q attn/k attn/v"."""
    return Row(tuple(ours.split()), foreign, layout)


class Tensor(NamedTuple):
    """One foreign tensor of a model: which parameters it holds, and of which layer and expert."""

    row: Row
    name: str
    layer: int | None
    expert: int | None
    shapes: tuple[Shape, ...]  # of each of row.ours, without layer and expert

    @property
    def place(self) -> Place:
        return tuple(at for at in (self.layer, self.expert) if at is not None)

    @property
    def shape(self) -> Shape:
        return LAYOUTS[self.row.layout].shape(self.row.ours, self.shapes)

    def check(self, shape: Shape) -> None:
        if shape != self.shape:
            raise InputError(f"tensor {self.name} has shape {list(shape)}, its config makes {list(self.shape)}")

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """The parameters in it, as views where they lie as ours do.

        Raises:
            InputError: another shape than these parameters make.
        """
        self.check(array.shape)
        return LAYOUTS[self.row.layout].split(array, self.row.ours, self.shapes)

    def join(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        return LAYOUTS[self.row.layout].join(parameters, self.row.ours).reshape(self.shape)


def tensors(rows: Sequence[Row], shapes: Shapes) -> Iterator[list[Tensor]]:
    """All tensors of a model with these parameters; together those that the same parameters are made of.

    A row of parameters that the model does not have is left out.

    Raises:
        InputError: a parameter that is in no row.
    """
    rows = [each for each in rows if set(each.paths) <= shapes.keys()]
    held = {path for each in rows for path in each.paths}
    if missing := sorted(shapes.keys() - held):
        raise InputError(f"no tensor of this format holds {', '.join(missing)}")
    for each in rows:
        all_shapes = [shapes[path] for path in each.paths]
        layers = range(all_shapes[0][0]) if "{layer}" in each.foreign else [None]
        inner = [shape[1:] if "{layer}" in each.foreign else shape for shape in all_shapes]
        experts = range(inner[0][0]) if "{expert}" in each.foreign else [None]
        inner = [shape[1:] if "{expert}" in each.foreign else shape for shape in inner]
        yield [
            Tensor(each, each.foreign.format(layer=layer, expert=expert), layer, expert, tuple(inner))
            for layer in layers
            for expert in experts
        ]


def check_shapes(groups: Iterable[list[Tensor]], shape: Callable[[str], Shape]) -> None:
    """Before anything is allocated; `shape` is that in the file of a tensor by its name.

    Raises:
        InputError: a tensor of another shape than its config makes.
    """
    for group in groups:
        for tensor in group:
            tensor.check(shape(tensor.name))


def parts(groups: Iterable[list[Tensor]], read: Callable[[str], np.ndarray]) -> Part:
    """The parameters as the tensors that `read` gives by name hold them; one tensor is in memory at a time.

    The function raises InputError for a tensor of another shape than its parameters make.
    """
    held = {
        (path, tensor.place): (tensor, i)
        for group in groups
        for tensor in group
        for i, path in enumerate(tensor.row.paths)
    }

    @functools.lru_cache(1)  # several parameters may be in one
    def split(tensor: Tensor) -> list[np.ndarray]:
        return tensor.split(read(tensor.name))

    def part(path: str, place: Place) -> np.ndarray:
        if (path, place) in held:
            tensor, i = held[path, place]
            return split(tensor)[i]
        if (path, place[:-1]) in held:  # all experts are in one tensor
            return part(path, place[:-1])[place[-1]]
        experts = sum((path, (*place, expert)) in held for expert in range(len(held)))
        return np.stack([part(path, (*place, expert)) for expert in range(experts)])

    return part


def read_slices(path: str, part: Part, dtype: np.dtype, slices: Sequence[tuple[range, ...]]) -> list[np.ndarray]:
    """The slices of a parameter, each by a range of every axis, in the dtype; all layers are in one array."""
    read = [np.empty([len(each) for each in axes], dtype) for axes in slices]
    stacked = path.startswith("blocks/")
    for layer in sorted({layer for axes in slices for layer in axes[0]}) if stacked else [None]:
        whole = part(path, () if layer is None else (layer,))
        for array, axes in zip(read, slices, strict=True):
            inner = axes[1:] if stacked else axes
            if not stacked:
                array[...] = whole[_slices(inner)]
            elif layer in axes[0]:
                array[layer - axes[0].start] = whole[_slices(inner)]
    return read


def _slices(axes: Sequence[range]) -> tuple[slice, ...]:
    return tuple(slice(each.start, each.stop) for each in axes)


def join(groups: Iterable[list[Tensor]], part: Part, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, foreign tensor) of each, in the dtype."""
    for group in groups:
        for tensor in group:
            joined = tensor.join([part(path, tensor.place) for path in tensor.row.paths])
            with np.errstate(over="ignore"):
                written = np.ascontiguousarray(joined, dtype)
            if dtype.itemsize < joined.dtype.itemsize and (np.isinf(written) & np.isfinite(joined)).any():
                raise InputError(f"tensor {tensor.name} has a weight too large for {dtype}; write another dtype")
            yield tensor.name, written


class Layout(NamedTuple):
    """How parameters lie in a foreign tensor: its shape, and the way there and back."""

    shape: Callable[[Sequence[str], Sequence[Shape]], Shape]
    split: Callable[[np.ndarray, Sequence[str], Sequence[Shape]], list[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


def _sides(name: str, shape: Shape) -> tuple[int, int]:
    """(inputs, outputs) of a matrix."""
    inputs = INPUTS.get(name, 1)
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _matrix_shape(names: Sequence[str], shapes: Sequence[Shape]) -> Shape:
    sides = [_sides(name, shape) for name, shape in zip(names, shapes, strict=True)]
    return sides[0][0], sum(outputs for _, outputs in sides)


def _split_matrix(array: np.ndarray, names: Sequence[str], shapes: Sequence[Shape]) -> list[np.ndarray]:
    ends = np.cumsum([_sides(name, shape)[1] for name, shape in zip(names, shapes, strict=True)])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(array, ends, axis=1), shapes, strict=True)]


def _join_matrix(parameters: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    flat = [p.reshape(_sides(name, p.shape)) for p, name in zip(parameters, names, strict=True)]
    return flat[0] if len(flat) == 1 else np.concatenate(flat, axis=1)


def _split_vector(array: np.ndarray, names: Sequence[str], shapes: Sequence[Shape]) -> list[np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(array, ends), shapes, strict=True)]


def _by_head(parameters: Sequence[np.ndarray]) -> np.ndarray:
    """[..., N, H] each -> [..., N, 3, H]."""
    return np.stack(parameters, axis=-2)


def _split_by_head(array: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    *lead, heads, channels = shapes[0]
    by_head = array.reshape(*lead, heads, 3, channels)
    return [by_head[..., i, :] for i in range(3)]


def _halves(x: np.ndarray) -> np.ndarray:
    """Channels (2i, 2i + 1) to (i, i + H/2)."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def _pairs(x: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


LAYOUTS = {
    # torch.nn.Linear: outputs first.
    "linear": Layout(
        lambda names, shapes: _matrix_shape(names, shapes)[::-1],
        lambda array, names, shapes: _split_matrix(array.T, names, shapes),
        lambda parameters, names: _join_matrix(parameters, names).T,
    ),
    # GPT-2's Conv1D: inputs first, as ours.
    "conv1d": Layout(_matrix_shape, _split_matrix, _join_matrix),
    # Rows that are looked up, as ours.
    "table": Layout(
        lambda names, shapes: shapes[0], lambda array, names, shapes: [array], lambda parameters, names: parameters[0]
    ),
    "vector": Layout(
        lambda names, shapes: (sum(map(math.prod, shapes)),),
        _split_vector,
        lambda parameters, names: np.concatenate([p.reshape(-1) for p in parameters]),
    ),
    # Meta's own order of channels, in which rope turns (2i, 2i + 1) where ours turns (i, i + H/2).
    "interleaved": Layout(
        lambda names, shapes: _matrix_shape(names, shapes)[::-1],
        lambda array, names, shapes: [_halves(part) for part in _split_matrix(array.T, names, shapes)],
        lambda parameters, names: _join_matrix([_pairs(p) for p in parameters], names).T,
    ),
    "interleaved_vector": Layout(
        lambda names, shapes: (sum(map(math.prod, shapes)),),
        lambda array, names, shapes: [_halves(part) for part in _split_vector(array, names, shapes)],
        lambda parameters, names: np.concatenate([_pairs(p).reshape(-1) for p in parameters]),
    ),
    # A layer's experts in one, each as "linear".
    "experts": Layout(
        lambda names, shapes: (shapes[0][0], shapes[0][2], shapes[0][1]),
        lambda array, names, shapes: [array.swapaxes(1, 2)],
        lambda parameters, names: parameters[0].swapaxes(1, 2),
    ),
    # GPT-NeoX: a head's queries, keys and values side by side.
    "heads": Layout(
        lambda names, shapes: _matrix_shape(names, shapes)[::-1],
        lambda array, names, shapes: _split_by_head(array.T, shapes),
        lambda parameters, names: _by_head(parameters).reshape(parameters[0].shape[0], -1).T,
    ),
    "heads_vector": Layout(
        lambda names, shapes: (sum(map(math.prod, shapes)),),
        lambda array, names, shapes: _split_by_head(array, shapes),
        lambda parameters, names: _by_head(parameters).reshape(-1),
    ),
}
