"""Linear, swish, halved, clamped, tanh, clamped again."""

from __future__ import annotations

import torch
from torch import nn

BATCH, IN_FEATURES, OUT_FEATURES = 1024, 8192, 8192


class Model(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gemm(x)
        x = x * torch.sigmoid(x)
        x = x / 2.0
        x = torch.clamp(x, min=-1.0, max=1.0)
        x = torch.tanh(x)
        return torch.clamp(x, min=-1.0, max=1.0)


def get_inputs(batch: int = BATCH, in_features: int = IN_FEATURES) -> list[torch.Tensor]:
    return [torch.rand(batch, in_features)]


def get_init_inputs(in_features: int = IN_FEATURES, out_features: int = OUT_FEATURES) -> list[int]:
    return [in_features, out_features]
