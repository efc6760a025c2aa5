"""What matching knows and what it finds: the graph with its claims, and fusion groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .anchors import LinearCall, NoMatch, NormCall, TensorSource
from .graphs import Order
from .patterns import Attribute
from .program import Program

# Why a node that another group took cannot join: not worth a note in the report.
CLAIMED = "it belongs to another group"


@dataclass(frozen=True)
class FusionGroup:
    """An anchor and the pointwise program its epilogue will run.

    nodes: all nodes the group replaces, in graph order. as_written: the program before it was
    simplified, what eager runs. operands: what the program's operands are. outputs: the nodes whose
    values the program stores. dropouts: for each dropout of the program, the live training flag.
    views: the shape of each view, its sizes or the node that computes them. metadata: nodes that
    only read the shape of a value in the group. place: position in the graph where the fused call
    goes. bounds: what ended the group, and why. ops_before: pointwise kernels eager launches.
    """

    anchor: LinearCall | NormCall
    nodes: tuple[fx.Node, ...]
    program: Program
    as_written: Program
    operands: tuple[TensorSource, ...]
    outputs: tuple[fx.Node, ...]
    dropouts: tuple[TensorSource, ...]
    views: tuple[tuple[Any, ...] | fx.Node, ...]
    metadata: tuple[fx.Node, ...]
    place: float
    bounds: tuple[NoMatch, ...]
    notes: tuple[str, ...]
    ops_before: int


@dataclass
class Graph:
    """What matching knows of a region's graph. claims: the group each taken node belongs to."""

    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, torch.Tensor]
    order: Order
    claims: dict[fx.Node, FusionGroup] = field(default_factory=dict)

    def place(self, node: fx.Node) -> float:
        """Where in the rewritten graph a node's value comes to exist."""
        claim = self.claims.get(node)
        return self.order.position[node] if claim is None else claim.place

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a node's value is computed from, taking a group as one call."""
        claim = self.claims.get(node)
        if claim is None:
            return node.all_input_nodes
        inside = set(claim.nodes)
        return [s for n in claim.nodes for s in n.all_input_nodes if s not in inside]

    def held(self, source: object) -> torch.Tensor | None:
        """The parameter or buffer `source` reads, if it is one."""
        if isinstance(source, Attribute):
            return self.tensors.get(source.path)
        if isinstance(source, fx.Node) and source.op == "get_attr":
            return self.tensors.get(str(source.target))
        return None


def spell(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """A node for people: `GroupNorm norm`, `softmax`, `.sum()`."""
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} {node.target}"
    if node.op == "call_method":
        return f".{node.target}()"
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return node.name
