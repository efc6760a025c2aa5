"""Programs as data: their text, their checks, and what is known of their values."""

from __future__ import annotations

import random

import pytest
from helpers_programs import random_program

from fxfuse.errors import ProgramError
from fxfuse.program import ACC, Builder, Instruction, Kind, Program, Value, kinds_of, parse


@pytest.mark.parametrize("seed", range(50))
def test_text_reads_back(seed: int) -> None:
    program = random_program(random.Random(seed))
    again = parse(str(program))
    assert (again.instructions, again.outputs) == (program.instructions, program.outputs)


def test_text_keeps_special_numbers() -> None:
    text = "t1 = clamp acc, -inf, 1e-30; t2 = mul t1, -0.0; t3 = where t2, nan, t1; store t3, acc"
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t1 = nonsense acc; store t1", "cannot read .*nonsense"),
        ("t2 = exp acc; store t2", "expected t1, found 't2'"),
        ("t1 = exp acc", "expected store"),
        ("t1 = exp t1; store t1", "t1 does not exist yet"),
        ("t1 = add acc; store t1", "add takes 2 arguments and 0 parameters, got 1 and 0"),
        ("t1 = exp acc; store t2", "store t2: only 1 values exist"),
        ("t1 = elu acc, x; store t1", "could not convert"),
    ],
)
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        parse(text)


def test_program_without_output_is_refused() -> None:
    with pytest.raises(ProgramError, match="no output is stored"):
        Program((Instruction("exp", (ACC,)),), (), 0)


def test_builder_numbers_operands_by_first_use() -> None:
    builder = Builder()
    first = builder.emit("add", ACC, builder.operand("b"))
    second = builder.emit("mul", first, builder.operand("a"))
    builder.emit("sub", second, builder.operand("b"))
    program = builder.build([Value(3)])
    assert str(program) == "t1 = add acc, $0; t2 = mul t1, $1; t3 = sub t2, $0; store t3"
    assert program.operand_count == 2


def test_chain_and_rendering_are_for_people() -> None:
    program = parse("t1 = copy acc; t2 = add t1, $0; t3 = like t2, t1; store t3")
    assert program.chain == ("add",)
    assert program.render({0: "row[0]"}).splitlines()[1] == "t2 = add t1, row[0]"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("t1 = exp acc; store t1", Kind.ACCUMULATOR),
        ("t1 = add acc, $0; store t1", Kind.FLOATING),
        ("t1 = cast_f16 acc; store t1", Kind.FLOATING),
        ("t1 = gt acc, $0; store t1", Kind.BOOL),
        ("t1 = gt acc, 0.0; t2 = mul t1, t1; store t2", Kind.BOOL),
        ("t1 = gt acc, 0.0; t2 = mul t1, 1.0; store t2", Kind.UNKNOWN),
        ("t1 = gt acc, 0.0; t2 = mul t1, $0; store t2", Kind.UNKNOWN),
        ("t1 = gt acc, 0.0; t2 = mul t1, acc; store t2", Kind.ACCUMULATOR),
        ("t1 = gt acc, 0.0; t2 = where t1, 1.0, 0.0; store t2", Kind.UNKNOWN),
        ("t1 = gt acc, 0.0; t2 = where t1, acc, 0.0; store t2", Kind.ACCUMULATOR),
        ("t1 = add acc, $0; t2 = like t1, acc; store t2", Kind.ACCUMULATOR),
    ],
)
def test_kind(text: str, kind: Kind) -> None:
    assert kinds_of(parse(text).instructions)[-1] is kind
