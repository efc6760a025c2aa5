"""Module -> graphs: what can be traced becomes a region, the rest a leaf with its reason."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxfuse import ambient
from fxfuse.clone import clone_tree
from fxfuse.proxies import none_tests
from fxfuse.tracer import RegionTracer, UntraceableError
from fxfuse.traits import is_closed, is_torch_leaf, region_reason

# torch.fx patches nn.Module for everybody while it traces, and so do we.
_TRACING = threading.RLock()
_MAX_TRIALS = 4  # optional parameters tried one by one; more are all held
_HOLDABLE = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Leaf:
    """A module capture did not look into, and why."""

    path: str
    type_name: str
    reason: str


@dataclass(frozen=True)
class Region:
    """A module whose forward was traced.

    path: qualified name in the model, "" for the root.
    module: the clone whose attributes the graph's targets name.
    optional: parameters for which the graph does not hold whatever is passed. One with a default
        must be left at it; one without must not be None. The module's own forward serves the rest.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Capture:
    """A clone of the model, the graphs of its traceable parts (callers first), and the rest."""

    root: nn.Module
    regions: tuple[Region, ...]
    leaves: tuple[Leaf, ...]


def capture(model: nn.Module) -> Capture:
    """Clone `model` and trace as much of the clone as a graph can represent.

    `model` itself is left as it was. Nothing is raised for what cannot be traced: it is a leaf.
    A submodule that fails is a leaf of its caller and then tried on its own, its children with it,
    so that work is linear in the size of the model however many parts fail.
    """
    root = clone_tree(model)
    regions: list[Region] = []
    leaves: dict[str, Leaf] = {}
    failed: dict[int, str] = {}
    seen: set[int] = set()
    pending = [("", root)]
    with _TRACING, ambient.watching() as watch:
        session = _Session(watch, failed)
        while pending:
            path, module = pending.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            if path and is_torch_leaf(module):
                continue
            region, inner_leaves, reason = _try_region(session, path, module)
            if region is not None:
                regions.append(region)
            elif reason is not None:
                leaves.setdefault(path, Leaf(path, type(module).__name__, reason))
            found = []
            for inner, why in inner_leaves.items():
                child = module.get_submodule(inner)
                full = _join(path, inner)
                leaves.setdefault(full, Leaf(full, type(child).__name__, why))
                found.append((full, child))
            if (region is None or region.optional) and not is_closed(module):
                found += [
                    (_join(path, name), child)
                    for name, child in module.named_children()
                    if name != "parametrizations"
                ]
            pending.extend(reversed(found))
    return Capture(root, tuple(regions), tuple(leaves.values()))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


@dataclass(frozen=True)
class _Session:
    """One capture: the watch on torch, and the submodules known to fail (id -> reason)."""

    watch: ambient.Watch
    failed: dict[int, str]

    def trace(
        self, path: str, module: nn.Module, held: Mapping[str, Any]
    ) -> tuple[RegionTracer, fx.Graph]:
        """Trace `module` with some parameters held at values. Raises UntraceableError."""
        tracer = RegionTracer(self.watch, path, self.failed, held)
        return tracer, tracer.trace(module)

    def trial(self) -> _Session:
        """A session whose failures are forgotten."""
        return _Session(self.watch, dict(self.failed))


def _try_region(
    session: _Session, path: str, module: nn.Module
) -> tuple[Region | None, dict[str, str], str | None]:
    """The region of `module`, the leaves in it (path in `module` -> reason), the reason if none."""
    reason = region_reason(module)
    if reason is not None:
        return None, {}, reason
    if type(module).forward is nn.Module.forward:  # ModuleList and its kin
        return None, {}, None if is_container(module) else "the module has no forward of its own"
    held = _literal_defaults(module)
    try:
        tracer, graph = session.trace(path, module, held)
    except UntraceableError as untraceable:
        return None, {}, str(untraceable)
    if held:
        tracer, graph, held = _widen(session, path, module, held, tracer, graph)
    optional = (*held, *_needed(session, path, module, held, graph))
    return Region(path, module, graph, optional), tracer.leaves, None


def is_container(module: nn.Module) -> bool:
    """True for torch's lists and dicts of modules, which nobody calls."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """The named parameters of a module's forward, `self` left out."""
    signature = inspect.signature(type(module).forward)
    named = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in list(signature.parameters.values())[1:] if p.kind not in named]


def _literal_defaults(module: nn.Module) -> dict[str, Any]:
    return {
        p.name: p.default
        for p in _parameters(module)
        if type(p.default) in _HOLDABLE and p.default == p.default
    }


def _widen(
    session: _Session,
    path: str,
    module: nn.Module,
    held: dict[str, Any],
    tracer: RegionTracer,
    graph: fx.Graph,
) -> tuple[RegionTracer, fx.Graph, dict[str, Any]]:
    """Release the optional parameters that no Python decision depends on.

    Python sees the default while a parameter is held and a proxy when it is not. If both traces
    are the same graph, nothing was decided by it and the graph holds for every value.
    """

    def released(names: tuple[str, ...]) -> tuple[RegionTracer, fx.Graph] | None:
        rest = {name: item for name, item in held.items() if name not in names}
        try:
            trial = session.trial().trace(path, module, rest)
        except UntraceableError:
            return None
        return trial if same_graph(trial[1], graph, {n: held[n] for n in names}) else None

    names = tuple(held)
    trial = released(names)
    if trial is None and 1 < len(names) <= _MAX_TRIALS:
        names = tuple(name for name in names if released((name,)) is not None)
        trial = released(names) if names else None
    if trial is None:
        return tracer, graph, held
    return *trial, {name: item for name, item in held.items() if name not in names}


def _needed(
    session: _Session, path: str, module: nn.Module, held: Mapping[str, Any], graph: fx.Graph
) -> tuple[str, ...]:
    """Required parameters whose being None would have made another graph.

    The first one is taken to be the tensor the module works on.
    """
    required = [p.name for p in _parameters(module)[1:] if p.default is inspect.Parameter.empty]
    if not required:
        return ()
    tested = none_tests(inspect.unwrap(type(module).forward).__code__)
    needed = []
    for name in required:
        if name not in tested:
            try:
                _, other = session.trial().trace(path, module, {**held, name: None})
            except UntraceableError:
                continue  # None fails in the original as well
            if same_graph(graph, other, {name: None}):
                continue
        needed.append(name)
    return tuple(needed)


def same_graph(general: fx.Graph, special: fx.Graph, values: Mapping[str, Any]) -> bool:
    """True if `general` is `special` once its placeholders in `values` take those values."""
    if len(general.nodes) != len(special.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            if a.op == "placeholder" and a.target in values and not isinstance(b, fx.Node):
                value = values[str(a.target)]
                return type(b) is type(value) and bool(b == value)
            return isinstance(b, fx.Node) and twin[a] is b
        if isinstance(a, (tuple, list)):
            return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        if isinstance(a, slice):
            return isinstance(b, slice) and all(
                same(getattr(a, end), getattr(b, end)) for end in ("start", "stop", "step")
            )
        return type(a) is type(b) and bool(a == b)

    for a, b in zip(general.nodes, special.nodes, strict=True):
        twin[a] = b
        if a.op != b.op or a.target != b.target or a.op == "placeholder":
            if a.op != b.op or a.target != b.target:
                return False
            continue
        if not (same(a.args, b.args) and same(a.kwargs, b.kwargs)):
            return False
    return True
