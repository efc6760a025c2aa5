"""The fused call: what an optimised graph runs in place of a Linear and the work after it.

`fused_linear` and `fused_pointwise` are the nodes of an optimised graph. On plain tensors they go
straight to a recipe (see `routes`), cached by signature. Under autograd, tracing and compiling
they go through torch ops of the same names, `torch.ops.fxfuse.linear` and `.pointwise`, which are
registered for the CPU, CUDA, meta and autograd; the program travels as text, the views of a chain
as one list of lengths and sizes. Where torch's own semantics reach into a call (function
transforms, tensor subclasses, autocast, an active dropout, export by tracing) the same program
runs on torch ops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import reference, routes
from .program import Instruction, Program, Value, parse
from .routes import Call, Recipe, Tensors, forced_route

_PLAIN = (
    frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
    if hasattr(torch.nn, "Buffer")
    else frozenset({torch.Tensor, torch.nn.Parameter})
)
_CACHE_LIMIT = 16384
_recipes: dict[tuple[Any, ...], Recipe] = {}
_lock = threading.Lock()
# Told of every call on fake tensors; how the report learns shapes without running the model.
OBSERVERS: list[Callable[..., None]] = []


def _never() -> bool:
    return False


_C = torch._C
_dispatch_modes = getattr(_C, "_len_torch_dispatch_stack", _never)
_function_modes = getattr(_C, "_len_torch_function_stack", _never)
_transforms = getattr(_C, "_are_functorch_transforms_active", _never)
_tracing = getattr(_C, "_get_tracing_state", _never)
_autocast = getattr(_C, "_is_any_autocast_enabled", None) or (
    lambda: torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()
)

View = Sequence[int]


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
    broadcast, RuntimeError where x and weight do not fit.
    """
    return _call(x, weight, bias, operands, program, transposed, dropout, views, site)


def fused_pointwise(
    x: torch.Tensor,
    operands: Sequence[torch.Tensor],
    program: str,
    dropout: Sequence[bool] = (),
    views: Sequence[View] = (),
    site: str = "",
) -> Any:
    """`program(x, operands)` over x [..., N]; otherwise as `fused_linear`."""
    return _call(x, None, None, operands, program, False, dropout, views, site)


def _call(
    x: Any,
    weight: Any,
    bias: Any,
    operands: Sequence[Any],
    program: str,
    transposed: bool,
    dropout: Sequence[bool],
    views: Sequence[View],
    site: str,
) -> Any:
    if torch.compiler.is_compiling():
        if any(dropout):
            outputs = _staged(x, weight, bias, operands, program, transposed, dropout, views, site)
        else:
            outputs = _dispatch(x, weight, bias, operands, program, transposed, views, site)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    tensors = [x, *operands]
    if weight is not None:
        tensors.append(weight)
    if bias is not None:
        tensors.append(bias)
    plain = True
    needs_grad = False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            plain = False
            break
        needs_grad = needs_grad or tensor.requires_grad
    if not plain:
        if any(isinstance(t, torch.fx.Proxy) for t in tensors):
            return _record(x, weight, bias, operands, program, transposed, dropout, views, site)
        by_torch = not all(type(t) in _PLAIN or isinstance(t, FakeTensor) for t in tensors)
    else:
        by_torch = _function_modes() > 0
    by_torch = by_torch or _transforms() or _autocast() or _tracing() is not None
    if by_torch or torch.autograd.forward_ad._current_level >= 0:
        parsed = parse(program)
        acc = x if weight is None else reference.linear(x, weight, bias, transposed)
        outputs = reference.run(parsed, acc, operands, dropout, views)
    elif any(dropout):
        outputs = _staged(x, weight, bias, operands, program, transposed, dropout, views, site)
    elif not plain or _dispatch_modes() or (needs_grad and torch.is_grad_enabled()):
        outputs = _dispatch(x, weight, bias, operands, program, transposed, views, site)
    else:
        outputs = run(x, weight, bias, operands, program, transposed, views, site)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    program: str,
    transposed: bool,
    views: Sequence[View],
    site: str,
) -> list[torch.Tensor]:
    """The outputs of a fused call on plain tensors, by the recipe of its signature."""
    key: list[Any] = [site, program, x.get_device(), x.shape, x.stride(), x.dtype]
    if weight is not None:
        key += (weight.shape, weight.stride(), weight.dtype, weight.get_device())
    if bias is not None:
        key += (bias.shape, bias.stride(), bias.dtype, bias.get_device())
    for t in operands:
        key += (t.shape, t.stride(), t.dtype, t.get_device(), t.is_neg())
    if views:
        key.append(tuple(tuple(v) for v in views))
    if x.is_cuda and x.dtype == torch.float32:
        key.append(torch.get_float32_matmul_precision())
    if routes.FORCED:
        key.append(routes.FORCED[-1])
    signature = tuple(key)
    recipe = _recipes.get(signature)
    if recipe is None:
        recipe = _prepare(signature, x, weight, bias, operands, program, transposed, views, site)
    return recipe.run(x, weight, bias, operands)


def _prepare(
    signature: tuple[Any, ...],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    program: str,
    transposed: bool,
    views: Sequence[View],
    site: str,
) -> Recipe:
    shape = tuple(x.shape)
    if weight is not None:
        shape = (*shape[:-1], weight.shape[1 if transposed else 0])
    resolved = routes.resolve_views(views, shape)
    call = Call(x, weight, bias, tuple(operands), parse(program), transposed, resolved, site)
    recipe = routes.prepare(call)
    with _lock:
        if len(_recipes) >= _CACHE_LIMIT:
            _recipes.clear()
        _recipes[signature] = recipe
    return recipe


def routes_taken(site: str, program: str) -> list[tuple[str, str | None]]:
    """The distinct `(route, reason)` that calls from `site` took so far in this process."""
    with _lock:
        taken = [r for key, r in _recipes.items() if key[0] == site and key[1] == program]
    return list(dict.fromkeys((r.route, r.reason) for r in taken))


def _record(
    x: Any,
    weight: Any,
    bias: Any,
    operands: Sequence[Any],
    program: str,
    transposed: bool,
    dropout: Sequence[bool],
    views: Sequence[View],
    site: str,
) -> Any:
    """Under a symbolic trace the call is one node, as it was."""
    proxy = next(t for t in (x, weight, bias, *operands) if isinstance(t, torch.fx.Proxy))
    kwargs = {"dropout": dropout, "views": views, "site": site}
    if weight is None:
        target: Any = fused_pointwise
        args: tuple[Any, ...] = (x, operands, program)
    else:
        target, args = fused_linear, (x, weight, bias, operands, program, transposed)
    return proxy.tracer.create_proxy("call_function", target, args, kwargs)


# A chain with an active dropout ------------------------------------------------------------------


def _staged(
    x: Any,
    weight: Any,
    bias: Any,
    operands: Sequence[Any],
    program: str,
    transposed: bool,
    dropout: Sequence[bool],
    views: Sequence[View],
    site: str,
) -> Sequence[torch.Tensor]:
    """The program up to its first active dropout as a fused call, the rest on torch ops."""
    parsed = parse(program)
    cut = next(
        i
        for i, instruction in enumerate(parsed.instructions)
        if instruction.op == "dropout" and dropout[int(instruction.params[1])]
    )
    head, carried = _split(parsed, cut)
    outputs = _call(x, weight, bias, operands, str(head), transposed, (), views, site)
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    return reference.resume(
        parsed, cut, dict(zip(carried, values, strict=True)), operands, dropout, views
    )


def _split(program: Program, cut: int) -> tuple[Program, tuple[int, ...]]:
    """The instructions before `cut`, storing every value the rest still reads, and which."""
    used = [a.index for i in program.instructions[cut:] for a in i.args if isinstance(a, Value)]
    used += [v.index for v in program.outputs]
    carried = tuple(sorted({u for u in used if u <= cut}))
    head: tuple[Instruction, ...] = program.instructions[:cut]
    return Program(head, tuple(Value(i) for i in carried), program.operand_count), carried


# The torch ops -----------------------------------------------------------------------------------

_lib = torch.library.Library("fxfuse", "DEF")
_lib.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] operands, str program, "
    "bool transposed, SymInt[] views, str site) -> Tensor[]"
)
_lib.define(
    "pointwise(Tensor x, Tensor[] operands, str program, SymInt[] views, str site) -> Tensor[]"
)


def pack_views(views: Sequence[View]) -> list[int]:
    """Views as one list: the rank of each, then its sizes."""
    return [n for view in views for n in (len(view), *view)]


def unpack_views(packed: Sequence[int]) -> list[list[int]]:
    """Undo `pack_views`."""
    views, rest = [], list(packed)
    while rest:
        rank = int(rest[0])
        views.append(rest[1 : 1 + rank])
        rest = rest[1 + rank :]
    return views


def _dispatch(
    x: Any,
    weight: Any,
    bias: Any,
    operands: Sequence[Any],
    program: str,
    transposed: bool,
    views: Sequence[View],
    site: str,
) -> Sequence[torch.Tensor]:
    packed = pack_views(views)
    if weight is None:
        return torch.ops.fxfuse.pointwise(x, list(operands), program, packed, site)
    return torch.ops.fxfuse.linear(
        x, weight, bias, list(operands), program, transposed, packed, site
    )


def _linear_kernel(x, weight, bias, operands, program, transposed, views, site):  # type: ignore
    return run(x, weight, bias, operands, program, transposed, unpack_views(views), site)


def _pointwise_kernel(x, operands, program, views, site):  # type: ignore[no-untyped-def]
    return run(x, None, None, operands, program, False, unpack_views(views), site)


def _linear_meta(x, weight, bias, operands, program, transposed, views, site):  # type: ignore
    acc = reference.linear(x, weight, bias, transposed)
    return _fresh(program, acc, x.shape[-1], operands, unpack_views(views), site)


def _pointwise_meta(x, operands, program, views, site):  # type: ignore[no-untyped-def]
    return _fresh(program, x, 0, operands, unpack_views(views), site)


def _fresh(
    program: str, acc: torch.Tensor, k: int, operands: Tensors, views: Sequence[View], site: str
) -> list[torch.Tensor]:
    """Contiguous new tensors shaped as the program's outputs; for fake and meta tensors."""
    outputs = routes.checked_outputs(parse(program), acc, operands, views, site)
    if OBSERVERS:
        OBSERVERS[-1](program, site, acc, k, operands, views, outputs)
    return [o.new_empty(o.shape) for o in outputs]


class _Fused(torch.autograd.Function):
    """Forward by the kernels, backward through the reference, recomputed from the inputs.

    The gradient of a gradient works, too: with `create_graph` the recomputation is recorded.
    """

    @staticmethod
    def forward(ctx: Any, static: tuple[Any, ...], *tensors: torch.Tensor | None) -> Any:
        program, transposed, views, site = static
        x, weight, bias, *operands = tensors
        ctx.static = static
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_dispatch(x, weight, bias, operands, program, transposed, views, site))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        program, transposed, views, _ = ctx.static
        needed = ctx.needs_input_grad[1:]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Fresh names: a tensor that is an input twice has a gradient as each of them.
            inputs = [
                t if t is None or not n else t.view_as(t) if again else t.detach().requires_grad_()
                for t, n in zip(ctx.saved_tensors, needed, strict=True)
            ]
            x, weight, bias, *operands = inputs
            acc = x if weight is None else reference.linear(x, weight, bias, transposed)
            outputs = reference.run(parse(program), acc, operands, (), views)
            pairs = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if g is not None and o.requires_grad
            ]
            wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
                if pairs
                else [None] * len(wanted)
            )
        return (None, *(next(found) if n else None for n in needed))


def _linear_autograd(x, weight, bias, operands, program, transposed, views, site):  # type: ignore
    static = (program, transposed, unpack_views(views), site)
    return list(_Fused.apply(static, x, weight, bias, *operands))


def _pointwise_autograd(x, operands, program, views, site):  # type: ignore[no-untyped-def]
    static = (program, False, unpack_views(views), site)
    return list(_Fused.apply(static, x, None, None, *operands))


for _key in ("CPU", "CUDA"):
    _lib.impl("linear", _linear_kernel, _key)
    _lib.impl("pointwise", _pointwise_kernel, _key)
_lib.impl("linear", _linear_meta, "Meta")
_lib.impl("pointwise", _pointwise_meta, "Meta")
_lib.impl("linear", _linear_autograd, "Autograd")
_lib.impl("pointwise", _pointwise_autograd, "Autograd")

__all__ = ["forced_route", "fused_linear", "fused_pointwise", "routes_taken", "run"]
