"""Run a program with torch ops: slow, plainly right, in any dtype and on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .ops import OPS
from .program import Operand, Program, Value


def run(
    program: Program,
    acc: torch.Tensor,
    operands: Sequence[torch.Tensor],
    dropout_active: Sequence[bool] = (),
    views: Sequence[Sequence[int]] = (),
) -> tuple[torch.Tensor, ...]:
    """The program's outputs, computed op by op with torch's own functions and type promotion.

    acc: [..., N]. operands: tensors that broadcast against it. dropout_active: for each dropout
    instruction in order, whether it drops; without it none does. views: the shapes of the view
    instructions. Raises whatever torch raises,
    e.g. on shapes that do not broadcast.
    """
    return resume(program, 0, {0: acc}, operands, dropout_active, views)


def resume(
    program: Program,
    start: int,
    values: Mapping[int, torch.Tensor],
    operands: Sequence[torch.Tensor],
    dropout_active: Sequence[bool] = (),
    views: Sequence[Sequence[int]] = (),
) -> tuple[torch.Tensor, ...]:
    """The program's outputs from instruction `start` on, given the values needed from before."""
    known: dict[int, Any] = dict(values)
    for index, instruction in enumerate(program.instructions[start:], start + 1):
        args: list[Any] = [
            known[a.index]
            if isinstance(a, Value)
            else operands[a.index]
            if isinstance(a, Operand)
            else a
            for a in instruction.args
        ]
        if instruction.op == "dropout":
            p, flag = instruction.params
            active = bool(dropout_active) and dropout_active[int(flag)]
            known[index] = F.dropout(args[0], p, active)
        elif instruction.op == "view":
            known[index] = args[0].reshape(views[int(instruction.params[0])])
        else:
            known[index] = OPS[instruction.op].reference(*args, *instruction.params)
    return tuple(known[v.index] for v in program.outputs)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """`x @ weight^T + bias`; `transposed` says weight is stored as [K, N]."""
    if not transposed:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.matmul(x, weight)
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return flat.reshape(*x.shape[:-1], weight.shape[-1])
