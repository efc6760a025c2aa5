"""Differentiate fused calls on plain tensors: the forward by a kernel, the backward by another.

The backward of `y = program(x W^T + b, operands)` is the program's own (see `backward`) over what
the forward kept and the incoming gradients; it gives dZ, and the operands' gradients with it. Then

    dX = dZ W        dW = dZ^T X        db = dZ summed over its rows

In autograd's graph a call is two nodes, as it is in eager: the product, whose output is z, and the
chain, which takes z. The forward of both is one call; between their backwards, what only the chain
needed is let go. Where z is not kept it is a stand-in of no memory. What is kept is an output of a
node, so where gradients are differentiated in turn the chain's backward is one more fused call, and
autograd finds its way through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import recipes, reference
from .accumulate import accumulation_target, will_execute
from .backward import BIAS, WEIGHT, Plan, Saved, Work, X, Z, plan, work
from .infer import Tensors
from .program import ACC, BARE, Operand
from .recipes import Static
from .routes import reduced, share_memory
from .torch_ops import (
    PLAIN,
    VIEW_TRACKING,
    any_autocast,
    below_autograd,
    by_reference,
    dispatch,
    dispatch_modes,
    recomputing,
    register,
)
from .vjp import Incoming, Reduction, Source, Stored, Variable

Given = dict[Saved | Incoming, torch.Tensor]
Summed = dict[tuple[Variable, Reduction], torch.Tensor]


def differentiable(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Sequence[torch.Tensor]:
    """The outputs of a call on plain tensors of which some need a gradient."""
    needs = (
        x.requires_grad,
        weight is not None and weight.requires_grad,
        bias is not None and bias.requires_grad,
        *(o.requires_grad for o in operands),
    )
    try:
        key = (needs, *recipes.signature(x, weight, bias, operands, static))
    except RuntimeError:  # a sparse tensor has no strides
        found = None
    else:
        found = recipes.remembered(key, lambda: _plan_unseen(x, weight, bias, operands, static))
    if found is None:
        return by_reference(x, weight, bias, operands, static)
    link = _Link(x, weight, bias, operands)
    z: torch.Tensor | None = x
    if weight is not None:
        z = _Product.apply(found, link, x, weight, bias) if any(needs[:3]) else None
    return _Chain.apply(found, link, z, *operands)[: found.outputs]


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Whoever traces the call sees nothing of what is done inside."""
    with _disable_current_modes():
        # While a graph is compiled nobody is told what autograd saves, which a plan asks.
        before = _hooks_while_tracing(False)
        try:
            yield
        finally:
            _hooks_while_tracing(before)


_hooks_while_tracing = getattr(
    torch._C._autograd, "_saved_tensors_hooks_set_tracing", lambda tracing: tracing
)


_plan_unseen = _unseen()(plan)


def _traced(tensor: torch.Tensor) -> bool:
    """Whether a call with this tensor is being compiled: then it runs as ops that can be seen."""
    return type(tensor) not in PLAIN or dispatch_modes() > 0


def _differentiable_op(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Sequence[torch.Tensor]:
    """The ops of `torch_ops` for autograd."""
    tensors = [t for t in (x, weight, bias, *operands) if t is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return list(below_autograd(x, weight, bias, operands, static))
    if any(isinstance(n, torch.SymInt) for t in tensors for n in (*t.shape, *t.stride())):
        return recomputing(x, weight, bias, operands, static)
    return list(differentiable(x, weight, bias, operands, static))


register("Autograd", _differentiable_op)


class _Dz(NamedTuple):
    """A gradient of z, and its sum over rows where it was computed with it.

    alone: its memory is no other tensor's, and nobody has it but the link and the engine. Then its
    storage may be freed during the product's backward, as FSDP frees those of parameters: all that
    the engine still does with it is to drop it, hooks are given no gradient of z, which never
    leaves the call, and each backward of a retained graph makes a new one.
    """

    dz: torch.Tensor
    db: torch.Tensor | None
    alone: bool


class _Link:
    """What the nodes of one call share: until the forward is over, its tensors and, computed with
    the product, its outputs; then, between their backwards, what the chain's computed.

    Tensors a node takes for its forward alone are no inputs of it: autograd would wait for them.
    """

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        operands: Tensors,
    ) -> None:
        self.tensors: Any = (x, weight, bias, operands)
        self.traced = _traced(x)
        self.outputs: list[torch.Tensor] | None = None
        self.found: _Dz | None = None

    def run(self, made: Plan) -> list[torch.Tensor]:
        # Reshapes inside the call are nobody's business: an output that counts as a view could not
        # be written in place.
        with torch._C._ExcludeDispatchKeyGuard(VIEW_TRACKING):
            if self.traced:
                x, weight, bias, operands = self.tensors
                return list(below_autograd(x, weight, bias, operands, made.forward))
            return made.recipe.run(*self.tensors)


_ADD = "t1 = add acc, $0; store t1"


def product(
    a: torch.Tensor, b: torch.Tensor, to: torch.Tensor | None = None, lets_go: str = ""
) -> torch.Tensor:
    """`a @ b` of a [M, K] and b [K, N], either of which may be a transposed view; added to `to`,
    of the same dtype, where that is given. lets_go: as in `infer.Call`, "x" being a and "weight" b.

    fp32 on CUDA is served as a fused call is, everything else is torch's own product.
    """
    if not a.is_cuda or a.dtype != torch.float32:
        return torch.mm(a, b) if to is None else to.addmm_(a, b)
    transposed = b.stride(1) == 1
    weight = b if transposed else b.t()
    site = "a backward's product"
    static = Static(BARE, transposed, (), (), site, normwise=True, lets_go=lets_go)
    if to is None:
        return _serve(a, (a, b))(a, weight, None, (), static)[0]
    static = static._replace(program=_ADD, in_place=True)
    recipe = recipes.find(a, weight, None, (to,), static)
    if recipe.route in ("cublas", "reference") or not to.is_contiguous():
        return to.addmm_(a, b)  # torch's own adds as it multiplies, too
    return recipe.run(a, weight, None, (to,))[0]


def _serve(tensor: torch.Tensor, tensors: Tensors) -> Callable[..., Sequence[torch.Tensor]]:
    """What runs a call with these tensors, among them `tensor`, in a backward."""
    if _traced(tensor):
        return dispatch
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return differentiable if needed else recipes.run


class _Product(torch.autograd.Function):
    """z = x W^T + b."""

    @staticmethod
    def forward(
        ctx: Any,
        made: Plan,
        link: _Link,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Any:
        link.outputs = link.run(made)
        ctx.plan, ctx.link = made, link
        of_x, of_weight, _ = made.needs[:3]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.shape, ctx.bias = x.shape, None if bias is None else (bias.shape, bias.dtype)
        if made.keeps_z:
            return link.outputs.pop()
        with torch._C._ExcludeDispatchKeyGuard(VIEW_TRACKING):
            return x.new_empty((), dtype=made.dtype).expand(made.shape)

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> Any:
        made: Plan = ctx.plan
        link: _Link = ctx.link
        found, link.found = link.found, None
        if found is None or found.dz is not dz:
            found = _Dz(dz, None, False)
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = (*_wanted(ctx), False)[:3]
        flat = dz.reshape(-1, dz.shape[-1])
        # The last to read dz is a product, which lets it go before it allocates what it returns.
        # Anomaly mode looks at a node's inputs again.
        lets_go = found.alone and not torch.is_anomaly_enabled()
        dx = dw = db = None
        with _as_forward(dz):
            if of_bias:
                shape, dtype = ctx.bias
                db = reduced(dz, Reduction.ROWS) if found.db is None else found.db
                db = db.to(dtype).reshape(shape)
            if of_x:
                by = weight.t() if made.transposed else weight
                last = "" if of_weight or not lets_go else "x"
                dx = product(flat, by, lets_go=last).view(ctx.shape)
            if of_weight:
                x = x.reshape(-1, x.shape[-1])
                a, b, which = (x.t(), flat, "weight") if made.transposed else (flat.t(), x, "x")
                node = ctx.next_functions[1][0]
                grad = None if link.traced else accumulation_target(node, a, b)
                dw = product(a, b, to=grad, lets_go=which if lets_go else "")
                if grad is not None:
                    dw = None
        return None, None, dx, dw, db


class _Chain(torch.autograd.Function):
    """program(z, operands)."""

    @staticmethod
    def forward(
        ctx: Any, made: Plan, link: _Link, z: torch.Tensor | None, *operands: torch.Tensor
    ) -> Any:
        outputs, link.outputs = link.outputs, None
        if outputs is None:  # nothing that z is made of needs a gradient
            outputs = link.run(made)
            z = outputs.pop() if made.keeps_z else z
        x, weight, bias, _ = link.tensors
        link.tensors = None
        named = {Z: z, X: x, WEIGHT: weight, BIAS: bias}
        ctx.plan, ctx.link = made, link
        ctx.save_for_backward(
            *(
                named[s]
                if isinstance(s, str)
                else outputs[s.output]
                if isinstance(s, Stored)
                else operands[s.index]
                for s in made.saved
            )
        )
        ctx.shapes = [o.shape for o in operands]
        ctx.dtypes = [o.dtype for o in operands]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        made: Plan = ctx.plan
        # Read once: checkpointing recomputes at each reading.
        given: Given = dict(zip(made.saved, ctx.saved_tensors, strict=True))
        incoming = tuple(i for i, g in enumerate(grads) if g is not None)
        wanted = _wanted(ctx)
        of_operands = wanted[len(wanted) - len(ctx.shapes) :]
        wrt = tuple(
            v for v in made.wrt if (of_operands[v.index] if isinstance(v, Operand) else wanted[0])
        )
        if not incoming or not wrt:
            return (None,) * (3 + len(ctx.shapes))
        given |= {Incoming(i): g for i, g in enumerate(grads) if g is not None}
        done = work(made, incoming, wrt)
        with _as_forward(given[Incoming(incoming[0])]):
            again = torch.is_grad_enabled()
            seen = again or ctx.link.traced
            summed = _recorded(made, done, given) if seen else _run(made, done, given)
            dz, *rest = _gradients(made, wrt, given, summed, ctx.shapes, ctx.dtypes)
        if dz is not None and not again:
            others = [t for of, t in summed.items() if of != (ACC, Reduction.NONE)]
            alone = not seen and _is_alone(dz, [*given.values(), *others, *rest])
            ctx.link.found = _Dz(dz, summed.get((ACC, Reduction.ROWS)), alone)
        return None, None, dz, *rest


def _is_alone(tensor: torch.Tensor, others: Sequence[torch.Tensor | None]) -> bool:
    """Whether a tensor fills a storage that is none of the others'."""
    return (
        tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        and not any(o is not None and share_memory(o, tensor) for o in others)
    )


def _wanted(ctx: Any) -> list[bool]:
    """For each tensor a node was given, whether this backward wants its gradient: not one that
    `torch.autograd.grad` was asked for without it."""
    return [n is not None and will_execute(n) is not False for n, _ in ctx.next_functions]


def _as_forward(tensor: torch.Tensor) -> Any:
    """Autocast around `backward` is none of the forward's, which ran without."""
    if any_autocast():
        return torch.autocast(tensor.device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()


def _gradients(
    made: Plan,
    wrt: tuple[Variable, ...],
    given: Given,
    summed: Summed,
    shapes: Sequence[torch.Size],
    dtypes: Sequence[torch.dtype],
) -> list[torch.Tensor | None]:
    """The gradients of z and of each operand; None where none is wanted or comes."""

    def whole(variable: Variable, over: Reduction, shape: torch.Size) -> torch.Tensor | None:
        gradient = summed.get((variable, over))
        if gradient is None:
            some = next(iter(given.values()))
            return some.new_zeros(shape) if variable in made.flat else None
        return gradient if gradient.shape == shape else _sum_to(gradient, shape)

    found: list[torch.Tensor | None] = [None] * (1 + len(shapes))
    for variable, over, _ in (a for a in made.asked if a[0] in wrt):
        if isinstance(variable, Operand):
            gradient = whole(variable, over, shapes[variable.index])
            dtype = dtypes[variable.index]
            found[1 + variable.index] = None if gradient is None else gradient.to(dtype)
        elif over is Reduction.NONE:
            gradient = whole(ACC, over, torch.Size(made.shape))
            found[0] = None if gradient is None else gradient.to(made.dtype)
    return found


def _sum_to(gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if gradient.numel() == shape.numel():
        return gradient.reshape(shape)
    return gradient.sum_to_size(shape)


def _source(made: Plan, given: Given, source: Source) -> torch.Tensor:
    if source == ACC:
        if made.recompute:
            return reference.linear(given[X], given[WEIGHT], given.get(BIAS), made.transposed)
        return given[Z]
    tensor = given[source]  # type: ignore[index]
    if isinstance(source, Operand) or made.views or tensor.shape == made.shape:
        return tensor
    return tensor.reshape(made.shape)


def _run(made: Plan, done: Work, given: Given) -> Summed:
    """The gradients, summed as asked, by one kernel."""
    outputs: Sequence[torch.Tensor] = ()
    if done.static is not None:
        backward = done.backward
        acc = _source(made, given, backward.acc)
        whole = [_source(made, given, s) for s in backward.operands]
        operands = whole
        if not done.static.views:
            pairs = zip(backward.operands, whole, strict=True)
            operands = [_narrow(t) if isinstance(s, Incoming) else t for s, t in pairs]
        recipe = recipes.find(acc, None, None, operands, done.static)
        if recipe.route == "reference":
            recipes.note_backward(made.static, f"reference: {recipe.reason}")
            operands = whole
        outputs = recipe.run(acc, None, None, operands)
    return {
        of: reduced(outputs[by] if isinstance(by, int) else _source(made, given, by), over)
        for of, (by, over) in done.found.items()
    }


def _narrow(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that is one number, row or column expanded, as `sum()` makes them, as it was."""
    strides = gradient.stride()
    if 0 not in strides:
        return gradient
    sizes = [size if stride else 1 for size, stride in zip(gradient.shape, strides, strict=True)]
    return gradient.as_strided(sizes, strides)


def _recorded(made: Plan, done: Work, given: Given) -> Summed:
    """The gradients, each whole, by a call that can be differentiated in turn, or compiled."""
    outputs: Sequence[torch.Tensor] = ()
    if done.plain is not None:
        acc = _source(made, given, done.backward.acc)
        operands = [_source(made, given, s) for s in done.backward.operands]
        serve = _serve(acc, (acc, *operands))
        outputs = serve(acc, None, None, operands, done.plain)
    whole = {
        g.of: outputs[g.by] if isinstance(g.by, int) else _source(made, given, g.by)
        for g in done.backward.gradients
    }
    return {(v, over): reduced(whole[v], over) for v, over, _ in made.asked if v in whole}
