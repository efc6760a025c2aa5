"""The epilogue program: a group's pointwise work over an accumulator matrix, as plain data.

A program is in single-assignment form. Value 0 is the accumulator, value i the result of
instruction i - 1; an argument is a value, an operand (an extra tensor) or a float. The matcher
builds programs, `simplify` shortens them, `lower` turns them into what the kernels interpret,
`reference` runs them with torch, the report prints them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import ProgramError
from .ops import OPS


@dataclass(frozen=True)
class Value:
    """Result of instruction `index - 1`; index 0 is the accumulator."""

    index: int

    def __str__(self) -> str:
        return f"t{self.index}" if self.index else "acc"


@dataclass(frozen=True)
class Operand:
    """The extra tensor number `index` of the call."""

    index: int

    def __str__(self) -> str:
        return f"${self.index}"


Arg = Value | Operand | float
ACC = Value(0)


@dataclass(frozen=True)
class Instruction:
    """`op(*args, *params)`; op is a row of `ops.OPS`."""

    op: str
    args: tuple[Arg, ...]
    params: tuple[float, ...] = ()


@dataclass(frozen=True)
class Program:
    """Instructions over an accumulator [M, N], and the values stored, in output order.

    Raises ProgramError where an instruction names an unknown op, has the wrong number of
    arguments or parameters, or reads a value before it exists.
    """

    instructions: tuple[Instruction, ...]
    outputs: tuple[Value, ...]
    operand_count: int

    def __post_init__(self) -> None:
        for position, instruction in enumerate(self.instructions):
            _check(instruction, position, self.operand_count)
        for value in self.outputs:
            if value.index > len(self.instructions):
                raise ProgramError(
                    f"program: store {value}: only {len(self.instructions)} values exist"
                )
        if not self.outputs:
            raise ProgramError("program: no output is stored")

    def __str__(self) -> str:
        """The canonical text, which `parse` reads back."""
        return "; ".join(_lines(self, {}))

    def render(self, operand_names: Mapping[int, str]) -> str:
        """The program for people: one instruction a line, operands by name or broadcast kind."""
        return "\n".join(_lines(self, operand_names))

    @property
    def chain(self) -> tuple[str, ...]:
        """The op names in order, as in `add -> silu -> tanh`."""
        return tuple(i.op for i in self.instructions if i.op != "copy")


def _check(instruction: Instruction, position: int, operand_count: int) -> None:
    op = OPS.get(instruction.op)
    if op is None:
        raise ProgramError(f"program: instruction {position}: unknown op {instruction.op!r}")
    if len(instruction.args) != op.arity or len(instruction.params) != len(op.params):
        raise ProgramError(
            f"program: instruction {position}: {op.name} takes {op.arity} arguments and "
            f"{len(op.params)} parameters, got {len(instruction.args)} and "
            f"{len(instruction.params)}"
        )
    for arg in instruction.args:
        if isinstance(arg, Value) and arg.index > position:
            raise ProgramError(f"program: instruction {position}: {arg} does not exist yet")
        if isinstance(arg, Operand) and arg.index >= operand_count:
            raise ProgramError(
                f"program: instruction {position}: operand {arg.index} of {operand_count}"
            )


def _lines(program: Program, operand_names: Mapping[int, str]) -> list[str]:
    def spell(arg: Arg) -> str:
        if isinstance(arg, Operand):
            return operand_names.get(arg.index, str(arg))
        return str(arg) if isinstance(arg, Value) else repr(float(arg))

    lines = []
    for index, instruction in enumerate(program.instructions, start=1):
        words = [spell(a) for a in instruction.args] + [repr(float(p)) for p in instruction.params]
        lines.append(f"{Value(index)} = {instruction.op} {', '.join(words)}")
    lines.append("store " + ", ".join(str(v) for v in program.outputs))
    return lines


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    """The program a canonical text stands for; `parse(str(p)) == p`.

    Raises ProgramError on anything `str(Program)` would not have written.
    """

    def argument(word: str) -> Arg:
        if word == "acc":
            return ACC
        if word[:1] == "$":
            return Operand(int(word[1:]))
        if word[:1] == "t":
            return Value(int(word[1:]))
        return float(word)

    try:
        *body, last = [line.strip() for line in text.split(";")]
        instructions = []
        for position, line in enumerate(body, start=1):
            target, _, right = line.partition(" = ")
            if target != f"t{position}":
                raise ValueError(f"expected t{position}, found {target!r}")
            name, _, rest = right.partition(" ")
            arity = OPS[name].arity
            words = [argument(w.strip()) for w in rest.split(",")]
            params = [w for w in words[arity:] if isinstance(w, float)]
            instructions.append(Instruction(name, tuple(words[:arity]), tuple(params)))
        if not last.startswith("store "):
            raise ValueError(f"expected store, found {last!r}")
        outputs = [argument(w.strip()) for w in last.removeprefix("store ").split(",")]
        operands = [a.index for i in instructions for a in i.args if isinstance(a, Operand)]
        return Program(
            tuple(instructions),
            tuple(v for v in outputs if isinstance(v, Value)),
            max(operands, default=-1) + 1,
        )
    except (ValueError, KeyError) as error:
        raise ProgramError(f"program: cannot read {text!r}: {error}") from None


class Builder:
    """Collects instructions; operands are numbered in order of first use, by key."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.operands: dict[object, Operand] = {}

    def operand(self, key: object) -> Operand:
        """The operand for `key`, numbered anew where it was not used before."""
        return self.operands.setdefault(key, Operand(len(self.operands)))

    def emit(self, op: str, *args: Arg, params: Sequence[float] = ()) -> Value:
        """Append an instruction; returns its value. Raises ProgramError as Program does."""
        instruction = Instruction(op, tuple(args), tuple(float(p) for p in params))
        _check(instruction, len(self.instructions), len(self.operands))
        self.instructions.append(instruction)
        return Value(len(self.instructions))

    def build(self, outputs: Sequence[Value]) -> Program:
        """The program so far, storing `outputs`."""
        return Program(tuple(self.instructions), tuple(outputs), len(self.operands))
