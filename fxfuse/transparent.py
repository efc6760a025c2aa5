"""Calls that leave a chain's values as they are: views of the rows, and dropout in eval mode."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .patterns import Attribute, Unsupported

_RESHAPES = (torch.reshape,)
_DROPOUTS = (F.dropout, torch.dropout)


@dataclass(frozen=True)
class DropoutCall:
    """A dropout. flag: where the model says whether it drops, False where it never does."""

    source: Any
    p: float
    flag: Any
    in_place: bool


@dataclass(frozen=True)
class ViewCall:
    """A reshape that keeps the last dimension. shape: sizes, of which some may be nodes, or one
    node that computes them all."""

    source: fx.Node
    shape: tuple[Any, ...] | fx.Node


def read_dropout(node: fx.Node, modules: Mapping[str, nn.Module]) -> DropoutCall | None:
    """The dropout `node` is, if it is one. Raises Unsupported where it drops in eval mode, too."""
    flag: Any
    in_place: Any
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is not nn.Dropout:
            return None
        source, p, in_place = node.args[0], module.p, module.inplace
        flag = Attribute(f"{node.target}.training")
    elif node.op == "call_function" and node.target in _DROPOUTS:
        names = ("input", "p", "training", "inplace")
        a: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
        a |= dict(zip(names, node.args, strict=False))
        a |= node.kwargs
        source, p, flag = a["input"], a["p"], a.get("train", a["training"])
        in_place = a["inplace"]
    else:
        return None
    if not isinstance(p, (int, float)) or (flag is True and p > 0):
        raise Unsupported("this dropout drops in eval mode, too")
    return DropoutCall(source, float(p), False if p == 0 else flag, bool(in_place))


def read_view(node: fx.Node, columns: int | None) -> ViewCall | None:
    """The view `node` is, if it is one.

    columns: size of the last dimension, None where it is not known. Raises Unsupported where the
    view may change it.
    """
    if node.op == "call_method" and node.target in ("view", "reshape", "flatten"):
        args, name = node.args[1:], str(node.target)
    elif node.op == "call_function" and node.target in (*_RESHAPES, torch.flatten):
        args, name = node.args[1:], "flatten" if node.target is torch.flatten else "view"
    else:
        return None
    if node.kwargs or not args:
        raise Unsupported(f"{name} in a form that may change the last dimension")
    if columns is None:
        raise Unsupported("the size of the last dimension is not known")
    if name == "flatten":
        if len(args) != 2 or args[0] != 0 or args[1] != -2:
            raise Unsupported("flatten may change the last dimension")
        shape: tuple[Any, ...] | fx.Node = (-1, columns)
    elif len(args) == 1 and isinstance(args[0], (tuple, list, fx.Node)):
        shape = args[0] if isinstance(args[0], fx.Node) else tuple(args[0])
    else:
        shape = tuple(args)
    if _last_size(shape) != columns:
        raise Unsupported(f"{name} may change the last dimension")
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return ViewCall(source, shape)


def _last_size(shape: tuple[Any, ...] | fx.Node) -> Any:
    """The last of some sizes, None where it is not known: of `x.size()[:-1] + (n,)` it is n."""
    if isinstance(shape, fx.Node):
        sums = shape.op == "call_function" and shape.target is operator.add
        shape = shape.args[1] if sums and isinstance(shape.args[1], tuple) else ()
    return shape[-1] if shape else None
