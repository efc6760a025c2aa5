"""Weights that are promised to stay as they are, and what is made of them once and kept.

Some kernels read a weight in another form than it is stored in, such as planes of fp16 that
together are an fp32 matrix. `prepared` hands out that form: made anew at every call, or, for a
frozen weight, made once and kept until the weight is seen to change.

What is frozen is a place, an attribute of a module: the tensor found there is frozen for as long
as it is there and the module lives. Tensors themselves are referred to neither strongly, which
would keep a replaced weight alive, nor weakly: torch.utils.swap_tensors, by which `module.to` can
be told to work, refuses a tensor that has weak references.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

P = TypeVar("P")


class _Place(NamedTuple):
    """Where a frozen weight is: the parameter or buffer `name` of `owner`."""

    key: tuple[int, str]
    owner: weakref.ref[nn.Module]
    name: str


@dataclass(slots=True)
class _Kept:
    """What was made of a weight, and what the weight looked like then; state is None where it has
    changed in a way that does not show."""

    product: Any
    state: tuple[Any, ...] | None
    storage: weakref.ref[torch.UntypedStorage]


class _Mark:
    """A frozen weight: the places it is frozen at, and what is kept for it, by kind."""

    __slots__ = ("__weakref__", "kept", "places")

    def __init__(self) -> None:
        self.places: tuple[_Place, ...] = ()
        self.kept: dict[Hashable, _Kept] = {}

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is at one of the places; its id alone may be another tensor's by now."""
        for _, owner, name in self.places:
            module = owner()
            if module is not None and (
                module._parameters.get(name) is weight or module._buffers.get(name) is weight
            ):
                return True
        return False


# Reentrant: a module may die, and its places with it, while this thread holds the lock.
_lock = threading.RLock()
_marks: dict[int, _Mark] = {}  # by the id of the weight
_placed: dict[tuple[int, str], int] = {}  # the id of the weight, by place


def prepared(weight: torch.Tensor, kind: Hashable, make: Callable[[torch.Tensor], P]) -> P:
    """`make(weight)`, or what an earlier call kept of it.

    A frozen weight's product is kept, and returned while the weight has the same storage, address,
    shape, strides, dtype and version counter, and no optimiser has stepped on it. (An address
    alone says little: a cast there and back may well end where it began.) kind: tells apart the
    products of one weight. `make` must depend on nothing but its argument and kind; it may run
    more than once where threads meet. It runs on the current stream, and a product that is kept is
    complete before it is returned, so that any stream may read it. Nothing is kept while a CUDA
    graph is captured, for memory allocated then is the graph's; nor for an inference tensor, which
    has no version counter.
    """
    if not _marks:
        return make(weight)
    mark = _marks.get(id(weight))
    if mark is None or not mark.holds(weight):
        return make(weight)
    kept = mark.kept.get(kind)
    if (
        kept is not None
        and kept.storage() is weight.untyped_storage()
        and kept.state == _state(weight)
    ):
        return kept.product
    return _renew(mark, weight, kind, make)


def _renew(
    mark: _Mark, weight: torch.Tensor, kind: Hashable, make: Callable[[torch.Tensor], P]
) -> P:
    if weight.is_inference() or _capturing(weight):
        return make(weight)
    # Looked at before the work: an edit from another thread meanwhile must count as one.
    state = _state(weight)
    died = functools.partial(_storage_died, weakref.ref(mark), kind)
    storage = weakref.ref(weight.untyped_storage(), died)
    # A product may serve calls of every mode and must not hold on to an autograd graph.
    with torch.inference_mode(False), torch.no_grad():
        product = make(weight)
    _settle(weight)
    mark.kept[kind] = _Kept(product, state, storage)
    return product


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    """All that shows when a weight changes but keeps its storage, which has one device for life."""
    return weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _storage_died(mark: weakref.ref[_Mark], kind: Hashable, _: object) -> None:
    """Free a product with the storage it was made of: the weight was moved, cast or replaced."""
    found = mark()
    if found is not None:
        found.kept.pop(kind, None)


def _capturing(weight: torch.Tensor) -> bool:
    if not weight.is_cuda:
        return False
    with torch.cuda.device(weight.device):
        return torch.cuda.is_current_stream_capturing()


def _settle(weight: torch.Tensor) -> None:
    """Wait until a new product is complete and no stream reads the old one, soon to be freed.

    One wait for each making spares every call an event, and the allocator every reader's stream.
    """
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


# Marking -----------------------------------------------------------------------------------------


def held(owner: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer `name` of `owner`, if it has one."""
    found = owner._parameters.get(name)
    return owner._buffers.get(name) if found is None else found


def mark(owner: nn.Module, name: str) -> None:
    """Freeze the parameter or buffer `name` of `owner`, until `unmark` or the end of `owner`.

    What is kept for a tensor that is frozen elsewhere, too, serves both. To be called again where
    another tensor takes the place: until then that one is not frozen. Nothing to freeze is no
    error.
    """
    _watch_optimizers()
    weight = held(owner, name)
    key = (id(owner), name)
    with _lock:
        if weight is not None and _placed.get(key) == id(weight):
            return
        unmark(owner, name)
        if weight is None:
            return
        place = _Place(key, weakref.ref(owner, functools.partial(_owner_died, key)), name)
        known = _marks.get(id(weight))
        found = known if known is not None and known.holds(weight) else _Mark()
        found.places = (*found.places, place)
        _marks[id(weight)] = found
        _placed[key] = id(weight)


def unmark(owner: nn.Module, name: str) -> None:
    """Undo `mark`. What is kept for a weight goes with the last place it is frozen at."""
    _remove((id(owner), name))


def outdate(weight: torch.Tensor) -> None:
    """Have the next call make anew what is kept for `weight`."""
    mark = _marks.get(id(weight))
    for kept in list(mark.kept.values()) if mark else ():
        kept.state = None


def is_marked(weight: torch.Tensor) -> bool:
    """Whether `weight` is frozen."""
    mark = _marks.get(id(weight))
    return mark is not None and mark.holds(weight)


def kept_bytes(weight: torch.Tensor) -> int:
    """Bytes of the tensors kept for `weight` at this moment."""
    mark = _marks.get(id(weight))
    products = [k.product for k in list(mark.kept.values())] if mark else []
    storages = [t.untyped_storage() for t in _tensors(products)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _owner_died(key: tuple[int, str], _: object) -> None:
    _remove(key)


def _remove(key: tuple[int, str]) -> None:
    with _lock:
        weight = _placed.pop(key, None)
        mark = None if weight is None else _marks.get(weight)
        if weight is None or mark is None:
            return
        mark.places = tuple(p for p in mark.places if p.key != key and p.owner() is not None)
        if not mark.places:
            del _marks[weight]


@functools.cache
def _watch_optimizers() -> None:
    """Learn of optimiser steps: those with fused=True write without a word to version counters."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups if _marks else ():
        for parameter in group["params"]:
            outdate(parameter)


def _tensors(product: Any) -> Iterator[torch.Tensor]:
    """The tensors of a product: in sequences, mappings and dataclasses."""
    if isinstance(product, torch.Tensor):
        yield product
        return
    items: Any = ()
    if isinstance(product, (tuple, list)):
        items = product
    elif isinstance(product, dict):
        items = product.values()
    elif is_dataclass(product):
        items = [getattr(product, field.name) for field in fields(product)]
    for item in items:
        yield from _tensors(item)
