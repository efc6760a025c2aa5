"""`verify`: errors against float64, as data and as a table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import errors


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8), nn.Tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_model_is_ok(dtype):
    original = model().eval().to(dtype)
    found = fxfuse.verify(fxfuse.optimize(original), original, torch.randn(256, 16, dtype=dtype))
    (row,) = found.rows
    assert found.ok
    assert (row.output, row.shape, row.dtype) == (0, (256, 8), str(dtype).removeprefix("torch."))
    assert 0 < row.fused <= 1.05 * row.eager + 2**-24
    assert "Error against float64" in str(found)
    assert "256x8" in found.table()


def test_a_wrong_model_is_not_ok():
    original = model().eval()
    wrong = fxfuse.optimize(model().eval())
    with torch.no_grad():
        wrong[0].weight.add_(0.1)
    assert not fxfuse.verify(wrong, original, torch.randn(4, 16)).ok


def test_nothing_is_changed_and_draws_are_equal():
    original = model()
    optimized = fxfuse.optimize(original)
    x = torch.randn(64, 16)
    kept, state = x.clone(), torch.get_rng_state()
    weights = original[0].weight.clone()
    found = fxfuse.verify(optimized, original, x)
    assert found.rows[0].fused < 1e-4  # the same units were dropped
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(original[0].weight, weights)
    assert original.training


def test_nan_where_the_truth_is_finite_is_not_ok():
    class Nan(nn.Module):
        def forward(self, x):
            return torch.full_like(x, float("nan"))

    assert not fxfuse.verify(Nan(), nn.Identity(), torch.ones(3)).ok
    assert not fxfuse.verify(nn.Identity(), Nan(), torch.ones(3)).ok


def test_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = torch.relu(self.linear(x))
            return {"a": h, "b": (h * 2, 3)}

    original = Two()
    found = fxfuse.verify(fxfuse.optimize(original), original, torch.randn(2, 4))
    assert [r.output for r in found.rows] == [0, 1]


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(errors.InputError, match="verify: optimized is int"):
        fxfuse.verify(3, nn.Identity())
    with pytest.raises(errors.InputError, match="verify: original is NoneType"):
        fxfuse.verify(nn.Identity(), None)
    with pytest.raises(errors.InputError, match=r"output 0 has shape \(2, 3\)"):
        fxfuse.verify(nn.Linear(4, 3), nn.Linear(4, 5), torch.randn(2, 4))


def test_several_precisions_have_rows_each():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    before = torch.get_float32_matmul_precision()
    checked = fxfuse.verify(
        fxfuse.optimize(model), model, torch.randn(3, 8), precisions=["highest", "high"]
    )
    assert [row.precision for row in checked.rows] == ["highest", "high"]
    assert "precision" in str(checked)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(errors.InputError, match="precision 'best', expected one of highest"):
        fxfuse.verify(fxfuse.optimize(model), model, torch.randn(3, 8), precisions=["best"])
