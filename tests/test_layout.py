"""Operand layouts against brute-force broadcasting."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fxfuse.layout import classify, operand_shapes, resolve_view
from fxfuse.library import OperandLayout
from fxfuse.program import parse

KINDS = {
    "0-d": ((), (4, 6), "scalar"),
    "one element": ((1,), (4, 6), "scalar"),
    "row": ((6,), (4, 6), "row"),
    "column": ((4, 1), (4, 6), "column"),
    "full": ((4, 6), (4, 6), "full"),
    "full, one rank more": ((1, 4, 6), (4, 6), "full"),
    "table per batch": ((3, 6), (2, 3, 6), "periodic full"),
    "row per batch": ((2, 1, 6), (2, 3, 6), "repeated full"),
    "number per batch": ((2, 1, 1), (2, 3, 6), "repeated column"),
    "number per position": ((3, 1), (2, 3, 6), "periodic column"),
    "repeated and periodic": ((3, 1, 6), (2, 3, 5, 6), "periodic repeated full"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind(name: str) -> None:
    shape, against, kind = KINDS[name]
    operand = torch.empty(shape)
    layout = classify(shape, operand.stride(), operand.dtype, against)
    assert layout is not None
    assert layout.kind == kind


def test_hole_between_varying_dimensions_must_be_copied() -> None:
    operand = torch.empty(2, 1, 4, 6)
    assert classify((2, 1, 4, 6), operand.stride(), operand.dtype, (2, 3, 4, 6)) is None


def gathered(operand: torch.Tensor, layout: OperandLayout, m: int, n: int) -> torch.Tensor:
    """The [M, N] matrix a kernel reads by the layout's addressing."""
    rows = torch.arange(m)[:, None] // layout.repeat % layout.period * layout.row_stride
    index = rows + torch.arange(n) * layout.column_stride
    flat = torch.as_strided(operand, (int(index.max()) + 1,), (1,))
    return flat[index]


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_addressing_is_broadcasting(first: int) -> None:
    """Random shapes, with sizes of 1, permuted, sliced and expanded strides."""
    served = 0
    for seed in range(first, first + 500):
        draw = random.Random(seed)
        against = tuple(draw.choice([1, 2, 3]) for _ in range(draw.randint(1, 4)))
        shape = tuple(draw.choice([s, s, 1]) for s in against)[draw.randint(0, len(against)) :]
        order = list(range(len(shape)))
        if draw.random() < 0.4:
            draw.shuffle(order)
        step = draw.choice([1, 1, 2])
        stored = torch.randn([shape[i] * (step if i == len(shape) - 1 else 1) for i in order])
        operand = stored.permute([order.index(i) for i in range(len(shape))])
        operand = operand[..., ::step] if shape else operand
        assert tuple(operand.shape) == shape
        if draw.random() < 0.2:
            operand = operand.expand(against)
        layout = classify(tuple(operand.shape), operand.stride(), operand.dtype, against)
        if layout is None:
            # A contiguous copy, or at worst a full one, must always do.
            operand = operand.expand(against).contiguous()
            layout = classify(against, operand.stride(), operand.dtype, against)
            assert layout is not None
        else:
            served += 1
        m, n = math.prod(against[:-1]), against[-1]
        expected = operand.expand(against).reshape(m, n)
        assert torch.equal(gathered(operand, layout, m, n), expected), (seed, layout)
    assert served > 250


def test_operands_meet_the_shape_of_the_view_they_follow() -> None:
    program = parse("t1 = add acc, $0; t2 = view t1, 0.0; t3 = mul t2, $1; store t3")
    assert operand_shapes(program, (2, 3, 6), [(6, 6)]) == {0: (2, 3, 6), 1: (6, 6)}


def test_minus_one_is_filled_in() -> None:
    assert resolve_view((-1, 6), 36) == (6, 6)
    assert resolve_view((-1, 6), 0) == (0, 6)
    assert resolve_view((2, 3), 6) == (2, 3)
