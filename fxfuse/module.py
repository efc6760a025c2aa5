"""The optimised module: the original's class and state around an fx graph as its forward."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate

from . import frozen

# Attributes of optimised modules: the report, on the one `optimize` returned; and the paths of
# the weights that are frozen, on each that has any. Plain data, which copies and pickles keep.
REPORT = "_fxfuse_report"
FROZEN = "_fxfuse_frozen"
_KEPT_META = ("source", "module_path")


class FusedModule:
    """Mixin of every optimised module; the class attribute `original_class` is what it was."""

    original_class: type[nn.Module] = nn.Module
    __dict__: dict[str, Any]

    def __init_subclass__(cls, **_: Any) -> None:
        """Kept from the original class: it is not being subclassed by its author."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(module)(...)` in a model's own code means a fresh module of the original class."""
        return cls.original_class(*args, **kwargs)

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on this module's (optimised) children."""
        return self.original_class.forward(self, *args, **kwargs)  # type: ignore[arg-type]

    def _recompile_submodules(self) -> list[Any]:
        """Nothing: each optimised child is compiled when it is built or changed."""
        return []

    def _replicate_for_data_parallel(self) -> Any:
        replica = object.__new__(type(self))
        replica.__dict__.update(self.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            replica.__dict__[registry] = self.__dict__[registry].copy()
        replica.__dict__["_parameters"] = {}
        replica.__dict__["_is_replica"] = True
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)  # type: ignore[misc]
        mark_weights(self)  # torch may have put new parameters in the place of the old
        return result

    def __str__(self) -> str:
        return self.original_class.__str__(self)

    def __copy__(self) -> Any:
        new = _allocate(self.original_class)
        new.__dict__.update(self.__dict__)
        _install(new, copy.deepcopy(self.__dict__["_graph"]))
        mark_weights(new)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = _allocate(self.original_class)
        memo[id(self)] = new
        for name, item in self.__dict__.items():
            if name != "_graph":
                new.__dict__[name] = copy.deepcopy(item, memo)
        _install(new, copy.deepcopy(self.__dict__["_graph"]))
        mark_weights(new)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _allocate, (self.original_class,), self.__getstate__()

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __getstate__(self) -> dict[str, Any]:
        """The original's pickled state and the graph, as data and not as code to be traced."""
        attributes = self.__dict__
        if _defines(self.original_class, "__getstate__"):
            attributes = self.original_class.__getstate__(self)  # type: ignore[arg-type]
        attributes = {name: item for name, item in attributes.items() if name != "_graph"}
        return {"attributes": attributes, "graph": pack_graph(self.__dict__["_graph"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.original_class.__setstate__(self, state["attributes"])  # type: ignore[arg-type]
        _install(self, unpack_graph(state["graph"]))
        mark_weights(self)


def mark_weights(module: Any, _: object = None) -> None:
    """Mark the weights of a frozen module that are in place now; also its hook of loading."""
    for _path, owner, name in find_places(module, module.__dict__.get(FROZEN, ())):
        frozen.mark(owner, name)


def find_places(module: Any, paths: Iterable[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """`(path, owner, name)` for each path of a tensor in `module` whose owner is there."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        try:
            found = module.get_submodule(owner)
        except AttributeError:  # it was taken out of the module
            continue
        if "_parameters" in vars(found):  # in a cycle of modules, one may not be unpickled yet
            yield path, found, name


class _Delegate:
    """Stands in for the original class where no class can derive from it and fx.GraphModule.

    It finds what nn.Module does not define itself; overrides of nn.Module's methods are not found.
    """

    original_class: type[nn.Module]

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)  # type: ignore[arg-type]
        except AttributeError:
            for kind in self.original_class.__mro__:
                if name in vars(kind):
                    found = vars(kind)[name]
                    bind = getattr(type(found), "__get__", None)
                    return found if bind is None else bind(found, self, type(self))
            raise


class GuardedCodeGen(CodeGen):
    """Starts the generated forward with the guard of a region's optional parameters."""

    def __init__(self, guard: str) -> None:
        super().__init__()
        self.guard = guard

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        return str(super().gen_fn_def(*args, **kwargs)) + self.guard


def build_module(
    region_module: nn.Module, graph: fx.Graph, optional: tuple[str, ...] = ()
) -> fx.GraphModule:
    """A module that is `region_module` in everything but its forward, which runs `graph`.

    It takes over the state of `region_module` (a clone from `capture`): the same parameter,
    buffer, child and hook registries, so either sees what is installed in the other. Its class
    derives from FusedModule, the original class and fx.GraphModule. `optional` is as in `Region`:
    a call the graph does not hold for runs the original forward.
    """
    kind = type(region_module)
    if isinstance(region_module, fx.GraphModule):  # its class is made for one instance
        kind = next(k for k in kind.__mro__ if not k.__qualname__.endswith("GraphModuleImpl"))
    new: Any = _allocate(kind)
    new.__dict__.update(region_module.__dict__)
    if optional:
        graph.set_codegen(GuardedCodeGen(_guard(kind, graph, optional)))
    _install(new, graph)
    return new


def _defines(kind: type, name: str) -> bool:
    return any(
        name in vars(k) for k in kind.__mro__ if k not in (object, nn.Module, fx.GraphModule)
    )


def _allocate(original_class: type[nn.Module]) -> Any:
    """An optimised module with torch.fx's own attributes and no state of the model yet."""
    bases: tuple[type, ...] = (FusedModule, original_class)
    if not issubclass(original_class, fx.GraphModule):
        bases += (fx.GraphModule,)
    names = {
        "original_class": original_class,
        "__module__": original_class.__module__,
        "__qualname__": original_class.__qualname__,
        "__doc__": original_class.__doc__,
    }
    name = original_class.__name__
    try:
        new: Any = object.__new__(
            types.new_class(name, bases, exec_body=lambda ns: ns.update(names))
        )
    except TypeError:
        bases = (FusedModule, _Delegate, fx.GraphModule)
        new = object.__new__(types.new_class(name, bases, exec_body=lambda ns: ns.update(names)))
    # The attributes fx.GraphModule.__init__ sets, whatever this torch's are, without running the
    # original class's __setattr__ on a module that has no state.
    new.__dict__.update(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
    return new


def _install(module: Any, graph: fx.Graph) -> None:
    module.__dict__["_graph"] = graph
    graph.owning_module = module
    fx.GraphModule.recompile(module)


def _guard(kind: type[nn.Module], graph: fx.Graph, optional: tuple[str, ...]) -> str:
    """The lines that send a call the graph does not hold for to the original forward."""
    places = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    tests = []
    for name in optional:
        if not places[name].args:
            tests.append(f"{name} is None")
            continue
        default = places[name].args[0]
        if default is None or isinstance(default, bool):
            tests.append(f"{name} is not {default!r}")
        elif isinstance(default, float) and math.isinf(default):
            tests.append(f"{name}.__class__ is not float or {name} != float('{default}')")
        else:
            tests.append(
                f"{name}.__class__ is not {type(default).__name__} or {name} != {default!r}"
            )
    keyword_only = {
        p.name
        for p in inspect.signature(kind.forward).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    arguments = [f"{n}={n}" if n in keyword_only else n for n in places]
    return (
        f"\n    if {' or '.join(tests)}:\n        return self.own_forward({', '.join(arguments)})"
    )


# A graph as plain data.


@dataclass(frozen=True)
class _Ref:
    """A node, by its position in the graph."""

    index: int


@dataclass(frozen=True)
class _Named:
    """A function, by the qualified name it is found under."""

    name: str


@dataclass(frozen=True)
class PackedGraph:
    """What a graph is rebuilt from: (op, name, target, args, kwargs, meta) per node."""

    nodes: tuple[tuple[Any, ...], ...]
    guard: str


def pack_graph(graph: fx.Graph) -> PackedGraph:
    """`graph` as data that pickle can store; fx's own way would trace its code again."""
    index = {node: at for at, node in enumerate(graph.nodes)}

    def pack(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return _Ref(index[item])
        return _pack_target(item) if callable(item) else item

    nodes = []
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else _pack_target(node.target)
        meta = {
            key: item
            for key, item in node.meta.items()
            if key in _KEPT_META or (isinstance(key, str) and key.startswith("fxfuse"))
        }
        args, kwargs = _plain(map_aggregate((node.args, dict(node.kwargs)), pack))
        nodes.append((node.op, node.name, target, args, kwargs, meta))
    return PackedGraph(tuple(nodes), getattr(graph._codegen, "guard", ""))


def unpack_graph(packed: PackedGraph) -> fx.Graph:
    """The graph `pack_graph` was given. Raises AttributeError for a function that is gone."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def unpack(item: Any) -> Any:
        if isinstance(item, _Ref):
            return nodes[item.index]
        return _find(item.name) if isinstance(item, _Named) else item

    for op, name, target, args, kwargs, meta in packed.nodes:
        args, kwargs = map_aggregate((args, kwargs), unpack)
        node = graph.create_node(op, unpack(target), args, dict(kwargs), name)
        node.meta.update(meta)
        nodes.append(node)
    if packed.guard:
        graph.set_codegen(GuardedCodeGen(packed.guard))
    return graph


def _plain(item: Any) -> Any:
    """fx's immutable lists and dicts as ordinary ones, which every torch can unpickle."""
    if isinstance(item, dict):
        return {key: _plain(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_plain(value) for value in item]
    return tuple(map(_plain, item)) if type(item) is tuple else item


def _pack_target(target: Any) -> Any:
    """A name for `target` where one leads back to it, else `target` for pickle to try."""
    if isinstance(target, torch._ops.OpOverload):
        return _Named(f"torch.ops.{target}")
    try:
        name = torch.fx.node._get_qualified_name(target)
        return _Named(name) if _find(name) is target else target
    except Exception:  # no name, or none that leads anywhere
        return target


def _find(name: str) -> Any:
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    path = first
    for part in rest:
        path += "." + part
        if not hasattr(found, part):
            importlib.import_module(path)
        found = getattr(found, part)
    return found
