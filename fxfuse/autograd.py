"""Differentiate fused calls on plain tensors: the forward by a kernel, the backward by another.

The backward of `y = program(x W^T + b, operands)` is the program's own (see `backward`) over what
the forward kept and the incoming gradients; it gives dZ, and the operands' gradients with it. Then

    dX = dZ W        dW = dZ^T X        db = dZ summed over its rows

What a forward keeps is an output of its autograd node, so where gradients are differentiated in
turn, the backward is one more fused call, and autograd finds its way through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import recipes, reference
from .backward import BIAS, WEIGHT, Plan, Saved, Work, X, plan, work
from .infer import Tensors
from .program import ACC, BARE, Operand
from .recipes import Static
from .routes import reduced
from .torch_ops import VIEW_TRACKING, any_autocast, by_reference
from .vjp import Incoming, Reduction, Source, Stored, Variable

Given = dict[Saved | Incoming, torch.Tensor]


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
        found = recipes.remembered(key, lambda: plan(x, weight, bias, operands, static))
    if found is None:
        return by_reference(x, weight, bias, operands, static)
    return _Fused.apply(found, x, weight, bias, *operands)[: found.outputs]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of a [M, K] and b [K, N], either of which may be a transposed view.

    fp32 on CUDA is served as a fused call is, everything else is torch's own product.
    """
    if not a.is_cuda or a.dtype != torch.float32:
        return torch.mm(a, b)
    transposed = b.stride(1) == 1
    weight = b if transposed else b.t()
    static = Static(BARE, transposed, (), (), "a backward's product")
    needed = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    serve = differentiable if needed else recipes.run
    return serve(a, weight, None, (), static)[0]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Plan, *tensors: torch.Tensor | None) -> Any:
        x, weight, bias, *operands = tensors
        assert x is not None
        # Reshapes inside the call are nobody's business: an output that counts as a view could
        # not be written in place.
        with torch._C._ExcludeDispatchKeyGuard(VIEW_TRACKING):
            outputs = made.recipe.run(x, weight, bias, operands)  # type: ignore[arg-type]
        inputs = {X: x, WEIGHT: weight, BIAS: bias}
        ctx.plan = made
        ctx.save_for_backward(
            *(
                inputs[s]
                if isinstance(s, str)
                else outputs[s.output]
                if isinstance(s, Stored)
                else operands[s.index]
                for s in made.saved
            )
        )
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        made: Plan = ctx.plan
        # Read once: checkpointing recomputes at each reading.
        given: Given = dict(zip(made.saved, ctx.saved_tensors, strict=True))
        incoming = tuple(i for i, g in enumerate(grads) if g is not None)
        if not incoming:
            return (None,) * (1 + len(made.needs))
        given |= {Incoming(i): g for i, g in enumerate(grads) if g is not None}
        done = work(made, incoming)
        if not any_autocast():
            return None, *_gradients(made, done, given, ctx.shapes, ctx.dtypes)
        # Autocast around `backward` is none of the forward's, which ran without.
        some = next(iter(given.values()))
        with torch.autocast(some.device.type, enabled=False):
            return None, *_gradients(made, done, given, ctx.shapes, ctx.dtypes)


def _gradients(
    made: Plan,
    done: Work,
    given: Given,
    shapes: Sequence[torch.Size | None],
    dtypes: Sequence[torch.dtype | None],
) -> list[torch.Tensor | None]:
    """The gradients of x, weight, bias and each operand; None where none is needed or comes."""
    again = torch.is_grad_enabled()
    summed = _recorded(made, done, given) if again else _run(made, done, given)

    def whole(variable: Variable, over: Reduction, shape: torch.Size) -> torch.Tensor | None:
        gradient = summed.get((variable, over))
        if gradient is None:
            some = next(iter(given.values()))
            return some.new_zeros(shape) if variable in made.flat else None
        return gradient if gradient.shape == shape else _sum_to(gradient, shape)

    of_x, of_weight, of_bias = made.needs[:3]
    x, _, bias, *operands = shapes
    found: list[torch.Tensor | None] = [None] * len(shapes)
    if of_x or of_weight:
        dz = whole(ACC, Reduction.NONE, torch.Size(made.shape))
        if dz is not None:
            found[:2] = _through_product(made, dz, given, x)
    if of_bias and bias is not None:
        found[2] = whole(ACC, Reduction.ROWS, bias)
    for variable, over, _ in made.asked:
        shape = operands[variable.index] if isinstance(variable, Operand) else None
        if shape is not None:
            found[3 + variable.index] = whole(variable, over, shape)
    return [g if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]


def _sum_to(gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if gradient.numel() == shape.numel():
        return gradient.reshape(shape)
    return gradient.sum_to_size(shape)


def _through_product(
    made: Plan, dz: torch.Tensor, given: Given, shape: torch.Size | None
) -> list[torch.Tensor | None]:
    """dX and dW from dZ; where the call has no product, dZ is the gradient of x itself."""
    assert shape is not None
    of_x, of_weight = made.needs[:2]
    if made.is_pointwise:
        return [dz, None]
    dz = dz.reshape(-1, dz.shape[-1])
    dx = dw = None
    if of_x:
        weight = given[WEIGHT]
        weight = weight.t() if made.forward.transposed else weight
        dx = product(dz, weight).view(shape)
    if of_weight:
        x = given[X].reshape(-1, shape[-1])
        dw = product(x.t(), dz) if made.forward.transposed else product(dz.t(), x)
    return [dx, dw]


def _source(made: Plan, given: Given, source: Source) -> torch.Tensor:
    if source == ACC:
        if made.recompute:
            transposed = made.forward.transposed
            return reference.linear(given[X], given[WEIGHT], given.get(BIAS), transposed)
        return given[X] if made.is_pointwise else given[Stored(made.outputs)]
    tensor = given[source]  # type: ignore[index]
    if isinstance(source, Operand) or made.views or tensor.shape == made.shape:
        return tensor
    return tensor.reshape(made.shape)


def _run(made: Plan, done: Work, given: Given) -> dict[tuple[Variable, Reduction], torch.Tensor]:
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
    for dim, (size, stride) in enumerate(zip(gradient.shape, gradient.stride(), strict=True)):
        if stride == 0 and size > 1:
            gradient = gradient.narrow(dim, 0, 1)
    return gradient


def _recorded(
    made: Plan, done: Work, given: Given
) -> dict[tuple[Variable, Reduction], torch.Tensor]:
    """The gradients, each whole, by a call that is differentiable in turn."""
    outputs: Sequence[torch.Tensor] = ()
    if done.plain is not None:
        acc = _source(made, given, done.backward.acc)
        operands = [_source(made, given, s) for s in done.backward.operands]
        needed = any(t.requires_grad for t in (acc, *operands))
        serve = differentiable if needed else recipes.run
        outputs = serve(acc, None, None, operands, done.plain)
    whole = {
        g.of: outputs[g.by] if isinstance(g.by, int) else _source(made, given, g.by)
        for g in done.backward.gradients
    }
    return {(v, over): reduced(whole[v], over) for v, over, _ in made.asked if v in whole}
