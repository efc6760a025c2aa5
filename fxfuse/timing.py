"""Times contestants side by side and measures their errors against float64.

`fxfuse bench` and scripts/bench share this file, so that both print numbers got the same way.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

Inputs = tuple[Any, ...]
Call = Callable[..., Any]

CONTESTANTS = ("eager", "compile", "compile-max", "gemm", "fxfuse")

# A burst of short calls: long enough for the clock, short enough that contestants share the noise.
_BURST_SECONDS = 5e-3
_MAX_BURST = 50


@dataclass(frozen=True)
class Timing:
    """Seconds one call takes: median, 10th and 90th percentile over `runs` calls."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Row:
    """What one contestant did. `timing` or `error` is None where `note` says why."""

    name: str
    timing: Timing | None
    error: float | None
    note: str = ""


def compare(
    model: nn.Module,
    optimized: Call,
    inputs: Inputs,
    names: Sequence[str] = CONTESTANTS,
    *,
    rows: int | None = None,
    seconds: float = 1.0,
    min_rounds: int = 5,
) -> list[Row]:
    """Run each of `names` on the same inputs and return one Row per name, in that order.

    Times are of whole calls without gradients. `error` is the relative Frobenius norm of the
    difference from `model` run in float64 on the same (already rounded) weights and inputs; with
    `rows`, over the first `rows` of the batch only, which is right where a model treats the
    examples of a batch independently. A contestant that cannot run gets a note instead.
    """
    torch._dynamo.reset()  # else a shape seen before makes the next compilation a dynamic one
    with torch.no_grad():
        input_sets = rotating_inputs(inputs)
        calls: dict[str, Call] = {}
        notes: dict[str, str] = {}
        errors: dict[str, float] = {}
        try:
            truth: Any = float64_output(model, inputs, rows)
        except Exception as error:
            truth = None
            notes.update(dict.fromkeys(names, f"no float64 run: {_first_line(error)}"))
        for name in names:
            try:
                calls[name] = call = _contestant(name, model, optimized, input_sets)
                output = call(*inputs)
            except Exception as error:
                calls.pop(name, None)
                notes[name] = _first_line(error)
                continue
            if truth is not None and name != "gemm":
                errors[name] = relative_error(_first_rows(output, rows), truth)
            del output
        timings = measure(calls, input_sets, seconds=seconds, min_rounds=min_rounds)
    return [Row(n, timings.get(n), errors.get(n), notes.get(n, "")) for n in names]


def measure(
    calls: Mapping[str, Call],
    input_sets: Sequence[Inputs],
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Return the time of one call of each contestant, taken in turns so that noise hits all alike.

    `seconds` is roughly what is spent on each. On CUDA the times are the GPU's (events around each
    call, with the queue kept full), and each call takes the next of `input_sets`.
    """
    if not calls:
        return {}
    leaves = (leaf for leaf in tree_leaves(input_sets) if isinstance(leaf, torch.Tensor))
    device = next((leaf.device for leaf in leaves), torch.device("cpu"))
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    sets = {name: itertools.cycle(input_sets) for name in calls}
    plans = {name: _plan_burst(call, sets[name], device) for name, call in calls.items()}
    spent = sum(plan.seconds for plan in plans.values())
    rounds = int(min(max_rounds, max(min_rounds, seconds * len(calls) / spent)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            samples[name] += sample(calls[name], sets[name], plans[name])
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
    return {name: _summary(values) for name, values in samples.items()}


def host_seconds(call: Callable[[], Any], *, calls: int = 200, repeats: int = 15) -> float:
    """Return the host's time to issue one asynchronous CUDA call: the median over `repeats`.

    The queue is emptied before each repeat and `calls` fit in it, so the device never holds the
    host up.
    """
    samples = []
    for _ in range(repeats + 2):  # the first two are the warm-up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return _summary(samples[2:]).median


def rotating_inputs(inputs: Inputs) -> list[Inputs]:
    """Return copies of `inputs` that together pass twice the GPU's L2; on a CPU `inputs` alone."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    device = next((t.device for t in tensors), torch.device("cpu"))
    if device.type != "cuda":
        return [inputs]
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    size = max(1, sum(t.numel() * t.element_size() for t in tensors))
    copies = min(64, math.ceil(2 * l2_bytes / size))
    return [inputs] + [tree_map(_clone, inputs) for _ in range(copies)]


def float64_output(model: nn.Module, inputs: Inputs, rows: int | None = None) -> Any:
    """Return what `model` computes in float64 for the first `rows` of `inputs` (None: all)."""
    exact = copy.deepcopy(model).double()
    return exact(*tree_map(_as_double, _first_rows(inputs, rows)))


def relative_error(output: Any, truth: Any) -> float:
    """Return |output - truth| / |truth| in the Frobenius norm over all floating tensors."""
    difference = norm = 0.0
    for got, want in zip(tree_leaves(output), tree_leaves(truth), strict=True):
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            difference += (got.double() - want).square().sum().item()
            norm += want.square().sum().item()
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)


def bare_gemms(model: nn.Module, input_sets: Sequence[Inputs]) -> Call:
    """Return a call that replays only the GEMMs `model` runs on `input_sets`, a set per call.

    Raises ValueError where the model runs none.
    """
    recorded = []
    for inputs in input_sets:
        with _GemmRecorder() as recorder:
            model(*inputs)
        recorded.append(recorder.calls)
    if not recorded[0]:
        raise ValueError("the model runs no Linear")
    turns = itertools.cycle(recorded)

    def replay(*_: Any) -> None:
        for function, args, kwargs in next(turns):
            function(*args, **kwargs)

    return replay


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set `torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _GemmRecorder(TorchFunctionMode):
    """Notes every call of a GEMM with a 2-D weight, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Call, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if _is_gemm(func, args):
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


_LINEARS = (F.linear, torch.addmm, torch.Tensor.addmm)
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


def _is_gemm(func: Any, args: tuple[Any, ...]) -> bool:
    if func in _LINEARS:
        return True
    return func in _MATMULS and len(args) == 2 and args[1].dim() == 2


def _contestant(name: str, model: nn.Module, optimized: Call, input_sets: Sequence[Inputs]) -> Call:
    if name == "eager":
        return model
    if name == "compile":
        return torch.compile(model)
    if name == "compile-max":
        return torch.compile(model, mode="max-autotune")
    if name == "gemm":
        return bare_gemms(model, input_sets)
    if name == "fxfuse":
        return optimized
    raise ValueError(f"no contestant {name!r}; there are {', '.join(CONTESTANTS)}")


@dataclass(frozen=True)
class _Burst:
    """How one contestant is sampled: calls per burst, and what a burst costs."""

    calls: int
    settle: int  # calls made before a burst and not counted: another contestant just ran
    seconds: float
    issue_seconds: float


def _plan_burst(call: Call, inputs: Iterator[Inputs], device: torch.device) -> _Burst:
    """Warm `call` up and choose its burst. max-autotune needs several calls to settle."""
    is_cuda = device.type == "cuda"
    for _ in range(4 if is_cuda else 2):
        call(*next(inputs))
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(*next(inputs))
    issued = time.perf_counter() - start
    if is_cuda:
        torch.cuda.synchronize(device)
    took = max(time.perf_counter() - start, 1e-7)
    calls = max(1, min(_MAX_BURST, math.ceil(_BURST_SECONDS / took)))
    settle = 1 if took < 2 * _BURST_SECONDS and not is_cuda else 0
    return _Burst(calls, settle, took * (calls + settle), issued * calls)


def _sample_cpu(call: Call, inputs: Iterator[Inputs], plan: _Burst) -> list[float]:
    for _ in range(plan.settle):
        call(*next(inputs))
    samples = []
    for _ in range(plan.calls):
        arguments = next(inputs)
        start = time.perf_counter()
        call(*arguments)
        samples.append(time.perf_counter() - start)
    return samples


def _sample_cuda(call: Call, inputs: Iterator[Inputs], plan: _Burst) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(plan.calls)
    ]
    # The device sleeps while the host fills its queue, so that no gap between launches is timed.
    cycles = (
        int(3e9 * plan.issue_seconds) + 100_000
    )  # half as long again as issuing takes, at 2 GHz
    torch.cuda._sleep(cycles)
    for start, end in events:
        arguments = next(inputs)
        start.record()
        call(*arguments)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _summary(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)

    def percentile(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return Timing(percentile(0.5), percentile(0.1), percentile(0.9), len(ordered))


def _first_rows(tree: Any, rows: int | None) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[:rows] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    return tree if rows is None else tree_map(cut, tree)


def _as_double(leaf: Any) -> Any:
    is_floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.double() if is_floating else leaf


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:100]
