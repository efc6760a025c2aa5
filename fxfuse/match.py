"""Grow the largest fusion group around an anchor.

Starting from the anchor, every user of a value in the group is tried in graph order. A user that
reads as a pointwise call joins if its other arguments exist before the group must, if nothing
between writes to a tensor, and if the program still fits a kernel. One that does not join bounds
the group: the values it reads become outputs, and its reason is kept for the report.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from .anchors import LinearCall, NoMatch, NormCall, TensorSource, module_refusal
from .errors import ProgramError
from .graphs import is_metadata, may_mutate
from .groups import CLAIMED, FusionGroup, Graph, spell
from .lower import lower
from .ops import CASTS, GROUP_WIDTHS
from .patterns import Attribute, Unsupported, read_call
from .program import (
    ACC,
    Arg,
    Builder,
    Kind,
    Operand,
    Value,
    adds_truth_values,
    kinds_of,
    shape_classes,
)
from .simplify import simplify
from .transparent import read_dropout, read_view

_FREE_OPS = frozenset({"copy", "view", "dropout"})
_ALIASING_OPS = _FREE_OPS | CASTS


@dataclass(frozen=True)
class _Mark:
    """Lengths of a growth's lists."""

    instructions: int = 0
    operands: int = 0
    dropouts: int = 0
    views: int = 0


@dataclass(frozen=True)
class _Joined:
    """A node in the group, and how much there was of everything before it."""

    node: fx.Node
    value: Value
    mark: _Mark


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
        self.views: list[tuple[Any, ...] | fx.Node] = []
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
        if isinstance(argument, bool) or not isinstance(argument, (int, float)):
            raise Unsupported(f"{argument} is neither a tensor nor a number")
        return float(argument)

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
            return CLAIMED
        if is_metadata(node):
            return "it reads the shape"
        if node.op == "call_module":
            refusal = module_refusal(self.graph.modules[str(node.target)])
            if refusal is not None:
                return refusal
        lists = (self.builder.instructions, self.builder.operands, self.dropouts, self.views)
        mark = _Mark(*map(len, lists))
        try:
            value = self._read(node)
            self._check_order(node)
            self._check_truth_values(node, value, mark.instructions)
            self._check_groups(mark.instructions)
            program = self.builder.build([value])
            lower(simplify(program).program)
        except (Unsupported, ProgramError) as error:
            self._truncate(mark)
            return str(error)
        self.values[node] = value
        self.mutations += may_mutate(node, self.graph.modules)
        self.joined.append(_Joined(node, value, mark))
        return None

    def _read(self, node: fx.Node) -> Value:
        """Append the instructions of `node`. Raises Unsupported."""
        value = self._read_dropout(node) or self._read_view(node)
        if value is not None:
            return value
        call = read_call(node, self.graph.modules)
        if call is None:
            raise Unsupported(f"{spell(node, self.graph.modules)} is not a pointwise op")
        if not call.in_place:
            return call.emit(self, call.arguments)
        self._check_in_place(node)
        value = call.emit(self, call.arguments)
        target = self.values[node.args[0]]  # type: ignore[index]
        # Whatever else it reads, an in-place op keeps its tensor's shape and dtype.
        return self.emit("like", value, target)

    def _check_truth_values(self, node: fx.Node, value: Value, start: int) -> None:
        """Refuse what torch computes as logical or, or in whole numbers."""
        if adds_truth_values(self.builder.instructions, start):
            raise Unsupported("it may add truth values")
        given = (*node.args, *node.kwargs.values())
        kind = kinds_of(self.builder.instructions)[value.index]
        if kind is Kind.UNKNOWN and any(type(a) is int for a in given):
            raise Unsupported("it may compute whole numbers")

    def _check_groups(self, start: int) -> None:
        """Refuse norms over groups that no kernel adds up."""
        for instruction in self.builder.instructions[start:]:
            if instruction.op != "group_norm":
                continue
            columns, groups = self._columns(), int(instruction.params[0])
            if columns is None:
                raise Unsupported("its number of channels is not known")
            width = columns // groups
            if columns % groups or width not in GROUP_WIDTHS:
                raise Unsupported(
                    f"its groups have {columns / groups:g} channels, expected one of "
                    f"{', '.join(map(str, GROUP_WIDTHS))}"
                )

    def _operand(self, node: fx.Node) -> Arg:
        self._check_exists(node)
        return self.builder.operand(node)

    def _check_exists(self, node: fx.Node) -> None:
        """Raises Unsupported unless `node` is computed before the fused call must run."""
        order = self.graph.order
        if self.graph.place(node) >= self.limit:
            raise Unsupported(f"its operand {node.name} is computed after the group must run")
        if order.position[node] > self.start and self._depends(node):
            raise Unsupported(f"its operand {node.name} depends on the group")

    def _depends(self, node: fx.Node) -> bool:
        """Whether `node` needs a value of this group, taking other groups as one call each."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            for source in self.graph.inputs(current):
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
        call = read_dropout(node, self.graph.modules)
        if call is None:
            return None
        if call.in_place:
            self._check_in_place(node)
        value = self.tensor(call.source)
        if call.flag is False:
            return self.emit("copy", value)
        self.dropouts.append((call.flag, self.graph.order.position[node]))
        return self.emit("dropout", value, params=(call.p, len(self.dropouts) - 1))

    def _read_view(self, node: fx.Node) -> Value | None:
        """A reshape that keeps the last dimension, whose size the weight tells."""
        call = read_view(node, self._columns())
        if call is None:
            return None
        sizes = (call.shape,) if isinstance(call.shape, fx.Node) else call.shape
        for size in sizes:
            if isinstance(size, fx.Node):
                self._check_exists(size)
        self.views.append(call.shape)
        return self.emit("view", self.tensor(call.source), params=(len(self.views) - 1,))

    def _columns(self) -> int | None:
        """N, the size of the accumulator's last dimension, where it is known."""
        if isinstance(self.anchor, LinearCall):
            tensor = self.graph.held(self.anchor.weight)
            if tensor is not None and tensor.dim() == 2:
                return tensor.shape[1 if self.anchor.transposed else 0]
        return None

    # Result

    def group(self) -> FusionGroup | NoMatch:
        """The group as grown, shortened until it is worth a kernel and fits one."""
        while self.joined and self.joined[-1].node is not self.anchor.node:
            tail = self.builder.instructions[self.joined[-1].mark.instructions :]
            reason = None if all(i.op in _FREE_OPS for i in tail) else self._misfit()
            if reason is None and not all(i.op in _FREE_OPS for i in tail):
                return self._finish()
            self._pop(reason)
        return NoMatch(self._why_empty(), self.anchor.node)

    def _misfit(self) -> str | None:
        """Why the group, with the outputs it has now, is not one kernel."""
        outputs = self._outputs()
        kinds = kinds_of(self.builder.instructions)
        if any(kinds[self.values[node].index] is Kind.BOOL for node in outputs):
            return "its bool result is used outside the group"
        roots = self._alias_roots()
        if len({roots[n] for n in outputs}) < len(outputs):
            return "two names of one tensor leave the group"
        place = self._place()
        # So that dropouts of different groups keep their order, each draws no earlier than it did.
        if any(position > place for _, position in self.dropouts):
            return "a value of the group is needed before it draws random numbers"
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
        self._truncate(last.mark)
        del self.values[last.node]
        self.metadata = [m for m in self.metadata if m.args[0] in self.values]
        if reason is not None:
            self.bounds.append(NoMatch(reason, last.node))
        self.bounds = [
            b for b in self.bounds if any(s in self.values for s in b.node.all_input_nodes)
        ]
        outside = (u for n in self.values for u in n.users if u not in self.values)
        self.limit = min((self.graph.place(u) for u in outside), default=math.inf)

    def _truncate(self, mark: _Mark) -> None:
        del self.builder.instructions[mark.instructions :]
        for key in list(self.builder.operands)[mark.operands :]:
            del self.builder.operands[key]
        del self.dropouts[mark.dropouts :], self.views[mark.views :]

    def _outputs(self) -> list[fx.Node]:
        """Nodes whose values leave the group, the last one first.

        A value of which only the shape is read stays inside if the first output tells its shape.
        """
        last = self.joined[-1].node
        shapes = shape_classes(self.builder.instructions, self._widens)
        shape = shapes[self.values[last].index]

        def leaves(node: fx.Node) -> bool:
            told = shapes[self.values[node].index] == shape
            users = (u for u in node.users if u not in self.values)
            return any(not (told and is_metadata(u)) for u in users)

        return [last, *(n for n in self.values if n is not last and leaves(n))]

    def _widens(self, operand: Operand) -> bool:
        """Whether an operand's shape may show in a result's."""
        tensor = self.graph.held(list(self.builder.operands)[operand.index])
        if tensor is None or tensor.dim() > 1:
            return True
        return tensor.numel() != 1 and tensor.shape[0] != self._columns()

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
        starts = [j.mark.instructions for j in self.joined]
        spans = zip(starts, [*starts[1:], len(self.builder.instructions)], strict=True)
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
        growth.joined.append(_Joined(anchor.node, growth.values[anchor.node], _Mark()))
    growth.grow()
    return growth.group()


__all__ = ["FusionGroup", "Graph", "match_group", "spell"]
