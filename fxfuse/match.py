"""Grow the largest fusion group around an anchor.

Starting from the anchor, every user of a value in the group is tried in graph order. A user that
reads as a pointwise call joins if its other arguments exist before the group must, if nothing
between writes to a tensor, and if the program still fits a kernel. One that does not join bounds
the group: the values it reads become outputs, and its reason is kept for the report.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .anchors import LinearCall, NoMatch, NormCall, TensorSource, module_refusal
from .errors import ProgramError
from .graphs import Order, is_metadata, may_mutate
from .lower import lower
from .ops import COMPARISONS
from .patterns import Attribute, Unsupported, number, read_call
from .program import ACC, Arg, Builder, Program, Value
from .simplify import simplify

_FREE_OPS = frozenset({"copy", "view", "dropout"})
_ALIASING_OPS = _FREE_OPS | {"cast_f32", "cast_f16", "cast_bf16"}
_RESHAPES = (torch.reshape,)
_DROPOUTS = (F.dropout, torch.dropout)


@dataclass(frozen=True)
class FusionGroup:
    """An anchor and the pointwise program its epilogue will run.

    nodes: all nodes the group replaces, in graph order. as_written: the program before it was
    simplified, what eager runs. operands: what the program's operands are. outputs: the nodes whose values the program stores. dropouts: for each dropout of the
    program, the live training flag. views: the shape of each view. metadata: nodes that only read
    the shape of a value in the group. place: position in the graph where the fused call goes.
    bounds: what ended the group, and why.
    """

    anchor: LinearCall | NormCall
    nodes: tuple[fx.Node, ...]
    program: Program
    as_written: Program
    operands: tuple[TensorSource, ...]
    outputs: tuple[fx.Node, ...]
    dropouts: tuple[TensorSource, ...]
    views: tuple[tuple[Any, ...], ...]
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


@dataclass(frozen=True)
class _Joined:
    """A node in the group, and how long the builder was before it."""

    node: fx.Node
    value: Value
    instructions: int
    operands: int


class _Growth:
    """One group while it grows; implements patterns.Emitter."""

    def __init__(self, anchor: LinearCall | NormCall, graph: Graph) -> None:
        self.anchor = anchor
        self.graph = graph
        self.start = graph.order.position[anchor.node]
        self.builder = Builder()
        self.values: dict[fx.Node, Value] = {anchor.node: ACC}
        self.joined: list[_Joined] = []
        self.dropouts: list[tuple[TensorSource, int]] = []
        self.views: list[tuple[Any, ...]] = []
        self.limit = math.inf
        self.bounds: list[NoMatch] = []
        self.metadata: list[fx.Node] = []
        self.mutations = 0

    # patterns.Emitter

    def tensor(self, argument: Any) -> Arg:
        """A node, attribute or number as an instruction argument. Raises Unsupported."""
        if isinstance(argument, Attribute):
            return self.builder.operand(argument)
        if isinstance(argument, fx.Node):
            return self.values[argument] if argument in self.values else self._operand(argument)
        return number({"argument": argument}, "argument")

    def emit(self, op: str, *args: Arg, params: tuple[float, ...] = ()) -> Value:
        return self.builder.emit(op, *args, params=params)

    # Growth

    def grow(self) -> None:
        """Try users of the group's values, nearest first, until none is left."""
        seen: set[fx.Node] = set()
        queue: list[tuple[int, fx.Node]] = []
        position = self.graph.order.position

        def push(node: fx.Node) -> None:
            for user in node.users:
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(queue, (position[user], user))

        push(self.anchor.node)
        while queue:
            _, node = heapq.heappop(queue)
            refusal = self._join(node)
            if refusal is None:
                push(node)
                continue
            self.limit = min(self.limit, self.graph.place(node))
            if is_metadata(node):
                self.metadata.append(node)
            else:
                self.bounds.append(NoMatch(refusal, node))

    def _join(self, node: fx.Node) -> str | None:
        """Add `node` to the group; returns why not where that cannot be."""
        if node.op == "output":
            return "it is returned"
        if node in self.graph.claims:
            return "it belongs to another group"
        if is_metadata(node):
            return "it reads the shape"
        if node.op == "call_module":
            refusal = module_refusal(self.graph.modules[str(node.target)])
            if refusal is not None:
                return refusal
        mark = (len(self.builder.instructions), len(self.builder.operands))
        marks = (len(self.dropouts), len(self.views))
        try:
            value = self._read(node)
            self._check_order(node)
            program = self.builder.build([value])
            lower(simplify(program).program)
        except (Unsupported, ProgramError) as error:
            self._truncate(*mark)
            del self.dropouts[marks[0] :], self.views[marks[1] :]
            return str(error)
        self.values[node] = value
        self.mutations += may_mutate(node, self.graph.modules)
        self.joined.append(_Joined(node, value, *mark))
        return None

    def _read(self, node: fx.Node) -> Value:
        """Append the instructions of `node`. Raises Unsupported."""
        value = self._read_dropout(node) or self._read_view(node)
        if value is not None:
            return value
        call = read_call(node, self.graph.modules)
        if call is None:
            raise Unsupported(f"{spell(node, self.graph.modules)} is not a pointwise op")
        if call.in_place:
            self._check_in_place(node)
        return call.emit(self, call.arguments)

    def _operand(self, node: fx.Node) -> Arg:
        order = self.graph.order
        if self.graph.place(node) >= self.limit:
            raise Unsupported(f"its operand {node.name} is computed after the group must run")
        if order.position[node] > self.start and self._depends(node):
            raise Unsupported(f"its operand {node.name} depends on the group")
        return self.builder.operand(node)

    def _depends(self, node: fx.Node) -> bool:
        """Whether `node` needs a value of this group, taking other groups as one call each."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            claim = self.graph.claims.get(current)
            inputs = _inputs(claim) if claim is not None else current.all_input_nodes
            for source in inputs:
                if source in self.values or len(seen) > 4096:
                    return True
                if source not in seen and self.graph.order.position[source] > self.start:
                    seen.add(source)
                    stack.append(source)
        return False

    def _check_order(self, node: fx.Node) -> None:
        """Refuse to run `node`'s work across a write or, after a dropout, a random draw."""
        order = self.graph.order
        end = order.position[node]
        if order.mutating_between(self.start, end) > self.mutations:
            raise Unsupported("a tensor is written in place between the Linear and here")
        for index, (_, position) in enumerate(self.dropouts):
            later = len(self.dropouts) - index - 1
            if order.random_between(position, end) > later:
                raise Unsupported("random numbers are drawn between a dropout and here")

    def _check_in_place(self, node: fx.Node) -> None:
        """In-place is safe where nobody else can see the tensor: it is the group's own, and all
        readers of it, under any of its names, have read it already and are in the group."""
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or target not in self.values:
            raise Unsupported("it works in place on a tensor from outside the group")
        position = self.graph.order.position
        for alias in self._aliases(target):
            for user in alias.users:
                inside = user in self.values and position[user] < position[node]
                if user is not node and not inside:
                    raise Unsupported(f"it works in place on a tensor {user.name} also reads")

    def _aliases(self, node: fx.Node) -> list[fx.Node]:
        """Nodes of the group that may be names of the tensor `node` is, itself included."""
        roots = self._alias_roots()
        return [n for n in self.values if roots[n] is roots[node]]

    def _alias_roots(self) -> dict[fx.Node, fx.Node]:
        """For each node of the group, the first node that may share its memory."""
        roots = {node: node for node in self.values}
        for joined in self.joined:
            source = joined.node.args[0] if joined.node.args else None
            op = self.builder.instructions[joined.value.index - 1].op
            shares = op in _ALIASING_OPS or may_mutate(joined.node, self.graph.modules)
            if shares and isinstance(source, fx.Node) and source in roots:
                roots[joined.node] = roots[source]
        return roots

    def _read_dropout(self, node: fx.Node) -> Value | None:
        """Dropout whose activity is a live flag of the model."""
        flag: Any
        if node.op == "call_module":
            module = self.graph.modules[str(node.target)]
            if type(module) is not nn.Dropout:
                return None
            source, p, in_place = node.args[0], module.p, module.inplace
            flag = Attribute(f"{node.target}.training")
        elif node.op == "call_function" and node.target in _DROPOUTS:
            names = ("input", "p", "training", "inplace")
            a = {"p": 0.5, "training": True, "inplace": False}
            a |= dict(zip(names, node.args, strict=False)) | node.kwargs
            source, p, flag = a["input"], a["p"], a.get("train", a["training"])
            in_place = a["inplace"]
        else:
            return None
        if not isinstance(p, (int, float)) or (flag is True and p > 0):
            raise Unsupported("this dropout drops in eval mode, too")
        if in_place:
            self._check_in_place(node)
        value = self.tensor(source)
        if flag is False or p == 0:
            return self.emit("copy", value)
        self.dropouts.append((flag, self.graph.order.position[node]))
        return self.emit("dropout", value, params=(float(p), len(self.dropouts) - 1))

    def _read_view(self, node: fx.Node) -> Value | None:
        """A reshape that keeps the last dimension, whose size the weight tells."""
        if node.op == "call_method" and node.target in ("view", "reshape", "flatten"):
            args, name = node.args[1:], node.target
        elif node.op == "call_function" and node.target in (*_RESHAPES, torch.flatten):
            args, name = node.args[1:], "flatten" if node.target is torch.flatten else "view"
        else:
            return None
        if node.kwargs or not args:
            raise Unsupported(f"{name} in a form that may change the last dimension")
        if name == "flatten":
            if len(args) != 2 or args[0] != 0 or args[1] != -2:
                raise Unsupported("flatten may change the last dimension")
            shape: tuple[Any, ...] = (-1, self._columns())
        else:
            first = args[0]
            shape = tuple(first) if isinstance(first, (tuple, list)) else tuple(args)
        if shape[-1] != self._columns():
            raise Unsupported(f"{name} may change the last dimension")
        for size in shape:
            if isinstance(size, fx.Node):
                self._operand(size)
                del self.builder.operands[size]
        self.views.append(shape)
        return self.emit("view", self.tensor(node.args[0]), params=(len(self.views) - 1,))

    def _columns(self) -> int:
        """N, the size of the accumulator's last dimension. Raises Unsupported where unknown."""
        if isinstance(self.anchor, LinearCall):
            weight = self.anchor.weight
            path = weight.path if isinstance(weight, Attribute) else str(weight.target)
            tensor = self.graph.tensors.get(path)
            if tensor is not None and tensor.dim() == 2:
                return tensor.shape[1 if self.anchor.transposed else 0]
        raise Unsupported("the size of the last dimension is not known")

    # Result

    def group(self) -> FusionGroup | NoMatch:
        """The group as grown, shortened until it is worth a kernel and fits one."""
        while self.joined and self.joined[-1].node is not self.anchor.node:
            tail = self.builder.instructions[self.joined[-1].instructions :]
            reason = None if all(i.op in _FREE_OPS for i in tail) else self._misfit()
            if reason is None and not all(i.op in _FREE_OPS for i in tail):
                return self._finish()
            self._pop(reason)
        return NoMatch(self._why_empty(), self.anchor.node)

    def _misfit(self) -> str | None:
        """Why the group, with the outputs it has now, is not one kernel."""
        outputs = self._outputs()
        for node in outputs:
            value = self.values[node]
            if value != ACC and self.builder.instructions[value.index - 1].op in COMPARISONS:
                return "its bool result is used outside the group"
        roots = self._alias_roots()
        if len({roots[n] for n in outputs}) < len(outputs):
            return "two names of one tensor leave the group"
        place = self._place()
        for key in self.builder.operands:
            if isinstance(key, fx.Node) and self.graph.place(key) >= place:
                return f"operand {key.name} is computed after the group must run"
        try:
            lower(simplify(self.builder.build([self.values[n] for n in outputs])).program)
        except ProgramError as error:
            return str(error)
        return None

    def _pop(self, reason: str | None) -> None:
        last = self.joined.pop()
        self._truncate(last.instructions, last.operands)
        del self.values[last.node]
        self.metadata = [m for m in self.metadata if m.args[0] in self.values]
        if reason is not None:
            self.bounds.append(NoMatch(reason, last.node))
        self.bounds = [
            b for b in self.bounds if any(s in self.values for s in b.node.all_input_nodes)
        ]
        outside = (u for n in self.values for u in n.users if u not in self.values)
        self.limit = min((self.graph.place(u) for u in outside), default=math.inf)

    def _truncate(self, instructions: int, operands: int) -> None:
        del self.builder.instructions[instructions:]
        for key in list(self.builder.operands)[operands:]:
            del self.builder.operands[key]

    def _outputs(self) -> list[fx.Node]:
        """Nodes whose values leave the group, the last one first."""
        leaving = [
            node
            for node in self.values
            if any(u not in self.values and not is_metadata(u) for u in node.users)
        ]
        last = self.joined[-1].node
        return [last, *(n for n in leaving if n is not last)]

    def _place(self) -> float:
        last = self.graph.order.position[self.joined[-1].node]
        return min(last, self.limit - 0.5)

    def _finish(self) -> FusionGroup:
        outputs = self._outputs()
        program = self.builder.build([self.values[n] for n in outputs])
        short = simplify(program)
        keys = list(self.builder.operands)
        operands = [keys[i] for i in short.operands]
        return FusionGroup(
            anchor=self.anchor,
            nodes=tuple(self.values),
            program=short.program,
            as_written=program,
            operands=tuple(k for k in operands if isinstance(k, (fx.Node, Attribute))),
            outputs=tuple(outputs),
            dropouts=tuple(flag for flag, _ in self.dropouts),
            views=tuple(self.views),
            metadata=tuple(self.metadata),
            place=self._place(),
            bounds=tuple(self.bounds),
            notes=short.notes,
            ops_before=self._costly_nodes(),
        )

    def _costly_nodes(self) -> int:
        """Nodes of the chain that are a kernel each when run one by one."""
        ends = [j.instructions for j in self.joined[1:]] + [len(self.builder.instructions)]
        spans = zip((j.instructions for j in self.joined), ends, strict=True)
        chains = (self.builder.instructions[a:b] for a, b in spans)
        return sum(any(i.op not in _FREE_OPS for i in chain) for chain in chains)

    def _why_empty(self) -> str:
        named = [b for b in self.bounds if b.reason != "it is returned"]
        if not named:
            return "nothing follows it: its result is returned"
        bound = named[0]
        return f"{spell(bound.node, self.graph.modules)} follows it, and {bound.reason}"


def match_group(anchor: LinearCall | NormCall, graph: Graph) -> FusionGroup | NoMatch:
    """The largest group around `anchor` that one kernel call can run, or why there is none."""
    growth = _Growth(anchor, graph)
    if isinstance(anchor, LinearCall) and anchor.extra is not None:
        try:
            growth.values[anchor.node] = growth.emit("add", ACC, growth.tensor(anchor.extra))
        except Unsupported as error:
            return NoMatch(str(error), anchor.node)
        growth.joined.append(_Joined(anchor.node, growth.values[anchor.node], 0, 0))
    growth.grow()
    return growth.group()


def _inputs(group: FusionGroup) -> list[fx.Node]:
    """Nodes outside `group` its call reads."""
    inside = set(group.nodes)
    return [s for node in group.nodes for s in node.all_input_nodes if s not in inside]


def spell(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """A node for people: `GroupNorm norm`, `softmax`, `.sum()`."""
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} {node.target}"
    if node.op == "call_method":
        return f".{node.target}()"
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return node.name
