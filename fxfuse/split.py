"""Split fp32 matrices into fp16 planes under an exact power-of-two scale per row.

One plane has the mantissa of TF32 and the exponent range of a whole row; two carry 22 bits and
more, so that three fp16 products stand for one in fp32 (Ootomo and Yokota, 2022, arXiv 2203.03341;
the scale per row is what lets rows of any magnitude in). `kernels/include/fxfuse.h` has the
contract; the CUDA kernel and `split_reference` agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import library
from .errors import InputError, LibraryError
from .library import SplitStruct

MAX_SPLITS = 2
MAX_FACTOR_COLUMNS = 32768
_ALIGNMENT = 8  # columns: a row of a plane starts at a multiple of 16 bytes
_ROWS = 32  # a plane is allocated in multiples of so many
_SMALLEST_HALF = 2.0**-24


@dataclass(frozen=True)
class Planes:
    """fp16 planes of a matrix [rows, k]: plane.sum(0)[:, :k] * root[:, None] ** 2 is the matrix.

    plane: fp16 [planes, rows, plane_stride]; columns from k on are 0, and each plane has room up to
    a multiple of 32 rows, because kernels read so many at a time. root: fp32 [rows], powers of two,
    negative where a row is special and the matrix had a column stride of 1.
    special: int32 [rows], 1 where a row holds an infinity or a NaN; the first plane has them as
    they are, the second has 0 there.
    """

    plane: torch.Tensor
    root: torch.Tensor
    special: torch.Tensor
    k: int

    @property
    def planes(self) -> int:
        """1 or 2."""
        return self.plane.shape[0]


def split(*matrices: torch.Tensor, planes: int) -> tuple[Planes, ...]:
    """Return the planes of one or two fp32 matrices [rows, k], in one launch where on CUDA.

    planes: 1 (rounded to 11 bits) or 2. Every matrix has a stride of 1, in either dimension, and
    all are on one device. Nothing is differentiated. Raises InputError for anything else.
    """
    _check(matrices, planes)
    return _split(matrices, planes)


def split_against(matrix: torch.Tensor, other: Planes) -> Planes:
    """Return as many planes of an fp32 matrix [M, K] as `other`, of a matrix [K, N] of up to
    MAX_FACTOR_COLUMNS rows, has; they are of matrix * other.root**2.

    So their product with other's, which are read along N, is scaled by this root alone. Where a
    root is negative, every row of this one is special. The matrix has a column stride of 1.
    Raises InputError for anything else.
    """
    planes = other.planes
    _check((matrix,), planes)
    k, roots = matrix.shape[1], other.root.shape[0]
    if matrix.stride(1) != 1 or k != roots or k > MAX_FACTOR_COLUMNS:
        raise InputError(
            f"split_against: a matrix {list(matrix.shape)} of strides {matrix.stride()} and "
            f"{roots} roots, expected a column stride of 1 and as many columns, up to "
            f"{MAX_FACTOR_COLUMNS}"
        )
    return _split((matrix,), planes, other)[0]


def split_reference(matrix: torch.Tensor, planes: int, other: Planes | None = None) -> Planes:
    """Return what `split`, or `split_against`, returns of a matrix, by torch ops on any device."""
    matrix = matrix.detach()
    if other is not None:
        matrix = matrix * other.root * other.root  # a square may be no fp32 number
    out = _empty(matrix, planes)
    finite = matrix.isfinite()
    # A column of zeros changes no maximum, and gives rows of no columns one.
    magnitudes = torch.nn.functional.pad(matrix.abs().where(finite, 0.0), (0, 1))
    largest = magnitudes.amax(1).double()
    # frexp's mantissa is in [0.5, 1), so largest = f * 2^(exponent - 1) with f in [1, 2).
    half = (torch.frexp(largest).exponent - 14) >> 1
    half = half.where(largest > 0, 0)
    factor = _power_of_two(-half)[:, None]
    scaled = matrix * factor * factor  # 2^-e itself may be no fp32 number
    vanishing = (scaled.abs() < _SMALLEST_HALF) & (matrix != 0)
    smallest = torch.full_like(matrix, _SMALLEST_HALF).copysign(matrix)
    hi = torch.where(vanishing, smallest, scaled).half()
    out.plane.zero_()
    out.plane[0, :, : out.k] = hi
    if planes == 2:
        out.plane[1, :, : out.k] = (scaled - hi.float()).half().where(finite, 0.0)
    special = finite.logical_not().any(1)
    if other is not None:
        special |= (other.root < 0).any()
    root = _power_of_two(half)
    adjacent = matrix.stride(1) == 1 or matrix.shape[1] <= 1
    out.root.copy_(torch.where(special, -root, root) if adjacent else root)
    out.special.copy_(special)
    return out


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent as fp32, from its bits: exact on every device."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def plane_stride(k: int) -> int:
    """Elements from one row of a plane to the next, for rows of k."""
    return -(-k // _ALIGNMENT) * _ALIGNMENT


def _empty(matrix: torch.Tensor, planes: int) -> Planes:
    rows, k = matrix.shape
    room = (planes, -(-rows // _ROWS) * _ROWS, plane_stride(k))
    return Planes(
        plane=matrix.new_empty(room, dtype=torch.float16)[:, :rows],
        root=matrix.new_empty(rows),
        special=matrix.new_empty(rows, dtype=torch.int32),
        k=k,
    )


def _check(matrices: tuple[torch.Tensor, ...], planes: int) -> None:
    if not 1 <= len(matrices) <= MAX_SPLITS:
        raise InputError(f"split: {len(matrices)} matrices, expected 1 to {MAX_SPLITS}")
    if planes not in (1, 2):
        raise InputError(f"split: planes={planes}, expected 1 or 2")
    for i, matrix in enumerate(matrices):
        if matrix.dtype != torch.float32 or matrix.dim() != 2:
            raise InputError(
                f"split: matrix {i} is {matrix.dtype} of {matrix.dim()} dimensions, expected "
                "float32 of 2"
            )
        adjacent = [n <= 1 or s == 1 for n, s in zip(matrix.shape, matrix.stride(), strict=True)]
        if not any(adjacent):
            raise InputError(f"split: matrix {i} has strides {matrix.stride()}, expected a 1")
        if matrix.device != matrices[0].device:
            raise InputError(
                f"split: matrix {i} is on {matrix.device}, expected {matrices[0].device}"
            )


def _split(
    matrices: tuple[torch.Tensor, ...], planes: int, other: Planes | None = None
) -> tuple[Planes, ...]:
    if matrices[0].device.type == "cuda":
        lib = library.find("fxfuse_cuda")
        if not isinstance(lib, LibraryError):
            return _split_cuda(lib, matrices, planes, other)
    return tuple(split_reference(matrix, planes, other) for matrix in matrices)


def _split_cuda(
    lib: library.Library,
    matrices: tuple[torch.Tensor, ...],
    planes: int,
    other: Planes | None,
) -> tuple[Planes, ...]:
    outs = tuple(_empty(matrix, planes) for matrix in matrices)
    described = (SplitStruct * len(matrices))()
    for struct, matrix, out in zip(described, matrices, outs, strict=True):
        struct.rows, struct.k = matrix.shape
        struct.row_stride, struct.column_stride = matrix.stride()
        struct.plane_stride, struct.planes = out.plane.shape[2], planes
        struct.source, struct.plane = matrix.data_ptr(), out.plane.data_ptr()
        struct.root, struct.special = out.root.data_ptr(), out.special.data_ptr()
        if other is not None:
            struct.factor = other.root.data_ptr()
    device = matrices[0].get_device()
    entry = lib.handle.fxfuse_cuda_split
    lib.check(library.enqueue(entry, device, described, len(matrices)), "split")
    return outs
