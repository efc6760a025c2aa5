"""Choose what the forward of a fused call keeps for its backward, by memory.

Nothing beyond the outputs where the gradients follow from those, else the product z, else another
intermediate value, as long as that is no more than eager's autograd would keep for the same ops;
where all of them are more, z is computed again from the call's inputs. Among the outputs the
backward reads only those that eager keeps, too: any other may be written in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import reference, routes
from .infer import Call, Result, infer
from .program import ACC, Kind, Operand, Program, Value, kinds_of
from .vjp import Backward, Stored, Variable, vjp, without_z


@dataclass(frozen=True)
class _Eager:
    """What eager's autograd keeps: bytes beyond the outputs, which outputs, and which operands."""

    bytes: int
    outputs: tuple[int, ...]
    operands: frozenset[int]


@dataclass(frozen=True)
class Choice:
    """One way to keep what the backward needs. excess: bytes more than eager keeps."""

    kept: tuple[Value, ...]
    stored: tuple[int, ...]
    from_z: bool
    recompute: bool
    backward: Backward
    excess: int


def choose(
    call: Call,
    result: Result,
    wrt: tuple[Variable, ...],
    needs: tuple[bool, ...],
) -> Choice:
    """The first way that keeps no more than eager does and that a kernel can run, else the one that
    comes closest to it."""
    best: Choice | None = None
    for choice in _choices(call, result, wrt, needs):
        if choice.backward.refusal is None and choice.excess <= 0:
            return choice
        if best is None or _order(choice) < _order(best):
            best = choice
    assert best is not None
    return best


def _order(choice: Choice) -> tuple[bool, int]:
    return choice.backward.refusal is not None, max(choice.excess, 0)


def _choices(
    call: Call, result: Result, wrt: tuple[Variable, ...], needs: tuple[bool, ...]
) -> Iterator[Choice]:
    program, count = call.program, len(call.program.outputs)
    eager = _kept_by_eager(call, result, wrt)
    elements = math.prod(result.acc_shape)

    def extra(backward: Backward) -> int:
        """Bytes of operands as large as the accumulator that the backward reads and eager does not
        keep; smaller ones are weights or as good as nothing."""
        read = {s.index for s in (backward.acc, *backward.operands) if isinstance(s, Operand)}
        tensors = [call.operands[i] for i in read - eager.operands]
        return sum(t.numel() * t.element_size() for t in tensors if t.numel() >= elements)

    from_outputs = without_z(program, wrt, None, eager.outputs)
    if from_outputs is not None:
        yield Choice((), eager.outputs, False, False, from_outputs, extra(from_outputs))
    from_z = vjp(program, wrt)
    z_bytes = elements * result.acc_dtype.itemsize
    over = extra(from_z) - eager.bytes
    if call.weight is None:
        yield Choice((), (), True, False, from_z, over + z_bytes)
    elif _serves(call, (ACC,)):
        yield Choice((ACC,), (), True, False, from_z, over + z_bytes)
    kinds = kinds_of(program.instructions)
    for index in range(1, len(program.instructions) + 1):
        value = Value(index)
        if kinds[index] not in (Kind.ACCUMULATOR, Kind.FLOATING) or value in program.outputs:
            continue
        wide = storing(program, (value,))
        stored = (*eager.outputs, count)
        backward = without_z(wide, wrt, tuple(range(count)), stored)
        if backward is None or not _serves(call, (value,)):
            continue
        dtype = infer(replace(call, program=wide)).dtypes[count]
        held = elements * dtype.itemsize
        yield Choice((value,), stored, False, False, backward, extra(backward) + held - eager.bytes)
    if call.weight is not None:
        held = 0 if needs[1] else call.x.numel() * call.x.element_size()
        yield Choice((), (), True, True, from_z, over + held)


def _serves(call: Call, kept: tuple[Value, ...]) -> bool:
    """Whether a kernel can store these values, too."""
    wide = replace(call, program=storing(call.program, kept))
    return routes.prepare(wide).route != "reference"


def _kept_by_eager(call: Call, result: Result, wrt: tuple[Variable, ...]) -> _Eager:
    """What torch's autograd saves while the reference runs, found on tensors without memory."""
    acc, operands = _without_memory(call, result, wrt)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = reference.run(call.program, acc, operands, views=call.views)
    storage = lambda t: t.untyped_storage()._cdata  # noqa: E731
    of_outputs = tuple(i for i, o in enumerate(outputs) if storage(o) in kept)
    of_operands = frozenset(i for i, o in enumerate(operands) if storage(o) in kept)
    given = {storage(t) for t in (*outputs, *operands)}
    size = sum(t.untyped_storage().nbytes() for s, t in kept.items() if s not in given)
    return _Eager(size, of_outputs, of_operands)


def _without_memory(
    call: Call, result: Result, wrt: tuple[Variable, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Accumulator and operands on the meta device, those of `wrt` requiring gradients."""

    def meta(shape: Sequence[int], dtype: torch.dtype, variable: Variable) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return tensor.requires_grad_(variable in wrt)

    acc = meta(result.acc_shape, result.acc_dtype, ACC)
    return acc, [meta(o.shape, o.dtype, Operand(i)) for i, o in enumerate(call.operands)]


def flat_variables(call: Call, result: Result, wrt: tuple[Variable, ...]) -> frozenset[Variable]:
    """Variables whose gradients are zeros, and not missing, in eager: rounded values."""
    zeros = vjp(call.program, wrt).zeros
    if not zeros:
        return frozenset()
    acc, operands = _without_memory(call, result, wrt)
    with torch.enable_grad():
        outputs = reference.run(call.program, acc, operands, views=call.views)
        outputs = tuple(o.sum() for o in outputs if o.requires_grad)
    tensors = [operands[v.index] if isinstance(v, Operand) else acc for v in zeros]
    if not outputs:
        return frozenset()
    found = torch.autograd.grad(outputs, tensors, allow_unused=True)
    return frozenset(v for v, g in zip(zeros, found, strict=True) if g is not None)


def storing(program: Program, kept: tuple[Value, ...]) -> Program:
    return replace(program, outputs=program.outputs + kept)


def in_words(program: Program, choice: Choice) -> str:
    if choice.recompute:
        return "computes z again"
    if choice.kept == (ACC,) or (choice.from_z and not choice.kept):
        return "keeps z"
    if choice.kept:
        value = choice.kept[0]
        return f"keeps the {program.instructions[value.index - 1].op} ({value})"
    sources = (choice.backward.acc, *choice.backward.operands)
    read = {s.output for s in sources if isinstance(s, Stored)}
    if choice.backward.program is None or not read:
        return "keeps nothing"
    return "keeps its output" if len(read) == 1 else "keeps its outputs"


def backward_of(
    program: Program,
    wrt: tuple[Variable, ...],
    incoming: tuple[int, ...] | None,
    from_z: bool,
    stored: tuple[int, ...],
) -> Backward:
    found = None if from_z else without_z(program, wrt, incoming, stored)
    return vjp(program, wrt, incoming) if found is None else found
