"""How torch spells pointwise ops, each spelling read as program instructions.

Plain spellings come from the op table; the ones that need more than a renaming are written out
here. `Unsupported` carries the reason a call cannot be read.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx, nn

from .ops import OPS, Op
from .program import Arg, Value


class Unsupported(Exception):
    """Why a call cannot become program instructions; caught by the matcher."""


@dataclass(frozen=True)
class Attribute:
    """A tensor the model holds under a dotted name, e.g. the weight of an nn.PReLU."""

    path: str


class Emitter(Protocol):
    """What a spelling needs from the matcher while it is read."""

    def tensor(self, argument: Any) -> Arg:
        """A node or number as an instruction argument."""

    def emit(self, op: str, *args: Arg, params: tuple[float, ...] = ()) -> Value:
        """Append an instruction."""


Arguments = Mapping[str, Any]
Emit = Callable[[Emitter, Arguments], Value]


@dataclass(frozen=True)
class Signature:
    """Parameter names in order; those in `defaults` may be left out."""

    names: tuple[str, ...]
    defaults: Mapping[str, Any]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name. Raises Unsupported on any the signature does not know."""
        renamed = {"input" if k == "self" else k: v for k, v in kwargs.items()}
        unknown = [k for k in renamed if k not in self.names]
        if len(args) > len(self.names) or unknown:
            what = f"argument {unknown[0]!r}" if unknown else f"{len(args)} arguments"
            raise Unsupported(f"{what} not understood")
        bound = dict(self.defaults) | dict(zip(self.names, args, strict=False)) | renamed
        missing = [n for n in self.names if n not in bound]
        if missing:
            raise Unsupported(f"argument {missing[0]!r} is missing")
        return bound


@dataclass(frozen=True)
class Spelling:
    """How one family of torch callables is read."""

    name: str
    signature: Signature
    emit: Emit


def number(arguments: Arguments, name: str) -> float:
    """A constant parameter. Raises Unsupported where it is computed by the model, or NaN."""
    value = arguments[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise Unsupported(f"{name}={value} is not a constant number")
    return float(value)


def _signature(text: str, **defaults: Any) -> Signature:
    names = tuple(text.split())
    return Signature((*names, *(k for k in defaults if k not in names)), defaults)


def _table_spelling(op: Op) -> Spelling:
    """The spelling of a table row: its arguments, then its params."""

    def emit(to: Emitter, a: Arguments) -> Value:
        params = tuple(number(a, p) for p in op.params)
        return to.emit(op.name, *(to.tensor(a[n]) for n in op.arguments), params=params)

    required = op.params[: len(op.params) - len(op.defaults)]
    defaults = dict(zip(op.params[len(required) :], op.defaults, strict=True))
    return Spelling(op.name, _signature(" ".join((*op.arguments, *required)), **defaults), emit)


def _scaled(to: Emitter, value: Any, alpha: Any) -> Arg:
    """`alpha * value`, where alpha is not 1."""
    argument = to.tensor(value)
    if alpha == 1:
        return argument
    scale = number({"alpha": alpha}, "alpha")
    return argument * scale if isinstance(argument, float) else to.emit("mul", argument, scale)


def _emit_add(to: Emitter, a: Arguments) -> Value:
    return to.emit("add", to.tensor(a["input"]), _scaled(to, a["other"], a["alpha"]))


def _emit_sub(to: Emitter, a: Arguments) -> Value:
    return to.emit("sub", to.tensor(a["input"]), _scaled(to, a["other"], a["alpha"]))


def _emit_rsub(to: Emitter, a: Arguments) -> Value:
    return to.emit("sub", to.tensor(a["other"]), _scaled(to, a["input"], a["alpha"]))


def _emit_mul(to: Emitter, a: Arguments) -> Value:
    return to.emit("mul", to.tensor(a["input"]), to.tensor(a["other"]))


def _emit_div(to: Emitter, a: Arguments) -> Value:
    if a["rounding_mode"] is not None:
        raise Unsupported(f"rounding_mode={a['rounding_mode']!r}")
    return to.emit("div", to.tensor(a["input"]), to.tensor(a["other"]))


def _emit_pow(to: Emitter, a: Arguments) -> Value:
    base, exponent = to.tensor(a["input"]), to.tensor(a["exponent"])
    # The cases torch itself computes without a general power.
    match exponent:
        case 1.0:
            return to.emit("copy", base)
        case 2.0:
            return to.emit("square", base)
        case 3.0:
            return to.emit("mul", to.emit("square", base), base)
        case 0.5:
            return to.emit("sqrt", base)
        case -0.5:
            return to.emit("rsqrt", base)
        case -1.0:
            return to.emit("reciprocal", base)
        case -2.0:
            return to.emit("reciprocal", to.emit("square", base))
    return to.emit("pow", base, exponent)


def _emit_gelu(to: Emitter, a: Arguments) -> Value:
    forms = {"none": "gelu", "tanh": "gelu_tanh"}
    if a["approximate"] not in forms:
        raise Unsupported(f"gelu: approximate={a['approximate']!r}")
    return to.emit(forms[a["approximate"]], to.tensor(a["input"]))


def _emit_clamp(to: Emitter, a: Arguments) -> Value:
    """Constant bounds are parameters; tensor bounds are a maximum, then a minimum."""
    low, high = a["min"], a["max"]
    if low is None and high is None:
        raise Unsupported("clamp without bounds")
    value = to.tensor(a["input"])
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        if low is not None:
            value = to.emit("maximum", value, to.tensor(low))
        return to.emit("minimum", value, to.tensor(high)) if high is not None else _value(value)
    bounds = {"min": -math.inf if low is None else low, "max": math.inf if high is None else high}
    return to.emit("clamp", value, params=(number(bounds, "min"), number(bounds, "max")))


def _value(argument: Arg) -> Value:
    assert isinstance(argument, Value)
    return argument


def _emit_addcmul(to: Emitter, a: Arguments) -> Value:
    first, scale = to.tensor(a["tensor1"]), number(a, "value")
    if scale != 1:  # in torch's order, which decides what overflows
        first = to.emit("mul", first, scale)
    product = to.emit("mul", first, to.tensor(a["tensor2"]))
    return to.emit("add", to.tensor(a["input"]), product)


def _emit_addcdiv(to: Emitter, a: Arguments) -> Value:
    numerator, scale = to.tensor(a["tensor1"]), number(a, "value")
    if scale != 1:
        numerator = to.emit("mul", numerator, scale)
    quotient = to.emit("div", numerator, to.tensor(a["tensor2"]))
    return to.emit("add", to.tensor(a["input"]), quotient)


def _emit_masked_fill(to: Emitter, a: Arguments) -> Value:
    return to.emit("where", to.tensor(a["mask"]), to.tensor(a["value"]), to.tensor(a["input"]))


def _emit_where_method(to: Emitter, a: Arguments) -> Value:
    return to.emit("where", to.tensor(a["condition"]), to.tensor(a["input"]), to.tensor(a["other"]))


def _emit_round(to: Emitter, a: Arguments) -> Value:
    if a["decimals"] != 0:
        raise Unsupported(f"round: decimals={a['decimals']}")
    return to.emit("round", to.tensor(a["input"]))


_CASTS = {
    torch.float32: "cast_f32",
    torch.float16: "cast_f16",
    torch.bfloat16: "cast_bf16",
}


def _emit_to(to: Emitter, a: Arguments) -> Value:
    dtype = a["dtype"]
    if dtype not in _CASTS:
        raise Unsupported(f"conversion to {dtype}")
    return to.emit(_CASTS[dtype], to.tensor(a["input"]))


def _emit_copy(to: Emitter, a: Arguments) -> Value:
    return to.emit("copy", to.tensor(a["input"]))


def _emit_group_norm(to: Emitter, a: Arguments) -> Value:
    x = to.tensor(a["input"])
    if not isinstance(x, Value):
        raise Unsupported("it normalizes a tensor from outside the group")
    weight = 1.0 if a["weight"] is None else to.tensor(a["weight"])
    bias = 0.0 if a["bias"] is None else to.tensor(a["bias"])
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise Unsupported("its weight and bias are computed in the group")
    params = number(a, "num_groups"), number(a, "eps")
    return to.emit("group_norm", x, weight, bias, params=params)


_CLAMP = _signature("input", min=None, max=None)
_ADDC = _signature("input tensor1 tensor2", value=1)

_CUSTOM: dict[str, Spelling] = {
    s.name: s
    for s in (
        Spelling("add", _signature("input other", alpha=1), _emit_add),
        Spelling("sub", _signature("input other", alpha=1), _emit_sub),
        Spelling("rsub", _signature("input other", alpha=1), _emit_rsub),
        Spelling("mul", _signature("input other"), _emit_mul),
        Spelling("div", _signature("input other", rounding_mode=None), _emit_div),
        Spelling("pow", _signature("input exponent"), _emit_pow),
        Spelling("gelu", _signature("input", approximate="none"), _emit_gelu),
        Spelling("clamp", _CLAMP, _emit_clamp),
        Spelling("clamp_min", _signature("input min", max=None), _emit_clamp),
        Spelling("clamp_max", _signature("input max", min=None), _emit_clamp),
        Spelling("addcmul", _ADDC, _emit_addcmul),
        Spelling("addcdiv", _ADDC, _emit_addcdiv),
        Spelling("masked_fill", _signature("input mask value"), _emit_masked_fill),
        Spelling("where_method", _signature("input condition other"), _emit_where_method),
        Spelling("round", _signature("input", decimals=0), _emit_round),
        Spelling(
            "group_norm",
            _signature("input num_groups", weight=None, bias=None, eps=1e-5, cudnn_enabled=True),
            _emit_group_norm,
        ),
        Spelling("to", _signature("input dtype"), _emit_to),
        Spelling("contiguous", _signature("input", memory_format=None), _emit_copy),
    )
}

_CUSTOM_FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "add": (operator.add, torch.add),
    "sub": (operator.sub, torch.sub, torch.subtract),
    "rsub": (torch.rsub,),
    "mul": (operator.mul, torch.mul, torch.multiply),
    "div": (operator.truediv, torch.div, torch.divide, torch.true_divide),
    "pow": (operator.pow, torch.pow),
    "gelu": (F.gelu,),
    "clamp": (torch.clamp, torch.clip),
    "clamp_min": (torch.clamp_min,),
    "clamp_max": (torch.clamp_max,),
    "addcmul": (torch.addcmul,),
    "addcdiv": (torch.addcdiv,),
    "masked_fill": (torch.masked_fill,),
    "round": (torch.round,),
    "group_norm": (F.group_norm, torch.group_norm),
}

# In-place functions; methods and aten ops that work in place end in an underscore.
IN_PLACE_FUNCTIONS: dict[Callable[..., Any], str] = {
    operator.iadd: "add",
    operator.isub: "sub",
    operator.imul: "mul",
    operator.itruediv: "div",
    operator.ipow: "pow",
}

_CUSTOM_METHODS: dict[str, str] = {
    "add": "add",
    "sub": "sub",
    "subtract": "sub",
    "mul": "mul",
    "multiply": "mul",
    "div": "div",
    "divide": "div",
    "true_divide": "div",
    "pow": "pow",
    "clamp": "clamp",
    "clip": "clamp",
    "clamp_min": "clamp_min",
    "clamp_max": "clamp_max",
    "addcmul": "addcmul",
    "addcdiv": "addcdiv",
    "masked_fill": "masked_fill",
    "where": "where_method",
    "round": "round",
    "to": "to",
    "type": "to",
    "contiguous": "contiguous",
    "clone": "contiguous",
    "absolute": "abs",
    "negative": "neg",
    "fix": "trunc",
}

_CUSTOM_MODULES: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.GroupNorm: "group_norm"}
_CUSTOM_ATEN: tuple[str, ...] = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "gelu",
    "clamp",
    "clamp_min",
)
_CUSTOM_ATEN += ("clamp_max", "addcmul", "addcdiv", "masked_fill", "round", "group_norm")


@functools.lru_cache(maxsize=1)
def tables() -> tuple[dict[Any, Spelling], dict[str, Spelling], dict[type, Spelling], dict]:
    """Spellings by function, method name, module type and aten name."""
    functions: dict[Any, Spelling] = {}
    methods: dict[str, Spelling] = {}
    modules: dict[type, Spelling] = {}
    aten: dict[str, Spelling] = {}
    for op in OPS.values():
        spelling = _CUSTOM.get(op.name) or _table_spelling(op)
        functions.update(dict.fromkeys(op.functions, spelling))
        methods.update(dict.fromkeys(op.methods, spelling))
        modules.update(dict.fromkeys(op.modules, spelling))
        aten.update(dict.fromkeys(op.aten, spelling))
    every = {name: _table_spelling(op) for name, op in OPS.items()} | _CUSTOM
    for name, group in _CUSTOM_FUNCTIONS.items():
        functions.update(dict.fromkeys(group, _CUSTOM[name]))
    functions.update({f: _CUSTOM[name] for f, name in IN_PLACE_FUNCTIONS.items()})
    methods.update({m: every[name] for m, name in _CUSTOM_METHODS.items()})
    modules.update({m: _CUSTOM[name] for m, name in _CUSTOM_MODULES.items()})
    aten.update({name: _CUSTOM[name] for name in _CUSTOM_ATEN})
    return functions, methods, modules, aten
