"""Classify operands by how they broadcast against the matrix a program works on.

The kernels see `[M, N]`: all leading dimensions flattened into M. An operand broadcasts against
the unflattened shape; here its shape and strides become the addressing of `fxfuse_operand`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .library import OperandLayout
from .program import Operand, Program, Value


def operand_shapes(
    program: Program, acc_shape: tuple[int, ...], views: Sequence[tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    """For each operand, the shape of the values it meets: the accumulator's, or a view's."""
    met: dict[int, tuple[int, ...]] = {}
    shapes = result_shapes(program, acc_shape, views)
    for instruction, shape in zip(program.instructions, shapes, strict=True):
        for arg in instruction.args:
            if isinstance(arg, Operand):
                met[arg.index] = shape
    return met


def result_shapes(
    program: Program, acc_shape: tuple[int, ...], views: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The shape of each instruction's result: the accumulator's, or a view's."""
    shapes: list[tuple[int, ...]] = [acc_shape]
    for instruction in program.instructions:
        inputs = [shapes[a.index] for a in instruction.args if isinstance(a, Value)]
        shape = inputs[0] if inputs else acc_shape
        if instruction.op == "view":
            shape = resolve_view(views[int(instruction.params[0])], math.prod(acc_shape))
        shapes.append(shape)
    return shapes[1:]


def resolve_view(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """`shape` with its -1, if any, filled in."""
    if -1 not in shape:
        return shape
    rest = math.prod(s for s in shape if s != -1)
    return tuple(elements // rest if s == -1 and rest else max(s, 0) for s in shape)


def classify(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    against: tuple[int, ...],
) -> OperandLayout | None:
    """Layout of an operand that broadcasts to `against`, or None where it must be copied first.

    shape, stride: the operand's, as they are. Kinds: scalar, row [N], column [M, 1], full [M, N];
    "periodic" and "repeated" before them say that rows recur, as [T, N] and [B, 1, N] do against
    [B, T, N].
    """
    lead = against[:-1]
    # An operand of higher rank adds dimensions of size 1 to the result, and no more.
    shape, stride = shape[-len(against) :], stride[-len(against) :]
    padding = (1,) * (len(against) - len(shape))
    sizes = padding + shape
    strides = (0,) * len(padding) + stride
    column_stride = strides[-1] if sizes[-1] != 1 else 0
    if column_stride not in (0, 1) or (sizes[-1] != 1 and column_stride == 0):
        return None
    rows = _collapse(sizes[:-1], strides[:-1], lead)
    if rows is None:
        return None
    row_stride, repeat, period, varies = rows
    # A column of the matrix and its only row look alike when N is 1; either reading is right.
    kind = {
        (False, False): "scalar",
        (False, True): "row",
        (True, False): "column",
        (True, True): "full",
    }[varies, column_stride != 0]
    if varies and repeat > 1:
        kind = f"repeated {kind}"
    if varies and repeat * period < math.prod(lead):
        kind = f"periodic {kind}"
    return OperandLayout(kind, row_stride, column_stride, repeat, period, dtype)


def _collapse(
    sizes: tuple[int, ...], strides: tuple[int, ...], lead: tuple[int, ...]
) -> tuple[int, int, int, bool] | None:
    """`(row_stride, repeat, period, varies)` of leading dimensions, or None where there is none.

    The dimensions that vary must be adjacent and evenly strided.
    """
    varying = [i for i, size in enumerate(sizes) if size != 1]
    if not varying:
        return 0, 1, max(math.prod(lead), 1), False
    first, last = varying[0], varying[-1]
    if any(sizes[i] != lead[i] for i in range(first, last + 1)):
        return None
    expected = strides[last]
    for i in reversed(varying):
        if strides[i] != expected:
            return None
        expected = strides[i] * sizes[i]
    if strides[last] == 0:
        return None
    repeat = max(math.prod(lead[last + 1 :]), 1)
    period = max(math.prod(sizes[first : last + 1]), 1)
    return strides[last], repeat, period, True
