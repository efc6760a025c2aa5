"""Differentiate a program: `vjp` maps it to the program of its gradients.

Reverse mode over the instruction list, by the rules of `derivatives`. What comes out is an ordinary
program: the kernels interpret it, the reference runs it, and it can be differentiated again. It
recomputes the forward's values from the accumulator z, so a forward need keep nothing but z;
`without_z` is the form for programs whose gradients follow from what the forward returned anyway
(a chain of relus) or from nothing at all (a chain of sums).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .derivatives import DERIVATIVES, Term, result_serves
from .errors import ProgramError
from .lower import lower
from .norms import spell_group_norm
from .program import ACC, Arg, Builder, Instruction, Operand, Program, Value
from .schedule import schedule
from .simplify import simplify


@dataclass(frozen=True)
class Stored:
    """The forward's output number `output`."""

    output: int


@dataclass(frozen=True)
class Incoming:
    """The incoming gradient of the forward's output number `output`, as large as that output."""

    output: int


Source = Value | Operand | Stored | Incoming
Variable = Value | Operand


@dataclass(frozen=True)
class Gradient:
    """Which gradient this is (`ACC`'s or an operand's), and what holds it: an output of the
    backward program, by number, or an incoming gradient that is passed on as it is."""

    of: Variable
    by: int | Incoming


@dataclass(frozen=True)
class Backward:
    """The gradients of a program, as a program.

    program: None where every gradient is zero or an incoming one. acc: what it takes as its
    accumulator matrix: `ACC`, which is z, unless `without_z` made it. operands: what it takes as
    operands, the forward's first, then its outputs, then incoming gradients; no more than it
    reads. Its views are the forward's, and after them the shape of the accumulator.

    gradients: where each asked one is found, at its full size [M, N] and in the dtype it was
    computed in. An operand's is still to be summed over what the operand is broadcast along, see
    `reduction`, and a gradient wider than its tensor to be cast. zeros: those asked that are zero
    whatever comes in.

    refusal: why no kernel can interpret the program, None where one can.
    """

    program: Program | None
    acc: Source
    operands: tuple[Source, ...]
    gradients: tuple[Gradient, ...]
    zeros: tuple[Variable, ...]
    refusal: str | None


@dataclass(frozen=True)
class Saves:
    """What a forward must keep for its backward, beside the operands: z, or some outputs."""

    z: bool
    outputs: tuple[int, ...]


class Reduction(enum.Enum):
    """How an operand's gradient [M, N] becomes as large as the operand."""

    NONE = "as it is"
    ROWS = "summed over all rows"
    COLUMNS = "summed over all columns"
    ALL = "summed over rows and columns"
    RECURRING = "summed over the rows that read the same row of the operand"
    RECURRING_AND_COLUMNS = "summed over those rows and all columns"


_REDUCTIONS = {
    "full": Reduction.NONE,
    "row": Reduction.ROWS,
    "column": Reduction.COLUMNS,
    "scalar": Reduction.ALL,
}


def reduction(kind: str) -> Reduction:
    """The reduction for an operand of this broadcast kind, as `layout` names it."""
    *recurring, plain = kind.split()
    if not recurring:
        return _REDUCTIONS[plain]
    return Reduction.RECURRING if plain == "full" else Reduction.RECURRING_AND_COLUMNS


@functools.lru_cache(maxsize=1024)
def vjp(
    program: Program, wrt: tuple[Variable, ...], incoming: tuple[int, ...] | None = None
) -> Backward:
    """The gradients of a program with respect to `wrt` (`ACC` and operands), from z.

    incoming: the outputs that have an incoming gradient, by number; None: all. A dropout is the
    identity, because an active one never reaches a kernel. Raises ProgramError where `wrt` names
    an operand the program has not.
    """
    return _differentiate(program, wrt, _Values(program, ()), incoming)


@functools.lru_cache(maxsize=1024)
def without_z(
    program: Program,
    wrt: tuple[Variable, ...],
    incoming: tuple[int, ...] | None = None,
    stored: tuple[int, ...] | None = None,
) -> Backward | None:
    """The same gradients without z: over an output of the forward, or an incoming gradient, in
    place of the accumulator. None where they depend on z. Raises as `vjp` does.

    stored: the outputs that may be read, by number; None: all.
    """
    if any(i.op == "view" for i in program.instructions):
        return None  # neither need be shaped as the accumulator is
    read = tuple(range(len(program.outputs))) if stored is None else stored
    backward = _differentiate(program, wrt, _Values(program, read), incoming)
    if backward.program is None:
        return backward
    if any(ACC in i.args for i in backward.program.instructions):
        return None
    chosen = next(i for i, s in enumerate(backward.operands) if not isinstance(s, Operand))
    place: dict[Arg, Arg] = {Operand(chosen): ACC}
    place |= {Operand(i): Operand(i - 1) for i in range(chosen + 1, len(backward.operands))}
    moved = _renamed(backward.program, place, len(backward.operands) - 1)
    rest = backward.operands[:chosen] + backward.operands[chosen + 1 :]
    return _finished(replace(backward, program=moved, acc=backward.operands[chosen], operands=rest))


def saves(program: Program, wrt: tuple[Variable, ...]) -> Saves:
    """What a forward of this program must keep for the gradients of `wrt`."""
    backward = without_z(program, wrt)
    if backward is None:
        return Saves(True, ())
    sources = (backward.acc, *backward.operands)
    return Saves(False, tuple(s.output for s in sources if isinstance(s, Stored)))


class _Values:
    """The forward's values, and after them the gradients', in one list of instructions."""

    def __init__(self, program: Program, stored: tuple[int, ...]) -> None:
        self.program = program
        self.builder = Builder()
        # Operands are numbered so that what the forward returned, and then the incoming
        # gradients, follow its own; those that nothing reads are dropped in the end.
        outputs = range(len(program.outputs))
        self.sources: tuple[Source, ...] = (
            *(Operand(i) for i in range(program.operand_count)),
            *(Stored(i) for i in outputs),
            *(Incoming(i) for i in outputs),
        )
        for source in self.sources:
            self.builder.operand(source)
        views = [int(i.params[0]) for i in program.instructions if i.op == "view"]
        self.acc_shape = 1 + max(views, default=-1)
        self.stored = {program.outputs[i]: Stored(i) for i in reversed(stored)}
        self.known: list[Term] = [self.taken(0, Term(self.builder, ACC, self.acc_shape))]
        for index, instruction in enumerate(program.instructions, start=1):
            self.known.append(self.taken(index, self.computed(instruction)))

    def source(self, source: Source, shape: int | None = None) -> Term:
        return Term(self.builder, self.builder.operand(source), shape)

    def term(self, arg: Arg) -> Term | float:
        """What an argument of a forward instruction is here."""
        if isinstance(arg, float):
            return arg
        return self.known[arg.index] if isinstance(arg, Value) else self.source(arg)

    def taken(self, index: int, computed: Term) -> Term:
        """Value `index`: read from an output that holds it, where those are given."""
        stored = self.stored.get(Value(index))
        return computed if stored is None else self.source(stored, computed.shape)

    def computed(self, instruction: Instruction) -> Term:
        args = [self.term(a) for a in instruction.args]
        shape = next((a.shape for a in args if isinstance(a, Term) and a.shape is not None), None)
        first = args[0]
        if instruction.op == "dropout" and isinstance(first, Term):
            return first
        if instruction.op == "view":
            if shape is None:
                raise ProgramError("vjp: a view of a value that no accumulator entered")
            shape = int(instruction.params[0])
        plain = [a.arg if isinstance(a, Term) else a for a in args]
        if instruction.op == "group_norm":  # in parts, which the gradients share
            value = spell_group_norm(self._append, plain, instruction.params)
        else:
            value = self._append(instruction.op, tuple(plain), instruction.params)
        return Term(self.builder, value, shape)

    def _append(self, op: str, args: tuple[Arg, ...], params: tuple[float, ...]) -> Value:
        return self.builder.emit(op, *args, params=params)

    def incoming(self, output: int, value: Value) -> Term:
        """The gradient that comes in for an output, shaped as its value."""
        gradient = self.source(Incoming(output))
        shape = self.known[value.index].shape
        if shape is None or shape == self.acc_shape:
            return gradient
        return gradient.emit("view", gradient, params=(float(shape),))

    def contribution(self, index: int, argument: int, gradient: Term) -> Term | None:
        """What instruction `index - 1` passes of its result's gradient to one argument."""
        instruction = self.program.instructions[index - 1]
        rule = DERIVATIVES[instruction.op][argument]
        if rule is None:
            return None
        args = [self.term(a) for a in instruction.args]
        result = self.known[index]
        if self.stored and result_serves(instruction.op, instruction.params):
            args[0] = result
        return rule(gradient, *args, result, *instruction.params)


def _differentiate(
    program: Program,
    wrt: tuple[Variable, ...],
    values: _Values,
    incoming: tuple[int, ...] | None,
) -> Backward:
    for variable in wrt:
        if isinstance(variable, Operand) and variable.index >= program.operand_count:
            raise ProgramError(f"vjp: no operand {variable}: there are {program.operand_count}")
        if isinstance(variable, Value) and variable != ACC:
            raise ProgramError(f"vjp: {variable} is a value, not the accumulator or an operand")
    given = range(len(program.outputs)) if incoming is None else incoming
    gradients = _gradients(program, wrt, values, given)
    found: dict[Variable, Term] = {v: gradients[v] for v in wrt if v in gradients}
    outputs: list[Value] = []
    by: dict[Variable, int | Incoming] = {}
    for variable, gradient in found.items():
        if isinstance(gradient.arg, Value):
            by[variable] = len(outputs)
            outputs.append(gradient.arg)
        else:
            assert isinstance(gradient.arg, Operand)
            source = values.sources[gradient.arg.index]
            assert isinstance(source, Incoming)
            by[variable] = source
    whole = Backward(
        None,
        ACC,
        (),
        tuple(Gradient(v, n) for v, n in by.items()),
        tuple(v for v in wrt if v not in found),
        None,
    )
    return whole if not outputs else _finished(_cleaned(whole, values, outputs))


def _gradients(
    program: Program, wrt: tuple[Variable, ...], values: _Values, incoming: Sequence[int]
) -> Mapping[Variable, Term]:
    """The gradients that are not zero, of values and operands on the way to `wrt`."""
    active: set[Variable] = set(wrt)
    for index, instruction in enumerate(program.instructions, start=1):
        if any(a in active for a in instruction.args if not isinstance(a, float)):
            active.add(Value(index))
    total: dict[Variable, Term] = {}

    def add(variable: Variable, gradient: Term) -> None:
        total[variable] = total[variable] + gradient if variable in total else gradient

    for number in incoming:
        value = program.outputs[number]
        if value in active:
            add(value, values.incoming(number, value))
    for index in range(len(program.instructions), 0, -1):
        gradient = total.get(Value(index))
        if gradient is None:
            continue
        for argument, variable in enumerate(program.instructions[index - 1].args):
            if not isinstance(variable, float) and variable in active:
                part = values.contribution(index, argument, gradient)
                if part is not None:
                    add(variable, part)
    return total


def _cleaned(whole: Backward, values: _Values, outputs: Sequence[Value]) -> Backward:
    """With the program shortened, and what it reads numbered in the order we promise."""
    short = simplify(values.builder.build(outputs))
    kept = sorted(short.operands)
    place: dict[Arg, Arg] = {
        Operand(new): Operand(kept.index(old)) for new, old in enumerate(short.operands)
    }
    stored = tuple(dict.fromkeys(short.program.outputs))
    program = replace(_renamed(short.program, place, len(kept)), outputs=stored)
    where = [stored.index(v) for v in short.program.outputs]
    gradients = tuple(
        g if isinstance(g.by, Incoming) else Gradient(g.of, where[g.by]) for g in whole.gradients
    )
    sources = tuple(values.sources[i] for i in kept)
    return replace(whole, program=program, operands=sources, gradients=gradients)


def _renamed(program: Program, place: Mapping[Arg, Arg], operand_count: int) -> Program:
    instructions = tuple(
        replace(i, args=tuple(place.get(a, a) for a in i.args)) for i in program.instructions
    )
    return Program(instructions, program.outputs, operand_count)


def _finished(backward: Backward) -> Backward:
    """With the program in an order that needs few slots, and its refusal, if any."""
    assert backward.program is not None
    program = schedule(backward.program)
    refusal = None
    try:
        lower(program)
    except ProgramError as error:
        refusal = str(error)
    return replace(backward, program=program, refusal=refusal)
