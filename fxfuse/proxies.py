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
        if "LOAD_FAST" in first.opname:
            second, third = instructions[at + 1], instructions[at + 2]
            compares = second.argval is None and third.opname == "IS_OP"
            if compares or ("JUMP" in second.opname and "NONE" in second.opname):
                # Fused loads (3.13 on) name several variables, the one on top of the stack last.
                name = first.argval
                found.add(name if isinstance(name, str) else name[-1])
    return found


def in_assert(frame: types.FrameType) -> bool:
    """True if the value `frame` is testing is all that an assert statement tests."""
    instructions = [i for i in dis.get_instructions(frame.f_code) if i.opname != "CACHE"]
    at = next((n for n, i in enumerate(instructions) if i.offset >= frame.f_lasti), 0)
    for test, following in zip(instructions[at:], instructions[at + 1 : at + 5], strict=False):
        if "JUMP" in test.opname:
            error = following.opname, following.argval
            raises = error[0] == "LOAD_ASSERTION_ERROR" or error[1] is AssertionError
            return test.opname.endswith("IF_TRUE") and raises
    return False


def check_assertion(holds: Any, message: str) -> None:
    """The node an assert of a forward becomes. Raises AssertionError."""
    if not holds:
        raise AssertionError(message)
