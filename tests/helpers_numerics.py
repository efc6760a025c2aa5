"""What every test of a fused model checks: shapes, dtypes, and the error contract, of what it
returns and of its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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


def gradients_of(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients of a function's outputs, with `seeds` coming in, for the tensors that want one."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, s.to(o)) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    wanted = [t for t in tensors if t.requires_grad]
    given, incoming = zip(*pairs, strict=True)
    return list(torch.autograd.grad(given, wanted, incoming, allow_unused=True))


def no_worse(
    ours: Any, eagers: Any, truths: Any, what: object = None, roundings: float = 0.5
) -> None:
    """Each gradient is as close to float64's as eager's is, or within half a rounding (or as many
    as are given); one number by itself, in which both have their luck, within two, and float64,
    which is no truth for itself, within sixteen."""
    for number, (a, b, t) in enumerate(zip(ours, eagers, truths, strict=True)):
        if b is None or t is None:
            assert a is None or not a.any(), (what, number)
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (what, number)
        of_ours, of_eager, size = errors(a, b, t)
        allowed = max(roundings, 2.0 if a.numel() == 1 else 0.0)
        if b.dtype == torch.float64:
            allowed = 16.0
        slack = allowed * torch.finfo(b.dtype).eps * size + 1e-30
        assert of_ours <= 1.05 * of_eager + slack, (what, number, of_ours, of_eager, size)


def doubled(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in float64 that want a gradient where the originals do."""
    return [as_double(t.detach()).requires_grad_(t.requires_grad) for t in tensors]
