"""Order a program's instructions so that few intermediate values must be held at once.

The kernels are accumulator machines (see `lower`): a value read by the next instruction costs
nothing, any other must be kept in one of a few slots. Which order needs the fewest is a pebbling
problem; a beam search finds a good one for programs as short as ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .lower import MAX_SLOTS
from .program import Program, Value

_WIDTH = 16


@dataclass(frozen=True)
class _Partial:
    """Some instructions in order. held: values in slots; saved: how many were put into one."""

    order: tuple[int, ...]
    done: int
    held: frozenset[int]
    peak: int
    saved: int

    @property
    def cost(self) -> tuple[int, int, int, tuple[int, ...]]:
        """Beyond the slots there are, fewer at once count most; below, fewer saves do."""
        return max(self.peak, MAX_SLOTS), self.saved, self.peak, self.order


def schedule(program: Program) -> Program:
    """The same program, its instructions in the order that needs the fewest slots that a beam
    search finds."""
    count = len(program.instructions)
    needs = [0] * (count + 1)  # bit v: value v is an argument
    readers = [0] * (count + 1)  # bit i: instruction i (which makes value i) reads it
    for index, instruction in enumerate(program.instructions, start=1):
        for value in (a.index for a in instruction.args if isinstance(a, Value)):
            needs[index] |= 1 << value
            readers[value] |= 1 << index
    beam = [_Partial((0,), 1, frozenset(), 0, 0)]
    for _ in range(count):
        best: dict[tuple[int, int], _Partial] = {}
        for partial in beam:
            for index in range(1, count + 1):
                if partial.done >> index & 1 or needs[index] & ~partial.done:
                    continue
                longer = _extended(partial, index, readers)
                state = longer.done, index
                if state not in best or longer.cost < best[state].cost:
                    best[state] = longer
        beam = sorted(best.values(), key=lambda p: p.cost)[:_WIDTH]
    order = beam[0].order
    place = {old: Value(new) for new, old in enumerate(order)}
    instructions = tuple(
        replace(i, args=tuple(place[a.index] if isinstance(a, Value) else a for a in i.args))
        for i in (program.instructions[index - 1] for index in order[1:])
    )
    outputs = tuple(place[v.index] for v in program.outputs)
    return Program(instructions, outputs, program.operand_count)


def _extended(partial: _Partial, index: int, readers: list[int]) -> _Partial:
    """With one more instruction. What the last one left is saved if others will read it, too."""
    done = partial.done | 1 << index
    previous = partial.order[-1]
    held, peak, saved = partial.held, partial.peak, partial.saved
    if readers[previous] & ~done:
        held |= {previous}
        peak, saved = max(peak, len(held)), saved + 1
    held = frozenset(v for v in held if readers[v] & ~done)
    return _Partial((*partial.order, index), done, held, peak, saved)
