"""Gradients of programs: torch's own for every op, for chains, and for gradients of gradients."""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_abi import path
from helpers_numerics import errors
from helpers_programs import POINTWISE_OPS, random_program
from helpers_torch import skip_where_torch_differs
from helpers_vjp import Fused, Tensors, by_autograd, gradients, one_op, variables

import fxfuse
from fxfuse import cli, reference
from fxfuse.derivatives import DERIVATIVES
from fxfuse.errors import ProgramError
from fxfuse.fused import fused_pointwise, routes_taken
from fxfuse.lower import MAX_INSTRUCTIONS, MAX_OPERANDS, MAX_OUTPUTS, MAX_SLOTS, lower
from fxfuse.ops import COMPARISONS, OPS
from fxfuse.program import ACC, Operand, Program, Value, parse
from fxfuse.schedule import schedule
from fxfuse.vjp import (
    Gradient,
    Incoming,
    Reduction,
    Saves,
    Stored,
    reduction,
    saves,
    vjp,
    without_z,
)

ROOT = Path(__file__).parent.parent
NAN, INF = math.nan, math.inf
POSITIVE = {"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "pow"}
SECOND_ORDER = {"gelu_grad", "gelu_tanh_grad", "silu_grad"}
CASTS = {"cast_f32", "cast_f16", "cast_bf16"}
POINTWISE = sorted(set(POINTWISE_OPS) - {"view", "dropout", "like"} - COMPARISONS)
SPECIALS = [NAN, INF, -INF, 0.0, -0.0]
# And where a formula changes, for the parameters of helpers_vjp.
KINKS = [1.0, -1.0, 0.5, 3.0, -3.0, 6.0, 0.4, -0.4, 0.1, 2.0, 25.0, -25.0]
CHAINS = {
    "bias gelu": "t1 = add acc, $0; t2 = gelu t1; store t2",
    "bias relu": "t1 = add acc, $0; t2 = relu t1; store t2",
    "silu gate": "t1 = silu acc; t2 = mul t1, $1; store t2",
    "residual": "t1 = gelu_tanh acc; t2 = mul t1, $0; t3 = add t2, $1; store t3",
    "two outputs": "t1 = tanh acc; t2 = add t1, $1; t3 = sigmoid t2; t4 = mul t3, t1; store t4, t2",
    "mask": "t1 = gt acc, $0; t2 = mul acc, t1; t3 = where t1, t2, $1; store t3",
    "swish clamp tanh": "t1 = silu acc; t2 = mul t1, 0.5; t3 = clamp t2, -1.0, 1.0; t4 = tanh t3;"
    "t5 = clamp t4, -1.0, 1.0; store t5",
    "swish tanh gelu": "t1 = add acc, $0; t2 = silu t1; t3 = tanh t2; t4 = gelu t3; t5 = clamp t4,"
    "-1.0, 1.0; store t5",
    "swish mul swish": "t1 = silu acc; t2 = mul t1, $0; t3 = silu t2; store t3",
    "softplus scaled": "t1 = softplus acc, 1.0, 20.0; t2 = mul t1, $2; t3 = mish t2; store t3",
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def others_of(name: str, z: torch.Tensor) -> list[torch.Tensor]:
    """Operands for `one_op(name)`."""
    if name == "prelu":
        return [torch.tensor([0.2], dtype=z.dtype)]
    found = [randn(*z.shape, seed=i + 1).to(z.dtype) for i in range(OPS[name].arity - 1)]
    if name == "where":
        found[0] = found[0] > 0
    return found


def outputs_of(program: Program, z: torch.Tensor, operands: Tensors) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return reference.run(program, z, operands)


def operands_of(program: Program, rows: int, columns: int) -> list[torch.Tensor]:
    """Row, full, column and scalar operands in turn, as many as the program has."""
    shapes = [(columns,), (rows, columns), (rows, 1), ()]
    return [randn(*shapes[i % 4], seed=i + 5) for i in range(program.operand_count)]


# Every op ----------------------------------------------------------------------------------------


def test_every_op_has_a_rule_for_each_argument() -> None:
    assert list(DERIVATIVES) == list(OPS)
    assert {n: len(rules) for n, rules in DERIVATIVES.items()} == {
        n: op.arity for n, op in OPS.items()
    }


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_gradient_of_an_op_is_torchs(name: str, scale: float) -> None:
    program, z = one_op(name), randn(13, 17) * scale
    z = z.abs() if name in POSITIVE else z
    operands = others_of(name, z)
    outputs = outputs_of(program, z, operands)
    incoming = [randn(*o.shape, seed=9).to(o.dtype) for o in outputs]
    backward = vjp(program, variables(program, operands))
    found = gradients(backward, z, operands, outputs, incoming)
    expected = by_autograd(program, z, operands, incoming)
    assert found.keys() == expected.keys()
    for variable, gradient in expected.items():
        torch.testing.assert_close(
            found[variable], gradient, rtol=1e-7, atol=1e-11
        )  # torch's constants are floats


def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: NaN, infinities and zeros alike, all else to within a few roundings."""
    close = (a - b).abs() <= 1e-6 * b.abs() + 1e-7
    return (a == b) | (a.isnan() & b.isnan()) | close & (a != 0) & (b != 0)


# softsign and tanhshrink: torch takes the difference of two infinities where dy is one.
_SPECIAL = [
    pytest.param(name, dy, id=f"{name}-{dy}")
    for name in sorted(set(POINTWISE) - SECOND_ORDER)
    for dy in (1.5, 0.0, NAN, INF)
    if dy != INF or name not in ("softsign", "tanhshrink")
]


@pytest.mark.parametrize(("name", "dy"), _SPECIAL)
def test_gradient_at_special_values_is_torchs(name: str, dy: float) -> None:
    skip_where_torch_differs(name)
    program = one_op(name)
    values = torch.tensor(SPECIALS + KINKS)
    pairs = torch.cartesian_prod(values, values)
    z, *operands = [p.contiguous() for p in (*pairs.T, pairs[:, 0].roll(3))][: OPS[name].arity]
    if name == "where":
        operands[0] = operands[0] > 0
    if name == "prelu":
        z, operands = z[:, None], [torch.tensor([0.2])]
    outputs = outputs_of(program, z, operands)
    incoming = [torch.full_like(outputs[0], dy)]
    backward = vjp(program, variables(program, operands))
    found = gradients(backward, z, operands, outputs, incoming)
    vectorised = by_autograd(program, z, operands, incoming)
    # Torch's vectorised kernels disagree on NaN with its scalar ones, which few elements run.
    cut = lambda t, i: t if len(t) == 1 else t[i : i + 3]  # noqa: E731
    parts = [
        by_autograd(program, cut(z, i), [cut(o, i) for o in operands], [cut(incoming[0], i)])
        for i in range(0, len(z), 3)
    ]
    for variable, gradient in found.items():
        if gradient.shape != z.shape:
            continue  # prelu's one weight: a sum over all of them
        scalar = torch.cat([part[variable] for part in parts])
        agree = same(gradient, vectorised[variable]) | same(gradient, scalar)
        odd = [t[~agree].tolist() for t in (z, gradient, vectorised[variable], scalar)]
        assert agree.all(), (variable, odd)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge", "floor", "sign", "round"])
def test_what_is_flat_has_no_gradient(name: str) -> None:
    program = one_op(name)
    wrt = (ACC, *(Operand(i) for i in range(program.operand_count)))
    backward = vjp(program, wrt)
    assert (backward.program, backward.gradients, backward.zeros) == (None, (), wrt)


@pytest.mark.parametrize("exponent", [-1.5, 0.0, 0.3, 1.0, 2.0, 4.0])
def test_gradient_of_a_power_with_a_constant(exponent: float) -> None:
    values = torch.tensor(SPECIALS + KINKS)
    for text in (f"t1 = pow acc, {exponent}", f"t1 = pow {exponent}, acc"):
        program = parse(f"{text}; store t1")
        incoming = [torch.full_like(values, 1.5)]
        outputs = outputs_of(program, values, [])
        found = gradients(vjp(program, (ACC,)), values, [], outputs, incoming)[ACC]
        assert same(found, by_autograd(program, values, [], incoming)[ACC]).all()


@pytest.mark.parametrize("cast", ["cast_f16", "cast_bf16"])
def test_gradient_through_a_cast_is_rounded_as_torch_rounds_it(cast: str) -> None:
    program = parse(f"t1 = mul acc, 3.0; t2 = {cast} t1; t3 = mul t2, 0.3; t4 = relu t3; store t4")
    z = randn(5, 9).float()
    outputs = outputs_of(program, z, [])
    incoming = [randn(5, 9, seed=1).to(outputs[0].dtype)]
    (found,) = gradients(vjp(program, (ACC,)), z, [], outputs, incoming).values()
    (expected,) = by_autograd(program, z, [], incoming).values()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# Chains ------------------------------------------------------------------------------------------


def example_programs() -> list[Program]:
    """The programs of the groups in the four example models."""
    models = [cli.load_file(path) for path in sorted((ROOT / "examples").glob("*.py"))]
    found = [fxfuse.optimize(m.Model(*m.get_init_inputs(32, 256))) for m in models]
    return [parse(group.program) for m in found for group in fxfuse.report(m).groups]


def drawn(seed: int) -> Program:
    """A random program that torch can run in float64: its lerp takes no mixture."""
    program = random_program(random.Random(seed))
    wide = (replace(i, op="copy") if i.op == "cast_f32" else i for i in program.instructions)
    return replace(program, instructions=tuple(wide))


def check_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for variable, gradient in expected.items():
        # Where torch multiplies a zero gradient by infinity, ours has stopped at the zero.
        ours = torch.where(gradient.isfinite(), found[variable], gradient)
        # torch's hardsigmoid takes a sixth in float32, and what it leaves of a term may cancel.
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=5e-8, equal_nan=True)


def check_chain(program: Program, rows: int = 7, columns: int = 12) -> None:
    """The gradients of all variables are torch's, in float64, from z and without it."""
    z, operands = randn(rows, columns), operands_of(program, rows, columns)
    outputs = outputs_of(program, z, operands)
    incoming = [randn(*o.shape, seed=30 + i) for i, o in enumerate(outputs)]
    wrt = variables(program, operands)
    expected = by_autograd(program, z, operands, incoming)
    for backward in (vjp(program, wrt), without_z(program, wrt)):
        if backward is not None:
            check_close(gradients(backward, z, operands, outputs, incoming), expected)


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_of_a_chain(name: str) -> None:
    program = parse(CHAINS[name])
    check_chain(program)
    for variable in variables(program, operands_of(program, 1, 1)):
        assert vjp(program, (variable,)).refusal is None


def test_gradients_of_the_example_models() -> None:
    programs = example_programs()
    assert len(programs) >= 4
    for program in programs:
        check_chain(program)
        assert vjp(program, (ACC,)).refusal is None


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_gradients_of_random_programs(first: int) -> None:
    served = 0
    for seed in range(first, first + 50):
        program = drawn(seed)
        check_chain(program, 3, 20)
        wrt = (ACC, *(Operand(i) for i in range(program.operand_count)))
        served += vjp(program, wrt).refusal is None
    assert served >= 40


def test_random_programs_without_z() -> None:
    served = 0
    for seed in range(300):
        program = drawn(seed)
        wrt = (ACC, *(Operand(i) for i in range(program.operand_count)))
        if without_z(program, wrt) is not None:
            served += 1
            check_chain(program, 3, 20)
    assert served > 20


# On the kernels ----------------------------------------------------------------------------------


def on_kernels(program: Program, acc: torch.Tensor, operands: Tensors) -> Tensors:
    found = fused_pointwise(acc, operands, str(program), site=f"vjp {program}")
    assert routes_taken(f"vjp {program}", str(program)) == [("cpu", None)]
    return found if isinstance(found, tuple) else (found,)


def check_kernels(program: Program, dtype: torch.dtype, z: torch.Tensor, operands: Tensors) -> None:
    """Gradients by the kernels are as close to float64's as torch's own are."""
    z, operands = z.to(dtype), [o.to(dtype) if o.is_floating_point() else o for o in operands]
    outputs = outputs_of(program, z, operands)
    incoming = [randn(*o.shape, seed=30 + i).to(o.dtype) for i, o in enumerate(outputs)]
    wrt = variables(program, operands)
    wide = [o.double() if o.is_floating_point() else o for o in operands]
    truth = by_autograd(program, z.double(), wide, [g.double() for g in incoming])
    eager = by_autograd(program, z, operands, incoming)
    for backward in (vjp(program, wrt), without_z(program, wrt)):
        if backward is None:
            continue
        assert backward.refusal is None
        found = gradients(backward, z, operands, outputs, incoming, on_kernels)
        for variable, exact in truth.items():
            assert found[variable].dtype == eager[variable].dtype
            ours, theirs, size = errors(found[variable], eager[variable], exact)
            slack = 0.5 * torch.finfo(dtype).eps * size
            assert ours <= 1.05 * theirs + slack, (variable, ours, theirs, size)


_HAS_LIBRARY = pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built")
_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@_HAS_LIBRARY
@_DTYPES
@pytest.mark.parametrize("name", sorted(set(POINTWISE) - CASTS))
def test_kernels_gradient_of_an_op_is_as_accurate_as_eagers(name: str, dtype: torch.dtype) -> None:
    skip_where_torch_differs(name)
    z = randn(65, 130).abs() + 0.01 if name in POSITIVE else randn(65, 130)
    check_kernels(one_op(name), dtype, z, others_of(name, z))


@_HAS_LIBRARY
@_DTYPES
@pytest.mark.parametrize("name", CHAINS)
def test_kernels_gradients_of_a_chain_are_as_accurate_as_eagers(
    name: str, dtype: torch.dtype
) -> None:
    program = parse(CHAINS[name])
    check_kernels(program, dtype, randn(65, 130), operands_of(program, 65, 130))


@_HAS_LIBRARY
def test_wider_operand_gets_its_gradient_unrounded() -> None:
    program = parse("t1 = mul acc, $0; t2 = silu t1; store t2")
    z, scale = randn(65, 130).bfloat16(), randn(130, seed=1).float()
    incoming = [randn(65, 130, seed=2).float()]
    truth = by_autograd(program, z.double(), [scale.double()], [incoming[0].double()])
    backward = vjp(program, (ACC, Operand(0)))
    found = gradients(backward, z, [scale], [], incoming, on_kernels)
    assert [g.dtype for g in found.values()] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(found[Operand(0)].double(), truth[Operand(0)], rtol=1e-5, atol=1e-5)


# Gradients of gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in POINTWISE if n not in CASTS])
def test_gradient_of_the_gradient_of_an_op(name: str) -> None:
    program, z = one_op(name), randn(3, 4)
    z = z.abs() + 0.1 if name in POSITIVE else z
    operands = others_of(name, z)
    tensors = [t.requires_grad_(t.is_floating_point()) for t in (z, *operands)]
    assert torch.autograd.gradcheck(functools.partial(Fused.apply, program), tensors)
    assert torch.autograd.gradgradcheck(functools.partial(Fused.apply, program), tensors)


@pytest.mark.parametrize("name", CHAINS)
def test_gradient_of_the_gradient_of_a_chain(name: str) -> None:
    program = parse(CHAINS[name])
    tensors = [t.requires_grad_() for t in (randn(3, 4), *operands_of(program, 3, 4))]
    assert torch.autograd.gradgradcheck(functools.partial(Fused.apply, program), tensors)


def test_third_derivative() -> None:
    program = parse("t1 = mul acc, $0; t2 = tanh t1; store t2")
    z, scale = randn(4, 3).requires_grad_(), randn(3).requires_grad_()
    expected, found = torch.tanh(z * scale).sum(), Fused.apply(program, z, scale)[0].sum()
    for _ in range(3):
        (expected,) = torch.autograd.grad(expected.sum(), z, create_graph=True)
        (found,) = torch.autograd.grad(found.sum(), z, create_graph=True)
        torch.testing.assert_close(found, expected)


# What comes out ----------------------------------------------------------------------------------

BIAS_RELU = parse(CHAINS["bias relu"])


def test_equal_gradients_are_computed_once() -> None:
    backward = vjp(BIAS_RELU, (ACC, Operand(0)))
    assert str(backward.program) == "t1 = add acc, $0; t2 = threshold_grad $1, t1, 0.0; store t2"
    assert backward.operands == (Operand(0), Incoming(0))
    assert backward.gradients == (Gradient(ACC, 0), Gradient(Operand(0), 0))


def test_what_is_not_asked_is_not_computed() -> None:
    program = parse("t1 = mul acc, $0; t2 = mul t1, $1; store t2")
    backward = vjp(program, (Operand(1),))
    assert str(backward.program) == "t1 = mul acc, $0; t2 = mul t1, $1; store t2"
    assert backward.operands == (Operand(0), Incoming(0))
    assert backward.gradients == (Gradient(Operand(1), 0),)
    assert str(vjp(program, (ACC,)).program) == "t1 = mul $2, $1; t2 = mul t1, $0; store t2"


def test_incoming_gradient_is_passed_on_without_a_program() -> None:
    backward = vjp(parse("t1 = add acc, $0; t2 = copy t1; store t2"), (ACC, Operand(0)))
    assert backward.program is None
    assert backward.gradients == (Gradient(ACC, Incoming(0)), Gradient(Operand(0), Incoming(0)))


def test_gradients_of_several_outputs_add_up() -> None:
    backward = vjp(parse("t1 = neg acc; t2 = exp t1; store t2, t1, acc"), (ACC,))
    assert backward.operands == (Incoming(0), Incoming(1), Incoming(2))
    z, incoming = randn(2, 3), [randn(2, 3, seed=i) for i in range(3)]
    found = gradients(backward, z, [], [], incoming)[ACC]
    torch.testing.assert_close(found, incoming[2] - incoming[1] - incoming[0] * (-z).exp())


def test_view_is_undone_and_its_operands_meet_its_shape() -> None:
    program = parse("t1 = silu acc; t2 = view t1, 0.0; t3 = mul t2, $0; store t3, t1")
    z, table = randn(6, 5).requires_grad_(), randn(3, 5).requires_grad_()
    views = [(2, 3, 5)]
    outputs = reference.run(program, z, [table], views=views)
    incoming = [randn(2, 3, 5, seed=3), randn(6, 5, seed=4)]
    expected = torch.autograd.grad(outputs, [z, table], incoming)
    backward = vjp(program, (ACC, Operand(0)))

    def run(program: Program, acc: torch.Tensor, operands: Tensors) -> Tensors:
        found = fused_pointwise(
            acc.float(), [o.float() for o in operands], str(program), views=[*views, (6, 5)]
        )
        exact = reference.run(program, acc, operands, views=[*views, (6, 5)])
        for f, e in zip(found, exact, strict=True):
            torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-6)
        return exact

    with torch.no_grad():
        found = gradients(backward, z, [table], outputs, incoming, run)
    torch.testing.assert_close(found[ACC], expected[0])
    torch.testing.assert_close(found[Operand(0)], expected[1])
    assert saves(program, (ACC,)) == Saves(True, ())


SAVES = {
    "t1 = add acc, $0; t2 = mul t1, 2.0; t3 = neg t2; store t3": Saves(False, ()),
    "t1 = mul acc, $0; store t1": Saves(False, ()),
    "t1 = add acc, $0; t2 = relu t1; store t2": Saves(False, (0,)),
    "t1 = leaky_relu acc, 0.1; t2 = tanh t1; store t2": Saves(True, ()),
    "t1 = leaky_relu acc, 0.1; store t1": Saves(False, (0,)),
    "t1 = leaky_relu acc, -0.1; store t1": Saves(True, ()),
    "t1 = tanh acc; t2 = add t1, $0; t3 = relu6 t2; store t3, t1": Saves(False, (0, 1)),
    "t1 = sigmoid acc; t2 = mul t1, $0; store t2, t1": Saves(False, (1,)),
    "t1 = silu acc; store t1": Saves(True, ()),
    "t1 = silu acc; store t1, acc": Saves(False, (1,)),
    "t1 = floor acc; store t1": Saves(False, ()),
    "t1 = cast_bf16 acc; t2 = relu t1; store t2": Saves(True, ()),
}


@pytest.mark.parametrize("text", SAVES)
def test_what_a_forward_must_keep(text: str) -> None:
    assert saves(parse(text), (ACC,)) == SAVES[text]


def test_gradient_of_a_relu_is_taken_from_its_output() -> None:
    backward = without_z(BIAS_RELU, (ACC, Operand(0)))
    assert backward is not None
    assert str(backward.program) == "t1 = threshold_grad $0, acc, 0.0; store t1"
    assert (backward.acc, backward.operands) == (Stored(0), (Incoming(0),))


def test_scale_passes_the_incoming_gradient_as_the_accumulator() -> None:
    backward = without_z(parse("t1 = mul acc, $0; store t1"), (ACC,))
    assert backward is not None
    assert str(backward.program) == "t1 = mul acc, $0; store t1"
    assert (backward.acc, backward.operands) == (Incoming(0), (Operand(0),))


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (Operand(1), r"vjp: no operand \$1: there are 1"),
        (Value(1), "vjp: t1 is a value, not the accumulator or an operand"),
    ],
)
def test_unknown_variables_are_named(variable: Value | Operand, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        vjp(BIAS_RELU, (variable,))


def _products(count: int) -> str:
    lines = [f"t{i + 1} = mul {f't{i}' if i else 'acc'}, ${i}" for i in range(count)]
    return "; ".join([*lines, f"store t{count}"])


# The gradient of a mish takes more than six instructions, its value one.
_MISHES = MAX_INSTRUCTIONS // 6
REFUSED = {
    "too many instructions": (
        "; ".join(f"t{i + 1} = mish {f't{i}' if i else 'acc'}" for i in range(_MISHES))
        + f"; store t{_MISHES}",
        rf"program: \d+ instructions, a kernel holds at most {MAX_INSTRUCTIONS}",
    ),
    "too many operands": (
        _products(MAX_OPERANDS),
        f"program: {MAX_OPERANDS + 1} operands, a kernel holds at most {MAX_OPERANDS}",
    ),
    "too many outputs": (
        _products(MAX_OUTPUTS + 1),
        f"program: {MAX_OUTPUTS + 2} outputs, a kernel holds at most {MAX_OUTPUTS}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_program_beyond_a_kernel_is_refused_with_the_limit(name: str) -> None:
    text, reason = REFUSED[name]
    program = parse(text)
    backward = vjp(program, variables(program, [torch.empty(1)] * program.operand_count))
    assert backward.refusal is not None
    assert re.fullmatch(reason, backward.refusal)
    check_chain(program)  # the reference runs it all the same


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("full", Reduction.NONE),
        ("row", Reduction.ROWS),
        ("column", Reduction.COLUMNS),
        ("scalar", Reduction.ALL),
        ("periodic full", Reduction.RECURRING),
        ("repeated full", Reduction.RECURRING),
        ("periodic repeated column", Reduction.RECURRING_AND_COLUMNS),
    ],
)
def test_reduction_follows_from_the_kind(kind: str, expected: Reduction) -> None:
    assert reduction(kind) is expected


# Order -------------------------------------------------------------------------------------------


def slots(program: Program) -> int:
    try:
        return 1 + max(step.save for step in lower(program))
    except ProgramError:
        return 99


def kept(program: Program) -> int:
    return sum(step.save >= 0 for step in lower(program))


def test_schedule_computes_the_same_and_keeps_less_in_slots() -> None:
    before, after = [], []
    for seed in range(200):
        program = drawn(seed)
        ordered = schedule(program)
        assert sorted(i.op for i in ordered.instructions) == sorted(
            i.op for i in program.instructions
        )
        operands = [randn(), randn(20), randn(3, 1)]
        z = randn(3, 20)
        for a, b in zip(
            reference.run(program, z, operands), reference.run(ordered, z, operands), strict=True
        ):
            assert same(a.double(), b.double()).all()
        assert slots(ordered) <= max(slots(program), MAX_SLOTS)
        if slots(program) <= MAX_SLOTS:
            before.append(kept(program))
            after.append(kept(ordered))
    assert len(before) > 100
    assert sum(after) < sum(before)


def test_schedule_finds_an_order_without_slots() -> None:
    program = parse("t1 = exp $0; t2 = exp $1; t3 = exp acc; t4 = mul t3, $2; store t1, t2, t4")
    assert slots(program) > 0
    assert slots(schedule(program)) == 0
