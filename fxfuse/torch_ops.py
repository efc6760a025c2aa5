"""`torch.ops.fxfuse.linear` and `.pointwise`: the fused call as torch sees it.

Compiling, exporting and tracing record these ops. They are registered for the CPU and CUDA (by
recipe), for meta and fake tensors and autocast, and by `autograd` for autograd. The program travels
as text, the views of a chain as one list of lengths and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import recipes, reference
from .infer import checked_outputs
from .program import Program, parse
from .recipes import Static, View

any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", None) or (
    lambda: torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()
)
# Types of tensors that nobody watches, and how many dispatch modes watch the others.
PLAIN = frozenset(
    {torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor), type(None)}
)
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
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


def read_program(text: str) -> Program:
    """`parse`, a constant to torch.compile, which would otherwise trace it."""
    return parse(text)


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler.
read_program._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dispatch(
    x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static
) -> Sequence[torch.Tensor]:
    """Call the op: for tensors, modes and compilers that should see it."""
    program, transposed, _, views, site, *_ = static
    packed = pack_views(views)
    if weight is None:
        return torch.ops.fxfuse.pointwise(x, list(operands), program, packed, site)
    return torch.ops.fxfuse.linear(
        x, weight, bias, list(operands), program, transposed, packed, site
    )


def by_reference(
    x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static
) -> Sequence[torch.Tensor]:
    """The outputs by torch's own ops, dropout included."""
    acc = x if weight is None else reference.linear(x, weight, bias, static.transposed)
    return reference.run(read_program(static.program), acc, operands, static.dropout, static.views)


VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class _Fused(torch.autograd.Function):
    """Forward by the kernels, backward through the reference, recomputed from the inputs: where a
    call is compiled for shapes that are not known.

    The gradient of a gradient works, too: with `create_graph` the recomputation is recorded.
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Callable[..., Any], static: Static, *tensors: torch.Tensor | None
    ) -> Any:
        x, weight, bias, *operands = tensors
        ctx.static = static
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # Reshapes inside the call are nobody's business: an output that counts as a view could
        # not be written in place.
        with torch._C._ExcludeDispatchKeyGuard(VIEW_TRACKING):
            return tuple(kernel(x, weight, bias, operands, static))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        needed = ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors  # read once: checkpointing recomputes at each reading
        again = torch.is_grad_enabled()
        # Fresh names: a tensor that is an input twice has a gradient as each of them. Autocast
        # around `backward` is none of the forward's, which ran without.
        with torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
            inputs = [
                t if t is None or not n else t.view_as(t) if again else t.detach().requires_grad_()
                for t, n in zip(saved, needed, strict=True)
            ]
            x, weight, bias, *operands = inputs
            outputs = by_reference(x, weight, bias, operands, ctx.static)
            pairs = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if g is not None and o.requires_grad
            ]
            if not pairs:
                return (None,) * (2 + len(needed))
            results, seeds = zip(*pairs, strict=True)
            wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
            found = iter(
                torch.autograd.grad(results, wanted, seeds, create_graph=again, allow_unused=True)
            )
        return (None, None, *(next(found) if n else None for n in needed))


def below_autograd(
    x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static
) -> Sequence[torch.Tensor]:
    """Call the op where autograd has been seen to."""
    with torch._C._AutoDispatchBelowAutograd():
        return dispatch(x, weight, bias, operands, static)


def _meta(
    x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static
) -> list[torch.Tensor]:
    """Contiguous new tensors shaped as the program's outputs; for fake and meta tensors."""
    acc = x if weight is None else reference.linear(x, weight, bias, static.transposed)
    outputs = checked_outputs(parse(static.program), acc, operands, static.views, static.site)
    return [o.new_empty(o.shape) for o in outputs]


def recomputing(
    x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static
) -> list[torch.Tensor]:
    """The outputs, differentiable whatever the shapes are."""
    return list(_Fused.apply(below_autograd, static, x, weight, bias, *operands))


def _autocast(x: Any, weight: Any, bias: Any, operands: Sequence[Any], static: Static) -> Any:
    return list(by_reference(x, weight, bias, operands, static))


def register(key: str, implementation: Callable[..., Any]) -> None:
    """Serve both ops by `implementation` for a dispatch key."""

    def linear(x, weight, bias, operands, program, transposed, views, site):  # type: ignore
        static = Static(program, transposed, (), unpack_views(views), site)
        return implementation(x, weight, bias, operands, static)

    def pointwise(x, operands, program, views, site):  # type: ignore[no-untyped-def]
        static = Static(program, False, (), unpack_views(views), site)
        return implementation(x, None, None, operands, static)

    _lib.impl("linear", linear, key)
    _lib.impl("pointwise", pointwise, key)


for _key, _implementation in {
    "CPU": recipes.run,
    "CUDA": recipes.run,
    "Meta": _meta,
    "AutocastCPU": _autocast,
    "AutocastCUDA": _autocast,
}.items():
    register(_key, _implementation)
