"""The command line: `fxfuse report FILE.py` and `fxfuse bench FILE.py`.

FILE.py defines `Model` (a torch.nn.Module), `get_inputs()` (the arguments of one call) and
`get_init_inputs()` (the arguments of `Model`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils._pytree import tree_map

import fxfuse

from .errors import FileError, FxfuseError, InputError
from .timing import CONTESTANTS, Row, compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CONVENTION = "a model file defines Model, get_inputs() and get_init_inputs()"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after an error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except FxfuseError as error:
        print(f"fxfuse: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def load_model(
    path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the model of a file, in eval mode, and the inputs of one call.

    Both are moved to `device` and their floating tensors to `dtype`. Initial values are the same
    in every run. Raises FileError where the file is missing, does not run, or does not follow the
    convention.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise FileError(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    module = load_file(path)
    torch.manual_seed(0)
    init_inputs = _arguments(module, path, "get_init_inputs")
    try:
        model = module.Model(*init_inputs)
    except Exception as error:
        raise FileError(f"{path}: Model(*get_init_inputs()) raised {_describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise FileError(f"{path}: Model is a {type(model).__name__}, not a torch.nn.Module")
    inputs = _arguments(module, path, "get_inputs")

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

    return model.to(device, dtype).eval(), tree_map(move, inputs)


def _report(arguments: argparse.Namespace) -> None:
    model, inputs = load_model(arguments.file, arguments.device, DTYPES[arguments.dtype])
    _check_runs(arguments.file, model, inputs)
    optimized = fxfuse.optimize(model, inputs, strict=arguments.strict)
    report = fxfuse.report(optimized)
    print(report.to_json() if arguments.json else report)


def _bench(arguments: argparse.Namespace) -> None:
    names = arguments.contestants.split(",")
    for name in names:
        if name not in CONTESTANTS:
            known = ", ".join(CONTESTANTS)
            raise InputError(f"--contestants: {name!r} is none of {known}")
    model, inputs = load_model(arguments.file, arguments.device, DTYPES[arguments.dtype])
    _check_runs(arguments.file, model, inputs)
    optimized = fxfuse.optimize(model, inputs, strict=arguments.strict)
    rows = compare(model, optimized, inputs, names)
    if arguments.json:
        print(json.dumps({"unit": "seconds", "contestants": [asdict(row) for row in rows]}))
    else:
        print(bench_table(rows))


def bench_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table: milliseconds, speed against eager, error against float64."""
    eager = next((row.timing for row in rows if row.name == "eager"), None)
    body = []
    for row in rows:
        if row.timing is None:
            body.append([row.name, "-", "-", "-", "-", row.note])
            continue
        spread = f"{row.timing.p10 * 1e3:.3f} to {row.timing.p90 * 1e3:.3f}"
        speed = f"{eager.median / row.timing.median:.2f}x" if eager else "-"
        error = "-" if row.error is None else f"{row.error:.2e}"
        body.append([row.name, f"{row.timing.median * 1e3:.3f}", spread, speed, error, row.note])
    headers = ["", "ms", "p10 to p90", "against eager", "error", ""]
    return tabulate(body, headers, disable_numparse=True, colalign=["left"] + ["right"] * 4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxfuse", description=_CONVENTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("report", _report, "show what is fused in a model, what is not, and why"),
        ("bench", _bench, "time a model: eager, torch.compile, its bare GEMMs, fxfuse"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text}; {_CONVENTION}")
        command.add_argument("file", type=Path, metavar="FILE.py")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
        command.add_argument("--strict", action="store_true", help="fail on a Linear not fused")
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(run=run)
    command.add_argument("--contestants", default="eager,compile,gemm,fxfuse", metavar="A,B,...")
    return parser


def load_file(path: Path) -> ModuleType:
    """Run a model file and return its module. Raises FileError naming all that is missing."""
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"fxfuse_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle in the file look the module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as `python FILE.py` would, so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FileError(f"{path}: running it raised {_describe(error)}") from error
    finally:
        sys.path.remove(folder)
    names = {"Model": "Model", "get_inputs": "get_inputs()", "get_init_inputs": "get_init_inputs()"}
    missing = [text for name, text in names.items() if not callable(getattr(module, name, None))]
    if missing:
        raise FileError(f"{path}: does not define {' and '.join(missing)}; {_CONVENTION}")
    return module


def _arguments(module: ModuleType, path: Path, name: str) -> tuple[Any, ...]:
    """Return what the file's function `name` gives, as a tuple of positional arguments."""
    try:
        values = getattr(module, name)()
    except Exception as error:
        raise FileError(f"{path}: {name}() raised {_describe(error)}") from error
    if isinstance(values, torch.Tensor):
        return (values,)
    if not isinstance(values, (list, tuple)):
        raise FileError(f"{path}: {name}() returned a {type(values).__name__}, not a list")
    return tuple(values)


def _check_runs(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        raise FileError(f"{path}: Model on get_inputs() raised {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
