"""Decide what becomes of every Linear of a traced module, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from .anchors import LinearCall, NoMatch, NormCall, read_anchor, transposed_inner
from .capture import Capture, Region
from .graphs import Order
from .match import FusionGroup, Graph, match_group
from .patterns import Attribute, Unsupported, read_call

# Pointwise nodes between a Linear and a norm that still count as "a norm after a Linear".
_NORM_REACH = 8


@dataclass(frozen=True)
class Refusal:
    """A Linear that is not fused: its name in the model, why, and where the code says so."""

    name: str
    reason: str
    source: str


@dataclass(frozen=True)
class RegionPlan:
    """What will be fused in a region, in graph order, and what will not.

    alone: products that nothing can be fused with, but that our kernels may run all the same. Each
    has its refusal, too.
    """

    region: Region
    groups: tuple[FusionGroup, ...]
    alone: tuple[LinearCall, ...]
    refusals: tuple[Refusal, ...]


def plan_region(region: Region) -> RegionPlan:
    """Match every anchor of a region.

    Anchors are tried last to first, so that of two Linears whose results meet, `gate(x) * up(x)`,
    the later one takes the product and the other keeps its own activation. A norm that may belong
    to a Linear's group comes after all Linears, and is an anchor where none took it.
    """
    graph = _describe(region)

    def joins(node: fx.Node, found: object) -> bool:
        return isinstance(found, NormCall) and _is_pointwise(node, graph)

    anchors = {
        node: found
        for node in region.graph.nodes
        if (found := read_anchor(node, graph.modules, graph.tensors)) is not None
    }
    groups: list[FusionGroup] = []
    alone: list[LinearCall] = []
    refusals: list[Refusal] = []
    last_first = [*reversed(anchors.items())]
    for node, found in sorted(last_first, key=lambda item: joins(*item)):
        if node in graph.claims or (
            isinstance(found, NormCall) and not _follows_linear(node, anchors, graph)
        ):
            continue
        match = found if isinstance(found, NoMatch) else match_group(found, graph)
        if isinstance(match, NoMatch):
            if not isinstance(found, NormCall):
                refusals.append(_refusal(region, match))
            if isinstance(found, LinearCall) and found.extra is None:
                alone.append(found)
        elif isinstance(found, LinearCall) or match.ops_before > 1:
            groups.append(match)
            graph.claims.update(dict.fromkeys(match.nodes, match))
            if isinstance(found, NormCall):
                # The norm itself stays where it is; only what follows is replaced.
                del graph.claims[node]
    groups.sort(key=lambda group: graph.order.position[group.anchor.node])
    return RegionPlan(region, tuple(groups), tuple(reversed(alone)), tuple(reversed(refusals)))


def _describe(region: Region) -> Graph:
    modules = dict(region.module.named_modules(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = dict(region.module.named_buffers(remove_duplicate=False))
    tensors |= dict(region.module.named_parameters(remove_duplicate=False))
    return Graph(modules, tensors, Order(region.graph, modules))


def _is_pointwise(node: fx.Node, graph: Graph) -> bool:
    """Whether a program can express a node."""
    try:
        return read_call(node, graph.modules) is not None
    except Unsupported:
        return False


def _follows_linear(node: fx.Node, anchors: Mapping[fx.Node, object], graph: Graph) -> bool:
    """Whether a norm's input is a Linear, or a few pointwise ops after one."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    for _ in range(_NORM_REACH):
        if not isinstance(source, fx.Node):
            return False
        if isinstance(anchors.get(source), LinearCall):
            return True
        if not _is_pointwise(source, graph):
            return False
        source = source.args[0] if source.args else None
    return False


def anchor_name(region: Region, node: fx.Node) -> str:
    """A node's name in the whole model: the Linear's path, or the weight's, or the node's own."""
    if node.op == "call_module":
        local = str(node.target)
    else:
        sources = [transposed_inner(a) or a for a in node.all_input_nodes]
        # The input may be a parameter, too; the weight comes after it.
        weights = [str(a.target) for a in sources if a.op == "get_attr"]
        matrices = [w for w in weights if w.rpartition(".")[2] != "bias"]
        local = (matrices or weights or [node.name])[-1]
        local = _module_holding(local) or local
    return f"{region.path}.{local}" if region.path else local


def _module_holding(weight: str) -> str | None:
    """The path of the module whose `weight` a path names: a Linear, or one that works as one."""
    owner, _, name = weight.rpartition(".")
    return owner if name == "weight" and owner else None


def _refusal(region: Region, match: NoMatch) -> Refusal:
    source = str(match.node.meta.get("source", ""))
    return Refusal(anchor_name(region, match.node), match.reason, source)


def untraced_refusals(
    captured: Capture, plans: tuple[RegionPlan, ...], model: nn.Module
) -> tuple[Refusal, ...]:
    """A refusal for each nn.Linear no traced graph calls, naming the leaf that hides it."""
    called = {name for p in plans for name in _called(p)}
    leaves = sorted(captured.leaves, key=lambda leaf: len(leaf.path), reverse=True)
    refusals = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in called:
            continue
        holder = next(
            (f for f in leaves if f.path in ("", name) or name.startswith(f"{f.path}.")), None
        )
        if holder is None:
            parent = name.rpartition(".")[0]
            owner = type(model.get_submodule(parent)).__name__
            reason = f"{owner} {parent or 'the model'} does not call it where it was traced"
        else:
            what = "the model" if not holder.path else f"{holder.type_name} {holder.path}"
            reason = f"{what} is not traced: {holder.reason}"
        refusals.append(Refusal(name, reason, ""))
    return tuple(refusals)


def _called(plan: RegionPlan) -> set[str]:
    """Names, in the whole model, of the modules a region's graph calls or reads a weight of."""
    local = {
        "" if n.target == "weight" else str(n.target).removesuffix(".weight")
        for n in plan.region.graph.nodes
        if n.op == "call_module" or (n.op == "get_attr" and f".{n.target}".endswith(".weight"))
    }
    local |= {
        a.path.removesuffix(".weight")
        for g in plan.groups
        if isinstance(g.anchor, LinearCall)
        for a in (g.anchor.weight,)
        if isinstance(a, Attribute)
    }
    prefix = f"{plan.region.path}." if plan.region.path else ""
    return {prefix + name if name else plan.region.path for name in local}


def is_pointwise_group(group: FusionGroup) -> bool:
    """Whether a group has no GEMM of its own."""
    return isinstance(group.anchor, NormCall)


def source_name(source: fx.Node | Attribute) -> str:
    """An operand for people: a parameter's name, or the node that computes it."""
    if isinstance(source, Attribute):
        return source.path
    return str(source.target) if source.op == "get_attr" else source.name
