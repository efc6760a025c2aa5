"""Facts about fx nodes that matching and planning share: order, purity and randomness."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .patterns import in_place_name

_RANDOM_MODULES: tuple[type[nn.Module], ...] = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.RNNBase,
)
_RANDOM_NAMES = ("dropout", "rand", "bernoulli", "multinomial", "normal", "rrelu", "exponential")
_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in [
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "setitem",
        "delitem",
    ]
)
_METADATA_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement"})
_METADATA_ATTRIBUTES = frozenset({"shape", "ndim"})


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks besides its forward."""
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return any(getattr(module, name, None) for name in names)


def is_parametrised(module: nn.Module) -> bool:
    """Whether a tensor of `module` is computed by torch.nn.utils.parametrize."""
    return torch.nn.utils.parametrize.is_parametrized(module)


def is_metadata(node: fx.Node) -> bool:
    """Whether a node reads only the shape of its tensor argument."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA_ATTRIBUTES
    return False


def _torch_function(target: Callable[..., Any]) -> bool:
    home = getattr(target, "__module__", None) or ""
    if home.startswith(("torch", "_operator", "math")):
        return True
    return target is getattr or isinstance(target, type(torch.relu))


def is_random(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node may draw random numbers."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, _RANDOM_MODULES) or not _from_torch(module)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op.startswith("call_") and any(word in str(name) for word in _RANDOM_NAMES)


def _from_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def may_mutate(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node may change a tensor that exists before it; unknown code may."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return (
            bool(getattr(module, "inplace", False))
            or has_hooks(module)
            or (not _from_torch(module))
        )
    if node.op == "call_method":
        return in_place_name(str(node.target))
    if node.op == "call_function":
        target: Any = node.target
        name = getattr(getattr(target, "overloadpacket", target), "__name__", "")
        inplace = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
        if inplace or in_place_name(name) or target in _IN_PLACE_OPERATORS:
            return True
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return False
        activation = getattr(F, name, None) is target and any(a is True for a in node.args[1:])
        return activation or not _torch_function(target)
    return False


class Order:
    """Positions of a graph's nodes, and counts of mutating and random nodes before each.

    Built once per graph; every query is O(1).
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self.position: dict[fx.Node, int] = {}
        self._mutating: list[int] = [0]
        self._random: list[int] = [0]
        for index, node in enumerate(graph.nodes):
            self.position[node] = index
            self._mutating.append(self._mutating[-1] + may_mutate(node, modules))
            self._random.append(self._random[-1] + is_random(node, modules))

    def mutating_between(self, first: int, last: int) -> int:
        """Number of mutating nodes at positions first < p < last."""
        return self._mutating[max(last, first + 1)] - self._mutating[first + 1]

    def random_between(self, first: int, last: int) -> int:
        """Number of random nodes at positions first < p < last."""
        return self._random[max(last, first + 1)] - self._random[first + 1]
