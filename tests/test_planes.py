"""fp32 products on two planes each ("highest" precision): at most SGEMM's error, everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers_gemm import FAMILIES, SPLITS, error, hopper, randn, row_errors, run_tile
from torch import nn

import fxfuse
from fxfuse import recipes
from fxfuse.fused import forced_route, fused_linear, routes_taken

pytestmark = [pytest.mark.gpu, hopper]

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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tile_and_division(size):
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
    for tile in TILES:
        for division in SPLITS:
            if -(-k // 64) < division:
                continue
            found = run_tile(x, weight, bias, [row, full], CHAIN, tile, division, planes=2)
            if found is None:
                continue
            served += 1
            here = tile, division
            assert error(found[0], chain) <= 1.05 * error(eager_chain, chain) + slack, here
            outputs = run_tile(x, weight, bias, [row, full], WIDE, tile, division, planes=2)
            assert error(outputs[0], wide) <= 1.05 * error(eager_wide, wide) + slack, here
            again = run_tile(x, weight, bias, [row, full], CHAIN, tile, division, planes=2)
            assert torch.equal(found[0], again[0])
    assert served >= 2


def componentwise(found, x, weight, truth):
    """max |e| / (|x| |W|), of each row."""
    scale = F.linear(x.abs().double(), weight.abs().double())
    return ((found.double() - truth).abs() / scale.clamp_min(1e-300)).amax(1)


@pytest.mark.parametrize("k", [64, 1000, 8192, 32768])
@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_at_most_that_of_sgemm(family, k):
    x, weight = FAMILIES[family](257, k).cuda(), randn(1000, k) / k**0.5
    if family in ("uniform", "sparse"):
        weight = weight.abs()  # all positive: errors of one sign add up
    truth = F.linear(x.double(), weight.double())
    eager = F.linear(x, weight)
    with forced_route("hopper"):
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
    for ours in (found, turned):
        assert row_errors(ours, truth).norm() <= row_errors(eager, truth).norm() + slack
        worst = componentwise(ours, x, weight, truth).amax()
        assert worst <= componentwise(eager, x, weight, truth).amax() + slack


@pytest.mark.parametrize("division", [1, 2, 8])
@pytest.mark.parametrize("tile", TILES)
def test_infinities_and_nans_are_where_eager_has_them(tile, division):
    x, weight = randn(300, 1024), randn(200, 1024)
    x[3, 10], x[4, 11], x[5, 12] = torch.inf, -torch.inf, torch.nan
    x[290, 1000] = torch.inf
    x[40], x[41] = 0, torch.inf
    weight[7, 13], weight[8, 14] = torch.inf, torch.nan
    weight[20] = 0
    weight[21, :256] *= 1e-30  # infinities meet what fp16 cannot hold beside the rest of the row
    eager = F.linear(x, weight)
    (found,) = run_tile(x, weight, None, [], "store acc", tile, division, planes=2)
    assert torch.equal(found.isnan(), eager.isnan())
    assert torch.equal(found.isinf(), eager.isinf())
    assert torch.equal(found[found.isinf()].sign(), eager[eager.isinf()].sign())
    finite = eager.isfinite()
    truth = F.linear(x.double(), weight.double())[finite]
    assert error(found[finite], truth) <= error(eager[finite], truth)


@pytest.mark.parametrize("value", [3e38, 1e38, 1e-38, 1e-45, 0.0])
def test_extremal_values(value):
    x, weight = randn(128, 256), randn(256, 256) / 16
    x[::2] = value
    x[1, ::3] = value
    weight[5] = value if value < 1 else weight[5]
    truth = F.linear(x.double(), weight.double())
    eager = F.linear(x, weight)
    with forced_route("hopper"):
        found = fused_linear(x, weight, None, [], "store acc")
    # Eager may pass through an infinity on the way to a finite sum.
    assert torch.equal(found.isfinite(), truth.abs() < torch.finfo(torch.float32).max)
    finite = eager.isfinite() & (truth.abs() > 1e-37)
    assert error(found[finite], truth[finite]) <= error(eager[finite], truth[finite]) + 6e-8
    near = truth.abs() <= 1e-37
    assert ((found.double() - truth).abs()[near] <= 1e-43 + 2e-6 * 1e-37).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_default_precision_runs_on_planes(frozen):
    recipes.forget()
    model = nn.Sequential(nn.Linear(1000, 520), nn.GELU(), nn.Linear(520, 136), nn.SiLU()).cuda()
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
        assert report.weights.kept_bytes >= (1000 * 520 + 520 * 136) * 4


def test_a_conv1d_weight_is_split_along_its_columns():
    recipes.forget()
    x, weight, bias = randn(300, 768), randn(768, 3072) / 28, randn(3072)
    truth = F.gelu(x.double() @ weight.double() + bias.double())
    found = fused_linear(x, weight, bias, [], GELU, True, site="conv1d")
    assert routes_taken("conv1d", GELU) == [("hopper-highest", None)]
    assert error(found, truth) <= error(F.gelu(x @ weight + bias), truth)


def test_a_graph_capture_holds_the_whole_call():
    recipes.forget()
    x, weight = randn(256, 512), randn(512, 512)
    warm = fused_linear(x, weight, None, [], GELU)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_linear(x, weight, None, [], GELU)
    x.copy_(randn(256, 512))
    graph.replay()
    assert not torch.equal(out, warm)
    assert torch.equal(out, fused_linear(x, weight, None, [], GELU))
