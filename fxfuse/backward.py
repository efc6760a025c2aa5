"""Plan the backward of a fused call: what its forward keeps, and the program of its gradients.

A plan is made once per signature and set of inputs that need a gradient; `keep` chooses what it
keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from . import recipes, routes
from .errors import ProgramError
from .infer import Call, Result, Store, Tensors, infer
from .keep import Choice, backward_of, choose, flat_variables, in_words, storing
from .layout import classify, operand_shapes
from .lower import lower
from .program import ACC, Instruction, Operand, Program, Value
from .recipes import Recipe, Static
from .vjp import Backward, Incoming, Reduction, Stored, Variable, reduction

# Tensors of a call that are no operands, as a plan names what it saves.
X, WEIGHT, BIAS, Z = "x", "weight", "bias", "z"
# Elements of z from which on a training step on a CPU is no slower with our nodes, which autograd
# runs in Python, than with its own (measured with 64 and 256 columns, chains of one op and four).
FEWEST_ON_CPU = 2**17
Saved = str | Operand | Stored
Asked = tuple[Variable, Reduction, torch.dtype]
Found = dict[tuple[Variable, Reduction], tuple[int | Incoming, Reduction]]


@dataclass(frozen=True)
class Plan:
    """How the fused call `static` is differentiated.

    forward: the call with what is kept as further outputs; the first `outputs` are the caller's,
    and z, where it is kept, the last. recipe: its. program: as the chain's backward sees it, over
    an accumulator of `shape` and `dtype`, with kept values other than z as outputs. needs: whether
    x, weight, bias and each operand need a gradient. asked: the gradients of the program's
    variables, with the sum each needs and the dtype to have it in. flat: variables whose gradient
    is zero, whatever comes in. saved: what the chain's backward is given. from_z: it starts from z
    (`vjp`), which `recompute` says is computed again; else from outputs (`without_z`), of which it
    may read `stored`. works: what to run for each set of incoming and wanted gradients met so far.
    """

    static: Static
    forward: Static
    recipe: Recipe
    transposed: bool
    outputs: int
    keeps_z: bool
    program: Program
    shape: tuple[int, ...]
    dtype: torch.dtype
    views: tuple[tuple[int, ...], ...]
    needs: tuple[bool, ...]
    wrt: tuple[Variable, ...]
    asked: tuple[Asked, ...]
    flat: frozenset[Variable]
    saved: tuple[Saved, ...]
    from_z: bool
    recompute: bool
    stored: tuple[int, ...]
    works: dict[tuple[tuple[int, ...], tuple[Variable, ...]], Work] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What one backward runs: a program, and where each gradient is found.

    static: the program with its stores, None where no gradient needs one. found: for a variable
    and the sum that is asked of it, the number of an output or an incoming gradient, and what is
    left to sum. plain: the same program with each gradient whole, as `backward` numbers them.
    """

    backward: Backward
    static: Static | None
    plain: Static | None
    found: Found


def plan(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Plan | None:
    """The plan of a call some of whose tensors require a gradient; None where torch's own ops and
    autograd are to serve it."""
    if x.layout != torch.strided or (weight is not None and weight.layout != torch.strided):
        return None
    call = recipes.described(x, weight, bias, operands, static)
    recipe = routes.prepare(call)
    if recipe.route == "reference":
        recipes.note(static, recipe.route, recipe.reason)
        return None
    result = infer(call)
    if x.device.type == "cpu" and math.prod(result.acc_shape) < FEWEST_ON_CPU:
        recipes.note(static, "reference", "so few elements train faster on torch's ops")
        return None
    if 0 in result.acc_shape:
        recipes.note(static, "reference", "there are no elements to differentiate")
        return None
    tensors = (x, weight, bias, *operands)
    needs = tuple(t is not None and t.requires_grad for t in tensors)
    wrt: tuple[Variable, ...] = (ACC,) if any(needs[:3]) else ()
    # The part of a program before a dropout may not read every operand of the call.
    read = needs[3 : 3 + call.program.operand_count]
    wrt += tuple(Operand(i) for i, n in enumerate(read) if n)
    flat = replace(call, program=_flattened(call.program))
    try:
        choice = choose(flat, result, wrt, needs)
    except ProgramError as error:
        recipes.note(static, "reference", str(error))
        recipes.note_backward(static, f"reference: {error}")
        return None
    refusal = choice.backward.refusal
    if refusal is not None and weight is None:
        # Torch's backward of its own ops computes nothing again, which ours would, op by op.
        recipes.note(static, "reference", refusal)
        recipes.note_backward(static, f"reference: {refusal}")
        return None
    forward = static
    if choice.kept:
        wide = storing(call.program, choice.kept)
        forward = static._replace(program=str(wide))
        recipe = routes.prepare(replace(call, program=wide))
    recipes.note(static, recipe.route, recipe.reason)
    words = in_words(call.program, choice) if refusal is None else f"reference: {refusal}"
    recipes.note_backward(static, words)
    keeps_z = choice.kept == (ACC,)
    program = flat.program if keeps_z else storing(flat.program, choice.kept)
    return Plan(
        static=static,
        forward=forward,
        recipe=recipe,
        outputs=len(call.program.outputs),
        transposed=static.transposed,
        keeps_z=keeps_z,
        program=program,
        shape=result.acc_shape,
        dtype=result.acc_dtype,
        views=call.views if _views(program) else (),
        needs=needs,
        wrt=wrt,
        asked=tuple(_asked(call, result, needs, wrt)),
        flat=flat_variables(flat, result, wrt),
        saved=tuple(_saved(choice, program, wrt, bias is not None)),
        from_z=choice.from_z,
        recompute=choice.recompute,
        stored=choice.stored,
    )


def _views(program: Program) -> bool:
    return any(i.op == "view" for i in program.instructions)


def _flattened(program: Program) -> Program:
    """The program without its views, where no operand meets what they make: then all of it may be
    computed in the accumulator's shape."""
    viewed: set[Value] = set()
    instructions = []
    for index, instruction in enumerate(program.instructions, start=1):
        depends = instruction.op == "view" or any(a in viewed for a in instruction.args)
        if depends and any(isinstance(a, Operand) for a in instruction.args):
            return program
        if depends:
            viewed.add(Value(index))
        is_view = instruction.op == "view"
        instructions.append(Instruction("copy", instruction.args) if is_view else instruction)
    return replace(program, instructions=tuple(instructions))


def _saved(
    choice: Choice, program: Program, wrt: tuple[Variable, ...], biased: bool
) -> Iterator[Saved]:
    """What the chain's backward is given of the call: z, or what it is made of, and what programs
    read."""
    if choice.recompute:
        yield from (X, WEIGHT, BIAS) if biased else (X, WEIGHT)
    elif choice.from_z:
        yield Z
    # With what is kept having gradients, too, as it has where a gradient is differentiated.
    whole = backward_of(program, wrt, None, choice.from_z, choice.stored)
    read = {*choice.backward.operands, choice.backward.acc, *whole.operands, whole.acc}
    yield from sorted((s for s in read if isinstance(s, Operand)), key=lambda s: s.index)
    yield from sorted((s for s in read if isinstance(s, Stored)), key=lambda s: s.output)


def _asked(
    call: Call, result: Result, needs: tuple[bool, ...], wrt: tuple[Variable, ...]
) -> Iterator[Asked]:
    """The gradients to compute, and how each comes to its size."""
    if any(needs[:3]):
        yield ACC, Reduction.NONE, result.acc_dtype
    if needs[2]:
        assert call.bias is not None
        yield ACC, Reduction.ROWS, call.bias.dtype
    against = operand_shapes(call.program, result.acc_shape, call.views)
    for variable in wrt:
        if not isinstance(variable, Operand):
            continue
        operand = call.operands[variable.index]
        shape, met = tuple(operand.shape), against.get(variable.index, result.acc_shape)
        strides = torch.empty(shape, device="meta").stride()
        layout = classify(shape, strides, operand.dtype, met)
        over = Reduction.RECURRING if layout is None else reduction(layout.kind)
        if over is Reduction.NONE:
            yield variable, over, operand.dtype
        elif "RECURRING" in over.name or met[-1:] != result.acc_shape[-1:]:
            # Summed by torch, and until then as wide as torch has it.
            yield variable, Reduction.NONE, torch.promote_types(operand.dtype, result.acc_dtype)
        else:
            yield variable, over, operand.dtype


# What to run -------------------------------------------------------------------------------------


def work(plan: Plan, incoming: tuple[int, ...], wrt: tuple[Variable, ...]) -> Work:
    """What to run for the gradients of `wrt` where the outputs `incoming` have gradients."""
    found = plan.works.get((incoming, wrt))
    if found is None:
        found = plan.works[incoming, wrt] = _work(plan, incoming, wrt)
    return found


def _work(plan: Plan, incoming: tuple[int, ...], wrt: tuple[Variable, ...]) -> Work:
    backward = backward_of(plan.program, wrt, incoming, plan.from_z, plan.stored)
    asked = [a for a in plan.asked if a[0] in wrt]
    if backward.program is None:
        by = {g.of: g.by for g in backward.gradients}
        passed: Found = {(v, over): (by[v], over) for v, over, _ in asked if v in by}
        return Work(backward, None, None, passed)
    views = (*plan.views, plan.shape) if _views(backward.program) else ()
    plain = Static(str(backward.program), views=views, site=plan.static.site)
    for summed in (True, False):
        stores, found = _stores(backward, asked, summed)
        if not stores:
            return Work(backward, None, plain, found)
        outputs = tuple(backward.program.outputs[n] for n, _ in stores)
        storing = replace(backward.program, outputs=outputs)
        if _lowers(storing):
            break
    static = plain._replace(program=str(storing), stores=tuple(s for _, s in stores))
    return Work(backward, static, plain, found)


def _stores(
    backward: Backward, asked: Sequence[Asked], summed: bool
) -> tuple[list[tuple[int, Store]], Found]:
    """The outputs of a backward's program to store, and how; and `Work.found`.

    summed: sums are taken by the kernel; else by torch, from one store of each value.
    """
    stores: dict[tuple[int, Store], None] = {}
    found: Found = {}
    by = {g.of: g.by for g in backward.gradients}
    for variable, over, dtype in asked:
        where = by.get(variable)
        if isinstance(where, Incoming):
            found[variable, over] = where, over
        elif where is not None:
            store = where, Store(over if summed else Reduction.NONE, dtype)
            if not summed:
                store = next((s for s in stores if s[0] == where), store)
            stores[store] = None
            found[variable, over] = (
                [*stores].index(store),
                Reduction.NONE if summed else over,
            )
    return [*stores], found


def _lowers(program: Program) -> bool:
    try:
        lower(program)
    except ProgramError:
        return False
    return True
