"""How each op of the table is differentiated: one row per op, one rule per tensor argument.

A rule maps the incoming gradient `g`, the op's arguments, its result `y` and its parameters, in
this order, to the gradient of one argument. It computes with the ops of the table, so the result
can be differentiated in turn. Formulas are torch's own (its derivatives.yaml), because the values
at kinks, infinities and NaN are part of them: `threshold_grad` passes a gradient where its argument
is NaN, `clamp_grad` does not. Torch's CPU kernels disagree on NaN with themselves, where one is
vectorised; then the scalar one counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .program import Arg, Builder, Value

_SELU_SCALE = 1.0507009873554805
_SELU_SCALE_ALPHA = 1.7580993408473766
_DENSITY_AT_ZERO = 1 / math.sqrt(2 * math.pi)
_TWO_BETA = 2 * math.sqrt(2 / math.pi)  # gelu_tanh(x) = x sigmoid(_TWO_BETA x + _CUBIC x^3)
_CUBIC = 0.044715 * _TWO_BETA


@dataclass(frozen=True)
class Term:
    """An argument, with arithmetic that appends instructions to the builder's.

    shape: which of the call's views a value is shaped as, counting the accumulator's own shape as
    one more view; None for operands, and values of nothing but operands.
    """

    builder: Builder
    arg: Arg
    shape: int | None = None

    def emit(self, op: str, *args: Operandlike, params: tuple[float, ...] = ()) -> Term:
        """The result of an op, this term being one of its arguments or not."""
        plain = [a.arg if isinstance(a, Term) else float(a) for a in args]
        return Term(self.builder, self.builder.emit(op, *plain, params=params))

    def __add__(self, other: Operandlike) -> Term:
        if isinstance(other, Term) and isinstance(other.arg, Value) and other.arg.index:
            last = self.builder.instructions[other.arg.index - 1]
            if last.op == "neg":
                return self.emit("sub", self, Term(self.builder, last.args[0]))
        return self.emit("add", self, other)

    def __sub__(self, other: Operandlike) -> Term:
        return self.emit("sub", self, other)

    def __rsub__(self, other: float) -> Term:
        return self.emit("sub", other, self)

    def __mul__(self, other: Operandlike) -> Term:
        return self if other == 1.0 else self.emit("mul", self, other)

    def __truediv__(self, other: Operandlike) -> Term:
        return self.emit("div", self, other)

    def __neg__(self) -> Term:
        return self.emit("neg", self)


Operandlike = Term | float
Rule = Callable[..., "Term | None"]


def _where(condition: Term, a: Operandlike, b: Operandlike) -> Term:
    return condition.emit("where", condition, a, b)


def _exp(x: Term) -> Term:
    return x.emit("exp", x)


def _square(x: Term) -> Term:
    return x.emit("square", x)


def _sigmoid(x: Term) -> Term:
    return x.emit("sigmoid", x)


def _compared(op: str, a: Operandlike, b: Operandlike) -> Term:
    term = a if isinstance(a, Term) else b
    assert isinstance(term, Term)
    return term.emit(op, a, b)


def _above(g: Term, x: Term, limit: float) -> Term:
    """g where x is above the limit, or NaN."""
    return g.emit("threshold_grad", g, x, params=(limit,))


def _inside(g: Term, x: Term, low: float, high: float) -> Term:
    """g where x lies between the bounds but on neither, or is NaN."""
    return g.emit("hardtanh_grad", g, x, params=(low, high))


def _in_dtype_of(g: Term, x: Term) -> Term:
    """g in the dtype of x; at least as wide, where x has not its shape."""
    return g.emit("cast_f32", g) if x.shape is None else g.emit("like", g, x)


def _of_elu(g: Term, x: Term, left: Term, right: Term) -> Term:
    return _where(_compared("le", x, 0.0), left, right)


def _of_mish(g: Term, x: Term, y: Term) -> Term:
    t = x.emit("softplus", x, params=(1.0, 20.0))
    t = t.emit("tanh", t)
    return g * (t + x * _sigmoid(x) * (1.0 - _square(t)))


def _of_softplus(g: Term, x: Term, y: Term, beta: float, threshold: float) -> Term:
    scaled = x * beta
    return _where(_compared("gt", scaled, threshold), g, g * _sigmoid(scaled))


def _of_softsign(g: Term, x: Term, y: Term) -> Term:
    return g / (x.emit("abs", x) + 1.0) * (1.0 - y.emit("abs", y))


def _of_hardsigmoid(g: Term, x: Term, y: Term) -> Term:
    return _where(_compared("lt", x.emit("abs", x), 3.0), g * (1 / 6), 0.0)


def _of_hardswish(g: Term, x: Term, y: Term) -> Term:
    middle = g * (x / 3.0 + 0.5)
    return _where(_compared("lt", x, 3.0), _above(middle, x, -3.0), g)


def _of_clamp(g: Term, x: Term, y: Term, low: float, high: float) -> Term:
    if (low, high) == (-math.inf, math.inf):
        return g
    return g.emit("clamp_grad", g, x, params=(low, high))


def _of_shrink(g: Term, x: Term, y: Term, lambd: float) -> Term:
    return g if lambd < 0 else _where(_compared("eq", y, 0.0), 0.0, g)


def _of_erf(g: Term, x: Term, y: Term) -> Term:
    return _exp(-_square(x)) * (2 / math.sqrt(math.pi)) * g


def _of_extreme(g: Term, x: Operandlike, other: Operandlike, loses: str) -> Term:
    """Nothing where x `loses` against the other, half of g in a tie, g elsewhere and at NaN."""
    shared = _where(_compared("eq", x, other), g * 0.5, g)
    return _where(_compared(loses, x, other), 0.0, shared)


def _of_base(g: Term, x: Term, exponent: Operandlike, y: Term) -> Term | None:
    if isinstance(exponent, float):
        if exponent == 0.0:
            return None
        return g * (x.emit("pow", x, exponent - 1.0) * exponent)
    slope = x.emit("pow", x, exponent - 1.0) * exponent
    return _where(_compared("eq", exponent, 0.0), 0.0, g * slope)


def _of_exponent(g: Term, x: Operandlike, exponent: Term, y: Term) -> Term:
    if isinstance(x, float):
        log = math.log(x) if x > 0 else -math.inf if x == 0 else math.nan
        slope, at_zero = y * log, None if x else _compared("ge", exponent, 0.0)
    else:
        slope = y * x.emit("log", x)
        at_zero = _compared("eq", x, 0.0) * _compared("ge", exponent, 0.0)
    return g * (slope if at_zero is None else _where(at_zero, 0.0, slope))


def _of_gelu_grad(g: Term, grad: Term, x: Term, y: Term) -> Term:
    u = _square(x)
    return g * grad * ((2.0 - u) * (_exp(u * -0.5) * _DENSITY_AT_ZERO))


def _of_gelu_tanh_grad(g: Term, grad: Term, x: Term, y: Term) -> Term:
    # x s(v), v' = slope: s r (2 v' + x (d v'^2 + v'')) with r = 1 - s and d = r - s. Written so
    # that four slots are enough.
    u = _square(x)
    v = (u * _CUBIC + _TWO_BETA) * x
    half = v * -0.5
    d = half.emit("tanh", half)
    slope = u * (3 * _CUBIC) + _TWO_BETA
    bend = d * _square(slope) + x * (6 * _CUBIC)
    return g * grad * (_sigmoid(v) * _sigmoid(-v) * (slope * 2.0 + x * bend))


def _of_silu_grad(g: Term, grad: Term, x: Term, y: Term) -> Term:
    s, r = _sigmoid(x), _sigmoid(-x)
    return g * grad * (s * r * (x * (r - s) + 2.0))


def _of_normalize(g: Term, x: Term, params: tuple[float, ...]) -> Term:
    return g.emit("normalize_grad", g, x, params=params)


def _of_normalize_grad(g: Term, grad: Term, x: Term, params: tuple[float, ...]) -> Term:
    """Of r (grad - mean(grad) - y mean(grad y)), where y is x normalized and r its factor.

    With a = mean(g y), b = mean(grad y), c = mean(g (grad - mean(grad))) it is r^2 times

        y (3 a b - c) - g b - grad a,    less the mean of that.
    """
    groups, eps = params

    def mean(t: Term) -> Term:
        return t.emit("group_mean", t, params=(groups,))

    y = x.emit("normalize", x, params=params)
    a, b, c = mean(g * y), mean(grad * y), mean((grad - mean(grad)) * g)
    inner = y * (a * b * 3.0 - c) - g * b - grad * a
    variance = mean(_square(x - mean(x))) + eps
    return (inner - mean(inner)) / variance


_FLAT: tuple[Rule | None, ...] = (None, None)

# None: no gradient reaches the argument; where it is zero everywhere, too.
DERIVATIVES: dict[str, tuple[Rule | None, ...]] = {
    "copy": (lambda g, x, y: g,),
    # One that is active never reaches a program: `fused` ends the program before it.
    "dropout": (lambda g, x, y, p, flag: g,),
    "like": (lambda g, x, target, y: _in_dtype_of(g, x), None),
    "view": (lambda g, x, y, shape: g.emit("view", g, params=(x.shape,)),),
    "cast_f32": (lambda g, x, y: _in_dtype_of(g, x),),
    "cast_f16": (lambda g, x, y: _in_dtype_of(g.emit("cast_f16", g), x),),
    "cast_bf16": (lambda g, x, y: _in_dtype_of(g.emit("cast_bf16", g), x),),
    # Activations.
    "relu": (lambda g, x, y: _above(g, x, 0.0),),
    "relu6": (lambda g, x, y: _inside(g, x, 0.0, 6.0),),
    "leaky_relu": (lambda g, x, y, slope: _where(_compared("gt", x, 0.0), g, g * slope),),
    "prelu": (
        lambda g, x, w, y: _where(_compared("gt", x, 0.0), g, g * w),
        lambda g, x, w, y: _where(_compared("gt", x, 0.0), 0.0, g * x),
    ),
    "elu": (lambda g, x, y, alpha: _of_elu(g, x, g * (_exp(x) * alpha), g),),
    "selu": (lambda g, x, y: _of_elu(g, x, g * (_exp(x) * _SELU_SCALE_ALPHA), g * _SELU_SCALE),),
    "celu": (lambda g, x, y, alpha: _of_elu(g, x, g * _exp(x / alpha), g),),
    "gelu": (lambda g, x, y: g.emit("gelu_grad", g, x),),
    "gelu_tanh": (lambda g, x, y: g.emit("gelu_tanh_grad", g, x),),
    "silu": (lambda g, x, y: g.emit("silu_grad", g, x),),
    "mish": (_of_mish,),
    "softplus": (_of_softplus,),
    "softsign": (_of_softsign,),
    "sigmoid": (lambda g, x, y: g.emit("sigmoid_grad", g, y),),
    "logsigmoid": (lambda g, x, y: g * _sigmoid(-x),),
    "hardsigmoid": (_of_hardsigmoid,),
    "hardswish": (_of_hardswish,),
    "clamp": (_of_clamp,),
    "hardtanh": (lambda g, x, y, low, high: _inside(g, x, low, high),),
    "hardshrink": (_of_shrink,),
    "softshrink": (_of_shrink,),
    "tanhshrink": (lambda g, x, y: g * _square(x.emit("tanh", x)),),
    "threshold": (lambda g, x, y, limit, value: _above(g, x, limit),),
    # Elementary functions.
    "tanh": (lambda g, x, y: g.emit("tanh_grad", g, y),),
    "abs": (lambda g, x, y: g * x.emit("sign", x),),
    "neg": (lambda g, x, y: -g,),
    "sign": (None,),
    "exp": (lambda g, x, y: g * y,),
    "exp2": (lambda g, x, y: g * y * math.log(2),),
    "expm1": (lambda g, x, y: g * (y + 1.0),),
    "log": (lambda g, x, y: g / x,),
    "log2": (lambda g, x, y: g / (x * math.log(2)),),
    "log10": (lambda g, x, y: g / (x * math.log(10)),),
    "log1p": (lambda g, x, y: g / (x + 1.0),),
    "sqrt": (lambda g, x, y: g / (y * 2.0),),
    "rsqrt": (lambda g, x, y: g * (_square(y) * y * -0.5),),
    "reciprocal": (lambda g, x, y: -(g * _square(y)),),
    "square": (lambda g, x, y: g * (x * 2.0),),
    "sin": (lambda g, x, y: g * x.emit("cos", x),),
    "cos": (lambda g, x, y: -(g * x.emit("sin", x)),),
    "erf": (_of_erf,),
    "floor": (None,),
    "ceil": (None,),
    "round": (None,),
    "trunc": (None,),
    # Binary arithmetic.
    "add": (lambda g, a, b, y: g, lambda g, a, b, y: g),
    "sub": (lambda g, a, b, y: g, lambda g, a, b, y: -g),
    "mul": (lambda g, a, b, y: g * b, lambda g, a, b, y: g * a),
    "div": (lambda g, a, b, y: g / b, lambda g, a, b, y: -(g * (y / b))),
    "minimum": (
        lambda g, a, b, y: _of_extreme(g, a, b, "gt"),
        lambda g, a, b, y: _of_extreme(g, b, a, "gt"),
    ),
    "maximum": (
        lambda g, a, b, y: _of_extreme(g, a, b, "lt"),
        lambda g, a, b, y: _of_extreme(g, b, a, "lt"),
    ),
    "pow": (_of_base, _of_exponent),
    "eq": _FLAT,
    "ne": _FLAT,
    "lt": _FLAT,
    "le": _FLAT,
    "gt": _FLAT,
    "ge": _FLAT,
    # Ternary.
    "where": (
        None,
        lambda g, c, a, b, y: _where(c, g, 0.0),
        lambda g, c, a, b, y: _where(c, 0.0, g),
    ),
    "lerp": (
        lambda g, a, b, w, y: g * (1.0 - w),
        lambda g, a, b, w, y: g * w,
        lambda g, a, b, w, y: g * (b - a),
    ),
    # Norms, over groups of columns.
    "group_norm": (
        lambda g, x, w, b, y, *params: _of_normalize(g * w, x, params),
        lambda g, x, w, b, y, *params: g * x.emit("normalize", x, params=params),
        lambda g, x, w, b, y, *params: g,
    ),
    "normalize": (lambda g, x, y, *params: _of_normalize(g, x, params),),
    "group_mean": (lambda g, x, y, groups: g.emit("group_mean", g, params=(groups,)),),
    "normalize_grad": (
        lambda g, grad, x, y, *params: _of_normalize(g, x, params),
        lambda g, grad, x, y, *params: _of_normalize_grad(g, grad, x, params),
    ),
    # Gradients: linear in the gradient they take.
    "gelu_grad": (lambda g, grad, x, y: g.emit("gelu_grad", g, x), _of_gelu_grad),
    "gelu_tanh_grad": (lambda g, grad, x, y: g.emit("gelu_tanh_grad", g, x), _of_gelu_tanh_grad),
    "silu_grad": (lambda g, grad, x, y: g.emit("silu_grad", g, x), _of_silu_grad),
    "tanh_grad": (
        lambda g, grad, y, r: g.emit("tanh_grad", g, y),
        lambda g, grad, y, r: g * grad * (y * -2.0),
    ),
    "sigmoid_grad": (
        lambda g, grad, y, r: g.emit("sigmoid_grad", g, y),
        lambda g, grad, y, r: g * grad * (1.0 - y * 2.0),
    ),
    "hardtanh_grad": (lambda g, grad, x, y, low, high: _inside(g, x, low, high), None),
    "clamp_grad": (lambda g, grad, x, y, low, high: _of_clamp(g, x, y, low, high), None),
    "threshold_grad": (lambda g, grad, x, y, limit: _above(g, x, limit), None),
}


def result_serves(op: str, params: tuple[float, ...]) -> bool:
    """Whether an op's rules give the same with its result in place of its argument."""
    return op in ("relu", "relu6", "hardtanh") or (op == "leaky_relu" and params[0] >= 0)
