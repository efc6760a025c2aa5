"""Calls in float64: torch's GEMM and one kernel in double precision on CUDA, torch on the CPU."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from helpers_abi import Cpu, Step, layout, operand, path
from helpers_programs import POINTWISE_KERNEL_OPS, one_op
from torch import nn

import fxfuse
from fxfuse import errors, fused, library, recipes, reference
from fxfuse.fused import forced_route, fused_linear, fused_pointwise
from fxfuse.infer import Store
from fxfuse.library import Gemm, OperandLayout
from fxfuse.lower import lower
from fxfuse.ops import OPS
from fxfuse.program import parse
from fxfuse.recipes import Static
from fxfuse.vjp import Reduction

built = pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built")


without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gpu(test):
    """Marks a test that needs a CUDA device."""
    return pytest.mark.gpu(without_gpu(test))


F64 = library.DTYPES[torch.float64]
CHAIN = "t1 = add acc, $0; t2 = gelu t1; t3 = mul t2, $1; t4 = mul t3, 0.1; store t4"


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    recipes.forget()
    yield
    recipes.forget()


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, device="cuda").to(dtype)


def route(function, *args, program):
    """What a call returns, and the one route that calls of its site took."""
    found = function(*args, program, site="here")
    ((taken, reason),) = fused.routes_taken("here", program)
    return found, taken if reason is None else f"{taken}: {reason}"


# What a kernel is told ---------------------------------------------------------------------------


def test_a_cast_to_float32_rounds_only_in_double():
    program = parse("t1 = cast_f32 acc; t2 = exp t1; t3 = cast_f32 $0; t4 = add t2, t3; store t4")
    assert [s.op for s in lower(program)] == ["exp", "copy", "add"]
    assert [s.op for s in lower(program, double=True)] == ["cast_f32", "exp", "cast_f32", "add"]


@built
def test_a_problem_in_double_holds_its_constants_in_double():
    lib = library.find("fxfuse_cpu")
    assert isinstance(lib, library.Library)
    program = parse("t1 = mul acc, 0.1; t2 = softplus t1, 0.3, 20.7; store t2")
    f64 = torch.float64
    problem = lib.problem(program, 2, 4, f64, 4, [], [f64], reductions=[Reduction.ROWS])
    assert problem.input_dtype == problem.program.output[0].dtype == F64
    held = [list(pair) for pair in problem.program.immediate_f64[:2]]
    assert held == [[0.1, 0.0], [0.3, 20.7]]
    assert problem.program.instruction[0].immediate[0] == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("acc", "of_operand", "output", "double"),
    [
        (torch.float32, torch.float32, torch.float32, False),
        (torch.float64, torch.float32, torch.float32, True),
        (torch.float32, torch.float64, torch.float32, True),
        (torch.bfloat16, torch.float32, torch.float64, True),
    ],
)
def test_one_tensor_of_float64_puts_a_problem_in_double(acc, of_operand, output, double):
    row = OperandLayout("row", 0, 1, 1, 1, of_operand)
    assert library.in_double(acc, [row], [output]) is double


@built
@pytest.mark.parametrize("which", ["input", "operand", "output"])
def test_a_product_in_double_is_refused_by_name(which):
    lib = library.find("fxfuse_cpu")
    assert isinstance(lib, library.Library)
    row = OperandLayout("row", 0, 1, 1, 1, torch.float32)
    f32 = torch.float32
    problem = lib.problem(
        parse("t1 = add acc, $0; store t1"), 4, 4, f32, 0, [row], [f32], Gemm(4, 4, 4, None)
    )
    field = {"input": "input_dtype", "operand": "operand[0].dtype", "output": "output[0].dtype"}
    if which == "input":
        problem.input_dtype = F64
    else:
        getattr(problem.program, which)[0].dtype = F64
    status = lib.handle.fxfuse_cpu_run(ctypes.byref(problem), library.Pointers(), 1)
    assert status == library.STATUS_UNSUPPORTED
    message = lib.handle.fxfuse_last_error().decode()
    assert message == f"fxfuse_cpu_run: {field[which]}=4 (f64), a problem with a GEMM takes none"


@built
def test_the_cpu_library_says_that_it_takes_no_float64():
    cpu = Cpu()
    acc, out = torch.zeros(3, 4), torch.zeros(3, 4)
    row = torch.zeros(4, dtype=torch.float64)
    step = Step("add", ((0, 0), operand(0)), store=0)
    problem, pointers = cpu.problem([step], acc, [out], [layout(row)])
    assert cpu.call(problem, pointers) == library.STATUS_UNSUPPORTED
    refusal = "fxfuse_cpu_run: a tensor is f64 (4), which only libfxfuse_cuda takes"
    assert cpu.last_error() == refusal
    problem.program.operand[0].dtype = 5
    assert cpu.call(problem, pointers) == 1
    expected = "operand[0].dtype=5, expected f32 (0), f16 (1), bf16 (2), bool (3) or f64 (4)"
    assert cpu.last_error() == f"fxfuse_cpu_run: {expected}"


@built
def test_float64_on_the_cpu_is_torchs():
    x, row = torch.randn(2, 4, dtype=torch.float64), torch.randn(4)
    found, taken = route(fused_pointwise, x, [row], program="t1 = add acc, $0; store t1")
    assert taken == "reference: torch.float64 is computed by torch ops"
    assert torch.equal(found, x + row)
    recipes.forget()
    _, taken = route(fused_pointwise, row[None], [x[0, 0]], program="t1 = mul acc, $0; store t1")
    assert taken == "reference: operand 0 is torch.float64"


# Every op ----------------------------------------------------------------------------------------

SPECIAL = [0.0, 1.0, 0.5, 1.5, 2.5, 3.0, 6.0, 20.0, 88.0, 104.0, 708.0, 746.0, 1e4, 1e-4, 6e-8]
SPECIAL += [1e-20, 1e-300, 5e-324, 1e30, 65519.0, 65520.0, math.inf]
SPECIAL += [-x for x in SPECIAL] + [math.nan]
PARAMS = {"threshold": (0.3, -2.1), "clamp": (-0.7, 1.3), "softplus": (2.1, 20.3)}
PARAMS |= {"clamp_grad": (-0.7, 1.3), "hardtanh_grad": (-0.7, 1.3), "celu": (1.3,), "elu": (1.3,)}
# Of these torch's own formula cancels, or loses a tail, by more than 1e-14 of a result; they are
# held to torch by 1e-14 of their terms here, and to what is right by the tests of tails.
CANCELLING = {"gelu", "gelu_tanh", "tanhshrink", "lerp", "mish", "softplus", "logsigmoid"}
CANCELLING |= {"gelu_grad", "gelu_tanh_grad", "silu_grad"}


@gpu
@pytest.mark.parametrize("name", POINTWISE_KERNEL_OPS)
def test_every_op_is_torchs_in_float64(name):
    program = one_op(name, PARAMS, 0.1)
    values = torch.tensor(SPECIAL, dtype=torch.float64, device="cuda")
    if name == "lerp" or name.endswith("_grad"):
        # Steps that overflow, or meet infinity times zero, do so in an order of torch's own.
        values = values.clamp(-6e4, 6e4)
    columns = len(SPECIAL)
    smooth = torch.linspace(-6, 6, 64 * columns, dtype=torch.float64, device="cuda")
    x = torch.cat([values[:, None].expand(-1, columns), smooth.reshape(64, columns)]).contiguous()
    y = torch.cat([values.expand(columns, -1), randn(64, columns)])
    z = torch.cat([values.flip(0).expand(columns, -1), randn(64, columns)])
    operands = [y, z][: OPS[name].arity - 1]
    if name == "where":
        operands, program = [y, z], "t1 = gt acc, 0.0; t2 = where t1, $0, $1; store t2"
    if name == "prelu":
        operands = [torch.tensor([0.2], dtype=torch.float64, device="cuda")]
    found, taken = route(fused_pointwise, x, operands, program=program)
    assert taken == "pointwise"
    (eager,) = reference.run(parse(program), x, operands)
    assert (found.dtype, found.shape) == (eager.dtype, eager.shape)
    if name.startswith("cast_"):
        # torch rounds to 16 bits by way of fp32, so twice.
        ulp = 0 if name == "cast_f32" else torch.finfo(eager.dtype).eps
        torch.testing.assert_close(found, eager, rtol=ulp, atol=0, equal_nan=True)
        return
    assert torch.equal(found.isnan(), eager.isnan()), (x[found.isnan() != eager.isnan()], name)
    infinite = eager.isinf() | found.isinf()
    assert torch.equal(found[infinite], eager[infinite])
    finite = eager.isfinite()
    slack = 1e-300
    if name in CANCELLING:
        slack = sum((t.nan_to_num().abs() for t in operands), x.nan_to_num().abs())[finite] + 1
        slack = 1e-14 * slack
    error = (found - eager)[finite].abs()
    # torch's kernels take the sixth of these as a float.
    relative = 4e-8 if name in ("hardsigmoid", "hardswish") else 1e-14
    assert (error <= relative * eager[finite].abs() + slack).all(), (name, error.max())


TAILS = {
    "gelu": (lambda m, x: x * m.erfc(-x / m.sqrt(2)) / 2, (-37.5, 8.0)),
    "silu": (lambda m, x: x / (1 + m.exp(-x)), (-700.0, 8.0)),
    "sigmoid": (lambda m, x: 1 / (1 + m.exp(-x)), (-700.0, 8.0)),
    "softplus": (lambda m, x: m.log1p(m.exp(x)), (-700.0, 8.0)),
    "logsigmoid": (lambda m, x: -m.log1p(m.exp(-x)), (-8.0, 700.0)),
    "mish": (lambda m, x: x * m.tanh(m.log1p(m.exp(x))), (-700.0, 8.0)),
    "tanhshrink": (lambda m, x: x - m.tanh(x), (-2.0, 2.0)),
}


@gpu
@pytest.mark.parametrize("name", TAILS)
def test_tails_and_differences_keep_their_relative_accuracy(name):
    mpmath = pytest.importorskip("mpmath")
    function, (low, high) = TAILS[name]
    x = torch.linspace(low, high, 401, dtype=torch.float64)
    if name == "tanhshrink":
        x = torch.cat([x, torch.logspace(-9, 0, 100, dtype=torch.float64)])
    params = "".join(f", {p}" for p in OPS[name].defaults)
    found = fused_pointwise(x.cuda()[None], [], f"t1 = {name} acc{params}; store t1").cpu()[0]
    with mpmath.workdps(60):
        for value, result in zip(x.tolist(), found.tolist(), strict=True):
            truth = function(mpmath, mpmath.mpf(value))
            assert abs(result - truth) <= 1e-14 * abs(truth), (name, value)


@gpu
def test_a_store_to_16_bits_rounds_once():
    casts = {"cast_f16": (torch.float16, 2.0**-11), "cast_bf16": (torch.bfloat16, 2.0**-8)}
    for name, (dtype, half) in casts.items():
        x = [1 + half + 2.0**-40, 1 + half, -1 - half - 2.0**-40]  # by way of fp32: three ties
        given = torch.tensor([x], dtype=torch.float64, device="cuda")
        found = fused_pointwise(given, [], f"t1 = {name} acc; store t1")
        assert found.dtype == dtype
        assert found.double().tolist() == [[1 + 2 * half, 1.0, -1 - 2 * half]]


# Calls -------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("kind", ["full", "row", "column", "scalar", "one", "periodic", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("columns", [72, 71])
def test_every_operand_kind(kind, dtype, columns):
    shapes = {
        "full": (4, 9, columns), "row": (columns,), "column": (4, 9, 1), "scalar": (), "one": (1,),
        "periodic": (9, columns), "repeated": (4, 1, columns),
    }  # fmt: skip
    x, weight, bias = randn(4, 9, 40), randn(columns, 40), randn(columns)
    a, b = randn(*shapes[kind]), randn(columns)
    a = a > 0 if dtype == torch.bool else a.to(dtype)
    found, taken = route(fused_linear, x, weight, bias, [a, b], program=CHAIN)
    assert taken == "cublas"
    truth = F.gelu(F.linear(x, weight, bias) + a) * b * 0.1
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-14)


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (1, 4099), (1000, 3), (257, 513), (130, 2048), (0, 5)])
def test_shapes_and_strides(shape):
    program = "t1 = mul acc, 0.1; t2 = tanh t1; store t2, t1"
    wide = randn(shape[0], shape[1] + 3)
    for x in (wide[:, : shape[1]], wide[:, 3:], wide[:, : shape[1]].t().contiguous().t()):
        found = fused_pointwise(x, [], program)
        torch.testing.assert_close(found, ((x * 0.1).tanh(), x * 0.1), rtol=1e-14, atol=1e-16)


@gpu
def test_float32_and_float64_meet_as_torch_promotes_them():
    x, weight, row = randn(33, 40, dtype=torch.float32), randn(72, 40).float(), randn(72)
    program = "t1 = mul acc, $0; t2 = exp t1; store t2, t1"
    found, taken = route(fused_linear, x, weight, None, [row], program=program)
    assert taken == "cublas"
    product = F.linear(x, weight).double() * row
    torch.testing.assert_close(found, (product.exp(), product), rtol=1e-13, atol=1e-14)
    scalar = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    narrow, taken = route(
        fused_pointwise, x, [scalar], program="t1 = mul acc, $0; t2 = exp t1; store t2"
    )
    assert (narrow.dtype, taken) == (torch.float32, "pointwise")
    torch.testing.assert_close(narrow, (x * 0.1).exp())


@gpu
def test_a_cast_between_rounds():
    x = randn(33, 72)
    for name, dtype in (("cast_f32", torch.float32), ("cast_f16", torch.float16)):
        program = f"t1 = {name} acc; t2 = mul t1, $0; store t2, t1"
        found = fused_pointwise(x, [x], program)
        assert [t.dtype for t in found] == [torch.float64, dtype]
        torch.testing.assert_close(found[0], x.to(dtype) * x, rtol=2**-9, atol=1e-7)
        assert torch.equal(found[0], found[1] * x)


@gpu
def test_other_routes_are_refused_by_name():
    x, weight = randn(64, 64), randn(64, 64)
    with forced_route("portable"), pytest.raises(errors.KernelError, match="float64 are torch's"):
        fused_linear(x, weight, None, [], "t1 = relu acc; store t1")
    with forced_route("cublas"):
        fused_linear(x, weight, None, [], "t1 = relu acc; store t1")


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (5000, 1), (333, 777), (1024, 1024), (70, 5000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_are_taken_in_double(shape, dtype):
    z, scale = randn(*shape).to(dtype), randn(shape[1])
    text = "t1 = tanh acc; t2 = mul t1, $0; t3 = copy t2; t4 = add t2, 0.1; store t2, t3, t4, t1"
    kinds = (Reduction.NONE, Reduction.ROWS, Reduction.COLUMNS, Reduction.ALL)
    static = Static(text, stores=tuple(Store(kind, torch.float64) for kind in kinds))
    recipe = recipes.find(z, None, None, [scale], static)
    assert recipe.route == "pointwise"
    found = recipe.run(z, None, None, [scale])
    tanh = z.double().tanh()
    values = tanh * scale
    truth = [values, values.sum(0), (values + 0.1).sum(1), tanh.sum()]
    size = [1.0, values.abs().sum(0), (values + 0.1).abs().sum(1), tanh.abs().sum()]
    for f, t, s in zip(found, truth, size, strict=True):
        assert (f.dtype, f.shape) == (torch.float64, t.shape)
        assert ((f - t).abs() <= 1e-14 * s).all()
    again = recipe.run(z, None, None, [scale])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


# Gradients ---------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("kind", ["full", "row", "column", "scalar", "periodic"])
def test_gradients_are_torchs(kind):
    shapes = {"full": (4, 9, 72), "row": (72,), "column": (4, 9, 1), "scalar": (1,)}
    shapes["periodic"] = (9, 72)
    inputs = [randn(4, 9, 40), randn(72, 40), randn(72), randn(*shapes[kind]), randn(72)]
    mine = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.clone().requires_grad_() for t in inputs]
    dy = randn(4, 9, 72)
    fused_linear(*mine[:3], mine[3:], CHAIN, site="here").backward(dy)
    assert fused.routes_taken("here", CHAIN) == [("cublas", None)]
    assert not any(b.startswith("reference") for b in fused.backwards_taken("here", CHAIN))
    (F.gelu(F.linear(*theirs[:3]) + theirs[3]) * theirs[4] * 0.1).backward(dy)
    for m, t in zip(mine, theirs, strict=True):
        assert m.grad.dtype == torch.float64
        assert (m.grad - t.grad).norm() <= 1e-14 * t.grad.norm()


@gpu
@pytest.mark.parametrize("act", ["gelu", "silu", "tanh", "softplus", "mish", "logsigmoid"])
def test_gradients_and_their_gradients_by_differences(act):
    params = "".join(f", {p}" for p in OPS[act].defaults)
    program = f"t1 = add acc, $0; t2 = {act} t1{params}; t3 = mul t2, 0.1; store t3"
    tensors = [randn(3, 5), randn(6, 5), randn(6), randn(6)]
    tensors = [t.requires_grad_() for t in tensors]

    def function(x, weight, bias, row):
        return fused_linear(x, weight, bias, [row], program)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@gpu
def test_a_model_in_float64_is_fused():
    model = nn.Sequential(nn.Linear(40, 72), nn.SiLU(), nn.Linear(72, 8), nn.Tanh())
    model = model.double().cuda()
    x = randn(33, 40)
    optimized = fxfuse.optimize(model)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-13, atol=1e-14)
    routes = [r for g in fxfuse.report(optimized).groups for r in g.routes]
    assert routes == ["cublas", "cublas"]
