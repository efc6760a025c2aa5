"""Models in other people's styles, from end to end."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import fxfuse


class PreNormBlock(nn.Module):
    """A pre-LN transformer block with dropout on both residuals."""

    def __init__(self, d=16, heads=4, p=0.1):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.drop, self.heads = nn.Dropout(p), heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + self.drop(self.proj(a))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class SwiGLU(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.gate, self.up = nn.Linear(d, 40, bias=False), nn.Linear(d, 40, bias=False)
        self.down = nn.Linear(40, d, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Mixer(nn.Module):
    def __init__(self, tokens=6, d=16):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.channels = nn.Sequential(nn.Linear(d, 32), nn.GELU(), nn.Linear(32, d))

    def forward(self, x):
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


class Recommender(nn.Module):
    """DLRM: dense features, embeddings, pairwise interactions."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(10, 8) for _ in range(3)])
        self.bottom = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1), persistent=False)

    def forward(self, dense, sparse):
        d = self.bottom(dense)
        rows = torch.stack([d, *(t(sparse[:, i]) for i, t in enumerate(self.tables))], 1)
        dots = torch.bmm(rows, rows.transpose(1, 2))
        return self.top(torch.cat([d, dots[:, self.pairs[0], self.pairs[1]]], 1)).squeeze(-1)


class Conv1D(nn.Module):
    """GPT-2's Linear: weight [K, N], addmm on a flattened view."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class NewGELU(nn.Module):
    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class GPT2MLP(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(4 * d, d), Conv1D(d, 4 * d)
        self.act, self.dropout = NewGELU(), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Physics(nn.Module):
    """A PINN: tanh layers, and a residual of derivatives of the output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 1)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(20, 16), nn.ReLU(True), nn.Linear(16, 8), nn.ReLU(True), nn.Linear(8, 3)
        )
        self.decoder = nn.Sequential(
            nn.Linear(3, 8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(8, 20), nn.Sigmoid()
        )

    def forward(self, x):
        code = self.encoder(x.flatten(1))
        return {"code": code, "out": self.decoder(code).view_as(x)}


class ResMLP(nn.Module):
    """Affine transforms and layer scale instead of norms."""

    def __init__(self, d=16, tokens=6):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.rand(d)), nn.Parameter(torch.rand(d))
        self.gamma1 = nn.Parameter(1e-1 * torch.ones(d))
        self.gamma2 = nn.Parameter(1e-1 * torch.ones(d))
        self.mix = nn.Linear(tokens, tokens)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        h = torch.addcmul(self.beta, self.alpha, x)
        x = x + self.gamma1 * self.mix(h.transpose(1, 2)).transpose(1, 2)
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(12, 8), nn.ELU(), nn.Linear(8, 3))

    def forward(self, x):
        out, _ = self.lstm(x)
        return F.log_softmax(self.head(out[:, -1]), dim=-1)


class Experts(nn.Module):
    """A mixture whose routing is Python control flow."""

    def __init__(self, d=8, n=3):
        super().__init__()
        self.router = nn.Linear(d, n)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(d, 16), nn.SiLU(), nn.Linear(16, d)) for _ in range(n)]
        )

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(-1)
            if rows.numel() > 0:
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return x + out


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.score = nn.Linear(8, 8)

    def forward(self, x, mask):
        h = torch.relu(self.fc(x)) * mask.unsqueeze(-1)
        s = self.score(h) / 2.0
        return s.masked_fill(~mask.bool().unsqueeze(-1), -1e4), h


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embedding(tokens)))) * 0.5


class Positions(nn.Module):
    """Buffers as operands: a table added to each position, a scalar temperature."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(4, 8)
        self.register_buffer("table", torch.randn(6, 8))
        self.register_buffer("temperature", torch.tensor(0.7))

    def forward(self, x):
        return torch.sin(self.inputs(x) + self.table) * self.temperature


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(16, 8) * 0.3), nn.Parameter(torch.randn(16))
        self.w2 = nn.Parameter(torch.randn(16, 4) * 0.3)

    def forward(self, x):
        h = F.softplus(F.linear(x, self.w1, self.b1))
        return F.relu6(h @ self.w2 + 1.0)


class Many(nn.Module):
    """Several inputs, one of them optional; several outputs, one of them an intermediate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, x, y, *, scale=2.0, extra=None):
        left = torch.sigmoid(self.a(x))
        right = self.b(y) * scale
        if extra is not None:
            right = right + extra
        return left, (left * right, {"right": right.abs()})


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Hardswish(), nn.Identity())),
            nn.Sequential(nn.Linear(8, 8), nn.Softsign()),
        )
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        mean, log_std = self.out(self.net(x)).chunk(2, -1)
        return mean, log_std.clamp(-20, 2).exp()


def tokens(*shape):
    return torch.randint(0, 10, shape)


# name: (model, inputs, groups). Inputs are made after a seed is set.
MODELS = {
    "pre-norm block": (PreNormBlock, lambda: (torch.randn(2, 6, 16),), 3),
    "swiglu": (SwiGLU, lambda: (torch.randn(2, 6, 16),), 3),
    "mixer": (Mixer, lambda: (torch.randn(2, 6, 16),), 3),
    "recommender": (Recommender, lambda: (torch.randn(4, 5), tokens(4, 3)), 4),
    "gpt-2 mlp": (GPT2MLP, lambda: (torch.randn(2, 6, 16),), None),
    "physics": (Physics, lambda: (torch.randn(9, 2),), 2),
    "autoencoder": (Autoencoder, lambda: (torch.randn(4, 4, 5),), 4),
    "resmlp": (ResMLP, lambda: (torch.randn(2, 6, 16),), 2),
    "recurrent": (Recurrent, lambda: (torch.randn(3, 5, 8),), 1),
    "experts": (Experts, lambda: (torch.randn(7, 8),), 3),
    "masked": (Masked, lambda: (torch.randn(2, 5, 8), (torch.rand(2, 5) > 0.5).float()), 2),
    "tied": (Tied, lambda: (tokens(2, 5),), 2),
    "positions": (Positions, lambda: (torch.randn(3, 6, 4),), 1),
    "functional": (Functional, lambda: (torch.randn(3, 8),), 2),
    "many": (Many, lambda: (torch.randn(3, 6), torch.randn(3, 5)), 2),
    "nested": (Clipped, lambda: (torch.randn(3, 6),), 2),
}


def made(name):
    torch.manual_seed(0)
    make, inputs, groups = MODELS[name]
    model = make()
    torch.manual_seed(1)
    return model, inputs(), groups


def cast(inputs, dtype):
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_groups(name, dtype):
    model, inputs, groups = made(name)
    model = model.eval().to(dtype)
    result = fxfuse.optimize(model)
    if groups is not None:
        assert len(fxfuse.report(result).groups) == groups, str(fxfuse.report(result))
    inputs = cast(inputs, dtype)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = result(*inputs), model(*inputs)
        torch.testing.assert_close(found, expected, **tolerance)
    for group in fxfuse.report(result).groups:
        assert all(r == "cpu" for r in group.routes), group


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_sgd_moves_the_parameters_as_eager_does(name):
    model, inputs, _ = made(name)
    states = []
    for optimise in (False, True):
        trained = copy.deepcopy(model).train()
        module = fxfuse.optimize(trained) if optimise else trained
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            torch.manual_seed(2)
            optimizer.zero_grad()
            leaves = [t for t in tree_leaves(module(*inputs)) if t.requires_grad]
            sum(t.float().clamp(-100, 100).square().mean() for t in leaves).backward()
            optimizer.step()
        states.append(trained.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_gpt2_conv1d_fuses():
    report = fxfuse.report(fxfuse.optimize(GPT2MLP()))
    assert [g.anchor for g in report.groups] == ["c_fc", "c_proj"]


def test_optional_arguments():
    model, inputs, _ = made("many")
    result = fxfuse.optimize(model)
    for options in ({}, {"scale": 3.0}, {"extra": torch.randn(8)}):
        torch.testing.assert_close(result(*inputs, **options), model(*inputs, **options))


def test_a_physics_residual_has_its_second_derivatives():
    def residual(net, x):
        x = x.clone().requires_grad_()
        u = net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (duxx,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        loss = (du[:, 1] - duxx[:, 0]).square().mean()
        return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    model, (x,), _ = made("physics")
    found, expected = residual(fxfuse.optimize(model), x), residual(model, x)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_residual_dropout_and_gate_patterns_fuse():
    chains = {
        g.anchor: g.chain
        for make in (PreNormBlock, SwiGLU)
        for g in fxfuse.report(fxfuse.optimize(make())).groups
    }
    assert chains["proj"] == chains["fc2"] == ("dropout", "add")
    assert chains["fc1"] == ("gelu",)
    assert {chains["gate"], chains["up"]} == {("silu",), ("mul",)}
    assert chains["down"] == ("add",)


def test_bf16_after_optimising_in_fp32():
    model, inputs, _ = made("pre-norm block")
    result = fxfuse.optimize(model.eval()).to(torch.bfloat16)
    found = fxfuse.verify(result, model, *cast(inputs, torch.bfloat16))
    assert found.ok, str(found)
