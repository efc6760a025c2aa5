"""Run one tile of the Hopper or the skinny route, divided as one likes, whatever the library would
choose."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from fxfuse import library
from fxfuse.layout import classify
from fxfuse.library import POINTER_OPERAND, POINTER_OUTPUT, Gemm, Pointers
from fxfuse.program import parse

TILES = (256, 128, 64)
SKINNY_TILES = (256, 128, 64, 32, 16)
SPLITS = (1, 2, 4, 8)


def run_tile(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    program: str,
    tile: int,
    split: int,
    transposed: bool = False,
    route: str = "hopper",
) -> list[torch.Tensor] | None:
    """The outputs, of the inputs' dtype, of `program` over x [M, K] times weight [N, K] (or [K, N]
    where `transposed`), or None where the tile cannot serve the shape so divided."""
    lib = library.find("fxfuse_cuda")
    assert isinstance(lib, library.Library)
    (m, k), n, dtype = x.shape, weight.shape[1 if transposed else 0], x.dtype
    layouts = [classify(tuple(t.shape), t.stride(), t.dtype, (m, n)) for t in operands]
    parsed = parse(program)
    outputs = [torch.full((m, n), torch.nan, dtype=dtype, device="cuda") for _ in parsed.outputs]
    gemm = Gemm(k, x.stride(0), weight.stride(0), None if bias is None else dtype, transposed)
    dtypes = [dtype] * len(outputs)
    problem = lib.problem(parsed, m, n, dtype, 0, layouts, dtypes, gemm, route)
    problem.tile = 16 * tile + split
    if lib.handle.fxfuse_cuda_choose(ctypes.byref(problem), None, None):
        return None
    pointers = Pointers()
    pointers[0], pointers[1] = x.data_ptr(), weight.data_ptr()
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
