"""Prepare a fused call for one signature: which kernel serves it, and everything it is told.

A signature is all that may decide a route: shapes, strides, dtypes, device, precision setting.
`prepare` is called once for each and returns a `Recipe` whose `run` does nothing but fill in
addresses. The choice is a table look-up, never a race: the same signature on the same machine
takes the same route every time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.graph import increment_version

from . import library, reference
from .errors import KernelError, LibraryError, ProgramError
from .infer import Call, Result, Tensors, infer
from .layout import classify, operand_shapes, result_shapes
from .library import (
    POINTER_OPERAND,
    POINTER_OUTPUT,
    Gemm,
    Library,
    OperandLayout,
    Pointers,
    ProblemStruct,
)
from .ops import GROUP_OPS, GROUP_WIDTHS
from .program import ACC
from .vjp import Reduction

Run = Callable[[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", Tensors], list]

Fixes = Sequence[tuple[int, "tuple[int, ...] | None"]]

# What the kernels of a device compute with; only the pointwise kernel of CUDA does so in float64.
_MATRIX_DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
}
FORCED: list[str] = []


@dataclass(frozen=True)
class Recipe:
    """How calls of one signature run. route: "cpu", "cublas", "portable", "hopper",
    "hopper-high", "hopper-highest", "portable-highest", "skinny", "pointwise" or "reference";
    reason: why the last one, where it is."""

    route: str
    reason: str | None
    run: Run


class NoKernel(Exception):
    """Why no kernel serves a call."""


@contextmanager
def forced_route(route: str) -> Iterator[None]:
    """Serve CUDA Linear calls by `route` ("portable", "hopper", "skinny" or "cublas") where it can,
    for measurements.

    Raises KernelError at a call the route cannot serve.
    """
    FORCED.append(route)
    try:
        yield
    finally:
        FORCED.pop()


def prepare(call: Call) -> Recipe:
    """The recipe for calls like this one. Raises as `infer` does, before anything runs."""
    result = infer(call)
    try:
        recipe = _kernel_recipe(call, result)
    except (NoKernel, ProgramError) as reason:
        if FORCED:
            raise KernelError(f"route {FORCED[-1]} cannot serve {call.site}: {reason}") from None
        recipe = Recipe("reference", str(reason), reference_run(call))
    return over_operand(recipe) if call.in_place else recipe


def over_operand(recipe: Recipe) -> Recipe:
    """`recipe` with its first output in the memory of the first operand, and returned as that
    tensor: copied there where the recipe itself has not written there."""

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        first, *rest = recipe.run(x, weight, bias, operands)
        if first is operands[0]:
            increment_version(first)  # of what a kernel writes to an address autograd knows nothing
        else:
            operands[0].copy_(first)
        return [operands[0], *rest]

    return Recipe(recipe.route, recipe.reason, run)


def reference_run(call: Call) -> Run:
    """Run calls like this one by torch ops."""
    # Not the call itself: what is kept would hold its tensors.
    program, transposed, views, stores = call.program, call.transposed, call.views, call.stores

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        acc = x if weight is None else reference.linear(x, weight, bias, transposed)
        outputs = reference.run(program, acc, operands, views=views)
        # An output may share an input's memory here (a program that only casts to the dtype it
        # has, or only views); an op must return fresh tensors.
        held = [t for t in (x, *operands) if t.layout == torch.strided]
        fresh = [o.clone() if any(share_memory(o, t) for t in held) else o for o in outputs]
        if not stores:
            return fresh
        shaped = fresh if views else [o.expand(acc.shape) for o in fresh]
        return [
            reduced(o, store.reduction).to(store.dtype)
            for o, store in zip(shaped, stores, strict=True)
        ]

    return run


def reduced(matrix: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """A tensor [..., N], seen as a matrix [M, N], summed in fp32 or wider: to [N], [M] or []."""
    if reduction is Reduction.NONE:
        return matrix
    wide = torch.promote_types(matrix.dtype, torch.float32)
    flat = matrix.reshape(-1, matrix.shape[-1])
    if reduction is Reduction.ALL:
        return flat.sum(dtype=wide)
    return flat.sum(0 if reduction is Reduction.ROWS else 1, dtype=wide)


def total_of_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What several sums [S, P, N], each in P parts, come to: [S, N] of `dtype`, by torch's ops."""
    return (parts.sum(1) if parts.shape[1] > 1 else parts[:, 0]).to(dtype)


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a tensor and a strided one have the same storage."""
    return a is b or (
        a.layout == torch.strided
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    )


def _kernel_recipe(call: Call, result: Result) -> Recipe:
    device = call.x.device
    if device.type not in ("cpu", "cuda"):
        raise NoKernel(f"device {device.type} has no kernel library")
    tensors = [call.x, *call.operands]
    tensors += [t for t in (call.weight, call.bias) if t is not None]
    for tensor in tensors:
        if tensor.device != device:
            raise NoKernel(f"tensors on {device} and {tensor.device}")
        if tensor.layout != torch.strided:
            raise NoKernel(f"a tensor's layout is {tensor.layout}")
        if tensor.is_neg():
            raise NoKernel("a tensor has its negation pending")
    lib = library.find(f"fxfuse_{device.type}")
    if isinstance(lib, LibraryError):
        raise NoKernel(f"no kernel library: {lib}")
    layouts, fixes = _layouts(call, result)
    if device.type == "cpu":
        return _cpu_recipe(call, result, lib, layouts, fixes)
    from .cuda import cuda_recipe

    return cuda_recipe(call, result, lib, layouts, fixes)


def _layouts(
    call: Call, result: Result
) -> tuple[list[OperandLayout], list[tuple[int, tuple[int, ...] | None]]]:
    """Operand layouts, and which operands must be made contiguous (or expanded) at each call."""
    dtypes = _MATRIX_DTYPES[call.x.device.type]
    if result.acc_dtype not in dtypes:
        raise NoKernel(f"{result.acc_dtype} is computed by torch ops")
    elements = math.prod(result.acc_shape)
    for shape, dtype in zip(result.shapes, result.dtypes, strict=True):
        if dtype not in dtypes:
            raise NoKernel(f"an output is {dtype}")
        if math.prod(shape) != elements or shape[-1:] != result.acc_shape[-1:]:
            raise NoKernel(f"an operand widens the result from {result.acc_shape} to {shape}")
    if not result.acc_shape:
        raise NoKernel("the result has no dimension")
    _check_norms(call, result)
    against = operand_shapes(call.program, result.acc_shape, call.views)
    layouts: list[OperandLayout] = []
    fixes: list[tuple[int, tuple[int, ...] | None]] = []
    prelu = {i.args[1] for i in call.program.instructions if i.op == "prelu"}
    for index, operand in enumerate(call.operands):
        if operand.dtype not in (*dtypes, torch.bool):
            raise NoKernel(f"operand {index} is {operand.dtype}")
        if index not in against:  # the part of a program before a dropout may not read it
            layouts.append(OperandLayout("unused", 0, 0, 1, 1, torch.float32))
            continue
        shape = against[index]
        channels = any(getattr(a, "index", None) == index for a in prelu) and operand.numel() > 1
        if channels and len(shape) != 2:
            raise NoKernel("prelu with a weight per channel of a tensor that is not [M, N]")
        sizes = tuple(operand.shape)
        layout = classify(sizes, operand.stride(), operand.dtype, shape)
        if layout is None:
            layout = classify(sizes, _contiguous(sizes), operand.dtype, shape)
            fixes.append((index, None))
        if layout is None:
            layout = classify(shape, _contiguous(shape), operand.dtype, shape)
            fixes[-1] = (index, shape)
        assert layout is not None
        layouts.append(layout)
    return layouts, fixes


def _check_norms(call: Call, result: Result) -> None:
    """Raises NoKernel where groups of channels are not groups of columns that kernels take."""
    shapes = result_shapes(call.program, result.acc_shape, call.views)
    for instruction, shape in zip(call.program.instructions, shapes, strict=True):
        if instruction.op == "group_norm" and len(shape) != 2:
            raise NoKernel(f"group_norm of a tensor of shape {shape}, which is not [M, N]")
        if instruction.op in GROUP_OPS:
            width = result.acc_shape[-1] // int(instruction.params[0])
            if width not in GROUP_WIDTHS:
                raise NoKernel(f"{instruction.op} over groups of {width} columns")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def fixed(operands: Tensors, fixes: Fixes) -> Tensors:
    """Operands with those no kernel can address copied."""
    if not fixes:
        return operands
    result = list(operands)
    for index, shape in fixes:
        tensor = result[index]
        result[index] = (tensor if shape is None else tensor.expand(shape)).contiguous()
    return result


def flatten_rows(tensor: torch.Tensor) -> tuple[bool, int]:
    """`(copy, row_stride)` to read a tensor [..., K] as a matrix: whether it must be copied."""
    sizes, strides = tuple(tensor.shape), tensor.stride()
    if sizes[-1] > 1 and strides[-1] != 1:
        return True, sizes[-1]
    lead = [(size, stride) for size, stride in zip(sizes, strides, strict=True)][:-1]
    lead = [(size, stride) for size, stride in lead if size != 1]
    if not lead:
        return False, sizes[-1]
    expected = lead[-1][1]
    for size, stride in reversed(lead):
        if stride != expected:
            return True, sizes[-1]
        expected = stride * size
    # Rows that overlap or repeat (an expanded tensor) are left to a copy.
    return (True, sizes[-1]) if lead[-1][1] < sizes[-1] else (False, lead[-1][1])


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """M and N of a tensor [..., N]."""
    return math.prod(shape[:-1]), shape[-1]


def product_output(call: Call, result: Result) -> int | None:
    """The output that is the product by torch itself, if there is one: no kernel need store it."""
    if call.weight is None or len(call.program.outputs) == 1:
        return None
    for index, value in enumerate(call.program.outputs):
        if value == ACC and result.shapes[index] == result.acc_shape:
            return index
    return None


def in_place_output(result: Result) -> int | None:
    """The output that may overwrite the product: elementwise, one read before one write."""
    for index, dtype in enumerate(result.dtypes):
        if dtype == result.acc_dtype:
            return index
    return None


def pointwise_problem(
    call: Call,
    result: Result,
    lib: Library,
    layouts: Sequence[OperandLayout],
    route: str = "auto",
) -> ProblemStruct:
    """The problem of running a call's program over a matrix: torch's product, or x itself."""
    rows, columns = rows_and_columns(result.acc_shape)
    stride = columns if call.weight is not None else flatten_rows(call.x)[1]
    held = product_output(call, result)
    kept = [i for i in range(len(result.dtypes)) if i != held]
    return lib.problem(
        replace(call.program, outputs=tuple(call.program.outputs[i] for i in kept)),
        rows,
        columns,
        result.acc_dtype,
        stride,
        layouts,
        [result.dtypes[i] for i in kept],
        route=route,
        reductions=[result.reductions[i] for i in kept],
    )


def pointwise_run(
    call: Call,
    result: Result,
    layouts: Sequence[OperandLayout],
    fixes: Fixes,
    lib: Library,
    problem: ProblemStruct,
    launch: Callable[[ctypes.Array], None],
    product: Run | None = None,
    add_up: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = total_of_parts,
) -> Run:
    """Run the product by `product` or torch, then the program over it by `launch(pointers)`.

    problem: what `launch` runs. add_up: what adds up the parts of sums over rows. Where the call
    has a product its memory is one of the outputs, so nothing else is allocated.
    """
    transposed, held = call.transposed, product_output(call, result)
    reused = in_place_output(result) if call.weight is not None and held is None else None
    reductions = {i: r for i, r in enumerate(result.reductions) if r is not Reduction.NONE}
    # Sums over rows lie in one tensor, whose parts are added up in one go.
    by_rows = [i for i, r in reductions.items() if r is Reduction.ROWS]
    place_in_sums = {index: place for place, index in enumerate(by_rows)}
    sum_dtypes = {result.dtypes[i] for i in by_rows}
    others = {i: r for i, r in reductions.items() if r is not Reduction.ROWS}
    p, q = lib.partials(problem) if reductions else (0, 0)
    m, n = rows_and_columns(result.acc_shape)
    parts = {Reduction.ROWS: (p, n), Reduction.COLUMNS: (m, q), Reduction.ALL: (p, q)}
    shapes = [parts.get(r, result.acc_shape) for r in result.reductions]
    double = library.in_double(result.acc_dtype, layouts, result.dtypes)
    wide = torch.float64 if double else torch.float32
    dtypes = [wide if i in reductions else d for i, d in enumerate(result.dtypes)]
    stored = [(i, shapes[i], dtypes[i]) for i in range(len(dtypes)) if i != held]
    reshaped = {
        i: shape
        for i, shape in enumerate(result.shapes)
        if shape != result.acc_shape and result.reductions[i] is Reduction.NONE
    }
    copies = call.weight is None and flatten_rows(call.x)[0]

    def run(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, operands: Tensors
    ) -> list:
        if weight is None:
            acc = x.contiguous() if copies else x
        elif product is not None:
            (acc,) = product(x, weight, bias, ())
        elif transposed:
            acc = reference.linear(x, weight, bias, True)
        else:
            acc = F.linear(x, weight, bias)
        operands = fixed(operands, fixes)
        pointers = Pointers()
        pointers[0] = acc.data_ptr()
        for index, operand in enumerate(operands):
            pointers[POINTER_OPERAND + index] = operand.data_ptr()
        sums = acc.new_empty((len(by_rows), p, n), dtype=wide) if by_rows else None
        outputs = []
        for place, (index, shape, dtype) in enumerate(stored):
            if index in place_in_sums:
                assert sums is not None
                out = sums[place_in_sums[index]]
            else:
                out = acc if index == reused else acc.new_empty(shape, dtype=dtype)
            pointers[POINTER_OUTPUT + place] = out.data_ptr()
            outputs.append(out)
        launch(pointers)
        if held is not None:
            outputs.insert(held, acc)
        for index, shape in reshaped.items():
            outputs[index] = outputs[index].view(shape)
        for index, reduction in others.items():
            total = reduced(outputs[index], reduction)
            outputs[index] = total.to(result.dtypes[index])
        if sums is not None:
            rounded = {dtype: add_up(sums, dtype) for dtype in sum_dtypes}
            for index, place in place_in_sums.items():
                outputs[index] = rounded[result.dtypes[index]][place]
        return outputs

    return run


def _cpu_recipe(
    call: Call,
    result: Result,
    lib: Library,
    layouts: Sequence[OperandLayout],
    fixes: Fixes,
) -> Recipe:
    problem = pointwise_problem(call, result, lib, layouts)
    entry, described = lib.handle.fxfuse_cpu_run, ctypes.byref(problem)
    name = f"fxfuse_cpu_run for {' -> '.join(call.program.chain)}"

    def launch(pointers: ctypes.Array) -> None:
        status = entry(described, pointers, torch.get_num_threads())
        if status:
            lib.check(status, name)

    run = pointwise_run(call, result, layouts, fixes, lib, problem, launch)
    return Recipe("cpu", None, run)


def tf32_allowed() -> bool:
    """Whether torch's precision settings let fp32 products on CUDA be taken in TF32."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through the per-backend switch of newer torch, which wins
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def gemm_of(call: Call, lda: int) -> Gemm:
    """The product of a call whose x [M, K] and weight [N, K] the kernels can read."""
    assert call.weight is not None
    bias = None if call.bias is None else call.bias.dtype
    return Gemm(call.x.shape[-1], lda, call.weight.stride(0), bias, call.transposed)
