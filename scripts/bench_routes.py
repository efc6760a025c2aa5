"""Time every route of a fused call over a grid of shapes, on the device alone.

Writes the JSON that `fxfuse.cuda.preferred_route` is made from. Calls are captured in a CUDA graph,
rotated over operands larger than the L2 together, and replayed; the median of 12 replays is kept.
Outputs of every route are compared with float64 on the first 64 rows.

    python scripts/bench_routes.py [--json benchmarks/h200_routes.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from fxfuse.fused import forced_route, fused_linear

ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
WEIGHTS = ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (8192, 8192))
ROUTES = ("cublas", "portable", "hopper")
PROGRAMS = {
    "add -> relu": "t1 = add acc, $0; t2 = relu t1; store t2",
    "add -> silu -> tanh -> gelu -> clamp": (
        "t1 = add acc, $0; t2 = silu t1; t3 = tanh t2; t4 = gelu t3; t5 = clamp t4, -1.0, 1.0; "
        "store t5"
    ),
}


def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, program: str) -> torch.Tensor:
    """The program's result in float64, by the reference."""
    operands = [t.double() for t in (x[:64], weight, bias)]
    return fused_linear(*operands, [operands[2]], program)


def device_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of one of `calls`, run one after the other from a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    samples = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / len(calls))
    return statistics.median(samples)


def measure(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, object]:
    """One line of the table: the bare GEMM, and each route for each program."""
    sets = max(3, int(2e8 / ((m * k + n * k + m * n) * 2)) + 1)
    sets = min(sets, 24)
    x = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(sets)]
    weight = [(torch.randn(n, k, device="cuda") / k**0.5).to(dtype) for _ in range(sets)]
    bias = torch.randn(n, device="cuda").to(dtype)
    line: dict[str, object] = {"m": m, "n": n, "k": k}
    line["gemm_ms"] = device_ms([lambda i=i: F.linear(x[i], weight[i], bias) for i in range(sets)])
    for name, program in PROGRAMS.items():
        expected = truth(x[0], weight[0], bias, program)
        for route in ROUTES:
            with forced_route(route):
                found = fused_linear(x[0], weight[0], bias, [bias], program)[:64]
                error = ((found.double() - expected).norm() / expected.norm()).item()
                assert error < 1e-2, f"{route} {m}x{k}->{n}: error {error}"
                calls = [
                    lambda i=i, p=program: fused_linear(x[i], weight[i], bias, [bias], p)
                    for i in range(sets)
                ]
                line[f"{name}: {route}_ms"] = device_ms(calls)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = []
    with torch.no_grad():
        for m in ROWS:
            for n, k in WEIGHTS:
                lines.append(line := measure(m, n, k, torch.bfloat16))
                print(
                    " ".join(
                        f"{v:8.4f}" if isinstance(v, float) else f"{v:5}" for v in line.values()
                    ),
                    flush=True,
                )
    if arguments.json:
        table = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "dtype": "bfloat16",
            "lines": lines,
        }
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
