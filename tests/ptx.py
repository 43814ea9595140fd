"""What a CUDA compiler made of native/step.cu, carried out on the host: an interpreter of the part of PTX that it consists of.

All threads of a launch go together, each at its own place in the program, the furthest behind first. What an instruction gives is as the
PTX ISA has it (its section 9.7); one that is not known here is an error, and so are the fused, approximate and flushing ones, which the
host has not. Memory that nobody lent is an error, as is an address that is not aligned.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sr3rt.backends import cuda, kernels

Lanes = NDArray[Any]  # a value of each thread that takes part

TYPES = {"u32": "u4", "s32": "i4", "b32": "u4", "f32": "f4", "u64": "u8", "s64": "i8", "b64": "u8", "pred": "?"}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
PURE: dict[str, Callable[..., Lanes]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.floordiv,  # of unsigned numbers alone
    "rem": operator.mod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "sqrt": np.sqrt,
    "mad": lambda a, b, c: a * b + c,
    "selp": lambda a, b, p: np.where(p, a, b),
    "min": np.fmin,
    "max": np.fmax,
}


def compiled() -> str:
    """step.cu by NVRTC, for compute capability 9.0 and later."""
    from cuda.bindings import nvrtc

    source, header = ((kernels.NATIVE / name).read_bytes() for name in ("step.cu", "step.hpp"))
    program = cuda.checked(nvrtc.nvrtcCreateProgram(source, b"step.cu", 1, [header], [b"step.hpp"]), "compiling")
    options = [option.encode() for option in (*kernels.OPTIONS, "--gpu-architecture=compute_90")]
    cuda.checked(nvrtc.nvrtcCompileProgram(program, len(options), options), "compiling")
    text = bytearray(cuda.checked(nvrtc.nvrtcGetPTXSize(program), "compiling"))
    cuda.checked(nvrtc.nvrtcGetPTX(program, text), "compiling")
    return text.rstrip(b"\0").decode()


@dataclass(frozen=True)
class Instruction:
    """guard: the predicate under which it is done, and whether that must be true. kind: as "ld.global.v2.u32"."""

    guard: tuple[str, bool] | None
    kind: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass
class Kernel:
    """labels: the number of the instruction that follows each."""

    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels, by name."""
    found = {}
    for name, parameters, body in re.findall(r"\.entry (\w+)\((.*?)\)\s*(?:\.\w+ [\d, ]+\s*)*\{(.*?)\n\}", text, re.DOTALL):
        kernel = found[name] = Kernel(re.findall(r"(\w+)(?=,|\s*$)", parameters, re.MULTILINE))
        for line in re.sub(r"//.*", "", body).replace(":", ":;").split(";"):
            statement = line.strip()
            if statement.endswith(":"):
                kernel.labels[statement[:-1]] = len(kernel.instructions)
            elif statement and not statement.startswith("."):
                kernel.instructions.append(_instruction(statement))
    return found


def _instruction(statement: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.]+)\s*(.*)", statement, re.DOTALL)
    assert found, f"what is {statement!r}?"
    unless, predicate, kind, rest = found.groups()
    operands = re.findall(r"\{.*?\}|\[.*?\]|[^,\s]+", rest)
    return Instruction((predicate, not unless) if predicate else None, tuple(kind.split(".")), tuple(operands))


class Machine:
    """The kernels of a text in PTX."""

    def __init__(self, text: str) -> None:
        self.kernels = parse(text)

    def launch(self, name: str, blocks: tuple[int, int], threads: int, arguments: Sequence[int], memory: Sequence[NDArray[Any]]) -> float:
        """As cuLaunchKernel. arguments: addresses and numbers. memory: what the kernel may read and write, C-contiguous.

        Returns how many instructions a thread carried out, in the mean.
        """
        pieces = [array.reshape(-1).view(np.uint8) for array in memory]
        return _Launch(self.kernels[name], blocks, threads, arguments, pieces).run()


class _Launch:
    def __init__(
        self, kernel: Kernel, blocks: tuple[int, int], threads: int, arguments: Sequence[int], memory: list[NDArray[np.uint8]]
    ) -> None:
        self._kernel, self._memory = kernel, memory
        self._parameters = dict(zip(kernel.parameters, arguments, strict=True))
        self._count = blocks[0] * blocks[1] * threads
        block, thread = np.divmod(np.arange(self._count, dtype=np.uint32), np.uint32(threads))
        places = {"%tid.x": thread, "%ctaid.x": block % blocks[0], "%ctaid.y": block // blocks[0]}
        sizes = {"%ntid.x": threads, "%nctaid.x": blocks[0], "%nctaid.y": blocks[1]}
        self._special = places | {name: np.full(self._count, size, np.uint32) for name, size in sizes.items()}
        self._registers: dict[str, Lanes] = {}
        self._lanes: Any = slice(None)  # those that take part

    def run(self) -> float:
        end = len(self._kernel.instructions)
        at, done = np.zeros(self._count, np.int64), 0
        while (first := int(at.min())) < end:
            lanes = np.flatnonzero(at == first)
            done += len(lanes)
            instruction = self._kernel.instructions[first]
            at[lanes] = first + 1
            if instruction.guard:
                name, wanted = instruction.guard
                lanes = lanes[self._registers[name][lanes] == wanted]
            if instruction.kind[0] == "bra":
                at[lanes] = self._kernel.labels[instruction.operands[0]]
            elif instruction.kind[0] == "ret":
                at[lanes] = end
            else:
                self._lanes = lanes
                with np.errstate(all="ignore"):
                    self._do(instruction.kind, *instruction.operands)
        return done / self._count

    def _do(self, kind: tuple[str, ...], *operands: str) -> None:
        name, *how, last = kind
        if name in ("ld", "st") and "param" in how:
            self._set(operands[0], np.full(self._count, self._parameters[operands[1].strip("[]")], TYPES[last])[self._lanes])
        elif name == "ld":
            self._load(operands[0], operands[1], last)
        elif name == "st":
            self._store(operands[0], operands[1], last)
        elif name == "atom":
            assert how[-1] == "cas"
            self._swap(*operands, kind=last)
        elif name == "setp":
            self._set(operands[0], self._compared(how[0], *(self._get(one, last) for one in operands[1:])))
        elif name == "cvt":
            self._convert(how, last, *operands)
        elif name in ("shl", "shr"):
            value, by = self._get(operands[1], last), self._get(operands[2], "u32")
            bits = 8 * value.dtype.itemsize
            assert (by < bits).all()
            self._set(operands[0], (operator.lshift if name == "shl" else operator.rshift)(value, by.astype(value.dtype)))
        elif name == "mul" and how and how[0] in ("wide", "hi"):
            product = self._get(operands[1], last).astype("u8") * self._get(operands[2], last).astype("u8")
            assert last == "u32"
            self._set(operands[0], product if how[0] == "wide" else (product >> np.uint64(32)).astype("u4"))
        else:
            self._compute(name, how, last, *operands)

    def _compute(self, name: str, how: Sequence[str], last: str, to: str, *operands: str) -> None:
        assert name in PURE, f"{name} is not known"
        exact = how == ["rn"] if last == "f32" and name in ("add", "sub", "mul", "sqrt") else set(how) <= {"lo", "to", "global", "NaN"}
        assert exact, f"{'.'.join((name, *how, last))} is not what the host does"
        assert name not in ("div", "rem") or last[0] == "u"
        kinds = [last] * len(operands) if name != "selp" else [last, last, "pred"]
        values = [self._get(one, kind) for one, kind in zip(operands, kinds, strict=True)]
        made = PURE[name](*values)
        if "NaN" in how:
            made = np.where(np.isnan(values[0]) | np.isnan(values[1]), np.float32("nan"), made)
        self._set(to, made.astype(TYPES[last]))

    def _compared(self, how: str, a: Lanes, b: Lanes) -> Lanes:
        unordered = how.endswith("u") and len(how) == 3  # as in gtu: true if one is NaN; without it, false
        found: Lanes = COMPARISONS[how[:2]](a, b)
        either = (a != a) | (b != b)
        return found | either if unordered else found & ~either

    def _convert(self, how: Sequence[str], source: str, to: str, operand: str) -> None:
        target = how[-1]
        assert target[0] != "f" or list(how) == ["rn", "f32"], f"cvt.{'.'.join(how)}"
        self._set(to, self._get(operand, source).astype(TYPES[target]))

    # --- registers

    def _get(self, operand: str, kind: str) -> Lanes:
        if operand.startswith("%"):
            value = self._special[operand] if operand in self._special else self._registers[operand]
            chosen, bits = value[self._lanes], np.dtype(TYPES[kind]).itemsize
            return chosen if kind == "pred" else chosen.astype(f"u{bits}").view(TYPES[kind])  # of a wider register, the lower part
        if operand.startswith("0f"):
            return np.frombuffer(bytes.fromhex(operand[2:]), ">f4").astype("f4")
        number = int(operand, 0) & ((1 << 8 * np.dtype(TYPES[kind]).itemsize) - 1)
        return np.array([number], f"u{np.dtype(TYPES[kind]).itemsize}").view(TYPES[kind])

    def _set(self, register: str, values: Lanes) -> None:
        """Registers are as wide as their names say; what is less wide is extended, by its sign where it has one."""
        width = {"p": "?", "rd": "u8"}.get(register.strip("%0123456789"), "u4")
        kept = self._registers.setdefault(register, np.zeros(self._count, width))
        if values.dtype.kind == "f":
            values = values.view(f"u{values.dtype.itemsize}")
        assert values.dtype.itemsize <= kept.dtype.itemsize, f"{register} cannot hold {values.dtype}"
        kept[self._lanes] = values.astype(width)

    # --- memory

    def _places(self, operand: str, kind: str, count: int = 1) -> list[tuple[Any, Lanes, NDArray[Any]]]:
        """Of each piece of memory: which lanes are in it, at which of its values, and the piece as such values."""
        base, _, offset = operand.strip("[]").partition("+")
        size = np.dtype(TYPES[kind]).itemsize
        addresses = self._get(base, "u64") + np.uint64(int(offset or 0) & (1 << 64) - 1)
        assert not (addresses % np.uint64(size * count)).any(), f"{operand} is not aligned to {size * count} bytes"
        found, left = [], np.ones(len(addresses), bool)
        for piece in self._memory:
            start = piece.ctypes.data
            inside = (addresses >= start) & (addresses + np.uint64(size * count) <= start + piece.size) & left
            if inside.any():
                first = start % size and size - start % size  # a piece may begin anywhere
                places = (addresses[inside] - np.uint64(start + first)) // np.uint64(size)
                whole = piece[first : first + (piece.size - first) // size * size].view(TYPES[kind])
                found.append((np.flatnonzero(inside), places.astype(np.int64), whole))
                left &= ~inside
        assert not left.any(), f"{operand}: {addresses[left][0]:#x} is nobody's"
        return found

    def _load(self, to: str, operand: str, kind: str) -> None:
        names = re.findall(r"%\w+", to)
        values = [np.zeros(len(self._lanes), TYPES[kind]) for _ in names]
        for lanes, places, piece in self._places(operand, kind, len(names)) if len(self._lanes) else ():
            for k, value in enumerate(values):
                value[lanes] = piece[places + k]
        for name, value in zip(names, values, strict=True):  # an address may be in a register that is written
            self._set(name, value)

    def _store(self, operand: str, source: str, kind: str) -> None:
        names = re.findall(r"[%\w.]+", source)
        for lanes, places, piece in self._places(operand, kind, len(names)) if len(self._lanes) else ():
            for k, name in enumerate(names):
                piece[places + k] = np.broadcast_to(self._get(name, kind), len(self._lanes))[lanes]

    def _swap(self, to: str, operand: str, expected: str, value: str, *, kind: str) -> None:
        old = np.zeros(len(self._lanes), TYPES[kind])
        wanted, new = (np.broadcast_to(self._get(one, kind), len(self._lanes)) for one in (expected, value))
        for lanes, places, piece in self._places(operand, kind) if len(self._lanes) else ():
            for lane, place in zip(lanes, places, strict=True):  # one after another, as atoms are
                old[lane] = piece[place]
                if old[lane] == wanted[lane]:
                    piece[place] = new[lane]
        self._set(to, old)
