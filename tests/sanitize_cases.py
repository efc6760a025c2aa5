"""Small runs of every CUDA kernel, tile and route, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/sanitize_cases.py [GROUP ...]

Prints "N passed"; exits with 1 where a number is wrong, with 0 and a message without CUDA. With
--list it prints the names of the groups alone. Inputs are made and results checked on the CPU:
under these tools a kernel of torch's or cuBLAS's takes as long as one of ours.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from helpers_gemm import IN_TURNS, SHARES, SKINNY_TILES, SPLITS, TILES, run_tile

from fxfuse import library, recipes
from fxfuse.errors import LibraryError
from fxfuse.fused import forced_route, fused_linear, fused_pointwise
from fxfuse.infer import Store
from fxfuse.recipes import Static
from fxfuse.split import split, split_reference
from fxfuse.vjp import Reduction

# The second chain keeps a slot, reads every operand kind and stores twice.
CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
WIDE = "t1 = gelu acc; t2 = mul t1, $0; t3 = add t2, $1; t4 = mul t3, acc; store t4, t1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# By tile: skinny, small, medium and large (many rows), and ragged where K is odd.
SIZES = ((1, 40, 64), (17, 72, 96), (65, 64, 40), (130, 264, 72), (300, 520, 64))
RAGGED = ((1, 1, 1), (7, 9, 5), (65, 67, 33), (130, 129, 7))
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1.6e-2, torch.float16: 4e-3}
TOLERANCE[torch.float64] = 1e-7  # where a result is cast to fp32


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).cuda()


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU."""
    return tensor.detach().cpu().double()


def close(
    found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, factor: float = 1.0
) -> bool:
    norm = truth.norm().clamp_min(1e-3)
    return bool((exact(found) - truth).norm() <= factor * TOLERANCE[dtype] * norm)


def chain(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(acc + a) * b


def operands(m: int, n: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield randn(n, dtype=dtype), randn(m, n, dtype=dtype)
    yield randn(m, 1, dtype=dtype), randn(dtype=dtype)
    yield randn(m, n + 3, dtype=dtype)[:, 1 : n + 1], randn(1, dtype=dtype)


def gemm_cases() -> Iterator[tuple[str, bool]]:
    """Every product, by both routes; aligned, ragged and with strided inputs."""
    for dtype, (m, n, k) in itertools.product(DTYPES, (*SIZES, *RAGGED)):
        for route in ("portable", "cublas"):
            torch.set_float32_matmul_precision("high" if route == "portable" else "highest")
            x, weight = randn(m, k + 1, dtype=dtype)[:, 1:], randn(n, k, dtype=dtype)
            if k % 8 == 0:
                x = x.contiguous()
            bias = randn(n, dtype=dtype)
            truth = F.linear(exact(x), exact(weight), exact(bias))
            for number, (a, b) in enumerate(operands(m, n, dtype)):
                with forced_route(route):
                    found = fused_linear(x, weight, bias, [a, b], CHAIN)
                right = close(found, chain(truth, exact(a), exact(b)), dtype)
                yield f"{route} {dtype} {m}x{n}x{k} operands {number}", right
            with forced_route(route):
                outputs = fused_linear(x, weight, bias, [a, b], WIDE)
            gelu = F.gelu(truth)
            wide = (gelu * exact(a) + exact(b)) * truth
            right = close(outputs[0], wide, dtype) and close(outputs[1], gelu, dtype)
            yield f"{route} {dtype} {m}x{n}x{k} two outputs", right


def hopper_cases() -> Iterator[tuple[str, bool]]:
    """Every tile of the Hopper route, every division of K, both layouts of the weight."""
    sizes = ((130, 264, 520), (9, 72, 512), (65, 33, 136))
    for dtype, (m, n, k), turned in itertools.product(DTYPES[1:], sizes, (False, True)):
        if turned and n % 8:
            continue
        x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
        a, b = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
        acc = F.linear(exact(x), exact(weight), exact(bias))
        truths = {
            CHAIN: chain(acc, exact(a), exact(b)),
            WIDE: (F.gelu(acc) * exact(a) + exact(b)) * acc,
        }
        stored = weight.t().contiguous() if turned else weight
        for tile, split_by, program in itertools.product(TILES, SPLITS, truths):
            found = run_tile(x, stored, bias, [a, b], program, tile, split_by, turned)
            if found is not None:
                name = f"hopper {dtype} {m}x{n}x{k} turned {turned} {tile}/{split_by}"
                yield name, close(found[0], truths[program], dtype)


def pairs_cases() -> Iterator[tuple[str, bool]]:
    """Pairs of blocks that share a matrix: odd numbers of tiles, several to a block."""
    dtype = torch.bfloat16
    for (m, n, k), turned in itertools.product(
        ((260, 392, 520), (130, 201, 136), (384, 768, 72), (300, 9000, 72)), (False, True)
    ):
        if turned and n % 8:
            continue
        x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
        a, b = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
        truth = chain(F.linear(exact(x), exact(weight), exact(bias)), exact(a), exact(b))
        stored = weight.t().contiguous() if turned else weight
        for tile, shares, split_by in itertools.product(TILES, SHARES, SPLITS):
            found = run_tile(x, stored, bias, [a, b], CHAIN, tile + shares, split_by, turned)
            if found is not None:
                name = f"pairs {m}x{n}x{k} turned {turned} {tile} + {shares}/{split_by}"
                yield name, close(found[0], truth, dtype)


def turns_cases() -> Iterator[tuple[str, bool]]:
    """Blocks whose warpgroups take tiles in turns."""
    m, n, k = 300, 9000, 72
    for dtype in DTYPES[1:]:
        x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
        a, b = randn(n, dtype=dtype), randn(m, n, dtype=dtype)
        acc = F.linear(exact(x), exact(weight), exact(bias))
        found = run_tile(x, weight, bias, [a, b], CHAIN, IN_TURNS, 1)
        right = found is not None and close(found[0], chain(acc, exact(a), exact(b)), dtype)
        yield f"hopper in turns {dtype} {m}x{n}x{k}", right


def planes_cases(
    route: str, counts: Sequence[int] = (2,), turned: bool = False
) -> Iterator[tuple[str, bool]]:
    """fp32 products on so many planes of fp16, and of two with special rows; of a weight [K, N]
    where `turned`."""
    program = "t1 = silu acc; store t1"
    sizes = ((130, 264, 520), (9, 50, 77))
    if route == "hopper":
        cases = [*itertools.product(counts, TILES, SPLITS, sizes)]
    else:  # the last two take the larger tiles on an H200
        larger = ((630, 3580, 136), (1000, 4001, 264))
        cases = [*itertools.product(counts, (0,), (0,), (*sizes, *larger))]
    for planes, tile, division, (m, n, k) in cases:
        x, weight, bias = (torch.randn(s) for s in ((m, k), (n, k), (n,)))
        for special in (False, True)[:planes]:
            if special:
                x[5, 7] = torch.inf
            stored = weight.t().contiguous() if turned else weight
            inputs = [t.cuda() for t in (x, stored, bias)]
            found = run_tile(*inputs, [], program, tile, division, turned, planes, route)
            if found is None:
                continue
            truth = F.silu(F.linear(exact(x), exact(weight), exact(bias)))
            result, finite = exact(found[0]), truth.isfinite()
            factor = 1.0 if planes == 1 else 1e-3
            right = torch.equal(result.isfinite(), finite)
            right &= close(result[finite], truth[finite], torch.float32, factor)
            name = f"{route} {planes} planes {tile}/{division} {m}x{n}x{k} turned {turned}"
            yield f"{name} special {special}", right


def skinny_cases() -> Iterator[tuple[str, bool]]:
    """Every kernel of the skinny route, every tile, every division of K."""
    torch.set_float32_matmul_precision("highest")
    sizes = ((1, 300, 1028), (3, 33, 4), (8, 70, 520), (13, 257, 640), (32, 130, 1500))
    for m, n, k in sizes:
        x, weight, bias = (randn(*s, dtype=torch.float32) for s in ((m, k), (n, k), (n,)))
        for number, (a, b) in enumerate(operands(m, n, torch.float32)):
            acc = F.linear(exact(x), exact(weight), exact(bias))
            truth = chain(acc, exact(a), exact(b))
            with forced_route("skinny"):
                found = fused_linear(x, weight, bias, [a, b], CHAIN)
            yield f"skinny {m}x{n}x{k} operands {number}", close(found, truth, torch.float32)
        row, full = randn(n, dtype=torch.float32), randn(m, n, dtype=torch.float32)
        gelu = F.gelu(acc)
        wide = (gelu * exact(row) + exact(full)) * acc
        for tile, split_by in itertools.product(SKINNY_TILES, SPLITS):
            found = run_tile(x, weight, bias, [row, full], WIDE, tile, split_by, route="skinny")
            if found is not None:
                right = close(found[0], wide, torch.float32) and close(
                    found[1], gelu, torch.float32
                )
                yield f"skinny {m}x{n}x{k} {tile}/{split_by}", right


def pointwise_cases() -> Iterator[tuple[str, bool]]:
    """The pointwise kernel alone, in each arithmetic; outputs of another dtype, too."""
    for dtype, (m, n, _) in itertools.product((*DTYPES, torch.float64), (*SIZES, *RAGGED)):
        for source in (randn(m, n, dtype=dtype), randn(m, n + 1, dtype=dtype)[:, 1:]):
            for number, (a, b) in enumerate(operands(m, n, dtype)):
                truth = chain(exact(source), exact(a), exact(b))
                found = fused_pointwise(source, [a, b], CHAIN)
                yield f"pointwise {dtype} {m}x{n} operands {number}", close(found, truth, dtype)
            cast = fused_pointwise(source, [], "t1 = tanh acc; t2 = cast_f32 t1; store t2, t1")
            right = close(cast[0], torch.tanh(exact(source)), dtype)
            yield f"pointwise {dtype} {m}x{n} cast", right


def sums_cases() -> Iterator[tuple[str, bool]]:
    """Outputs summed over rows, columns and all, beside the matrix itself, and training steps."""
    text = "t1 = silu acc; t2 = copy t1; t3 = copy t1; t4 = copy t1; store t1, t2, t3, t4"
    reductions = (Reduction.NONE, Reduction.ROWS, Reduction.COLUMNS, Reduction.ALL)
    sizes = (*SIZES, *RAGGED, (3000, 9, 4))
    for dtype, (m, n, k) in itertools.product((*DTYPES, torch.float64), sizes):
        z = randn(m, n, dtype=dtype)
        static = Static(text, stores=tuple(Store(r, dtype) for r in reductions))
        found = recipes.find(z, None, None, [], static).run(z, None, None, [])
        silu = F.silu(exact(z))
        truths = (silu, silu.sum(0), silu.sum(1), silu.sum())
        scales = (silu, silu.abs().sum(0), silu.abs().sum(1), silu.abs().sum())
        right = all(
            bool((exact(f) - t).norm() <= TOLERANCE[dtype] * s.norm())
            for f, t, s in zip(found, truths, scales, strict=True)
        )
        yield f"sums {dtype} {m}x{n}", right
        tensors = [randn(*s, dtype=dtype).requires_grad_() for s in ((m, k), (n, k), (n,), (n,))]
        x, weight, bias, a = tensors
        wide = [exact(t).requires_grad_() for t in tensors]
        seed = randn(m, n, dtype=dtype)
        out = fused_linear(x, weight, bias, [a, seed], CHAIN)
        truth = chain(F.linear(*wide[:3]), wide[3], exact(seed))
        grads = zip(
            torch.autograd.grad(out, tensors, seed),
            torch.autograd.grad(truth, wide, exact(seed)),
            strict=True,
        )
        yield f"backward {dtype} {m}x{n}x{k}", all(close(g, t, dtype) for g, t in grads)


def norm_cases() -> Iterator[tuple[str, bool]]:
    """Norms over groups of columns by every route, and their gradients."""
    sizes = ((130, 256, 72, 8), (17, 128, 64, 1), (65, 64, 40, 8), (300, 320, 64, 5))
    for dtype, (m, n, k, groups) in itertools.product((*DTYPES, torch.float64), sizes):
        program = f"t1 = group_norm acc, $0, $1, {groups}.0, 1e-05; t2 = silu t1; store t2"
        tensors = [randn(*s, dtype=dtype).requires_grad_() for s in ((m, k), (n, k), *[(n,)] * 3)]
        wide = [exact(t).requires_grad_() for t in tensors]
        truth = F.silu(F.group_norm(F.linear(*wide[:3]), groups, *wide[3:]))
        x, weight, bias, *rows = tensors
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            found = fused_linear(x, weight, bias, rows, program)
            name = f"norm {dtype} {precision} {m}x{n}x{k} of {groups}"
            yield name, close(found, truth, dtype)
            seed = randn(m, n, dtype=dtype)
            grads = zip(
                torch.autograd.grad(found, tensors, seed),
                torch.autograd.grad(truth, wide, exact(seed), retain_graph=True),
                strict=True,
            )
            yield f"{name}, gradients", all(close(g, t, dtype, 2.0) for g, t in grads)
        with forced_route("cublas"), torch.no_grad():
            found = fused_linear(x, weight, bias, rows, program)
        yield f"norm {dtype} cublas {m}x{n}x{k} of {groups}", close(found, truth, dtype)


def split_cases() -> Iterator[tuple[str, bool]]:
    """Rows and strips in registers, rows read twice and turned tiles; each beside a matrix of few
    columns."""
    sizes = ((3, 40000), (130, 264), (67, 33), (70, 3000), (9, 9001))
    for planes, (m, k) in itertools.product((1, 2), sizes):
        for turned in (False, True):
            shape = (k, m + 1) if turned else (m, k + 1)
            wide = randn(*shape, dtype=torch.float32)[:, 1:]
            matrices = wide.t() if turned else wide, randn(m, 24, dtype=torch.float32)
            pairs = zip(split(*matrices, planes=planes), matrices, strict=True)
            right = True
            for found, matrix in pairs:
                expected = split_reference(matrix.cpu(), planes)
                right &= torch.equal(found.plane.cpu(), expected.plane)
                right &= torch.equal(found.root.cpu(), expected.root)
            yield f"split {planes} planes {m}x{k} turned {turned}", right


# They may run side by side, each in a process of its own.
GROUPS: dict[str, Callable[[], Iterator[tuple[str, bool]]]] = {
    "gemm": gemm_cases,
    "skinny": skinny_cases,
    "pointwise": pointwise_cases,
    "sums": sums_cases,
    "norm": norm_cases,
    "split": split_cases,
    "planes": functools.partial(planes_cases, "portable"),
    "hopper": hopper_cases,
    "pairs": pairs_cases,
    "turns": turns_cases,
    "hopper-1-plane": functools.partial(planes_cases, "hopper", (1,)),
    "hopper-1-turned": functools.partial(planes_cases, "hopper", (1,), True),
    "hopper-2-planes": functools.partial(planes_cases, "hopper", (2,)),
    "hopper-2-turned": functools.partial(planes_cases, "hopper", (2,), True),
}
ON_HOPPER = frozenset(name for name in GROUPS if name.startswith("hopper")) | {"turns"}


def main(names: list[str]) -> int:
    if names == ["--list"]:
        print(*GROUPS)
        return 0
    if unknown := set(names) - set(GROUPS):
        print(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
        return 2
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        return 0
    lib = library.find("fxfuse_cuda")
    if isinstance(lib, LibraryError):
        print(f"failed: {lib}")
        return 1
    torch.manual_seed(0)
    passed, wrong = 0, []
    hopper = torch.cuda.get_device_capability() == (9, 0)
    chosen = [n for n in names or GROUPS if hopper or n not in ON_HOPPER]
    for name, right in itertools.chain.from_iterable(GROUPS[n]() for n in chosen):
        passed += right
        if not right:
            wrong.append(name)
    torch.cuda.synchronize()
    for name in wrong:
        print(f"wrong: {name}")
    print(f"{passed} passed" + (f", {len(wrong)} wrong" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
