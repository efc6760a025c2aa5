"""Linear, GroupNorm, swish, times a parameter, swish again."""

from __future__ import annotations

import torch
from torch import nn

BATCH, IN_FEATURES, OUT_FEATURES, GROUPS = 1024, 8192, 8192, 256


class Model(nn.Module):
    def __init__(self, in_features: int, out_features: int, num_groups: int) -> None:
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)
        self.group_norm = nn.GroupNorm(num_groups, out_features)
        self.multiply_weight = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gemm(x)
        x = self.group_norm(x)
        x = x * torch.sigmoid(x)
        x = x * self.multiply_weight
        return x * torch.sigmoid(x)


def get_inputs(batch: int = BATCH, in_features: int = IN_FEATURES) -> list[torch.Tensor]:
    return [torch.rand(batch, in_features)]


def get_init_inputs(
    in_features: int = IN_FEATURES, out_features: int = OUT_FEATURES, num_groups: int = GROUPS
) -> list[int]:
    return [in_features, out_features, num_groups]
