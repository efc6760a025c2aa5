"""Rewrites of programs: each where it holds, where it must not, and on random programs."""

from __future__ import annotations

import random

import pytest
import torch
from helpers_programs import OPERANDS, accumulator, random_program

from fxfuse import reference
from fxfuse.program import parse
from fxfuse.simplify import simplify

REWRITES = {
    "mul one": ("t1 = mul acc, 1.0; t2 = exp t1; store t2", "t1 = exp acc; store t1"),
    "one mul": ("t1 = mul 1.0, acc; t2 = exp t1; store t2", "t1 = exp acc; store t1"),
    "div one": ("t1 = div acc, 1.0; t2 = exp t1; store t2", "t1 = exp acc; store t1"),
    "sub zero": ("t1 = sub acc, 0.0; t2 = exp t1; store t2", "t1 = exp acc; store t1"),
    "copy": ("t1 = copy acc; t2 = exp t1; store t2", "t1 = exp acc; store t1"),
    "clamp after tanh": (
        "t1 = tanh acc; t2 = clamp t1, -1.0, 1.0; store t2",
        "t1 = tanh acc; store t1",
    ),
    "hardtanh after tanh": (
        "t1 = tanh acc; t2 = hardtanh t1, -1.0, 1.0; store t2",
        "t1 = tanh acc; store t1",
    ),
    "relu after sigmoid": (
        "t1 = sigmoid acc; t2 = relu t1; store t2",
        "t1 = sigmoid acc; store t1",
    ),
    "relu6 after relu6": ("t1 = relu6 acc; t2 = relu6 t1; store t2", "t1 = relu6 acc; store t1"),
    "abs after square": ("t1 = square acc; t2 = abs t1; store t2", "t1 = square acc; store t1"),
    "silu": ("t1 = sigmoid acc; t2 = mul acc, t1; store t2", "t1 = silu acc; store t1"),
    "silu, other way": ("t1 = sigmoid acc; t2 = mul t1, acc; store t2", "t1 = silu acc; store t1"),
    "half": ("t1 = div acc, 2.0; store t1", "t1 = mul acc, 0.5; store t1"),
    "equal instructions": (
        "t1 = tanh acc; t2 = tanh acc; t3 = add t1, t2; store t3",
        "t1 = tanh acc; t2 = add t1, t1; store t2",
    ),
    "unused operand": (
        "t1 = add acc, $0; t2 = add acc, $1; store t2",
        "t1 = add acc, $0; store t1",
    ),
    "like itself": ("t1 = exp acc; t2 = like t1, acc; store t2", "t1 = exp acc; store t1"),
    "truth value over one": (
        "t1 = gt acc, 0.0; t2 = div t1, 1.0; store t2",
        "t1 = gt acc, 0.0; t2 = mul t1, 1.0; store t2",
    ),
    "swapped": ("t1 = add $0, acc; store t1", "t1 = add acc, $0; store t1"),
}
KEPT = {
    "add zero": "t1 = add acc, 0.0; store t1",  # -0.0 + 0.0 is 0.0
    "sub negative zero": "t1 = sub acc, -0.0; store t1",
    "clamp inside tanh": "t1 = tanh acc; t2 = clamp t1, -0.5, 1.0; store t2",
    "clamp below softsign": "t1 = softsign acc; t2 = clamp t1, -1.0, 0.99; store t2",
    "relu of tanh": "t1 = tanh acc; t2 = relu t1; store t2",
    "abs of sqrt": "t1 = sqrt acc; t2 = abs t1; store t2",  # sqrt(-0.0) is -0.0
    "truth value times one": "t1 = gt acc, 0.0; t2 = mul t1, 1.0; store t2",
    "sigmoid of another": "t1 = tanh acc; t2 = sigmoid t1; t3 = mul acc, t2; store t3",
    "a third": "t1 = div acc, 3.0; store t1",
    "tiny power of two": f"t1 = div acc, {2.0**-20!r}; store t1",
    "zeros of both signs": "t1 = mul acc, 0.0; t2 = mul acc, -0.0; t3 = sub t1, t2; store t3",
    "dropouts are not equal": (
        "t1 = dropout acc, 0.5, 0.0; t2 = dropout acc, 0.5, 0.0; t3 = add t1, t2; store t3"
    ),
    "a dropout nobody reads": "t1 = dropout acc, 0.5, 0.0; t2 = exp acc; store t2",
    "a cast": "t1 = cast_bf16 acc; t2 = exp t1; store t2",
    "like a cast": "t1 = cast_f16 acc; t2 = like t1, acc; store t2",
    "like, with an operand": "t1 = add acc, $0; t2 = like t1, acc; store t2",
    "operands are not swapped": "t1 = sub $0, acc; store t1",
}


@pytest.mark.parametrize("name", REWRITES)
def test_rewrite(name: str) -> None:
    text, shorter = REWRITES[name]
    assert str(simplify(parse(text)).program) == shorter


@pytest.mark.parametrize("name", KEPT)
def test_no_rewrite(name: str) -> None:
    assert str(simplify(parse(KEPT[name])).program) == KEPT[name]


def test_operands_that_are_left_are_named_in_order() -> None:
    found = simplify(parse("t1 = add acc, $0; t2 = mul acc, $2; t3 = sub t2, $1; store t3"))
    assert found.operands == (2, 1)
    assert str(found.program) == "t1 = mul acc, $0; t2 = sub t1, $1; store t2"


def test_notes_say_what_was_dropped() -> None:
    found = simplify(parse("t1 = tanh acc; t2 = clamp t1, -1.0, 1.0; store t2"))
    assert found.notes == ("clamp(-1, 1) dropped: its argument lies in [-1, 1]",)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_programs_keep_their_values(first: int) -> None:
    """Bit for bit but for the last place of silu, NaN and infinities included."""
    for seed in range(first, first + 50):
        program = random_program(random.Random(seed))
        short = simplify(program)
        assert len(short.program.instructions) <= len(program.instructions)
        acc = accumulator()
        before = reference.run(program, acc, OPERANDS)
        after = reference.run(short.program, acc, [OPERANDS[i] for i in short.operands])
        for b, a in zip(before, after, strict=True):
            assert a.dtype == b.dtype, str(program)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=str(program))
