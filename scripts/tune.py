"""Write the Hopper route's static table of tile costs from measurements.

    python scripts/tune.py --measure benchmarks/h200_tiles.json     on the GPU
    python scripts/tune.py --fit benchmarks/h200_tiles.json         anywhere

Measuring times every tile and every division of K over a grid of shapes: device time of a Linear
with bias and GELU in bf16, and of the product of fp32 matrices already split into two planes each,
from CUDA-graph replays rotated over operands larger than the L2 together. Fitting finds, for each
tile and division, the costs of a stage of K and of a tile's remainder that explain best which is
faster than which, writes them to kernels/cuda/hopper_costs.inc, and says how much slower than the
best measured choice the table's choices are.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_routes import captured, operand_sets, race, write_table

from fxfuse import library
from fxfuse.library import (
    TILE_IN_TURNS,
    TILE_OF_64_ROWS,
    TILE_SHARES_A,
    TILE_SHARES_B,
    Gemm,
    Pointers,
)
from fxfuse.program import parse
from fxfuse.split import Planes, plane_stride, split

# By planes of a matrix.
TILES = {1: (256, 128, 64, TILE_IN_TURNS + 128, TILE_OF_64_ROWS + 64), 2: (128, 64)}
SHARING = {1: (0, TILE_SHARES_A, TILE_SHARES_B), 2: (0,)}
SPLITS = (1, 2, 4, 8)
ROWS = (1, 16, 32, 64, 96, 128, 200, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
WEIGHTS = (
    (512, 512),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (4096, 4096),
    (512, 16384),
    (2048, 2048),
    (3072, 768),
    (768, 3072),
    (8192, 8192),
    (11008, 4096),
    (4096, 11008),
    (16384, 4096),
    # Rows that begin inside a cache line.
    (1000, 1000),
    (3080, 776),
    (4104, 2056),
    (1032, 8200),
    (5000, 3000),
)
LARGEST = 2**37  # products, by their multiply-adds: of larger ones the table knows enough
STEPS = 2000  # of the fit
Key = tuple[int, int, int, int]  # whether rows begin at cache lines, planes, tile, split
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
        matrices = [
            [(0, x.data_ptr()), (1, w.data_ptr())] for x, w in zip(xs, weights, strict=True)
        ]
    else:
        stride = plane_stride(k)
        inputs, gemm = torch.float16, Gemm(k, stride, stride, dtype, planes=planes)
        made = [split(x, w, planes=planes) for x, w in zip(xs, weights, strict=True)]
        matrices = [[address for i in (0, 1) for address in addresses(i, p[i])] for p in made]
    rivals = {}
    for tile, shares, blocks in itertools.product(TILES[planes], SHARING[planes], SPLITS):
        if tile & TILE_OF_64_ROWS and m <= 64:
            continue  # never chosen
        problem = lib.problem(program, m, n, inputs, 0, [], [dtype], gemm)
        problem.route, problem.tile = library.ROUTES["hopper"], 16 * (tile + shares) + blocks
        described = ctypes.byref(problem)
        if lib.handle.fxfuse_cuda_choose(described, None, None):
            continue

        def call(i: int, described: Any = described) -> None:
            pointers = Pointers()
            for place, address in matrices[i]:
                pointers[place] = address
            pointers[2], pointers[library.POINTER_OUTPUT] = bias.data_ptr(), out.data_ptr()
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            status = lib.handle.fxfuse_cuda_run(described, pointers, stream)
            lib.check(status, "fxfuse_cuda_run")

        rivals[tile + shares, blocks] = captured([lambda i=i, c=call: c(i) for i in range(len(xs))])
    product = {"m": m, "n": n, "k": k, "planes": planes}
    for (tile, blocks), ms in race(rivals).items():
        yield product | {"tile": tile, "split": blocks, "ms": ms}


def addresses(i: int, planes: Planes) -> list[tuple[int, int]]:
    """Where the addresses of factor `i` go among a call's, and what they are."""
    return [
        (i, planes.plane.data_ptr()),
        (library.POINTER_ROOTS + i, planes.root.data_ptr()),
        (library.POINTER_SPECIAL + i, planes.special.data_ptr()),
    ]


def features(line: dict[str, Any], processors: int) -> tuple[float, ...]:
    """What a line pays for, as Cost in hopper_launch.cc has it: a stage and a tile, for each of a
    block's turns, for the average block's and for the rows of x in it; of tiles in turns the first
    pays for a tile once."""
    rows = tile_rows = 64 if line["tile"] & TILE_OF_64_ROWS else 128
    columns = line["tile"] % TILE_IN_TURNS
    cluster = line["split"]
    if line["tile"] & (TILE_SHARES_A | TILE_SHARES_B):
        cluster *= 2
        rows, columns = (rows, 2 * columns) if line["tile"] & TILE_SHARES_A else (2 * rows, columns)
    tiles = math.ceil(line["m"] / rows) * math.ceil(line["n"] / columns)
    average = tiles / (processors // cluster)
    turns = math.ceil(average)
    stages = math.ceil(math.ceil(line["k"] / 64) / line["split"])
    once = 1 if line["tile"] & TILE_IN_TURNS else turns
    filled = min(1.0, line["m"] / tile_rows)
    loads = turns, average, turns * filled
    return *(stages * load for load in loads), once, *loads[1:]


def shape(line: dict[str, Any]) -> tuple[int, int, int]:
    return line["m"], line["n"], line["k"]


def key(line: dict[str, Any]) -> Key:
    """What has a row in the table, which does not tell rows of two planes by where they begin."""
    whole_lines = line["planes"] == 2 or line["k"] % 64 == 0
    return int(whole_lines), line["planes"], line["tile"], line["split"]


def fit(lines: Sequence[dict[str, Any]], processors: int) -> dict[Key, list[float]]:
    """Nanoseconds of each feature, for every row of the table.

    Of the logarithms of times the least squares, but for what all lines of a shape have in common:
    what the memory or the clock takes from all of them alike says nothing of which is the fastest.
    A fiftieth of the weight is on the logarithms as they are, so that prices stay nanoseconds. By
    gradient descent on the logarithms of prices, of which none is below 0 so.
    """
    keys = sorted({key(line) for line in lines}, key=lambda p: (p[1], -p[0], -p[2], p[3]))
    shapes = sorted({shape(line) for line in lines})
    row = torch.tensor([keys.index(key(line)) for line in lines])
    group = torch.tensor([shapes.index(shape(line)) for line in lines])
    counts = torch.tensor([features(line, processors) for line in lines], dtype=torch.float64)
    times = torch.tensor([line["ms"] * 1e6 for line in lines], dtype=torch.float64)
    size = torch.zeros(len(shapes), dtype=torch.float64).index_add(0, group, torch.ones_like(times))
    start = torch.tensor([200.0, 50.0, 20.0, 3000.0, 500.0, 200.0], dtype=torch.float64)
    prices = start.log().repeat(len(keys), 1).requires_grad_()
    rate = 0.05
    optimizer = torch.optim.Adam([prices], lr=rate)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        error = ((counts * prices.exp()[row]).sum(1) / times).log()
        common = torch.zeros_like(size).index_add(0, group, error) / size
        loss = (error - common[group]).square().mean() + 0.02 * error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(zip(keys, prices.detach().exp().tolist(), strict=True))


def report(
    lines: list[dict[str, Any]],
    costs: dict[Key, list[float]],
    processors: int,
) -> str:
    """How the table's choices compare with the best of the measured ones."""
    ratios = []
    for place in sorted({shape(line) for line in lines}):
        here = [line for line in lines if shape(line) == place]

        def cost(line: dict[str, Any]) -> float:
            prices = costs[key(line)]
            parts = zip(features(line, processors), prices, strict=True)
            return sum(count * price for count, price in parts)

        chosen, best = min(here, key=cost), min(here, key=lambda line: line["ms"])
        ratios.append((chosen["ms"] / best["ms"], place, chosen, best))
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
        small = [case for case in cases if math.prod(case[:3]) <= LARGEST]
        lines = [line for case in small for line in measure(*case)]
        write_table(arguments.measure, lines=lines)
    source = arguments.fit or arguments.measure
    if source is None:
        parser.error("--measure or --fit")
    table = json.loads(source.read_text())
    lines, processors = table["lines"], table["multiprocessors"]
    costs = {}
    for planes in TILES:
        here = [line for line in lines if line["planes"] == planes]
        costs |= (fitted := fit(here, processors))
        print(f"planes {planes}:", report(here, fitted, processors))
    text = "// Written by scripts/tune.py.\n"
    for place, prices in costs.items():
        text += f"{{{', '.join([*map(str, place), *(f'{price:.0f}' for price in prices)])}}},\n"
    if arguments.fit:
        COSTS.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
