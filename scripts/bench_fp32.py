"""Time and check fp32 products in "highest" precision over a grid of shapes.

Times are of bias and GELU after a product: eager (cuBLAS's SGEMM and torch's GELU), the fused call
as the library serves it with weights converted at each call and with frozen ones, and every route
that serves the shape. Device time: calls are captured in a CUDA graph, rotated over operands larger
than the L2 together, and replayed; the median of 12 replays is kept.

Errors are those of the bare product against float64, in norm (of each row, then over all rows) and
at the worst element as a share of |x| |W|^T, by family of inputs and K, for cuBLAS and fxfuse in
fp32 and in TF32's place.

    python scripts/bench_fp32.py [--json benchmarks/h200_fp32.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_routes import Captured, captured, compared, operand_sets, race, write_table
from torch import nn

from fxfuse import frozen
from fxfuse.errors import KernelError
from fxfuse.fused import forced_route, fused_linear
from fxfuse.timing import matmul_precision

ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
WEIGHTS = ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (8192, 8192), (512, 16384))
RAGGED = ((1000, 1000, 1000), (333, 4104, 2056), (2049, 1032, 8200), (200, 3080, 776))
ROUTES = ("cublas", "hopper", "skinny")
GELU = "t1 = gelu acc; store t1"
PRODUCT = "store acc"

Make = Callable[[int, int], torch.Tensor]
# Inputs of a product, [rows, k]; the weights are normal, and positive for the second family.
FAMILIES: dict[str, Make] = {
    "U(0, 1)": lambda m, k: torch.rand(m, k),
    "all positive": lambda m, k: torch.rand(m, k),
    "normal": lambda m, k: torch.randn(m, k),
    "lognormal, sigma 3": lambda m, k: torch.randn(m, k).mul(3).exp(),
    "outlier columns of 1e4": lambda m, k: (
        torch.randn(m, k) * torch.where(torch.arange(k) % 97 == 0, 1e4, 1.0)
    ),
    "1e-30": lambda m, k: torch.randn(m, k) * 1e-30,
    "1e30": lambda m, k: torch.randn(m, k) * 1e30,
    "rows of many scales": lambda m, k: torch.randn(m, k) * torch.logspace(-30, 30, m)[:, None],
    "sparse, after a relu": lambda m, k: torch.randn(m, k).relu(),
    "rows of 60 binary orders": lambda m, k: torch.randn(m, k) * torch.logspace(-9, 9, k),
}
DEPTHS = (64, 1000, 8192, 32768)
PRECISIONS = ("highest", "high")


def time_shape(m: int, n: int, k: int) -> dict[str, Any]:
    """One line of the table of times, in milliseconds."""
    x, weights = operand_sets(m, n, k, torch.float32)
    layers = [nn.Linear(k, n, bias=False, device="meta") for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    bias = torch.randn(n, device="cuda")
    rivals: dict[str, Captured] = {}
    rows = min(m, 64)
    operands = [t.double() for t in (x[0][:rows], weights[0], bias)]
    truth = F.gelu(F.linear(*operands))

    def call(i: int) -> torch.Tensor:
        return fused_linear(x[i], layers[i].weight, bias, [], GELU)

    def eager(i: int) -> torch.Tensor:
        return F.gelu(F.linear(x[i], weights[i], bias))

    def timed(name: str, run: Callable[[int], torch.Tensor]) -> None:
        error = ((run(0)[:rows].double() - truth).norm() / truth.norm()).item()
        assert error < 1e-5, f"{name} {m}x{k}->{n}: error {error}"
        rivals[f"{name}_ms"] = captured([lambda i=i: run(i) for i in range(len(x))])

    timed("eager", eager)
    timed("auto", call)
    for route in ROUTES:
        with forced_route(route):
            try:
                call(0)
            except KernelError:  # the route has no kernel for the shape
                continue
            timed(route, call)
    for layer in layers:
        frozen.mark(layer, "weight")
    for i in range(len(layers)):
        call(i)  # converts the weight, which no graph may capture
    timed("frozen", call)
    return {"m": m, "n": n, "k": k, **race(rivals)}


def errors(found: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor) -> tuple[float, float]:
    """In norm, of rows that may differ by more than fp32 reaches; and at the worst element."""
    largest = truth.abs().amax(1, keepdim=True).clamp_min(1e-300)
    of_rows = ((found.double() - truth) / largest).norm(dim=1) / (truth / largest).norm(dim=1)
    worst = ((found.double() - truth).abs() / scale.clamp_min(1e-300)).amax()
    return (of_rows.square().mean().sqrt().item(), worst.item())


def check(family: str, k: int) -> Iterator[dict[str, Any]]:
    """Lines of the table of errors: one for each precision."""
    x = FAMILIES[family](256, k).cuda()
    weight = torch.randn(1024, k, device="cuda") / k**0.5
    if family == "all positive":
        weight = weight.abs()
    truth = F.linear(x.double(), weight.double())
    scale = F.linear(x.abs().double(), weight.abs().double())
    for precision in PRECISIONS:
        # So few rows would be left to cuBLAS under "high".
        route = forced_route("hopper") if precision == "high" else nullcontext()
        with matmul_precision(precision), route:
            theirs = errors(F.linear(x, weight), truth, scale)
            ours = errors(fused_linear(x, weight, None, [], PRODUCT), truth, scale)
        line = {"family": family, "k": k, "precision": precision}
        line |= {"cublas": theirs[0], "fxfuse": ours[0]}
        yield line | {"cublas_worst": theirs[1], "fxfuse_worst": ours[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the tables")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = []
    with torch.no_grad(), matmul_precision("highest"):
        for m, n, k in [(m, n, k) for m in ROWS for n, k in WEIGHTS] + list(RAGGED):
            lines.append(line := time_shape(m, n, k))
            cells = (f"{v:8.4f}" if isinstance(v, float) else f"{v:5}" for v in line.values())
            print(" ".join(cells), flush=True)
        checked = [line for family in FAMILIES for k in DEPTHS for line in check(family, k)]
    for line in checked:
        print(" ".join(f"{v:.2e}" if isinstance(v, float) else f"{v:24}" for v in line.values()))
    many = [line for line in lines if line["m"] >= 128]
    for ours in ("auto", "frozen"):
        print(f"eager over {ours}, M >= 128,", compared(many, "eager_ms", f"{ours}_ms"))
        print(f"eager over {ours}, all,", compared(lines, "eager_ms", f"{ours}_ms"))
    if arguments.json:
        write_table(arguments.json, dtype="float32", lines=lines, errors=checked)


if __name__ == "__main__":
    main()
