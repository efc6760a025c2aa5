"""What ops of the table compute where torch has no one function for it: on tensors, by torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    # An absent bound is an infinity here; torch wants it absent, or an integer tensor would turn
    # into a float one.
    if low == -math.inf and high == math.inf:
        return x
    return torch.clamp(x, None if low == -math.inf else low, None if high == math.inf else high)


def same(x: Any, *_: float) -> Any:
    return x


def like(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if x.shape != target.shape:
        raise RuntimeError(
            f"an in-place op's result of shape {tuple(x.shape)} does not fit its tensor of shape "
            f"{tuple(target.shape)}"
        )
    return x.to(target.dtype)


def cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype)

    return cast


def matched(backward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch's own backward functions, which want their arguments alike."""

    def reference(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.result_type(grad, x)
        grad, x = torch.broadcast_tensors(grad.to(dtype), x.to(dtype))
        return backward(grad.contiguous(), x.contiguous())

    return reference


def silu_grad(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    gate = torch.sigmoid(x)  # silu_backward itself has no derivative
    return grad * gate * (1 + x * (1 - gate))


def gelu_grad(approximate: str) -> Callable[..., torch.Tensor]:
    def backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)

    return matched(backward)


def clamp_grad(grad: torch.Tensor, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.where((x >= low) & (x <= high), grad, 0.0)


def hardtanh_grad(grad: torch.Tensor, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.where((x <= low) | (x >= high), 0.0, grad)


def threshold_grad(grad: torch.Tensor, x: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.where(x <= limit, 0.0, grad)


def group_norm(x: torch.Tensor, weight: Any, bias: Any, groups: float, eps: float) -> torch.Tensor:
    weight, bias = (t if isinstance(t, torch.Tensor) else None for t in (weight, bias))
    return F.group_norm(x, int(groups), weight, bias, eps)


def normalize(x: torch.Tensor, groups: float, eps: float) -> torch.Tensor:
    parts = x.unflatten(-1, (int(groups), -1))
    return F.layer_norm(parts, parts.shape[-1:], eps=eps).flatten(-2)


def group_mean(x: torch.Tensor, groups: float) -> torch.Tensor:
    parts = x.unflatten(-1, (int(groups), -1))
    return parts.mean(-1, keepdim=True).expand(parts.shape).flatten(-2)


def normalize_grad(grad: torch.Tensor, x: torch.Tensor, groups: float, eps: float) -> torch.Tensor:
    grad, x = torch.broadcast_tensors(grad, x)
    center = x - group_mean(x, groups)
    rstd = torch.rsqrt(group_mean(center.square(), groups) + eps)
    normalized = center * rstd
    slope = group_mean(grad * normalized, groups)
    return rstd * (grad - group_mean(grad, groups) - normalized * slope)
