"""Find where a weight's gradient may be added to `.grad` by the product that computes it.

Autograd hands a leaf's gradient to an AccumulateGrad node, which adds it to `.grad` where there is
one: a second matrix in memory, and one more pass over three. A product with beta = 1 needs neither.
The node is then handed None, at which it leaves `.grad` as it is.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from .routes import share_memory
from .torch_ops import PLAIN, dispatch_modes

_will_execute = getattr(torch._C, "_will_engine_execute_node", None)


def will_execute(node: Any) -> bool | None:
    """Whether the running backward executes a node; None where `torch.autograd.grad` was asked for
    the gradient of the leaf it is of, which the engine says by an error, and where this torch
    cannot tell."""
    try:
        return None if _will_execute is None else bool(_will_execute(node))
    except RuntimeError:
        return None


def accumulation_target(node: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """The `.grad` [M, N] to which `node` would add a @ b, of a [M, K] and b [K, N], in the backward
    that is running; None where it would not, or where somebody could tell who added.

    - The weight must be a leaf, and must not have been written to since, nor have stopped to need a
      gradient: both are for the node to refuse.
    - Where gradients are recorded, `.grad` becomes a new tensor; where they are traced, all is seen
      as ops; anomaly mode looks at what a node returns.
    - A hook is given the gradient of this backward alone.
    - The engine must execute the node (`will_execute`), additions must not meet (`_in_order`), and
      `.grad` must be what a product can add to (`_can_hold`).
    """
    if type(node).__name__ != "AccumulateGrad":
        return None
    leaf = node.variable
    if not leaf.is_leaf or not leaf.requires_grad or leaf.grad is None:
        return None
    if torch.is_grad_enabled() or torch.is_anomaly_enabled() or dispatch_modes():
        return None
    if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
        return None
    executes = will_execute(node) is True
    safe = executes and _in_order(a) and _can_hold(leaf.grad, leaf, a, b)
    return leaf.grad if safe else None


def _in_order(tensor: torch.Tensor) -> bool:
    """Whether nothing can be added to `.grad` at the same time, without the engine's help.

    On the CPU nodes run in the thread that called `backward`. Several threads may, for which
    AccumulateGrad has a lock, and so those that are not the main one leave the addition to it. On
    CUDA a stream is an order. Between streams the engine waits for what a node is handed, and here
    it is handed nothing: both must be on the default stream.
    """
    if tensor.is_cuda:
        return not torch._C._cuda_getCurrentRawStream(tensor.get_device())
    return tensor.is_cpu and threading.current_thread() is threading.main_thread()


def _can_hold(grad: torch.Tensor, leaf: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a @ b` can be added to a leaf's gradient in place: both are plain matrices of one
    kind, no graph refers to the gradient, and it is dense and shares no memory with the factors."""
    return (
        all(type(t) in PLAIN for t in (grad, leaf, a, b))
        and grad.shape == leaf.shape == (a.shape[0], b.shape[1])
        and grad.dtype == leaf.dtype == a.dtype == b.dtype
        and grad.device == leaf.device == a.device == b.device
        and grad.layout == torch.strided
        and not (grad.requires_grad or grad.is_inference() or grad.is_neg())
        and (grad.is_contiguous() or grad.t().is_contiguous())
        and not any(share_memory(t, grad) for t in (a, b))
    )
