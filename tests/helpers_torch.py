"""What older versions of torch do otherwise than the one of the development set-up."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def since(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Skips a test where torch is older; `what` says what is missing."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"torch {torch.__version__}: {what}")


def skip_where_torch_differs(op: str) -> None:
    """Skips a comparison with torch at special values of an op that newer versions compute right:
    there the kernels do as those do."""
    if op in _DIFFERENT and _DIFFERENT[op]():
        pytest.skip(f"torch {torch.__version__} has another {op} at special values")


@functools.cache
def _elu_loses_small_numbers() -> bool:
    return F.elu(torch.tensor(-1e-30, dtype=torch.float64)).item() == 0


@functools.cache
def _softshrink_loses_nan() -> bool:
    return not F.softshrink(torch.tensor(torch.nan)).isnan().item()


@functools.cache
def _hardswish_has_a_slope_at_its_end() -> bool:
    x = torch.tensor(-3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(F.hardswish(x), x)
    return slope.item() != 0


_DIFFERENT = {
    "elu": _elu_loses_small_numbers,
    "selu": _elu_loses_small_numbers,
    "celu": _elu_loses_small_numbers,
    "softshrink": _softshrink_loses_nan,
    "hardswish": _hardswish_has_a_slope_at_its_end,
}
