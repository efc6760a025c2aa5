"""Ops over groups of columns: their kernels at every width, their sums and their derivatives."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers_abi import PREVIOUS, Cpu, Step, layout, operand, path, slot
from helpers_numerics import as_double
from helpers_vjp import Fused, by_autograd, gradients, variables

from fxfuse import recipes, reference
from fxfuse.infer import Store
from fxfuse.program import parse
from fxfuse.recipes import Static
from fxfuse.vjp import Reduction, vjp

pytestmark = pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def cpu(request: pytest.FixtureRequest) -> Iterator[Cpu]:
    library = Cpu()
    best = library.isa()
    if not library.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield library
    library.set_isa(best)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3
SHAPES = [(1, 1), (1, 37), (2, 8), (8, 1000), (24, 72), (24, 3000), (128, 128), (128, 1024)]
SHAPES += [(128, 5120), (1000, 2000), (1024, 1024), (1024, 4096)]


def parts(values: torch.Tensor, width: int) -> torch.Tensor:
    return values.double().unflatten(-1, (-1, width))


def exact_normalize(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.layer_norm(parts(x, width), (width,), eps=EPS).flatten(-2)


def exact_mean(x: torch.Tensor, width: int) -> torch.Tensor:
    return parts(x, width).mean(-1, keepdim=True).expand(-1, -1, width).flatten(-2)


def exact_grad(grad: torch.Tensor, x: torch.Tensor, width: int) -> torch.Tensor:
    x = as_double(x).requires_grad_()
    return torch.autograd.grad(exact_normalize(x, width), x, as_double(grad))[0]


def close(found: torch.Tensor, exact: torch.Tensor, tolerance: float = 3e-6) -> None:
    scale = exact.abs().amax().clamp_min(1.0)
    assert ((found.double() - exact).abs().amax() / scale) <= tolerance


@pytest.mark.parametrize("count", [1, 5, 70])
@pytest.mark.parametrize(("width", "columns"), SHAPES)
def test_kernels_of_every_width(cpu: Cpu, width: int, columns: int, count: int) -> None:
    torch.manual_seed(0)
    x, grad, scale = (torch.randn(count, columns) * s + 0.5 for s in (1.0, 2.0, 0.1))
    norm, mean, back = (torch.full_like(x, math.nan) for _ in range(3))
    steps = [
        Step("mul", (PREVIOUS, operand(0)), save=0),
        Step("normalize", (PREVIOUS,), (width, EPS), store=0),
        Step("group_mean", (slot(0),), (width,), store=1),
        Step("normalize_grad", (operand(1), slot(0)), (width, EPS), store=2),
    ]
    cpu.run(steps, x, [norm, mean, back], [layout(scale[0]), layout(grad)], threads=2)
    scaled = x * scale[0]
    close(norm, exact_normalize(scaled, width))
    close(mean, exact_mean(scaled, width))
    close(back, exact_grad(grad, scaled, width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [48, 1104, 4128])
def test_kernels_over_groups_of_several_widths_in_place(
    cpu: Cpu, columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(33, columns).to(dtype)
    kept = exact_normalize(exact_normalize(x, 24), 16) - exact_mean(x, 8)
    steps = [
        Step("group_mean", (PREVIOUS,), (8,), save=1),
        Step("normalize", (operand(0),), (24, EPS)),
        Step("normalize", (PREVIOUS,), (16, EPS)),
        Step("sub", (PREVIOUS, slot(1)), store=0),
    ]
    cpu.run(steps, x, [x], [layout(x)], threads=2)
    close(x, kept, 3e-6 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("columns", [128, 3072])
@pytest.mark.parametrize("width", [8, 128])
def test_what_is_normalized_is_summed(width: int, columns: int, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    x, grad = (torch.randn(300, columns).to(device) for _ in range(2))
    groups = columns / width
    text = (
        f"t1 = normalize_grad $0, acc, {groups}, {EPS}; t2 = normalize acc, {groups}, {EPS}; "
        "t3 = mul t2, $0; t4 = copy t3; store t1, t3, t4"
    )
    reductions = (Reduction.NONE, Reduction.ROWS, Reduction.COLUMNS)
    static = Static(text, stores=tuple(Store(r, torch.float32) for r in reductions))
    recipe = recipes.find(x, None, None, [grad], static)
    assert recipe.route in ("cpu", "pointwise")
    dx, by_rows, by_columns = recipe.run(x, None, None, [grad])
    product = exact_normalize(x, width) * grad.double()
    close(dx, exact_grad(grad, x, width))
    close(by_rows, product.sum(0))
    close(by_columns, product.sum(1))


@pytest.mark.parametrize("op", ["normalize", "group_mean", "normalize_grad"])
@pytest.mark.parametrize("width", [0.0, -8.0, 2.5, 7.0, 2048.0, math.nan, math.inf])
def test_bad_width_is_named(op: str, width: float) -> None:
    cpu, x = Cpu(), torch.zeros(2, 4096)
    sources = (PREVIOUS, operand(0)) if op == "normalize_grad" else (PREVIOUS,)
    values = (width,) if op == "group_mean" else (width, EPS)
    steps = [Step("relu"), Step(op, sources, values, store=0)]
    assert cpu.call(*cpu.problem(steps, x, [x.clone()], [layout(x)])) == 1
    assert cpu.last_error() == (
        f"fxfuse_cpu_run: instruction[1].immediate[0]={width:g}, expected a divisor of n=4096, "
        "up to 1024"
    )


# Derivatives -------------------------------------------------------------------------------------

OPS = {
    "group_norm": "t1 = group_norm acc, $0, $1, 3.0, 0.1; store t1",
    "group_norm without bias": "t1 = group_norm acc, $0, 0.0, 3.0, 0.1; store t1",
    "normalize": "t1 = normalize acc, 2.0, 0.1; store t1",
    "group_mean": "t1 = group_mean acc, 4.0; t2 = mul t1, acc; store t2",
    "normalize_grad": "t1 = normalize_grad acc, $0, 3.0, 0.1; store t1",
    "normalize_grad of a row": "t1 = normalize_grad $0, acc, 3.0, 0.1; store t1",
}


# torch has no gradient for one of a bias and no weight.
WITHOUT_WEIGHT = {"group_norm without weight": "t1 = group_norm acc, 1.0, $0, 3.0, 0.1; store t1"}


@pytest.mark.parametrize("name", [*OPS, *WITHOUT_WEIGHT])
def test_derivatives_of_an_op_over_groups(name: str) -> None:
    program, seed = parse((OPS | WITHOUT_WEIGHT)[name]), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=seed, dtype=torch.float64)  # noqa: E731
    shape = (3, 12) if name == "normalize_grad" else (12,)
    z, operands = draw(3, 12), [draw(*shape) for _ in range(program.operand_count)]
    if name in OPS:
        outputs, incoming = reference.run(program, z, operands), [draw(3, 12)]
        backward = vjp(program, variables(program, operands))
        found = gradients(backward, z, operands, outputs, incoming)
        expected = by_autograd(program, z, operands, incoming)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    tensors = [t.requires_grad_() for t in (z, *operands)]
    assert torch.autograd.gradcheck(functools.partial(Fused.apply, program), tensors)
    assert torch.autograd.gradgradcheck(functools.partial(Fused.apply, program), tensors)
