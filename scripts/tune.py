"""Write the Hopper route's static table of tile costs from measurements.

    python scripts/tune.py --measure benchmarks/h200_tiles.json     on the GPU
    python scripts/tune.py --fit benchmarks/h200_tiles.json         anywhere

Measuring times every tile and every division of K over a grid of shapes: device time of a Linear
with bias and GELU in bf16, and of the product of fp32 matrices already split into two planes each,
from CUDA-graph replays rotated over operands larger than the L2 together. Fitting finds, for each
tile and division, the cost of a stage of K and of a tile's remainder that explain the times best,
writes them to kernels/cuda/hopper_costs.inc, and says how much slower than the best measured choice
the table's choices are.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_routes import device_ms, operand_sets, write_table

from fxfuse import library
from fxfuse.library import TILE_IN_TURNS, TILE_OF_64_ROWS, Gemm, Pointers
from fxfuse.program import parse
from fxfuse.split import Planes, plane_stride, split

# By planes of a matrix.
TILES = {1: (256, 128, 64, TILE_IN_TURNS + 128, TILE_OF_64_ROWS + 64), 2: (128, 64)}
SPLITS = (1, 2, 4, 8)
ROWS = (1, 16, 64, 128, 200, 256, 512, 1024, 2048, 4096)
WEIGHTS = (
    (512, 512),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (4096, 4096),
    (512, 16384),
    (3072, 768),
    (8192, 8192),
    (11008, 4096),
)
# What a division must save to be chosen: the fit is no better than this, and whole tiles disturb
# their neighbours less.
MARGIN = 1.1
COSTS = Path(__file__).parent.parent / "kernels" / "cuda" / "hopper_costs.inc"


def measure(m: int, n: int, k: int, planes: int) -> Iterator[dict[str, Any]]:
    """One line for each tile and division that serves the shape."""
    lib = library.find("fxfuse_cuda")
    if isinstance(lib, library.LibraryError):
        raise lib
    dtype = torch.bfloat16 if planes == 1 else torch.float32
    xs, weights = operand_sets(m, n, k, dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    out = torch.empty(m, n, device="cuda", dtype=dtype)
    program = parse("t1 = gelu acc; store t1")
    if planes == 1:
        inputs, gemm = dtype, Gemm(k, k, k, dtype)
        pairs = [[(0, x.data_ptr()), (1, w.data_ptr())] for x, w in zip(xs, weights, strict=True)]
    else:
        stride = plane_stride(k)
        inputs, gemm = torch.float16, Gemm(k, stride, stride, dtype, planes=planes)
        made = [split(x, w, planes=planes) for x, w in zip(xs, weights, strict=True)]
        pairs = [[address for i in (0, 1) for address in addresses(i, p[i])] for p in made]
    for tile in TILES[planes]:
        if tile & TILE_OF_64_ROWS and m <= 64:
            continue  # never chosen
        for division in SPLITS:
            problem = lib.problem(program, m, n, inputs, 0, [], [dtype], gemm)
            problem.route, problem.tile = library.ROUTES["hopper"], 16 * tile + division
            described = ctypes.byref(problem)
            if lib.handle.fxfuse_cuda_choose(described, None, None):
                continue

            def call(i: int, described: Any = described) -> None:
                pointers = Pointers()
                for place, address in pairs[i]:
                    pointers[place] = address
                pointers[2], pointers[library.POINTER_OUTPUT] = bias.data_ptr(), out.data_ptr()
                stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
                status = lib.handle.fxfuse_cuda_run(described, pointers, stream)
                lib.check(status, "fxfuse_cuda_run")

            ms = device_ms([lambda i=i: call(i) for i in range(len(xs))])
            shape = {"m": m, "n": n, "k": k, "planes": planes}
            yield shape | {"tile": tile, "split": division, "ms": ms}


def addresses(i: int, planes: Planes) -> list[tuple[int, int]]:
    """Where the addresses of factor `i` go among a call's, and what they are."""
    return [
        (i, planes.plane.data_ptr()),
        (library.POINTER_ROOTS + i, planes.root.data_ptr()),
        (library.POINTER_SPECIAL + i, planes.special.data_ptr()),
    ]


def features(line: dict[str, Any], processors: int) -> tuple[int, int]:
    """How often a line pays for a stage, and for a tile: in turns, for the last one alone."""
    tile_rows = 64 if line["tile"] & TILE_OF_64_ROWS else 128
    tile_columns = line["tile"] % TILE_IN_TURNS
    tiles = math.ceil(line["m"] / tile_rows) * math.ceil(line["n"] / tile_columns)
    turns = math.ceil(tiles / (processors // line["split"]))
    stages = math.ceil(math.ceil(line["k"] / 64) / line["split"])
    return turns * stages, 1 if line["tile"] & TILE_IN_TURNS else turns


def key(line: dict[str, Any]) -> tuple[int, int, int]:
    """What has a row in the table."""
    return line["planes"], line["tile"], line["split"]


def fit(lines: list[dict[str, Any]], processors: int) -> tuple[float, float]:
    """Nanoseconds of a stage and of a tile: the least squares of relative errors, and MARGIN."""
    rows = torch.tensor([features(line, processors) for line in lines], dtype=torch.float64)
    times = torch.tensor([line["ms"] * 1e6 for line in lines], dtype=torch.float64)
    solution = torch.linalg.lstsq(rows / times[:, None], torch.ones_like(times))
    margin = MARGIN if lines[0]["split"] > 1 else 1.0
    stage, once = (margin * solution.solution).tolist()
    return stage, once


def report(
    lines: list[dict[str, Any]],
    costs: dict[tuple[int, ...], tuple[float, float]],
    processors: int,
) -> str:
    """How the table's choices compare with the best of the measured ones."""
    ratios = []
    for shape in sorted({(line["m"], line["n"], line["k"]) for line in lines}):
        here = [line for line in lines if (line["m"], line["n"], line["k"]) == shape]

        def cost(line: dict[str, Any]) -> float:
            prices = costs[key(line)]
            parts = zip(features(line, processors), prices, strict=True)
            return sum(count * price for count, price in parts)

        chosen, best = min(here, key=cost), min(here, key=lambda line: line["ms"])
        ratios.append((chosen["ms"] / best["ms"], shape, chosen, best))
    mean = math.exp(sum(math.log(r[0]) for r in ratios) / len(ratios))
    worst = max(ratios, key=lambda r: r[0])
    return (
        f"chosen over best: geometric mean {mean:.3f}, worst {worst[0]:.3f} at {worst[1]} "
        f"({worst[2]['tile']}/{worst[2]['split']} for {worst[3]['tile']}/{worst[3]['split']})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, help="measure here, and write the times to a file")
    parser.add_argument("--fit", type=Path, help="write the table from such a file")
    arguments = parser.parse_args()
    if arguments.measure:
        torch.manual_seed(0)
        cases = [(m, n, k, planes) for planes in TILES for n, k in WEIGHTS for m in ROWS]
        lines = [line for case in cases for line in measure(*case)]
        write_table(arguments.measure, lines=lines)
    source = arguments.fit or arguments.measure
    if source is None:
        parser.error("--measure or --fit")
    table = json.loads(source.read_text())
    lines, processors = table["lines"], table["multiprocessors"]
    costs = {
        place: fit([line for line in lines if key(line) == place], processors)
        for place in sorted({key(line) for line in lines}, key=lambda p: (p[0], -p[1], p[2]))
    }
    for planes in TILES:
        here = [line for line in lines if line["planes"] == planes]
        print(f"planes {planes}:", report(here, costs, processors))
    text = "// Written by scripts/tune.py.\n"
    for place, (stage, once) in costs.items():
        text += f"{{{', '.join(map(str, place))}, {stage:.0f}, {once:.0f}}},\n"
    if arguments.fit:
        COSTS.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
