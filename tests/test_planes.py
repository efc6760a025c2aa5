"""fp32 products on two planes each ("highest" precision): at most SGEMM's error, everywhere."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers_gemm import FAMILIES, SPLITS, error, hopper, randn, row_errors, run_tile
from torch import nn

import fxfuse
from fxfuse import cuda, library
from fxfuse.autograd import product
from fxfuse.cuda import cuda_recipe
from fxfuse.errors import LibraryError
from fxfuse.fused import forced_route, fused_linear, routes_taken
from fxfuse.infer import Call, infer
from fxfuse.preferences import prefers_planes
from fxfuse.program import parse

pytestmark = pytest.mark.usefixtures("full_precision")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_hopper = [pytest.mark.gpu, hopper]
on_any_gpu = [pytest.mark.gpu, needs_cuda]
both_routes = pytest.mark.parametrize(
    "route", [pytest.param("hopper", marks=on_hopper), pytest.param("portable", marks=on_any_gpu)]
)

TILES = (128, 64)
CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
WIDE = "t1 = gelu acc; t2 = mul t1, $0; t3 = add t2, $1; t4 = mul t3, acc; store t4, t1"
GELU = "t1 = gelu acc; store t1"
# Whole tiles, tiles at the edge in either direction, N no multiple of 32 or of 8, a lone row.
SIZES = [
    (256, 512, 512),
    (1, 256, 1024),
    (77, 96, 520),
    (130, 264, 1000),
    (333, 1001, 135),
    (17, 40, 64),
    (200, 72, 8),
    (129, 128, 3),
]
# Take the two larger of the portable tiles on an H200; all of the above take the smallest.
LARGE = [(630, 3580, 136), (1000, 4001, 1000)]


# What takes planes, known without a GPU -----------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "frozen", "rows"),
    [((8, 0), False, 128), ((8, 0), True, 64), ((9, 0), False, 17), ((9, 0), True, 17)],
)
def test_highest_precision_takes_planes_from_so_many_rows_on(capability, frozen, rows):
    assert prefers_planes("highest", rows, 512, 512, frozen, capability)
    assert not prefers_planes("highest", rows - 1, 512, 512, frozen, capability)
    assert not prefers_planes("highest", rows, 512, 63, frozen, capability)
    assert prefers_planes("highest", rows, 512, 8192, frozen, capability) == (capability == (9, 0))


@pytest.mark.parametrize("capability", [(8, 6), (8, 7), (8, 9), (12, 0)])
def test_planes_do_not_pay_where_fp32_is_fast(capability):
    assert not prefers_planes("highest", 4096, 8192, 8192, True, capability)


def test_one_plane_is_for_hopper():
    assert prefers_planes("high", 1024, 8192, 8192, False, (9, 0))
    assert not prefers_planes("high", 1024, 8192, 8192, False, (8, 0))


def call_of(m):
    return Call(torch.empty(m, 512), torch.empty(512, 512), None, (), parse(GELU), False, (), "")


def choice(m):
    call = call_of(m)
    return cuda._choose(call, infer(call), 0)


def test_what_a_call_takes(monkeypatch):
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choice(128) == "highest"
    assert choice(64) == "cublas"
    with forced_route("hopper"):
        assert choice(128) == "cublas"
    capability = (8, 6)
    assert choice(128) == "cublas"
    with forced_route("portable"):
        assert choice(1) == "highest"
        torch.set_float32_matmul_precision("high")
        assert choice(1) == "portable"
    capability = (7, 5)
    torch.set_float32_matmul_precision("highest")
    with forced_route("portable"):
        assert choice(128) == "cublas"


@pytest.mark.parametrize("forced", [None, "portable"])
def test_the_route_is_the_librarys_choice(forced, monkeypatch):
    lib = library.find("fxfuse_cuda")
    if isinstance(lib, LibraryError):
        pytest.skip("the CUDA kernels are not built")
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(cuda, "_initialised", lambda *_: None)
    monkeypatch.setattr(cuda, "_chosen", lambda _, p: (asked.append(p), ("portable", ""))[1])
    call = call_of(128)
    with contextlib.nullcontext() if forced is None else forced_route(forced):
        assert cuda_recipe(call, infer(call), lib, [], []).route == "portable-highest"
    (problem,) = asked
    assert (problem.planes, problem.route) == (2, library.ROUTES[forced or "auto"])


# Numbers ------------------------------------------------------------------------------------------


def check_size(size, runs):
    """The contract, of `runs`: `(name, run)` with run(x, weight, bias, operands, program) -> the
    first output or None; returns how many served."""
    m, n, k = size
    x, weight, bias = randn(m, k), randn(n, k) / k**0.5, randn(n)
    row, full = randn(n), randn(m, n)
    acc = F.linear(x.double(), weight.double(), bias.double())
    chain = F.silu(acc + row.double()) * full.double()
    gelu = F.gelu(acc)
    wide = (gelu * row.double() + full.double()) * acc
    eager_acc = F.linear(x, weight, bias)
    eager_chain = F.silu(eager_acc + row) * full
    eager_wide = (F.gelu(eager_acc) * row + full) * eager_acc
    slack = 6e-8 if k >= 64 else 1.2e-7  # calls of a short K go to cuBLAS
    served = 0
    for name, run in runs:
        found = run(x, weight, bias, [row, full], CHAIN)
        if found is None:
            continue
        served += 1
        assert error(found, chain) <= 1.05 * error(eager_chain, chain) + slack, name
        output = run(x, weight, bias, [row, full], WIDE)
        assert error(output, wide) <= 1.05 * error(eager_wide, wide) + slack, name
        assert torch.equal(found, run(x, weight, bias, [row, full], CHAIN)), name
    return served


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tile_and_division(size, transposed):
    def run(tile, division, x, weight, *arguments):
        stored = weight.t().contiguous() if transposed else weight
        outputs = run_tile(x, stored, *arguments, tile, division, transposed, planes=2)
        return None if outputs is None else outputs[0]

    runs = [
        ((tile, division), functools.partial(run, tile, division))
        for tile in TILES
        for division in SPLITS
        if -(-size[2] // 64) >= division
    ]
    assert check_size(size, runs) >= 2


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("size", [*SIZES, *LARGE], ids=str)
def test_the_portable_route_at_every_size(size):
    def run(*arguments):
        with forced_route("portable"):
            found = fused_linear(*arguments, site="portable")
        assert routes_taken("portable", arguments[-1]) == [("portable-highest", None)]
        return found if isinstance(found, torch.Tensor) else found[0]

    assert check_size(size, [("portable", run)]) == 1


@pytest.mark.gpu
@needs_cuda
def test_the_portable_route_stores_every_dtype():
    x, weight, bias = randn(70, 200), randn(90, 200) / 200**0.5, randn(90)
    program = "t1 = cast_bf16 acc; t2 = cast_f16 acc; t3 = tanh acc; store t1, t2, t3"
    truth = F.linear(x.double(), weight.double(), bias.double())
    with forced_route("portable"):
        found = fused_linear(x, weight, bias, [], program)
    assert [o.dtype for o in found] == [torch.bfloat16, torch.float16, torch.float32]
    for output, expected, limit in zip(
        found, (truth, truth, truth.tanh()), (3e-3, 4e-4, 3e-7), strict=True
    ):
        assert error(output, expected) <= limit


def componentwise(found, x, weight, truth):
    """max |e| / (|x| |W|), of each row."""
    scale = F.linear(x.abs().double(), weight.abs().double())
    return ((found.double() - truth).abs() / scale.clamp_min(1e-300)).amax(1)


@both_routes
@pytest.mark.parametrize("k", [64, 1000, 8192, 32768])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_at_most_that_of_sgemm(family, k, route):
    x, weight = FAMILIES[family](257, k).cuda(), randn(1000, k) / k**0.5
    if family in ("uniform", "sparse"):
        weight = weight.abs()  # all positive: errors of one sign add up
    truth = F.linear(x.double(), weight.double())
    eager = F.linear(x, weight)
    with forced_route(route):
        found = fused_linear(x, weight, None, [], "store acc")
        turned = fused_linear(x, weight.t().contiguous(), None, [], "store acc", True)
    # Denormal results have fp32's absolute spacing, and no less.
    slack = 1e-7 if family == "denormal" else 6e-8
    if family == "rows of huge range":
        # A sum of few terms: SGEMM rounds each product once, planes have 22 to 24 bits of a factor.
        worst = componentwise(found, x, weight, truth).amax()
        assert worst < 2**-21
        assert row_errors(found, truth).mean() < 2**-22
        return
    # The portable route adds up more often; of such a K no call takes it by default.
    share = 1.0 if route == "hopper" else 1.3 if k <= 4096 else 3.5
    for ours in (found, turned):
        assert row_errors(ours, truth).norm() <= share * row_errors(eager, truth).norm() + slack
        worst = componentwise(ours, x, weight, truth).amax()
        assert worst <= share * componentwise(eager, x, weight, truth).amax() + slack


@pytest.mark.parametrize(
    ("route", "tile", "division", "rows"),
    [
        *(
            pytest.param("hopper", tile, division, 300, marks=on_hopper)
            for tile in TILES
            for division in (1, 2, 8)
        ),
        *(pytest.param("portable", 0, 0, rows, marks=on_any_gpu) for rows in (300, 8400)),
    ],
)
def test_infinities_and_nans_are_where_eager_has_them(route, tile, division, rows):
    x, weight = randn(rows, 1024), randn(200, 1024)
    x[3, 10], x[4, 11], x[5, 12] = torch.inf, -torch.inf, torch.nan
    x[290, 1000] = torch.inf
    x[40], x[41] = 0, torch.inf
    weight[7, 13], weight[8, 14] = torch.inf, torch.nan
    weight[20] = 0
    weight[21, :256] *= 1e-30  # infinities meet what fp16 cannot hold beside the rest of the row
    eager = F.linear(x, weight)
    (found,) = run_tile(x, weight, None, [], "store acc", tile, division, planes=2, route=route)
    assert torch.equal(found.isnan(), eager.isnan())
    assert torch.equal(found.isinf(), eager.isinf())
    assert torch.equal(found[found.isinf()].sign(), eager[eager.isinf()].sign())
    finite = eager.isfinite()
    truth = F.linear(x.double(), weight.double())[finite]
    assert error(found[finite], truth) <= error(eager[finite], truth) + 6e-8


@both_routes
@pytest.mark.parametrize("value", [3e38, 1e38, 1e-38, 1e-45, 0.0])
def test_extremal_values(value, route):
    x, weight = randn(128, 256), randn(256, 256) / 16
    x[::2] = value
    x[1, ::3] = value
    weight[5] = value if value < 1 else weight[5]
    truth = F.linear(x.double(), weight.double())
    eager = F.linear(x, weight)
    with forced_route(route):
        found = fused_linear(x, weight, None, [], "store acc")
    # Eager may pass through an infinity on the way to a finite sum.
    assert torch.equal(found.isfinite(), truth.abs() < torch.finfo(torch.float32).max)
    finite = eager.isfinite() & (truth.abs() > 1e-37)
    assert error(found[finite], truth[finite]) <= error(eager[finite], truth[finite]) + 6e-8
    near = truth.abs() <= 1e-37
    assert ((found.double() - truth).abs()[near] <= 1e-43 + 2e-6 * 1e-37).all()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("frozen", [False, True])
def test_the_default_precision_runs_on_planes(frozen):
    model = nn.Sequential(nn.Linear(1000, 520), nn.GELU(), nn.Linear(520, 536), nn.SiLU()).cuda()
    x = randn(4, 64, 1000)
    optimized = fxfuse.optimize(model, freeze=frozen)
    with torch.no_grad():
        eager, truth = model(x), model.double()(x.double())
        model.float()
        found = optimized(x)
        assert torch.equal(optimized(x), found)
    assert error(found, truth) <= error(eager, truth)
    report = fxfuse.report(optimized)
    assert "hopper-highest" in str(report)
    if frozen:
        assert report.weights.kept_bytes >= (1000 * 520 + 520 * 536) * 4


@both_routes
def test_a_conv1d_weight_is_split_along_its_columns(route):
    x, weight, bias = randn(300, 768), randn(768, 3072) / 28, randn(3072)
    truth = F.gelu(x.double() @ weight.double() + bias.double())
    with forced_route(route):
        found = fused_linear(x, weight, bias, [], GELU, True, site="conv1d")
    assert routes_taken("conv1d", GELU) == [(f"{route}-highest", None)]
    assert error(found, truth) <= error(F.gelu(x @ weight + bias), truth)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("size", [(300, 768, 3072), (77, 136, 200), (130, 1001, 521)])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_backward_s_weight_is_split_along_its_rows(size, precision, monkeypatch):
    m, k, n = size
    x = randn(m, k) * 2.0 ** torch.randint(-2, 3, (k,), device="cuda")
    weight = randn(k, n) * 2.0 ** torch.randint(-30, 30, (k, 1), device="cuda")
    x *= weight.abs().amax(1).log2().floor().neg().exp2()
    split_by_rows = []
    against = cuda.split_against
    monkeypatch.setattr(cuda, "split_against", lambda *a: split_by_rows.append(a) or against(*a))
    torch.set_float32_matmul_precision(precision)
    with forced_route("hopper"):
        found = product(x, weight)
    assert len(split_by_rows) == 1
    truth = x.double() @ weight.double()
    torch.set_float32_matmul_precision("highest")
    limit = error(x @ weight, truth) + 6e-8 if precision == "highest" else 4e-4
    assert error(found, truth) <= limit


@pytest.mark.gpu
@hopper
def test_infinities_of_a_weight_by_rows_are_where_eager_has_them():
    x, weight = randn(300, 512), randn(512, 264)
    weight[3, 5], weight[4, 6], weight[5, 7] = torch.inf, -torch.inf, torch.nan
    x[9], x[10, 3], x[11, 8] = 0, -x[10, 3].abs(), torch.inf
    x[12] *= 1e-30
    with forced_route("hopper"):
        found = product(x, weight)
    eager = x @ weight
    assert torch.equal(found.isnan(), eager.isnan())
    assert torch.equal(found.isinf(), eager.isinf())
    assert torch.equal(found[found.isinf()].sign(), eager[eager.isinf()].sign())
    # All of it is a product of single planes then.
    finite = eager.isfinite()
    assert error(found[finite], (x.double() @ weight.double())[finite]) < 3e-4


@both_routes
def test_without_memory_for_planes_cublas_serves(monkeypatch, route):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(cuda, "split", full)
    x, weight = randn(256, 512), randn(512, 512)
    with forced_route(route):
        found = fused_linear(x, weight, None, [], GELU)
    torch.testing.assert_close(found, F.gelu(F.linear(x, weight)))


@both_routes
def test_a_graph_capture_holds_the_whole_call(route):
    x, weight = randn(256, 512), randn(512, 512)
    with forced_route(route):
        warm = fused_linear(x, weight, None, [], GELU)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_linear(x, weight, None, [], GELU)
        x.copy_(randn(256, 512))
        graph.replay()
        assert not torch.equal(out, warm)
        assert torch.equal(out, fused_linear(x, weight, None, [], GELU))
