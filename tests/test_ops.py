"""Every spelling of every op of the table: its chain, and eager's numbers."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_numerics import check, run, same_pattern
from helpers_programs import POINTWISE_KERNEL_OPS
from helpers_torch import skip_where_torch_differs
from torch import fx, nn

import fxfuse
from fxfuse.ops import COMPARISONS, OPS, Interval, Op

N = 40
PARAMS = {
    "leaky_relu": (0.2,),
    "elu": (0.7,),
    "celu": (0.7,),
    "softplus": (1.5, 3.0),
    "hardshrink": (0.4,),
    "softshrink": (0.4,),
    "threshold": (0.1, -0.3),
}
# Constructors of modules whose parameters are not those of the row.
MODULES: dict[type, Callable[[], nn.Module]] = {
    nn.PReLU: lambda: nn.PReLU(N, init=0.2),
    nn.Identity: nn.Identity,
}
ATEN_OVERLOADS = dict.fromkeys((*COMPARISONS, "lerp"), "Tensor") | {"where": "self"}
SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 88.0)
SPECIALS += (-88.0, 20.0, -20.0, 1e-30, -1e-30, 3.0, -3.0, 6.0, 100.0, -100.0, 1e4, -1e4)

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """`call(self, linear(x))`, with operands of several kinds."""

    def __init__(self, call: Forward, act: nn.Module | None = None, specials: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, N, bias=False) if specials else nn.Linear(24, N)
        if specials:
            nn.init.ones_(self.linear.weight)
        self.row, self.other = (nn.Parameter(torch.randn(N)) for _ in range(2))
        self.slope = nn.Parameter(torch.rand(N))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("mask", torch.rand(N) > 0.5)
        self.call = call
        if act is not None:
            self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, self.linear(x))


Case = tuple[str, Model, str]


def _others(op: Op, m: Any) -> tuple[Any, ...]:
    """Tensor arguments after the first; a condition comes before it."""
    if op.name == "prelu":
        return (m.slope,)
    return (m.row, m.other)[: op.arity - 1]


def _arguments(op: Op, m: Any, h: Any) -> tuple[Any, ...]:
    if op.name == "where":
        return (m.mask, h, m.row)
    return (h, *_others(op, m), *PARAMS.get(op.name, ()))


def _name(callable_: Any) -> str:
    return f"{getattr(callable_, '__module__', '')}.{getattr(callable_, '__name__', callable_)}"


def _chain(op: Op) -> str:
    # A bool result may not leave a group; one more op makes it a number.
    return f"{op.name} -> mul" if op.name in COMPARISONS else "" if op.name == "copy" else op.name


def _closed(op: Op, result: Any) -> Any:
    return result * 0.5 if op.name in COMPARISONS else result


def of_the_table(specials: bool) -> Iterator[Case]:
    """One case for every spelling a row lists, and its in-place form where torch has one."""
    for op in OPS.values():
        if op.name == "copy":
            continue
        for function in op.functions:

            def call(m: Any, h: Any, op: Op = op, function: Any = function) -> Any:
                return _closed(op, function(*_arguments(op, m, h)))

            yield f"{op.name}: {_name(function)}", Model(call, None, specials), _chain(op)
        for method in op.methods:
            if op.name.startswith("cast"):
                continue
            for name in (method, f"{method}_"):
                if not hasattr(torch.Tensor, name):
                    continue

                def call(m: Any, h: Any, op: Op = op, name: str = name) -> Any:
                    return _closed(op, getattr(h, name)(*_arguments(op, m, h)[1:]))

                yield f"{op.name}: .{name}()", Model(call, None, specials), _chain(op)
        for module in op.modules:
            made = MODULES.get(module, lambda op=op, m=module: m(*PARAMS.get(op.name, ())))()
            yield f"{op.name}: {_name(module)}", Model(_act, made, specials), _chain(op)
        for name in op.aten:
            overload = getattr(
                getattr(torch.ops.aten, name), ATEN_OVERLOADS.get(name, "default"), 0
            )
            if not overload:
                overload = getattr(torch.ops.aten, name).Tensor
            yield f"{op.name}: aten.{name}", _traced(op, overload, specials), _chain(op)


def _act(m: Any, h: Any) -> Any:
    return m.act(h)


def _traced(op: Op, overload: Any, specials: bool) -> Any:
    """A model as torch.export would leave it: a graph that calls an aten overload."""
    root = Model(_act, None, specials)
    graph = fx.Graph()
    h = graph.call_module("linear", (graph.placeholder("x"),))

    class Reads:
        def __getattr__(self, name: str) -> fx.Node:
            return graph.get_attr(name)

    result = graph.call_function(overload, _arguments(op, Reads(), h))
    if op.name in COMPARISONS:
        result = graph.call_function(torch.ops.aten.mul.Tensor, (result, 0.5))
    graph.output(result)
    return fx.GraphModule(root, graph)


CUSTOM: dict[str, tuple[Forward, str]] = {
    "h + 1": (lambda m, h: h + 1, "add"),
    "1 + h": (lambda m, h: 1 + h, "add"),
    "h - 1": (lambda m, h: h - 1, "sub"),
    "1 - h": (lambda m, h: 1 - h, "sub"),
    "2 * h": (lambda m, h: 2 * h, "mul"),
    "h / 3": (lambda m, h: h / 3, "div"),
    "3 / h": (lambda m, h: 3 / h, "div"),
    "-h": (lambda m, h: -h, "neg"),
    "abs(h)": (lambda m, h: abs(h), "abs"),
    "h + row": (lambda m, h: h + m.row, "add"),
    "row - h": (lambda m, h: m.row - h, "sub"),
    "row / h": (lambda m, h: m.row / h, "div"),
    "scalar * h": (lambda m, h: m.scalar * h, "mul"),
    "h += row": (lambda m, h: operator.iadd(h, m.row), "add"),
    "h *= 3": (lambda m, h: operator.imul(h, 3), "mul"),
    "h /= row": (lambda m, h: operator.itruediv(h, m.row), "div"),
    "h -= 3": (lambda m, h: operator.isub(h, 3), "sub"),
    "add alpha": (lambda m, h: torch.add(h, m.row, alpha=0.3), "mul -> add"),
    "add alpha of h": (lambda m, h: torch.add(m.row, h, alpha=3), "mul -> add"),
    "add number alpha": (lambda m, h: h.add(2, alpha=3), "add"),
    "sub alpha": (lambda m, h: h.sub(m.row, alpha=2), "mul -> sub"),
    "add_ alpha": (lambda m, h: h.add_(m.row, alpha=2), "mul -> add"),
    "rsub": (lambda m, h: torch.rsub(h, m.row), "sub"),
    "rsub alpha": (lambda m, h: torch.rsub(h, 2.0, alpha=0.5), "mul -> sub"),
    "div method": (lambda m, h: h.div_(m.row), "div"),
    "pow 2": (lambda m, h: h**2, "square"),
    "pow 3": (lambda m, h: h.pow(3), "square -> mul"),
    "pow -1": (lambda m, h: torch.pow(h, -1), "reciprocal"),
    "pow -2": (lambda m, h: h**-2, "square -> reciprocal"),
    "pow 0.5": (lambda m, h: h**0.5, "sqrt"),
    "pow -0.5": (lambda m, h: h**-0.5, "rsqrt"),
    "pow 4": (lambda m, h: h**4, "pow"),
    "pow 0": (lambda m, h: h**0, "pow"),
    "pow 1.7": (lambda m, h: h.abs() ** 1.7, "abs -> pow"),
    "pow_ 2": (lambda m, h: h.pow_(2), "square"),
    "pow tensor": (lambda m, h: torch.pow(h, m.slope), "pow"),
    "pow of number": (lambda m, h: 2**h, "pow"),
    "pow of one": (lambda m, h: torch.pow(1.0, h), "pow"),
    "pow of tensor": (lambda m, h: m.slope**h, "pow"),
    "addcmul": (lambda m, h: torch.addcmul(h, m.row, m.other, value=0.3), "mul -> mul -> add"),
    "addcmul of h": (lambda m, h: torch.addcmul(m.row, h, m.other), "mul -> add"),
    "addcdiv": (lambda m, h: h.addcdiv(m.row, m.slope + 1, value=2), "mul -> div -> add"),
    "lerp scalar": (lambda m, h: torch.lerp(h, m.row, 0.3), "lerp"),
    "lerp tensor": (lambda m, h: h.lerp(m.row, m.slope), "lerp"),
    "masked_fill": (lambda m, h: h.masked_fill(m.mask, -5.0), "where"),
    "masked_fill_": (lambda m, h: h.masked_fill_(m.mask, 2), "where"),
    "masked_fill nan": (lambda m, h: h.masked_fill(h > 1, math.nan), "gt -> where"),
    "masked_fill inf": (lambda m, h: h.masked_fill(m.mask, -math.inf), "where"),
    "where": (lambda m, h: torch.where(h > 0, h, m.row), "gt -> where"),
    "where numbers": (lambda m, h: torch.where(m.mask, 1.5, h), "where"),
    "where method": (lambda m, h: h.where(h < 1, m.row), "lt -> where"),
    "where two numbers": (lambda m, h: torch.where(h >= 0, 1.0, -1.0) * h, "ge -> where -> mul"),
    "mask": (lambda m, h: h * (h != 0.5), "ne -> mul"),
    "mask to number": (lambda m, h: (h > 0) * 1.0, "gt -> mul"),
    "mask.float()": (lambda m, h: (h > 0).float(), "gt -> cast_f32"),
    "clamp": (lambda m, h: h.clamp(-1, 0.5), "clamp"),
    "clamp low": (lambda m, h: torch.clamp(h, min=-0.5), "clamp"),
    "clamp high": (lambda m, h: torch.clip(h, max=0.5), "clamp"),
    "clamp crossed": (lambda m, h: h.clamp(1.0, -1.0), "clamp"),
    "clamp tensors": (lambda m, h: h.clamp(-m.slope, m.slope), "maximum -> minimum"),
    "clamp tensor low": (lambda m, h: h.clamp(min=m.row), "maximum"),
    "clamp_min": (lambda m, h: torch.clamp_min(h, 0.1), "clamp"),
    "clamp_max": (lambda m, h: h.clamp_max(0.1), "clamp"),
    "clamp_min tensor": (lambda m, h: h.clamp_min(m.row), "maximum"),
    "clamp_": (lambda m, h: h.clamp_(min=0.2), "clamp"),
    "hardtanh": (lambda m, h: F.hardtanh(h, -0.5, 2.0), "hardtanh"),
    "hardtanh in place": (lambda m, h: F.hardtanh(h, inplace=True), "hardtanh"),
    "hardtanh_": (lambda m, h: F.hardtanh_(h), "hardtanh"),
    "relu_": (lambda m, h: torch.relu_(h), "relu"),
    "relu in place": (lambda m, h: F.relu(h, True), "relu"),
    "leaky_relu_": (lambda m, h: F.leaky_relu_(h, 0.3), "leaky_relu"),
    "gelu": (lambda m, h: F.gelu(h), "gelu"),
    "gelu tanh": (lambda m, h: F.gelu(h, approximate="tanh"), "gelu_tanh"),
    "round": (lambda m, h: torch.round(h), "round"),
    "float": (lambda m, h: h.float() * 3, "cast_f32 -> mul"),
    "half": (lambda m, h: h.half() + 1, "cast_f16 -> add"),
    "bfloat16": (lambda m, h: h.bfloat16().sin(), "cast_bf16 -> sin"),
    "to": (lambda m, h: h.to(torch.bfloat16), "cast_bf16"),
    "to dtype=": (lambda m, h: h.to(dtype=torch.float16), "cast_f16"),
    "type": (lambda m, h: h.type(torch.float32).exp(), "cast_f32 -> exp"),
    "in place keeps dtype": (lambda m, h: h.add_(m.row.float()).mul_(0.3), "add -> mul"),
    "comparison in place": (lambda m, h: h.gt_(0.1).mul(3), "gt -> mul"),
    "silu by hand": (lambda m, h: h * torch.sigmoid(h), "silu"),
    "clone": (lambda m, h: h.clone().contiguous().exp(), "exp"),
}
CUSTOM_MODULES = {
    "nn.GELU": (nn.GELU(), "gelu"),
    "nn.GELU tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "nn.Hardtanh": (nn.Hardtanh(-2, 0.5), "hardtanh"),
    "nn.ReLU in place": (nn.ReLU(inplace=True), "relu"),
    "nn.PReLU of one slope": (nn.PReLU(), "prelu"),
    "nn.Threshold": (nn.Threshold(0.1, 3.0), "threshold"),
}


def cases(specials: bool = False) -> list[Case]:
    """All spellings, from the table and written out."""
    found = list(of_the_table(specials))
    found += [(name, Model(f, None, specials), chain) for name, (f, chain) in CUSTOM.items()]
    found += [(n, Model(_act, act, specials), chain) for n, (act, chain) in CUSTOM_MODULES.items()]
    return found


NAMES = [name for name, _, _ in cases()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_spelling_fuses_with_eagers_numbers(index: int, dtype: torch.dtype) -> None:
    _, model, chain = cases_once(False)[index]
    positive = chain.startswith(("log", "sqrt", "rsqrt")) and not chain.startswith("logs")
    torch.manual_seed(1)
    x = torch.randn(9, 24)
    model = model.to(dtype)
    with torch.no_grad():
        if positive and chain != "log1p":
            model.linear.weight.abs_(), model.linear.bias.abs_()
            x.abs_()
    check(model, x.to(dtype), chains=[chain])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_spelling_keeps_eagers_special_values(index: int, dtype: torch.dtype) -> None:
    """NaN and infinities come out where eager has them; nothing else becomes one."""
    skip_where_torch_differs(NAMES[index].partition(":")[0])
    _, model, _ = cases_once(True)[index]
    x = torch.tensor(SPECIALS)[:, None].to(dtype)
    model = model.to(dtype)
    (eager,), (fused,) = run(model, (x,)), run(fxfuse.optimize(model), (x,))
    (truth,) = run(copy.deepcopy(model).double(), (x.double(),))
    same_pattern(fused, eager, truth)
    assert fused.dtype == eager.dtype


_MADE: dict[bool, list[Case]] = {}


def cases_once(specials: bool) -> list[Case]:
    """The cases, made once for all tests; a test moves its model to the dtype it needs."""
    if specials not in _MADE:
        _MADE[specials] = cases(specials)
    return _MADE[specials]


@pytest.mark.parametrize("name", [n for n in POINTWISE_KERNEL_OPS if OPS[n].arity == 1])
def test_result_lies_in_the_tables_interval(name: str) -> None:
    op = OPS[name]
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    params = PARAMS.get(name, (-1.0, 1.0) if name == "clamp" else ())
    for low, high in ((-30.0, 30.0), (0.0, 1.0), (-1.0, 0.25), (2.0, 3.0)):
        inside = x[(x >= low) & (x <= high)]
        found = op.result_range((Interval(low, high),), params)
        result = op.reference(inside, *params)
        result = result[~result.isnan()].double()
        assert ((result >= found.low) & (result <= found.high)).all()


REFUSED: dict[str, tuple[Forward, str]] = {
    "div floor": (lambda m, h: torch.div(h, 2, rounding_mode="floor"), "rounding_mode='floor'"),
    "round decimals": (lambda m, h: h.round(decimals=2), "round: decimals=2"),
    "clamp without bounds": (lambda m, h: h.to(torch.float64), "conversion to torch.float64"),
    "to int": (lambda m, h: h.to(torch.int32), "conversion to torch.int32"),
    "to device": (lambda m, h: h.to("cpu"), "to() to something other than a constant dtype"),
    "computed slope": (lambda m, h: F.leaky_relu(h, h.shape[0]), "is not a constant number"),
    "softmax": (lambda m, h: torch.softmax(h, -1), "softmax is not a pointwise op"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_form_no_program_expresses_is_refused_with_its_reason(name: str) -> None:
    call, reason = REFUSED[name]
    report = check(Model(call), torch.randn(5, 24), chains=[])
    assert reason in report.refusals[0].reason
