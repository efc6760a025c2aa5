"""fp32 products of few rows in fp32: which calls take them, every tile and division of K."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers_gemm import SKINNY_TILES, SPLITS, randn, run_tile

from fxfuse import cuda, fused, library
from fxfuse.cuda import kernel_name
from fxfuse.errors import KernelError, LibraryError
from fxfuse.fused import forced_route, fused_linear
from fxfuse.infer import Call, infer
from fxfuse.preferences import prefers_skinny
from fxfuse.program import parse

pytestmark = pytest.mark.usefixtures("full_precision")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
WIDE = "t1 = gelu acc; t2 = mul t1, $0; t3 = add t2, $1; t4 = mul t3, acc; store t4, t1"
RELU = "t1 = relu acc; store t1"
PLAIN = "store acc"
ROWS = [1, 2, 3, 5, 8, 16, 17, 31, 32]
# A lone column, a K of one copy, edges in either direction, a K that many blocks divide.
SIZES = [(1, 4), (33, 36), (72, 1028), (300, 520), (1001, 4100), (130, 32768)]


def error(found, truth):
    """In norm; results are of the order of 1 here, and a lone one may be zero by chance."""
    size = truth.norm().clamp_min(0.3 * truth.numel() ** 0.5)
    return ((found.double() - truth).norm() / size).item()


# What a call takes, known without a GPU ----------------------------------------------------------


def test_few_rows_of_a_weight_worth_it():
    assert prefers_skinny(1, 8192, 8192)
    assert prefers_skinny(16, 512, 512)
    assert prefers_skinny(32, 8192, 8192)
    assert not prefers_skinny(32, 8192, 8192, frozen_weight=True)
    assert not prefers_skinny(33, 8192, 8192)
    assert not prefers_skinny(16, 256, 256)
    assert not prefers_skinny(1, 1024, 1024)


def choice(x, weight, bias=None, transposed=False):
    call = Call(x, weight, bias, (), parse(RELU), transposed, (), "here")
    return cuda._choose(call, infer(call), 0)


CHOICES = {
    "few rows": ("skinny", lambda: (torch.empty(4, 1024), torch.empty(512, 1024))),
    "leading dimensions": ("skinny", lambda: (torch.empty(2, 4, 1024), torch.empty(512, 1024))),
    "a wider x": ("skinny", lambda: (torch.empty(4, 1032)[:, :1024], torch.empty(512, 1024))),
    "a bias": ("skinny", lambda: (torch.empty(4, 1024), torch.empty(512, 1024), torch.empty(512))),
    "many rows": ("cublas", lambda: (torch.empty(64, 1024), torch.empty(512, 1024))),
    "a small weight": ("cublas", lambda: (torch.empty(4, 64), torch.empty(64, 64))),
    "odd K": ("cublas", lambda: (torch.empty(4, 1026), torch.empty(512, 1026))),
    "odd rows of x": (
        "cublas",
        lambda: (torch.empty(4, 1026)[:, :1024], torch.empty(512, 1024)),
    ),
    "odd rows of the weight": (
        "cublas",
        lambda: (torch.empty(4, 1024), torch.empty(512, 1026)[:, :1024]),
    ),
    "a weight [K, N]": (
        "cublas",
        lambda: (torch.empty(4, 1024), torch.empty(1024, 512), None, True),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_what_takes_the_skinny_route(case, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    expected, arguments = CHOICES[case]
    assert choice(*arguments()) == expected
    with forced_route("cublas"):
        assert choice(*arguments()) == "cublas"


def test_a_forced_route_takes_what_its_kernels_can_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with forced_route("skinny"):
        assert choice(torch.empty(32, 64), torch.empty(64, 64)) == "skinny"
        assert choice(torch.empty(32, 66), torch.empty(64, 66)) == "cublas"


# Numbers ------------------------------------------------------------------------------------------


def sgemm_error(x, weight, truth):
    """Of cuBLAS, as it takes these rows alone or among many: the larger."""
    alone = F.linear(x, weight)
    among = F.linear(x.repeat(256 // len(x) + 1, 1), weight)[: len(x)]
    return max(error(alone, truth), error(among, truth))


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
def test_no_further_from_float64_than_sgemm(m):
    for n, k in SIZES:
        x, weight = randn(m, k), randn(n, k) / k**0.5
        truth = F.linear(x.double(), weight.double())
        with forced_route("skinny"):
            found = fused_linear(x, weight, None, [], PLAIN)
        assert error(found, truth) <= 1.05 * sgemm_error(x, weight, truth) + 1e-7, (m, n, k)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
def test_every_operand_kind(m):
    for n, k in SIZES:
        x, weight, bias = randn(m, k), randn(n, k) / k**0.5, randn(n)
        kinds = [randn(n), randn(m, n), randn(m, 1), torch.randn((), device="cuda")]
        for a, b in zip(kinds, kinds[1:] + kinds[:1], strict=True):
            with forced_route("skinny"):
                found = fused_linear(x, weight, bias, [a, b], CHAIN)
            acc = F.linear(x.double(), weight.double(), bias.double())
            truth = F.silu(acc + a.double()) * b.double()
            eager = F.silu(F.linear(x, weight, bias) + a) * b
            assert error(found, truth) <= 1.05 * error(eager, truth) + 1e-6, (m, n, k)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
def test_every_tile_and_division(m):
    for n, k in SIZES:
        x, weight, bias = randn(m, k), randn(n, k) / k**0.5, randn(n)
        row, full = randn(n), randn(m, n)
        acc = F.linear(x.double(), weight.double(), bias.double())
        gelu = F.gelu(acc)
        wide = (gelu * row.double() + full.double()) * acc
        served = 0
        for tile in SKINNY_TILES:
            for split in SPLITS:
                arguments = (x, weight, bias, [row, full], WIDE, tile, split)
                found = run_tile(*arguments, route="skinny")
                if found is None:
                    continue
                served += 1
                assert error(found[0], wide) < 6e-6, (m, n, k, tile, split)
                assert error(found[1], gelu) < 6e-6, (m, n, k, tile, split)
                again = run_tile(*arguments, route="skinny")
                assert all(map(torch.equal, found, again)), (m, n, k, tile, split)
        assert served >= 4


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
def test_infinities_and_nans_stay_in_their_rows_and_columns(m):
    for n, k in SIZES[1:]:
        x, weight = randn(m, k), randn(n, k)
        x[0, 3], weight[5, k - 1], weight[7, 0] = torch.inf, torch.nan, -torch.inf
        x[m // 2, k // 2] = torch.nan
        eager = F.linear(x, weight)
        with forced_route("skinny"):
            found = fused_linear(x, weight, None, [], PLAIN)
        assert torch.equal(found.isnan(), eager.isnan()), (m, n, k)
        assert torch.equal(found.isinf(), eager.isinf()), (m, n, k)
        infinite = eager.isinf()
        assert torch.equal(found[infinite], eager[infinite])


@needs_cuda
@pytest.mark.gpu
def test_outputs_of_other_dtypes():
    x, weight = randn(5, 1024), randn(300, 1024) / 32
    program = "t1 = tanh acc; t2 = cast_bf16 t1; t3 = cast_f16 t1; store t2, t1, t3"
    with forced_route("skinny"):
        found = fused_linear(x, weight, None, [], program)
    truth = torch.tanh(F.linear(x.double(), weight.double()))
    assert [o.dtype for o in found] == [torch.bfloat16, torch.float32, torch.float16]
    for output, bound in zip(found, (4e-3, 1e-6, 5e-4), strict=True):
        assert error(output, truth) < bound


# Calls --------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.gpu
def test_a_call_of_few_rows_names_its_route_and_kernel():
    x, weight = randn(3, 1024), randn(512, 1024)
    fused_linear(x, weight, None, [], RELU, site="few")
    fused_linear(randn(64, 1024), weight, None, [], RELU, site="many")
    assert fused.routes_taken("few", RELU) == [("skinny", None)]
    assert fused.routes_taken("many", RELU) in ([("cublas", None)], [("hopper-highest", None)])
    lib = library.find("fxfuse_cuda")
    assert not isinstance(lib, LibraryError)
    names = [
        kernel_name(lib, parse(RELU), m, 8192, 8192, torch.float32, "skinny") for m in (1, 16, 17)
    ]
    assert names == ["skinny_f32_1_row", "skinny_f32_16_rows", "skinny_f32_32_rows"]


@needs_cuda
@pytest.mark.gpu
def test_inputs_at_odd_addresses_are_right():
    flat, weight = randn(4 * 1024 + 1), randn(512 * 1024 + 1)
    even, odd = flat[:-1].view(4, 1024), flat[1:].view(4, 1024)
    for x, w in ((odd, weight[:-1]), (even, weight[1:]), (even, weight[:-1])):
        w = w.view(512, 1024)
        truth = torch.relu(F.linear(x.double(), w.double()))
        assert error(fused_linear(x, w, None, [], RELU), truth) < 2e-6


@needs_cuda
@pytest.mark.gpu
def test_no_rows():
    found = fused_linear(randn(0, 1024), randn(512, 1024), None, [], RELU)
    assert found.shape == (0, 512)


@needs_cuda
@pytest.mark.gpu
def test_more_rows_than_the_kernels_take_name_the_limit():
    with forced_route("skinny"), pytest.raises(KernelError, match=r"m=33.*m up to 32"):
        fused_linear(randn(33, 1024), randn(512, 1024), None, [], RELU)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
def test_capture_in_a_cuda_graph(m):
    x, weight, bias = randn(m, 4096), randn(512, 4096), randn(512)
    fused_linear(x, weight, bias, [], RELU)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused_linear(x, weight, bias, [], RELU)
    for _ in range(3):
        x.copy_(randn(m, 4096))
        graph.replay()
        assert torch.equal(found, fused_linear(x, weight, bias, [], RELU))
