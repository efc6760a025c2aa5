"""The report: as data, as JSON, as text; every Linear is in it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        return x + self.down(h) * self.scale


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.a(x)) if x.mean() > 0 else self.b(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.used(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bare, self.both = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = F.relu(F.linear(x, self.fc.weight, self.fc.bias))
        x = x @ self.both.weight.t() * 2
        return F.linear(x, self.bare.weight)


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self[0].register_forward_hook(lambda m, i, o: o + 1)


MODELS = {
    "gated": Gated,
    "choosing": Choosing,
    "unused": Unused,
    "functional": Functional,
    "hooked": Hooked,
    "nested": lambda: nn.Sequential(Gated(), nn.Sequential(Choosing(), Unused())),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "encoder stack": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 2, enable_nested_tensor=False
    ),
    "decoder": lambda: nn.TransformerDecoderLayer(8, 2, 16),
    "lstm": lambda: nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 8)),
    "parametrised": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU()
    ),
    "tied": lambda: (lambda fc: nn.Sequential(fc, nn.ReLU(), fc, nn.Tanh()))(nn.Linear(8, 8)),
    "alone": lambda: nn.Linear(8, 8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_in_a_group_or_a_refusal(name):
    model = MODELS[name]()
    report = fxfuse.report(fxfuse.optimize(model))
    told = {g.anchor for g in report.groups} | {r.name for r in report.refusals}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if linears == {""}:
        assert len(report.refusals) == 1
    else:
        assert linears - told == set()
    assert all(r.reason for r in report.refusals)
    assert str(report)
    json.loads(report.to_json())


def test_a_refusal_says_why():
    def reasons(model):
        return {r.name: r.reason for r in fxfuse.report(fxfuse.optimize(model)).refusals}

    assert "hook" in reasons(Hooked())["0"]
    assert "does not call it" in reasons(Unused())["spare"]
    assert "Choosing 0" in reasons(nn.Sequential(Choosing()))["0.a"]
    assert set(reasons(Functional())) == {"bare"}
    assert "nothing follows it" in reasons(Gated().down)["weight"]


def test_the_data_of_a_group():
    report = fxfuse.report(fxfuse.optimize(Gated(), torch.randn(4, 3, 8)))
    by_name = {g.anchor: g for g in report.groups}
    assert set(by_name) == {"gate", "up", "down"}
    down = by_name["down"]
    assert down.chain == ("mul", "add")
    assert [(o.name, o.kind) for o in down.operands] == [("scale", "row"), ("x", "full")]
    assert (down.shape.m, down.shape.k, down.shape.n) == (12, 16, 8)
    assert down.site.startswith("down (test_report.py:")
    assert down.launches_before == 3
    assert down.gemm
    assert down.stores == 1
    # x 12x16, W 8x16, scale 8, x 12x8 in, 12x8 out; eager: product, mul (3), add (3)
    assert down.shape.bytes_after == 4 * (12 * 16 + 8 * 16 + 8 + 96 + 96)
    assert down.shape.bytes_before == 4 * (12 * 16 + 8 * 16 + 96 + (96 * 2 + 8) + 96 * 3)


def test_totals():
    report = fxfuse.report(fxfuse.optimize(Gated(), torch.randn(4, 8)))
    totals = report.totals
    assert totals["nodes"] == {"before": 7, "after": 3}
    assert totals["launches"]["before"] == 7
    assert totals["launches"]["after"] == 6  # no call yet: two a group, whichever route it takes
    assert totals["bytes"]["before"] > totals["bytes"]["after"] > 0
    assert fxfuse.report(fxfuse.optimize(Gated())).totals["bytes"] == {
        "before": None,
        "after": None,
    }


def test_json_round_trip():
    result = fxfuse.optimize(Gated(), torch.randn(4, 8))
    result(torch.randn(4, 8))
    report = fxfuse.report(result)
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["totals"] == report.totals
    assert data["model"] == "Gated"
    assert len(data["groups"]) == 3
    assert data["groups"][0]["routes"] == list(report.groups[0].routes)
    assert data["shapes_unknown"] is None


def test_routes_are_shown_after_a_call():
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only_here = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.only_here(x))

    result = fxfuse.optimize(Once())
    assert fxfuse.report(result).groups[0].routes == ()
    result(torch.randn(2, 8))
    assert fxfuse.report(result).groups[0].routes == ("cpu",)
    assert "cpu" in str(fxfuse.report(result))
    result.double()(torch.randn(2, 8).double())
    routes = fxfuse.report(result).groups[0].routes
    assert routes == ("cpu", "reference: torch.float64 is computed by torch ops")


def test_the_printed_text():
    model = nn.Sequential(Gated(), nn.Linear(8, 8), nn.Softmax(-1), Choosing())
    text = str(fxfuse.report(fxfuse.optimize(model, torch.randn(4, 8))))
    for part in (
        "Sequential: 3 fused groups, 3 with a GEMM; 3 Linears not fused",
        "Graph before",
        "Graph after",
        "Fused groups",
        "mul -> add",
        "0.scale (row)",
        "4 x 16 -> 8",
        "Not fused",
        "Softmax 2 follows it",
        "Not traced",
        "Totals of the fused groups",
        "kernel launches",
    ):
        assert part in text, f"{part!r} is not in\n{text}"


def test_a_model_without_linears():
    report = fxfuse.report(fxfuse.optimize(nn.Sequential(nn.ReLU())))
    assert report.groups == report.refusals == ()
    assert "0 fused groups" in str(report)
