"""Training a model that was optimised and then compiled: both passes run on our ops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers_numerics import no_worse
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fxfuse


class Net(nn.Module):
    """Two Linears; `norm` puts a GroupNorm into the first group."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 16)
        self.norm = nn.GroupNorm(8, 64) if norm else nn.Identity()
        self.scale = nn.Parameter(torch.rand(64) + 0.5)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(torch.tanh(F.silu(self.norm(self.first(x))) * self.scale))
        return torch.relu(self.second(h)) + 0.25 * h[:, :16]


@pytest.fixture(autouse=True)
def _no_graphs_left() -> None:
    torch._dynamo.reset()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    out = model(x)
    seed = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out)
    return list(torch.autograd.grad(out, [x, *model.parameters()], seed))


def graphs_of(model: nn.Module, x: torch.Tensor) -> tuple[list[str], list[str]]:
    """The ops of the forward's graph and of the backward's."""
    seen: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    gradients(torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), x)
    forward, backward = seen
    return forward, backward


@pytest.mark.parametrize("norm", [False, True])
def test_backward_graph_is_our_op_and_multiplies_nothing_again(norm: bool) -> None:
    optimized = fxfuse.optimize(Net(norm))
    forward, backward = graphs_of(optimized, torch.randn(20, 32))
    assert forward.count("fxfuse.linear.default") == 2
    assert backward.count("fxfuse.pointwise.default") == 2
    products = [op for op in backward if op.startswith(("aten.mm", "aten.addmm", "fxfuse.linear"))]
    assert products == ["aten.mm.default"] * 4  # dX and dW of either Linear
    assert not any("silu" in op or "tanh" in op or "norm" in op for op in backward)


def test_what_compiled_graphs_keep_is_what_eager_ones_keep() -> None:
    optimized = fxfuse.optimize(Net())
    x = torch.randn(20, 32)
    gradients(optimized, x)
    ways = [group.backward for group in fxfuse.report(optimized).groups]
    torch.compile(optimized, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    assert [group.backward for group in fxfuse.report(optimized).groups] == ways


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_a_compiled_model_are_as_accurate_as_eagers(
    backend: str, dtype: torch.dtype, norm: bool, device: str
) -> None:
    model = Net(norm).to(device, dtype)
    compiled = torch.compile(fxfuse.optimize(model), fullgraph=True, backend=backend)
    x = torch.randn(20, 32, device=device).to(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    no_worse(gradients(compiled, x), gradients(model, x), exact, roundings=1)


def test_dynamic_shapes_train_too() -> None:
    model = Net(norm=True)
    compiled = torch.compile(fxfuse.optimize(model), backend="aot_eager", dynamic=True)
    for rows in (20, 33, 7):
        x = torch.randn(rows, 32)
        for ours, eagers in zip(gradients(compiled, x), gradients(model, x), strict=True):
            torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_are_left_out_of_the_backward() -> None:
    model = Net()
    for parameter in model.first.parameters():
        parameter.requires_grad_(False)
    optimized = fxfuse.optimize(model)
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    x, seed = torch.randn(20, 32), torch.randn(20, 16)
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(compiled(x), wanted, seed)
    expected = torch.autograd.grad(model(x), wanted, seed)
    for ours, eagers in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-5)


def test_a_compiled_training_step_follows_eagers() -> None:
    plain, optimized = Net(norm=True), fxfuse.optimize(Net(norm=True))
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    x, target = torch.randn(64, 32), torch.randn(64, 16)
    losses: list[list[float]] = [[], []]
    for found, module in zip(losses, (plain, compiled), strict=True):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(module(x), target)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
