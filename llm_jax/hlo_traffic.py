"""What each instruction of a compiled program reads from memory and writes there.

An estimate: an instruction reads its operands and writes its result once, one that is fused into another moves
nothing, a slice moves itself and not what it is cut from, and what lies in a TPU's VMEM is not in memory. What a
cache keeps, and what a kernel reads twice, is not seen.
"""

from collections.abc import Sequence

from llm_jax.hlo import Computation, Instruction, Program, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

HBM = 0  # the memory space
MOVES_NOTHING = (
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id domain"
).split()
BEGINS_COLLECTIVE = "AsyncCollectiveStart"
# Of a TPU: names for what lies there already.
_FREE_CALLS = "AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound Sharding AsyncCollectiveDone".split()
# An element of the result is one of the operand: who takes a slice of it has taken a slice of the operand.
_ELEMENTWISE = "bitcast convert copy reshape transpose".split()


def _in_hbm(shapes: Sequence[Shape]) -> float:
    return sum(shape.padded_size * shape.itemsize for shape in shapes if shape.memory_space == HBM)


def target(instruction: Instruction) -> str:
    """Of a custom call the name of its kernel; of others nothing."""
    return (instruction.attribute("custom_call_target") or "").strip('",')


def is_free_call(instruction: Instruction) -> bool:
    return target(instruction) in _FREE_CALLS


class Traffic:
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
            elif user.opcode == "tuple" or is_free_call(user) or goes_on_elsewhere(user, inner):
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
        if part.opcode == "parameter" or is_free_call(part) or goes_on_elsewhere(part, inner):
            return 0.0
        if target(part) == BEGINS_COLLECTIVE:  # its result is a tuple: operand, result, semaphores
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


def goes_on_elsewhere(instruction: Instruction, inner: Computation) -> bool:
    """It is a collective that another fusion has begun.

    A TPU exchanges while it computes: one fusion begins an all-gather, others compute beside it, the last waits for
    its end, and it stands in all of them. Those that did not begin it are given its semaphores.
    """
    return instruction.opcode in COLLECTIVES and any(
        shape.memory_space == 2 for parameter in inner.parameters() for shape in parameter.shapes
    )
