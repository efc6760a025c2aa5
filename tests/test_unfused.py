"""Linears that nothing is fused with: their products run on our kernels where those are faster."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.fused import fused_linear, routes_taken, unfused_linear
from fxfuse.program import BARE


class Net(nn.Module):
    """A Linear before a norm, one whose result is returned, one that fuses between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.second(self.norm(self.first(x)))))


def targets(module):
    return [node.target for node in module.graph.nodes if node.op.startswith("call")]


def test_lone_linears_are_calls_of_their_own():
    torch.manual_seed(0)
    model = Net()
    optimized = fxfuse.optimize(model)
    assert targets(optimized) == [unfused_linear, "norm", fused_linear, unfused_linear]
    report = fxfuse.report(optimized)
    assert len(report.groups) == 1
    assert [r.name for r in report.refusals] == ["first", "head"]
    x = torch.randn(5, 6)
    assert torch.equal(optimized(x), model(x))
    assert optimized.state_dict().keys() == model.state_dict().keys()
    assert optimized.first.weight is model.first.weight
    for made in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert torch.equal(made(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_they_are_torchs_own_op(dtype):
    x, weight, bias = torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias))
    out = unfused_linear(x, weight, bias)
    assert type(out.grad_fn).__name__ == type(F.linear(x, weight, bias).grad_fn).__name__
    torch.testing.assert_close(unfused_linear(x, weight.t(), bias, True), out)


def test_hooked_and_parametrised_linears_stay_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 4), nn.Softmax(-1))
    model[0].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model[2])
    assert unfused_linear not in targets(fxfuse.optimize(model))


def test_shared_and_strided_products():
    """A weight used twice, a product that two nodes read, a weight stored [K, N]."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            y = self.a(self.a(x))
            return y.sum(-1), y.softmax(-1), (x @ self.w).softmax(-1)

    torch.manual_seed(0)
    model, x = Both(), torch.randn(3, 4)
    optimized = fxfuse.optimize(model)
    assert targets(optimized).count(unfused_linear) == 3
    for found, expected in zip(optimized(x), model(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    def test_fp32_runs_on_planes_and_learns_as_eager(self):
        torch.manual_seed(0)
        x, weight = torch.randn(256, 512, device="cuda"), torch.randn(512, 512, device="cuda")
        bias = torch.randn(512, device="cuda")
        truth = F.linear(x.double(), weight.double(), bias.double())
        found = unfused_linear(x, weight, bias, site="alone")
        eager = F.linear(x, weight, bias)
        assert (found - truth).norm() <= (eager - truth).norm()
        if torch.cuda.get_device_capability() == (9, 0):
            assert routes_taken("alone", BARE) == [("hopper-highest", None)]
        grads = []
        for run in (unfused_linear, F.linear):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            run(*leaves).square().sum().backward()
            grads.append([t.grad for t in leaves])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_small_products_are_torchs_own(self, dtype):
        x, weight = torch.randn(2, 30, device="cuda"), torch.randn(7, 30, device="cuda")
        x, weight = x.to(dtype), weight.to(dtype)
        assert torch.equal(unfused_linear(x, weight, None), F.linear(x, weight))
