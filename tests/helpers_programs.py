"""Which ops are pointwise, random programs of them, and values to run those on."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch

from fxfuse.ops import COMPARISONS, GROUP_OPS, KERNEL_OPS, OPS
from fxfuse.program import ACC, Arg, Builder, Kind, Program, Value, adds_truth_values, kinds_of

# Ops whose results depend on the same element of their arguments alone, of the table and of the
# kernels: what is checked element by element, or on columns of any number.
POINTWISE_OPS = tuple(name for name in OPS if name not in GROUP_OPS)
POINTWISE_KERNEL_OPS = tuple(name for name in KERNEL_OPS if name not in GROUP_OPS)
SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.25, 2.5, -3.5, 30.0, -30.0)
OPERANDS = [
    torch.tensor(0.75),
    torch.linspace(-1, 1, len(SPECIALS) + 8),
    torch.linspace(-2, 2, 3)[:, None],
]
_SKIPPED = frozenset({"view", "dropout", "like", "prelu", "cast_f16", "cast_bf16"})
# Of 0.0 and -0.0 these make quite different numbers, and relu may return either.
_SKIPPED_POLES = frozenset({"reciprocal", "rsqrt", "div", "pow"})
_NAMES = sorted(set(POINTWISE_OPS) - _SKIPPED - _SKIPPED_POLES)
_NUMBERS = (0.0, -0.0, 1.0, 2.0, 0.5, -1.5)


def one_op(name: str, params: Mapping[str, tuple[float, ...]], otherwise: float) -> str:
    """The program that is one op of the table, over the accumulator and operands; of a comparison
    the accumulator where it holds, and `otherwise`. params: of ops that are to have their own."""
    op = OPS[name]
    words = ["acc", *(f"${i}" for i in range(op.arity - 1))]
    words += [repr(float(p)) for p in params.get(name, op.defaults)]
    text = f"t1 = {name} {', '.join(words)}"
    if name in COMPARISONS:
        return f"{text}; t2 = where t1, acc, {otherwise!r}; store t2"
    return f"{text}; store t1"


def accumulator() -> torch.Tensor:
    """A [3, N] matrix of special and ordinary values."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.tensor([*SPECIALS, *torch.randn(8, generator=generator)]) for _ in range(3)]
    return torch.stack(rows)


def random_program(draw: random.Random) -> Program:
    """A program torch can run, of up to twelve instructions with a few outputs."""
    builder = Builder()
    for index in range(len(OPERANDS)):
        builder.operand(index)
    values: list[Value] = [ACC]
    for _ in range(draw.randint(1, 12)):
        kinds = kinds_of(builder.instructions)
        name = draw.choice([*_NAMES, *["mul", "add", "sigmoid", "clamp", "copy"] * 4])
        op = OPS[name]
        floating = [v for v in values if kinds[v.index] in (Kind.ACCUMULATOR, Kind.FLOATING)]
        args: list[Arg] = [draw.choice(floating) for _ in range(op.arity)]
        if name == "where":
            truths = [v for v in values if kinds[v.index] is Kind.BOOL]
            if not truths:
                continue
            args[0] = draw.choice(truths)
        if name in ("add", "sub", "mul", *COMPARISONS) and draw.random() < 0.6:
            other = draw.choice([*_NUMBERS, *builder.operands.values()])
            args[draw.randrange(2)] = other
        if name == "mul" and draw.random() < 0.3:
            args[1] = draw.choice(values)
        params = (draw.choice([-1.0, 0.0, -math.inf]), draw.choice([1.0, 6.0, math.inf]))
        if name not in ("clamp", "hardtanh"):
            params = tuple(draw.choice([0.5, 1.0, 2.0]) for _ in op.params)
        values.append(builder.emit(name, *args, params=params))
    assert not adds_truth_values(builder.instructions, 0)
    outputs = [values[-1], *draw.sample(values, min(len(values), draw.randint(0, 2)))]
    return builder.build(list(dict.fromkeys(outputs)))
