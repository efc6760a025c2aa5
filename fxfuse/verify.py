"""Compare an optimised model and its original with a float64 run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from .errors import InputError
from .timing import matmul_precision

_PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class ErrorRow:
    """Errors of one output tensor against float64: in norm (`|y - t| / |t|`) and at the worst
    element (`max |y - t|`). precision: the setting of torch.set_float32_matmul_precision, where
    several were asked for."""

    output: int
    shape: tuple[int, ...]
    dtype: str
    fused: float
    eager: float
    fused_max: float
    eager_max: float
    precision: str = ""


@dataclass(frozen=True)
class Verification:
    """The rows, one for each floating output tensor; prints as a table."""

    rows: tuple[ErrorRow, ...]

    @property
    def ok(self) -> bool:
        """Whether no fused error exceeds eager's by more than 5% and 2^-24 of the norm."""
        return all(r.fused <= 1.05 * r.eager + 2**-24 for r in self.rows)

    def table(self) -> str:
        """The rows as text."""
        body: list[tuple[Any, ...]] = [
            (
                r.output,
                "x".join(map(str, r.shape)),
                r.dtype,
                r.fused,
                r.eager,
                r.fused_max,
                r.eager_max,
            )
            for r in self.rows
        ]
        head = ["output", "shape", "dtype", "fused", "eager", "fused max", "eager max"]
        if any(r.precision for r in self.rows):
            head.insert(0, "precision")
            body = [(r.precision, *cells) for r, cells in zip(self.rows, body, strict=True)]
        return "Error against float64\n" + tabulate(body, head, floatfmt=".2e")

    def __str__(self) -> str:
        return self.table()


def verify(
    optimized: nn.Module, original: nn.Module, *inputs: Any, precisions: Sequence[str] = ()
) -> Verification:
    """Run both models, and the original in float64, on `inputs`; nothing is changed.

    inputs: what the models take. Modules should be in the same mode; random draws are made equal
    by one seed. precisions: settings of torch.set_float32_matmul_precision to run under, one after
    the other, with rows for each; none for the one that is set. Raises InputError where either
    argument is not a module, where a precision is none of torch's, or where the outputs do not
    correspond.
    """
    for precision in precisions:
        if precision not in _PRECISIONS:
            raise InputError(
                f"verify: precision {precision!r}, expected one of {', '.join(_PRECISIONS)}"
            )
    found: list[ErrorRow] = []
    for precision in precisions:
        with matmul_precision(precision):
            rows = _verify(optimized, original, inputs)
        found += [replace(row, precision=precision) for row in rows]
    return Verification(tuple(found) if precisions else _verify(optimized, original, inputs))


def _verify(
    optimized: nn.Module, original: nn.Module, inputs: Sequence[Any]
) -> tuple[ErrorRow, ...]:
    """The rows under the precision that is set."""
    for name, module in (("optimized", optimized), ("original", original)):
        if not isinstance(module, nn.Module):
            raise InputError(f"verify: {name} is {type(module).__name__}, not an nn.Module")
    with torch.no_grad(), torch.random.fork_rng():
        truth = _tensors(_run(_double(original), tree_map(_as_double, inputs)))
        eager = _tensors(_run(copy.deepcopy(original), inputs))
        fused = _tensors(_run(copy.deepcopy(optimized), inputs))
    if not len(truth) == len(eager) == len(fused):
        raise InputError(
            f"verify: the models return {len(fused)} and {len(eager)} tensors; are they the same?"
        )
    return tuple(_row(i, *three) for i, three in enumerate(zip(fused, eager, truth, strict=True)))


def _run(model: nn.Module, inputs: Sequence[Any]) -> Any:
    torch.manual_seed(0)
    return model(*tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, inputs))


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _as_double(leaf: Any) -> Any:
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.double() if floating else leaf


def _tensors(outputs: Any) -> list[torch.Tensor]:
    leaves, _ = tree_flatten(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _row(index: int, fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> ErrorRow:
    if fused.shape != truth.shape:
        raise InputError(
            f"verify: output {index} has shape {tuple(fused.shape)}, the original's has "
            f"{tuple(truth.shape)}"
        )
    norms = [_error(y, truth) for y in (fused, eager)]
    return ErrorRow(
        index,
        tuple(fused.shape),
        str(fused.dtype).removeprefix("torch."),
        norms[0][0],
        norms[1][0],
        norms[0][1],
        norms[1][1],
    )


def _error(y: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Relative error in norm and largest absolute error; infinite where one is not finite and the
    other not the same."""
    y = y.double()
    same = (y == truth) | (y.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, y - truth)
    difference = torch.where(difference.isfinite(), difference, torch.inf)
    scale = torch.where(truth.isfinite(), truth, 0.0).norm()
    worst = difference.abs().max().item() if difference.numel() else 0.0
    return (difference.norm() / scale.clamp_min(torch.finfo(torch.float64).tiny)).item(), worst
