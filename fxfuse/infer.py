"""Say what a fused call returns, before it runs: shapes and dtypes, or the error eager would give.

Shapes follow from broadcasting, in plain Python; dtypes from running the reference once on meta
tensors, which is remembered. (Running it for every shape would cost milliseconds.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from . import reference
from .errors import OperandShapeError
from .layout import resolve_view
from .ops import GROUP_OPS
from .program import Instruction, Operand, Program, Value
from .vjp import Reduction

Tensors = Sequence[torch.Tensor]
Described = tuple[Sequence[int], torch.dtype]


class Store(NamedTuple):
    """How an output is left: in which dtype, and whether summed before, in fp32 or wider: to [N]
    over all rows, to [M] over all columns or to a single element."""

    reduction: Reduction
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """A fused call as its caller describes it. Without weight, x itself is the accumulator.

    stores: one for each output, none where outputs are what torch's own ops make of them. With
    stores an output covers the whole accumulator, whatever it is computed from. normwise: columns
    of the product need be as exact as the largest of them, not each for itself. in_place: the first
    output is written over the first operand, which has its shape and dtype and is not read by any
    instruction after the one that stores. lets_go: "x" or "weight", whose storage nobody reads
    after the call: it may be freed once the kernels have read it, before outputs are allocated.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    operands: Tensors
    program: Program
    transposed: bool
    views: tuple[tuple[int, ...], ...]
    site: str
    stores: tuple[Store, ...] = ()
    normwise: bool = False
    in_place: bool = False
    lets_go: str = ""


@dataclass(frozen=True)
class Result:
    """What a call returns: shape of the accumulator, and shape and dtype of each output, before it
    is summed where its reduction says so."""

    acc_shape: tuple[int, ...]
    acc_dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    reductions: tuple[Reduction, ...] = ()


def infer(call: Call) -> Result:
    """Shapes and dtypes of the outputs, as torch's own ops give them.

    Raises OperandShapeError where an operand does not broadcast, or x and weight do not fit.
    """
    acc_shape, acc_dtype = tuple(call.x.shape), call.x.dtype
    if call.weight is not None:
        x, weight = (call.x.shape, acc_dtype), (call.weight.shape, call.weight.dtype)
        bias = None if call.bias is None else (call.bias.shape, call.bias.dtype)
        try:
            acc_shape, acc_dtype = _product(x, weight, bias, call.transposed)
        except RuntimeError as error:
            factors = " and weight ".join(f"{tuple(s)} {d}" for s, d in (x, weight))
            raise OperandShapeError(
                f"{call.site or 'fused call'}: x {factors} cannot be multiplied: {error}"
            ) from None
    shapes: list[tuple[int, ...]] = [acc_shape]
    for instruction in call.program.instructions:
        met = _shapes_of(instruction, shapes, call.operands)
        try:
            shapes.append(_result_shape(instruction, met, call.views))
        except (RuntimeError, IndexError) as error:
            raise _shape_error(call.program, instruction, met, call.site, error) from None
    dtypes = _result_dtypes(
        call.program,
        (min(len(acc_shape), 2), acc_dtype),
        tuple((min(o.dim(), 2), o.dtype) for o in call.operands),
    )
    outputs = tuple(shapes[v.index] for v in call.program.outputs)
    plain = (Reduction.NONE,) * len(outputs)
    result = Result(acc_shape, acc_dtype, outputs, dtypes, plain)
    return _stored(result, call) if call.stores else result


def _stored(result: Result, call: Call) -> Result:
    """What a call with `stores` returns."""
    if not call.views:
        result = replace(result, shapes=(result.acc_shape,) * len(call.stores))
    reductions, dtypes = zip(*call.stores, strict=True)
    return replace(result, dtypes=dtypes, reductions=reductions)


@functools.lru_cache(maxsize=4096)
def _product(
    x: Described, weight: Described, bias: Described | None, transposed: bool
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of `x @ weight^T + bias`. Raises as torch does."""

    def meta(described: Described) -> torch.Tensor:
        return torch.empty(described[0], dtype=described[1], device="meta")

    acc = reference.linear(meta(x), meta(weight), None if bias is None else meta(bias), transposed)
    return tuple(acc.shape), acc.dtype


@functools.lru_cache(maxsize=4096)
def _result_dtypes(
    program: Program, acc: tuple[int, torch.dtype], operands: tuple[tuple[int, torch.dtype], ...]
) -> tuple[torch.dtype, ...]:
    """The dtypes of the outputs; acc, operands: rank (at most 2) and dtype, all that decides."""

    # So many columns that every norm's groups have two: torch normalizes no single values.
    norms = [i for i in program.instructions if i.op in GROUP_OPS]
    columns = math.lcm(*(2 * int(i.params[0]) for i in norms))

    def meta(rank: int, dtype: torch.dtype) -> torch.Tensor:
        shape = (1,) * (rank - 1) + (columns,) if rank else ()
        return torch.empty(shape, dtype=dtype, device="meta")

    # Views keep the numbers they had before a program was shortened or split.
    numbers = [int(i.params[0]) for i in program.instructions if i.op == "view"]
    views = [(-1, columns)] * (1 + max(numbers, default=-1))
    outputs = reference.run(program, meta(*acc), [meta(*o) for o in operands], views=views)
    return tuple(o.dtype for o in outputs)


def _shapes_of(
    instruction: Instruction, shapes: Sequence[tuple[int, ...]], operands: Tensors
) -> list[tuple[int, ...]]:
    """Shapes of an instruction's tensor arguments."""
    met = []
    for arg in instruction.args:
        if isinstance(arg, Value):
            met.append(shapes[arg.index])
        elif isinstance(arg, Operand):
            met.append(tuple(operands[arg.index].shape))
    return met


def _result_shape(
    instruction: Instruction, met: Sequence[tuple[int, ...]], views: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    """Shape of an instruction's result. Raises RuntimeError where its arguments do not fit."""
    if instruction.op == "view":
        shape = views[int(instruction.params[0])]
        if math.prod(shape) != math.prod(met[0]):
            raise RuntimeError(f"shape {shape} is invalid for {math.prod(met[0])} elements")
        return shape
    if instruction.op == "prelu" and len(met) > 1:
        weights = math.prod(met[1])
        if weights != 1 and weights != (met[0][1] if len(met[0]) > 1 else 1):
            raise RuntimeError(f"{weights} weights do not fit the channels of the input")
        return met[0]
    if instruction.op == "group_norm":
        return _normalized_shape(met, int(instruction.params[0]))
    return tuple(torch.broadcast_shapes(*met))


def _normalized_shape(met: Sequence[tuple[int, ...]], groups: int) -> tuple[int, ...]:
    """Shape of a GroupNorm's result. Raises RuntimeError where its arguments do not fit."""
    channels = met[0][1] if len(met[0]) > 1 else 0
    if channels == 0 or channels % groups != 0:
        raise RuntimeError(f"a tensor of shape {met[0]} has no channels for {groups} groups")
    if any(shape != (channels,) for shape in met[1:]):
        raise RuntimeError(f"weight and bias do not fit {channels} channels")
    return met[0]


def _shape_error(
    program: Program,
    instruction: Instruction,
    met: Sequence[tuple[int, ...]],
    site: str,
    error: Exception,
) -> OperandShapeError:
    shapes = " and ".join(str(shape) for shape in met)
    return OperandShapeError(
        f"{site or 'fused call'}: {instruction.op} of shapes {shapes} in "
        f"{' -> '.join(program.chain)}: {error}"
    )


def checked_outputs(
    program: Program,
    acc: torch.Tensor,
    operands: Tensors,
    views: Sequence[Sequence[int]],
    site: str,
) -> tuple[torch.Tensor, ...]:
    """The reference's outputs; OperandShapeError, with all shapes, where it cannot run."""
    try:
        return reference.run(program, acc, operands, views=views)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(o.shape)) for o in operands)
        raise OperandShapeError(
            f"{site or 'fused call'}: operands of shape {shapes} against a matrix of shape "
            f"{tuple(acc.shape)} in {' -> '.join(program.chain)}: {error}"
        ) from None


def resolve_views(
    views: Sequence[Sequence[int]], shape: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """View shapes with every -1 filled in, for an accumulator of `shape`."""
    elements = math.prod(shape)
    return tuple(resolve_view(tuple(v), elements) for v in views)
