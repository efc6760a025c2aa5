"""Shorten a program without changing what it computes.

Three kinds of rewriting, each provable from the op table alone: an instruction that returns its
argument (a clamp whose bounds the argument's interval already obeys, `* 1`, `/ 1`, `- 0`) is
dropped; `x * sigmoid(x)` is silu; equal instructions are one. NaN needs no care: every op dropped
for its interval passes NaN on. Truth values do: `mask * 1.0` turns them into numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .ops import COMMUTATIVE, OPS, REALS, Interval
from .program import ACC, Arg, Instruction, Kind, Operand, Program, Value, kind_of

# Ops whose result is +0.0 where it is a zero; abs of any other may have to clear a sign.
_NO_NEGATIVE_ZERO = frozenset({"abs", "square", "exp", "exp2", "sigmoid"})


@dataclass(frozen=True)
class Simplified:
    """A shorter program, the operands of the old one it still reads (in its order), and in words
    what was dropped or recognised."""

    program: Program
    operands: tuple[int, ...]
    notes: tuple[str, ...]


class _Rewriter:
    """One pass from the first instruction to the last, over values of the new program."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.intervals: list[Interval] = [REALS]
        self.kinds: list[Kind] = [Kind.ACCUMULATOR]
        self.known: dict[str, Value] = {}
        self.notes: list[str] = []

    def interval(self, arg: Arg) -> Interval:
        if isinstance(arg, Value):
            return self.intervals[arg.index]
        return REALS if isinstance(arg, Operand) else Interval(arg, arg)

    def definition(self, arg: Arg) -> Instruction | None:
        if isinstance(arg, Value) and arg != ACC:
            return self.instructions[arg.index - 1]
        return None

    def rewrite(self, instruction: Instruction) -> Value:
        """The value of the new program that equals `instruction` (already in new values)."""
        same = self.redundant(instruction)
        if same is not None:
            return same
        instruction = self.canonical(instruction)
        spelled = repr(instruction)  # unlike the floats themselves, tells 0.0 from -0.0
        if spelled in self.known and _is_pure(instruction.op):
            return self.known[spelled]
        self.instructions.append(instruction)
        value = Value(len(self.instructions))
        intervals = tuple(self.interval(a) for a in instruction.args)
        self.intervals.append(OPS[instruction.op].result_range(intervals, instruction.params))
        self.kinds.append(kind_of(instruction, self.kinds))
        self.known[spelled] = value
        return value

    def redundant(self, instruction: Instruction) -> Value | None:
        """The argument `instruction` is certain to return unchanged, if there is one."""
        op, args = instruction.op, instruction.args
        first = args[0]
        if op in ("mul", "add") and isinstance(first, float):
            first, args = args[1], (args[1], args[0])
        if not isinstance(first, Value):
            return None
        if op == "copy":
            return first
        kind = self.kinds[first.index]
        if op == "like" and isinstance(args[1], Value):
            both = (kind, self.kinds[args[1].index])
            return first if both == (Kind.ACCUMULATOR, Kind.ACCUMULATOR) else None
        # A float beside a floating tensor never changes its dtype.
        if kind in (Kind.ACCUMULATOR, Kind.FLOATING) and _is_neutral(op, args[1:]):
            return first
        interval = self.interval(first)
        bounds = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "clamp": instruction.params}
        bounds["hardtanh"] = instruction.params
        if op in bounds and interval.within(*bounds[op]):
            spelled = f"{op}({', '.join(f'{p:g}' for p in instruction.params)})"
            self.notes.append(
                f"{spelled} dropped: its argument lies in [{interval.low:g}, {interval.high:g}]"
            )
            return first
        definition = self.definition(first)
        positive = interval.low > 0 or (definition and definition.op in _NO_NEGATIVE_ZERO)
        if op == "abs" and positive:
            self.notes.append("abs dropped: its argument is not negative")
            return first
        return None

    def canonical(self, instruction: Instruction) -> Instruction:
        """A cheaper or more telling form of the same instruction."""
        op, args = instruction.op, instruction.args
        if op == "mul":
            for x, other in (args, args[::-1]):
                definition = self.definition(other)
                floating = isinstance(x, Value) and self.kinds[x.index] != Kind.BOOL
                is_sigmoid = definition is not None and definition.op == "sigmoid"
                if floating and is_sigmoid and definition and definition.args[0] == x:
                    self.notes.append("x * sigmoid(x) recognised as silu")
                    return Instruction("silu", (x,))
        if op == "div" and isinstance(args[1], float) and _is_power_of_two(args[1]):
            return Instruction("mul", (args[0], 1.0 / args[1]))
        swappable = op in COMMUTATIVE and isinstance(args[0], (float, Operand))
        if swappable and isinstance(args[1], Value):
            return Instruction(op, (args[1], args[0]))
        return instruction


def _is_neutral(op: str, rest: tuple[Arg, ...]) -> bool:
    """Whether `op(x, *rest)` is x for every x, -0.0 included."""
    if not rest or not isinstance(rest[0], float):
        return False
    if op in ("mul", "div"):
        return rest[0] == 1.0
    return op == "sub" and rest[0] == 0.0 and math.copysign(1.0, rest[0]) > 0


def _is_pure(op: str) -> bool:
    """Whether equal instructions have equal results: two dropouts draw different numbers."""
    return op != "dropout"


def _is_power_of_two(x: float) -> bool:
    """Whether 1 / x is exact and normal in every dtype we compute in."""
    return (
        x != 0 and math.isfinite(x) and abs(math.frexp(x)[0]) == 0.5 and 2**-14 <= abs(x) <= 2**14
    )


def simplify(program: Program) -> Simplified:
    """The shortest equivalent program these rules reach."""
    rewriter = _Rewriter()
    values: list[Value] = [ACC]
    for instruction in program.instructions:
        args = tuple(values[a.index] if isinstance(a, Value) else a for a in instruction.args)
        values.append(rewriter.rewrite(Instruction(instruction.op, args, instruction.params)))
    outputs = tuple(values[v.index] for v in program.outputs)
    return _drop_unused(rewriter, outputs)


def _drop_unused(rewriter: _Rewriter, outputs: tuple[Value, ...]) -> Simplified:
    """Keep what the outputs need, renumbering values and operands.

    A dropout draws random numbers whether its result is read or not, so it stays.
    """
    needed = {v.index for v in outputs}
    needed |= {i for i, d in enumerate(rewriter.instructions, start=1) if not _is_pure(d.op)}
    for index in range(len(rewriter.instructions), 0, -1):
        if index in needed:
            args = rewriter.instructions[index - 1].args
            needed.update(a.index for a in args if isinstance(a, Value))
    values: dict[int, Value] = {0: ACC}
    operands: dict[int, Operand] = {}
    kept: list[Instruction] = []

    def renumber(arg: Arg) -> Arg:
        if isinstance(arg, Value):
            return values[arg.index]
        if isinstance(arg, Operand):
            return operands.setdefault(arg.index, Operand(len(operands)))
        return arg

    for index, instruction in enumerate(rewriter.instructions, start=1):
        if index in needed:
            args = tuple(renumber(a) for a in instruction.args)
            kept.append(Instruction(instruction.op, args, instruction.params))
            values[index] = Value(len(kept))
    program = Program(tuple(kept), tuple(values[v.index] for v in outputs), len(operands))
    return Simplified(program, tuple(operands), tuple(dict.fromkeys(rewriter.notes)))
