"""What a module is, as far as capture cares: a leaf of torch, hooked, wrapped, parametrised."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fxfuse.clone import is_opaque
from fxfuse.module import FusedModule

_HOOKS = (
    ("_forward_hooks", "has forward hooks"),
    ("_forward_pre_hooks", "has forward pre-hooks"),
    ("_backward_hooks", "has backward hooks"),
    ("_backward_pre_hooks", "has backward pre-hooks"),
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
# Class attributes of fx.GraphModule that a model of the same attribute name would hide or lose.
_RESERVED = frozenset(
    ("graph", "code", "recompile", "_graph", "_code", "_wrapped_call", "_recompile_submodules")
)


def is_torch_leaf(module: nn.Module) -> bool:
    """True for torch.nn modules that are called as one: all without children, and attention."""
    home = type(module).__module__
    if not home.startswith(("torch.nn", "torch.ao.nn")):
        return False
    return not module._modules or isinstance(module, nn.MultiheadAttention)


def leaf_reason(module: nn.Module) -> str | None:
    """Why a call of `module` must stay a call, None where its forward may be traced through."""
    reason = _kind_reason(module)
    if reason is not None:
        return reason
    for registry, text in _HOOKS:
        if getattr(module, registry, None):
            return text
    if any(getattr(torch_module, registry, None) for registry in _GLOBAL_HOOKS):
        return "global module hooks are registered"
    return None


def region_reason(module: nn.Module) -> str | None:
    """Why `module` itself cannot run a graph as its forward, None where it can.

    Hooks are no reason: nn.Module.__call__ runs them around whatever the forward is. Only
    backward hooks of the old kind are, because they read the autograd node behind the output.
    """
    reason = _kind_reason(module)
    if reason is not None:
        return reason
    if module._backward_hooks and not getattr(module, "_is_full_backward_hook", True):
        return "has backward hooks of the old kind"
    if not isinstance(module, fx.GraphModule):
        names = {*module._parameters, *module._buffers, *module._modules, *module.__dict__}
        for kind in type(module).__mro__:
            if kind is not nn.Module:
                names.update(vars(kind))
        taken = sorted(_RESERVED & names)
        if taken:
            return f"has an attribute '{taken[0]}', a name torch.fx needs"
    return None


def is_closed(module: nn.Module) -> bool:
    """True for modules whose children are none of capture's business either."""
    return isinstance(module, FusedModule) or is_opaque(module)


def _kind_reason(module: nn.Module) -> str | None:
    if isinstance(module, FusedModule):
        return "already optimised"
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module"
    if is_opaque(module):
        return "already compiled by torch.compile"
    if type(module).__name__ in _WRAPPERS and type(module).__module__.startswith("torch."):
        return f"a distributed wrapper ({type(module).__name__})"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and any(
        item is not None and nn.parameter.is_lazy(item)
        for item in (*module._parameters.values(), *module._buffers.values())
    ):
        return "lazy, not initialised yet"
    hooks = module._forward_pre_hooks.values()
    if parametrize.is_parametrized(module) or any(
        type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks
    ):
        return "parametrised"
    if "forward" in module.__dict__:
        return "forward is replaced on the instance"
    return None
