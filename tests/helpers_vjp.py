"""Run the gradients of programs, and have torch compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxfuse import reference
from fxfuse.ops import OPS
from fxfuse.program import ACC, Operand, Program, parse
from fxfuse.vjp import Backward, Incoming, Stored, Variable, vjp

Tensors = Sequence[torch.Tensor]
Run = Callable[[Program, torch.Tensor, Tensors], Tensors]
PARAMS = {
    "leaky_relu": (0.2,),
    "elu": (0.7,),
    "celu": (0.7,),
    "softplus": (1.5, 3.0),
    "clamp": (-1.0, 0.5),
    "clamp_grad": (-1.0, 0.5),
    "hardtanh_grad": (-1.0, 0.5),
    "hardshrink": (0.4,),
    "softshrink": (0.4,),
    "threshold": (0.1, -0.3),
    "threshold_grad": (0.1,),
}


def one_op(name: str) -> Program:
    """The program of one op: over the accumulator, then operands; `where` chooses by operand 0."""
    op = OPS[name]
    args = ["acc", *(f"${i}" for i in range(op.arity - 1))]
    if name == "where":
        args = ["$0", "acc", "$1"]
    words = [*args, *(repr(float(p)) for p in PARAMS.get(name, op.defaults))]
    return parse(f"t1 = {name} {', '.join(words)}; store t1")


def variables(program: Program, operands: Tensors) -> tuple[Variable, ...]:
    """All that can have a gradient: the accumulator, and floating operands."""
    floating = [i for i in range(program.operand_count) if operands[i].is_floating_point()]
    return (ACC, *(Operand(i) for i in floating))


def gradients(
    backward: Backward,
    z: torch.Tensor,
    operands: Tensors,
    outputs: Tensors,
    incoming: Tensors,
    run: Run = reference.run,
) -> dict[Variable, torch.Tensor]:
    """The gradients a backward computes, each summed to the shape of its tensor."""

    def taken(source: Any) -> torch.Tensor:
        if isinstance(source, Stored):
            return outputs[source.output]
        if isinstance(source, Incoming):
            return incoming[source.output]
        return z if source == ACC else operands[source.index]

    computed: Tensors = ()
    if backward.program is not None:
        computed = run(backward.program, taken(backward.acc), [*map(taken, backward.operands)])
    found: dict[Variable, torch.Tensor] = {}
    for gradient in backward.gradients:
        by, tensor = gradient.by, taken(gradient.of)
        full = computed[by] if isinstance(by, int) else taken(by)
        # Summed as it is, and then cast: the sum of 16-bit values is rounded once, as torch's is.
        found[gradient.of] = full.sum_to_size(tensor.shape).to(tensor.dtype)
    return found | {v: torch.zeros_like(taken(v)) for v in backward.zeros}


def by_autograd(
    program: Program, z: torch.Tensor, operands: Tensors, incoming: Tensors
) -> dict[Variable, torch.Tensor]:
    """The same by torch, from the forward on its own ops; zeros where nothing comes back."""
    leaf = {ACC: z, **{Operand(i): operands[i] for i in range(len(operands))}}
    leaf = {v: t.detach().requires_grad_(t.is_floating_point()) for v, t in leaf.items()}
    outputs = reference.run(program, leaf[ACC], [leaf[Operand(i)] for i in range(len(operands))])
    wanted = {v: leaf[v] for v in variables(program, operands)}
    pairs = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
    if not pairs:
        return {v: torch.zeros_like(t) for v, t in wanted.items()}
    found = torch.autograd.grad(
        [o for o, _ in pairs], [*wanted.values()], [g for _, g in pairs], allow_unused=True
    )
    return {
        v: torch.zeros_like(t) if f is None else f
        for (v, t), f in zip(wanted.items(), found, strict=True)
    }


class Fused(torch.autograd.Function):
    """A program whose gradient is its vjp, whose gradient is the vjp of that, and so on."""

    @staticmethod
    def forward(ctx: Any, program: Program, z: torch.Tensor, *operands: torch.Tensor) -> Any:
        ctx.program = program
        ctx.save_for_backward(z, *operands)
        outputs = reference.run(program, z, operands)
        return tuple(o.clone() for o in outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> Any:
        z, *operands = ctx.saved_tensors
        wrt = variables(ctx.program, operands)

        def again(program: Program, acc: torch.Tensor, rest: Tensors) -> Tensors:
            return Fused.apply(program, acc, *rest)

        found = gradients(vjp(ctx.program, wrt), z, operands, (), incoming, again)
        return None, found[ACC], *(found.get(Operand(i)) for i in range(len(operands)))
