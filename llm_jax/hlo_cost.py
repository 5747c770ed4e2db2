"""What a compiled program costs each device: flops, bytes of memory moved, and what is sent between devices.

XLA's own `cost_analysis` counts the body of a loop once and a kernel not at all.

Flops are those of matrix products and convolutions, exactly, and of kernels, by the caller's formula. Bytes are an
estimate: each instruction reads its operands from memory and writes its result there once, an instruction fused
into another moves nothing, a slice moves itself and not what it is cut from, and what lies in a TPU's VMEM is not in
memory. What a cache keeps, and what a kernel reads twice, is not seen.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from llm_jax import hlo
from llm_jax.hlo import Computation, Instruction, Program, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices. Bytes are one device's, of one time."""

    kind: str  # one of COLLECTIVES
    dtype: str
    operand_bytes: float
    result_bytes: float
    group_size: int  # devices that exchange with each other; 2 of a permutation, whose groups are its pairs
    num_groups: int
    times: float
    op_name: str


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """A kernel: its `instruction` has name, shapes and operands."""

    instruction: Instruction
    target: str
    times: float
    flops: float  # of one time, by the caller's formula


@dataclasses.dataclass(frozen=True)
class Loop:
    name: str
    op_name: str
    turns: int | None  # None: they could not be told, and were counted as one


@dataclasses.dataclass
class Cost:
    """Of one device, for one execution of the program."""

    flops_of: dict[str, float] = dataclasses.field(default_factory=dict)  # by module, kernels included
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)
    loops: list[Loop] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(self.flops_of.values())

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written

    @property
    def unknown_loops(self) -> list[Loop]:
        """Where there are any, the cost is at least what it says."""
        return [loop for loop in self.loops if loop.turns is None]

    def add(self, other: "Cost") -> None:
        for module, flops in other.flops_of.items():
            self.flops_of[module] = self.flops_of.get(module, 0.0) + flops
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        for field in ("collectives", "custom_calls", "loops"):
            getattr(self, field).extend(getattr(other, field))


def analyse(
    program: Program | str,
    *,
    custom_call_flops: Callable[[Instruction], float] = lambda call: 0.0,
    turns: Mapping[str, int] | None = None,
    module_of: Callable[[str], str] | None = None,
) -> Cost:
    """Adds up what `program`, or the program of a text, costs each device.

    Of a conditional the branch with most flops counts, or of equals that which moves most; a loop's condition does
    not count.

    Args:
        custom_call_flops: of a kernel: `call.name` and `call.op_name` say which, `call.operands[i].shapes[0].dims`
            how large.
        turns: of loops that data decides: the first whose key, a regular expression, is found in a loop's op_name.
            It goes before what the program says.
        module_of: op_name -> the name that flops are added up under; None: `module_name`.
    """
    program = hlo.parse(program) if isinstance(program, str) else program
    walk = _Walk(program, custom_call_flops, dict(turns or {}), module_of or module_name)
    walk.computation(program.entry, (), 1)
    return walk.cost


def link_bytes(collective: Collective) -> float:
    """What each device sends to its neighbour when the devices of a group form a ring, of one time."""
    share = (collective.group_size - 1) / collective.group_size
    if collective.kind == "all-gather":
        return collective.result_bytes * share
    if collective.kind == "all-reduce":
        # Sums are scattered, then gathered. A TPU may add up float32 and give bfloat16.
        return (collective.operand_bytes + collective.result_bytes) * share
    if collective.kind == "collective-permute":
        return collective.operand_bytes
    return collective.operand_bytes * share


# --- Names ------------------------------------------------------------------------------------------

# What JAX puts into an op_name of its own accord.
_STRUCTURE = re.compile(
    r"while|body|cond|scan|branch_\d+_fun|(closed|core|custom_jvp|custom_vjp)_call|checkpoint|remat\d?|shard_map|pjit"
    r"|rematted_computation|.*->.*|[a-z_]*jit\(.*"
)


def scope(op_name: str) -> tuple[str, ...]:
    """The named scopes of an operation: jit(step)/transpose(jvp(Model))/while/body/attn/dot_general: Model, attn."""
    parts = _parts(op_name.split(";")[0])[:-1]  # the last is the operation itself
    names = []
    for part in parts:
        while inner := re.fullmatch(r"(?!\w*jit\()\w+\((.*)\)", part):  # jvp(...), transpose(...), vmap(...)
            part = inner[1]
        names += [name for name in part.split("/") if name and not _STRUCTURE.fullmatch(name)]
    return tuple(names)


def _parts(op_name: str) -> list[str]:
    """Split at slashes, but for those in parentheses."""
    parts, depth = [""], 0
    for letter in op_name:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def module_name(op_name: str, names: Collection[str] = ()) -> str:
    """The innermost scope that is one of `names`, any if there are none; "other" if there is no such scope."""
    found = [name for name in scope(op_name) if not names or name in names]
    return found[-1] if found else "other"


# --- Flops ------------------------------------------------------------------------------------------


def product_flops(instruction: Instruction) -> float:
    """Of a dot or a convolution, two for each multiplication; 0 of everything else."""
    if instruction.opcode == "dot":
        lhs = instruction.operands[0].shapes[0]
        summed = math.prod(lhs.dims[axis] for axis in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * instruction.shapes[0].size * summed
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction)
    return 0.0


def _convolution_flops(instruction: Instruction) -> float:
    """Those that meet an element, and neither padding nor a hole: a TPU's batched product is a diagonal of them."""
    lhs, kernel = (operand.shapes[0].dims for operand in instruction.operands)
    lhs_labels, kernel_labels, out_labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    out = instruction.shapes[0].dims
    groups = math.prod(int(instruction.attribute(f"{of}_group_count") or 1) for of in ("feature", "batch"))
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute("window") or ""))

    def of_axis(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    met = 1
    for label in sorted(set(lhs_labels) - {"b", "f"}):
        axis = int(label)
        met *= _meetings(
            lhs[lhs_labels.index(label)],
            kernel[kernel_labels.index(label)],
            out[out_labels.index(label)],
            int(of_axis("stride", axis, "1")),
            int(of_axis("pad", axis, "0_0").split("_")[0]),
            int(of_axis("lhs_dilate", axis, "1")),
            int(of_axis("rhs_dilate", axis, "1")),
        )
    batch, features = lhs[lhs_labels.index("b")], lhs[lhs_labels.index("f")]
    return 2.0 * met * batch * features * out[out_labels.index("f")] / groups


@functools.lru_cache(maxsize=None)
def _meetings(size: int, window: int, out: int, stride: int, pad: int, dilation: int, window_dilation: int) -> int:
    """Pairs of a place of the window and one of the result (along one axis) that meet an element of the operand.

    They do where place_of_result * stride + place_in_window * window_dilation - pad is a multiple of `dilation`
    from 0 to (size - 1) * dilation.
    """
    common = math.gcd(stride, dilation)
    every = dilation // common  # result places that meet are so far apart
    total = 0
    for place in range(window):
        start = place * window_dilation - pad
        if start % common:
            continue
        first = -(start // common) * pow(stride // common, -1, every) % every
        low = max(0, math.ceil(-start / stride))
        high = min(out - 1, ((size - 1) * dilation - start) // stride)
        low += (first - low) % every
        total += max(0, (high - low) // every + 1)
    return total


# --- Bytes ------------------------------------------------------------------------------------------

HBM = 0  # the memory space
_MOVES_NOTHING = (
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id domain"
).split()
_BEGINS_COLLECTIVE = "AsyncCollectiveStart"
# Of a TPU: names for what lies there already.
_FREE_CALLS = "AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound Sharding AsyncCollectiveDone".split()
# An element of the result is one of the operand: who takes a slice of it has taken a slice of the operand.
_ELEMENTWISE = "bitcast convert copy reshape transpose".split()


def _in_hbm(shapes: Sequence[Shape]) -> float:
    return sum(shape.padded_size * shape.itemsize for shape in shapes if shape.memory_space == HBM)


def _target(instruction: Instruction) -> str:
    """Of a custom call the name of its kernel; of others nothing."""
    return (instruction.attribute("custom_call_target") or "").strip('",')


def _is_free_call(instruction: Instruction) -> bool:
    return _target(instruction) in _FREE_CALLS


class _Memory:
    """What instructions of a program read and write."""

    def __init__(self, program: Program):
        self._program = program

    def read(self, instruction: Instruction, done: Instruction) -> float:
        """`done` has the result: the other of an asynchronous pair, or the instruction itself."""
        total = 0.0
        for operand in dict.fromkeys(instruction.operands):
            if len(operand.shapes) == 1 and operand.shapes[0].memory_space == HBM:
                (shape,) = operand.shapes
                places = [i for i, each in enumerate(instruction.operands) if each is operand]
                elements = sum(self._elements(instruction, i, done) for i in places)
                total += min(elements, shape.padded_size) * shape.itemsize
        return total

    def _elements(self, instruction: Instruction, place: int, done: Instruction | None = None) -> float:
        """That an instruction reads of one of its operands."""
        operand, opcode = instruction.operands[place], instruction.opcode.removesuffix("-start")
        whole = sum(shape.padded_size for shape in operand.shapes)
        if opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            return (done or instruction).shapes[0].padded_size
        if opcode == "dynamic-update-slice" and place == 0:
            return 0
        if opcode == "scatter" and place == 0 and len(instruction.operands) == 3:
            return instruction.operands[2].shapes[0].padded_size
        if opcode == "fusion":
            (inner,) = self._program.all_called(instruction, "calls")
            return min(self._taken(inner, inner.parameters()[place]), whole)
        return whole

    def _taken(self, inner: Computation, source: Instruction) -> float:
        """Elements of `source`, in a fusion, that its other instructions take."""
        total = 0.0
        for user in inner.users.get(source, []):
            if user.opcode in _ELEMENTWISE and user is not inner.root:
                total += self._taken(inner, user)
            elif user.opcode == "tuple" or _is_free_call(user) or _goes_on_elsewhere(user, inner):
                continue  # handed on
            elif user.opcode == "dynamic-update-slice" and not self._is_in_place(inner, user):
                total += source.shapes[0].padded_size
            else:
                total += sum(self._elements(user, i) for i, each in enumerate(user.operands) if each is source)
        return total

    def _is_in_place(self, inner: Computation, update: Instruction) -> bool:
        """What a fusion updates is its result, and so lies where its operand did."""
        users = inner.users.get(update, [])
        return update is inner.root or all(
            user.opcode == "tuple" or (user.opcode == "bitcast" and self._is_in_place(inner, user)) for user in users
        )

    def written(self, instruction: Instruction, done: Instruction) -> float:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "fusion":
            (inner,) = self._program.all_called(instruction, "calls")
            return self._result(inner.root, inner)
        if opcode in ("dynamic-update-slice", "scatter"):
            return self._changed(instruction, done)
        return _in_hbm(done.shapes)

    def _result(self, part: Instruction, inner: Computation) -> float:
        """That a fusion writes for its result, or a part of it."""
        if part.opcode == "tuple":
            return sum(self._result(each, inner) for each in dict.fromkeys(part.operands))
        if part.opcode == "parameter" or _is_free_call(part) or _goes_on_elsewhere(part, inner):
            return 0.0
        if _target(part) == _BEGINS_COLLECTIVE:  # its result is a tuple: operand, result, semaphores
            return _in_hbm(part.shapes[1:2])
        source = _through_bitcasts(part)
        if source.opcode in ("dynamic-update-slice", "scatter"):
            is_buffer = _through_bitcasts(source.operands[0]).opcode == "parameter"
            return self._changed(source, part) if is_buffer else _in_hbm(part.shapes)
        if source.opcode == "fusion":
            return self.written(source, part)
        return _in_hbm(part.shapes)

    def _changed(self, update: Instruction, result: Instruction) -> float:
        """An update in place is written where it lands, and the rest of the buffer stays as it is."""
        shape = result.shapes[0]
        new = update.operands[1 if update.opcode == "dynamic-update-slice" else -1].shapes[0]
        return new.padded_size * shape.itemsize if shape.memory_space == HBM else 0.0


def _through_bitcasts(part: Instruction) -> Instruction:
    while part.opcode == "bitcast":
        part = part.operands[0]
    return part


def _goes_on_elsewhere(instruction: Instruction, inner: Computation) -> bool:
    """It is a collective that another fusion has begun.

    A TPU exchanges while it computes: one fusion begins an all-gather, others compute beside it, the last waits for
    its end, and it stands in all of them. Those that did not begin it are given its semaphores.
    """
    return instruction.opcode in COLLECTIVES and any(
        shape.memory_space == 2 for parameter in inner.parameters() for shape in parameter.shapes
    )


# --- Collectives ------------------------------------------------------------------------------------


def groups(instruction: Instruction, num_devices: int) -> tuple[int, int]:
    """(devices of a group, number of groups) of a collective."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return 2, pairs[1].count("{")
    if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", text):  # mesh['x'=4,'y'=2] {'x'}
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        # 'x':(2)4 is the part of 4 of an axis that is split in three, as 2, 4 and the rest.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        size = math.prod(int(part) if part else sizes[name] for name, part in parts)
        return size, math.prod(sizes.values()) // size
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota[2]), int(iota[1])
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", text)
    if listed:
        each = listed[1].split("},{")
        return len(each[0].split(",")), len(each)
    return num_devices, 1


def _kept_slices(total: Instruction, inner: Computation) -> list[Instruction]:
    """Of a sum over devices, in a fusion, the slices that each keeps; empty if something else reads it whole.

    So a TPU writes a reduce-scatter.
    """
    slices: list[Instruction] = []
    for user in inner.users.get(total, []):
        if user.opcode == "dynamic-slice":
            slices.append(user)
        elif user.opcode in ("get-tuple-element", "bitcast") and (found := _kept_slices(user, inner)):
            slices += found
        else:
            return []
    return slices


def _logical_bytes(instructions: Collection[Instruction]) -> float:
    return sum(shape.bytes for instruction in instructions for shape in instruction.shapes)


# --- The walk ---------------------------------------------------------------------------------------


class _Walk:
    def __init__(
        self,
        program: Program,
        custom_call_flops: Callable[[Instruction], float],
        turns: dict[str, int],
        module_of: Callable[[str], str],
    ):
        self.cost = Cost()
        self._program, self._memory = program, _Memory(program)
        self._custom_call_flops, self._turns, self._module_of = custom_call_flops, turns, module_of

    def computation(self, computation: Computation, parameters: tuple[hlo.Value, ...], times: float) -> None:
        """Adds what a computation that is not fused costs; `parameters` are what is known of its arguments."""
        values = hlo.Values(self._program, computation, parameters)
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                self._loop(instruction, values.of(instruction.operands[0]), times)
            elif opcode == "conditional":
                self._branches(instruction, values, times)
            elif opcode in ("call", "async-start"):
                (inner,) = self._program.all_called(instruction, "to_apply" if opcode == "call" else "calls")
                self.computation(inner, tuple(values.of(each) for each in instruction.operands), times)
            elif opcode not in _MOVES_NOTHING and not opcode.endswith(("-done", "-update")):
                self._arithmetic(instruction, computation, times, "", fused=False)
                self._moves(instruction, computation, times)

    def _loop(self, loop: Instruction, start: hlo.Value, times: float) -> None:
        given = [turns for pattern, turns in self._turns.items() if re.search(pattern, loop.op_name)]
        turns = given[0] if given else hlo.trip_count(self._program, loop, start)
        self.cost.loops.append(Loop(loop.name, loop.op_name, turns))
        (body,) = self._program.all_called(loop, "body")
        unchanged = hlo.carried_unchanged(self._program, loop, start)
        self.computation(body, (unchanged,), times * (1 if turns is None else turns))

    def _branches(self, conditional: Instruction, values: hlo.Values, times: float) -> None:
        names = ("branch_computations", "true_computation", "false_computation")
        branches = [branch for name in names for branch in self._program.all_called(conditional, name)]
        costs = []
        for branch, argument in zip(branches, conditional.operands[1:], strict=True):
            walk = _Walk(self._program, self._custom_call_flops, self._turns, self._module_of)
            walk.computation(branch, (values.of(argument),), times)
            costs.append(walk.cost)
        self.cost.add(max(costs, key=lambda cost: (cost.flops, cost.bytes)))

    def _moves(self, instruction: Instruction, computation: Computation, times: float) -> None:
        if _is_free_call(instruction):
            return
        done = _done(instruction, computation)
        self.cost.bytes_read += times * self._memory.read(instruction, done)
        self.cost.bytes_written += times * self._memory.written(instruction, done)

    def _arithmetic(
        self, instruction: Instruction, computation: Computation, times: float, op_name: str, *, fused: bool
    ) -> None:
        """Flops, kernels and collectives of an instruction, and of those fused into it."""
        op_name = instruction.op_name or op_name
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "fusion":
            (inner,) = self._program.all_called(instruction, "calls")
            for each in inner.instructions.values():
                self._arithmetic(each, inner, times, op_name, fused=True)
        elif kind in COLLECTIVES and not (fused and _goes_on_elsewhere(instruction, computation)):
            self._collective(kind, instruction, computation, times, op_name, fused=fused)
        elif kind == "custom-call":
            if _is_free_call(instruction) or _target(instruction) == _BEGINS_COLLECTIVE:
                return
            flops = self._custom_call_flops(instruction)
            self.cost.custom_calls.append(CustomCall(instruction, _target(instruction), times, flops))
            self._add_flops(op_name, times * flops)
        else:
            self._add_flops(op_name, times * product_flops(instruction))

    def _add_flops(self, op_name: str, flops: float) -> None:
        if flops:
            module = self._module_of(op_name)
            self.cost.flops_of[module] = self.cost.flops_of.get(module, 0.0) + flops

    def _collective(
        self, kind: str, instruction: Instruction, inner: Computation, times: float, op_name: str, *, fused: bool
    ) -> None:
        result = [_done(instruction, inner)]
        if fused and kind == "all-reduce" and (slices := _kept_slices(instruction, inner)):
            kind, result = "reduce-scatter", slices
        size, number = groups(instruction, self._program.num_devices)
        self.cost.collectives.append(
            Collective(
                kind,
                instruction.operands[0].shapes[0].dtype,
                _logical_bytes(instruction.operands),
                _logical_bytes(result),
                size,
                number,
                times,
                op_name,
            )
        )


def _done(instruction: Instruction, computation: Computation) -> Instruction:
    """The instruction that has the result: of an asynchronous pair the last."""
    while instruction.opcode.endswith(("-start", "-update")):
        users = computation.users.get(instruction, [])
        following = [user for user in users if user.opcode.endswith(("-done", "-update"))]
        if not following:
            break
        instruction = following[0]
    return instruction
