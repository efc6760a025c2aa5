"""Time every route of a fused call, and the one the library takes, over a grid of shapes.

Writes the JSON that `fxfuse.preferences.preferred_route` is made from, and prints how cuBLAS's bare
GEMM compares with bias and GELU fused. Device time: calls are captured in a CUDA graph, rotated
over operands larger than the L2 together, and replayed, all of a shape in turns; the median of 12
replays is kept. Outputs of every route are compared with float64 on the first 64 rows.

    python scripts/bench_routes.py [--json benchmarks/h200_routes.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from fxfuse.errors import KernelError
from fxfuse.fused import forced_route, fused_linear

ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
WEIGHTS = (
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (4096, 4096),
    (8192, 8192),
    (512, 16384),
    (16384, 4096),
    (3080, 776),
)
RAGGED = ((1000, 1000, 1000), (333, 4104, 2056), (77, 5000, 3000), (2049, 1032, 8200))
ROUTES = ("cublas", "portable", "hopper")
PROGRAMS = {
    "gelu": "t1 = gelu acc; store t1",
    "silu": "t1 = silu acc; store t1",
    "add -> relu": "t1 = add acc, $0; t2 = relu t1; store t2",
}


Name = TypeVar("Name", bound=Hashable)


def truth(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, program: str) -> torch.Tensor:
    """The program's result in float64, by the reference."""
    operands = [t.double() for t in (x[:64], weight, bias)]
    return fused_linear(*operands, [operands[2]] if "$0" in program else [], program)


class Captured(NamedTuple):
    """Calls in a row, as a graph."""

    graph: torch.cuda.CUDAGraph
    calls: int


def captured(calls: Sequence[Callable[[], object]]) -> Captured:
    """A graph of `calls`, which are also made once."""
    torch.cuda.synchronize()  # no stream waits for what made their operands
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    return Captured(graph, len(calls))


def race(rivals: Mapping[Name, Captured]) -> dict[Name, float]:
    """Median milliseconds of a call of each.

    They take turns, in an order that is turned round each time: a GPU that gets hot is slower.
    """
    samples: dict[Name, list[float]] = {name: [] for name in rivals}
    for turn in range(12):
        for name in list(rivals)[:: 1 if turn % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            rivals[name].graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) / rivals[name].calls)
    return {name: statistics.median(times) for name, times in samples.items()}


def device_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of one of `calls`, run one after the other from a graph."""
    return race({"calls": captured(calls)})["calls"]


def operand_sets(
    m: int, n: int, k: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs [m, k] and weights [n, k], in as many copies as fill more than the L2."""
    sets = max(3, int(2e8 / ((m * k + n * k + m * n) * 2)) + 1)
    sets = min(sets, 24)
    x = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(sets)]
    weight = [(torch.randn(n, k, device="cuda") / k**0.5).to(dtype) for _ in range(sets)]
    return x, weight


def measure(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, object]:
    """One line of the table: the bare GEMM, and each route for each program."""
    x, weight = operand_sets(m, n, k, dtype)
    sets = len(x)
    bias = torch.randn(n, device="cuda").to(dtype)
    plain = [lambda i=i: F.linear(x[i], weight[i], bias) for i in range(sets)]
    rivals = {"gemm_ms": captured(plain)}
    for name, program in PROGRAMS.items():
        expected = truth(x[0], weight[0], bias, program)
        operands = [bias] if "$0" in program else []

        def call(i: int, p: str = program, o: list[torch.Tensor] = operands) -> torch.Tensor:
            return fused_linear(x[i], weight[i], bias, o, p)

        for route in (*ROUTES, "auto"):
            with nullcontext() if route == "auto" else forced_route(route):
                try:
                    found = call(0)[:64]
                except KernelError:  # the route has no kernel for the shape
                    continue
                error = ((found.double() - expected).norm() / expected.norm()).item()
                assert error < 1e-2, f"{route} {m}x{k}->{n}: error {error}"
                calls = [lambda i=i, c=call: c(i) for i in range(sets)]
                rivals[f"{name}: {route}_ms"] = captured(calls)
    return {"m": m, "n": n, "k": k, **race(rivals)}


def compared(lines: Sequence[dict[str, Any]], peer: str, ours: str) -> str:
    """The column `peer` over the column `ours`, over all lines that have both."""
    both = [line for line in lines if peer in line and ours in line]
    ratios = [line[peer] / line[ours] for line in both]
    worst = min(range(len(both)), key=ratios.__getitem__)
    shape = "m={m} k={k} n={n}".format(**both[worst])
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{len(both)} shapes: geometric mean {mean:.3f}, worst {ratios[worst]:.3f} ({shape})"


def write_table(path: Path, **parts: Any) -> None:
    """Write `parts` as JSON, with where they were measured."""
    properties = torch.cuda.get_device_properties(0)
    table = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(table | parts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = []
    with torch.no_grad():
        for m, n, k in [(m, n, k) for m in ROWS for n, k in WEIGHTS] + list(RAGGED):
            lines.append(line := measure(m, n, k, torch.bfloat16))
            cells = (f"{v:8.4f}" if isinstance(v, float) else f"{v:5}" for v in line.values())
            print(" ".join(cells), flush=True)
    print("bare cuBLAS GEMM over fused bias -> gelu,", compared(lines, "gemm_ms", "gelu: auto_ms"))
    for program in PROGRAMS:
        names = f"{program}: cublas_ms", f"{program}: auto_ms"
        print(f"cuBLAS and a pointwise kernel over fused {program},", compared(lines, *names))
    if arguments.json:
        write_table(arguments.json, dtype="bfloat16", lines=lines)


if __name__ == "__main__":
    main()
