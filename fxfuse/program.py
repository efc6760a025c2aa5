"""The epilogue program: a group's pointwise work over an accumulator matrix, as plain data.

A program is in single-assignment form. Value 0 is the accumulator, value i the result of
instruction i - 1; an argument is a value, an operand (an extra tensor) or a float. The matcher
builds programs, `simplify` shortens them, `lower` turns them into what the kernels interpret,
`reference` runs them with torch, the report prints them.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .errors import ProgramError
from .ops import CASTS, COMPARISONS, OPS, TRUTH_KEEPING


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
BARE = "store acc"  # the program of a product that nothing follows


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
        return tuple(i.op for i in self.instructions if i.op not in ("copy", "like"))


class Kind(enum.Enum):
    """What is known of a value's dtype before any tensor is seen."""

    ACCUMULATOR = "the accumulator's"
    FLOATING = "some floating dtype"
    BOOL = "bool"
    UNKNOWN = "unknown"


def kind_of(instruction: Instruction, kinds: Sequence[Kind]) -> Kind:
    """Kind of an instruction's value, given those of all values before it."""
    op, args = instruction.op, instruction.args
    if op in COMPARISONS:
        return Kind.BOOL
    if op in CASTS:
        return Kind.FLOATING
    args = args[1:] if op in ("where", "like") else args
    found = {kinds[a.index] for a in args if isinstance(a, Value)}
    operands = any(isinstance(a, Operand) for a in args)
    if found & {Kind.ACCUMULATOR, Kind.FLOATING}:
        widened = operands or Kind.FLOATING in found or Kind.UNKNOWN in found
        return Kind.FLOATING if widened else Kind.ACCUMULATOR
    numbers = any(isinstance(a, float) for a in args)
    if found == {Kind.BOOL} and op in TRUTH_KEEPING and not operands and not numbers:
        return Kind.BOOL
    return Kind.UNKNOWN


def kinds_of(instructions: Sequence[Instruction]) -> list[Kind]:
    """Kind of every value, the accumulator first."""
    kinds = [Kind.ACCUMULATOR]
    for instruction in instructions:
        kinds.append(kind_of(instruction, kinds))
    return kinds


def shape_classes(
    instructions: Sequence[Instruction], widens: Callable[[Operand], bool]
) -> list[int]:
    """For each value a number; values of equal numbers are certain to have equal shapes.

    widens: whether an operand may give a result more rows or columns than its other arguments.
    """
    classes = [0]
    for index, instruction in enumerate(instructions, start=1):
        met = {classes[a.index] for a in instruction.args if isinstance(a, Value)}
        kept = len(met) == 1 and instruction.op != "view"
        kept = kept and not any(widens(a) for a in instruction.args if isinstance(a, Operand))
        classes.append(met.pop() if kept else index)
    return classes


def adds_truth_values(instructions: Sequence[Instruction], start: int) -> bool:
    """Whether an instruction from `start` on may be a sum of bools, torch's logical or."""
    kinds = kinds_of(instructions)
    for instruction in instructions[start:]:
        values = [a for a in instruction.args if isinstance(a, Value)]
        floating = any(kinds[v.index] in (Kind.ACCUMULATOR, Kind.FLOATING) for v in values)
        numbers = any(isinstance(a, float) for a in instruction.args)
        if instruction.op in ("add", "sub") and values and not floating and not numbers:
            return True
    return False


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
