"""fp32 matrices split into fp16 planes: what the reference promises, and the kernel to the bit."""

from __future__ import annotations

import ctypes
import itertools
import math
import re

import pytest
import torch

from fxfuse import library
from fxfuse.errors import InputError, LibraryError
from fxfuse.library import SplitStruct
from fxfuse.split import Planes, split, split_against, split_reference

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INF, NAN = math.inf, math.nan
DENORMAL = 2.0**-149
LARGEST = torch.finfo(torch.float32).max
PLANES = [1, 2]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def scaled(matrix: torch.Tensor, out: Planes) -> torch.Tensor:
    """The matrix under its scales, in float64: exact."""
    return matrix.double() / out.root.double()[:, None] ** 2


def kept(out: Planes) -> torch.Tensor:
    """What the planes hold, in float64: exact."""
    return out.plane[:, :, : out.k].double().sum(0)


def bound(truth: torch.Tensor, planes: int) -> torch.Tensor:
    """The error a scaled element may have: fp16's rounding once or twice, or its spacing near 0."""
    if planes == 1:
        return torch.maximum(truth.abs() * 2.0**-11, torch.full_like(truth, 2.0**-24))
    return torch.maximum(truth.abs() * 2.0**-23, torch.full_like(truth, 2.0**-25))


def wide(rows: int, columns: int) -> torch.Tensor:
    """Values over the whole range of fp32, denormals included, all magnitudes in each row."""
    sign = torch.randint(0, 2, (rows, columns)) * 2 - 1
    exponent = torch.randint(-148, 128, (rows, columns)).double()
    return (sign * (1 + torch.rand(rows, columns).double()) * 2**exponent).float()


EXTREMES = {
    "ones": [1.0, 1.0, 1.0],
    "below a power": [2.0 - 2.0**-23, 1.0],
    "small": [1e-38, 3e-38, -2e-38],
    "denormal": [1e-40, -3e-42, 2e-45],
    "smallest": [DENORMAL, -DENORMAL, 0.0],
    "large": [3e38, -1e38, 2e38],
    "largest": [LARGEST, -LARGEST, 1.0],
    "everything": [LARGEST, 1.0, 1e-38, DENORMAL, -DENORMAL],
    "one of many": [1e-30, 1e30],
    "tie below the smallest half": [2.0**13, 2.0**-25, -(2.0**-25), 2.0**-26, 2.0**-24],
}


# The reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("make", [torch.randn, torch.rand, wide], ids=lambda f: f.__name__)
def test_an_element_is_off_by_no_more_than_its_rounding(make, planes):
    matrix = make(64, 777)
    out = split_reference(matrix, planes)
    truth = scaled(matrix, out)
    assert ((kept(out) - truth).abs() <= bound(truth, planes)).all()


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
def test_extremes(values, planes):
    matrix = torch.tensor([values])
    out = split_reference(matrix, planes)
    truth = scaled(matrix, out)
    assert 2.0**13 <= truth.abs().max() < 2.0**15
    assert math.frexp(out.root.item())[0] == 0.5
    assert ((kept(out) - truth).abs() <= bound(truth, planes)).all()
    hi = out.plane[0, :, : out.k]
    assert torch.equal(hi != 0, matrix != 0)
    assert torch.equal(hi.signbit(), matrix.signbit())
    assert hi.isfinite().all()
    assert not out.special.any()


def test_scales_of_two_powers_at_a_time():
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    out = split_reference((2**exponents).float()[:, None], 1)
    largest = out.plane[0, :, 0].double()
    assert set(largest.tolist()) == {2.0**13, 2.0**14}
    assert torch.equal(largest * out.root.double() ** 2, 2**exponents)


@pytest.mark.parametrize("planes", PLANES)
def test_rows_of_zeros(planes):
    out = split_reference(torch.tensor([[0.0, -0.0], [1.0, -0.0]]), planes)
    assert out.root.tolist() == [1.0, 2.0**-7]
    assert (out.plane[:, 0] == 0).all()
    assert out.plane[0, :, :2].signbit().tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("planes", PLANES)
def test_infinities_and_nans_do_not_set_the_scale(planes):
    matrix = torch.tensor([[1.0, INF, -3.0], [-INF, NAN, 1e-30], [NAN, NAN, NAN], [1.0, 2.0, 3.0]])
    out = split_reference(matrix, planes)
    assert out.special.tolist() == [1, 1, 1, 0]
    finite = matrix.isfinite()
    without = split_reference(matrix.where(finite, 0.0), planes)
    assert torch.equal(out.root, without.root.where(out.special == 0, -without.root))
    hi = out.plane[0, :, :3]
    assert torch.equal(hi[finite], without.plane[0, :, :3][finite])
    assert str(hi[~finite].tolist()) == str(matrix[~finite].tolist())
    if planes == 2:
        assert torch.equal(out.plane[1], without.plane[1])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 8), (3, 9)])
@pytest.mark.parametrize("planes", PLANES)
def test_shapes_and_padding(shape, planes):
    out = split_reference(torch.ones(shape), planes)
    rows, k = shape
    assert out.plane.shape == (planes, rows, (k + 7) // 8 * 8)
    assert (out.plane[:, :, k:] == 0).all()
    assert (out.k, out.planes) == (k, planes)
    assert out.root.tolist() == [2.0**-7 if k else 1.0] * rows


def test_three_products_of_planes_have_the_accuracy_of_fp32():
    x, weight = torch.randn(32, 512), torch.randn(48, 512) * torch.logspace(-30, 30, 48)[:, None]
    a, b = split(x, weight, planes=2)
    (hi_a, lo_a), (hi_b, lo_b) = a.plane.double(), b.plane.double()
    product = hi_a @ hi_b.t() + hi_a @ lo_b.t() + lo_a @ hi_b.t()
    product *= a.root.double()[:, None] ** 2 * b.root.double() ** 2
    truth = x.double() @ weight.double().t()
    assert ((product - truth).norm(dim=0) <= 2.0**-21 * truth.norm(dim=0)).all()


@pytest.mark.parametrize("planes", PLANES)
def test_against_another_the_other_s_scales_are_folded_in(planes):
    other = torch.randn(50, 20) * 2.0 ** torch.randint(-60, 60, (50, 1))
    matrix = torch.randn(7, 50) * 2.0 ** torch.randint(-20, 20, (50,))
    by = split_reference(other, planes)
    out = split_against(matrix, by)
    product = (kept(out) @ kept(by)) * out.root.double()[:, None] ** 2
    expected = matrix.double() @ other.double()
    error = (product - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2.0 ** (-11 if planes == 1 else -22)
    assert not out.special.any()
    other[3, 4] = INF
    assert split_against(matrix, split_reference(other, planes)).special.all()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3, 6), "a matrix [3, 6] of strides (6, 1) and 5 roots"),
        (torch.ones(5, 3).t(), "a matrix [3, 5] of strides (1, 3) and 5 roots"),
    ],
)
def test_what_split_against_refuses(matrix, message):
    with pytest.raises(InputError, match=re.escape(f"split_against: {message}")):
        split_against(matrix, split_reference(torch.ones(5, 8), 2))


def test_on_the_cpu_split_is_the_reference():
    matrices = torch.randn(5, 12), torch.randn(12, 7).t()
    for found, matrix in zip(split(*matrices, planes=2), matrices, strict=True):
        same(found, split_reference(matrix, 2))


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrices", "planes", "message"),
    [
        ([], 1, "split: 0 matrices, expected 1 to 2"),
        ([torch.ones(2, 2)] * 3, 1, "split: 3 matrices, expected 1 to 2"),
        ([torch.ones(2, 2)], 3, "split: planes=3, expected 1 or 2"),
        (
            [torch.ones(2, 2), torch.ones(2, 2).double()],
            1,
            "split: matrix 1 is torch.float64 of 2 dimensions, expected float32 of 2",
        ),
        (
            [torch.ones(2)],
            1,
            "split: matrix 0 is torch.float32 of 1 dimensions, expected float32 of 2",
        ),
        ([torch.ones(4, 6)[::2, ::2]], 1, "split: matrix 0 has strides (12, 2), expected a 1"),
        (
            [torch.ones(2, 2), torch.ones(2, 2, device="meta")],
            1,
            "split: matrix 1 is on meta, expected cpu",
        ),
    ],
)
def test_what_split_refuses(matrices, planes, message):
    with pytest.raises(InputError) as caught:
        split(*matrices, planes=planes)
    assert str(caught.value) == message


REFUSED = {
    "rows": (-1, "matrices[0].rows=-1, expected 0 or more"),
    "k": (-2, "matrices[0].k=-2, expected 0 or more"),
    "row_stride": (-1, "matrices[0].row_stride=-1, expected 0 or more"),
    "column_stride": (2, "matrices[0].column_stride=2, expected 1, or row_stride=1"),
    "planes": (3, "matrices[0].planes=3, expected 1 or 2"),
    "plane_stride": (9, "matrices[0].plane_stride=9, expected a multiple of 8, k or more"),
    "source": (0, "matrices[0].source=(nil), expected a multiple of 4"),
    "plane": (8, "matrices[0].plane=0x8, expected a multiple of 16"),
    "root": (8, "matrices[0].root=0x8, expected a multiple of 16"),
    "factor": (8, "matrices[0].factor=0x8, expected a multiple of 16"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_library_refuses(field):
    """Checked before any device is asked for, so the addresses need not be of one."""
    lib = library.find("fxfuse_cuda")
    if isinstance(lib, LibraryError):
        pytest.skip(str(lib))
    value, message = REFUSED[field]
    struct = SplitStruct(4, 8, 8, 1, 8, 1, 0, 64, 64, 64, None, None)
    setattr(struct, field, value)
    assert lib.handle.fxfuse_cuda_split(ctypes.byref(struct), 1, None) == 1
    assert lib.handle.fxfuse_last_error().decode() == f"fxfuse_cuda_split: {message}"


@pytest.mark.parametrize("count", [0, 3])
def test_the_library_takes_one_or_two(count):
    lib = library.find("fxfuse_cuda")
    if isinstance(lib, LibraryError):
        pytest.skip(str(lib))
    assert lib.handle.fxfuse_cuda_split((SplitStruct * 3)(), count, None) == 1
    message = f"fxfuse_cuda_split: count={count}, expected 1 to 2"
    assert lib.handle.fxfuse_last_error().decode() == message


# The kernel --------------------------------------------------------------------------------------


def same(found: Planes, expected: Planes, adjacent: bool = True) -> None:
    """Equal to the bit, but for the payload of a NaN and, if not `adjacent`, signs of roots."""
    assert (found.k, found.plane.shape) == (expected.k, expected.plane.shape)
    plane, other = found.plane.cpu(), expected.plane.cpu()
    assert torch.equal(plane.isnan(), other.isnan())
    number = ~other.isnan()
    assert torch.equal(plane[number].view(torch.int16), other[number].view(torch.int16))
    roots = found.root.cpu(), expected.root.cpu()
    assert torch.equal(*(roots if adjacent else (r.abs() for r in roots)))
    assert torch.equal(found.special.cpu(), expected.special.cpu())


# By path: rows that share a warp, a block, or have blocks of each size; rows read twice.
DEPTHS = [1, 7, 8, 31, 64, 200, 256, 1000, 1024, 1032, 2050, 4096, 8192, 8200, 9001, 16384, 20000]
DEPTHS += [32768, 32776, 70003]


def laid_out(layout: str, values: torch.Tensor) -> torch.Tensor:
    """`values` on the GPU, in memory of some layout."""
    rows, k = values.shape
    if layout == "contiguous":
        return values.cuda()
    if layout == "padded":  # aligned rows whatever k is
        to = torch.full((rows, (k + 11) // 4 * 4), NAN, device="cuda")[:, :k]
    elif layout == "sliced":  # rows at every offset from a multiple of 16 bytes
        to = torch.full((rows, (k + 7) // 4 * 4 + 1), NAN, device="cuda")[:, 1 : k + 1]
    elif layout == "transposed":
        to = torch.full((k, rows), NAN, device="cuda").t()
    elif layout == "transposed, padded":
        to = torch.full((k, (rows + 11) // 4 * 4), NAN, device="cuda")[:, :rows].t()
    else:
        assert layout == "transposed, sliced"
        to = torch.full((k, (rows + 7) // 4 * 4 + 1), NAN, device="cuda")[:, 1 : rows + 1].t()
    return to.copy_(values)


LAYOUTS = [
    "contiguous",
    "padded",
    "sliced",
    "transposed",
    "transposed, padded",
    "transposed, sliced",
]


def mixed(rows: int, k: int) -> torch.Tensor:
    """Ordinary rows, rows of every magnitude, of zeros, with infinities, with NaNs."""
    values = torch.randn(rows, k)
    values[1::5] = wide(values[1::5].shape[0], k)
    values[2::5] = 0
    values[3::5, k // 2] = -INF
    values[4::5, k - 1] = NAN
    values[8::10] = INF
    return values


def fill(matrix: torch.Tensor, out: Planes, special: bool = True) -> None:
    """Call the library itself on a matrix of the GPU."""
    lib = library.find("fxfuse_cuda")
    struct = SplitStruct(*matrix.shape, *matrix.stride(), out.plane.shape[2], out.planes, 0)
    struct.source, struct.plane = matrix.data_ptr(), out.plane.data_ptr()
    struct.root = out.root.data_ptr()
    struct.special = out.special.data_ptr() if special else None
    torch.cuda.synchronize()
    lib.check(lib.handle.fxfuse_cuda_split(ctypes.byref(struct), 1, None), "fill")
    torch.cuda.synchronize()


@pytest.mark.parametrize("planes", PLANES)
class TestKernel:
    pytestmark = gpu

    @pytest.mark.parametrize("k", DEPTHS)
    def test_equals_the_reference(self, k, planes):
        for rows in (1, 13, 67) if k > 8192 else (1, 13, 130, 259):
            values = mixed(rows, k)
            expected = split_reference(values, planes)
            for layout in LAYOUTS:
                adjacent = "transposed" not in layout
                same(split(laid_out(layout, values), planes=planes)[0], expected, adjacent)

    @pytest.mark.parametrize("k", [1, 8, 200, 4100, 8192, 20000, 32768])
    def test_against_another_equals_the_reference(self, k, planes):
        other = mixed(k, 24)
        values = mixed(29, k)
        for special in (False, True):
            if not special:
                other = other.nan_to_num(1.0, 2.0, 3.0)
            expected = split_against(values, split_reference(other, planes))
            by = split(other.cuda(), planes=planes)[0]
            for layout in ("contiguous", "padded", "sliced"):
                same(split_against(laid_out(layout, values), by), expected)

    @pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
    def test_extremes(self, values, planes):
        matrix = torch.tensor([values]).expand(5, -1)
        expected = split_reference(matrix, planes)
        for layout in LAYOUTS:
            same(split(laid_out(layout, matrix), planes=planes)[0], expected)

    def test_two_matrices(self, planes):
        depths = (8, 300, 8192, 9000)
        for k, other in itertools.product(depths, depths):
            values = mixed(37, k), mixed(11, other)
            expected = [split_reference(v, planes) for v in values]
            for layouts in itertools.product(("contiguous", "transposed"), repeat=2):
                found = split(*map(laid_out, layouts, values), planes=planes)
                for pair, layout in zip(zip(found, expected, strict=True), layouts, strict=True):
                    same(*pair, layout == "contiguous")

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
    def test_nothing_to_split(self, shape, planes):
        other = torch.ones(2, 3)
        for empty in (torch.ones(shape), torch.ones(shape[::-1]).t()):
            found = split(empty.cuda(), other.cuda(), planes=planes)
            for out, matrix in zip(found, (empty, other), strict=True):
                same(out, split_reference(matrix, planes))

    def test_expanded_rows(self, planes):
        values = torch.randn(1, 100)
        (found,) = split(values.cuda().expand(40, -1), planes=planes)
        same(found, split_reference(values.expand(40, -1), planes))

    def test_capture_in_a_cuda_graph(self, planes):
        x, weight = torch.randn(65, 520, device="cuda"), torch.randn(520, 72, device="cuda").t()
        split(x, weight, planes=planes)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = split(x, weight, planes=planes)
        for _ in range(3):
            x.normal_()
            weight.normal_()
            graph.replay()
            for out, matrix in zip(found, (x, weight), strict=True):
                same(out, split_reference(matrix.cpu(), planes))

    def test_nothing_but_the_results_is_allocated_and_nothing_waits(self, planes):
        given = torch.randn(64, 128, device="cuda"), torch.randn(128, 64, device="cuda").t()
        keep = [split(*given, planes=planes)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            keep.append(split(*given, planes=planes))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 6

    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    def test_without_special(self, layout, planes):
        matrix = laid_out(layout, mixed(32, 40))
        (expected,) = split(matrix, planes=planes)
        found = Planes(
            torch.empty_like(expected.plane),
            torch.empty_like(expected.root),
            torch.full_like(expected.special, 5),
            expected.k,
        )
        fill(matrix, found, special=False)
        assert (found.special == 5).all()
        found.special.copy_(expected.special)
        same(found, expected)

    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    @pytest.mark.parametrize("stride", [304, 40000])
    def test_planes_wider_than_needed(self, stride, layout, planes):
        for k in (40, 300):
            values = mixed(32, k)
            narrow = split_reference(values, planes)
            plane = torch.nn.functional.pad(narrow.plane[:, :, :k], (0, stride - k))
            expected = Planes(plane, narrow.root, narrow.special, k)
            found = Planes(
                torch.full_like(plane, NAN, device="cuda"),
                torch.full_like(narrow.root, NAN, device="cuda"),
                torch.full_like(narrow.special, 5, device="cuda"),
                k,
            )
            fill(laid_out(layout, values), found)
            same(found, expected, layout == "contiguous")
