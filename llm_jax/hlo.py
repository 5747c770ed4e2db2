"""The text of a compiled program (`compiled.as_text()`) as instructions, and how often its loops turn.

Read are the texts that XLA writes for CPUs and TPUs; nothing of JAX is needed for it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

# How many turns of a loop are followed to see where it ends; none of ours has more.
MAX_TURNS = 10_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the program: what it holds, and how it lies in memory."""

    dtype: str  # f32, bf16, s8, pred, ...
    dims: tuple[int, ...]
    memory_space: int = 0  # of a TPU 0 is HBM and 1 VMEM
    padded_dims: tuple[int, ...] = ()  # filled up to whole tiles, from the slowest axis to the fastest

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes of an element; 0 of a token."""
        bits = re.search(r"\d+", self.dtype)  # s4, bf16, f8e4m3fn, c64
        return int(bits[0]) / 8 if bits else float(self.dtype == "pred")

    @property
    def bytes(self) -> float:
        return self.size * self.itemsize

    @property
    def padded_size(self) -> int:
        """Elements with those that fill the last tiles."""
        return math.prod(self.padded_dims)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation. Two of them are equal where they are the same."""

    name: str
    opcode: str  # of an asynchronous pair with -start and -done
    shapes: tuple[Shape, ...]  # of the result; of a tuple all arrays in it, also those of tuples in the tuple
    operands: tuple["Instruction", ...] = dataclasses.field(repr=False)
    arguments: str  # what stands in the parentheses: of a constant its value, of a parameter its number
    attributes: str = dataclasses.field(repr=False)  # what stands after the parentheses
    op_name: str = ""  # from JAX: jit(step)/jvp(Model)/while/body/attn/dot_general

    def attribute(self, name: str) -> str | None:
        """The value of `name=...` up to its end: `{1,2}` without braces, others as one word."""
        found = re.search(rf"(?:^|[ ,]){name}=(?:\{{([^{{}}]*)\}}|([^\s,]+))", self.attributes)
        return found and (found[1] if found[1] is not None else found[2])

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of integers; an absent one is empty."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(name) or ""))

    def called(self, name: str) -> list[str]:
        """Computations that an attribute names: calls, to_apply, condition, body, branch_computations."""
        return [word.strip().lstrip("%") for word in (self.attribute(name) or "").split(",") if word.strip()]


@dataclasses.dataclass(eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: Instruction | None = None
    users: dict[Instruction, list[Instruction]] = dataclasses.field(default_factory=dict, repr=False)

    def parameters(self) -> list[Instruction]:
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.arguments))


@dataclasses.dataclass(eq=False)
class Program:
    """What one device executes."""

    computations: dict[str, Computation]
    entry: Computation
    num_devices: int
    donated: frozenset[int] = frozenset()  # parameters of `entry` in whose place results may lie

    def all_called(self, instruction: Instruction, attribute: str) -> list[Computation]:
        return [self.computations[name] for name in instruction.called(attribute)]


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*-> .*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


def parse(text: str) -> Program:
    """Reads the text of a whole module.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for statement in _statements(text):
        if header := _HEADER.match(statement):
            current = computations[header[2]] = Computation(header[2], {})
            entry = current if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(statement)):
            instruction = _instruction(found[2], statement[found.end() :], current)
            current.instructions[instruction.name] = instruction
            current.root = instruction if found[1] else current.root
            for operand in instruction.operands:
                current.users.setdefault(operand, []).append(instruction)
    if entry is None:
        raise ValueError("the text of a compiled program has an ENTRY computation; this has none")
    first_line = text.split("\n", 1)[0]
    counts = [re.search(rf"{name}=(\d+)", first_line) for name in ("num_partitions", "replica_count")]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, \w+=", first_line)
    donated = frozenset(int(number) for number in re.findall(r": \((\d+),", aliases[1] if aliases else ""))
    return Program(computations, entry, math.prod(int(count[1]) for count in counts if count), donated)


def _statements(text: str) -> Iterator[str]:
    """Lines, but for what a Pallas kernel says of itself: that breaks the line of its call."""
    statement = ""
    for line in text.splitlines():
        if line.startswith(" ") or line == "}" or _HEADER.match(line):
            yield statement
            statement = line
        else:
            statement += line
    yield statement


def _instruction(name: str, rest: str, computation: Computation) -> Instruction:
    """`rest` is what follows the equals sign: shape opcode(arguments), attributes."""
    end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    arguments, attributes = rest[opening + 1 : closing - 1], rest[closing:]
    opcode = rest[end:opening].strip()
    operands: tuple[Instruction, ...] = ()
    if opcode not in ("constant", "parameter"):
        words = re.sub(r"/\*.*?\*/", "", arguments)
        names = re.findall(r"%([^\s,]+)", words) or [word.strip() for word in words.split(",") if word.strip()]
        operands = tuple(computation.instructions[each] for each in names)
    op_name = _OP_NAME.search(attributes)
    return Instruction(
        name, opcode, shapes_of(rest[:end]), operands, arguments, attributes, op_name[1] if op_name else ""
    )


def _closing(text: str, opening: int) -> int:
    """The place after the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"a parenthesis is not closed: {text[:100]}")


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape as it is written, e.g. (f32[8,128]{1,0:T(8,128)S(1)}, u32[])."""
    return tuple(_shape(*found.groups()) for found in _ARRAY.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(size) for size in re.findall(r"\d+", dims))
    order, _, tiling = (layout or "").partition(":")
    fastest_first = [int(axis) for axis in order.split(",") if axis] or range(len(sizes))[::-1]
    padded = [sizes[axis] for axis in reversed(fastest_first)]
    tile = re.match(r"T\(([\d,]+)\)", tiling)  # further ones divide the first
    if tile and padded:
        for i, side in enumerate(reversed(tile[1].split(",")), start=1):
            if i <= len(padded):
                padded[-i] = math.ceil(padded[-i] / int(side)) * int(side)
    space = re.search(r"S\((\d+)\)", tiling)
    return Shape(dtype, sizes, int(space[1]) if space else 0, tuple(padded))


# --- Loops ------------------------------------------------------------------------------------------

# Of an instruction where it can be told: an integer, or of a tuple the values of its parts.
Value = Any

_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "negate": lambda a: -a,
    "not": lambda a: 1 - a,
    "clamp": lambda low, x, high: max(low, min(x, high)),
    "select": lambda condition, a, b: a if condition else b,
}
_COMPARISONS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "opt-barrier", "copy-done")


class Values:
    """Integers that follow from the constants of a program, in one computation with given parameters."""

    def __init__(self, program: Program, computation: Computation, parameters: tuple[Value, ...]):
        self._program, self._computation, self._parameters = program, computation, parameters
        self._known: dict[Instruction, Value] = {}

    def of(self, instruction: Instruction) -> Value:
        """None: it does not follow."""
        if instruction not in self._known:
            self._known[instruction] = self._of(instruction)
        return self._known[instruction]

    def root(self) -> Value:
        return self.of(self._computation.root)

    def _of(self, instruction: Instruction) -> Value:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "tuple":
            return tuple(self.of(each) if _may_be_known(each) else None for each in operands)
        if not _may_be_known(instruction):
            return None
        if opcode == "constant":
            text = instruction.arguments
            return {"true": 1, "false": 0}.get(text, int(text) if re.fullmatch(r"-?\d+", text) else None)
        if opcode == "parameter":
            number = int(instruction.arguments)
            return self._parameters[number] if number < len(self._parameters) else None
        if opcode == "get-tuple-element":
            whole = self.of(operands[0])
            index = instruction.numbers("index")[0]
            return whole[index] if isinstance(whole, tuple) and index < len(whole) else None
        if opcode == "copy-start":
            return self.of(operands[0])
        if opcode in ("fusion", "call"):
            (inner,) = self._program.all_called(instruction, "calls" if opcode == "fusion" else "to_apply")
            return Values(self._program, inner, tuple(self.of(each) for each in operands)).root()
        if opcode == "while":
            return carried_unchanged(self._program, instruction, self.of(operands[0]))
        values = [self.of(each) for each in operands]
        if not all(isinstance(value, int) for value in values):
            return None
        if opcode in _SAME_VALUE:
            return values[0]
        if opcode == "compare":
            return int(_COMPARISONS[instruction.attribute("direction")](*values))
        return _ARITHMETIC[opcode](*values) if opcode in _ARITHMETIC else None


def _may_be_known(instruction: Instruction) -> bool:
    """It is a tuple, or one integer."""
    if len(instruction.shapes) != 1 or instruction.opcode in ("while", "parameter"):
        return True
    (shape,) = instruction.shapes
    return shape.size == 1 and re.match(r"[su]\d|pred", shape.dtype) is not None


def carried_unchanged(program: Program, loop: Instruction, start: Value) -> Value:
    """Of a loop's state at its start, what is the same in every turn; the rest is None."""
    (body,) = program.all_called(loop, "body")
    if not isinstance(start, tuple) or body.root.opcode != "tuple":
        return None

    def source(part: Instruction) -> Instruction:
        while part.opcode in _SAME_VALUE and part.operands:
            part = part.operands[0]
        return part

    parts = [source(part) for part in body.root.operands]
    unchanged = [
        part.opcode == "get-tuple-element"
        and part.operands[0].opcode == "parameter"
        and part.numbers("index") == (i,)
        for i, part in enumerate(parts)
    ]
    return tuple(value if same else None for value, same in zip(start, unchanged, strict=True))


def trip_count(program: Program, loop: Instruction, start: Value) -> int | None:
    """How often a loop's body runs, when its state at the start is `start`; None: that depends on data.

    XLA says it for CPUs and GPUs. For TPUs it does not: the loop's counter is followed.
    """
    told = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if told:
        return int(told[1])
    (condition,), (body,) = (program.all_called(loop, name) for name in ("condition", "body"))
    state = start
    for turns in range(MAX_TURNS):
        goes_on = Values(program, condition, (state,)).root()
        if goes_on is None:
            return None
        if not goes_on:
            return turns
        state = Values(program, body, (state,)).root()
    return None
