"""Lower a program to the instruction list the kernels interpret.

The kernels are accumulator machines: an instruction reads what the one before left, one of a few
slots, an operand or an immediate, and may keep its result in a slot or store it. Lowering decides
which values need a slot and for how long.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from .errors import ProgramError
from .norms import without_norms
from .program import ACC, Arg, Instruction, Operand, Program, Value

# The limits of kernels/include/fxfuse.h; `library` checks that both agree.
MAX_INSTRUCTIONS = 48
MAX_OPERANDS = 8
MAX_OUTPUTS = 6
MAX_SLOTS = 6

_IDENTITIES = frozenset({"copy", "dropout", "like", "view"})
_SAME_FUNCTOR = {"hardtanh": "clamp"}


class Source(enum.IntEnum):
    """Where an argument comes from (fxfuse_source)."""

    PREVIOUS = 0
    SLOT = 1
    OPERAND = 2
    IMMEDIATE = 3


@dataclass(frozen=True)
class Step:
    """One fxfuse_instruction, with the op still by name. save and store are -1 where absent."""

    op: str
    sources: tuple[tuple[Source, int], ...]
    immediates: tuple[float, ...] = ()
    save: int = -1
    store: int = -1


def lower(program: Program, double: bool = False) -> tuple[Step, ...]:
    """The steps of a program.

    double: values are held in fp64, where a cast to fp32 rounds.
    Raises ProgramError where it needs more instructions, operands, outputs or slots than a kernel
    holds; the message names the limit.
    """
    _limit("operands", program.operand_count, MAX_OPERANDS)
    _limit("outputs", len(program.outputs), MAX_OUTPUTS)
    instructions, outputs = _without_identities(without_norms(program), double)
    instructions, stores = _with_copies_for_stores(instructions, outputs)
    _limit("instructions", len(instructions), MAX_INSTRUCTIONS)
    last_use: dict[Value, int] = {}
    for position, (_, instruction) in enumerate(instructions):
        for arg in instruction.args:
            if isinstance(arg, Value):
                last_use[arg] = position
    slots: dict[Value, int] = {}
    steps: list[Step] = []
    previous = ACC
    for position, (value, instruction) in enumerate(instructions):
        sources, immediates = _sources(instruction, previous, slots)
        for held in [v for v in slots if last_use.get(v, -1) <= position]:
            del slots[held]
        save = -1
        if last_use.get(value, -1) > position + 1:
            free = [s for s in range(MAX_SLOTS) if s not in slots.values()]
            if not free:
                raise ProgramError(
                    f"program: more than {MAX_SLOTS} intermediate values are alive at once"
                )
            save = slots[value] = free[0]
        steps.append(Step(instruction.op, sources, immediates, save, stores.get(position, -1)))
        previous = value
    return tuple(steps)


def _limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ProgramError(f"program: {count} {what}, a kernel holds at most {limit}")


def _without_identities(
    program: Program, double: bool
) -> tuple[list[tuple[Value, Instruction]], tuple[Value, ...]]:
    """Instructions with the value each defines; ops that return their argument are gone, and what
    nothing but the second argument of a `like` read.

    Unless values are held in fp64 a cast to fp32 returns its argument, too.
    """
    identities = _IDENTITIES if double else _IDENTITIES | {"cast_f32"}
    alias: dict[Value, Arg] = {ACC: ACC}
    kept: list[tuple[Value, Instruction]] = []
    for index, instruction in enumerate(program.instructions, start=1):
        args = tuple(alias[a] if isinstance(a, Value) else a for a in instruction.args)
        if instruction.op in identities and isinstance(args[0], Value):
            alias[Value(index)] = args[0]
            continue
        alias[Value(index)] = Value(index)
        op = _SAME_FUNCTOR.get(instruction.op, instruction.op)
        op = "copy" if op in identities else op
        kept.append((Value(index), replace(instruction, op=op, args=args)))
    outputs = tuple(v for v in (alias[v] for v in program.outputs) if isinstance(v, Value))
    needed = set(outputs)
    for value, instruction in reversed(kept):
        if value in needed:
            needed.update(a for a in instruction.args if isinstance(a, Value))
    return [(value, instruction) for value, instruction in kept if value in needed], outputs


def _with_copies_for_stores(
    instructions: list[tuple[Value, Instruction]], outputs: tuple[Value, ...]
) -> tuple[list[tuple[Value, Instruction]], dict[int, int]]:
    """Insert copies where a value that no instruction can store, or save, must be.

    An instruction stores to one output; a second output of the same value, and the accumulator
    itself, are stored by a copy. The accumulator is copied as well where anything but the first
    instruction reads it, so that it has a slot.
    """
    pending: dict[Value, list[int]] = {}
    for number, value in enumerate(outputs):
        pending.setdefault(value, []).append(number)
    result: list[tuple[Value, Instruction]] = []
    stores: dict[int, int] = {}
    fresh = -1  # values of inserted copies that nothing reads
    acc_read_late = any(ACC in i.args for _, i in instructions[1:])
    if ACC in pending or acc_read_late or not instructions:
        result.append((ACC, Instruction("copy", (ACC,))))
        for extra, number in enumerate(pending.get(ACC, [])):
            if extra:
                result.append((Value(fresh), Instruction("copy", (ACC,))))
                fresh -= 1
            stores[len(result) - 1] = number
    for value, instruction in instructions:
        result.append((value, instruction))
        for extra, number in enumerate(pending.get(value, [])):
            if extra:
                result.append((Value(fresh), Instruction("copy", (value,))))
                fresh -= 1
            stores[len(result) - 1] = number
    return result, stores


def _sources(
    instruction: Instruction, previous: Value, slots: dict[Value, int]
) -> tuple[tuple[tuple[Source, int], ...], tuple[float, ...]]:
    sources: list[tuple[Source, int]] = []
    immediates: list[float] = list(instruction.params)
    for arg in instruction.args:
        if isinstance(arg, Operand):
            sources.append((Source.OPERAND, arg.index))
        elif isinstance(arg, float):
            sources.append((Source.IMMEDIATE, len(immediates)))
            immediates.append(arg)
        elif arg == previous:
            sources.append((Source.PREVIOUS, 0))
        else:
            sources.append((Source.SLOT, slots[arg]))
    if len(immediates) > 2:
        raise ProgramError(f"program: {instruction.op} needs {len(immediates)} floats, limit 2")
    return tuple(sources), tuple(immediates)
