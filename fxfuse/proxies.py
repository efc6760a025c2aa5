"""The values a traced forward computes with, and what can be told about them without running it."""

from __future__ import annotations

import dis
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute, TraceError

_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_TENSOR_MODULES = tuple(
    "torch.nn.modules." + name
    for name in ("linear", "conv", "normalization", "batchnorm", "dropout", "sparse", "activation")
)


class RefusalError(TraceError):
    """Raised into a forward that does something a graph cannot hold."""


@cache
def is_internal(filename: str) -> bool:
    """True for torch's and our own source files: whatever else runs is the model's."""
    return filename.startswith(_INTERNAL)


def place(code: types.CodeType, line: int) -> str:
    """`file.py:line`, as reasons and node.meta["source"] give it."""
    return f"{Path(code.co_filename).name}:{line}"


@cache
def _asks_type(code: types.CodeType) -> bool:
    """True for code that can ask for a type itself; in other code it is torch's C++ that asks."""
    if not {"isinstance", "__class__", "__instancecheck__"}.isdisjoint(code.co_names):
        return True
    return any(i.opname == "MATCH_CLASS" for i in dis.get_instructions(code))


class _Traced:
    """What our proxies do beyond torch.fx's: refuse Python questions about a traced value."""

    node: Any
    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        frame = sys._getframe(1)
        while frame.f_back is not None and "abc" in frame.f_code.co_filename[-8:]:
            frame = frame.f_back  # the instance check of an abstract class
        code = frame.f_code
        if code.co_name != "is_tensor" and (is_internal(code.co_filename) or not _asks_type(code)):
            return type(self)
        if is_tensor(self.node, self.tracer.root):
            return torch.Tensor
        raise self.tracer.refuse("forward checks the Python type of a traced value")

    def __getattr__(self, name: str) -> Any:
        return TracedAttribute(self, name)  # type: ignore[arg-type]

    def __len__(self) -> int:
        raise self.tracer.refuse("forward takes len() of a traced value")

    def __contains__(self, item: Any) -> bool:
        raise self.tracer.refuse("forward tests whether a traced value contains something")

    def __setitem__(self, key: Any, item: Any) -> None:
        raise self.tracer.refuse("forward assigns into a traced value")


class TracedValue(_Traced, fx.Proxy):
    """The value of a node."""


class TracedAttribute(_Traced, Attribute):
    """An attribute of such a value: a method until it is used as a value."""


def is_tensor(node: fx.Node, root: nn.Module) -> bool:
    """True where a node's value is a tensor whatever the inputs are."""
    if node.op == "placeholder":
        return node.type is torch.Tensor or node.type in ("Tensor", "torch.Tensor")
    if node.op == "call_module":
        kind = type(root.get_submodule(str(node.target)))
        return kind.__module__ in _TENSOR_MODULES and kind is not nn.MultiheadAttention
    if node.op == "call_function":
        home = getattr(node.target, "__module__", None)
        is_attention = node.target is torch.nn.functional.multi_head_attention_forward
        return home in ("torch.nn.functional", "torch._C._nn") and not is_attention
    return node.op == "get_attr" and not str(node.target).endswith("training")


def none_tests(code: types.CodeType) -> set[str]:
    """Names of local variables that `code` tests with `is None` or `is not None`."""
    found: set[str] = set()
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "NOP")]
    for at, first in enumerate(instructions[:-2]):
        if first.opname.startswith("LOAD_FAST") and isinstance(first.argval, str):
            second, third = instructions[at + 1], instructions[at + 2]
            compares = second.argval is None and third.opname == "IS_OP"
            if compares or "NONE" in second.opname:
                found.add(first.argval)
    return found
