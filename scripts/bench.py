"""Measures fxfuse against eager, torch.compile and the bare GEMM: time, and error from float64.

    ./scripts/bench --models add_relu --dtypes float32,bfloat16 --shape 1024,1024,4096
    ./scripts/bench --suite cpu --json benchmarks/cpu.json
    ./scripts/bench --suite gpu --json benchmarks/h200.json

The JSON is written after every case, so what was measured survives an interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.cli import DTYPES, bench_table, load_file
from fxfuse.fused import fused_linear
from fxfuse.timing import CONTESTANTS, Row, compare, host_seconds, matmul_precision, measure

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "add_relu",
    "swish_clamp_tanh",
    "groupnorm_swish_mul_swish",
    "add_swish_tanh_gelu_hardtanh",
)
FULL_SIZE = (1024, 8192, 8192)
RELU = "t1 = relu acc; store t1"
ERROR_ROWS = 128
# float32: torch's matmul precision, and whether fxfuse converts weights once instead of at each
# call, on routes that convert.
FLOAT32 = {
    "float32": ("highest", False),
    "float32-frozen": ("highest", True),
    "high": ("high", False),
    "high-frozen": ("high", True),
}


@dataclass(frozen=True)
class Case:
    """One model at one size (batch, in_features, out_features) in one dtype."""

    model: str
    shape: tuple[int, int, int]
    dtype: str  # a key of DTYPES or FLOAT32


@dataclass
class Results:
    """What goes into the JSON file. Units are in the keys."""

    environment: dict[str, Any]
    models: list[dict[str, Any]] = field(default_factory=list)
    host_overhead: dict[str, Any] | None = None
    optimize: list[dict[str, Any]] = field(default_factory=list)
    portable: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"schema": 1, **vars(self)}, indent=1) + "\n")


def main() -> None:
    arguments = _parse()
    results = Results(environment(arguments.device))
    if arguments.suite:
        _run_extras(arguments, results)
    for case in _cases(arguments):
        results.models.append(run_case(case, arguments))
        results.write(arguments.json)
    results.write(arguments.json)
    if _FAILED:
        sys.exit(f"bench: could not measure: {', '.join(_FAILED)}")


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one case, print its table and return its JSON entry."""
    batch, in_features, out_features = case.shape
    module = load_file(ROOT / "examples" / f"{case.model}.py")
    precision, freeze = FLOAT32.get(case.dtype, ("highest", False))
    dtype = torch.float32 if case.dtype in FLOAT32 else DTYPES[case.dtype]
    torch.manual_seed(0)
    init_inputs = module.get_init_inputs(in_features, out_features)
    with torch.device(arguments.device):  # 8192 x 8192 initial values take a CPU a while
        model = module.Model(*init_inputs).to(dtype).eval()
        inputs = tuple(x.to(dtype) for x in module.get_inputs(batch, in_features))
    optimized = fxfuse.optimize(model, freeze=freeze)
    rows = min(batch, ERROR_ROWS)
    with matmul_precision(precision):
        measured = compare(
            model,
            optimized,
            inputs,
            _contestants(case, arguments),
            rows=rows,
            seconds=arguments.seconds,
        )
    shape = f"{batch} x {in_features} -> {out_features}"
    print(f"\n{case.model}, {shape}, {case.dtype}, error over {rows} rows")
    print(bench_table(measured), flush=True)
    return {
        "model": case.model,
        "batch": batch,
        "in_features": in_features,
        "out_features": out_features,
        "dtype": case.dtype,
        "error_rows": rows,
        "contestants": [_row_entry(row) for row in measured],
    }


def host_overhead() -> dict[str, Any]:
    """Return the host's time for one fused call and for what eager does instead, 16 x 256 -> 256.

    The device finishes each call sooner than the host issues the next, so only the host counts.
    """
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU()).cuda().bfloat16()
    optimized = fxfuse.optimize(model)
    x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    weight, bias = model[0].weight, model[0].bias
    with torch.no_grad():
        seconds = {
            "functions_us": host_seconds(lambda: F.relu(F.linear(x, weight, bias))),
            "fused_call_us": host_seconds(lambda: fused_linear(x, weight, bias, [], RELU)),
            "eager_us": host_seconds(lambda: model(x)),
            "fxfuse_us": host_seconds(lambda: optimized(x)),
        }
    entry = {"batch": 16, "in_features": 256, "out_features": 256, "dtype": "bfloat16"}
    return entry | {name: value * 1e6 for name, value in seconds.items()}


def optimize_seconds(linears: int) -> dict[str, Any]:
    """Return how long `optimize` takes on a model of so many Linears, each followed by a ReLU."""
    layers = [layer for _ in range(linears) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers)
    start = time.perf_counter()
    fxfuse.optimize(model)
    return {"linears": linears, "seconds": time.perf_counter() - start}


def portable_fraction(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Return the portable route's speed on Linear and ReLU as a fraction of cuBLAS's bare GEMM."""
    batch, in_features, out_features = shape
    with torch.device("cuda"):
        model = nn.Sequential(nn.Linear(in_features, out_features), nn.ReLU()).to(dtype)
        inputs = [(torch.randn(batch, in_features, dtype=dtype),) for _ in range(4)]
    optimized = fxfuse.optimize(model)
    weight, bias = model[0].weight, model[0].bias
    with torch.no_grad(), _forced_route("portable"):
        times = measure(
            {"cublas": lambda x: F.linear(x, weight, bias), "portable": optimized}, inputs
        )
    cublas, portable = times["cublas"].median, times["portable"].median
    return {
        "batch": batch,
        "in_features": in_features,
        "out_features": out_features,
        "dtype": str(dtype).removeprefix("torch."),
        "cublas_ms": cublas * 1e3,
        "portable_ms": portable * 1e3,
        "fraction_of_cublas": cublas / portable,
    }


def environment(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: hardware, versions, date, commit."""
    entry: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        entry["gpu"] = properties.name
        entry["multiprocessors"] = properties.multi_processor_count
        entry["cuda"] = torch.version.cuda
    return entry


def _run_extras(arguments: argparse.Namespace, results: Results) -> None:
    """What a suite measures beside the models. A part that fails is said and left out."""
    with _reported("optimize"):
        for linears in (200, 500, 1000, 2000):
            results.optimize.append(entry := optimize_seconds(linears))
            print(f"optimize, {linears} Linears: {entry['seconds']:.2f} s", flush=True)
    if arguments.device == "cuda":
        with _reported("host overhead"):
            results.host_overhead = entry = host_overhead()
            print(
                f"host time: fused call {entry['fused_call_us']:.1f} us, F.linear + F.relu "
                f"{entry['functions_us']:.1f} us; as modules: fxfuse {entry['fxfuse_us']:.1f} us, "
                f"eager {entry['eager_us']:.1f} us"
            )
        with _reported("portable"):
            for shape in ((1024, 8192, 8192), (4096, 4096, 4096), (2048, 1024, 4096)):
                for dtype in (torch.bfloat16, torch.float16):
                    results.portable.append(entry := portable_fraction(shape, dtype))
                    print(
                        f"portable GEMM {shape} {entry['dtype']}: {entry['portable_ms']:.3f} ms, "
                        f"{entry['fraction_of_cublas']:.0%} of cuBLAS",
                        flush=True,
                    )
    results.write(arguments.json)


_FAILED: list[str] = []


@contextlib.contextmanager
def _reported(part: str):
    """Say what failed and go on; `main` ends with an error if anything did."""
    try:
        yield
    except Exception as error:
        _FAILED.append(part)
        print(f"{part}: {type(error).__name__}: {error}", flush=True)


def _forced_route(name: str):
    forced_route = getattr(fxfuse.fused, "forced_route", None)
    if forced_route is None:
        raise RuntimeError("fxfuse.fused.forced_route is missing: a route cannot be chosen")
    return forced_route(name)


def _row_entry(row: Row) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": row.name}
    if row.timing is not None:
        entry |= {
            "median_ms": row.timing.median * 1e3,
            "p10_ms": row.timing.p10 * 1e3,
            "p90_ms": row.timing.p90 * 1e3,
            "runs": row.timing.runs,
        }
    if row.error is not None:
        entry["relative_error"] = row.error
    if row.note:
        entry["note"] = row.note
    return entry


def _cases(arguments: argparse.Namespace) -> list[Case]:
    if arguments.suite == "cpu":
        middle = [
            Case(model, (1024, 1024, 4096), dtype)
            for dtype in ("float32", "bfloat16")
            for model in MODELS
        ]
        return [*middle, Case(MODELS[3], (1, 512, 2048), "float32")]
    return [
        Case(model, arguments.shape, dtype)
        for dtype in arguments.dtypes
        for model in arguments.models
    ]


def _contestants(case: Case, arguments: argparse.Namespace) -> list[str]:
    """All of them, unless some were asked for. On CUDA max-autotune takes a minute a case, so by
    itself it races only where the figures are compared with it."""
    if arguments.contestants:
        return list(arguments.contestants)
    skipped = arguments.device == "cuda" and case.dtype != "bfloat16"
    return [c for c in CONTESTANTS if not (skipped and c == "compile-max")]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return git.stdout.strip() or None


def listed(text: str) -> list[str]:
    """An argument of several names."""
    return text.split(",")


def shape(text: str) -> tuple[int, int, int]:
    """An argument M,K,N."""
    batch, in_features, out_features = map(int, text.split(","))
    return batch, in_features, out_features


def check_names(
    parser: argparse.ArgumentParser, given: Sequence[str], known: Sequence[str]
) -> None:
    """End with a usage error where a name is not known."""
    for name in given:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")


def _parse() -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=("cpu", "gpu"), help="a preset list of measurements")
    parser.add_argument("--models", type=listed, help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--dtypes", type=listed, help=f"bfloat16, float16, {', '.join(FLOAT32)}")
    parser.add_argument("--shape", type=shape, default=FULL_SIZE, metavar="M,K,N")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--contestants", type=listed, help=f"any of {', '.join(CONTESTANTS)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each contestant")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    arguments = parser.parse_args()
    if arguments.suite:
        arguments.device = "cuda" if arguments.suite == "gpu" else "cpu"
    elif arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = ["bfloat16", "float16", *FLOAT32]
    arguments.dtypes = arguments.dtypes or (on_gpu if arguments.suite == "gpu" else ["float32"])
    arguments.models = arguments.models or list(MODELS)
    for given, known in (
        (arguments.models, MODELS),
        (arguments.dtypes, (*FLOAT32, *DTYPES)),
        (arguments.contestants or [], CONTESTANTS),
    ):
        check_names(parser, given, known)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    return arguments


if __name__ == "__main__":
    main()
