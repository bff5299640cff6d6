"""The optimised program of a TPU as text: what runs, how often, and what it moves.

Read from `compiled.as_text()`: the instructions that are programs of their own (fusions, copies,
kernels), the rounds of the loops around them, and the bytes that each reads from and writes to main
memory. Arrays that the compiler keeps in VMEM (memory space 1) cost nothing there.
"""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from benchmarks.tpu.bundles import NoScheduleError

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_SLICES = ("dynamic-slice", "slice", "gather")
# These name an array again, they move nothing.
_SAME = ("bitcast", "reshape", "convert", "copy", "transpose")


class Array(NamedTuple):
    """One array: bytes with padding to whole tiles, and whether it lies in main memory.

    Scalars are the scalar core's own.
    """

    bytes: int
    hbm: bool


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # what it makes
    operands: tuple[str, ...]
    rest: str  # attributes
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate, its model of memory included."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found.group(1)) if found else None

    @property
    def vmem_bytes(self) -> int:
        """VMEM that the instruction takes for itself while it runs."""
        found = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', self.rest)
        return sum(map(int, found))

    @property
    def is_kernel(self) -> bool:
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.rest

    @property
    def kernel_name(self) -> str:
        """The name that `pl.pallas_call` was given."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        parts = found.group(1).split("/") if found else []
        return parts[-2] if len(parts) > 1 and parts[-1] == "pallas_call" else self.name


class Step(NamedTuple):
    """An instruction and how often the program runs it."""

    instruction: Instruction
    times: float


class Program:
    """A parsed program.

    Args:
      text: `compiled.as_text()`.
      open_rounds: how often on average a loop runs whose rounds are no constant; None: it is
        refused.
    """

    def __init__(self, text: str, open_rounds: float | None = None) -> None:
        self._open_rounds = open_rounds
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations[head.group(2)] = {}
                if head.group(1):
                    self.entry = head.group(2)
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _parse(found)
                current[instruction.name] = instruction
        if not self.entry:
            raise NoScheduleError("no schedule found: the program has no entry")

    def steps(self) -> Iterator[Step]:
        """All instructions in the order of the program, bodies of loops with their rounds."""
        yield from self._steps(self.entry, 1)

    def _steps(self, computation: str, times: float) -> Iterator[Step]:
        body = self._computation(computation)
        for instruction in body.values():
            opcode = instruction.opcode
            if opcode == "while":
                rounds = self._rounds(instruction, body)
                yield from self._steps(instruction.attribute("body") or "", times * rounds)
            elif opcode == "conditional":
                # Which branch runs is data: all of them, an upper limit.
                for name in _branches(instruction):
                    yield from self._steps(name, times)
            elif opcode == "call":
                yield from self._steps(instruction.attribute("to_apply") or "", times)
            else:
                yield Step(instruction, times)

    def _computation(self, name: str) -> dict[str, Instruction]:
        if name not in self.computations:
            raise NoScheduleError(f"no schedule found: no computation {name!r} in the program")
        return self.computations[name]

    def _rounds(self, loop: Instruction, around: dict[str, Instruction]) -> float:
        rounds = self._constant_rounds(loop, around)
        if rounds is not None:
            return rounds
        if self._open_rounds is None:
            raise NoScheduleError(
                f"no schedule found: the rounds of loop %{loop.name} are not a constant"
            )
        return self._open_rounds

    def _constant_rounds(self, loop: Instruction, around: dict[str, Instruction]) -> int | None:
        """Rounds of a loop that counts from 0 to a constant by one; None for any other."""
        condition = self._computation(loop.attribute("condition") or "")
        test = next(i for i in condition.values() if i.root)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, limit = (condition[n] for n in test.operands)
        place = counter.attribute("index") if counter.opcode == "get-tuple-element" else None
        bound = _constant(limit)
        if place is None or bound is None:
            return None
        start = around.get(loop.operands[0])
        begin = start and start.opcode == "tuple" and around.get(start.operands[int(place)])
        while isinstance(begin, Instruction) and begin.opcode in ("copy", "bitcast"):
            begin = around.get(begin.operands[0])
        body = self._computation(loop.attribute("body") or "")
        end = body[next(i for i in body.values() if i.root).operands[int(place)]]
        ones = [_constant(body[n]) for n in end.operands if n in body]
        if not isinstance(begin, Instruction) or _constant(begin) != 0:
            return None
        return bound if end.opcode == "add" and 1 in ones else None

    def moved(self, instruction: Instruction, around: dict[str, Instruction] | None = None) -> int:
        """Bytes between main memory and chip: of each operand what is read, of results all."""
        body = around if around is not None else self.around(instruction)
        arrays = [body[name] for name in instruction.operands if name in body]
        if instruction.opcode == "fusion":
            return self._fusion_moved(instruction, arrays)
        if instruction.opcode in _SLICES:
            return 2 * _hbm(instruction.arrays) if _hbm(arrays[0].arrays) else 0
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _hbm(arrays[1].arrays)
        if instruction.opcode == "copy-start":
            # Its result names the source again.
            return _hbm(arrays[0].arrays) + _hbm(instruction.arrays[:1])
        if instruction.opcode.removesuffix("-start") in _SLICES:
            # The source again, the slice, and what tells that it is there.
            _, part, *_ = instruction.arrays
            return part.bytes * bool(_hbm(arrays[0].arrays)) + _hbm([part])
        if instruction.opcode.endswith("-done"):
            return 0
        return sum(_hbm(a.arrays) for a in arrays) + _hbm(instruction.arrays)

    def around(self, instruction: Instruction) -> dict[str, Instruction]:
        for body in self.computations.values():
            if body.get(instruction.name) is instruction:
                return body
        raise NoScheduleError(f"no schedule found: %{instruction.name} is in no computation")

    def _fusion_moved(self, fusion: Instruction, operands: list[Instruction]) -> int:
        body = self._computation(fusion.attribute("calls") or "")
        total = 0
        for place, operand in enumerate(operands):
            if not _hbm(operand.arrays):
                continue
            read = self._read(body, place)
            total += _hbm(operand.arrays) if read is None else read
        return total + self._written(fusion, body)

    def _read(self, body: dict[str, Instruction], place: int) -> int | None:
        """Bytes that a fused computation reads of one parameter; None for all of it."""
        parameter = next(
            (
                i
                for i in body.values()
                if i.opcode == "parameter" and i.rest.startswith(f"{place})")
            ),
            None,
        )
        if parameter is None:
            return None
        return self._read_of(body, parameter.name)

    def _read_of(self, body: dict[str, Instruction], name: str) -> int | None:
        total = 0
        for user in body.values():
            if name not in user.operands:
                continue
            if user.opcode in _SLICES and user.operands[0] == name:
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode in ("bitcast", "reshape"):
                part = self._read_of(body, user.name)
                if part is None:
                    return None
                total += part
            elif user.opcode == "fusion":
                inner = self._computation(user.attribute("calls") or "")
                part = self._read(inner, user.operands.index(name))
                if part is None:
                    return None
                total += part
            else:
                return None
        return total

    def _written(self, fusion: Instruction, body: dict[str, Instruction]) -> int:
        root = next(i for i in body.values() if i.root)
        results = [root] if root.opcode != "tuple" else [body[n] for n in root.operands]
        if len(results) != len(fusion.arrays):
            return _hbm(fusion.arrays)
        total = 0
        for result, array in zip(results, fusion.arrays, strict=True):
            while result.opcode in _SAME and result.operands[0] in body:
                result = body[result.operands[0]]
            if array.hbm and result.opcode == "dynamic-update-slice":
                total += sum(a.bytes for a in body[result.operands[1]].arrays)
            elif array.hbm:
                total += array.bytes
        return total


def _parse(found: re.Match[str]) -> Instruction:
    root, name, text = found.groups()
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:close]))
    return Instruction(name, opcode, arrays_of(shape), operands, rest, bool(root))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise NoScheduleError("no schedule found: the program's text is cut off")


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as the compiler writes it, tuples flattened.

    >>> arrays_of("bf16[1000,64]{1,0:T(8,128)(2,1)}"), arrays_of("f32[5]{0:T(128)S(1)}")
    ((Array(bytes=256000, hbm=True),), (Array(bytes=512, hbm=False),))
    """
    found = []
    for kind, sizes, order, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        dims = [int(n) for n in sizes.split(",") if n]
        if order:
            dims = [dims[int(i)] for i in reversed(order.split(","))]
        tile = re.match(r"T\(([\d,]+)\)", layout)
        if tile:
            sides = [int(n) for n in tile.group(1).split(",")]
            dims = [1] * (len(sides) - len(dims)) + dims
            for place, side in enumerate(reversed(sides), 1):
                dims[-place] = -(-dims[-place] // side) * side
        hbm = bool(sizes) and not re.search(r"S\(\d\)", layout)
        found.append(Array(ITEM_BYTES.get(kind, 4) * prod(dims), hbm))
    return tuple(found)


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(a.bytes for a in arrays if a.hbm)


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"(\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
    return int(found.group(1)) if found else None


def _branches(instruction: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if found:
        return re.findall(r"%([\w.-]+)", found.group(1))
    names = (instruction.attribute(f"{b}_computation") for b in ("true", "false"))
    return [n for n in names if n]
