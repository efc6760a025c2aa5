"""What `optimize` found, fused and refused, as data and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

from .anchors import LinearCall
from .capture import Leaf
from .errors import InputError
from .freeze import Weights, count_weights
from .fused import backwards_taken, routes_taken
from .groups import CLAIMED
from .module import REPORT
from .patterns import Attribute
from .plan import Refusal, RegionPlan, source_name
from .program import parse
from .rewrite import site_of

_LISTED_NODES = 40
# Kernels a group takes on each route: torch's GEMM runs the product where ours does not.
_ROUTE_LAUNCHES = {
    "cpu": 2,
    "cublas": 2,
    "portable": 1,
    "hopper": 1,
    "hopper-high": 2,
    "hopper-highest": 2,
    "portable-highest": 2,
    "skinny": 1,
    "pointwise": 1,
}


@dataclass(frozen=True)
class OperandReport:
    """An extra input of a group. kind: scalar, row, column, full (perhaps periodic or repeated),
    or "?" where only a call can tell."""

    name: str
    kind: str


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: rows M, columns N, depth K (0 without a GEMM); bytes moved by eager's
    kernels and by one fused kernel, each tensor counted once for every kernel that reads or writes
    it; bytes of the product, which a call of two kernels writes and reads on top."""

    m: int
    n: int
    k: int
    bytes_before: int
    bytes_after: int
    product_bytes: int


@dataclass(frozen=True)
class GroupReport:
    """One fused group. chain: op names in order. program: its text; as_written: before it
    was simplified. stores: tensors it writes.
    launches_before: kernels eager launches for it. bounds: what the group ends at, and why.
    shape: of the example inputs, where there were any."""

    site: str
    anchor: str
    gemm: bool
    chain: tuple[str, ...]
    program: str
    as_written: str
    operands: tuple[OperandReport, ...]
    stores: int
    launches_before: int
    notes: tuple[str, ...]
    bounds: tuple[str, ...]
    shape: Shape | None = None

    @property
    def routes(self) -> tuple[str, ...]:
        """The kernel routes calls of this group took so far, with the reason of a fallback."""
        taken = routes_taken(self.site, self.program)
        return tuple(r if reason is None else f"{r}: {reason}" for r, reason in taken)

    @property
    def backward(self) -> tuple[str, ...]:
        """What calls of this group kept for their gradients so far, or why torch's own ops compute
        those; empty before a call that is differentiated."""
        return tuple(backwards_taken(self.site, self.program))

    @property
    def launches_after(self) -> int:
        """Kernels a call takes by the routes seen so far. Before any call it is not known whether
        one kernel will serve a GEMM group, and two are counted."""
        seen = [r.partition(":")[0] for r in self.routes]
        planned = 2 if self.gemm else 1
        return max((_ROUTE_LAUNCHES.get(r, self.launches_before) for r in seen), default=planned)

    @property
    def bytes_after(self) -> int | None:
        """Bytes the kernels of a call move; a second kernel reads what the first one wrote."""
        if self.shape is None:
            return None
        between = 2 * self.shape.product_bytes if self.gemm and self.launches_after > 1 else 0
        return self.shape.bytes_after + between


@dataclass(frozen=True)
class NodeRow:
    """A graph node as the report lists it."""

    op: str
    target: str
    inputs: str


@dataclass(frozen=True)
class Report:
    """Everything `optimize` did to a model. `print(report)` shows it as tables.

    weights: as they are frozen at the moment `report` is asked.
    """

    model: str
    groups: tuple[GroupReport, ...]
    refusals: tuple[Refusal, ...]
    leaves: tuple[Leaf, ...]
    nodes_before: tuple[NodeRow, ...] = field(repr=False)
    nodes_after: tuple[NodeRow, ...] = field(repr=False)
    shapes_unknown: str | None = None
    weights: Weights = field(default_factory=Weights)

    @property
    def totals(self) -> dict[str, dict[str, int | None]]:
        """Nodes, kernel launches and bytes moved of all groups, before and after.

        Bytes are None where no shapes are known.
        """
        shapes = [g.shape for g in self.groups]
        known = [s for s in shapes if s is not None]
        complete = bool(known) and len(known) == len(shapes)
        return {
            "nodes": {"before": len(self.nodes_before), "after": len(self.nodes_after)},
            "launches": {
                "before": sum(g.launches_before for g in self.groups),
                "after": sum(g.launches_after for g in self.groups),
            },
            "bytes": {
                "before": sum(s.bytes_before for s in known) if complete else None,
                "after": sum(g.bytes_after or 0 for g in self.groups) if complete else None,
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; what `to_json` writes."""
        groups = [
            asdict(g)
            | {
                "routes": list(g.routes),
                "backward": list(g.backward),
                "launches_after": g.launches_after,
                "bytes_after": g.bytes_after,
            }
            for g in self.groups
        ]
        return {
            "model": self.model,
            "groups": groups,
            "refusals": [asdict(r) for r in self.refusals],
            "leaves": [asdict(leaf) for leaf in self.leaves],
            "totals": self.totals,
            "weights": asdict(self.weights),
            "shapes_unknown": self.shapes_unknown,
            "nodes_before": [asdict(n) for n in self.nodes_before],
            "nodes_after": [asdict(n) for n in self.nodes_after],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        return "\n\n".join(section for section in _sections(self) if section)


def report(optimized: nn.Module) -> Report:
    """The report of a module `optimize` returned. Raises InputError for any other object."""
    found = optimized.__dict__.get(REPORT) if isinstance(optimized, nn.Module) else None
    if not isinstance(found, Report):
        raise InputError(
            f"report: {type(optimized).__name__} is not a module returned by fxfuse.optimize"
        )
    return replace(found, weights=count_weights(optimized))


def nested_reports(model: nn.Module) -> dict[str, Report]:
    """The reports of the parts of a model that were optimised before, by their paths."""
    found = {name: m.__dict__.get(REPORT) for name, m in model.named_modules() if name}
    return {name: r for name, r in found.items() if isinstance(r, Report)}


def with_nested(report: Report, nested: Mapping[str, Report]) -> Report:
    """A report that tells what the parts optimised before hold, too."""
    groups, refusals, before, after = (
        [*report.groups],
        [*report.refusals],
        [*report.nodes_before],
        [*report.nodes_after],
    )
    for path, inner in nested.items():
        groups += [replace(g, anchor=f"{path}.{g.anchor}") for g in inner.groups]
        refusals += [replace(r, name=f"{path}.{r.name}") for r in inner.refusals]
        before += inner.nodes_before
        after += inner.nodes_after
    leaves = tuple(leaf for leaf in report.leaves if leaf.path not in nested)
    return replace(
        report,
        groups=tuple(groups),
        refusals=tuple(refusals),
        leaves=leaves,
        nodes_before=tuple(before),
        nodes_after=tuple(after),
    )


# Building ----------------------------------------------------------------------------------------


def list_nodes(graph: fx.Graph) -> tuple[NodeRow, ...]:
    """The rows of a graph, one for each call it makes."""
    return tuple(
        NodeRow(n.name, _target(n), ", ".join(_input(s) for s in n.all_input_nodes))
        for n in graph.nodes
        if n.op.startswith("call_")
    )


def _target(node: fx.Node) -> str:
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", node.target))
        if name in ("fused_linear", "fused_pointwise"):
            text = next(a for a in node.args if isinstance(a, str))
            return f"{name}[{' -> '.join(parse(text).chain)}]"
        return name
    return f".{node.target}()" if node.op == "call_method" else f"{node.target}()"


def _input(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else node.name


def describe_groups(plan: RegionPlan) -> tuple[GroupReport, ...]:
    """The groups of a plan, as the report keeps them."""
    return tuple(_describe(plan, i) for i in range(len(plan.groups)))


def _describe(plan: RegionPlan, index: int) -> GroupReport:
    group = plan.groups[index]
    gemm = isinstance(group.anchor, LinearCall)
    root = plan.region.module
    columns = None
    if isinstance(group.anchor, LinearCall):
        weight = _held(root, group.anchor.weight)
        columns = None if weight is None else weight.shape[1 if group.anchor.transposed else 0]
    site = site_of(plan, group.anchor)
    return GroupReport(
        site=site,
        anchor=site.partition(" (")[0],
        gemm=gemm,
        chain=group.program.chain,
        program=str(group.program),
        as_written=str(group.as_written),
        operands=tuple(
            OperandReport(source_name(o), _static_kind(_held(root, o), columns))
            for o in group.operands
        ),
        stores=len(group.outputs),
        launches_before=group.ops_before + int(gemm),
        notes=group.notes,
        bounds=tuple(
            f"{b.node.name}: {b.reason}"
            for b in group.bounds
            if b.node.op != "output" and b.reason != CLAIMED
        ),
    )


def _held(root: nn.Module, source: fx.Node | Attribute) -> torch.Tensor | None:
    """The tensor `root` holds under an attribute or get_attr node, if that is what it is."""
    if isinstance(source, fx.Node) and source.op != "get_attr":
        return None
    value: Any = root
    for part in source_name(source).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) else None


def _static_kind(tensor: torch.Tensor | None, columns: int | None) -> str:
    if tensor is None:
        return "?"
    if tensor.numel() == 1:
        return "scalar"
    return "row" if tensor.dim() == 1 and tensor.shape[0] == columns else "?"


def with_shape(group: GroupReport, shape: Shape, kinds: tuple[str, ...]) -> GroupReport:
    """A group with what a call on example inputs told."""
    operands = tuple(replace(o, kind=k) for o, k in zip(group.operands, kinds, strict=True))
    return replace(group, shape=shape, operands=operands)


# Printing ----------------------------------------------------------------------------------------


def _sections(report: Report) -> list[str]:
    fused = len(report.groups)
    linear = sum(g.gemm for g in report.groups)
    title = f"{report.model}: {fused} fused group{'s' * (fused != 1)}, {linear} with a GEMM; "
    title += f"{len(report.refusals)} Linear{'s' * (len(report.refusals) != 1)} not fused"
    sections = [title]
    sections.append("Graph before\n" + _node_table(report.nodes_before))
    sections.append("Graph after\n" + _node_table(report.nodes_after))
    if report.groups:
        sections.append("Fused groups\n" + _group_table(report.groups))
        sections.append(_notes(report.groups))
    if report.refusals:
        rows = [(r.name, r.reason, r.source) for r in report.refusals]
        sections.append("Not fused\n" + tabulate(rows, ("Linear", "because", "at")))
    if report.leaves:
        leaves = [(leaf.path or "(root)", leaf.type_name, leaf.reason) for leaf in report.leaves]
        sections.append("Not traced\n" + tabulate(leaves, ("module", "type", "because")))
    sections.append("Totals of the fused groups\n" + _totals_table(report))
    sections.append(_weights_line(report.weights))
    if report.shapes_unknown:
        sections.append(f"Not all shapes are known: {report.shapes_unknown}")
    return sections


def _node_table(rows: tuple[NodeRow, ...]) -> str:
    shown = [(r.op, r.target, r.inputs) for r in rows[:_LISTED_NODES]]
    if len(rows) > _LISTED_NODES:
        shown.append((f"... {len(rows) - _LISTED_NODES} more", "", ""))
    return tabulate(shown, ("node", "call", "reads"))


def _group_table(groups: tuple[GroupReport, ...]) -> str:
    trained = any(g.backward for g in groups)
    rows = [
        (
            g.anchor,
            f"{g.shape.m} x {g.shape.k} -> {g.shape.n}" if g.shape and g.gemm else _plain_shape(g),
            " -> ".join(g.chain),
            ", ".join(f"{o.name} ({o.kind})" for o in g.operands) or "-",
            g.stores,
            "; ".join(g.routes) or "-",
            *(["; ".join(g.backward) or "-"] if trained else []),
        )
        for g in groups
    ]
    headers = ("anchor", "M x K -> N", "chain", "operands", "stores", "route", "backward")
    return tabulate(rows, headers if trained else headers[:-1])


def _plain_shape(group: GroupReport) -> str:
    return f"{group.shape.m} x {group.shape.n}" if group.shape else "?"


def _notes(groups: tuple[GroupReport, ...]) -> str:
    lines = [f"  {g.anchor}: {note}" for g in groups for note in g.notes]
    lines += [f"  {g.anchor} ends at {bound}" for g in groups for bound in g.bounds]
    return "Notes\n" + "\n".join(lines) if lines else ""


def _totals_table(report: Report) -> str:
    def spell(name: str, count: int | None) -> str:
        if count is None:
            return "?"
        return _megabytes(count) if name == "bytes" else str(count)

    names = {"nodes": "graph nodes", "launches": "kernel launches", "bytes": "bytes moved"}
    rows = [
        (names[name], spell(name, t["before"]), spell(name, t["after"]))
        for name, t in report.totals.items()
    ]
    return tabulate(rows, ("", "before", "after"), disable_numparse=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _weights_line(weights: Weights) -> str:
    if not weights.total:
        return ""
    text = f"Weights of the Linears: {weights.total}, "
    if not weights.frozen:
        return text + "not frozen"
    if weights.frozen < weights.total:
        return text + (
            f"{weights.frozen} of them frozen ({_megabytes(weights.kept_bytes)} kept); "
            "fxfuse.freeze freezes the others"
        )
    return text + f"frozen ({_megabytes(weights.kept_bytes)} kept)"
