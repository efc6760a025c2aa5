"""Carry out a plan: replace each group's nodes by one fused call, and products that stay alone by
calls that may run on our kernels."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx

from .anchors import LinearCall, NormCall, TensorSource, transposed_inner
from .fused import fused_linear, fused_pointwise, unfused_linear
from .match import FusionGroup
from .patterns import Attribute
from .plan import RegionPlan, anchor_name


def site_of(plan: RegionPlan, anchor: LinearCall | NormCall) -> str:
    """How a fused call names itself in messages and in the report: `fc1 (model.py:12)`."""
    node = anchor.node
    source = node.meta.get("source")
    name = anchor_name(plan.region, node)
    return f"{name} ({source})" if source else name


def rewrite_region(plan: RegionPlan) -> fx.Graph:
    """The region's graph with its groups and lone products replaced, in place. Parameters stay
    where they are."""
    graph = plan.region.graph
    renamed: dict[fx.Node, fx.Node] = {}
    # By place, a group comes after those it reads and is inserted behind them.
    groups = sorted(plan.groups, key=lambda group: group.place)
    for group, point in zip(groups, _insertion_points(graph, groups), strict=True):
        _replace(graph, group, point, site_of(plan, group.anchor), renamed)
    for anchor in plan.alone:
        _replace_product(graph, anchor, site_of(plan, anchor), renamed)
    graph.lint()
    return graph


def _replace(
    graph: fx.Graph,
    group: FusionGroup,
    point: fx.Node,
    site: str,
    renamed: dict[fx.Node, fx.Node],
) -> None:
    """Insert the fused call of a group before `point` and erase what it replaces.

    renamed: results that earlier groups' outputs became; extended by this group's.
    """
    replaced = _replaced(group)
    with graph.inserting_before(point):
        call = _call(graph, group, site, renamed)
        call.meta = dict(group.anchor.node.meta)
        results = [call]
        if len(group.outputs) > 1:
            results = [
                graph.call_function(operator.getitem, (call, i)) for i in range(len(group.outputs))
            ]
    for node, result in zip(group.outputs, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in replaced)
        renamed[node] = result
    for node in group.metadata:
        source = node.args[0]
        if isinstance(source, fx.Node) and source in replaced:
            node.replace_input_with(source, results[0])
    feeds = {source for node in replaced for source in node.all_input_nodes} - replaced
    _erase_together(graph, replaced)
    _erase_unused(graph, feeds)


def _erase_together(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    """Erase nodes that have no users but each other."""
    left = nodes
    while left:
        for node in (unused := {n for n in left if not n.users}):
            graph.erase_node(node)
        left = left - unused


def _replace_product(
    graph: fx.Graph, anchor: LinearCall, site: str, renamed: dict[fx.Node, fx.Node]
) -> None:
    """Put a call of `unfused_linear` in the place of a Linear that nothing was fused with."""
    node = anchor.node
    with graph.inserting_before(node):
        weight = _source(graph, anchor.weight, renamed)
        bias = None if anchor.bias is None else _source(graph, anchor.bias, renamed)
        args = (_source(graph, anchor.x, renamed), weight, bias, anchor.transposed)
        call = graph.call_function(unfused_linear, args, {"site": site})
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    renamed[node] = call
    feeds = set(node.all_input_nodes)
    graph.erase_node(node)
    _erase_unused(graph, feeds)


def _source(graph: fx.Graph, source: TensorSource, renamed: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node that has a tensor in the graph as it is now."""
    if isinstance(source, Attribute):
        return graph.get_attr(source.path)
    return renamed.get(source, source)


def _replaced(group: FusionGroup) -> set[fx.Node]:
    """The nodes a group's call stands for; a norm stays and is its input."""
    nodes = set(group.nodes)
    if not isinstance(group.anchor, LinearCall):
        nodes.discard(group.anchor.node)
    return nodes


def _insertion_points(graph: fx.Graph, groups: Sequence[FusionGroup]) -> list[fx.Node]:
    """For each group, by place, the first node at or after its place that no group replaces."""
    replaced = {node for group in groups for node in _replaced(group)}
    points: list[fx.Node] = []
    nodes = enumerate(graph.nodes)
    position, node = next(nodes)
    for group in groups:
        while position < group.place or node in replaced or node.op == "get_attr":
            position, node = next(nodes)
        points.append(node)
    return points


def _call(
    graph: fx.Graph, group: FusionGroup, site: str, renamed: dict[fx.Node, fx.Node]
) -> fx.Node:
    def tensor(source: TensorSource) -> fx.Node:
        return _source(graph, source, renamed)

    def size(n: Any) -> Any:
        return renamed.get(n, n) if isinstance(n, fx.Node) else n

    anchor = group.anchor
    text = str(group.program)
    kwargs: dict[str, Any] = {"site": site}
    with warnings.catch_warnings():
        # A training flag is neither module nor tensor, which fx warns of; it is read live.
        warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
        operands = [tensor(o) for o in group.operands]
        if group.dropouts:
            kwargs["dropout"] = [tensor(f) for f in group.dropouts]
        if group.views:
            kwargs["views"] = [
                size(view) if isinstance(view, fx.Node) else [size(n) for n in view]
                for view in group.views
            ]
        if not isinstance(anchor, LinearCall):
            x = tensor(anchor.node)
            return graph.call_function(fused_pointwise, (x, operands, text), kwargs)
        weight = tensor(anchor.weight)
        bias = None if anchor.bias is None else tensor(anchor.bias)
        x = tensor(anchor.x)
    args = (x, weight, bias, operands, text, anchor.transposed)
    return graph.call_function(fused_linear, args, kwargs)


def _erase_unused(graph: fx.Graph, feeds: set[fx.Node]) -> None:
    """Drop reads and transposes of tensors that only fed replaced nodes."""
    stack = list(feeds)
    while stack:
        node = stack.pop()
        removable = node.op == "get_attr" or transposed_inner(node) is not None
        if removable and not node.users:
            stack.extend(node.all_input_nodes)
            graph.erase_node(node)
