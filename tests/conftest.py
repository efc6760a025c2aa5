"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxfuse import backward, recipes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, then a CUDA device where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(autouse=True)
def every_size_trains_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small; what small training steps run on is a test of its own."""
    monkeypatch.setattr(backward, "FEWEST_ON_CPU", 0)


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
