"""The vocabulary of epilogue programs: one row per op, shared by every stage.

A row gives the op's name (an opcode of the kernel libraries, see `kernels/opcodes.def`), its
reference as a torch function, the interval its result lies in, and the torch callables it stands
for. Callables that need more than a renaming (`addcmul`, `sub(alpha=...)`, `pow` with a known
exponent, ...) are spelled out in `patterns`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import formulas

INF = math.inf


@dataclass(frozen=True)
class Interval:
    """Closed interval that holds every non-NaN value of a tensor."""

    low: float = -INF
    high: float = INF

    def within(self, low: float, high: float) -> bool:
        return low <= self.low and self.high <= high


REALS = Interval()
UNIT = Interval(0.0, 1.0)
SIGNED_UNIT = Interval(-1.0, 1.0)
NON_NEGATIVE = Interval(0.0, INF)

RangeRule = Callable[..., Interval]


@dataclass(frozen=True)
class Op:
    """One pointwise op.

    name: opcode name. arity: tensor-valued arguments. params: names of the float constants, in
    order, with `defaults` aligned to their end. reference: `f(*args, *params)` on torch tensors
    (arguments may also be Python floats). range: maps the argument intervals and then the params
    to the interval of the result. functions, methods, modules, aten: torch's spellings whose
    arguments are `(*args, *params)` in this order; `arguments` names the tensor-valued ones.
    kernel: whether the kernel libraries have a functor of this name.
    """

    name: str
    arity: int
    reference: Callable[..., Any]
    params: tuple[str, ...] = ()
    defaults: tuple[float, ...] = ()
    arguments: tuple[str, ...] = ("input",)
    range: RangeRule | Interval = REALS
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    aten: tuple[str, ...] = ()
    kernel: bool = True

    def result_range(self, intervals: tuple[Interval, ...], params: tuple[float, ...]) -> Interval:
        """Interval of the result, given those of the arguments."""
        return self.range if isinstance(self.range, Interval) else self.range(*intervals, *params)


def _monotone(f: Callable[[float], float]) -> RangeRule:
    """Range rule of a non-decreasing op, widened by rounding at neither end."""

    def rule(x: Interval, *_: float) -> Interval:
        return Interval(f(x.low), f(x.high))

    return rule


def _clamp_range(x: Interval, low: float, high: float) -> Interval:
    clip = lambda v: min(max(v, low), high)  # noqa: E731
    return Interval(clip(x.low), clip(x.high))


def _abs_range(x: Interval) -> Interval:
    if x.low >= 0:
        return x
    return Interval(0.0 if x.high >= 0 else -x.high, max(-x.low, x.high))


def _min_range(a: Interval, b: Interval) -> Interval:
    return Interval(min(a.low, b.low), min(a.high, b.high))


def _max_range(a: Interval, b: Interval) -> Interval:
    return Interval(max(a.low, b.low), max(a.high, b.high))


def _where_range(_: Interval, a: Interval, b: Interval) -> Interval:
    return Interval(min(a.low, b.low), max(a.high, b.high))


def _unary(name: str, reference: Callable[..., Any], **rest: Any) -> Op:
    """A parameterless function torch offers as `torch.name`, `Tensor.name` and `aten.name`."""
    functions = (reference, *rest.pop("functions", ()))
    return Op(name, 1, reference, functions=functions, methods=(name,), aten=(name,), **rest)


def _activation(
    name: str, reference: Callable[..., Any], module: type[nn.Module] | None, **rest: Any
) -> Op:
    """An activation torch offers as `F.name`, as a module and as `aten.name`."""
    functions = (reference, *rest.pop("functions", ()))
    aten = rest.pop("aten", (name,))
    modules = () if module is None else (module,)
    return Op(name, 1, reference, functions=functions, modules=modules, aten=aten, **rest)


def _binary(name: str, reference: Callable[..., Any], **rest: Any) -> Op:
    return Op(name, 2, reference, arguments=("input", "other"), **rest)


def _comparison(name: str) -> Op:
    function = getattr(operator, name)
    return _binary(
        name,
        function,
        functions=(function, getattr(torch, name)),
        methods=(name,),
        aten=(name,),
        range=UNIT,
    )


def _gradient(name: str, reference: Callable[..., Any], **rest: Any) -> Op:
    """What an activation makes of an incoming gradient; needs no spelling, `vjp` emits it."""
    return Op(name, 2, reference, arguments=("grad", "input"), **rest)


_ROWS: tuple[Op, ...] = (
    Op(
        "copy",
        1,
        formulas.same,
        range=_monotone(formulas.same),
        modules=(nn.Identity,),
        aten=("alias", "clone"),
    ),
    # Dropout as it is in eval; `fused` splits the program around one that is active. `flag` is its
    # position among the call's training flags.
    Op(
        "dropout",
        1,
        formulas.same,
        params=("p", "flag"),
        range=lambda x, *_: Interval(-INF if x.low < 0 else 0.0, INF if x.high > 0 else 0.0),
        kernel=False,
    ),
    # What an in-place op leaves in its tensor: the first argument in the dtype of the second.
    Op("like", 2, formulas.like, arguments=("input", "target"), kernel=False),
    # A view that keeps the last dimension; `shape` is its position among the call's view shapes.
    Op("view", 1, formulas.same, params=("shape",), range=_monotone(formulas.same), kernel=False),
    Op(
        "cast_f32",
        1,
        formulas.cast(torch.float32),
        range=_monotone(formulas.same),
        methods=("float",),
    ),
    Op("cast_f16", 1, formulas.cast(torch.float16), methods=("half",)),
    Op("cast_bf16", 1, formulas.cast(torch.bfloat16), methods=("bfloat16",)),
    # Activations.
    _activation(
        "relu",
        F.relu,
        nn.ReLU,
        functions=(torch.relu,),
        methods=("relu",),
        range=_monotone(lambda v: max(v, 0.0)),
    ),
    _activation("relu6", F.relu6, nn.ReLU6, range=Interval(0.0, 6.0)),
    _activation(
        "leaky_relu", F.leaky_relu, nn.LeakyReLU, params=("negative_slope",), defaults=(0.01,)
    ),
    Op(
        "prelu",
        2,
        F.prelu,
        arguments=("input", "weight"),
        modules=(nn.PReLU,),
        functions=(F.prelu, torch.prelu),
        methods=("prelu",),
        aten=("prelu",),
    ),
    _activation("elu", F.elu, nn.ELU, params=("alpha",), defaults=(1.0,)),
    _activation("selu", F.selu, nn.SELU, functions=(torch.selu,)),
    _activation(
        "celu", F.celu, nn.CELU, params=("alpha",), defaults=(1.0,), functions=(torch.celu,)
    ),
    Op("gelu", 1, F.gelu),
    Op("gelu_tanh", 1, formulas.gelu_tanh),
    _activation("silu", F.silu, nn.SiLU),
    _activation("mish", F.mish, nn.Mish),
    _activation(
        "softplus",
        F.softplus,
        nn.Softplus,
        params=("beta", "threshold"),
        defaults=(1.0, 20.0),
    ),
    _activation("softsign", F.softsign, nn.Softsign, aten=(), range=SIGNED_UNIT),
    _unary(
        "sigmoid",
        torch.sigmoid,
        functions=(F.sigmoid, torch.special.expit),
        modules=(nn.Sigmoid,),
        range=UNIT,
    ),
    _activation(
        "logsigmoid", F.logsigmoid, nn.LogSigmoid, aten=("log_sigmoid",), range=Interval(-INF, 0.0)
    ),
    _activation("hardsigmoid", F.hardsigmoid, nn.Hardsigmoid, range=UNIT),
    _activation("hardswish", F.hardswish, nn.Hardswish),
    Op("clamp", 1, formulas.clamp, params=("min", "max"), defaults=(-INF, INF), range=_clamp_range),
    # A clamp to the kernels. Its gradient is another: none at the bounds.
    _activation(
        "hardtanh",
        F.hardtanh,
        nn.Hardtanh,
        params=("min_val", "max_val"),
        defaults=(-1.0, 1.0),
        range=_clamp_range,
        kernel=False,
    ),
    _activation(
        "hardshrink",
        F.hardshrink,
        nn.Hardshrink,
        params=("lambd",),
        defaults=(0.5,),
        functions=(torch.hardshrink,),
        methods=("hardshrink",),
    ),
    _activation("softshrink", F.softshrink, nn.Softshrink, params=("lambd",), defaults=(0.5,)),
    _activation("tanhshrink", F.tanhshrink, nn.Tanhshrink, aten=()),
    _activation(
        "threshold",
        F.threshold,
        nn.Threshold,
        params=("threshold", "value"),
        functions=(torch.threshold,),
    ),
    # Elementary functions.
    _unary("tanh", torch.tanh, functions=(F.tanh,), modules=(nn.Tanh,), range=SIGNED_UNIT),
    _unary("abs", torch.abs, functions=(torch.absolute, operator.abs), range=_abs_range),
    _unary(
        "neg",
        torch.neg,
        functions=(torch.negative, operator.neg),
        range=lambda x: Interval(-x.high, -x.low),
    ),
    _unary("sign", torch.sign, range=SIGNED_UNIT),
    _unary("exp", torch.exp, range=NON_NEGATIVE),
    _unary("exp2", torch.exp2, functions=(torch.special.exp2,), range=NON_NEGATIVE),
    _unary("expm1", torch.expm1, functions=(torch.special.expm1,), range=Interval(-1.0, INF)),
    _unary("log", torch.log),
    _unary("log2", torch.log2),
    _unary("log10", torch.log10),
    _unary("log1p", torch.log1p, functions=(torch.special.log1p,)),
    _unary("sqrt", torch.sqrt, range=NON_NEGATIVE),
    _unary("rsqrt", torch.rsqrt, range=NON_NEGATIVE),
    _unary("reciprocal", torch.reciprocal),
    _unary("square", torch.square, range=NON_NEGATIVE),
    _unary("sin", torch.sin, range=SIGNED_UNIT),
    _unary("cos", torch.cos, range=SIGNED_UNIT),
    _unary("erf", torch.erf, functions=(torch.special.erf,), range=SIGNED_UNIT),
    _unary("floor", torch.floor, range=_monotone(lambda v: v if math.isinf(v) else math.floor(v))),
    _unary("ceil", torch.ceil, range=_monotone(lambda v: v if math.isinf(v) else math.ceil(v))),
    # Python's round, too, takes halves to even.
    _unary("round", torch.round, range=_monotone(lambda v: v if math.isinf(v) else round(v))),
    _unary(
        "trunc",
        torch.trunc,
        functions=(torch.fix,),
        range=_monotone(lambda v: v if math.isinf(v) else math.trunc(v)),
    ),
    # Binary arithmetic; torch's spellings with alpha and rounding_mode are in `patterns`.
    _binary("add", operator.add),
    _binary("sub", operator.sub),
    _binary("mul", operator.mul),
    _binary("div", operator.truediv),
    _binary(
        "minimum",
        torch.minimum,
        functions=(torch.minimum,),
        methods=("minimum",),
        aten=("minimum",),
        range=_min_range,
    ),
    _binary(
        "maximum",
        torch.maximum,
        functions=(torch.maximum,),
        methods=("maximum",),
        aten=("maximum",),
        range=_max_range,
    ),
    _binary("pow", operator.pow),
    # Comparisons give 1.0 or 0.0 in the kernels and bool tensors in the reference.
    _comparison("eq"),
    _comparison("ne"),
    _comparison("lt"),
    _comparison("le"),
    _comparison("gt"),
    _comparison("ge"),
    # Ternary.
    Op(
        "where",
        3,
        torch.where,
        arguments=("condition", "input", "other"),
        functions=(torch.where,),
        aten=("where",),
        range=_where_range,
    ),
    Op(
        "lerp",
        3,
        torch.lerp,
        arguments=("input", "end", "weight"),
        functions=(torch.lerp,),
        methods=("lerp",),
        aten=("lerp",),
    ),
    # torch's GroupNorm of a matrix [M, N], whose channels are columns; weight and bias are 1 and 0
    # where it has none. The kernels know its parts, over groups of adjacent columns.
    Op(
        "group_norm",
        3,
        formulas.group_norm,
        params=("groups", "eps"),
        arguments=("input", "weight", "bias"),
        kernel=False,
    ),
    Op("normalize", 1, formulas.normalize, params=("groups", "eps")),
    Op("group_mean", 1, formulas.group_mean, params=("groups",)),
    _gradient("normalize_grad", formulas.normalize_grad, params=("groups", "eps")),
    # Gradients that would be long, or less accurate, as several instructions.
    _gradient("gelu_grad", formulas.gelu_grad("none")),
    _gradient("gelu_tanh_grad", formulas.gelu_grad("tanh")),
    _gradient("silu_grad", formulas.matched(formulas.silu_grad)),
    # Of these two the second argument is the result of the op they differentiate.
    _gradient("tanh_grad", formulas.matched(torch.ops.aten.tanh_backward)),
    _gradient("sigmoid_grad", formulas.matched(torch.ops.aten.sigmoid_backward)),
    _gradient(
        "hardtanh_grad",
        formulas.hardtanh_grad,
        params=("min_val", "max_val"),
        defaults=(-1.0, 1.0),
    ),
    _gradient("clamp_grad", formulas.clamp_grad, params=("min", "max"), defaults=(-INF, INF)),
    _gradient("threshold_grad", formulas.threshold_grad, params=("threshold",), defaults=(0.0,)),
)

OPS: dict[str, Op] = {op.name: op for op in _ROWS}
KERNEL_OPS: tuple[str, ...] = tuple(op.name for op in _ROWS if op.kernel)
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
COMMUTATIVE = frozenset({"add", "mul", "minimum", "maximum", "eq", "ne"})
CASTS = frozenset({"cast_f32", "cast_f16", "cast_bf16"})
# An element of their result depends on a group of columns; the number of groups is their first
# parameter, in whose place the kernels take the width of one.
GROUP_OPS = frozenset({"group_norm", "normalize", "group_mean", "normalize_grad"})
GROUP_WIDTHS = (8, 16, 32, 64, 128)  # which all kernels take
# Of truth values these give truth values, and the kernels' 1.0 and 0.0 agree.
TRUTH_KEEPING = frozenset({"copy", "view", "where", "mul", "minimum", "maximum"})
