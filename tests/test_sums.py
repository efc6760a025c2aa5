"""Outputs that a kernel sums over rows, columns or both while it computes them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from helpers_abi import Cpu, Step, path

from fxfuse import cuda, library, recipes
from fxfuse.errors import LibraryError
from fxfuse.infer import Store
from fxfuse.library import Gemm
from fxfuse.program import parse
from fxfuse.recipes import Static
from fxfuse.vjp import Reduction

pytestmark = pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built")
SHAPES = [
    (1, 1), (1, 4096), (5000, 1), (3, 7), (64, 16), (333, 777), (1000, 1000), (1024, 1024),
    (1025, 2056), (70, 5000), (20000, 24), (9, 8192), (2048, 96), (257, 72),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOUR = "t1 = tanh acc; t2 = mul t1, $0; t3 = copy t2; t4 = add t2, 0.5; store t2, t3, t4, t1"
STORES = (
    Store(Reduction.NONE, torch.float32),
    Store(Reduction.ROWS, torch.float32),
    Store(Reduction.COLUMNS, torch.float32),
    Store(Reduction.ALL, torch.float32),
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summed(
    z: torch.Tensor, scale: torch.Tensor, stores: tuple[Store, ...] = STORES
) -> list[torch.Tensor]:
    recipe = recipes.find(z, None, None, [scale], Static(FOUR, stores=stores))
    assert recipe.route in ("cpu", "pointwise")
    return recipe.run(z, None, None, [scale])


def check(z: torch.Tensor, scale: torch.Tensor, stores: tuple[Store, ...] = STORES) -> None:
    """Sums are as accurate as torch's of the values in fp32, and what is stored is right."""
    values, rows, columns, everything = summed(z, scale, stores)
    tanh = z.double().tanh()
    truth = [tanh * scale.double()]
    truth += [truth[0].sum(0), (truth[0] + 0.5).sum(1), tanh.sum()]
    found = [values, rows, columns, everything]
    assert [o.shape for o in found] == [t.shape for t in truth]
    assert [o.dtype for o in found] == [s.dtype for s in stores]
    torch.testing.assert_close(values.double(), truth[0], rtol=1e-2, atol=1e-2)
    sizes = [tanh.abs().sum(0), (truth[0] + 0.5).abs().sum(1), tanh.abs().sum()]
    rounding = max(0.5 * torch.finfo(s.dtype).eps for s in stores[1:])
    for sums, exact, size in zip(found[1:], truth[1:], sizes, strict=True):
        # Of a few roundings of the terms, not of one for each addition.
        error = (sums.double() - exact).norm()
        assert error <= 10 * rounding * size.norm(), (error / size.norm(), z.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_rows_columns_and_all(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    z, scale = (randn(*s, seed=i).to(device, dtype) for i, s in enumerate([shape, shape[1:]]))
    check(z, scale)
    assert all(torch.equal(a, b) for a, b in zip(summed(z, scale), summed(z, scale), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_beside_a_16_bit_matrix(dtype: torch.dtype, device: str) -> None:
    stores = (Store(Reduction.NONE, dtype), *STORES[1:])
    for shape in ((130, 264), (1024, 1024), (33, 70)):
        z, scale = (randn(*s, seed=i).to(device, dtype) for i, s in enumerate([shape, shape[1:]]))
        check(z, scale, stores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_totals_are_rounded_once_to_their_dtype(dtype: torch.dtype, device: str) -> None:
    stores = tuple(Store(s.reduction, dtype) for s in STORES)
    z, scale = (randn(*s, seed=i).to(device, dtype) for i, s in enumerate([(515, 136), (136,)]))
    check(z, scale, stores)
    for wide, narrow in zip(summed(z, scale)[1:], summed(z, scale, stores)[1:], strict=True):
        tolerance = 1e-2 if device == "cuda" else 0  # other functors serve 16 bits
        torch.testing.assert_close(narrow, wide.to(dtype), rtol=tolerance, atol=tolerance)


def test_sums_of_rows_that_are_strided_or_misaligned(device: str) -> None:
    scale = randn(100, seed=1).to(device)
    wide = randn(70, 300).to(device)
    for z in (wide[:, :100], wide[:, 3:103], wide[::2, 100:200]):
        check(z, scale)


def test_sums_alone_store_no_matrix(device: str) -> None:
    z = randn(300, 520).to(device)
    static = Static("t1 = silu acc; store t1", stores=(Store(Reduction.ROWS, torch.float32),))
    (rows,) = recipes.find(z, None, None, [], static).run(z, None, None, [])
    expected = torch.nn.functional.silu(z.double()).sum(0)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-5)


def test_infinities_and_nans_stay_in_their_rows_and_columns(device: str) -> None:
    z = randn(200, 300).to(device)
    z[17, 40], z[90, 111] = float("inf"), float("nan")
    text = "t1 = copy acc; t2 = copy acc; store t1, t2"
    stores = (Store(Reduction.ROWS, torch.float32), Store(Reduction.COLUMNS, torch.float32))
    recipe = recipes.find(z, None, None, [], Static(text, stores=stores))
    rows, columns = recipe.run(z, None, None, [])
    assert (~rows.isfinite()).nonzero().flatten().tolist() == [40, 111]
    assert (~columns.isfinite()).nonzero().flatten().tolist() == [17, 90]


@pytest.fixture
def restored() -> Iterator[library.Library]:
    lib = library.find("fxfuse_cpu")
    assert isinstance(lib, library.Library)
    lib.handle.fxfuse_cpu_isa.restype = ctypes.c_char_p
    isa, threads = lib.handle.fxfuse_cpu_isa(), torch.get_num_threads()
    yield lib
    lib.handle.fxfuse_cpu_set_isa(isa)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(1024, 2048), (3000, 50)], ids=str)
def test_sums_do_not_depend_on_threads_or_instruction_sets(
    shape: tuple[int, int], restored: library.Library
) -> None:
    z = randn(*shape)
    text = "t1 = copy acc; t2 = copy acc; t3 = copy acc; store t1, t2, t3"
    found = []
    for isa in (b"baseline", b"avx2", b"avx512"):
        if restored.handle.fxfuse_cpu_set_isa(isa):
            continue
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            recipe = recipes.find(z, None, None, [], Static(text, stores=STORES[1:]))
            found.append(recipe.run(z, None, None, []))
    assert all(torch.equal(a, b) for sums in found for a, b in zip(sums, found[0], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 2, 1), (3, 9, 33), (2, 66, 8192), (5, 1000, 70)], ids=str)
def test_parts_are_added_up(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    lib = library.find("fxfuse_cuda")
    assert isinstance(lib, library.Library)
    parts = randn(*size).cuda()
    found = [cuda._total_of_parts(lib, parts, dtype) for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].dtype == dtype
    errors = (found[0].double() - parts.double().sum(1)).abs()
    exact = 2.0**-20 * parts.double().abs().sum(1)
    assert (errors <= exact + torch.finfo(dtype).eps * found[0].double().abs()).all()


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sum_", "dtype", "message"),
    [
        (4, 0, "fxfuse_cpu_run: output[0].sum=4, expected 0 to 3"),
        (-1, 0, "fxfuse_cpu_run: output[0].sum=-1, expected 0 to 3"),
        (1, 3, "fxfuse_cpu_run: output[0].dtype=3, expected f32 (0), f16 (1), bf16 (2) or f64 (4)"),
    ],
)
def test_bad_sums_are_named(sum_: int, dtype: int, message: str) -> None:
    cpu = Cpu()
    acc, out = torch.zeros(3, 4), torch.zeros(3, 4)
    problem, pointers = cpu.problem([Step("relu", store=0)], acc, [out])
    problem.program.output[0].sum = sum_
    problem.program.output[0].dtype = dtype
    assert cpu.call(problem, pointers) == 1
    assert cpu.last_error() == message


def test_a_problem_with_a_gemm_takes_no_sums() -> None:
    lib = library.find("fxfuse_cpu")
    assert isinstance(lib, library.Library)
    problem = lib.problem(
        parse("t1 = relu acc; store t1"),
        4,
        4,
        torch.float32,
        0,
        [],
        [torch.float32],
        Gemm(4, 4, 4, None),
        reductions=[Reduction.ROWS],
    )
    status = lib.handle.fxfuse_cpu_run(ctypes.byref(problem), library.Pointers(), 1)
    assert status == library.STATUS_UNSUPPORTED
    message = lib.handle.fxfuse_last_error().decode()
    assert message == "fxfuse_cpu_run: output[0].sum=1, a problem with a GEMM takes none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, -1, 2, 8, 64, 0), "count=-1, expected 0 to 2147483647"),
        ((64, 1, 0, 8, 64, 0), "parts=0, expected 1 to 2147483647"),
        ((64, 1, 2, 2**31, 64, 0), "n=2147483648, expected 0 to 2147483647"),
        ((64, 1, 2, 8, 64, 4), "dtype=4, expected f32 (0), f16 (1) or bf16 (2)"),
        ((None, 1, 2, 8, 64, 0), "source=null, expected an address"),
        ((64, 1, 2, 8, None, 0), "sums=null, expected an address"),
    ],
)
def test_parts_that_cannot_be_added_up_are_named(arguments: tuple, message: str) -> None:
    """Checked before any device is asked for, so the addresses need not be of one."""
    lib = library.find("fxfuse_cuda")
    if isinstance(lib, LibraryError):
        pytest.skip(str(lib))
    source, count, parts, n, sums, dtype = arguments
    status = lib.handle.fxfuse_cuda_add_parts(
        ctypes.c_void_p(source),
        ctypes.c_int64(count),
        ctypes.c_int64(parts),
        ctypes.c_int64(n),
        ctypes.c_void_p(sums),
        dtype,
        None,
    )
    assert status == 1
    assert lib.handle.fxfuse_last_error().decode() == f"fxfuse_cuda_add_parts: {message}"
