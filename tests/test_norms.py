"""GroupNorm after a Linear: in its group, with eager's numbers and gradients, or refused."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_abi import path
from helpers_numerics import check, doubled, errors, gradients_of, no_worse, run
from torch import nn

import fxfuse
from fxfuse.errors import OperandShapeError
from fxfuse.ops import GROUP_WIDTHS

pytestmark = [
    pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built"),
    pytest.mark.usefixtures("full_precision"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = pytest.mark.parametrize("width", GROUP_WIDTHS)
CHAIN = "group_norm -> silu -> mul -> silu"


def swish_mul_swish(m: Any, x: Any) -> Any:
    return F.silu(F.silu(m.norm(m.fc(x))) * m.row)


class Model(nn.Module):
    """A Linear, norms over `groups` groups of its `width * groups` columns, and a forward."""

    def __init__(
        self,
        call: Callable[[Any, Any], Any] = swish_mul_swish,
        width: int = 16,
        groups: int = 4,
        k: int = 24,
        **norm: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        n, self.groups, self.call = width * groups, groups, call
        self.fc, self.row = nn.Linear(k, n), nn.Parameter(torch.randn(n))
        self.norm, self.other = nn.GroupNorm(groups, n, **norm), nn.GroupNorm(2, n)
        self.register_buffer("scale", torch.rand(n) + 0.5)
        self.register_buffer("shift", torch.randn(n))
        if self.norm.affine:
            for parameter in (*self.norm.parameters(), *self.other.parameters()):
                nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def rows(*lead: int, k: int = 24) -> torch.Tensor:
    return torch.randn(*lead, k, generator=torch.Generator().manual_seed(1))


def check_fused(model: nn.Module, x: torch.Tensor, chain: str, **options: Any) -> None:
    """Eager's accuracy, in one kernel call and with no norm beside it."""
    report = check(model, x, chains=[chain], **options)
    (group,) = report.groups
    assert group.gemm
    assert not any("norm" in node.target for node in report.nodes_after if node.target[-1] == ")")
    assert group.routes
    assert not any("reference" in route for route in group.routes), group.routes


# What joins --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "count"), [(1, 333), (3, 70), (16, 129)])
@WIDTHS
def test_norm_joins_the_group_of_its_linear(
    width: int, groups: int, count: int, dtype: torch.dtype, device: str
) -> None:
    model, x = Model(width=width, groups=groups).to(device, dtype), rows(count)
    x[0] = 0
    check_fused(model, x.to(device, dtype), CHAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_norm_of_any_number_of_rows(count: int, dtype: torch.dtype, device: str) -> None:
    check_fused(Model().to(device, dtype), rows(count).to(device, dtype), CHAIN)


def between(m: Any, x: Any) -> Any:
    h = m.fc(x).tanh() + m.row
    return m.norm(h) + h


def value_before_is_used(m: Any, x: Any) -> Any:
    h = m.fc(x)
    return F.silu(m.norm(h)) * m.row, h.cumsum(-1)


def norms_result_is_used(m: Any, x: Any) -> Any:
    h = m.norm(m.fc(x))
    return F.silu(h), h, h.cumsum(-1)


def two_norms(m: Any, x: Any) -> Any:
    return m.other(m.norm(m.fc(x)).relu()) * m.row


def functional(weight: str, bias: str) -> Callable[[Any, Any], Any]:
    def call(m: Any, x: Any) -> Any:
        return F.silu(F.group_norm(m.fc(x), m.groups, getattr(m, weight), getattr(m, bias)))

    return call


PLACES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "alone": (lambda m, x: m.norm(m.fc(x)), "group_norm", {}),
    "without weight and bias": (swish_mul_swish, CHAIN, {"affine": False}),
    "large eps": (swish_mul_swish, CHAIN, {"eps": 3.0}),
    "small eps": (swish_mul_swish, CHAIN, {"eps": 1e-12}),
    "after pointwise ops": (between, "tanh -> add -> group_norm -> add", {}),
    "residual": (lambda m, x: m.norm(m.fc(x)).relu() + x, "group_norm -> relu -> add", {"k": 64}),
    "value before is used": (value_before_is_used, "group_norm -> silu -> mul", {}),
    "its result is used": (norms_result_is_used, "group_norm -> silu", {}),
    "two norms": (two_norms, "group_norm -> relu -> group_norm -> mul", {}),
    "parameters": (functional("row", "row"), "group_norm -> silu", {}),
    "buffers": (functional("scale", "shift"), "group_norm -> silu", {}),
    "computed parameters": (
        lambda m, x: F.silu(F.group_norm(m.fc(x), m.groups, m.row.exp(), m.fc.weight[:, 3])),
        "group_norm -> silu",
        {},
    ),
    "torch's function": (
        lambda m, x: F.silu(torch.group_norm(m.fc(x), m.groups, m.row, None, 1e-3, False)),
        "group_norm -> silu",
        {},
    ),
    "aten op": (
        lambda m, x: F.silu(torch.ops.aten.group_norm(m.fc(x), m.groups, m.row, m.shift)),
        "group_norm -> silu",
        {},
    ),
    "by names": (
        lambda m, x: F.silu(F.group_norm(input=m.fc(x), num_groups=4, weight=m.row, eps=0.1)),
        "group_norm -> silu",
        {},
    ),
    "in place": (
        lambda m, x: F.silu(m.norm(m.fc(x).add_(1)), inplace=True).mul_(m.row),
        "add -> group_norm -> silu -> mul",
        {},
    ),
    "between columns": (
        lambda m, x: m.norm(m.fc(x) * x[:, :1]) * x[:, 1:2],
        "mul -> group_norm -> mul",
        {},
    ),
    "of a view [M, N]": (
        lambda m, x: F.silu(m.norm(m.fc(x[None]).view(-1, 64))),
        "view -> group_norm -> silu",
        {},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_norm_joins_where_it_may(name: str, dtype: torch.dtype, device: str) -> None:
    call, chain, options = PLACES[name]
    model = Model(call, **options).to(device, dtype)
    check_fused(model, rows(21, k=options.get("k", 24)).to(device, dtype), chain)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_norm_after_an_active_dropout(p: float, device: str) -> None:
    model = Model(lambda m, x: F.silu(m.norm(F.dropout(m.fc(x), p, m.training)))).to(device)
    x = rows(21).to(device)
    (eager,), (fused,) = run(model, (x,)), run(fxfuse.optimize(model), (x,))
    torch.testing.assert_close(fused, eager)


# What does not -----------------------------------------------------------------------------------


def outside(m: Any, x: Any) -> Any:
    return F.silu(F.group_norm(x, 3, m.fc(m.row))) * m.row


def weight_of_the_result(m: Any, x: Any) -> Any:
    h = m.fc(x).relu()
    return F.silu(F.group_norm(h, m.groups, h.mean(0))) * m.row


WIDE = "its groups have {} channels, expected one of 8, 16, 32, 64, 128"
APART: dict[str, tuple[Any, dict[str, Any], list[str], str]] = {
    **{
        f"{width} columns": (
            lambda m, x: F.silu(m.norm(m.fc(x))) * m.row,
            {"width": width, "groups": 2},
            ["silu -> mul"],
            WIDE.format(width),
        )
        for width in (4, 12, 256)
    },
    "its weight depends on the group": (
        weight_of_the_result,
        {},
        ["relu", "silu -> mul"],
        "group_norm: its operand mean is computed after the group must run",
    ),
    "another tensor": (
        outside,
        {"width": 8, "groups": 3},
        [],
        "it normalizes a tensor from outside the group",
    ),
    "groups are not known": (
        lambda m, x: F.silu(F.group_norm(m.fc(x), x.shape[1] // 6)) * m.row,
        {},
        ["silu -> mul"],
        "num_groups=",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", APART)
def test_norm_stays_apart_with_its_reason(name: str, dtype: torch.dtype, device: str) -> None:
    call, options, chains, reason = APART[name]
    model = Model(call, **options).to(device, dtype)
    report = check(model, rows(90).to(device, dtype))
    assert sorted(" -> ".join(g.chain) for g in report.groups) == chains
    reasons = [b for g in report.groups for b in g.bounds] + [r.reason for r in report.refusals]
    assert any(reason in r for r in reasons), reasons
    assert any("norm" in n.target for n in report.nodes_after)
    assert not any(g.gemm for g in report.groups if "silu" in g.chain)


def test_hooked_norm_is_called(device: str) -> None:
    model = Model().to(device)
    model.norm.register_forward_hook(lambda module, args, out: out * 2)
    report = check(model, rows(5).to(device), chains=[])
    assert "it has hooks" in report.refusals[0].reason


def test_groups_are_listed_in_the_order_of_the_graph() -> None:
    def call(m: Any, x: Any) -> Any:
        return ((F.silu(m.norm(m.fc(x).relu())) * 2) @ m.fc.weight).tanh()

    check(Model(call, width=4), rows(90), chains=["relu", "silu -> mul", "tanh"])


def test_channels_in_the_middle_run_on_the_reference_with_the_reason(device: str) -> None:
    model = Model(lambda m, x: F.silu(m.norm(m.fc(x)))).to(device)
    optimized, x = fxfuse.optimize(model), rows(3, 64).to(device)
    (eager,), (fused,) = run(model, (x,)), run(optimized, (x,))
    assert torch.equal(fused, eager)
    (group,) = fxfuse.report(optimized).groups
    shape = "group_norm of a tensor of shape (3, 64, 64), which is not [M, N]"
    assert group.routes == (f"reference: {shape}",)
    wanted = [x.requires_grad_(), *model.parameters()]
    seeds = [torch.randn_like(fused)]
    found = (gradients_of(lambda *t, f=f: f(t[0]), wanted, seeds) for f in (optimized, model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("lead", [(7,), (), (2, 5)], ids=str)
def test_wrong_number_of_channels_is_named(lead: tuple[int, ...]) -> None:
    model = Model(lambda m, x: F.silu(m.other(m.fc(x))))
    model.other = nn.GroupNorm(2, 32)
    with pytest.raises(RuntimeError):
        model(rows(*lead))
    with pytest.raises(OperandShapeError) as error:
        fxfuse.optimize(model)(rows(*lead))
    assert f"group_norm of shapes {(*lead, 64)} and (32,) and (32,) in group_norm" in str(error)


# Values no average is at ease with ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [30.0, 1000.0, -1e5])
@WIDTHS
def test_mean_far_from_zero_costs_no_digits(
    width: int, shift: float, dtype: torch.dtype, device: str
) -> None:
    if dtype == torch.float16 and abs(shift) > 6e4:
        pytest.skip("beyond float16")
    model = Model(lambda m, x: m.norm(m.fc(x) + shift), width=width).to(device, dtype)
    check_fused(model, rows(70).to(device, dtype), "add -> group_norm")


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -77.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@WIDTHS
def test_constant_groups_become_the_bias(
    width: int, dtype: torch.dtype, value: float, device: str
) -> None:
    model = Model(lambda m, x: m.norm(m.fc(x)), width=width)
    nn.init.constant_(model.fc.bias, value)
    check_fused(model.to(device, dtype), torch.zeros(5, 24).to(device, dtype), "group_norm")


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_row_and_group(
    dtype: torch.dtype, special: float, device: str
) -> None:
    model, x = Model(width=8).to(device, dtype), rows(99).to(device, dtype)
    optimized = fxfuse.optimize(model)
    (plain,) = run(optimized, (x,))
    x[4, 3] = special
    check_fused(model, x, CHAIN, same_specials=True)
    (found,) = run(optimized, (x,))
    others = torch.arange(99) != 4
    assert found[4].isnan().all()
    torch.testing.assert_close(found[others], plain[others], rtol=0, atol=0)
    with torch.no_grad():
        x[4, 3], model.fc.bias[10] = 0.0, special  # a column of the second group
    check_fused(model, x, CHAIN, same_specials=True)
    (found,) = run(optimized, (x,))
    assert found[:, 8:16].isnan().all()
    kept = [c for c in range(32) if c // 8 != 1]
    torch.testing.assert_close(found[others][:, kept], plain[others][:, kept], rtol=0, atol=0)


# Gradients ---------------------------------------------------------------------------------------


def check_gradients(model: nn.Module, x: torch.Tensor) -> None:
    """Of the input and all parameters: no worse than eager's, and by kernels.

    Several draws count as one: of a few numbers the errors are a matter of luck.
    """
    optimized, exact = fxfuse.optimize(model), copy.deepcopy(model).double()
    found: list[list[Any]] = [[], [], []]
    for scale in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        given = (x.roll(round(10 * scale), 1) * scale).requires_grad_()
        seeds = [torch.randn_like(t) for t in run(model, (given,))]
        inputs = (given, given, doubled([given])[0])
        for all_, module, t in zip(found, (optimized, model, exact), inputs, strict=True):
            call = lambda *t, f=module: f(t[0])  # noqa: E731
            all_.append(gradients_of(call, [t, *module.parameters()], seeds))
    columns = (zip(*f, strict=True) for f in found)
    no_worse(*([None if g[0] is None else torch.stack(g) for g in f] for f in columns))
    (group,) = fxfuse.report(optimized).groups
    assert group.backward
    assert all(way.startswith("keeps") for way in group.backward), group.backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 5])
@WIDTHS
def test_gradients_are_as_accurate_as_eagers(
    width: int, groups: int, dtype: torch.dtype, device: str
) -> None:
    model = Model(width=width, groups=groups).to(device, dtype)
    check_gradients(model, rows(43).to(device, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_gradients_where_a_norm_may_be(name: str, dtype: torch.dtype, device: str) -> None:
    call, _, options = PLACES[name]
    model = Model(call, **options).to(device, dtype)
    check_gradients(model, rows(21, k=options.get("k", 24)).to(device, dtype))


def test_report_says_that_the_forward_keeps_z(device: str) -> None:
    model = Model().to(device)
    optimized = fxfuse.optimize(model)
    optimized(rows(5).to(device)).sum().backward()
    assert fxfuse.report(optimized).groups[0].backward == ("keeps z",)


@pytest.mark.parametrize("frozen", range(1, 16))
def test_frozen_parameters_get_no_gradient(frozen: int, device: str) -> None:
    model = Model().to(device)
    leaves = [model.norm.weight, model.norm.bias, model.fc.weight, model.row]
    for bit, leaf in enumerate(leaves):
        leaf.requires_grad_(not frozen >> bit & 1)
    tensors = [rows(9).to(device).requires_grad_(), *model.parameters()]
    seeds = [torch.randn(9, 64)]
    optimized = fxfuse.optimize(model)
    found = [gradients_of(lambda *t, f=f: f(t[0]), tensors, seeds) for f in (optimized, model)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(found[0]) == len(tensors) - frozen.bit_count()


@pytest.mark.parametrize("name", ["alone", "two norms", "after pointwise ops"])
def test_second_derivatives_are_as_accurate_as_eagers(name: str, device: str) -> None:
    model = Model(PLACES[name][0]).to(device)
    optimized, exact = fxfuse.optimize(model), copy.deepcopy(model).double()

    def penalised(module: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        x.requires_grad_()
        tensors = [x, *module.parameters()]
        grad = functools.partial(torch.autograd.grad, inputs=tensors, materialize_grads=True)
        first = grad(module(x).sin().sum(), create_graph=True)
        yield from first
        yield from grad(sum(g.square().sum() for g in first))

    x = rows(19).to(device)
    modules = ((optimized, x), (model, x.clone()), (exact, x.double()))
    for ours, eagers, truth in zip(*(penalised(m, t) for m, t in modules), strict=True):
        of_ours, of_eager, size = errors(ours, eagers, truth)
        assert of_ours <= 1.5 * of_eager + 4e-7 * size, (of_ours, of_eager, size)
    (group,) = fxfuse.report(optimized).groups
    assert not any("reference" in way for way in (*group.routes, *group.backward))


# Modes -------------------------------------------------------------------------------------------


def test_functional_transforms_are_eagers(device: str) -> None:
    model = Model().to(device)
    x, v = rows(6).to(device), torch.ones(6, 24, device=device)

    def everything(module: nn.Module) -> list[torch.Tensor]:
        each = torch.func.vmap(torch.func.grad(lambda t: module(t[None]).sum()))
        return [*torch.func.jvp(module, (x,), (v,)), torch.func.vmap(module)(x[:, None]), each(x)]

    torch.testing.assert_close(everything(fxfuse.optimize(model)), everything(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_eagers_dtype_and_values(dtype: torch.dtype, device: str) -> None:
    model, x = Model().to(device), rows(6).to(device)
    optimized = fxfuse.optimize(model)
    with torch.autocast(device, dtype):
        eager, fused = model(x), optimized(x)
    assert fused.dtype == eager.dtype
    torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_is_cast_after_it_was_optimized(dtype: torch.dtype, device: str) -> None:
    model = Model().to(device)
    optimized, x = fxfuse.optimize(model), rows(70).to(device)
    run(optimized, (x,))
    optimized.to(dtype)
    (fused,), (eager,) = run(optimized, (x.to(dtype),)), run(model, (x.to(dtype),))
    (truth,) = run(copy.deepcopy(model).double(), (x.to(dtype).double(),))
    assert fused.dtype == dtype
    no_worse([fused], [eager], [truth])


def test_parameters_keep_their_names(device: str) -> None:
    model = Model().to(device)
    optimized = fxfuse.optimize(model)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert optimized.norm.weight is model.norm.weight
    model.load_state_dict({n: t * 2 for n, t in model.state_dict().items()})
    x = rows(5).to(device)
    torch.testing.assert_close(run(optimized, (x,)), run(model, (x,)))


def test_compiles_as_any_module(device: str) -> None:
    model, x = Model().to(device), rows(5).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(fxfuse.optimize(model), backend="eager")
    torch.testing.assert_close(run(compiled, (x,)), run(model, (x,)))
