"""Find the recipe for a fused call on plain tensors, and run it; prepared once per signature."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from . import frozen, routes
from .infer import Call, Store, Tensors, resolve_views
from .program import parse
from .routes import Recipe

View = Sequence[int]
T = TypeVar("T")

_CACHE_LIMIT = 16384
_CPU = -2  # get_device() says -1 of the CPU and of meta tensors alike
_lock = threading.Lock()
# By call site and signature; and by signature alone, so that equal layers share a recipe.
_recipes: dict[tuple[Any, ...], Recipe] = {}
_shared: dict[tuple[Any, ...], Recipe] = {}
_taken: dict[tuple[str, str], dict[tuple[str, str | None], None]] = {}
_backwards: dict[tuple[str, str], dict[str, None]] = {}
# What others prepare for a signature, see `remembered`.
_plans: dict[tuple[Any, ...], Any] = {}


class Static(NamedTuple):
    """What a fused call is told besides its tensors.

    program: canonical text. transposed: the weight is [K, N]. dropout: the training flag of each
    dropout of the program. views: the shape of each view. site: where the model makes the call.
    stores, normwise, in_place, lets_go: as in `infer.Call`.
    """

    program: str
    transposed: bool = False
    dropout: Sequence[bool] = ()
    views: Sequence[View] = ()
    site: str = ""
    stores: tuple[Store, ...] = ()
    normwise: bool = False
    in_place: bool = False
    lets_go: str = ""


def run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> list[torch.Tensor]:
    """The outputs of a fused call on plain tensors, by the recipe of its signature."""
    return find(x, weight, bias, operands, static).run(x, weight, bias, operands)


def find(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Recipe:
    """The recipe of a fused call's signature."""
    try:
        key = signature(x, weight, bias, operands, static)
    except RuntimeError:  # a sparse tensor has no strides
        return _unkept(x, weight, bias, operands, static)
    recipe = _recipes.get(key)
    if recipe is None:
        recipe = _prepare(key, x, weight, bias, operands, static)
    return recipe


def signature(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> tuple[Any, ...]:
    """All that decides how a call runs, after its site."""
    # A device is a small number here, which hashes and compares faster than a torch.device.
    key: tuple[Any, ...] = (
        static.site,
        static.program,
        static.transposed,
        _CPU if x.is_cpu else x.get_device(),
        x.dtype,
        x.shape,
        x.stride(),
        x.is_neg(),
    )
    if weight is not None:
        device = _CPU if weight.is_cpu else weight.get_device()
        key += (device, weight.dtype, weight.shape, weight.stride())
    if bias is not None:
        device = _CPU if bias.is_cpu else bias.get_device()
        key += (device, bias.dtype, bias.shape, bias.stride())
    for t in operands:
        device = _CPU if t.is_cpu else t.get_device()
        key += (device, t.dtype, t.shape, t.stride(), t.is_neg())
    if static.views:
        key += (tuple(map(tuple, static.views)),)
    if static.stores:
        key += (static.stores,)
    if static.normwise:
        key += ("normwise",)
    if static.in_place:
        key += ("in_place",)
    if static.lets_go:
        key += ("lets_go", static.lets_go)
    if x.is_cuda:
        if x.dtype == torch.float32:
            key += (routes.tf32_allowed(), weight is not None and frozen.is_marked(weight))
        if weight is not None and weight.is_neg():
            key += ("weight",)
        if bias is not None and bias.is_neg():
            key += ("bias",)
        if routes.FORCED:
            key += (routes.FORCED[-1],)
    return key


def described(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Call:
    """The call, with its program read and its views resolved."""
    program, transposed, _, views, site, stores, normwise, in_place, lets_go = static
    shape = tuple(x.shape)
    if weight is not None:
        shape = (*shape[:-1], weight.shape[1 if transposed else 0])
    resolved = resolve_views(views, shape)
    return Call(
        x,
        weight,
        bias,
        tuple(operands),
        parse(program),
        transposed,
        resolved,
        site,
        stores,
        normwise,
        in_place,
        lets_go,
    )


def _prepare(
    key: tuple[Any, ...],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Recipe:
    recipe = _shared.get(key[1:])
    if recipe is None:
        recipe = routes.prepare(described(x, weight, bias, operands, static))
    with _lock:
        if len(_recipes) >= _CACHE_LIMIT:
            _recipes.clear()
            _shared.clear()
        _recipes[key] = _shared[key[1:]] = recipe
    note(static, recipe.route, recipe.reason)
    return recipe


def _unkept(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    operands: Tensors,
    static: Static,
) -> Recipe:
    """For a call with a tensor that has no strides: torch ops, found anew each time."""
    tensors = [t for t in (x, weight, bias, *operands) if t is not None]
    layout = next(t.layout for t in tensors if t.layout != torch.strided)
    reason = f"a tensor's layout is {layout}"
    note(static, "reference", reason)
    run = routes.reference_run(described(x, weight, bias, operands, static))
    recipe = Recipe("reference", reason, run)
    return routes.over_operand(recipe) if static.in_place else recipe


def note(static: Static, route: str, reason: str | None) -> None:
    """Remember, for the report, that a call took `route`."""
    with _lock:
        _taken.setdefault((static.site, static.program), {})[route, reason] = None


def routes_taken(site: str, program: str) -> list[tuple[str, str | None]]:
    """The distinct `(route, reason)` that calls from `site` took so far in this process."""
    with _lock:
        return list(_taken.get((site, program), ()))


def note_backward(static: Static, words: str) -> None:
    """Remember, for the report, how calls are differentiated."""
    with _lock:
        _backwards.setdefault((static.site, static.program), {})[words] = None


def backwards_taken(site: str, program: str) -> list[str]:
    """The distinct ways in which calls from `site` were differentiated so far."""
    with _lock:
        return list(_backwards.get((site, program), ()))


def remembered(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` returned for this key, for as long as recipes are kept."""
    try:
        return _plans[key]
    except KeyError:
        made = make()
    with _lock:
        if len(_plans) >= _CACHE_LIMIT:
            _plans.clear()
        _plans[key] = made
    return made


def forget() -> None:
    """Drop every recipe: for tests that change what recipes depend on."""
    with _lock:
        _plans.clear()
        _backwards.clear()
        _recipes.clear()
        _shared.clear()
        _taken.clear()
