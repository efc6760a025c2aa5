"""A copy of a module tree that shares its tensors, and substitution of modules in a tree."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


class _Substitution:
    """Rebuilds plain values with every module in them replaced.

    Only exact builtin containers, bound methods, partials and state-dict hook wrappers are
    rebuilt; anything else (tensors above all) is the same object afterwards. Sharing is kept: one
    container met twice stays one container.
    """

    def __init__(self, module: Callable[[nn.Module], nn.Module]) -> None:
        self._module = module
        self._memo: dict[int, tuple[Any, Any]] = {}

    def value(self, old: Any) -> Any:
        """`old` with its modules replaced."""
        if isinstance(old, nn.Module):
            return self._module(old)
        kind = type(old)
        rebuild = _REBUILD.get(kind)
        if rebuild is None:
            return old
        known = self._memo.get(id(old))
        if known is None:
            if kind in _MUTABLE:  # may contain itself: known before its items are visited
                new: Any = kind()
                self._memo[id(old)] = (old, new)
                rebuild(self, old, new)
                return new
            known = (old, rebuild(self, old, None))
            self._memo[id(old)] = known
        return known[1]


def _fill_dict(sub: _Substitution, old: dict[Any, Any], new: dict[Any, Any]) -> None:
    for key, item in old.items():
        new[sub.value(key)] = sub.value(item)


def _fill_list(sub: _Substitution, old: list[Any], new: list[Any]) -> None:
    new.extend(map(sub.value, old))


def _fill_set(sub: _Substitution, old: set[Any], new: set[Any]) -> None:
    new.update(map(sub.value, old))


def _tuple(sub: _Substitution, old: tuple[Any, ...], _: None) -> tuple[Any, ...]:
    return tuple(map(sub.value, old))


def _method(sub: _Substitution, old: types.MethodType, _: None) -> types.MethodType:
    owner = sub.value(old.__self__)
    return old if owner is old.__self__ else types.MethodType(old.__func__, owner)


def _partial(sub: _Substitution, old: functools.partial[Any], _: None) -> functools.partial[Any]:
    keywords = {name: sub.value(item) for name, item in old.keywords.items()}
    return functools.partial(sub.value(old.func), *map(sub.value, old.args), **keywords)


def _wrapped_hook(sub: _Substitution, old: Any, _: None) -> Any:
    state = old.__getstate__()
    if "module" in state:  # held by a weak reference to the module it was registered on
        state["module"] = sub.value(state["module"])
    new = object.__new__(type(old))
    functools.update_wrapper(new, old.hook)
    new.__setstate__(state)
    return new


_MUTABLE = (dict, OrderedDict, list, set)
_REBUILD: dict[type, Callable[[_Substitution, Any, Any], Any]] = {
    dict: _fill_dict,
    OrderedDict: _fill_dict,
    list: _fill_list,
    set: _fill_set,
    tuple: _tuple,
    types.MethodType: _method,
    functools.partial: _partial,
}
_HOOK_WRAPPER = getattr(nn.modules.module, "_WrappedHook", None)
if _HOOK_WRAPPER is not None:
    _REBUILD[_HOOK_WRAPPER] = _wrapped_hook


def is_opaque(module: nn.Module) -> bool:
    """True for modules whose code is compiled elsewhere: they are shared, never copied."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def clone_tree(model: nn.Module) -> nn.Module:
    """A copy of `model`: new module objects of the same classes around the same tensors.

    Parameters and buffers are the same objects, so both models train together; `training`, hook
    registries, attributes and plain containers belong to the copy. A module that is registered
    twice is one module in the copy too. Compiled modules (TorchScript, torch.compile) are shared.
    """
    clones: dict[int, tuple[nn.Module, nn.Module]] = {}

    def clone(old: nn.Module) -> nn.Module:
        known = clones.get(id(old))
        if known is not None:
            return known[1]
        if is_opaque(old):
            return old
        new: nn.Module = object.__new__(type(old))
        clones[id(old)] = (old, new)
        for name, item in old.__dict__.items():
            new.__dict__[name] = sub.value(item)
        return new

    sub = _Substitution(clone)
    return clone(model)


def replace_children(root: nn.Module, new_modules: Mapping[str, nn.Module]) -> nn.Module:
    """Install modules in a tree, in one pass over it, and return its root.

    `new_modules` maps a path in `root` ("" is the root itself) to the module that takes its
    place, everywhere the replaced object occurs: as a child, in a plain container, as the owner
    of a bound method. Raises AttributeError for a path that is not in the tree.
    """
    table = {id(root.get_submodule(path)): new for path, new in new_modules.items()}
    old_modules = [root.get_submodule(path) for path in new_modules]  # keeps their ids in use
    visited: set[int] = set()

    def replace(old: nn.Module) -> nn.Module:
        new = table.get(id(old), old)
        if id(new) in visited or is_opaque(new):
            return new
        visited.add(id(new))
        for name, item in new.__dict__.items():
            if name == "_modules":  # in place: a region and the clone it replaces share it
                for child_name, child in item.items():
                    if child is not None:
                        item[child_name] = replace(child)
            elif name not in ("_parameters", "_buffers", "_graph"):
                new.__dict__[name] = sub.value(item)
        return new

    sub = _Substitution(replace)
    new_root = replace(root)
    del old_modules
    return new_root


def replace_child(root: nn.Module, path: str, new_module: nn.Module) -> nn.Module:
    """`replace_children` for one module: returns the tree's root, `new_module` for path ""."""
    return replace_children(root, {path: new_module})
