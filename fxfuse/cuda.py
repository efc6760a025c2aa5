"""Serve fused calls on CUDA: one launch of our GEMM with the chain in its epilogue, or torch's
GEMM and one interpreted pointwise kernel."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from . import library
from .infer import Call, Result, Tensors
from .library import (
    POINTER_OPERAND,
    POINTER_OUTPUT,
    ROUTES,
    Gemm,
    Library,
    OperandLayout,
    Pointers,
)
from .program import Program
from .routes import (
    FORCED,
    Fixes,
    NoKernel,
    Recipe,
    Run,
    fixed,
    flatten_rows,
    gemm_of,
    pointwise_problem,
    pointwise_run,
    rows_and_columns,
    tf32_allowed,
)

_ROUTE_NAMES = {number: name for name, number in ROUTES.items()}


@functools.lru_cache(maxsize=64)
def _initialised(lib: Library, device: int) -> str | None:
    """Prepare the library for a device once; returns why it cannot serve it, if it cannot."""
    with torch.cuda.device(device):
        if lib.handle.fxfuse_cuda_init():
            return str(lib.handle.fxfuse_last_error().decode())
    return None


def cuda_recipe(
    call: Call, result: Result, lib: Library, layouts: Sequence[OperandLayout], fixes: Fixes
) -> Recipe:
    """The recipe of a call on a CUDA device. Raises routes.NoKernel where no kernel serves."""
    device = call.x.get_device()
    refusal = _initialised(lib, device)
    if refusal is not None:
        raise NoKernel(refusal)
    route = "cublas" if call.weight is None else _choose(call, result, device)
    if route != "cublas":
        return _gemm_recipe(call, result, lib, layouts, fixes, route)
    problem = pointwise_problem(call, result, lib, layouts, "pointwise")
    launch = _launcher(lib, problem, device, " -> ".join(call.program.chain))
    route = "pointwise" if call.weight is None else "cublas"
    return Recipe(route, None, pointwise_run(call, result, fixes, launch))


def _choose(call: Call, result: Result, device: int) -> str:
    """Who computes the product of a call: "cublas", or our kernels: "auto" leaves it to the library
    which, "hopper" and "portable" (only where a measurement forces them) do not."""
    weight, x = call.weight, call.x
    assert weight is not None
    plain = (
        not call.transposed
        and weight.stride(-1) == 1
        and weight.stride(0) >= weight.shape[1]
        and x.dtype == weight.dtype == result.acc_dtype
        and (call.bias is None or (call.bias.dtype == x.dtype and call.bias.is_contiguous()))
        and x.shape[-1] > 0
    )
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    if not plain or (x.dtype == torch.float32 and not tf32):
        return "cublas"
    if FORCED:
        return FORCED[-1]
    rows_bytes = (flatten_rows(x)[1] * x.element_size(), weight.stride(0) * x.element_size())
    if any(size % 16 for size in rows_bytes):
        return "cublas"  # our kernels would have to copy in steps of two or four bytes
    rows, columns = rows_and_columns(result.acc_shape)
    capability = torch.cuda.get_device_capability(device)
    return preferred_route(capability, rows, columns, x.shape[-1], 8 * x.element_size())


def preferred_route(capability: tuple[int, int], m: int, n: int, k: int, bits: int = 16) -> str:
    """The faster of our GEMM ("auto") and cuBLAS plus a pointwise kernel ("cublas").

    bits: of the inputs, 32 for products in TF32. Below sm_90 always ours. On sm_90 the limits are
    those of benchmarks/h200_routes.json, measured by scripts/bench_routes.py: ours wins where the
    second launch weighs more than what cuBLAS's GEMM is faster by.
    """
    if capability[0] != 9:
        return "auto"
    if m <= 32:
        return "auto"  # reading the weight is all there is to do
    if bits == 32 or m < 128:
        return "auto" if m * n * k <= 2**27 else "cublas"
    few_tiles = -(-m // 128) * -(-n // 64) <= 64
    if few_tiles and k >= 4 * n:
        return "cublas"  # which divides K among the SMs that have no tile
    return "auto" if m * n * k <= 2**34 else "cublas"


def _launcher(
    lib: Library, problem: library.ProblemStruct, device: int, chain: str
) -> functools.partial[None]:
    described = ctypes.byref(problem)
    return functools.partial(_launch, lib, lib.handle.fxfuse_cuda_run, described, device, chain)


def _launch(lib, entry, described, device, chain, pointers):  # type: ignore[no-untyped-def]
    """Enqueue on the current stream of `device`."""
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
    if torch._C._cuda_getDevice() == device:
        status = entry(described, pointers, stream)
    else:
        with torch.cuda.device(device):
            status = entry(described, pointers, stream)
    if status:
        lib.check(status, f"fxfuse_cuda_run for {chain}")


def _gemm_recipe(
    call: Call,
    result: Result,
    lib: Library,
    layouts: Sequence[OperandLayout],
    fixes: Fixes,
    route: str,
) -> Recipe:
    rows, columns = rows_and_columns(result.acc_shape)
    copies, lda = flatten_rows(call.x)
    problem = lib.problem(
        call.program,
        rows,
        columns,
        call.x.dtype,
        0,
        layouts,
        result.dtypes,
        gemm_of(call, lda),
        route=route,
    )
    chosen = _chosen(lib, problem)[0]
    launch = _launcher(lib, problem, call.x.get_device(), " -> ".join(call.program.chain))
    described = list(enumerate(zip(result.shapes, result.dtypes, strict=True)))

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        assert weight is not None
        x = x.contiguous() if copies else x
        operands = fixed(operands, fixes)
        pointers = Pointers()
        pointers[0], pointers[1] = x.data_ptr(), weight.data_ptr()
        if bias is not None:
            pointers[2] = bias.data_ptr()
        for index, operand in enumerate(operands):
            pointers[POINTER_OPERAND + index] = operand.data_ptr()
        outputs = []
        for index, (shape, dtype) in described:
            out = x.new_empty(shape, dtype=dtype)
            pointers[POINTER_OUTPUT + index] = out.data_ptr()
            outputs.append(out)
        launch(pointers)
        return outputs

    return Recipe(chosen, None, run)


def _chosen(lib: Library, problem: library.ProblemStruct) -> tuple[str, str]:
    """Route and kernel the library takes for a problem whose tensors start at multiples of 16
    bytes, on the current device. Raises KernelError where it has none."""
    route, name = ctypes.c_int32(), ctypes.c_char_p()
    status = lib.handle.fxfuse_cuda_choose(
        ctypes.byref(problem), ctypes.byref(route), ctypes.byref(name)
    )
    lib.check(status, "fxfuse_cuda_choose")
    return _ROUTE_NAMES[route.value], (name.value or b"").decode()


def kernel_name(
    lib: Library, program: Program, m: int, n: int, k: int, dtype: torch.dtype, route: str = "auto"
) -> str:
    """The kernel a product [m, k] x [n, k] takes on the current device."""
    gemm = Gemm(k, k, k, False)
    return _chosen(lib, lib.problem(program, m, n, dtype, 0, [], [dtype], gemm, route))[1]


__all__ = ["Run", "cuda_recipe", "kernel_name", "preferred_route"]
