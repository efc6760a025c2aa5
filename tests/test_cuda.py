"""On a CUDA device: every op, operand kind, tile and route, and what surrounds a call."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_programs import POINTWISE_KERNEL_OPS, one_op
from torch import nn

import fxfuse
from fxfuse import cuda, fused, library, recipes, reference
from fxfuse.errors import KernelError
from fxfuse.fused import forced_route, fused_linear, fused_pointwise
from fxfuse.ops import OPS
from fxfuse.program import parse
from fxfuse.recipes import Static

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
RELU = "t1 = relu acc; store t1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
PARAMS = {"threshold": (0.5, -2.0), "clamp": (-0.75, 1.5), "softplus": (2.0, 20.0)}
PARAMS |= {"clamp_grad": (-0.75, 1.5), "hardtanh_grad": (-0.75, 1.5)}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(found, eager, truth, slack=1e-7):
    """The contract: no further from float64 than eager is, and not finite in the same places."""
    assert found.dtype == eager.dtype
    assert found.shape == eager.shape
    assert error(found, truth) <= 1.05 * error(eager, truth) + slack


def chain(x, weight, bias, a, b):
    return F.silu(F.linear(x, weight, bias) + a) * b


# Every op ----------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 6.0, 20.0, -20.0, 88.0]
SPECIAL += [-88.0, 104.0, -104.0, 1e4, -1e4, 6e4, 1e-4, -1e-4, 6e-8, float("inf"), float("-inf")]
SPECIAL += [float("nan")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POINTWISE_KERNEL_OPS)
def test_every_op(name, dtype):
    program = one_op(name, PARAMS, 0.5)
    values = torch.tensor(SPECIAL, device="cuda")
    special = torch.cartesian_prod(values, values)[:, 0].reshape(-1, len(SPECIAL))
    other = values.expand(len(SPECIAL), -1).contiguous()
    smooth = torch.linspace(-6, 6, 64 * 27, device="cuda").reshape(64, 27)
    x = torch.cat([special, smooth]).to(dtype)
    y = torch.cat([other, randn(64, 27)]).to(dtype)
    z = torch.cat([other.flip(1), randn(64, 27)]).to(dtype)
    if name.endswith("_grad"):  # infinity times a slope that is nearly zero, or zero
        x = x.clamp(-6e4, 6e4)
    if name in ("tanh_grad", "sigmoid_grad"):  # of a result, which lies in [-1, 1] or [0, 1]
        y = y.clamp(-1 if name == "tanh_grad" else 0, 1)
    operands = [y, z][: OPS[name].arity - 1]
    if name == "where":
        operands, program = [y, z], "t1 = gt acc, 0.0; t2 = where t1, $0, $1; store t2"
    if name == "prelu":
        operands = [torch.tensor([0.2], device="cuda").to(dtype)]
    found = fused_pointwise(x, operands, program, site="op")
    (eager,) = reference.run(parse(program), x, operands)
    wide = [o.double() for o in operands]
    if name.startswith("cast_"):
        assert found.dtype == eager.dtype
        torch.testing.assert_close(found, eager, rtol=0, atol=0, equal_nan=True)
        return
    (truth,) = reference.run(parse(program), x.double(), wide)
    truth = torch.where(eager.isfinite(), truth, eager.double())
    assert torch.equal(found.isnan(), eager.isnan()), x[found.isnan() != eager.isnan()]
    infinite = eager.isinf()
    assert torch.equal(found[infinite], eager[infinite])
    finite = eager.isfinite()
    # A value at the edge of the range may round to infinity in one and not in the other.
    edge = found.isinf() & finite
    assert (truth[edge].abs() >= 0.99 * torch.finfo(dtype).max).all()
    finite &= ~edge
    for rows in (slice(0, len(SPECIAL)), slice(len(SPECIAL), None)):
        keep = finite[rows]
        scale = 1 / truth[rows][keep].abs().clamp_min(1e-6)
        mine = (found[rows][keep].double() - truth[rows][keep]) * scale
        theirs = (eager[rows][keep].double() - truth[rows][keep]) * scale
        assert mine.norm() <= 1.05 * theirs.norm() + 4e-6 * mine.numel() ** 0.5, name
    zero = finite & (eager == 0) & (truth == 0)
    # Where the slope of an activation underflows, the sign of the zero is of no consequence.
    signs_matter = dtype == torch.float32 and not name.endswith("_grad")
    assert torch.equal(found[zero].signbit(), eager[zero].signbit()) or not signs_matter


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["portable", "cublas"])
@pytest.mark.parametrize("kind", ["full", "row", "column", "scalar", "one", "periodic", "repeated"])
def test_every_operand_kind(kind, route, dtype):
    torch.set_float32_matmul_precision("high" if route == "portable" else "highest")
    shapes = {
        "full": (4, 9, 72), "row": (72,), "column": (4, 9, 1), "scalar": (), "one": (1,),
        "periodic": (9, 72), "repeated": (4, 1, 72),
    }  # fmt: skip
    x, weight, bias = randn(4, 9, 40, dtype=dtype), randn(72, 40, dtype=dtype), randn(72).to(dtype)
    a, b = randn(*shapes[kind], dtype=dtype), randn(72, dtype=dtype)
    with forced_route(route):
        found = fused_linear(x, weight, bias, [a, b], CHAIN)
    truth = chain(*(t.double() for t in (x, weight, bias, a, b)))
    check(found, chain(x, weight, bias, a, b), truth)


# The portable GEMM -------------------------------------------------------------------------------

SIZES = [1, 7, 64, 130, 1001]
SHAPES = [s for s in itertools.product(SIZES, SIZES, SIZES) if sum(s) % 3 != 0 or 1 in s]
SHAPES += [(4097, 130, 64), (7, 4097, 130), (64, 64, 4097), (1, 4097, 4097), (4097, 1001, 1001)]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_portable_gemm_at_ragged_sizes(dtype):
    torch.set_float32_matmul_precision("high")
    wrong = []
    for m, n, k in SHAPES:
        x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype)
        bias, a, b = (randn(n, dtype=dtype) for _ in range(3))
        with forced_route("portable"):
            found = fused_linear(x, weight, bias, [a, b], CHAIN)
        truth = chain(*(t.double() for t in (x, weight, bias, a, b)))
        eager = error(chain(x, weight, bias, a, b), truth)
        # cuBLAS may take an fp32 path for a thin product. TF32's own error is then the bound:
        # 2^-11 of each factor, against a result that may have cancelled.
        mass = ((x.double().abs() @ weight.double().abs().T).norm() / truth.norm()).item()
        bound = max(eager, 6e-4, 1e-3 * mass / k**0.5) if dtype == torch.float32 else eager
        if not error(found, truth) <= 1.05 * bound + 1e-7:
            wrong.append((m, n, k, error(found, truth), eager))
    assert wrong == []


def test_portable_names_its_route_and_kernel():
    from fxfuse.cuda import kernel_name

    recipes.forget()
    x, weight = randn(64, 64, dtype=torch.bfloat16), randn(64, 64, dtype=torch.bfloat16)
    with forced_route("portable"):
        fused_linear(x, weight, None, [], RELU, site="named")
    assert fused.routes_taken("named", RELU) == [("portable", None)]
    lib = library.find("fxfuse_cuda")
    assert kernel_name(lib, parse(RELU), 64, 64, 64, torch.bfloat16, "portable").startswith(
        "portable_bf16"
    )


UNALIGNED = {
    "offset rows": lambda m, k: torch.empty(m + 1, k)[1:],
    "odd depth": lambda m, k: torch.empty(m, k + 1),
    "shifted": lambda m, k: torch.empty(m * k + 1)[1:].view(m, k),
    "sliced": lambda m, k: torch.empty(m, k + 3)[:, 1 : k + 1],
    "wide stride": lambda m, k: torch.empty(m, 2 * k)[:, :k],
    "column major": lambda m, k: torch.empty(k, m).t(),
    "expanded": lambda m, k: torch.empty(1, k).expand(m, k),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("which", UNALIGNED)
def test_unaligned_and_strided_inputs(which, dtype):
    like = UNALIGNED[which](33, 48)
    k = like.shape[1]

    def shaped(source):
        base = UNALIGNED[which](33, 48).to("cuda")
        made = torch.empty_strided(like.shape, like.stride(), device="cuda", dtype=dtype)
        del base
        if which == "shifted":
            made = torch.empty(33 * k + 1, device="cuda", dtype=dtype)[1:].view(33, k)
        if which == "expanded":
            return source[:1].expand(33, k)
        return made.copy_(source)

    x, weight = shaped(randn(33, k, dtype=dtype)), shaped(randn(33, k, dtype=dtype))
    bias, a, b = randn(33, dtype=dtype), shaped(randn(33, k, dtype=dtype))[:, :33], randn(33)
    b = b.to(dtype)
    truth = chain(*(t.double() for t in (x, weight, bias, a, b)))
    eager = chain(x, weight, bias, a, b)
    with forced_route("cublas"):
        check(fused_linear(x, weight, bias, [a, b], CHAIN), eager, truth)
    with forced_route("portable"):
        check(fused_linear(x, weight, bias, [a, b], CHAIN), eager, truth)


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_sizes(shape, dtype):
    m, n, k = shape
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    found = fused_linear(x, weight, bias, [], RELU)
    torch.testing.assert_close(found, torch.relu(F.linear(x, weight, bias)))


@pytest.mark.parametrize("route", ["portable", "cublas"])
def test_several_outputs_of_several_dtypes(route):
    program = "t1 = tanh acc; t2 = mul t1, $0; t3 = cast_f32 t2; store t3, t1, t2"
    x, weight = randn(70, 33, dtype=torch.bfloat16), randn(65, 33, dtype=torch.bfloat16)
    a = randn(70, 65, dtype=torch.bfloat16)
    with forced_route(route):
        found = fused_linear(x, weight, None, [a], program)
    t1 = torch.tanh(x.double() @ weight.double().t())
    assert [o.dtype for o in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for output, truth in zip(found, (t1 * a.double(), t1, t1 * a.double()), strict=True):
        assert error(output, truth) < 8e-3


def test_infinities_and_nans_pass_the_gemm():
    x, weight = randn(64, 64, dtype=torch.bfloat16), randn(64, 64, dtype=torch.bfloat16)
    x[3, 5], x[9, 0] = float("inf"), float("nan")
    program = "t1 = clamp acc, -1.0, 1.0; store t1"
    with forced_route("portable"):
        found = fused_linear(x, weight, None, [], program)
    expected = torch.clamp(F.linear(x, weight), -1, 1)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, equal_nan=True)


# An output over an operand ------------------------------------------------------------------------

ADD = "t1 = add acc, $0; store t1"


@pytest.mark.parametrize("shape", [(768, 768, 512), (300, 264, 200), (130, 770, 96)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("route", ["auto", "portable", "hopper", "skinny", "cublas"])
def test_sums_are_written_over_what_they_are_added_to(route, precision, transposed, shape):
    torch.set_float32_matmul_precision(precision)
    m, n, k = (20, *shape[1:]) if route == "skinny" else shape
    x, weight, to = randn(m, k), randn(*((k, n) if transposed else (n, k))), randn(m * n + 1)
    truth = x.double() @ (weight if transposed else weight.t()).double()
    for start in (0, 1):  # an address that is a multiple of 16 bytes, and one that is not
        at = to[start : start + m * n].view(m, n)
        expected, version = at + truth, at._version
        static = Static(ADD, transposed, normwise=True, in_place=True)
        with forced_route(route) if route != "auto" else contextlib.nullcontext():
            try:
                found = recipes.run(x, weight, None, [at], static)
            except KernelError as refusal:
                pytest.skip(str(refusal))
        assert found[0] is at
        assert at._version > version
        assert error(at, expected) < (1e-3 if precision == "high" else 1e-6)


@pytest.mark.parametrize("lets_go", ["x", "weight"])
def test_memory_is_let_go_once_there_are_planes(lets_go, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("planes by the Hopper route")
    static = Static(ADD, in_place=True, lets_go=lets_go)
    for full in (False, True):
        x, weight, to = randn(512, 1024), randn(768, 1024), randn(512, 768)
        expected = to + x.double() @ weight.double().t()

        def no_memory(*_, **__):
            raise torch.cuda.OutOfMemoryError("no memory")

        if full:
            monkeypatch.setattr(cuda, "split", no_memory)
        with forced_route("hopper"):
            (found,) = recipes.run(x, weight, None, [to], static)
        kept = (x if lets_go == "x" else weight).untyped_storage().nbytes()
        assert (kept > 0) == full
        assert found is to
        assert error(to, expected) < 1e-3


# Precision settings ------------------------------------------------------------------------------


def test_tf32_is_used_only_where_it_is_allowed():
    x, weight = randn(64, 512), randn(64, 512)
    truth = torch.relu(x.double() @ weight.double().t())
    torch.set_float32_matmul_precision("highest")
    exact = error(fused_linear(x, weight, None, [], RELU), truth)
    torch.set_float32_matmul_precision("high")
    tf32 = error(fused_linear(x, weight, None, [], RELU), truth)
    torch.set_float32_matmul_precision("highest")
    assert exact < 2e-6 < tf32 < 1e-3
    assert error(fused_linear(x, weight, None, [], RELU), truth) == exact


# Streams, graphs, memory, determinism ------------------------------------------------------------


@pytest.mark.parametrize("route", ["portable", "cublas"])
def test_a_call_runs_on_the_current_stream(route):
    x, weight = randn(2048, 512, dtype=torch.bfloat16), randn(512, 512, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with forced_route(route), torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(1.0)  # a call on any other stream would read the old values
        found = fused_linear(x, weight, None, [], RELU)
    torch.cuda.current_stream().wait_stream(stream)
    expected = torch.relu(torch.ones_like(x) @ weight.t())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["portable", "cublas"])
def test_capture_in_a_cuda_graph(route, dtype):
    torch.set_float32_matmul_precision("high" if route == "portable" else "highest")
    x, weight = randn(130, 64, dtype=dtype), randn(72, 64, dtype=dtype)
    a, b = randn(72, dtype=dtype), randn(130, 72, dtype=dtype)
    graph = torch.cuda.CUDAGraph()
    with forced_route(route):
        fused_linear(x, weight, None, [a, b], CHAIN)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = fused_linear(x, weight, None, [a, b], CHAIN)
        for _ in range(3):
            x.copy_(randn(130, 64, dtype=dtype))
            graph.replay()
            assert torch.equal(found, fused_linear(x, weight, None, [a, b], CHAIN))


def test_a_whole_model_captured_without_a_warm_up_of_its_shape():
    model = fxfuse.optimize(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).cuda())
    model.eval().bfloat16()
    x = randn(16, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x[:1])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
        graph.replay()
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["portable", "cublas"])
def test_nothing_but_the_outputs_is_allocated(route, dtype):
    torch.set_float32_matmul_precision("high" if route == "portable" else "highest")
    x, weight = randn(256, 64, dtype=dtype), randn(128, 64, dtype=dtype)
    a, b = randn(128, dtype=dtype), randn(256, 128, dtype=dtype)
    with forced_route(route), torch.no_grad():
        keep = [fused_linear(x, weight, None, [a, b], CHAIN)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        keep += [fused_linear(x, weight, None, [a, b], CHAIN) for _ in range(10)]
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after - before == 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ["portable", "cublas"])
def test_the_same_bits_every_time(route, dtype):
    torch.set_float32_matmul_precision("high" if route == "portable" else "highest")
    for m, n, k in ((1, 1001, 4097), (130, 1001, 257), (512, 512, 512)):
        x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype)
        with forced_route(route):
            first = fused_linear(x, weight, None, [], RELU)
            assert all(
                torch.equal(first, fused_linear(x, weight, None, [], RELU)) for _ in range(5)
            )


def test_a_call_does_not_synchronise():
    x, weight = randn(64, 64, dtype=torch.bfloat16), randn(64, 64, dtype=torch.bfloat16)
    scalar = torch.tensor([0.5], device="cuda", dtype=torch.bfloat16)
    program = "t1 = mul acc, $0; store t1"
    fused_linear(x, weight, None, [scalar], program)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for route in ("portable", "cublas"):
            with forced_route(route):
                fused_linear(x, weight, None, [scalar], program)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_other_device():
    x, weight = randn(33, 64, dtype=torch.bfloat16), randn(72, 64, dtype=torch.bfloat16)
    expected = fused_linear(x, weight, None, [], RELU)
    found = fused_linear(x.to("cuda:1"), weight.to("cuda:1"), None, [], RELU)
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.to("cuda:0"), expected)
    with pytest.raises(RuntimeError, match="device"):
        fused_linear(x, weight.to("cuda:1"), None, [], RELU)
    assert torch.cuda.current_device() == 0


def test_a_scalar_on_the_cpu():
    x, weight = randn(8, 8), randn(8, 8)
    program = "t1 = mul acc, $0; store t1"
    found = fused_linear(x, weight, None, [torch.tensor(0.5)], program)
    torch.testing.assert_close(found, F.linear(x, weight) * 0.5)


# Modules -----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, d=64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.gate, self.up = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d)
        self.down, self.drop = nn.Linear(2 * d, d), nn.Dropout(0.1)

    def forward(self, x):
        h = self.norm(x)
        return x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_optimised_on_the_cpu_and_moved(dtype):
    model = Block().eval()
    result = fxfuse.optimize(model)
    assert len(fxfuse.report(result).groups) == 3
    result.to("cuda", dtype)
    x = randn(4, 33, 64, dtype=dtype)
    with torch.no_grad():
        assert fxfuse.verify(result, model, x).ok
        result(x)
    for group in fxfuse.report(result).groups:
        planes = {"hopper-highest", "portable-highest"} if dtype == torch.float32 else set()
        assert set(group.routes) <= {"portable", "cublas", "hopper", *planes}, group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    model = Block().cuda().to(dtype).eval()
    result = fxfuse.optimize(model)
    x = randn(4, 9, 64, dtype=dtype).requires_grad_()
    grads = []
    for module in (result, model):
        outputs = module(x)
        grads.append(torch.autograd.grad(outputs.float().square().sum(), [x, *model.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert error(a, b.double()) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_dropout_draws_what_eager_draws():
    model = Block().cuda().train()
    result = fxfuse.optimize(model)
    x = randn(4, 9, 64)
    outputs = []
    for module in (result, model):
        torch.manual_seed(3)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs)


def test_autocast():
    model = Block().cuda().eval()
    result = fxfuse.optimize(model)
    x = randn(4, 9, 64)
    with torch.autocast("cuda", torch.bfloat16):
        found, expected = result(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    torch._dynamo.reset()
    model = Block().cuda().to(torch.bfloat16).eval()
    compiled = torch.compile(fxfuse.optimize(model), fullgraph=True, backend=backend)
    x = randn(4, 9, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), model(x), rtol=3e-2, atol=3e-2)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_reference_models_keep_the_contract(path, dtype):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = [1024 if n == 8192 else n for n in module.get_init_inputs()]
    sizes = [(1024,) if s == (8192,) else s for s in sizes]
    model = module.Model(*sizes).cuda().to(dtype).eval()
    result = fxfuse.optimize(model)
    assert len(fxfuse.report(result).groups) >= 1
    found = fxfuse.verify(result, model, randn(256, 1024, dtype=dtype))
    assert found.ok, str(found)
