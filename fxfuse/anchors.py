"""Anchors: the nodes a fusion group grows from.

A GEMM anchor is `x @ weight^T (+ bias)` in any of torch's spellings. A norm that follows a Linear
anchors a group without a GEMM: the pointwise work after it becomes one kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .graphs import has_hooks, is_parametrised
from .patterns import Attribute

TensorSource = fx.Node | Attribute


@dataclass(frozen=True)
class LinearCall:
    """A node read as `x @ weight^T + bias`.

    weight is [N, K], or [K, N] where `transposed`. extra is a tensor or number added to the
    product that is not plainly a bias of N values (addmm's first argument).
    """

    node: fx.Node
    x: fx.Node
    weight: TensorSource
    bias: TensorSource | None
    transposed: bool
    extra: Any = None


@dataclass(frozen=True)
class NormCall:
    """A node read as a normalisation; its output is the accumulator of a group without GEMM."""

    node: fx.Node


@dataclass(frozen=True)
class NoMatch:
    """Why no group grew from a node."""

    reason: str
    node: fx.Node


_NORM_MODULES = tuple(
    getattr(nn, name)
    for name in [
        "GroupNorm",
        "LayerNorm",
        "BatchNorm1d",
        "RMSNorm",
        "InstanceNorm1d",
        "LocalResponseNorm",
        "Softmax",
    ]
    if hasattr(nn, name)
)
_NORM_FUNCTIONS = frozenset(
    getattr(F, name)
    for name in ["group_norm", "layer_norm", "batch_norm", "rms_norm", "instance_norm", "softmax"]
    if hasattr(F, name)
)
_MATMULS = frozenset({torch.matmul, torch.mm, operator.matmul})


def module_refusal(module: nn.Module) -> str | None:
    """Why a call of `module` must stay a call, if it must."""
    if is_parametrised(module):
        return "its tensors are parametrised"
    if has_hooks(module):
        return "it has hooks"
    return None


def read_anchor(
    node: fx.Node, modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]
) -> LinearCall | NormCall | NoMatch | None:
    """The anchor `node` is, why it may not be one, or None where it is nothing of the kind.

    tensors: the model's parameters and buffers by name.
    """
    if node.op == "call_module":
        return _read_module(node, modules[str(node.target)])
    target: Any = node.target
    if node.op == "call_method":
        matmul = target in ("matmul", "mm")
        return (
            _read_matmul(node, tensors) if matmul else _read_addmm(node, target == "addmm", tensors)
        )
    if node.op != "call_function":
        return None
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(getattr(target, "overloadpacket", target))
        if name in ("aten.mm", "aten.matmul"):
            return _read_matmul(node, tensors)
        if name == "aten.linear":
            return _read_linear(node)
        return _read_addmm(node, name == "aten.addmm", tensors)
    if target is F.linear:
        return _read_linear(node)
    if target in _MATMULS:
        return _read_matmul(node, tensors)
    if target in _NORM_FUNCTIONS:
        return NormCall(node)
    return _read_addmm(node, target is torch.addmm, tensors)


def _read_module(node: fx.Node, module: nn.Module) -> LinearCall | NormCall | NoMatch | None:
    if isinstance(module, _NORM_MODULES) and not has_hooks(module):
        return NormCall(node)
    if not isinstance(module, nn.Linear):
        return None
    refusal = module_refusal(module)
    if refusal is None and type(module).forward is not nn.Linear.forward:
        refusal = f"{type(module).__name__} has a forward of its own"
    if refusal is None and (len(node.args) != 1 or not isinstance(node.args[0], fx.Node)):
        refusal = "it is called with something other than one tensor"
    if refusal is not None:
        return NoMatch(refusal, node)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    bias = None if module.bias is None else Attribute(f"{node.target}.bias")
    return LinearCall(node, x, Attribute(f"{node.target}.weight"), bias, transposed=False)


def _read_linear(node: fx.Node) -> LinearCall | NoMatch:
    """`linear(input, weight, bias=None)`."""
    names = ("input", "weight", "bias")
    a = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight, bias = a.get("input"), a.get("weight"), a.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return NoMatch("its input and weight are not both tensors of the graph", node)
    if bias is not None and not isinstance(bias, fx.Node):
        return NoMatch("its bias is not a tensor of the graph", node)
    return LinearCall(node, x, weight, bias, transposed=False)


def _matrix_weight(node: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[fx.Node, bool] | None:
    """`(tensor, transposed)` where `node` is a 2-D parameter or buffer, or its transpose."""
    if not isinstance(node, fx.Node):
        return None
    inner = transposed_inner(node)
    source = inner if inner is not None else node
    tensor = tensors.get(str(source.target)) if source.op == "get_attr" else None
    if tensor is None or tensor.dim() != 2:
        return None
    return source, inner is None


def transposed_inner(node: fx.Node) -> fx.Node | None:
    """The matrix `node` is the transpose of, if it is spelled as one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    rest = node.args[1:]
    swaps = ((0, 1), (1, 0), (-1, -2), (-2, -1))
    by_method = node.op == "call_method" and (
        (node.target == "t" and not rest)
        or (node.target == "transpose" and rest in swaps)
        or (node.target == "permute" and rest in ((1, 0), ((1, 0),), ([1, 0],)))
    )
    by_function = node.op == "call_function" and (
        (node.target is getattr and rest[0] in ("T", "mT"))
        or (node.target is torch.t and not rest)
        or (node.target is torch.transpose and rest in swaps)
    )
    return source if by_method or by_function else None


def _read_matmul(node: fx.Node, tensors: Mapping[str, torch.Tensor]) -> LinearCall | None:
    """`matmul(x, weight)` with a 2-D weight of the model; other products are no Linear."""
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    weight = _matrix_weight(node.args[1], tensors)
    if weight is None:
        return None
    return LinearCall(node, node.args[0], weight[0], None, transposed=weight[1])


def _read_addmm(
    node: fx.Node, is_addmm: bool, tensors: Mapping[str, torch.Tensor]
) -> LinearCall | None:
    """`addmm(extra, x, weight)`; x is a node, so weight may be any matrix."""
    if not is_addmm or len(node.args) != 3 or not isinstance(node.args[1], fx.Node):
        return None
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or "out" in node.kwargs:
        return None
    extra, x, weight = node.args
    if not isinstance(weight, fx.Node):
        return None
    inner = transposed_inner(weight)
    source = weight if inner is None else inner
    assert isinstance(x, fx.Node)
    if isinstance(extra, fx.Node) and extra.op == "get_attr":
        tensor = tensors.get(str(extra.target))
        if tensor is not None and tensor.dim() == 1 and tensor.numel() > 1:
            return LinearCall(node, x, source, extra, transposed=inner is None)
    return LinearCall(node, x, source, None, transposed=inner is None, extra=extra)
