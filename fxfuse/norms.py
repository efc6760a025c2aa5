"""Norms in the terms of the kernels' ops over groups of columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .ops import GROUP_OPS
from .program import ACC, Arg, Instruction, Program, Value

Append = Callable[[str, tuple[Arg, ...], tuple[float, ...]], Value]


def spell_group_norm(append: Append, args: Sequence[Arg], params: tuple[float, ...]) -> Value:
    """`group_norm(*args)` by `append(op, args, params)`.

    args: x, weight (1.0 for none) and bias (0.0 for none). params: the number of groups, and eps.
    """
    x, weight, bias = args
    value = append("normalize", (x,), params)
    if weight != 1.0:
        value = append("mul", (value, weight), ())
    return value if bias == 0.0 else append("add", (value, bias), ())


def has_groups(program: Program) -> bool:
    """Whether any value depends on a group of columns."""
    return any(i.op in GROUP_OPS for i in program.instructions)


def without_norms(program: Program) -> Program:
    """The program with each norm spelled out."""
    if all(i.op != "group_norm" for i in program.instructions):
        return program
    instructions: list[Instruction] = []
    values: list[Value] = [ACC]

    def append(op: str, args: tuple[Arg, ...], params: tuple[float, ...]) -> Value:
        instructions.append(Instruction(op, args, params))
        return Value(len(instructions))

    for instruction in program.instructions:
        args = tuple(values[a.index] if isinstance(a, Value) else a for a in instruction.args)
        if instruction.op == "group_norm":
            values.append(spell_group_norm(append, args, instruction.params))
        else:
            values.append(append(instruction.op, args, instruction.params))
    outputs = tuple(values[v.index] for v in program.outputs)
    return replace(program, instructions=tuple(instructions), outputs=outputs)
