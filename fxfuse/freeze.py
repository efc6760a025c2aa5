"""`freeze` and `unfreeze`: the promise that the weights of an optimised module are constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from . import frozen
from .errors import InputError
from .fused import fused_linear, unfused_linear
from .module import FROZEN, REPORT, FusedModule, find_places, mark_weights

M = TypeVar("M", bound=nn.Module)
_HOOK: Any = "fxfuse"  # a key of ours, where torch's own are numbers


@dataclass(frozen=True)
class Weights:
    """The weights of fused Linears: how many, how many of them frozen, and the bytes of what is
    kept for these now."""

    total: int = 0
    frozen: int = 0
    kept_bytes: int = 0


def freeze(module: M) -> M:
    """Promise that the weights of the Linears in `module` stay as they are; returns it.

    Where a kernel reads a weight in another form than it is stored in, that form is then made at
    the first call and kept, and not made at every call. Kernels that read the weight as it is run
    as before. module: what `fxfuse.optimize` returned, or a module with such modules in it. It is
    changed in place; a copy of it, pickled or deep, is frozen, too, and a tensor it shares with
    other optimised modules is frozen for them as well, for as long as this one lives.

    A change that torch can see costs one conversion at the next call and nothing else: operations
    in place, steps of a torch.optim.Optimizer, load_state_dict, `.to()`, `.half()`, `.cuda()`,
    another tensor assigned to `.data`. So a frozen module may be trained; each step then costs
    what freezing was to save. A weight that is replaced is frozen where the module itself is
    moved, cast or loaded; after any other replacement (`module.fc.weight = ...`) the new one is
    not, until `freeze` is called again.

    What cannot be seen, and gives the result of the old weight: operations in place on `.data`
    (`p.data.copy_(...)`) or through numpy, DLPack or another process; collectives of
    torch.distributed, and what sharded training gathers; kernels that are not torch's own; the
    replay of a CUDA graph that writes weights. Call `freeze` again after one of these: it has
    everything made anew. A CUDA graph that was captured from a frozen module reads what was kept
    at that time: capture it again after any change, and after `unfreeze`.

    Raises InputError for any other object, and for a weight made under torch.inference_mode, which
    has no version counter to tell of changes; nothing is frozen then.
    """
    parts = _parts(module, "freeze")
    for name, weight in _weights(parts):
        if weight.is_inference():
            raise InputError(
                f"freeze: weight {name} is an inference tensor, which does not count its changes; "
                "make or load the model outside torch.inference_mode"
            )
    for part in parts.values():
        _release(part)
        part.__dict__[FROZEN] = tuple(_weight_paths(part))
        part._load_state_dict_post_hooks[_HOOK] = mark_weights
        mark_weights(part)
    for _, weight in _weights(parts):
        frozen.outdate(weight)
    return module


def unfreeze(module: M) -> M:
    """Take back what `freeze` promised, and free what is kept; returns `module`.

    A tensor that is part of another frozen module stays frozen. Raises InputError as `freeze` does
    for an object that is not optimised.
    """
    for part in _parts(module, "unfreeze").values():
        _release(part)
        part.__dict__.pop(FROZEN, None)
        part._load_state_dict_post_hooks.pop(_HOOK, None)
    return module


def memory(module: nn.Module) -> int:
    """Bytes kept for the frozen weights of `module` now: 0 before a call has needed any."""
    return count_weights(module).kept_bytes


def count_weights(module: nn.Module) -> Weights:
    """The weights of the Linears in `module`; one that is shared counts once."""
    distinct = {id(weight): weight for _, weight in _weights(_fused(module))}.values()
    marked = [weight for weight in distinct if frozen.is_marked(weight)]
    return Weights(len(distinct), len(marked), sum(map(frozen.kept_bytes, marked)))


def _parts(module: Any, call: str) -> dict[str, Any]:
    """The optimised modules in `module`, by path. Raises InputError where it is not optimised."""
    found = _fused(module) if isinstance(module, nn.Module) else {}
    if not found and REPORT not in getattr(module, "__dict__", ()):
        what = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise InputError(f"{call}: {what} is not a module returned by fxfuse.optimize")
    return found


def _fused(module: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in module.named_modules() if isinstance(m, FusedModule)}


def _weights(parts: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each weight that fused Linears in these modules read."""
    for prefix, part in parts.items():
        for path, owner, name in find_places(part, _weight_paths(part)):
            weight = frozen.held(owner, name)
            if weight is not None:
                yield f"{prefix}.{path}".lstrip("."), weight


def _weight_paths(part: Any) -> list[str]:
    """Where a module holds the weights its fused calls read. One that is computed has no place."""
    weights = [
        node.args[1]
        for node in part.graph.nodes
        if node.op == "call_function" and node.target in (fused_linear, unfused_linear)
    ]
    return list(dict.fromkeys(str(w.target) for w in weights if w.op == "get_attr"))


def _release(part: Any) -> None:
    for _, owner, name in find_places(part, part.__dict__.get(FROZEN, ())):
        frozen.unmark(owner, name)
