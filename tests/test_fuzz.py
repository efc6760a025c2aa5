"""Random models: whatever pointwise work follows a few Linears, the optimised model is eager's.

A model is a list of steps drawn from a seeded generator. Its steps share intermediates, write in
place, read shapes, draw random numbers and mix in work no group can hold, so that most legality
rules of the matcher are met in combinations nobody thought of.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_numerics import as_double, errors, run
from torch import nn

import fxfuse

WIDTH = 6
Step = Callable[["Random", list[Any]], None]

UNARY = (
    torch.tanh, torch.sigmoid, F.relu, F.gelu, F.silu, torch.sin, F.softplus, torch.abs, torch.neg,
    F.leaky_relu, F.mish, F.elu, lambda h: h.clamp(-0.5, 0.75), lambda h: h * 0.5,
    lambda h: 1.0 - h, lambda h: h / 4, lambda h: h.contiguous(), lambda h: h - 0.0,
    lambda h: h * 1.0, lambda h: h * torch.sigmoid(h), lambda h: h.tanh() ** 2,
)  # fmt: skip
BINARY = (
    torch.add, torch.mul, torch.sub, torch.minimum, torch.maximum,
    lambda a, b: torch.add(a, b, alpha=0.5), lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.lerp(a, b, 0.25), lambda a, b: a.addcmul(b, b, value=0.125),
)  # fmt: skip
IN_PLACE = (
    lambda h, o: h.add_(o), lambda h, o: h.mul_(o), lambda h, o: h.relu_(),
    lambda h, o: F.silu(h, inplace=True), lambda h, o: h.clamp_(-1, 1),
    lambda h, o: torch.tanh_(h), lambda h, o: h.sub_(o, alpha=2),
)  # fmt: skip
COMPARING = (
    lambda a, b: torch.where(a > 0, a, b), lambda a, b: a * (b > 0.1),
    lambda a, b: a.masked_fill(b < a, 0.5), lambda a, b: (a >= b).float() + b,
    lambda a, b: (a > 0) * 1.0, lambda a, b: a.gt(b), lambda a, b: ((a > 0) + (b > 0)) * a,
)  # fmt: skip
FOREIGN = (
    lambda h: torch.softmax(h, -1), lambda h: h.sum(-1, keepdim=True), lambda h: h.cumsum(-1),
    lambda h: h.flip(-1), lambda h: torch.round(h, decimals=1), lambda h: h.mean(),
)  # fmt: skip


class Random(nn.Module):
    """A random model over x [*lead, WIDTH]."""

    def __init__(self, seed: int, dtype: torch.dtype, train: bool) -> None:
        super().__init__()
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        lead = draw.choice([(5,), (2, 3), (2, 3, 2), (), (0,), (1,), (4, 1), (1, 4)])
        self.lead = lead
        self.linears = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.7) for _ in range(draw.choice([1, 2, 3]))
        )
        self.dropout = nn.Dropout(0.5)
        shapes = [(), (1,), (WIDTH,), (*lead, WIDTH), (*lead, 1), (*lead[1:], WIDTH)]
        if len(lead) > 1:
            shapes += [(lead[0], *[1] * len(lead[1:]), WIDTH), (*lead[:-1], 1, 1)]
        self.operands = nn.ParameterList(nn.Parameter(torch.randn(s)) for s in shapes)
        # Of another dtype than the model's, and of strides no kernel reads.
        self.register_buffer("wide", torch.randn(WIDTH))
        self.register_buffer("strided", torch.randn(WIDTH, *lead).movedim(0, -1))
        self.register_buffer("mask", torch.rand(*lead, WIDTH) > 0.5)
        wide = self.wide
        self.to(dtype)
        self.wide = wide
        self.exact = dtype == torch.float32
        self.steps = [self._step(train) for _ in range(draw.choice([3, 6, 10, 16]))]
        self.kept = draw.randrange(1, 4)

    def _step(self, train: bool) -> Step:
        """One step; all choices are made here, none while the model runs."""
        draw = self.draw
        kinds = ["unary"] * 6 + ["binary"] * 4 + ["operand"] * 4 + ["in-place"] * 2 + ["view"]
        kinds += ["dropout", "foreign", "linear", "shape", "mask"]
        kinds += ["comparing"] * 2 if self.exact else []
        kind = draw.choice(kinds)
        first, second = draw.random() ** 0.5, draw.random()
        unary, binary = draw.choice(UNARY), draw.choice(BINARY)
        write, compare, foreign = (draw.choice(c) for c in (IN_PLACE, COMPARING, FOREIGN))
        index, swap = draw.randrange(len(self.operands) + 2 - train), draw.random() < 0.5
        linear = draw.randrange(len(self.linears))

        def step(self: Random, pool: list[Any]) -> None:
            extra = [*self.operands, self.wide, self.strided][index]
            a, b = pool[int(first * len(pool))], pool[int(second * len(pool))]
            if kind == "unary":
                pool.append(unary(a))
            elif kind == "binary":
                pool.append(binary(a, b))
            elif kind == "operand":
                pool.append(binary(extra, a) if swap else binary(a, extra))
            elif kind == "in-place":
                pool.append(write(a, extra))
            elif kind == "view":
                pool.append(a.view(-1, WIDTH).relu().reshape(*self.lead, WIDTH))
            elif kind == "dropout":
                pool.append(F.dropout(a, 0.25, self.training) if swap else self.dropout(a))
            elif kind == "foreign":
                pool.append(a * foreign(b))
            elif kind == "linear":
                pool.append(self.linears[linear](a))
            elif kind == "shape":
                pool.append(a * a.shape[-1] + b.dim())
            elif kind == "mask":
                pool.append(torch.where(self.mask, a, b if swap else 0.0))
            else:
                pool.append(compare(a, b) * 1 if swap else compare(a, b) * b)

        return step

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pool = [linear(x) for linear in self.linears]
        for step in self.steps:
            step(self, pool)
        return tuple(pool[-self.kept :])


def made(seed: int, dtype: torch.dtype, train: bool) -> tuple[Random, torch.Tensor] | None:
    """A model and its input, or None where eager itself does not run it, or blows up."""
    model = Random(seed, dtype, train).train(train)
    x = torch.randn(*model.lead, WIDTH).to(dtype)
    try:
        outputs = run(model, (x,))
    except RuntimeError:
        return None
    small = all(o.double().abs().max() < 1e3 for o in outputs if o.numel())
    return (model, x) if small else None


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_models_are_eagers(dtype: torch.dtype, train: bool) -> None:
    """Each within twice eager's error, all together within eager's."""
    tried = groups = 0
    logs = []
    for seed in range(100):
        found = made(seed + 1000 * train, dtype, train)
        if found is None:
            continue
        model, x = found
        eager = run(model, (x,))
        reference = copy.deepcopy(model).double()
        try:
            truth = run(reference, (as_double(x),))
        except RuntimeError:  # its casts and float64 do not mix
            continue
        optimized = fxfuse.optimize(model)
        fused = run(optimized, (x,))
        tried += 1
        groups += len(fxfuse.report(optimized).groups)
        for f, e, t in zip(fused, eager, truth, strict=True):
            assert (f.shape, f.dtype) == (e.shape, e.dtype), seed
            of_fused, of_eager, size = errors(f, e, t)
            floor = torch.finfo(dtype).eps * size
            assert of_fused <= 2 * of_eager + floor, (seed, of_fused, of_eager, size)
            if of_eager > floor / 16 and of_fused > 0:
                logs.append(math.log(of_fused / of_eager))
    assert tried > 40
    assert groups > tried
    assert sum(logs) / len(logs) <= math.log(1.05)


@pytest.mark.parametrize("seed", range(20))
def test_random_models_have_eagers_gradients(seed: int) -> None:
    found = made(seed + 5000, torch.float32, train=False)
    if found is None:
        pytest.skip("eager does not run this one")
    model, x = found
    optimized = fxfuse.optimize(model)
    results = []
    for version in (model, optimized):
        given = x.clone().requires_grad_()
        try:
            outputs = version(given)
        except RuntimeError as error:
            if version is model:
                pytest.skip(f"eager: {error}")
            raise
        total = sum(o.double().square().sum() for o in outputs if o.requires_grad)
        if not isinstance(total, torch.Tensor):
            pytest.skip("nothing is differentiable")
        results.append(torch.autograd.grad(total, [given, *model.parameters()], allow_unused=True))
    for ours, eagers in zip(*reversed(results), strict=True):
        if ours is None or eagers is None:
            assert (ours is None) == (eagers is None) or not (
                eagers if ours is None else ours
            ).any()
            continue
        torch.testing.assert_close(ours, eagers, rtol=2e-4, atol=1e-5)
