"""Run one tile of the Hopper or the skinny route, divided as one likes, whatever the library would
choose; and families of fp32 matrices that products must be right for."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch

from fxfuse import library
from fxfuse.layout import classify
from fxfuse.library import (
    POINTER_OPERAND,
    POINTER_OUTPUT,
    POINTER_ROOTS,
    POINTER_SPECIAL,
    TILE_IN_TURNS,
    TILE_OF_64_ROWS,
    TILE_SHARES_A,
    TILE_SHARES_B,
    Gemm,
    Pointers,
)
from fxfuse.program import parse
from fxfuse.split import Planes, plane_stride, split, split_against

IN_TURNS, OF_64_ROWS = TILE_IN_TURNS + 128, TILE_OF_64_ROWS + 64  # of chains alone
TILES = (256, 128, 64, IN_TURNS, OF_64_ROWS)
SHARES = (TILE_SHARES_A, TILE_SHARES_B)  # to be added to any, for pairs of blocks
SKINNY_TILES = (256, 128, 64, 32, 16)
SPLITS = (1, 2, 4, 8)

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of sm_90",
)

FAMILIES = {
    "uniform": lambda m, k: torch.rand(m, k),
    "normal": lambda m, k: torch.randn(m, k),
    "lognormal": lambda m, k: torch.randn(m, k).mul(3).exp(),
    "outlier columns": lambda m, k: (
        torch.randn(m, k) * torch.where(torch.arange(k) % 97 == 0, 1e4, 1.0)
    ),
    "tiny": lambda m, k: torch.randn(m, k) * 1e-30,
    "huge": lambda m, k: torch.randn(m, k) * 1e30,
    "rows of many scales": lambda m, k: torch.randn(m, k) * torch.logspace(-30, 30, m)[:, None],
    "rows of huge range": lambda m, k: torch.randn(m, k) * torch.logspace(-9, 9, k),
    "denormal": lambda m, k: torch.randn(m, k) * 1e-39,
    "sparse": lambda m, k: torch.randn(m, k).relu(),
    "zero rows": lambda m, k: torch.randn(m, k) * (torch.arange(m) % 2)[:, None],
}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values on the GPU."""
    return torch.randn(shape, device="cuda").to(dtype)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in norm."""
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def row_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of each row in norm: rows may differ by more than fp32 reaches."""
    scale = truth.abs().amax(1, keepdim=True).clamp_min(1e-300)
    return ((found.double() - truth) / scale).norm(dim=1) / (truth / scale).norm(dim=1).clamp_min(1)


def run_tile(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    program: str,
    tile: int,
    division: int,
    transposed: bool = False,
    planes: int = 0,
    route: str = "hopper",
) -> list[torch.Tensor] | None:
    """The outputs, of the inputs' dtype, of `program` over x [M, K] times weight [N, K] (or [K, N]
    where `transposed`), or None where the tile cannot serve the shape with K divided into so many.

    planes: fp32 inputs are split into so many first. The portable route takes the tile it chooses,
    and undivided.
    """
    lib = library.find("fxfuse_cuda")
    assert isinstance(lib, library.Library)
    (m, k), n, dtype = x.shape, weight.shape[1 if transposed else 0], x.dtype
    layouts = [classify(tuple(t.shape), t.stride(), t.dtype, (m, n)) for t in operands]
    parsed = parse(program)
    outputs = [torch.full((m, n), torch.nan, dtype=dtype, device="cuda") for _ in parsed.outputs]
    lda, ldb, input_dtype = x.stride(0), weight.stride(0), dtype
    if planes:
        lda, ldb = plane_stride(k), plane_stride(n if transposed else k)
        input_dtype = torch.float16
    gemm = Gemm(k, lda, ldb, None if bias is None else dtype, transposed, planes)
    dtypes = [dtype] * len(outputs)
    problem = lib.problem(parsed, m, n, input_dtype, 0, layouts, dtypes, gemm, route)
    problem.tile = 16 * tile + division
    if lib.handle.fxfuse_cuda_choose(ctypes.byref(problem), None, None):
        return None
    pointers = Pointers()
    pointers[0], pointers[1] = x.data_ptr(), weight.data_ptr()
    split_inputs: tuple[Planes, ...] = ()
    if planes and transposed:
        (by_rows,) = split(weight, planes=planes)
        split_inputs = split_against(x, by_rows), by_rows
    elif planes:
        split_inputs = split(x, weight, planes=planes)
    for i, of in enumerate(split_inputs):
        pointers[i] = of.plane.data_ptr()
        pointers[POINTER_ROOTS + i] = of.root.data_ptr()
        pointers[POINTER_SPECIAL + i] = of.special.data_ptr()
    if bias is not None:
        pointers[2] = bias.data_ptr()
    for i, operand in enumerate(operands):
        pointers[POINTER_OPERAND + i] = operand.data_ptr()
    for i, output in enumerate(outputs):
        pointers[POINTER_OUTPUT + i] = output.data_ptr()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = lib.handle.fxfuse_cuda_run(ctypes.byref(problem), pointers, stream)
    lib.check(status, "fxfuse_cuda_run")
    return outputs
