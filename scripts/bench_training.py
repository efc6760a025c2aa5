"""Measures training: forward and backward of the example models, their gradients and their memory.

    python scripts/bench_training.py --models add_relu --dtypes float32 --shape 1024,1024,4096
    python scripts/bench_training.py --suite cpu --json benchmarks/training_cpu.json
    python scripts/bench_training.py --suite gpu --json benchmarks/training_h200.json

A step is `model(x).sum().backward()` with gradients of the input and of every parameter; with
--accumulate those of the parameters are added to what is there, as between two optimizer steps.
Errors are relative Frobenius norms against float64, for a random gradient that comes in. Memory is
what a step takes at its peak beyond model, input and such gradients (on CUDA), and what autograd
keeps between forward and backward. The JSON is written after every case.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import FLOAT32, MODELS, ROOT, Case, check_names, environment, listed, shape
from tabulate import tabulate
from torch import nn

import fxfuse
from fxfuse.cli import DTYPES, load_file
from fxfuse.timing import matmul_precision, measure

CONTESTANTS = ("eager", "compile", "fxfuse")
SUITES = {
    "cpu": ((1024, 1024, 4096), ("float32", "bfloat16")),
    "gpu": ((1024, 8192, 8192), ("float32", "high", "bfloat16")),
}
Model = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    arguments = _parse()
    results: dict[str, Any] = {
        "schema": 1,
        "environment": environment(arguments.device),
        "training": [],
    }
    for dtype in arguments.dtypes:
        for model in arguments.models:
            case = Case(model, arguments.shape, dtype)
            results["training"].append(run_case(case, arguments))
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def run_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one case, print its table and return its JSON entry."""
    batch, in_features, out_features = case.shape
    module = load_file(ROOT / "examples" / f"{case.model}.py")
    precision, _ = FLOAT32.get(case.dtype, ("highest", False))
    dtype = torch.float32 if case.dtype in FLOAT32 else DTYPES[case.dtype]
    torch.manual_seed(0)
    init_inputs = module.get_init_inputs(in_features, out_features)
    with torch.device(arguments.device):
        model = module.Model(*init_inputs).to(dtype)
        (x,) = (x.to(dtype).requires_grad_() for x in module.get_inputs(batch, in_features))
        seed = torch.randn(batch, out_features).to(dtype)
    torch._dynamo.reset()
    contestants: dict[str, Model] = {
        "eager": model,
        "compile": torch.compile(model),
        "fxfuse": fxfuse.optimize(model),
    }
    with matmul_precision(precision):
        truth = gradients(copy.deepcopy(model).double(), x.detach().double(), seed.double())
        rows, steps = {}, {}
        for name in arguments.contestants:
            rows[name] = entry = {"name": name}
            try:
                found = _named_gradients(contestants[name], model, x, seed)
            except Exception as error:
                entry["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                continue
            entry["gradient_errors"] = {
                n: ((found[n].double() - t).norm() / t.norm()).item() for n, t in truth.items()
            }
            entry["kept_mb"] = kept_bytes(contestants[name], model, x) / 1e6
            steps[name] = step_of(contestants[name], model, arguments.accumulate)
        del truth
        for name, timing in measure(steps, [(x,)], seconds=arguments.seconds).items():
            rows[name] |= {
                "median_ms": timing.median * 1e3,
                "p10_ms": timing.p10 * 1e3,
                "p90_ms": timing.p90 * 1e3,
                "runs": timing.runs,
            }
        if arguments.device == "cuda":
            for name, step in steps.items():
                rows[name]["peak_mb"] = peak_bytes(step, model, x, arguments.accumulate) / 1e6
    added = ", gradients accumulate" if arguments.accumulate else ""
    print(f"\n{case.model}, {batch} x {in_features} -> {out_features}, {case.dtype}{added}")
    print(_table(list(rows.values())), flush=True)
    return {
        "model": case.model,
        "batch": batch,
        "in_features": in_features,
        "out_features": out_features,
        "dtype": case.dtype,
        "accumulate": arguments.accumulate,
        "contestants": list(rows.values()),
    }


def step_of(
    call: Model, model: nn.Module, accumulate: bool = False
) -> Callable[[torch.Tensor], None]:
    """Return forward and backward of one step. Gradients of the step before are let go first; where
    they `accumulate`, that of x alone."""

    def step(x: torch.Tensor) -> None:
        _clear(model, x, accumulate)
        call(x).sum().backward()

    return step


def gradients(model: nn.Module, x: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a model's input and parameters, where `seed` comes in."""
    return _named_gradients(model, model, x.requires_grad_(), seed)


def kept_bytes(call: Model, model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes autograd keeps for the backward, beyond the model, its input and output."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(x)
    for tensor in (x, out, *model.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(
    step: Callable[[torch.Tensor], None],
    model: nn.Module,
    x: torch.Tensor,
    accumulate: bool = False,
) -> int:
    """Return the most bytes a step has allocated on the GPU at once, beyond model and input and,
    where they `accumulate`, the parameters' gradients."""
    if accumulate:
        step(x)
    _clear(model, x, accumulate)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _named_gradients(
    call: Model, model: nn.Module, x: torch.Tensor, seed: torch.Tensor
) -> dict[str, torch.Tensor]:
    _clear(model, x)
    call(x).backward(seed)
    named = {"input": x, **dict(model.named_parameters())}
    found = {n: t.grad.clone() for n, t in named.items() if t.grad is not None}
    _clear(model, x)
    return found


def _clear(model: nn.Module, x: torch.Tensor, accumulate: bool = False) -> None:
    if not accumulate:
        model.zero_grad(set_to_none=True)
    x.grad = None


def _table(rows: list[dict[str, Any]]) -> str:
    base = next((r["median_ms"] for r in rows if r["name"] == "eager" and "median_ms" in r), None)
    body = []
    for row in rows:
        errors = row.get("gradient_errors", {})
        body.append(
            [
                row["name"],
                row.get("median_ms"),
                base / row["median_ms"] if base and "median_ms" in row else None,
                row.get("kept_mb"),
                row.get("peak_mb"),
                ", ".join(f"{n} {e:.1e}" for n, e in errors.items()) or row.get("note"),
            ]
        )
    headers = ("", "ms", "against eager", "kept MB", "peak MB", "gradient errors")
    return tabulate(body, headers, floatfmt=".2f", missingval="-")


def _parse() -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--suite", choices=tuple(SUITES), help="a preset shape and dtypes")
    parser.add_argument("--models", type=listed, default=list(MODELS))
    parser.add_argument("--dtypes", type=listed, help="float32, bfloat16, float16, high")
    parser.add_argument("--shape", type=shape, metavar="M,K,N")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--contestants", type=listed, default=list(CONTESTANTS))
    parser.add_argument(
        "--accumulate", action="store_true", help="add to the parameters' gradients"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="spent on each contestant")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    arguments = parser.parse_args()
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.suite:
        arguments.device = "cuda" if arguments.suite == "gpu" else "cpu"
    usual_shape, usual_dtypes = SUITES["gpu" if arguments.device == "cuda" else "cpu"]
    arguments.shape = arguments.shape or usual_shape
    arguments.dtypes = arguments.dtypes or list(usual_dtypes)
    for given, known in (
        (arguments.models, MODELS),
        (arguments.dtypes, ("high", *DTYPES)),
        (arguments.contestants, CONTESTANTS),
    ):
        check_names(parser, given, known)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench_training: torch {torch.__version__} sees no CUDA device")
    return arguments


if __name__ == "__main__":
    main()
