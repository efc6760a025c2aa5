"""Read fx nodes as pointwise calls.

`read_call(node, modules)` turns a node into a `Call`: the spelling's arguments by name, whether it
works in place, and `emit`, which appends the instructions to a builder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .spellings import (
    IN_PLACE_FUNCTIONS,
    Arguments,
    Attribute,
    Emit,
    Spelling,
    Unsupported,
    tables,
)


@dataclass(frozen=True)
class Call:
    """A node read as a pointwise call."""

    name: str
    arguments: Arguments
    in_place: bool
    emit: Emit


def in_place_name(name: str) -> bool:
    """Whether torch's naming says a method or aten op works in place."""
    return name.endswith("_") and not name.endswith("__")


def read_call(node: fx.Node, modules: Mapping[str, nn.Module]) -> Call | None:
    """The pointwise call `node` is, or None where it is something else.

    Raises Unsupported where it is a pointwise op in a form a program cannot express.
    """
    functions, methods, module_types, aten = tables()
    args: tuple[Any, ...] = node.args
    kwargs: dict[str, Any] = dict(node.kwargs)
    in_place = False
    spelling: Spelling | None = None
    if node.op == "call_module":
        module = modules[str(node.target)]
        spelling = module_types.get(type(module))
        if spelling is None:
            return None
        in_place = bool(getattr(module, "inplace", False))
        names = spelling.signature.names[1:]
        for n in names:
            if isinstance(getattr(module, n, None), torch.Tensor):
                kwargs[n] = Attribute(f"{node.target}.{n}")
            elif hasattr(module, n):
                kwargs[n] = getattr(module, n)
    elif node.op == "call_method":
        name = str(node.target)
        in_place = in_place_name(name)
        spelling = methods.get(name[:-1] if in_place else name)
        if spelling is not None and spelling.name == "to":
            args = _dtype_of_to(node)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "copy")}
    elif node.op == "call_function":
        target: Any = node.target
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            packet = getattr(target, "overloadpacket", target)
            if str(packet).split(".")[0] != "aten":
                return None
            name = packet.__name__
            in_place = in_place_name(name)
            spelling = aten.get(name[:-1] if in_place else name)
        else:
            name = getattr(target, "__name__", "")
            in_place = target in IN_PLACE_FUNCTIONS or in_place_name(name)
            spelling = functions.get(target)
            if spelling is None and in_place:  # torch.relu_, F.leaky_relu_
                home = torch if hasattr(torch, name[:-1]) else F
                spelling = functions.get(getattr(home, name[:-1], None))
    if spelling is None:
        return None
    in_place |= bool(kwargs.pop("inplace", False))
    if kwargs.pop("out", None) is not None:
        raise Unsupported("writes to out=")
    bound = _bind(spelling, args, kwargs)
    in_place |= bool(bound.get("inplace", False))
    return Call(spelling.name, bound, in_place, spelling.emit)


def _bind(spelling: Spelling, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind arguments; torch.nn.functional takes `inplace` after the others, positionally too."""
    names = spelling.signature.names
    if len(args) == len(names) + 1 and isinstance(args[-1], bool):
        return spelling.signature.bind(args[:-1], kwargs) | {"inplace": args[-1]}
    return spelling.signature.bind(args, kwargs)


def _dtype_of_to(node: fx.Node) -> tuple[Any, ...]:
    """`(input, dtype)` of `x.to(dtype)`; other forms depend on more than the program knows."""
    given = [a for a in node.args[1:] if not isinstance(a, bool)]
    if len(given) == 1 and isinstance(given[0], torch.dtype):
        return (node.args[0], given[0])
    if not given and isinstance(node.kwargs.get("dtype"), torch.dtype) and len(node.kwargs) == 1:
        return (node.args[0],)
    raise Unsupported(f"{node.target}() to something other than a constant dtype")


__all__ = ["Attribute", "Call", "Unsupported", "in_place_name", "read_call"]
