"""One module -> one graph, and a plain reason wherever a graph would not be the whole truth.

torch.fx executes `forward` on proxies, so whatever does not go through a proxy is decided while
tracing and then holds for ever. This tracer makes such things live nodes where it can (`training`,
buffers, tensors made in forward) and refuses where it cannot.
"""

from __future__ import annotations

import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxfuse import ambient
from fxfuse.errors import FxfuseError
from fxfuse.proxies import (
    RefusalError,
    TracedValue,
    check_assertion,
    in_assert,
    is_internal,
    is_tensor,
    none_tests,
    place,
)
from fxfuse.traits import is_torch_leaf, leaf_reason


class UntraceableError(FxfuseError):
    """A module's own forward cannot become a graph; the message is the reason."""


@dataclass
class _Mark:
    """Where the graph stood when a submodule was entered."""

    last: fx.Node | None
    cached: int
    refusals: int
    random: ambient.RandomState


class RegionTracer(fx.Tracer):
    """Traces one module; a submodule whose forward fails becomes a call_module on the spot.

    The failed submodule's nodes are taken back and its caller goes on, so no trace is repeated
    however many submodules fail. `failed` (id of module -> reason) carries the failures over to
    other traces; `held` binds arguments of the root to values instead of proxies.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        watch: ambient.Watch,
        path: str,
        failed: dict[int, str],
        held: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(autowrap_modules=(), autowrap_functions=ambient.NUMBER_FUNCTIONS)  # type: ignore[arg-type]
        self._watch = watch
        self.leaves: dict[str, str] = {}
        self.failed = failed
        self._held = held or {}
        self._prefix = path
        self._current = ""
        self._attributes: dict[str, fx.Proxy] = {}
        self._refusals: list[str] = []
        self._unknown_outputs: set[str] = set()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """The graph of `root`'s forward. Raises UntraceableError; `root` is left as it was."""
        self._paths = {id(module): name for name, module in root.named_modules()}
        self._tensors: dict[int, str] = {}
        for name, module in root.named_modules():
            for key, item in [
                *module._parameters.items(),
                *module._buffers.items(),
                *module.__dict__.items(),
            ]:
                if isinstance(item, torch.Tensor):
                    self._tensors.setdefault(id(item), f"{name}.{key}" if name else key)
        forward = inspect.unwrap(type(root).forward)
        code = getattr(forward, "__code__", None)
        self._entry = place(code, code.co_firstlineno) if code is not None else ""
        traced_through = [module for module in root.modules() if not is_torch_leaf(module)]
        self._modes = ambient.modes()
        random = ambient.random_state()
        snapshot = ambient.Snapshot(traced_through)
        try:
            with self._watch.report_to(self):
                graph = super().trace(root, None)
            self._check_none_tests(code)
            if self._refusals:
                raise RefusalError(self._refusals[0])
        except Exception as error:
            snapshot.restore()
            random.restore()
            raise UntraceableError(self._describe(error)) from error
        if random.restore():
            raise UntraceableError("forward draws random numbers outside torch's tensor functions")
        changed = snapshot.restore()
        for module, attribute in changed:
            reason = f"forward changes its attribute '{attribute}'"
            if module is root:
                raise UntraceableError(reason)
            self.failed.setdefault(id(module), reason)
        if any(self._paths[id(module)] not in self.leaves for module, _ in changed):
            again = RegionTracer(self._watch, self._prefix, self.failed, self._held)
            graph, self.leaves = again.trace(root), again.leaves
        return graph

    # What torch.fx asks of a tracer.

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        plain = inspect.unwrap(root_fn)
        flags = plain.__code__.co_flags
        variadic = bool(flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))
        keyword_only = plain.__code__.co_kwonlyargcount > 0
        if keyword_only and flags & inspect.CO_VARARGS:
            raise RefusalError("forward takes keyword-only arguments after *args")
        if plain is not root_fn and (variadic or keyword_only):
            raise RefusalError(
                "forward is decorated and takes *args, **kwargs or keyword-only arguments"
            )
        fn, args = super().create_args_for_root(root_fn, is_module, None)
        return fn, [
            self._held.get(str(arg.node.target), arg) if isinstance(arg, fx.Proxy) else arg
            for arg in args
        ]

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        if ambient.modes() != self._modes:
            raise self.refuse(
                "forward changes gradient mode, autocast or checkpointing around its work"
            )
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        if any(getattr(source, "_erased", False) for source in node.all_input_nodes):
            raise self.refuse("forward uses a value that a submodule kept from a failed trace")
        node.meta["source"] = self._source(kind)
        node.meta["module_path"] = self._full(self._current)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedValue(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            name = self._tensors.get(id(a))
            if name is None:
                raise self.refuse("forward uses a tensor that is no attribute of a module")
            return self._attribute(name).node
        if isinstance(a, nn.Module):
            raise self.refuse("forward passes a module as an argument")
        if isinstance(a, (dict, list)) and not _is_plain(a):
            raise self.refuse(f"forward passes or returns a {type(a).__name__}")
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor):
            name = self._tensors.get(id(attr_val))
            return attr_val if name is None else self._attribute(name)
        return attr_val

    def path_of_module(self, mod: nn.Module) -> str:
        name = self._paths.get(id(mod))
        if name is None:
            raise self.refuse("forward calls a module that is not a submodule")
        return name

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        reason = self.failed.get(id(m)) or leaf_reason(m)
        if reason is None and not is_torch_leaf(m):
            mark = self._mark()
            outer, self._current = self._current, path
            try:
                out = forward(*args, **kwargs)
                self._check_none_tests(getattr(type(m).forward, "__code__", None))
                if len(self._refusals) > mark.refusals:  # raised, but swallowed by the forward
                    raise RefusalError(self._refusals[-1])
                if mark.random.restore():
                    raise RefusalError(
                        "forward draws random numbers outside torch's tensor functions"
                    )
                return out
            except Exception as error:
                reason = self._describe(error)
                self._take_back(mark)
            finally:
                self._current = outer
            self.failed[id(m)] = reason
        if reason is not None:
            self.leaves[path] = reason
        called = self.create_proxy("call_module", path, args, kwargs)
        if not is_tensor(called.node, self.root):
            self._unknown_outputs.add(self._current)
        return called

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        if node.op == "get_attr" and str(node.target).endswith("training"):
            raise self.refuse("forward branches on self.training")
        frame = self._user_frame()
        if frame is not None and in_assert(frame):
            self.create_proxy(
                "call_function", check_assertion, (obj, f"assertion failed{self._here()}"), {}
            )
            return True
        raise self.refuse("forward branches on a tensor value")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.refuse("forward iterates over a traced value")

    # What the watch on torch and nn.Module asks.

    def refuse(self, reason: str) -> RefusalError:
        """A RefusalError to raise; remembered, so that a forward cannot swallow it."""
        self._refusals.append(reason + self._here())
        return RefusalError(self._refusals[-1])

    def training_of(self, module: nn.Module) -> fx.Proxy | None:
        """The live value of `module.training`, None for a module outside this trace."""
        path = self._paths.get(id(module))
        if path is None:
            return None
        return self._attribute(f"{path}.training" if path else "training")

    def owns(self, module: nn.Module) -> bool:
        """True for modules of the traced tree."""
        return id(module) in self._paths

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Turn any overridable torch call into a node, traced arguments or not."""
        name = func.__name__
        if name == "__hash__":
            return id(args[0])
        if name in ambient.MODE_SETTERS:
            raise self.refuse("forward changes gradient mode, autocast or checkpointing")
        if name == "__get__":
            return self.create_proxy(
                "call_function", getattr, (args[0], func.__self__.__name__), {}
            )
        if name in ("__set__", "__delete__"):
            raise self.refuse("forward sets an attribute of a tensor")
        if torch.overrides.is_tensor_method_or_property(func):
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", func, args, kwargs)

    # Helpers.

    def _full(self, path: str) -> str:
        return ".".join(part for part in (self._prefix, path) if part)

    def _attribute(self, name: str) -> fx.Proxy:
        known = self._attributes.get(name)
        if known is None:
            known = self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return known

    def _mark(self) -> _Mark:
        return _Mark(
            next(iter(reversed(self.graph.nodes)), None),
            len(self._attributes),
            len(self._refusals),
            ambient.random_state(),
        )

    def _take_back(self, mark: _Mark) -> None:
        """Undo what was recorded since `mark`."""
        while (last := next(iter(reversed(self.graph.nodes)), None)) is not mark.last:
            assert last is not None
            self.graph.erase_node(last)
        while len(self._attributes) > mark.cached:
            self._attributes.popitem()
        del self._refusals[mark.refusals :]
        mark.random.restore()

    def _user_frame(self) -> types.FrameType | None:
        """The innermost frame of the model's code; None where torch runs it (nn.Sequential)."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and is_internal(frame.f_code.co_filename):
            if frame.f_code is RegionTracer.trace.__code__:
                return None
            frame = frame.f_back
        return frame

    def _source(self, kind: str) -> str:
        frame = None if kind in ("placeholder", "output") else self._user_frame()
        return self._entry if frame is None else place(frame.f_code, frame.f_lineno)

    def _here(self) -> str:
        frame = self._user_frame()
        return "" if frame is None else f" ({place(frame.f_code, frame.f_lineno)})"

    def _describe(self, error: Exception) -> str:
        """`error` in plain words, with the line of the model it came from."""
        if isinstance(error, RefusalError):
            return str(error)
        text = (str(error).strip().splitlines() or [""])[0]
        frames = list(traceback.walk_tb(error.__traceback__))
        user = [(f, line) for f, line in frames if not is_internal(f.f_code.co_filename)]
        where = f" ({place(user[-1][0].f_code, user[-1][1])})" if user else ""
        if isinstance(error, NotImplementedError) and text.startswith("argument of type"):
            return "forward passes an object that a graph cannot hold: " + text[18:] + where
        if isinstance(error, NotImplementedError) and 'missing the required "forward"' in text:
            return "the module has no forward of its own"
        if isinstance(error, TypeError) and any(n in text for n in ("Proxy", "Traced")):
            return "forward uses a traced value as a Python number or container" + where
        return f"tracing raised {type(error).__name__}: {text}{where}"

    def _check_none_tests(self, code: types.CodeType | None) -> None:
        """Refuse a forward that tests for None what a call of unknown outcome may have returned.

        `is None` on a proxy is False and nobody is asked, so the code object is looked at.
        """
        if code is None or self._current not in self._unknown_outputs:
            return
        self._unknown_outputs.discard(self._current)
        tested = none_tests(code)
        tested -= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        if tested:
            names = ", ".join(sorted(tested))
            where = place(code, code.co_firstlineno)
            raise self.refuse(
                f"forward tests {names} for None beside a call of unknown result ({where})"
            )


def _is_plain(container: Any) -> bool:
    return type(container).__name__ in ("dict", "list", "immutable_dict", "immutable_list")
