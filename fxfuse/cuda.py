"""Serve fused calls on CUDA: one launch of our GEMM with the chain in its epilogue, or torch's
GEMM and one interpreted pointwise kernel."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from . import frozen, library
from .infer import Call, Result, Tensors, infer
from .library import (
    DTYPES,
    POINTER_OPERAND,
    POINTER_OUTPUT,
    POINTER_ROOTS,
    POINTER_SPECIAL,
    ROUTES,
    STATUS_UNSUPPORTED,
    Gemm,
    Library,
    OperandLayout,
    Pointers,
    enqueue,
)
from .norms import has_groups
from .preferences import preferred_route, prefers_planes, prefers_skinny
from .program import BARE, Program, parse
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
    reference_run,
    rows_and_columns,
    tf32_allowed,
    total_of_parts,
)
from .split import MAX_FACTOR_COLUMNS, Planes, plane_stride, split, split_against

# What serves fp32 inputs as planes of fp16, by torch's name for the precision, and how many planes.
_PLANES = {"high": 1, "highest": 2}
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
    double = library.in_double(result.acc_dtype, layouts, result.dtypes)
    if double and call.weight is not None and FORCED and FORCED[-1] != "cublas":
        raise NoKernel("products of calls in float64 are torch's")
    route = "cublas" if call.weight is None or double else _choose(call, result, device)
    if route == "cublas":
        return _pointwise_recipe(call, result, lib, layouts, fixes)
    by_planes = route in _PLANES
    groups = has_groups(call.program)
    try:
        make = _planes_recipe if by_planes else _gemm_recipe
        recipe = make(call, result, lib, layouts, fixes, route)
    except NoKernel:
        if not groups:
            raise
        return _staged_recipe(call, result, lib, layouts, fixes)
    if groups:
        return where_aligned(recipe, _staged_recipe(call, result, lib, layouts, fixes))
    if by_planes or not (call.transposed or route == "skinny"):
        return recipe
    return where_aligned(recipe, _pointwise_recipe(call, result, lib, layouts, fixes))


def _staged_recipe(
    call: Call, result: Result, lib: Library, layouts: Sequence[OperandLayout], fixes: Fixes
) -> Recipe:
    """The product of its own, then the program over it: for norms that no epilogue takes.

    Products of 16 bits are cuBLAS's, which are as fast as ours without a chain.
    """
    if call.x.dtype != torch.float32:
        return _pointwise_recipe(call, result, lib, layouts, fixes)
    bare = replace(call, program=parse(BARE), operands=(), stores=(), in_place=False)
    product = cuda_recipe(bare, infer(bare), lib, (), ())
    return _pointwise_recipe(call, result, lib, layouts, fixes, product)


def _pointwise_recipe(
    call: Call,
    result: Result,
    lib: Library,
    layouts: Sequence[OperandLayout],
    fixes: Fixes,
    product: Recipe | None = None,
) -> Recipe:
    """The product, if any, by a recipe of its own or by torch, and the program over it."""
    if call.weight is not None and not call.program.instructions:
        return Recipe("cublas", None, reference_run(call))
    problem = pointwise_problem(call, result, lib, layouts, "pointwise")
    launch = _launcher(lib, problem, call.x.get_device(), " -> ".join(call.program.chain))
    route = "pointwise" if call.weight is None else "cublas"
    if product is not None and product.route != "cublas":
        route = f"{product.route}, pointwise"
    by = None if product is None else product.run
    add_up = functools.partial(_total_of_parts, lib)
    run = pointwise_run(call, result, layouts, fixes, lib, problem, launch, by, add_up)
    return Recipe(route, None, run)


def where_aligned(recipe: Recipe, other: Recipe) -> Recipe:
    """`recipe` for tensors that start at multiples of 16 bytes, `other` for the rest.

    Addresses are no part of a signature. Only one of our kernels reads a weight [K, N], only one
    takes fp32 inputs in fp32, and only chains, whose operands are read 16 bytes at a time, norms.
    """

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        assert weight is not None
        together = x.data_ptr() | weight.data_ptr()
        if bias is not None:
            together |= bias.data_ptr()
        for operand in operands:
            together |= operand.data_ptr()
        return (other if together % 16 else recipe).run(x, weight, bias, operands)

    return Recipe(recipe.route, recipe.reason, run)


def _choose(call: Call, result: Result, device: int) -> str:
    """Who computes the product of a call: "cublas", or our kernels: "auto" leaves it to the library
    which, "hopper" and "portable" (only where a measurement forces them) do not, "high" and
    "highest" take fp32 inputs as planes of fp16, "skinny" few rows of them in fp32."""
    weight, x = call.weight, call.x
    assert weight is not None
    plain = (
        (weight.stride(1) == 1 or weight.shape[1] == 1)
        and weight.stride(0) >= weight.shape[1]
        and x.dtype == weight.dtype == result.acc_dtype
        and (call.bias is None or (call.bias.dtype == x.dtype and call.bias.is_contiguous()))
        and x.shape[-1] > 0
    )
    if not plain:
        return "cublas"
    capability = torch.cuda.get_device_capability(device)
    m, n = rows_and_columns(result.acc_shape)
    if x.dtype == torch.float32:
        precision = "high" if tf32_allowed() else "highest"
        if precision == "highest" and _takes_skinny(call, m, n):
            return "skinny"
        if _takes_planes(call, precision, capability, m, n):
            return precision
        if precision == "highest":
            return "cublas"
    if call.transposed and (x.dtype == torch.float32 or capability != (9, 0)):
        return "cublas"
    if FORCED:
        return FORCED[-1]
    rows_bytes = (flatten_rows(x)[1] * x.element_size(), weight.stride(0) * x.element_size())
    if any(size % 16 for size in rows_bytes):
        return "cublas"  # our kernels would have to copy in steps of two or four bytes
    if call.transposed and m <= 32:
        return "cublas"  # the kernels for few rows read [N, K] alone
    return preferred_route(capability, m, n, x.shape[-1], 8 * x.element_size())


def _takes_skinny(call: Call, m: int, n: int) -> bool:
    """Whether our kernels for few rows take an fp32 product in fp32."""
    assert call.weight is not None
    k = call.x.shape[-1]
    rows = (k, flatten_rows(call.x)[1], call.weight.stride(0))
    if call.transposed or any(size % 4 or size > 2**26 for size in rows):
        return False  # they copy 16 bytes at a time, and count them with 32 bits
    if FORCED:
        return FORCED[-1] == "skinny"
    return prefers_skinny(m, n, k, frozen.is_marked(call.weight))


def _takes_planes(call: Call, precision: str, capability: tuple[int, int], m: int, n: int) -> bool:
    """Whether our kernels take an fp32 product on planes of fp16. The Hopper route takes one plane
    or two, the portable one two."""
    if FORCED:
        if FORCED[-1] == "hopper":
            return capability == (9, 0)
        return FORCED[-1] == "portable" and precision == "highest" and capability >= (8, 0)
    assert call.weight is not None
    frozen_weight = frozen.is_marked(call.weight)
    return prefers_planes(precision, m, n, call.x.shape[-1], frozen_weight, capability)


def _launcher(
    lib: Library, problem: library.ProblemStruct, device: int, chain: str
) -> functools.partial[None]:
    described = ctypes.byref(problem)
    return functools.partial(_launch, lib, lib.handle.fxfuse_cuda_run, described, device, chain)


def _launch(lib, entry, described, device, chain, pointers):  # type: ignore[no-untyped-def]
    status = enqueue(entry, device, described, pointers)
    if status:
        lib.check(status, f"fxfuse_cuda_run for {chain}")


def _total_of_parts(lib: Library, parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`routes.total_of_parts` in one launch of ours, which takes a third of the time of torch's."""
    count, p, n = parts.shape
    if p == 1 or parts.dtype != torch.float32:
        return total_of_parts(parts, dtype)
    sums = parts.new_empty((count, n), dtype=dtype)
    status = enqueue(
        lib.handle.fxfuse_cuda_add_parts,
        parts.get_device(),
        ctypes.c_void_p(parts.data_ptr()),
        *map(ctypes.c_int64, parts.shape),
        ctypes.c_void_p(sums.data_ptr()),
        DTYPES[dtype],
    )
    if status:
        lib.check(status, "fxfuse_cuda_add_parts")
    return sums


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
    in_place = _fits_in_place(call, result)

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        assert weight is not None
        x = x.contiguous() if copies else x
        operands = fixed(operands, fixes)
        pointers = Pointers()
        pointers[0], pointers[1] = x.data_ptr(), weight.data_ptr()
        outputs = _fill(pointers, x, bias, operands, described, in_place)
        launch(pointers)
        return outputs

    return Recipe(chosen, None, run)


def _fits_in_place(call: Call, result: Result) -> bool:
    """Whether a call's first output goes over its first operand, and a kernel can write there."""
    if not call.in_place:
        return False
    operand = call.operands[0]
    described = tuple(operand.shape), operand.dtype
    return described == (result.shapes[0], result.dtypes[0]) and operand.is_contiguous()


def _fill(
    pointers: ctypes.Array,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    operands: Tensors,
    described: Sequence[tuple[int, tuple[tuple[int, ...], torch.dtype]]],
    in_place: bool,
) -> list[torch.Tensor]:
    """Enter all addresses but those of A and B, and return the outputs: freshly allocated, but the
    first operand as the first one where `in_place`."""
    if bias is not None:
        pointers[2] = bias.data_ptr()
    for index, operand in enumerate(operands):
        pointers[POINTER_OPERAND + index] = operand.data_ptr()
    outputs = []
    for index, (shape, dtype) in described:
        out = operands[0] if in_place and index == 0 else x.new_empty(shape, dtype=dtype)
        pointers[POINTER_OUTPUT + index] = out.data_ptr()
        outputs.append(out)
    return outputs


def _planes_recipe(
    call: Call,
    result: Result,
    lib: Library,
    layouts: Sequence[OperandLayout],
    fixes: Fixes,
    precision: str,
) -> Recipe:
    """Two launches: fp32 inputs to planes of fp16, and their product with the chain; cuBLAS where
    there is no memory for the planes."""
    rows, columns = rows_and_columns(result.acc_shape)
    copies, lda = flatten_rows(call.x)
    turned = copies and call.x.dim() == 2 and call.x.stride(0) == 1  # which `split` reads as it is
    k, planes = call.x.shape[-1], _PLANES[precision]
    stride = plane_stride(k)
    bias_dtype = None if call.bias is None else call.bias.dtype
    # Planes of a weight [K, N] by its own rows are made in one pass over it and read as they are.
    # Under a row's scale a column that is 2^-17 of the row's largest, and less, loses bits.
    by_rows = call.transposed and call.normwise and not turned and k <= MAX_FACTOR_COLUMNS
    ldb = plane_stride(columns) if by_rows else stride
    problem = lib.problem(
        call.program,
        rows,
        columns,
        torch.float16,
        0,
        layouts,
        result.dtypes,
        Gemm(k, stride, ldb, bias_dtype, by_rows, planes),
        route=FORCED[-1] if FORCED else "auto",
    )
    try:
        chosen = _chosen(lib, problem)[0]
    except NoKernel:
        if not by_rows:
            raise
        plain = replace(call, normwise=False)
        return _planes_recipe(plain, result, lib, layouts, fixes, precision)
    launch = _launcher(lib, problem, call.x.get_device(), " -> ".join(call.program.chain))
    described = list(enumerate(zip(result.shapes, result.dtypes, strict=True)))
    turns_weight = call.transposed and not by_rows
    in_place, lets_go = _fits_in_place(call, result), call.lets_go
    without_planes = _pointwise_recipe(call, result, lib, layouts, fixes)

    def planes_of(weight: torch.Tensor) -> Planes:
        return split(weight.t() if turns_weight else weight, planes=planes)[0]

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        assert weight is not None
        if turned:
            matrix = x
        else:
            adjacent = x.contiguous() if copies else x
            matrix = adjacent.as_strided((rows, k), (lda, 1))
        try:
            if by_rows or frozen.is_marked(weight):
                b = frozen.prepared(weight, ("planes", planes, turns_weight), planes_of)
                a = split_against(matrix, b) if by_rows else split(matrix, planes=planes)[0]
            else:
                a, b = split(matrix, weight.t() if turns_weight else weight, planes=planes)
        except torch.cuda.OutOfMemoryError:
            return without_planes.run(x, weight, bias, operands)
        if lets_go:
            # The kernels that split run on this stream before whatever is next allocated on it.
            (x if lets_go == "x" else weight).untyped_storage().resize_(0)
        operands = fixed(operands, fixes)
        pointers = Pointers()
        for i, of in enumerate((a, b)):
            pointers[i] = of.plane.data_ptr()
            pointers[POINTER_ROOTS + i] = of.root.data_ptr()
            pointers[POINTER_SPECIAL + i] = of.special.data_ptr()
        outputs = _fill(pointers, x, bias, operands, described, in_place)
        launch(pointers)
        return outputs

    return Recipe(f"{chosen}-{precision}", None, run)


def _chosen(lib: Library, problem: library.ProblemStruct) -> tuple[str, str]:
    """Route and kernel the library takes for a problem whose tensors start at multiples of 16
    bytes, on the current device. Raises routes.NoKernel where it has none."""
    route, name = ctypes.c_int32(), ctypes.c_char_p()
    status = lib.handle.fxfuse_cuda_choose(
        ctypes.byref(problem), ctypes.byref(route), ctypes.byref(name)
    )
    if status == STATUS_UNSUPPORTED:
        raise NoKernel(lib.handle.fxfuse_last_error().decode())
    lib.check(status, "fxfuse_cuda_choose")
    return _ROUTE_NAMES[route.value], (name.value or b"").decode()


def kernel_name(
    lib: Library, program: Program, m: int, n: int, k: int, dtype: torch.dtype, route: str = "auto"
) -> str:
    """The kernel a product [m, k] x [n, k] takes on the current device."""
    gemm = Gemm(k, k, k, None)
    return _chosen(lib, lib.problem(program, m, n, dtype, 0, [], [dtype], gemm, route))[1]


__all__ = ["Run", "cuda_recipe", "kernel_name"]
