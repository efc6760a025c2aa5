"""Linear without bias, plus a parameter, then ReLU."""

from __future__ import annotations

import torch
from torch import nn

BATCH, IN_FEATURES, OUT_FEATURES = 1024, 8192, 8192


class Model(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features, bias=False)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gemm(x)
        x = x + self.bias
        return torch.relu(x)


def get_inputs(batch: int = BATCH, in_features: int = IN_FEATURES) -> list[torch.Tensor]:
    return [torch.rand(batch, in_features)]


def get_init_inputs(in_features: int = IN_FEATURES, out_features: int = OUT_FEATURES) -> list[int]:
    return [in_features, out_features]
