"""What every test of a fused model checks: shapes, dtypes, and the error contract."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

import fxfuse


def as_double(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def copies(value: Any) -> Any:
    """Fresh tensors, so that a model that writes in place does not change the test's."""
    return tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)


def run(model: nn.Module, inputs: Sequence[Any], seed: int = 0) -> list[Any]:
    """The outputs of one call, with the same random numbers each time."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return tree_flatten(model(*copies(tuple(inputs))))[0]


def errors(
    fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor
) -> tuple[float, float, float]:
    """Norms of both errors and of the truth, over elements that are finite in all three."""
    finite = fused.isfinite() & eager.isfinite() & truth.isfinite()
    f, e, t = (v.double()[finite] for v in (fused, eager, truth))
    return (f - t).norm().item(), (e - t).norm().item(), t.norm().item()


def check(
    model: nn.Module,
    *inputs: Any,
    chains: Sequence[str] | None = None,
    same_specials: bool = False,
) -> fxfuse.Report:
    """Optimise `model` and hold it to eager. chains: those of its groups, spelled `add -> relu`.

    same_specials: NaN and infinities must be eager's, element by element.
    """
    eager = run(model, inputs)
    truth = run(copy.deepcopy(model).double(), tree_map(as_double, tuple(inputs)))
    optimized = fxfuse.optimize(model)
    fused = run(optimized, inputs)
    assert len(fused) == len(eager)
    for f, e, t in zip(fused, eager, truth, strict=True):
        if not isinstance(e, torch.Tensor):
            assert f == e
            continue
        assert (f.shape, f.dtype) == (e.shape, e.dtype)
        if not e.is_floating_point():
            assert torch.equal(f, e)
            continue
        if same_specials:
            same_pattern(f, e, t)
        of_fused, of_eager, size = errors(f, e, t)
        slack = 0.5 * torch.finfo(e.dtype).eps * size
        assert of_fused <= 1.05 * of_eager + slack, (of_fused, of_eager, size)
    report = fxfuse.report(optimized)
    if chains is not None:
        assert [" -> ".join(g.chain) for g in report.groups] == list(chains)
    return report


def pattern(values: torch.Tensor) -> torch.Tensor:
    """2 for NaN, 1 and -1 for infinities, 0 for all else."""
    return torch.where(values.isnan(), 2, values.isinf() * values.nan_to_num().sign())


def same_pattern(fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Assert NaN and infinities where eager has them, or where the same ops in float64 do.

    Eager's vectorised kernels have slips of their own, such as gelu(inf) = NaN on some CPUs.
    """
    same = pattern(fused) == pattern(eager)
    same |= pattern(fused) == pattern(truth.to(eager.dtype))
    assert same.all(), (fused[~same], eager[~same])
