"""Optimises the models in examples/ at full size and prints reports, errors and times.

Runs on the GPU where torch sees one, else on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tabulate import tabulate

import fxfuse
from fxfuse.cli import load_model
from fxfuse.timing import Row, compare

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
DTYPES = (torch.float32, torch.bfloat16)
ERROR_ROWS = 64
CONTESTANTS = ("eager", "gemm", "fxfuse")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    device = parser.parse_args().device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"fxfuse on {name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    table = []
    for path in EXAMPLES:
        print(f"\n=== {path.name}\n")
        model, inputs = load_model(path, device)
        optimized = fxfuse.optimize(model, inputs)
        print(fxfuse.report(optimized))
        for dtype in DTYPES:
            model.to(dtype)
            optimized.to(dtype)  # one plan serves every dtype
            inputs = tuple(x.to(dtype) for x in inputs)
            rows = compare(model, optimized, inputs, CONTESTANTS, rows=ERROR_ROWS, min_rounds=3)
            few_rows = tuple(x[:ERROR_ROWS] for x in inputs)
            print(f"\n{str(dtype).removeprefix('torch.')}, first {ERROR_ROWS} rows:")
            print(fxfuse.verify(optimized, model, *few_rows), flush=True)
            table.append(_line(path.stem, dtype, {row.name: row for row in rows}))
    headers = ["model", "dtype", "eager ms", "GEMM ms", "fxfuse ms", "speed"]
    headers += ["eager error", "fxfuse error"]
    print("\n=== batch 1024, 8192 -> 8192; errors against float64\n")
    print(tabulate(table, headers, disable_numparse=True))


def _line(model: str, dtype: torch.dtype, rows: dict[str, Row]) -> list[str]:
    """Return one line of the closing table; what could not be measured is a dash."""
    times = [row.timing.median * 1e3 if row.timing else None for row in rows.values()]
    speed = f"{times[0] / times[-1]:.2f}x" if times[0] and times[-1] else "-"
    errors = [rows[name].error for name in ("eager", "fxfuse")]
    return [
        model,
        str(dtype).removeprefix("torch."),
        *("-" if t is None else f"{t:.3f}" for t in times),
        speed,
        *("-" if e is None else f"{e:.2e}" for e in errors),
    ]


if __name__ == "__main__":
    main()
