"""The fused call: what an optimised graph runs in place of a Linear and the work after it.

`fused_linear` and `fused_pointwise` are the nodes of an optimised graph. On plain tensors they go
straight to a recipe (see `recipes`), under autograd through one autograd function, while tracing
and compiling through the torch ops of `torch_ops`. Where torch's own semantics reach into a call
(function transforms, tensor subclasses, autocast, an active dropout, export by tracing) the same
program runs on torch ops, and the report says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import autograd, recipes, reference, torch_ops
from .infer import infer
from .program import BARE, Arg, Operand, Program, Value, parse
from .recipes import Static, View, backwards_taken, note, routes_taken
from .routes import forced_route

_PLAIN = torch_ops.PLAIN
_FREE_OPS = frozenset({"copy", "view", "dropout"})
# Function modes that change nothing: they place new tensors, or note what make_fx records.
_HARMLESS_MODES = frozenset({"torch.utils._device", "torch.fx.experimental.proxy_tensor"})
# Told of every call on fake tensors; how the report learns shapes without running the model.
OBSERVERS: list[Callable[..., None]] = []


def _never() -> bool:
    return False


_C = torch._C
# torch.compiler has it from 2.3 on.
_compiling = getattr(torch.compiler, "is_compiling", torch._utils.is_compiling)
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch_ops.dispatch_modes
_function_modes = getattr(_C, "_len_torch_function_stack", _never)
_transforms = getattr(_C, "_are_functorch_transforms_active", _never)
_tracing = getattr(_C, "_get_tracing_state", _never)
_autocast = torch_ops.any_autocast
_forward_ad = torch.autograd.forward_ad


def _compiled_in_transform() -> bool:
    """`_transforms`, while torch.compile traces: Dynamo cannot trace that before torch 2.3."""
    return bool(_transforms())


_compiled_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    program: str,
    transposed: bool = False,
    dropout: Sequence[bool] = (),
    views: Sequence[View] = (),
    site: str = "",
) -> Any:
    """`program(x @ weight^T + bias, operands)`, as one tensor or a tuple of several.

    x: [..., K]. weight: [N, K], or [K, N] where `transposed`. bias: [N] or None. operands: tensors
    that broadcast against [..., N]. program: canonical text, see `program`. dropout: the training
    flag of each dropout in the program. views: the shape of each view. site: where the model does
    this, for messages and the report. Raises OperandShapeError where an operand does not
    broadcast, or x and weight do not fit.
    """
    return _call(x, weight, bias, operands, Static(program, transposed, dropout, views, site))


def fused_pointwise(
    x: torch.Tensor,
    operands: Sequence[torch.Tensor],
    program: str,
    dropout: Sequence[bool] = (),
    views: Sequence[View] = (),
    site: str = "",
) -> Any:
    """`program(x, operands)` over x [..., N]; otherwise as `fused_linear`."""
    return _call(x, None, None, operands, Static(program, False, dropout, views, site))


def unfused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool = False,
    site: str = "",
) -> torch.Tensor:
    """`x @ weight^T + bias`: a Linear that nothing is fused with. Arguments as of `fused_linear`.

    fp32 on CUDA is served as a fused call is, for our products of fp32 are faster than cuBLAS's;
    everything else is torch's own op.
    """
    if _compiling() or type(x) not in _PLAIN or not x.is_cuda or x.dtype != torch.float32:
        return reference.linear(x, weight, bias, transposed)
    return _call(x, weight, bias, (), Static(BARE, transposed, (), (), site))


def _call(x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static) -> Any:
    serve: Callable[..., Any]
    if _compiling():
        if _compiled_in_transform() or not all(isinstance(o, torch.Tensor) for o in operands):
            serve = torch_ops.by_reference
        else:
            serve = _staged if any(static.dropout) else torch_ops.dispatch
    else:
        plain = type(x) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN
        for operand in operands:
            plain = plain and type(operand) in _PLAIN
        if (
            not plain
            or _function_modes()
            or _dispatch_modes()
            or _transforms()
            or _autocast()
            or _tracing() is not None
            or _forward_ad._current_level >= 0
        ):
            serve = _unusual
        else:
            serve = _plain
    outputs = serve(x, weight, bias, operands, static)
    if isinstance(outputs, torch.fx.Proxy):
        return outputs
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    static: Static,
) -> Sequence[torch.Tensor]:
    """Plain tensors, and nobody who watches."""
    if static.dropout and any(static.dropout):
        return _staged(x, weight, bias, operands, static)
    if _grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or any(operand.requires_grad for operand in operands)
    ):
        return autograd.differentiable(x, weight, bias, operands, static)
    return recipes.run(x, weight, bias, operands, static)


def _unusual(x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static) -> Any:
    """A call on other tensors, or under a mode that changes or watches what torch does."""
    tensors = [t for t in (x, weight, bias, *operands) if t is not None]
    if any(isinstance(t, torch.fx.Proxy) for t in tensors):
        return _record(x, weight, bias, operands, static)
    if any(isinstance(o, (int, float)) for o in operands):
        return _with_numbers(x, weight, bias, operands, static)
    reason = _left_to_torch(tensors)
    if reason is not None:
        note(static, "reference", reason)
        return torch_ops.by_reference(x, weight, bias, operands, static)
    if any(static.dropout):
        return _staged(x, weight, bias, operands, static)
    if OBSERVERS and isinstance(x, FakeTensor):
        return _observe(x, weight, bias, operands, static)
    if _dispatch_modes() or any(isinstance(t, FakeTensor) for t in tensors):
        return torch_ops.dispatch(x, weight, bias, operands, static)
    return _plain(x, weight, bias, operands, static)


def _with_numbers(x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static) -> Any:
    """A call in which some operands are Python numbers: they become constants of the program."""
    numbers = tuple((i, float(o)) for i, o in enumerate(operands) if isinstance(o, (int, float)))
    rest = [o for o in operands if not isinstance(o, (int, float))]
    bound = static._replace(program=_bound(static.program, numbers))
    found = _call(x, weight, bias, rest, bound)
    for route, reason in routes_taken(bound.site, bound.program):
        note(static, route, reason)
    return found if isinstance(found, tuple) else (found,)


@functools.lru_cache(maxsize=1024)
def _bound(text: str, numbers: tuple[tuple[int, float], ...]) -> str:
    """A program with some operands replaced by numbers, and the others numbered anew."""
    program, known = parse(text), dict(numbers)
    kept = [i for i in range(program.operand_count) if i not in known]
    place: dict[Operand, Arg] = {Operand(i): Operand(n) for n, i in enumerate(kept)}
    place |= {Operand(i): value for i, value in known.items()}
    instructions = tuple(
        replace(i, args=tuple(place[a] if isinstance(a, Operand) else a for a in i.args))
        for i in program.instructions
    )
    return str(Program(instructions, program.outputs, len(kept)))


def _left_to_torch(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why a call runs on torch's own ops, where it must."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN and not isinstance(tensor, FakeTensor):
            return f"a tensor is a {type(tensor).__name__}"
    if _function_modes():
        for mode in torch.overrides._get_current_function_mode_stack():
            if type(mode).__module__ not in _HARMLESS_MODES:
                return f"under {type(mode).__name__}"
    if _transforms():
        return "inside a torch.func transform"
    if _autocast():
        return "autocast is on"
    if _tracing() is not None:
        return "inside torch.jit.trace"
    if _forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    return None


def _observe(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Sequence[torch.Tensor],
    static: Static,
) -> list[torch.Tensor]:
    """Tell the observer, and return fake tensors of the right shapes."""
    call = recipes.described(x, weight, bias, operands, static)
    result = infer(call)
    OBSERVERS[-1](call, static, result)
    return [
        x.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(result.shapes, result.dtypes, strict=True)
    ]


def _record(x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static) -> Any:
    """Under a symbolic trace the call is one node, as it was."""
    proxy = next(t for t in (x, weight, bias, *operands) if isinstance(t, torch.fx.Proxy))
    program, transposed, dropout, views, site, *_ = static
    kwargs = {"dropout": dropout, "views": views, "site": site}
    if weight is None:
        target: Any = fused_pointwise
        args: tuple[Any, ...] = (x, operands, program)
    else:
        target, args = fused_linear, (x, weight, bias, operands, program, transposed)
    return proxy.tracer.create_proxy("call_function", target, args, kwargs)


# A chain with an active dropout ------------------------------------------------------------------


def _staged(
    x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static
) -> Sequence[torch.Tensor]:
    """The program up to its first active dropout as a fused call, the rest on torch ops."""
    cut, head, pointwise, carried = _split(static.program, tuple(static.dropout))
    head_static = Static(head, static.transposed, (), static.views, static.site)
    if pointwise:
        found = _call(x, weight, bias, operands, head_static)
        values: Sequence[Any] = found if isinstance(found, tuple) else (found,)
    else:
        # The Linear alone: nothing to fuse, and torch keeps what its gradient needs.
        values = torch_ops.by_reference(x, weight, bias, operands, head_static)
    if not _compiling():
        note(static, "split", "a dropout is active: the kernel ends before it")
    known = dict(zip(carried, values, strict=True))
    program = torch_ops.read_program(static.program)
    return reference.resume(program, cut, known, operands, static.dropout, static.views)


def _split(text: str, dropout: tuple[bool, ...]) -> tuple[int, str, bool, tuple[int, ...]]:
    """A program at its first active dropout: the dropout's index; the program before it, which
    stores every value the rest still reads; whether that computes anything; which values they
    are."""
    return _splits(text, dropout)


_split._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _splits(text: str, dropout: tuple[bool, ...]) -> tuple[int, str, bool, tuple[int, ...]]:
    program = parse(text)
    cut = next(
        i
        for i, instruction in enumerate(program.instructions)
        if instruction.op == "dropout" and dropout[int(instruction.params[1])]
    )
    used = [a.index for i in program.instructions[cut:] for a in i.args if isinstance(a, Value)]
    used += [v.index for v in program.outputs]
    carried = tuple(sorted({u for u in used if u <= cut}))
    before = program.instructions[:cut]
    head = Program(before, tuple(Value(i) for i in carried), program.operand_count)
    return cut, str(head), any(i.op not in _FREE_OPS for i in before), carried


__all__ = [
    "OBSERVERS",
    "backwards_taken",
    "forced_route",
    "fused_linear",
    "fused_pointwise",
    "routes_taken",
    "unfused_linear",
]
