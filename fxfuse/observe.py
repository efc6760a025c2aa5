"""Learn shapes by sending example inputs through an optimised model as fake tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from . import fused
from .errors import OperandShapeError
from .infer import Call, Result
from .layout import classify, operand_shapes
from .program import Operand, Program, Value, parse
from .recipes import Static
from .report import GroupReport, Report, Shape, with_shape


def observe(model: nn.Module, inputs: Sequence[Any], report: Report) -> Report:
    """The report with the shapes a call on `inputs` has. Nothing is computed.

    Raises OperandShapeError where an operand does not broadcast; any other failure only leaves
    the shapes from there on unknown, with the reason in the report.
    """
    seen: dict[tuple[str, str], tuple[Call, Result]] = {}

    def record(call: Call, static: Static, result: Result) -> None:
        seen[static.site, static.program] = (call, result)

    unknown = None
    fused.OBSERVERS.append(record)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        with torch.no_grad(), mode:
            model(*tree_map(convert, tuple(inputs)))
    except OperandShapeError:
        raise
    except Exception as error:  # whatever the model's own code raises on fake tensors
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        unknown = f"the model does not run on fake tensors: {reason}"
    finally:
        fused.OBSERVERS.pop()
    groups = tuple(
        _measured(g, *seen[g.site, g.program]) if (g.site, g.program) in seen else g
        for g in report.groups
    )
    return replace(report, groups=groups, shapes_unknown=unknown)


def _measured(group: GroupReport, call: Call, result: Result) -> GroupReport:
    shape = result.acc_shape
    against = operand_shapes(call.program, shape, call.views)
    kinds = []
    for index, operand in enumerate(call.operands):
        sizes, met = tuple(operand.shape), against[index]
        layout = classify(sizes, operand.stride(), operand.dtype, met)
        kinds.append(layout.kind if layout else "full (copied)")
    m, n = math.prod(shape[:-1]), shape[-1]
    k = 0 if call.weight is None else call.x.shape[-1]
    matrix = m * n * result.acc_dtype.itemsize
    product = (m * k + n * k) * call.x.element_size() if k else 0
    extras = sum(_bytes(o) for o in call.operands)
    stored = sum(
        math.prod(s) * d.itemsize for s, d in zip(result.shapes, result.dtypes, strict=True)
    )
    # A fused kernel reads the factors (or the matrix) and the operands, and writes the outputs;
    # eager writes the product, and for every op reads its arguments and writes its result.
    after = (product or matrix) + extras + stored
    before = product + (matrix if k else 0)
    before += _eager_bytes(parse(group.as_written), matrix, call.operands)
    return with_shape(group, Shape(m, n, k, before, after, matrix), tuple(kinds))


def _eager_bytes(program: Program, matrix: int, operands: Sequence[torch.Tensor]) -> int:
    total = 0
    for instruction in program.instructions:
        if instruction.op in ("copy", "view", "dropout", "like"):
            continue
        total += matrix
        for arg in instruction.args:
            if isinstance(arg, Value):
                total += matrix
            elif isinstance(arg, Operand) and arg.index < len(operands):
                total += _bytes(operands[arg.index])
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
