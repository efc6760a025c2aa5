"""Linear, plus a parameter, then swish, tanh, exact GELU and hardtanh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BATCH, IN_FEATURES, OUT_FEATURES = 1024, 8192, 8192


class Model(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.matmul = nn.Linear(in_features, out_features)
        self.add_value = nn.Parameter(torch.randn(out_features) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.matmul(x)
        x = x + self.add_value
        x = torch.sigmoid(x) * x
        x = torch.tanh(x)
        x = F.gelu(x)
        return F.hardtanh(x, min_val=-1.0, max_val=1.0)


def get_inputs(batch: int = BATCH, in_features: int = IN_FEATURES) -> list[torch.Tensor]:
    return [torch.rand(batch, in_features)]


def get_init_inputs(in_features: int = IN_FEATURES, out_features: int = OUT_FEATURES) -> list[int]:
    return [in_features, out_features]
