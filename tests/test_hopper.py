"""The Hopper route: every tile, division of K and layout of the weight, and "high" precision."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_gemm import (
    FAMILIES,
    IN_TURNS,
    OF_64_ROWS,
    SHARES,
    SPLITS,
    TILES,
    error,
    hopper,
    randn,
    row_errors,
    run_tile,
)
from torch import nn

import fxfuse
from fxfuse import fused, recipes
from fxfuse.cuda import where_aligned
from fxfuse.fused import forced_route, fused_linear
from fxfuse.preferences import preferred_route, prefers_planes
from fxfuse.routes import Recipe

CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
WIDE = "t1 = gelu acc; t2 = mul t1, $0; t3 = add t2, $1; t4 = mul t3, acc; store t4, t1"
KEEPS = "t1 = silu acc; t2 = mul t1, $1; store t2, acc"  # a chain that keeps what a backward needs
GELU = "t1 = gelu acc; store t1"
HALVES = [torch.bfloat16, torch.float16]
# Whole tiles, tiles at the edge in either direction, N no multiple of 32 or of 8, a lone row.
SIZES = [
    (256, 512, 512),
    (1, 256, 1024),
    (77, 96, 520),
    (200, 312, 328),
    (130, 264, 1000),
    (333, 1001, 136),
    (17, 40, 64),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


# What serves a shape, known without a GPU ---------------------------------------------------------


def test_preferred_route_of_hopper():
    assert preferred_route((9, 0), 1024, 8192, 8192) == "auto"
    assert preferred_route((9, 0), 512, 1024, 4096) == "auto"
    assert preferred_route((9, 0), 1024, 512, 16384) == "cublas"
    assert preferred_route((9, 0), 256, 512, 16384) == "auto"
    assert preferred_route((9, 0), 1, 512, 16384) == "cublas"
    assert preferred_route((9, 0), 16, 512, 16384) == "auto"
    assert preferred_route((9, 0), 512, 1024, 1024) == "auto"
    assert preferred_route((9, 0), 1024, 1024, 1024) == "auto"
    assert preferred_route((9, 0), 1000, 1000, 1000) == "auto"
    assert preferred_route((9, 0), 1000, 1000, 3000) == "cublas"
    assert preferred_route((9, 0), 1000, 1001, 1024) == "cublas"
    assert preferred_route((9, 0), 16, 1000, 1000) == "auto"
    assert preferred_route((9, 0), 1024, 8192, 8192, bits=32) == "cublas"
    assert preferred_route((8, 0), 1024, 8192, 8192, bits=32) == "auto"


def test_planes_pay_from_so_many_rows_on():
    assert prefers_planes("high", 1024, 8192, 8192, False)
    assert not prefers_planes("high", 512, 8192, 8192, False)
    assert prefers_planes("high", 512, 8192, 8192, True)
    assert not prefers_planes("high", 1024, 512, 8192, True)


def test_inputs_between_multiples_of_16_bytes_take_the_other_recipe():
    ours = Recipe("hopper", None, lambda *_: ["ours"])
    recipe = where_aligned(ours, Recipe("cublas", None, lambda *_: ["other"]))
    buffer = torch.empty(72, dtype=torch.bfloat16)
    start = -buffer.data_ptr() // 2 % 8
    even, odd = buffer[start : start + 8], buffer[start + 1 : start + 9]
    assert recipe.route == "hopper"
    assert recipe.run(even, even, None, ()) == ["ours"]
    assert recipe.run(odd, even, None, ()) == ["other"]
    assert recipe.run(even, odd, None, ()) == ["other"]


def test_every_tile_has_a_price():
    table = Path(__file__).parent.parent / "kernels" / "cuda" / "hopper_costs.inc"
    rows = [re.findall(r"-?\d+", line) for line in table.read_text().splitlines()[1:]]
    assert all(len(row) == 10 and min(map(int, row)) >= 0 for row in rows)
    priced = {tuple(map(int, row[:4])) for row in rows}
    assert len(priced) == len(rows)
    lone = {(lines, 1, tile, 1) for lines in (0, 1) for tile in TILES}
    assert lone | {(1, 2, 128, 1), (1, 2, 64, 1)} <= priced


# Tiles --------------------------------------------------------------------------------------------


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tile_and_division(size, transposed, dtype):
    m, n, k = size
    if transposed and n % 8:
        pytest.skip("rows of a [K, N] weight start at multiples of 16 bytes")
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    weight = weight / k**0.5
    row, full = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
    acc = F.linear(x.double(), weight.double(), bias.double())
    chain = F.silu(acc + row.double()) * full.double()
    gelu = F.gelu(acc)
    wide = (gelu * row.double() + full.double()) * acc
    eager_chain = F.silu(F.linear(x, weight, bias) + row) * full
    stored = weight.t().contiguous() if transposed else weight
    served = 0
    for tile in TILES:
        for split in SPLITS:
            found = run_tile(x, stored, bias, [row, full], CHAIN, tile, split, transposed)
            if found is None:
                continue
            served += 1
            assert error(found[0], chain) <= 1.05 * error(eager_chain, chain), (tile, split)
            again = run_tile(x, stored, bias, [row, full], CHAIN, tile, split, transposed)
            assert torch.equal(found[0], again[0])
            outputs = run_tile(x, stored, bias, [row, full], KEEPS, tile, split, transposed)
            assert error(outputs[0], F.silu(acc) * full.double()) < 8e-3, (tile, split)
            assert error(outputs[1], acc) <= 1.05 * error(acc.to(dtype), acc) + 1e-5
            outputs = run_tile(x, stored, bias, [row, full], WIDE, tile, split, transposed)
            if tile in (IN_TURNS, OF_64_ROWS):
                assert outputs is None
                continue
            assert error(outputs[0], wide) < 8e-3, (tile, split)
            assert error(outputs[1], gelu) <= 1.05 * error(gelu.to(dtype), gelu) + 1e-5
    assert served >= 4


# One tile a block and several; of odd numbers of tiles a pair's second lies outside the matrix, in
# 384 x 768 without any tile at its edge.
@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    "size",
    [*SIZES, (300, 9000, 64), (384, 768, 512), (640, 1160, 776), (4000, 4104, 1032)],
    ids=str,
)
def test_pairs_are_to_the_bit_what_lone_blocks_are(size, dtype, transposed):
    m, n, k = size
    if transposed and n % 8:
        pytest.skip("rows of a [K, N] weight start at multiples of 16 bytes")
    planes = int(dtype == torch.float32)
    x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype)
    row, full = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
    stored = weight.t().contiguous() if transposed else weight
    served = 0
    for tile, shares, split in itertools.product(TILES, SHARES, SPLITS):
        lone, *pairs = (
            run_tile(x, stored, None, [row, full], CHAIN, t, split, transposed, planes)
            for t in (tile, tile + shares, tile + shares)
        )
        if lone is None or pairs[0] is None:
            continue
        served += 1
        assert all(torch.equal(lone[0], outputs[0]) for outputs in pairs), (tile, shares, split)
    assert served >= 4 or m * n < 2**14


# Two tiles a block and more, at edges too; with fewer stages than the ring has, and more.
@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [(300, 9000, 64), (1100, 5000, 392), (4000, 4104, 1032)], ids=str)
def test_tiles_in_turns_are_to_the_bit_those_of_both_warpgroups(size, dtype, transposed):
    m, n, k = size
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    row, full = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
    stored = weight.t().contiguous() if transposed else weight
    for program in (CHAIN, KEEPS):
        runs = [
            run_tile(x, stored, bias, [row, full], program, tile, 1, transposed)
            for tile in (128, IN_TURNS, IN_TURNS)
        ]
        for outputs in zip(*runs, strict=True):
            assert torch.equal(outputs[0], outputs[1])
            assert torch.equal(outputs[1], outputs[2])


# Blocks of several tiles, whose warpgroups meet at each; with fewer stages than the ring has, and
# more.
@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [(300, 9000, 64), (1100, 5000, 1032)], ids=str)
def test_many_tiles_of_64_rows(size, dtype, transposed):
    m, n, k = size
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    row, full = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
    stored = weight.t().contiguous() if transposed else weight
    acc = F.linear(x.double(), weight.double(), bias.double())
    truth = F.silu(acc + row.double()) * full.double()
    found, again = (
        run_tile(x, stored, bias, [row, full], CHAIN, OF_64_ROWS, 1, transposed) for _ in range(2)
    )
    assert error(found[0], truth) <= 1.1 * error(truth.to(dtype), truth)
    assert torch.equal(found[0], again[0])


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("size", [(300, 9000, 64), (1100, 5000, 392)], ids=str)
def test_planes_in_turns_are_to_the_bit_those_of_both_warpgroups(size, transposed):
    m, n, k = size
    x, weight, row, full = randn(m, k), randn(n, k), randn(n), randn(m, n)
    stored = weight.t().contiguous() if transposed else weight
    for program in ("store acc", CHAIN, KEEPS):
        runs = [
            run_tile(x, stored, None, [row, full], program, tile, 1, transposed, planes=1)
            for tile in (128, IN_TURNS, IN_TURNS)
        ]
        for outputs in zip(*runs, strict=True):
            assert all(torch.equal(outputs[0], output) for output in outputs[1:])


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nans_pass_every_division(dtype):
    x, weight = randn(70, 1024, dtype=dtype), randn(136, 1024, dtype=dtype)
    x[3, 1000], x[5, 7], weight[9, 500] = torch.inf, torch.nan, -torch.inf
    eager = F.linear(x, weight)
    for split in (1, 2, 8):
        (found,) = run_tile(x, weight, None, [], "store acc", 64, split)
        assert torch.equal(found.isnan(), eager.isnan())
        assert torch.equal(found.isinf(), eager.isinf())


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_a_conv1d_weight_is_read_as_it_is(dtype):
    recipes.forget()
    x, weight, bias = randn(512, 768, dtype=dtype), randn(768, 3072, dtype=dtype), None
    truth = F.gelu(x.double() @ weight.double())
    found = fused_linear(x, weight, bias, [], GELU, True, site="conv1d")
    assert fused.routes_taken("conv1d", GELU) == [("hopper", None)]
    assert error(found, truth) <= 1.05 * error(F.gelu(x @ weight), truth)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_a_conv1d_whose_input_is_not_aligned(dtype):
    x, weight = randn(512, 776, dtype=dtype)[:, 1:769], randn(768, 3072, dtype=dtype)
    truth = F.gelu(x.double() @ weight.double())
    found = fused_linear(x, weight, None, [], GELU, True)
    assert error(found, truth) <= 1.05 * error(F.gelu(x @ weight), truth)


# "high" precision ---------------------------------------------------------------------------------


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("k", [64, 1000, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_high_precision_is_no_worse_than_tf32(family, k):
    torch.set_float32_matmul_precision("high")
    x, weight = FAMILIES[family](257, k).cuda(), randn(1000, k) / k**0.5
    bias = torch.zeros(1000, device="cuda")
    truth = F.linear(x.double(), weight.double())
    eager = row_errors(F.linear(x, weight, bias), truth)
    with forced_route("hopper"):
        found = row_errors(fused_linear(x, weight, bias, [], "store acc"), truth)
        turned = fused_linear(x, weight.t().contiguous(), bias, [], "store acc", True)
    assert found.norm() <= 1.05 * eager.norm() + 1e-7
    assert row_errors(turned, truth).norm() <= 1.05 * eager.norm() + 1e-7


@hopper
@pytest.mark.gpu
def test_high_precision_keeps_infinities_and_nans():
    torch.set_float32_matmul_precision("high")
    x, weight = randn(100, 512), randn(200, 512)
    x[3, 10], x[4, 11], x[5, 12] = torch.inf, -torch.inf, torch.nan
    weight[7, 13], weight[8, 14] = torch.inf, torch.nan
    weight[20] = 0
    weight[21, :256] *= 1e-30  # infinities meet what fp16 cannot hold beside the rest of the row
    eager = F.linear(x, weight)
    with forced_route("hopper"):
        found = fused_linear(x, weight, None, [], "store acc")
    assert torch.equal(found.isnan(), eager.isnan())
    assert torch.equal(found.isinf(), eager.isinf())
    assert torch.equal(found[found.isinf()].sign(), eager[eager.isinf()].sign())


@hopper
@pytest.mark.gpu
def test_frozen_weights_are_converted_once():
    torch.set_float32_matmul_precision("high")
    recipes.forget()
    model = nn.Sequential(nn.Linear(1024, 2048), nn.GELU()).cuda()
    x = randn(1024, 1024)
    with torch.no_grad():
        truth = model.double()(x.double())
        model.float()
        frozen = fxfuse.optimize(model, freeze=True)
        first = frozen(x)
        assert error(first, truth) < 5e-4
        assert fxfuse.report(frozen).weights.kept_bytes > 1024 * 2048 * 2
        assert torch.equal(frozen(x), first)
        model[0].weight.mul_(2)
        truth = F.gelu(F.linear(x.double(), model[0].weight.double(), model[0].bias.double()))
        assert error(frozen(x), truth) < 5e-4
