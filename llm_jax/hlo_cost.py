"""What a compiled program costs each device: flops, bytes of memory moved, and what is sent between devices.

XLA's own `cost_analysis` counts the body of a loop once and a kernel not at all.

Flops are those of matrix products and convolutions, exactly, and of kernels, by the caller's formula. Bytes are
`hlo_traffic`'s estimate.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping

from llm_jax import hlo
from llm_jax.hlo import Computation, Instruction, Program
from llm_jax.hlo_traffic import (
    BEGINS_COLLECTIVE,
    COLLECTIVES,
    MOVES_NOTHING,
    Traffic,
    goes_on_elsewhere,
    is_free_call,
    target,
)


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


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that is executed, with all that is fused into it; of all its times together."""

    instruction: Instruction
    flops: float
    bytes: float
    sent: float  # to the next device, while no other instruction is executed
    in_background: bool  # a copy or an exchange that goes on while others are executed


@dataclasses.dataclass
class Cost:
    """Of one device, for one execution of the program."""

    flops_of: dict[str, float] = dataclasses.field(default_factory=dict)  # by module, kernels included
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    custom_calls: list[CustomCall] = dataclasses.field(default_factory=list)
    loops: list[Loop] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)

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
        for field in ("collectives", "custom_calls", "loops", "steps"):
            getattr(self, field).extend(getattr(other, field))


def analyse(
    program: Program | str,
    *,
    custom_call_flops: Callable[[Instruction], float] = lambda call: 0.0,
    turns: Mapping[str, int] | None = None,
    module_of: Callable[[str], str] | None = None,
    cheapest_branch: bool = False,
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
        cheapest_branch: of a conditional the other end counts.
    """
    program = hlo.parse(program) if isinstance(program, str) else program
    choose = min if cheapest_branch else max
    walk = _Walk(program, custom_call_flops, dict(turns or {}), module_of or module_name, choose)
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
        choose_branch: Callable[..., Cost],
    ):
        self.cost = Cost()
        self._choose_branch = choose_branch
        self._program, self._memory = program, Traffic(program)
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
                before = len(self.cost.steps)
                self.computation(inner, tuple(values.of(each) for each in instruction.operands), times)
                if opcode == "async-start":
                    begun = self.cost.steps[before:]
                    self.cost.steps[before:] = [dataclasses.replace(step, in_background=True) for step in begun]
            elif opcode not in MOVES_NOTHING and not opcode.endswith(("-done", "-update")):
                self._step(instruction, computation, times)

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
            how = (self._custom_call_flops, self._turns, self._module_of, self._choose_branch)
            walk = _Walk(self._program, *how)
            walk.computation(branch, (values.of(argument),), times)
            costs.append(walk.cost)
        self.cost.add(self._choose_branch(costs, key=lambda cost: (cost.flops, cost.bytes)))

    def _step(self, instruction: Instruction, computation: Computation, times: float) -> None:
        whole, self.cost = self.cost, Cost()
        self._arithmetic(instruction, computation, times, "", fused=False)
        if not is_free_call(instruction):
            done = _done(instruction, computation)
            self.cost.bytes_read = times * self._memory.read(instruction, done)
            self.cost.bytes_written = times * self._memory.written(instruction, done)
        in_background = instruction.opcode.endswith("-start")
        waits = not in_background and not self._begins_exchange(instruction)
        sent = sum(each.times * link_bytes(each) for each in self.cost.collectives) if waits else 0.0
        self.cost.steps.append(Step(instruction, self.cost.flops, self.cost.bytes, sent, in_background))
        whole.add(self.cost)
        self.cost = whole

    def _begins_exchange(self, fusion: Instruction) -> bool:
        """It sends while it computes, and goes on to send while others do."""
        return fusion.opcode == "fusion" and any(
            target(each) == BEGINS_COLLECTIVE
            for inner in self._program.all_called(fusion, "calls")
            for each in inner.instructions.values()
        )

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
        elif kind in COLLECTIVES and not (fused and goes_on_elsewhere(instruction, computation)):
            self._collective(kind, instruction, computation, times, op_name, fused=fused)
        elif kind == "custom-call":
            if is_free_call(instruction) or target(instruction) == BEGINS_COLLECTIVE:
                return
            flops = self._custom_call_flops(instruction)
            self.cost.custom_calls.append(CustomCall(instruction, target(instruction), times, flops))
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
