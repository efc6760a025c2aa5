"""What becomes a group, where it ends, and why: numbers and chains together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_numerics import check, run
from torch import nn
from torch.nn.utils import parametrizations

import fxfuse
from fxfuse.lower import MAX_INSTRUCTIONS, MAX_OPERANDS, MAX_OUTPUTS

N = 8


class Model(nn.Module):
    """Two square Linears, a bag of operands, and a forward given to it."""

    def __init__(self, call: Callable[[Any, torch.Tensor], Any], **extra: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()
        self.row, self.table = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(3, N))
        self.matrix = nn.Parameter(torch.randn(N, 5))
        self.call = call
        for name, item in extra.items():
            setattr(self, name, item)

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def rows(*lead: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*lead, N)


def two_outputs(m: Any, x: Any) -> Any:
    h = m.a(x).tanh()
    return h, h.exp()


def in_the_middle(m: Any, x: Any) -> Any:
    h = m.a(x).tanh()
    return h.exp() * h.sum(-1, keepdim=True)


def gate_and_up(m: Any, x: Any) -> Any:
    return F.silu(m.a(x)) * m.b(x)


def residual_chain(m: Any, x: Any) -> Any:
    h = x + m.a(x)
    return h + m.b(h).relu()


def views(m: Any, x: Any) -> Any:
    return (m.a(x).view(-1, N).relu() + m.row).reshape(2, 3, N).flatten(0, -2) * 2


def shape_read(m: Any, x: Any) -> Any:
    batch, width = x.shape[0], x.shape[-1]
    return m.a(x).view(batch, -1, N).relu() * width


def shape_of_the_result(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return h.exp() * h.shape[-1]


def shape_before_a_view(m: Any, x: Any) -> Any:
    h = m.a(x)
    shape = h.shape
    return h.view(-1, N).relu().cumsum(-1).view(shape)


FUSED: dict[str, tuple[Any, tuple[int, ...], list[str]]] = {
    "residual": (lambda m, x: x + m.drop(m.a(x)), (4,), ["dropout -> add"]),
    "gelu": (lambda m, x: F.gelu(m.a(x)), (4,), ["gelu"]),
    "gate and up": (gate_and_up, (4,), ["silu", "mul"]),
    "two outputs": (two_outputs, (4,), ["tanh -> exp"]),
    "used in the middle": (in_the_middle, (4,), ["tanh -> exp"]),
    "residual chain": (residual_chain, (4,), ["add", "relu -> add"]),
    "shared Linear": (lambda m, x: m.a(m.a(x).relu()).tanh(), (4,), ["relu", "tanh"]),
    "views": (views, (2, 3), ["view -> relu -> add -> view -> view -> mul"]),
    "sizes of x": (shape_read, (2, 3), ["view -> relu -> mul"]),
    "shape of the result": (shape_of_the_result, (4,), ["relu -> exp"]),
    "shape before a view": (shape_before_a_view, (2, 3), ["view -> relu"]),
    "table": (lambda m, x: m.a(x) + m.table, (2, 3), ["add"]),
    "addmm": (lambda m, x: torch.addmm(m.row, x, m.a.weight.t()).relu(), (4,), ["relu"]),
    "addmm with a matrix": (
        lambda m, x: torch.addmm(x, x, m.a.weight).relu(),
        (4,),
        ["add -> relu"],
    ),
    "matmul T": (lambda m, x: torch.matmul(x, m.a.weight.T).relu(), (2, 3), ["relu"]),
    "@ transpose": (lambda m, x: (x @ m.a.weight.transpose(0, 1)).relu(), (2, 3), ["relu"]),
    "@ [K, N]": (lambda m, x: (x @ m.matrix).relu(), (2, 3), ["relu"]),
    "mm": (lambda m, x: torch.mm(x, m.matrix).exp(), (4,), ["exp"]),
    "F.linear": (lambda m, x: F.linear(x, m.a.weight, m.row).exp(), (4,), ["exp"]),
    "in place": (lambda m, x: m.a(x).relu_().add_(m.row), (4,), ["relu -> add"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fuses(name: str, dtype: torch.dtype) -> None:
    call, lead, chains = FUSED[name]
    check(Model(call).to(dtype).eval(), rows(*lead).to(dtype), chains=chains)


def test_tied_weights_fuse_each() -> None:
    model = Model(lambda m, x: m.b(m.a(x).relu()).tanh())
    model.b.weight = model.a.weight
    check(model, rows(4), chains=["relu", "tanh"])


@pytest.mark.parametrize("functional", [False, True])
def test_dropout_in_training_drops_what_eager_drops(functional: bool) -> None:
    def call(m: Any, x: Any) -> Any:
        h = m.a(x).relu()
        return x + (F.dropout(h, 0.5, m.training) if functional else m.drop(h)).exp()

    model = Model(call).train()
    report = check(model, rows(64), chains=["relu -> dropout -> exp -> add"])
    assert not report.refusals or report.refusals[0].name == "b"
    optimized = fxfuse.optimize(model)
    for _ in range(2):  # training is read at each call
        model.train(not model.training)
        optimized.train(model.training)
        torch.testing.assert_close(run(optimized, (rows(64),)), run(model, (rows(64),)))


def test_order_of_random_draws_is_kept() -> None:
    def call(m: Any, x: Any) -> Any:
        h = m.a(x)
        noise = torch.randn_like(h)
        return m.drop(h).exp() + noise

    check(Model(call).train(), rows(16), chains=[])


def test_dropout_nobody_reads_still_draws() -> None:
    def call(m: Any, x: Any) -> Any:
        h = m.a(x).relu()
        m.drop(h)
        return F.dropout(h * 2, 0.5, m.training)

    check(Model(call).train(), rows(16), chains=["relu -> dropout -> mul"])


SHAPES: dict[str, tuple[int, ...]] = {
    "0-d": (),
    "one element": (1,),
    "row": (N,),
    "column": (2, 3, 4, 1),
    "full": (2, 3, 4, N),
    "periodic": (4, N),
    "periodic twice": (3, 4, N),
    "repeated": (2, 1, 1, N),
    "repeated number": (2, 3, 1, 1),
    "hole": (2, 1, 4, N),
    "inner": (3, 1, N),
    "one rank more": (1, 2, 3, 4, N),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_operand_kind(name: str, dtype: torch.dtype) -> None:
    model = Model(lambda m, x: (m.a(x) * m.operand).tanh(), operand=nn.Parameter(torch.ones(1)))
    model.operand = nn.Parameter(torch.randn(SHAPES[name]))
    check(model.to(dtype), rows(2, 3, 4).to(dtype), chains=["mul -> tanh"])


def test_operand_of_permuted_strides() -> None:
    operand = torch.randn(N, 4, 3, 2).permute(3, 2, 1, 0)
    model = Model(lambda m, x: m.a(x) + m.operand, operand=nn.Parameter(operand))
    check(model, rows(2, 3, 4), chains=["add"])


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 2), (2, 1, 3, 2), (0,), (2, 0)], ids=str)
def test_any_rank_and_no_rows(lead: tuple[int, ...]) -> None:
    model = Model(lambda m, x: F.silu(m.a(x) + m.row) * x)
    check(model, rows(*lead), chains=["add -> silu -> mul"])


def test_operand_that_widens_the_result() -> None:
    model = Model(lambda m, x: (m.a(x) + m.table).relu())
    report = check(model, rows(1), chains=["add -> relu"])
    assert report.groups[0].gemm


def test_integer_and_double_operands() -> None:
    for operand in (torch.arange(N), torch.randn(N, dtype=torch.float64), torch.tensor(3)):
        model = Model(lambda m, x: (m.a(x) * m.operand).relu())
        model.register_buffer("operand", operand)
        (eager,), (fused,) = run(model, (rows(4),)), run(fxfuse.optimize(model), (rows(4),))
        assert fused.dtype == eager.dtype
        torch.testing.assert_close(fused, eager)


def test_number_computed_by_the_model() -> None:
    check(Model(lambda m, x: m.a(x) / x.shape[-1]), rows(4), chains=["div"])


# Graphs that do not fuse, or stop: the chains, and the reason as the report has it


def outside_in_place(m: Any, x: Any) -> Any:
    h = m.a(x)
    return x.clone().add_(h)


def later_reader(m: Any, x: Any) -> Any:
    h = m.a(x)
    y = h.relu_()
    return y + h.cumsum(-1)


def mutation_between(m: Any, x: Any) -> Any:
    y = x * 2
    h = m.a(y)
    y.add_(1)
    return h * y


def own_view_elsewhere(m: Any, x: Any) -> Any:
    h = m.a(x).exp()
    part = h.t()
    h.mul_(2)
    return part


def cycle(m: Any, x: Any) -> Any:
    h = m.a(x).exp()
    return h * h.cumsum(-1)


def cycle_through_a_group(m: Any, x: Any) -> Any:
    h = m.a(x)
    return h.relu() + m.b(h).relu().cumsum(-1)


def comparison_escapes(m: Any, x: Any) -> Any:
    h = m.a(x).exp()
    return h > 1


def truth_values(m: Any, x: Any) -> Any:
    h = m.a(x).exp()
    return ((h > 1) + (h < 0.5)).float()


STOPPED: dict[str, tuple[Any, list[str], str]] = {
    "in place on another tensor": (outside_in_place, [], "a tensor from outside the group"),
    "in place, read later": (later_reader, [], "it works in place on a tensor cumsum also reads"),
    "write between": (mutation_between, [], "a tensor is written in place between"),
    "in place under a view": (
        own_view_elsewhere,
        ["exp"],
        "works in place on a tensor t also reads",
    ),
    "cycle": (cycle, ["exp"], "its operand cumsum is computed after the group must run"),
    "cycle through a group": (
        cycle_through_a_group,
        ["relu", "relu"],
        "operand cumsum is computed",
    ),
    "comparison": (comparison_escapes, ["exp"], "its bool result is used outside the group"),
    "truth values": (truth_values, ["exp"], "its bool result is used outside the group"),
    "double": (lambda m, x: m.a(x).relu().double(), ["relu"], "double() is not a pointwise op"),
    "to float64": (
        lambda m, x: m.a(x).exp().to(torch.float64),
        ["exp"],
        "conversion to torch.float64",
    ),
    "to int": (lambda m, x: m.a(x).exp().to(torch.int32), ["exp"], "conversion to torch.int32"),
    "whole numbers": (
        lambda m, x: (m.a(x).exp() > 1) * 2,
        ["exp"],
        "its bool result is used outside the group",
    ),
    "always dropping": (
        lambda m, x: F.dropout(m.a(x).exp()).cos(),
        ["exp"],
        "drops in eval mode, too",
    ),
    "alpha dropout": (
        lambda m, x: F.alpha_dropout(m.a(x).exp(), 0.5, False),
        ["exp"],
        "not a pointwise",
    ),
    "feature dropout": (
        lambda m, x: F.dropout1d(m.a(x).exp(), 0.5, False),
        ["exp"],
        "not a pointwise",
    ),
    "last dimension": (
        lambda m, x: m.a(x).exp().view(-1),
        ["exp"],
        "view may change the last dimension",
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stops(name: str) -> None:
    call, chains, reason = STOPPED[name]
    report = check(Model(call).eval(), rows(4), chains=chains)
    reasons = [b for g in report.groups for b in g.bounds] + [r.reason for r in report.refusals]
    assert any(reason in r for r in reasons), reasons


def test_hooked_linear_is_not_fused() -> None:
    model = Model(lambda m, x: m.a(x).relu())
    model.a.register_forward_hook(lambda module, args, out: out * 2)
    report = check(model, rows(4), chains=[])
    assert report.refusals[0].reason == "it has hooks"


def test_hooked_activation_ends_the_group() -> None:
    model = Model(lambda m, x: m.act(m.a(x).tanh()))
    model.act.register_forward_hook(lambda module, args, out: out * 2)
    report = check(model, rows(4), chains=["tanh"])
    assert "it has hooks" in report.groups[0].bounds[0]


def test_parametrised_linear_is_not_fused() -> None:
    model = Model(lambda m, x: m.a(x).relu()).eval()
    parametrizations.weight_norm(model.a)
    optimized = fxfuse.optimize(model)
    torch.testing.assert_close(run(optimized, (rows(4),)), run(model, (rows(4),)))
    assert not fxfuse.report(optimized).groups
    assert "parametrised" in fxfuse.report(optimized).refusals[0].reason


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(x)] * 2, -1)


def test_linear_with_a_forward_of_its_own_is_not_read_as_one() -> None:
    model = Model(lambda m, x: m.own(x).relu(), own=Doubled(N, N))
    optimized = fxfuse.optimize(model)
    torch.testing.assert_close(run(optimized, (rows(4),)), run(model, (rows(4),)))


def test_long_chain_is_cut_and_both_parts_are_right() -> None:
    def call(m: Any, x: Any) -> Any:
        h = m.a(x)
        for _ in range(MAX_INSTRUCTIONS // 2 + 4):
            h = (h * 0.9).sin()
        return h

    report = check(Model(call), rows(4))
    assert len(report.groups) == 1
    assert len(report.groups[0].chain) == MAX_INSTRUCTIONS
    limit = f"{MAX_INSTRUCTIONS + 1} instructions, a kernel holds at most {MAX_INSTRUCTIONS}"
    assert limit in report.groups[0].bounds[0]


def test_too_many_operands_cut_the_group() -> None:
    operands = nn.ParameterList(torch.randn(N) for _ in range(MAX_OPERANDS + 2))

    def call(m: Any, x: Any) -> Any:
        h = m.a(x)
        for operand in m.operands:
            h = h + operand
        return h

    chains = [" -> ".join(["add"] * MAX_OPERANDS)]
    report = check(Model(call, operands=operands), rows(4), chains=chains)
    limit = f"{MAX_OPERANDS + 1} operands, a kernel holds at most {MAX_OPERANDS}"
    assert limit in report.groups[0].bounds[0]


def test_too_many_outputs_cut_the_group() -> None:
    def call(m: Any, x: Any) -> Any:
        h = m.a(x)
        return tuple((h * (i + 0.5)).sin() for i in range(MAX_OUTPUTS + 1))

    report = check(Model(call), rows(4))
    assert report.groups[0].stores <= MAX_OUTPUTS


def test_groups_whose_results_cross_come_in_an_order_that_works() -> None:
    def call(m: Any, x: Any) -> Any:
        a = m.a(x)
        b = m.b(x)
        r = a.relu()
        q = b.cumsum(-1)
        t = r.tanh()
        return (b + r) * q + t

    check(Model(call), rows(4), chains=["relu -> tanh", "add"])


def test_pointwise_work_after_a_norm_is_one_call() -> None:
    model = Model(lambda m, x: F.silu(m.norm(m.a(x))) * m.row, norm=nn.LayerNorm(N))
    report = check(model, rows(4), chains=["silu -> mul"])
    assert not report.groups[0].gemm
