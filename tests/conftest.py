"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxfuse import recipes


@pytest.fixture
def full_precision() -> Iterator[None]:
    """A seed, fp32 products at full precision, and no recipes from before; for `usefixtures`."""
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    recipes.forget()
    yield
    recipes.forget()
    torch.set_float32_matmul_precision(precision)
