"""A physics-informed network: the loss holds derivatives of the model's output by its input.

It solves the heat equation u_t = u_xx / pi^2 on 0 <= x <= 1 from u = sin(pi x), whose solution is
exp(-t) sin(pi x). Each step differentiates the network twice by its input and the loss by the
parameters, so gradients of gradients of gradients. A layer is Linear, times a learned number, tanh
(Jagtap et al., 2020, arXiv 1906.01170).

    python examples/training/pinn.py --steps 500 --points 4096 --width 128
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import nn

BATCH, IN_FEATURES, OUT_FEATURES, LAYERS = 1024, 2, 64, 4
Field = Callable[[torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * self.slope)


class Model(nn.Module):
    """u at points [..., (t, x)]."""

    def __init__(self, in_features: int, width: int, layers: int = LAYERS) -> None:
        super().__init__()
        sizes = [in_features] + [width] * layers
        self.layers = nn.Sequential(*(Layer(a, b) for a, b in itertools.pairwise(sizes)))
        self.last = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x))


def get_inputs(batch: int = BATCH, in_features: int = IN_FEATURES) -> list[torch.Tensor]:
    return [torch.rand(batch, in_features)]


def get_init_inputs(in_features: int = IN_FEATURES, out_features: int = OUT_FEATURES) -> list[int]:
    return [in_features, out_features]


def solution(points: torch.Tensor) -> torch.Tensor:
    """u [n, 1] at points [n, 2]."""
    t, x = points[:, :1], points[:, 1:]
    return torch.exp(-t) * torch.sin(math.pi * x)


def loss_of(field: Field, points: torch.Tensor) -> torch.Tensor:
    """Mean square of what the equation, the start and the walls leave over, at points [n, 2]."""
    points = points.detach().requires_grad_()
    u = field(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 1].sum(), points, create_graph=True)
    equation = first[:, 0] - second[:, 1] / math.pi**2
    t, x = points.detach().chunk(2, 1)
    start = torch.cat([torch.zeros_like(t), x], 1)
    wall = torch.cat([t, x.round()], 1)
    known = torch.cat([start, wall])
    return equation.square().mean() + (field(known) - solution(known)).square().mean()


def train(field: Field, parameters: list[nn.Parameter], points: int, steps: int) -> list[float]:
    """The losses of so many steps of Adam, each on fresh points, with a rate that decays to zero:
    or the last steps would be a matter of luck."""
    device = parameters[0].device
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        drawn = torch.rand(points, 2, generator=generator).to(device)
        loss = loss_of(field, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main() -> None:
    import fxfuse

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--points", type=int, default=BATCH)
    parser.add_argument("--width", type=int, default=OUT_FEATURES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    wrappers: dict[str, Callable[[nn.Module], Field]] = {
        "eager": lambda model: model,
        "fxfuse": fxfuse.optimize,
        "torch.compile": torch.compile,
    }
    for name, wrap in wrappers.items():
        torch.manual_seed(0)
        model = Model(IN_FEATURES, arguments.width).to(arguments.device)
        field, parameters = wrap(model), list(model.parameters())
        try:
            train(field, parameters, arguments.points, 2)  # warm-up
            start = time.perf_counter()
            loss = train(field, parameters, arguments.points, arguments.steps)[-1]
        except Exception as error:
            print(f"{name:14s}{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        seconds = time.perf_counter() - start
        grid = torch.rand(4096, 2, generator=torch.Generator().manual_seed(2)).to(arguments.device)
        with torch.no_grad():
            error_norm = (field(grid) - solution(grid)).norm() / solution(grid).norm()
        print(f"{name:14s}{seconds:7.2f} s, loss {loss:.2e}, off the solution by {error_norm:.2%}")


if __name__ == "__main__":
    main()
