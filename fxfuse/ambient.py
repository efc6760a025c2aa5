"""State outside the graph that tracing must neither change nor miss."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

# Torch functions whose effect on the work between two calls a graph has no node for.
MODE_SETTERS = frozenset(
    ("_set_grad_enabled", "set_grad_enabled", "set_autocast_enabled", "set_autocast_dtype")
)
_MODE_QUERIES = (
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
)
# Functions of Python numbers that are recorded when they are given a traced value.
NUMBER_FUNCTIONS = tuple(
    f for name, f in vars(math).items() if callable(f) and not name.startswith("_")
)
_HAS_DEVICE_AUTOCAST = hasattr(torch, "get_autocast_dtype")
_SAVED_TENSOR_HOOKS = getattr(
    getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None
)


class Watcher(Protocol):
    """What a tracer answers while a forward runs under watch."""

    def training_of(self, module: nn.Module) -> Any: ...

    def owns(self, module: nn.Module) -> bool: ...

    def refuse(self, reason: str) -> Exception: ...

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def modes() -> tuple[Any, ...]:
    """Gradient mode, autocast and saved-tensor hooks (checkpointing), comparable by `==`."""
    with torch._C.DisableTorchFunction():
        grad = (torch._C.is_grad_enabled(), torch._C.is_inference_mode_enabled())
        if _HAS_DEVICE_AUTOCAST:
            autocast: tuple[Any, ...] = tuple(
                torch._C.is_autocast_enabled(device) for device in ("cpu", "cuda")
            ) + tuple(torch.get_autocast_dtype(device) for device in ("cpu", "cuda"))
        else:
            autocast = (
                torch._C.is_autocast_enabled(),
                torch._C.is_autocast_cpu_enabled(),
                torch.get_autocast_gpu_dtype(),
                torch.get_autocast_cpu_dtype(),
            )
        hooks = _SAVED_TENSOR_HOOKS(False) if _SAVED_TENSOR_HOOKS is not None else None
    return grad + autocast + (None if hooks is None else id(hooks[0]),)


@dataclass(frozen=True)
class RandomState:
    """The generators a forward could draw from without leaving a node."""

    python: Any
    numpy: Any
    torch: torch.Tensor

    def restore(self) -> bool:
        """Set every generator back; returns whether one had moved."""
        with torch._C.DisableTorchFunction():
            now = random_state()
            moved = now.python != self.python or not torch.equal(now.torch, self.torch)
            if self.numpy is not None and now.numpy is not None:
                moved = moved or not _same_numpy(now.numpy, self.numpy)
            if moved:
                random.setstate(self.python)
                torch.default_generator.set_state(self.torch)
                if self.numpy is not None:
                    sys.modules["numpy"].random.set_state(self.numpy)
        return moved


def random_state() -> RandomState:
    """The state of Python's, numpy's (where imported) and torch's CPU generator."""
    with torch._C.DisableTorchFunction():
        numpy = getattr(sys.modules.get("numpy"), "random", None)
        state = numpy.get_state() if numpy is not None else None
        return RandomState(random.getstate(), state, torch.default_generator.get_state())


def _same_numpy(a: Any, b: Any) -> bool:
    return a[2:] == b[2:] and bool((a[1] == b[1]).all())


class Snapshot:
    """The attributes of some modules, to be compared and put back after a trace."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved = [(module, dict(module.__dict__), _contents(module)) for module in modules]

    def restore(self) -> list[tuple[nn.Module, str]]:
        """Put every attribute back; returns the modules that had changed, with one name each."""
        changed = []
        for module, attributes, contents in self._saved:
            name = _first_difference(module.__dict__, attributes)
            if name is not None:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                changed.append((module, name))
            for key, container, copy in contents:
                if _same_items(container, copy):
                    continue
                changed.append((module, key))
                container.clear()
                container.extend(copy) if isinstance(container, list) else container.update(copy)
        return changed


def _contents(module: nn.Module) -> list[tuple[str, Any, Any]]:
    return [
        (key, item, item.copy())
        for key, item in module.__dict__.items()
        if type(item) in (list, dict, set, OrderedDict) and (item or not key.startswith("_"))
    ]


def _same_items(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and item is b[key] for key, item in a.items())
    if isinstance(a, set):
        return all(item in b for item in a)
    return all(x is y for x, y in zip(a, b, strict=True))


def _first_difference(now: dict[str, Any], before: dict[str, Any]) -> str | None:
    for name in now.keys() | before.keys():
        if name not in now or name not in before or now[name] is not before[name]:
            return name
    return None


class _Recorder(TorchFunctionMode):
    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._watcher.record(func, args, kwargs or {})


class Watch:
    """Where what a forward does beside its proxies is reported to, while one runs."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._watcher: Watcher | None = None

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of the forward that runs in this thread, None if none does."""
        return self._watcher if threading.get_ident() == self._thread else None

    @contextlib.contextmanager
    def report_to(self, watcher: Watcher) -> Iterator[None]:
        """Send everything to `watcher` inside the block."""
        self._watcher = watcher
        try:
            with _Recorder(watcher):
                yield
        finally:
            self._watcher = None


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Patch what a forward can reach beside its proxies, and take the patches off again.

    They are nn.Module's `training` and attribute writes, torch's mode queries and the functions
    of `math`; each acts for the calling thread only, while a watcher is set. Patching a class
    with thousands of subclasses is slow, so this is entered once per capture. One at a time:
    callers hold a lock, as for torch.fx's own patches.
    """
    watch = Watch()
    set_attribute, delete_attribute = nn.Module.__setattr__, nn.Module.__delattr__

    def read_training(module: nn.Module) -> Any:
        watcher = watch.watcher
        live = watcher.training_of(module) if watcher is not None else None
        if live is not None:
            return live
        if "training" in module.__dict__:
            return module.__dict__["training"]
        return type(module).__getattr__(module, "training")  # TorchScript keeps it elsewhere

    def write_training(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    def refuse_write(module: nn.Module, name: str) -> None:
        watcher = watch.watcher
        if watcher is not None and watcher.owns(module):
            raise watcher.refuse(f"forward writes the attribute '{name}' of a module")

    def set_watched(module: nn.Module, name: str, value: Any) -> None:
        refuse_write(module, name)
        set_attribute(module, name, value)

    def delete_watched(module: nn.Module, name: str) -> None:
        refuse_write(module, name)
        delete_attribute(module, name)

    def query(name: str, answer: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            watcher = watch.watcher
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if watcher is not None and caller.split(".")[0] != "torch":
                raise watcher.refuse(f"forward asks torch.{name}()")
            return answer(*args, **kwargs)

        return watched

    def number_function(function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            watcher = watch.watcher
            if watcher is not None and any(isinstance(arg, fx.Proxy) for arg in args):
                return watcher.record(function, args, kwargs)
            return function(*args, **kwargs)

        return watched

    patches: list[tuple[Any, str, Any]] = [
        (nn.Module, "training", property(read_training, write_training)),
        (nn.Module, "__setattr__", set_watched),
        (nn.Module, "__delattr__", delete_watched),
    ]
    for name in _MODE_QUERIES:
        if hasattr(torch, name):
            patches.append((torch, name, query(name, getattr(torch, name))))
    patches += [(math, f.__name__, number_function(f)) for f in NUMBER_FUNCTIONS]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in patches]
    try:
        for owner, name, patch in patches:
            setattr(owner, name, patch)
        yield watch
    finally:
        for owner, name, original in before:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
