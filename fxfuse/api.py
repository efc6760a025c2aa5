"""`optimize`: the stages, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from . import library
from .capture import Capture, capture
from .clone import replace_children
from .errors import InputError, LibraryError, NotFusedError
from .freeze import freeze as freeze_weights
from .module import REPORT, build_module, mark_weights
from .observe import observe
from .plan import Refusal, RegionPlan, plan_region, untraced_refusals
from .report import Report, describe_groups, list_nodes, nested_reports, with_nested
from .rewrite import rewrite_region


def optimize(
    model: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    *,
    freeze: bool = False,
    strict: bool = False,
) -> fx.GraphModule:
    """An equivalent module in which every Linear and the pointwise work after it is one call.

    model: any nn.Module; it is left as it was, and its parameters and buffers are the result's,
    the same objects under the same names. example_inputs: the arguments of a call (or its one
    tensor); they only tell the report shapes. freeze: promise that the weights stay as they are,
    which `fxfuse.freeze` explains. strict: raise NotFusedError, naming the Linear and the reason,
    where one is not fused, and LibraryError where a kernel library is missing.

    Returns a torch.fx.GraphModule that is also an instance of the model's class. Where the model's
    own forward cannot be traced, a copy of the model in which every traceable part is optimised.
    A module that is optimised already is returned as it is. Raises InputError for arguments of
    other types, for a model on more than one device and, with freeze, for weights it cannot freeze;
    OperandShapeError where example_inputs show that an operand does not broadcast.
    """
    inputs = _check(model, example_inputs)
    if isinstance(model.__dict__.get(REPORT), Report):
        if freeze:
            freeze_weights(model)
        return model  # type: ignore[return-value]
    nested = nested_reports(model)
    captured = capture(model)
    plans = tuple(plan_region(region) for region in captured.regions)
    optimized = tuple(f"{path}." for path in nested)
    untraced = untraced_refusals(captured, plans, model)
    refusals = (
        *(r for p in plans for r in p.refusals),
        *(r for r in untraced if not r.name.startswith(optimized)),
    )
    if strict:
        _raise_unless_fused(refusals, model)
    found = _report_before(model, captured, plans, refusals)
    root = replace_children(
        captured.root,
        {
            p.region.path: build_module(p.region.module, rewrite_region(p), p.region.optional)
            for p in plans
        },
    )
    found = with_nested(_report_after(found, plans), nested)
    if inputs is not None:
        found = observe(root, inputs, found)
    root.__dict__[REPORT] = found
    for part in root.modules():  # one that was optimised and frozen before is a copy here
        mark_weights(part)
    if freeze:
        freeze_weights(root)
    return root  # type: ignore[return-value]


def _check(model: Any, example_inputs: Any) -> tuple[Any, ...] | None:
    """The example inputs as a tuple. Raises InputError as `optimize` says."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise InputError(f"optimize: model is {what}, not an instance of torch.nn.Module")
    first: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        first.setdefault(tensor.device, name)
    if len(first) > 1:
        (a, name_a), (b, name_b) = list(first.items())[:2]
        raise InputError(
            f"optimize: the model is on more than one device: {name_a} on {a}, {name_b} on {b}; "
            "move it to one"
        )
    if example_inputs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(
            f"optimize: example_inputs is {type(example_inputs).__name__}, not a tensor or a tuple "
            "of the model's arguments"
        )
    return tuple(example_inputs)


def _raise_unless_fused(refusals: Sequence[Refusal], model: nn.Module) -> None:
    if refusals:
        lines = [f"{r.name}{f' ({r.source})' if r.source else ''}: {r.reason}" for r in refusals]
        raise NotFusedError("optimize(strict=True): not fused: " + "; ".join(lines))
    device = next((p.device.type for p in model.parameters()), "cpu")
    for name in ("cpu", "cuda"):
        found = library.find(f"fxfuse_{name}") if name == device else None
        if isinstance(found, LibraryError):
            raise found


def _report_before(
    model: nn.Module,
    captured: Capture,
    plans: Sequence[RegionPlan],
    refusals: tuple[Refusal, ...],
) -> Report:
    """What the plans say, and the graphs as they are before the rewriting changes them."""
    return Report(
        model=type(model).__name__,
        groups=tuple(g for p in plans for g in describe_groups(p)),
        refusals=refusals,
        leaves=captured.leaves,
        nodes_before=tuple(n for p in plans for n in list_nodes(p.region.graph)),
        nodes_after=(),
    )


def _report_after(report: Report, plans: Sequence[RegionPlan]) -> Report:
    after = tuple(n for p in plans for n in list_nodes(p.region.graph))
    return replace(report, nodes_after=after)
