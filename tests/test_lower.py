"""Lowering: the steps a kernel interprets compute what the program says."""

from __future__ import annotations

import random

import pytest
import torch
from helpers_programs import OPERANDS, accumulator, random_program

from fxfuse import reference
from fxfuse.errors import ProgramError
from fxfuse.lower import (
    MAX_INSTRUCTIONS,
    MAX_OPERANDS,
    MAX_OUTPUTS,
    MAX_SLOTS,
    Source,
    Step,
    lower,
)
from fxfuse.ops import KERNEL_OPS, OPS
from fxfuse.program import parse
from fxfuse.simplify import simplify


def interpret(steps: tuple[Step, ...], acc: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The steps as a kernel runs them: one register, a few slots, truth values as 1.0 and 0.0."""
    previous, slots = acc, [None] * MAX_SLOTS
    outputs: list[torch.Tensor | None] = [None] * count
    for step in steps:
        op = OPS[step.op]
        args = []
        for source, index in step.sources:
            if source is Source.PREVIOUS:
                args.append(previous)
            elif source is Source.SLOT:
                assert slots[index] is not None
                args.append(slots[index])
            elif source is Source.OPERAND:
                args.append(OPERANDS[index].expand(acc.shape))
            else:
                args.append(torch.full_like(acc, step.immediates[index]))
        if step.op == "where":
            args[0] = args[0] != 0
        previous = op.reference(*args, *step.immediates[: len(op.params)]).float()
        if step.save >= 0:
            slots[step.save] = previous
        if step.store >= 0:
            assert outputs[step.store] is None
            outputs[step.store] = previous
    assert all(o is not None for o in outputs)
    return outputs  # type: ignore[return-value]


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_programs_compute_the_same(first: int) -> None:
    lowered = 0
    for seed in range(first, first + 50):
        program = random_program(random.Random(seed))
        for version in (program, simplify(program).program):
            if version.operand_count < len(OPERANDS) and version is not program:
                continue  # its operands are numbered anew
            try:
                steps = lower(version)
            except ProgramError as error:
                assert "alive at once" in str(error)  # noqa: PT017
                continue
            lowered += 1
            assert all(step.op in KERNEL_OPS for step in steps)
            expected = reference.run(version, accumulator(), OPERANDS)
            found = interpret(steps, accumulator(), len(version.outputs))
            for e, f in zip(expected, found, strict=True):
                torch.testing.assert_close(f, e.float().expand(f.shape), equal_nan=True)
    assert lowered > 40


def steps_of(text: str) -> tuple[Step, ...]:
    return lower(parse(text))


def test_chain_needs_no_slot() -> None:
    steps = steps_of("t1 = add acc, $0; t2 = silu t1; t3 = clamp t2, -1.0, 1.0; store t3")
    assert [(s.op, s.sources, s.save, s.store) for s in steps] == [
        ("add", ((Source.PREVIOUS, 0), (Source.OPERAND, 0)), -1, -1),
        ("silu", ((Source.PREVIOUS, 0),), -1, -1),
        ("clamp", ((Source.PREVIOUS, 0),), -1, 0),
    ]
    assert steps[2].immediates == (-1.0, 1.0)


def test_value_read_later_is_saved_and_its_slot_reused() -> None:
    steps = steps_of(
        "t1 = tanh acc; t2 = exp t1; t3 = mul t2, t1; t4 = sin t3; t5 = mul t4, t3; store t5"
    )
    assert [s.save for s in steps] == [0, -1, 0, -1, -1]


def test_accumulator_read_late_is_copied_first() -> None:
    steps = steps_of("t1 = sigmoid acc; t2 = exp t1; t3 = mul acc, t2; store t3")
    assert [s.op for s in steps] == ["copy", "sigmoid", "exp", "mul"]
    assert steps[0].save == 0


def test_value_stored_twice_is_copied() -> None:
    steps = steps_of("t1 = tanh acc; store t1, t1, acc, acc")
    assert sorted(s.store for s in steps) == [0, 1, 2, 3]


def test_program_that_only_stores_the_accumulator() -> None:
    assert steps_of("store acc") == (Step("copy", ((Source.PREVIOUS, 0),), (), -1, 0),)


def test_identities_are_no_instructions() -> None:
    steps = steps_of(
        "t1 = view acc, 0.0; t2 = dropout t1, 0.5, 0.0; t3 = cast_f32 t2; t4 = exp t3; "
        "t5 = like t4, t1; store t5"
    )
    assert [s.op for s in steps] == ["exp"]


def test_what_only_the_target_of_a_like_needs_is_not_computed() -> None:
    steps = steps_of("t1 = exp acc; t2 = tanh acc; t3 = like t2, t1; store t3")
    assert [s.op for s in steps] == ["tanh"]


def test_hardtanh_is_a_clamp() -> None:
    (step,) = steps_of("t1 = hardtanh acc, -1.0, 2.0; store t1")
    assert (step.op, step.immediates) == ("clamp", (-1.0, 2.0))


def chained(count: int, op: str) -> str:
    """Instructions t1 to t{count}, each of the one before; `op` is formatted with its number."""
    return "; ".join(f"t{i + 1} = {op.format(f't{i}' if i else 'acc', i)}" for i in range(count))


def alive_at_once(count: int) -> str:
    """`count` values of which none is read before all are computed."""
    made = [f"t{i} = mul acc, {i + 0.5}" for i in range(1, count + 1)]
    read = [f"t{count + i} = add t{count + i - 1}, t{i}" for i in range(1, count)]
    return "; ".join([*made, *read, f"store t{2 * count - 1}"])


LIMITS = {
    f"{MAX_INSTRUCTIONS + 1} instructions, a kernel holds at most {MAX_INSTRUCTIONS}": (
        chained(MAX_INSTRUCTIONS + 1, "sin {0}") + f"; store t{MAX_INSTRUCTIONS + 1}"
    ),
    f"{MAX_OPERANDS + 1} operands, a kernel holds at most {MAX_OPERANDS}": (
        chained(MAX_OPERANDS + 1, "add {0}, ${1}") + f"; store t{MAX_OPERANDS + 1}"
    ),
    f"{MAX_OUTPUTS + 1} outputs, a kernel holds at most {MAX_OUTPUTS}": (
        chained(MAX_OUTPUTS, "sin {0}")
        + f"; store acc, {', '.join(f't{i + 1}' for i in range(MAX_OUTPUTS))}"
    ),
    f"more than {MAX_SLOTS} intermediate values are alive at once": alive_at_once(MAX_SLOTS + 2),
}


@pytest.mark.parametrize("message", LIMITS)
def test_limit_is_named(message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        steps_of(LIMITS[message])
