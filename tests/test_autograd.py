"""Gradients of fused calls: as accurate as eager's, by the kernels, with no more kept in memory."""

from __future__ import annotations

import copy
import functools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_abi import path
from helpers_numerics import doubled, errors, gradients_of, no_worse
from helpers_programs import random_program
from helpers_torch import since
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fxfuse
from fxfuse import accumulate, autograd, backward, cli, recipes, reference
from fxfuse.fused import backwards_taken, fused_linear, routes_taken
from fxfuse.lower import MAX_INSTRUCTIONS
from fxfuse.program import parse
from fxfuse.recipes import Static

ROOT = Path(__file__).parent.parent
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built")
EXAMPLES = [
    "add_relu",
    "swish_clamp_tanh",
    "groupnorm_swish_mul_swish",
    "add_swish_tanh_gelu_hardtanh",
]
SHAPES = {
    "full": (6, 40, 96),
    "row": (96,),
    "column": (6, 40, 1),
    "scalar": (),
    "one": (1,),
    "periodic": (40, 96),
    "repeated": (6, 1, 96),
    "period of columns": (40, 1),
}
CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
TWO = "t1 = tanh acc; t2 = mul t1, $0; t3 = gelu t2; store t3, t1"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def example(name: str, device: str, dtype: torch.dtype, k: int = 64, n: int = 256) -> Any:
    """A model of examples/, and an input that requires a gradient."""
    module = cli.load_file(ROOT / "examples" / f"{name}.py")
    torch.manual_seed(0)
    arguments = module.get_init_inputs(k, n)
    arguments[2:] = [8] * len(arguments[2:])
    model = module.Model(*arguments).to(device, dtype)
    (x,) = module.get_inputs(48, k)
    return model, (x - 0.5).to(device, dtype).requires_grad_()


# The four models ---------------------------------------------------------------------------------


def trained(model: nn.Module, x: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of the input and of every parameter after one backward."""
    model.zero_grad()
    given = x.detach().clone().requires_grad_()
    out = model(given)
    out.backward(seed.to(out))
    return [given.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item]


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_of_the_examples_are_as_accurate_as_eagers(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model, x = example(name, device, dtype)
    optimized = fxfuse.optimize(model)
    seed = randn(48, 256, seed=1).to(device, dtype)
    truth = trained(copy.deepcopy(model).double(), x.double(), seed)
    no_worse(trained(optimized, x, seed), trained(model, x, seed), truth)
    for group in fxfuse.report(optimized).groups:
        assert group.backward
        assert not any("reference" in b for b in group.backward)


KEEPS = {
    "add_relu": "keeps its output",
    "swish_clamp_tanh": "keeps z",
    "groupnorm_swish_mul_swish": "keeps z",
    "add_swish_tanh_gelu_hardtanh": "keeps z",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_report_says_what_the_forward_keeps(name: str) -> None:
    recipes.forget()
    model, x = example(name, "cpu", torch.float32)
    optimized = fxfuse.optimize(model)
    (group,) = fxfuse.report(optimized).groups
    assert group.backward == ()
    optimized(x).sum().backward()
    assert group.backward == (KEEPS[name],)
    assert KEEPS[name] in str(fxfuse.report(optimized))
    assert fxfuse.report(optimized).to_dict()["groups"][0]["backward"] == [KEEPS[name]]


def kept_bytes(function: Callable[[], Any], ours: Sequence[torch.Tensor] = ()) -> int:
    """Bytes autograd keeps for the backward of a call, beside the tensors the caller has."""
    held = {t.untyped_storage().data_ptr() for t in ours}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function()
    del outputs
    return sum(size for where, size in kept.items() if where not in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_keep_no_more_than_eager(name: str, dtype: torch.dtype, device: str) -> None:
    model, x = example(name, device, dtype)
    optimized = fxfuse.optimize(model)
    ours = [x, *model.parameters()]
    assert kept_bytes(lambda: optimized(x), ours) <= kept_bytes(lambda: model(x), ours)


# Programs and operands ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_gradient_of_every_operand_kind(kind: str, dtype: torch.dtype, device: str) -> None:
    shapes = [(6, 40, 32), (96, 32), (96,), SHAPES[kind], (96,)]
    tensors = [
        (randn(*s, seed=i) / (6 if i == 1 else 1)).to(device, dtype).requires_grad_()
        for i, s in enumerate(shapes)
    ]
    seeds = [randn(6, 40, 96, seed=9).to(device, dtype)]
    eager = lambda x, w, b, *o: reference.run(parse(CHAIN), F.linear(x, w, b), o)  # noqa: E731
    fused = lambda *t: fused_linear(*t[:3], list(t[3:]), CHAIN, site=kind)  # noqa: E731
    truth = gradients_of(eager, doubled(tensors), seeds)
    no_worse(gradients_of(fused, tensors, seeds), gradients_of(eager, tensors, seeds), truth)
    assert backwards_taken(kind, CHAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wider_operand_keeps_its_dtype(dtype: torch.dtype, device: str) -> None:
    x, weight = (randn(*s, seed=3).to(device, dtype).requires_grad_() for s in ((20, 8), (16, 8)))
    scale = randn(16, seed=4).to(device, torch.float32).requires_grad_()
    text = "t1 = mul acc, $0; t2 = silu t1; store t2"
    eager = lambda x, w, s: F.silu(F.linear(x, w) * s)  # noqa: E731
    fused = lambda x, w, s: fused_linear(x, w, None, [s], text)  # noqa: E731
    tensors, seeds = [x, weight, scale], [randn(20, 16, seed=5).to(device)]
    truth = gradients_of(eager, doubled(tensors), seeds)
    no_worse(gradients_of(fused, tensors, seeds), gradients_of(eager, tensors, seeds), truth)


SEEDS = {
    "expanded number": lambda s: s.sum().expand(s.shape),
    "expanded row": lambda s: s[0].expand(s.shape),
    "expanded column": lambda s: s[:, :1].expand(s.shape),
    "transposed": lambda s: s.t().contiguous().t(),
    "sliced": lambda s: torch.cat([s, s], 1)[:, : s.shape[1]],
}


@pytest.mark.parametrize("text", [CHAIN, "t1 = add acc, $0; t2 = mul t1, $1; store t2"])
@pytest.mark.parametrize("layout", SEEDS)
def test_incoming_gradient_of_any_layout(layout: str, text: str, device: str) -> None:
    shapes = [(33, 8), (17, 8), (17,), (17,), (33, 1)]
    tensors = [randn(*s, seed=i).float().to(device).requires_grad_() for i, s in enumerate(shapes)]
    seed = SEEDS[layout](randn(33, 17, seed=8).float().to(device))
    eager = lambda x, w, b, *o: reference.run(parse(text), F.linear(x, w, b), o)  # noqa: E731
    fused = lambda *t: fused_linear(*t[:3], list(t[3:]), text)  # noqa: E731
    outputs = [f(*tensors) for f in (fused, lambda *t: eager(*t)[0])]
    found = [torch.autograd.grad(o, tensors, seed) for o in outputs]
    truth = torch.autograd.grad(eager(*(wide := doubled(tensors)))[0], wide, seed.double())
    no_worse(*found, truth)


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_random_programs_have_eagers_gradients(first: int, device: str) -> None:
    served = tried = 0
    for seed in range(first, first + 40):
        program = random_program(random.Random(seed))
        wide = (replace(i, op="copy") if i.op == "cast_f32" else i for i in program.instructions)
        program = replace(program, instructions=tuple(wide))  # torch's lerp takes no mixture
        shapes = [(24, 64), (64,), (24, 1), ()]
        tensors = [
            (randn(*s, seed=seed + i) * 0.7).float().to(device).requires_grad_()
            for i, s in enumerate(shapes)
        ]
        used = program.operand_count
        weight = torch.eye(64, device=device)
        eager = lambda z, *o, p=program, n=used: reference.run(p, z * 1.0, o[:n])  # noqa: E731
        call = functools.partial(fused_linear, weight=weight, bias=None, program=str(program))
        fused = lambda z, *o, f=call, n=used: f(z, operands=o[:n], site="drawn")  # noqa: E731
        outputs = eager(*tensors)
        if any(not o.is_floating_point() or o.shape != (24, 64) for o in outputs):
            continue
        if not any(o.requires_grad for o in outputs):
            continue
        seeds = [randn(24, 64, seed=seed + 50 + i) for i in range(len(outputs))]
        truth = gradients_of(eager, doubled(tensors), seeds)
        ours = gradients_of(fused, tensors, seeds)
        theirs = gradients_of(eager, tensors, seeds)
        triples = zip(ours, theirs, truth, strict=True)
        finite = [v for v in triples if v[2] is None or v[2].isfinite().all()]
        for a, b, t in finite:
            # Some take logarithms near zero, where both have their luck.
            no_worse([a], [b], [t], (seed, str(program)), roundings=2)
        ways = backwards_taken("drawn", str(program))
        served += bool(ways) and not any("reference" in w for w in ways)
        tried += 1
    assert served >= 0.8 * tried
    assert tried > 15


# What is asked for -------------------------------------------------------------------------------


class Chain(nn.Module):
    """Linear, GELU, times a parameter, plus the input, tanh."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.gelu(self.linear(x)) * self.scale + x)


def made(device: str = "cpu", width: int = 16) -> tuple[Chain, nn.Module]:
    torch.manual_seed(0)
    model = Chain(width).to(device)
    optimized = fxfuse.optimize(model)
    assert len(fxfuse.report(optimized).groups) == 1
    return model, optimized


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", range(1, 8))
def test_what_needs_no_gradient_is_not_kept_and_gets_none(frozen: int, device: str) -> None:
    model, optimized = made(device)
    x = randn(8, 16, seed=1).float().to(device)
    leaves = [x, model.linear.weight, model.linear.bias, model.scale]
    for bit, leaf in enumerate(leaves):
        leaf.requires_grad_(not frozen >> bit & 1)
    seeds = [randn(8, 16, seed=2).float().to(device)]
    call = lambda f: lambda *_: f(x)  # noqa: E731
    close(*(gradients_of(call(f), leaves, seeds) for f in (optimized, model)))
    assert kept_bytes(lambda: optimized(x), leaves) <= kept_bytes(lambda: model(x), leaves)
    if frozen & 2:  # dW is not asked: x is no factor of anything
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), id):
            fused_linear(x, model.linear.weight, model.linear.bias, [], "t1 = relu acc; store t1")
        assert x.data_ptr() not in kept


@pytest.mark.parametrize("text", [
    "t1 = mul acc, $0; t2 = tanh t1; store t2",
    "t1 = mul acc, $0; store t1",
    "t1 = add acc, $0; t2 = relu t1; store t2",
    "t1 = sigmoid acc; t2 = mul t1, $0; store t2, t1",
])  # fmt: skip
@pytest.mark.parametrize("which", range(4))
def test_only_one_input_needs_a_gradient(which: int, text: str, device: str) -> None:
    tensors = [randn(*s, seed=i).float().to(device) for i, s in enumerate([(9, 8), (12, 8), (12,),
                                                                         (12,)])]  # fmt: skip
    tensors[which].requires_grad_()
    eager = lambda x, w, b, s: reference.run(parse(text), F.linear(x, w, b), [s])  # noqa: E731
    fused = lambda x, w, b, s: fused_linear(x, w, b, [s], text)  # noqa: E731
    seeds = [randn(9, 12, seed=5 + i) for i in range(len(parse(text).outputs))]
    close(*(gradients_of(f, tensors, seeds) for f in (fused, eager)))
    twice = [
        torch.autograd.grad(sum(o.sum() for o in _tuple(f(*tensors))), tensors[which],
                            create_graph=True)[0].square().sum()
        for f in (fused, eager)
    ]  # fmt: skip
    if all(t.requires_grad for t in twice):
        close(*(torch.autograd.grad(t, tensors[which], materialize_grads=True) for t in twice))


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_gradients_that_are_not_asked_for_are_not_computed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimized = made(device)
    x = randn(8, 16).float().to(device).requires_grad_()
    products: list[torch.Size] = []

    def counted(a: torch.Tensor, b: torch.Tensor, **_: Any) -> torch.Tensor:
        products.append(a.shape)
        return torch.mm(a, b)

    monkeypatch.setattr(autograd, "product", counted)
    for wanted, count in (
        ([x], 1),
        ([model.linear.weight], 1),
        ([model.linear.bias], 0),
        ([model.scale], 0),
        ([x, model.linear.weight, model.scale], 2),
    ):
        for create_graph in (False, True):
            products.clear()
            grads = [
                torch.autograd.grad(f(x).sum(), wanted, create_graph=create_graph)
                for f in (optimized, model)
            ]
            close(*grads)
            assert len(products) == count
    products.clear()
    optimized(x).sum().backward(inputs=[model.scale])
    assert not products
    expected = torch.autograd.grad(model(x).sum(), model.scale)[0]
    close(model.scale.grad, expected)


def test_tensors_offloaded_between_the_passes(device: str) -> None:
    model, optimized = made(device)
    x, seed = randn(8, 16).float().to(device), randn(8, 16, seed=1).to(device)
    expected = trained(model, x, seed)
    with torch.autograd.graph.save_on_cpu():
        close(trained(optimized, x, seed), expected)
    model.zero_grad()
    x.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        penalty = [
            torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].square().sum()
            for f in (optimized, model)
        ]
        close(*(torch.autograd.grad(p, [x, *model.parameters()], allow_unused=True)[:2]
                for p in penalty))  # fmt: skip


def test_what_the_chain_kept_is_let_go_before_the_products() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.SiLU())
    optimized = fxfuse.optimize(model)
    out = optimized(randn(8, 16).float().requires_grad_())
    chain = out.grad_fn
    assert chain is not None
    assert chain.saved_tensors[0].shape == (8, 24)  # type: ignore[attr-defined]
    (product,) = (f for f, _ in chain.next_functions if f is not None)

    def is_freed(_: Any) -> None:
        with pytest.raises(RuntimeError, match="after they have already been freed"):
            chain.saved_tensors  # type: ignore[attr-defined]  # noqa: B018
        checked.append(True)

    checked: list[bool] = []
    product.register_prehook(is_freed)
    out.sum().backward()
    assert checked == [True]


def test_tied_weights_and_a_shared_module_add_up(device: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.second(F.silu(self.first(F.gelu(self.first(x))))))

    torch.manual_seed(0)
    model = Tied().to(device)
    optimized = fxfuse.optimize(model)
    assert len(fxfuse.report(optimized).groups) == 3
    x, seed = randn(7, 12).float().to(device), randn(7, 12, seed=1).to(device)
    close(trained(optimized, x, seed), trained(model, x, seed))


def test_gradients_accumulate_over_several_backwards(device: str) -> None:
    model, optimized = made(device)
    x = randn(8, 16).float().to(device)
    (optimized(x).sum() + 0).backward()
    once = [p.grad.clone() for p in model.parameters()]
    optimized(x).sum().backward()
    close([p.grad for p in model.parameters()], [2 * g for g in once])


def test_hooks_on_parameters_and_tensors_run(device: str) -> None:
    model, optimized = made(device)
    x = randn(8, 16).float().to(device).requires_grad_()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in (("eager", model), ("fused", optimized)):
        calls = seen.setdefault(name, [])
        handles = [p.register_hook(lambda g, c=calls: c.append(g.clone())) for p in
                   model.parameters()]  # fmt: skip
        out = module(x)
        handles.append(out.register_hook(lambda g: g * 2))
        out.sum().backward()
        for handle in handles:
            handle.remove()
        calls.append(x.grad.clone())
        model.zero_grad(), setattr(x, "grad", None)
        calls.sort(key=lambda g: (g.shape, g.norm().item()))
    close(seen["fused"], seen["eager"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool, device: str) -> None:
    model, optimized = made(device)
    x, seed = randn(8, 16).float().to(device), randn(8, 16, seed=1).to(device)
    run = lambda t: checkpoint(optimized, t, use_reentrant=reentrant)  # noqa: E731
    run.zero_grad = model.zero_grad  # type: ignore[attr-defined]
    run.parameters = model.parameters  # type: ignore[attr-defined]
    close(trained(run, x, seed), trained(model, x, seed))


def test_output_written_in_place_is_eagers_error_or_eagers_gradient() -> None:
    weight = randn(6, 6).float()
    for op, function in (("relu", F.relu), ("relu6", F.relu6), ("silu", F.silu), ("tanh", F.tanh)):
        found = []
        for call in (
            lambda x, op=op: fused_linear(x, weight, None, [], f"t1 = {op} acc; store t1"),
            lambda x, f=function: f(F.linear(x, weight)),
        ):
            x = randn(5, 6, seed=1).float().requires_grad_()
            out = call(x)
            out.mul_(2)
            try:
                found.append(torch.autograd.grad(out.sum(), x)[0])
            except RuntimeError as error:
                found.append(str(error).partition(":")[0])
        assert isinstance(found[0], torch.Tensor) == isinstance(found[1], torch.Tensor), op
        close(*found) if isinstance(found[0], torch.Tensor) else None


@pytest.mark.parametrize("text", ["t1 = floor acc; store t1", "t1 = gt acc, $0; t2 = where t1, acc,"
                                  " $1; store t2"])  # fmt: skip
def test_what_is_flat_is_zero_or_missing_as_in_eager(text: str) -> None:
    shapes = [(5, 6), (4, 6), (4,), (5, 4)]
    count = parse(text).operand_count
    tensors = [randn(*s, seed=i).float().requires_grad_() for i, s in enumerate(shapes)]
    tensors = tensors[: 2 + count]
    eager = lambda x, w, *o: reference.run(parse(text), F.linear(x, w), o)  # noqa: E731
    fused = lambda x, w, *o: fused_linear(x, w, None, list(o), text)  # noqa: E731
    ours, theirs = (gradients_of(f, tensors, [randn(5, 4)]) for f in (fused, eager))
    assert [g is None for g in ours] == [g is None for g in theirs]
    close([g for g in ours if g is not None], [g for g in theirs if g is not None])


MISHES = MAX_INSTRUCTIONS // 6  # whose gradients take more than six instructions each
REFUSED = "; ".join(
    [
        *(f"t{i + 1} = mish {f't{i}' if i else 'acc'}" for i in range(MISHES)),
        f"t{MISHES + 1} = mul t{MISHES}, $0",
        f"store t{MISHES + 1}",
    ]
)


def test_refused_backward_runs_on_torch_ops_and_says_so(device: str) -> None:
    tensors = [
        randn(*s, seed=i).float().to(device).requires_grad_()
        for i, s in enumerate([(9, 8), (12, 8), (12,)])
    ]
    eager = lambda x, w, s: reference.run(parse(REFUSED), F.linear(x, w), [s])  # noqa: E731
    fused = lambda x, w, s: fused_linear(x, w, None, [s], REFUSED, site="refused")  # noqa: E731
    close(*(gradients_of(f, tensors, [randn(9, 12)]) for f in (fused, eager)))
    (way,) = backwards_taken("refused", REFUSED)
    assert way.startswith("reference: program: ")
    assert way.endswith(f"a kernel holds at most {MAX_INSTRUCTIONS}")


# Views, several outputs --------------------------------------------------------------------------

VIEWED = {
    "last": "t1 = silu acc; t2 = view t1, 0.0; store t2, t1",
    "relu": "t1 = relu acc; t2 = view t1, 0.0; store t2",
    "operand": "t1 = silu acc; t2 = view t1, 0.0; t3 = mul t2, $0; store t3, t1",
}


@pytest.mark.parametrize("name", VIEWED)
def test_gradients_through_views(name: str, device: str) -> None:
    program, views = parse(VIEWED[name]), [[2, 3, 12]]
    tensors = [
        randn(*s, seed=i).float().to(device).requires_grad_()
        for i, s in enumerate([(6, 8), (12, 8), (3, 12)][: 2 + program.operand_count])
    ]
    seeds = [randn(2, 3, 12, seed=7), randn(6, 12, seed=8)][: len(program.outputs)]

    def eager(x: torch.Tensor, w: torch.Tensor, *o: torch.Tensor) -> Any:
        return reference.run(program, F.linear(x, w), o, views=views)

    fused = lambda x, w, *o: fused_linear(  # noqa: E731
        x, w, None, list(o), VIEWED[name], views=views, site="views"
    )
    close(*(gradients_of(f, tensors, seeds) for f in (fused, eager)))

    def given(function: Callable[..., Any], *t: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = function(*t)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        return torch.autograd.grad(first.square().sum(), t, create_graph=True)

    norm = [sum(g.square().sum() for g in given(f, *tensors)) for f in (fused, eager)]
    close(*(torch.autograd.grad(n, tensors) for n in norm), tolerance=1e-4)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("text", [TWO, "t1 = sigmoid acc; t2 = mul t1, $0; store t2, t1"])
def test_any_of_two_outputs_may_be_used(used: tuple[int, ...], text: str, device: str) -> None:
    tensors = [
        randn(*s, seed=i).float().to(device).requires_grad_()
        for i, s in enumerate([(9, 8), (12, 8), (12,), (9, 12)])
    ]
    eager = lambda x, w, b, o: reference.run(parse(text), F.linear(x, w, b), [o])  # noqa: E731
    fused = lambda x, w, b, o: fused_linear(x, w, b, [o], text)  # noqa: E731
    pick = lambda f: lambda *t: tuple(f(*t)[i] for i in used)  # noqa: E731
    seeds = [randn(9, 12, seed=6 + i) for i in used]
    ours, theirs = (gradients_of(pick(f), tensors, seeds) for f in (fused, eager))
    for a, b in zip(ours, theirs, strict=True):
        close(torch.zeros_like(b) if a is None else a, b) if b is not None else None


# Gradients of gradients --------------------------------------------------------------------------

SMOOTH = {
    "chain": CHAIN,
    "gelu": "t1 = add acc, $0; t2 = gelu t1; t3 = mul t2, $1; store t3",
    "tanh": "t1 = tanh acc; t2 = mul t1, $0; t3 = add t2, $1; store t3",
    "swish clamp tanh": "t1 = silu acc; t2 = mul t1, 0.5; t3 = clamp t2, -1.0, 1.0; t4 = tanh t3;"
    " t5 = mul t4, $0; t6 = add t5, $1; store t6",
    "two outputs": "t1 = sin acc; t2 = mul t1, $0; t3 = silu t2; t4 = add t3, $1; store t4, t1",
    "scale": "t1 = mul acc, $0; t2 = add t1, $1; store t2",
}


def penalised(function: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Gradients of the squared norm of gradients: every second derivative is in them."""
    outputs = function(*tensors)
    total = sum((o.square().sum() for o in outputs), torch.zeros((), device=tensors[0].device))
    first = torch.autograd.grad(total, tensors, create_graph=True)
    norm = sum((g.square().sum() for g in first), torch.zeros((), device=tensors[0].device))
    return [*first, *torch.autograd.grad(norm, tensors)]


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_on_the_kernels_are_as_accurate_as_eagers(
    name: str, device: str
) -> None:
    text = SMOOTH[name]
    shapes = [(24, 16), (32, 16), (32,), (32,), (24, 32)]
    tensors = [
        (randn(*s, seed=i) * 0.5).float().to(device).requires_grad_() for i, s in enumerate(shapes)
    ]
    eager = lambda x, w, b, *o: reference.run(parse(text), F.linear(x, w, b), o)  # noqa: E731

    def fused(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = fused_linear(*t[:3], list(t[3:]), text, site=name)
        return found if isinstance(found, tuple) else (found,)

    truth = penalised(eager, doubled(tensors))
    for ours, theirs, exact in zip(
        penalised(fused, tensors), penalised(eager, tensors), truth, strict=True
    ):
        of_ours, of_eager, size = errors(ours, theirs, exact)
        assert of_ours <= 1.5 * of_eager + 2e-7 * size, (of_ours, of_eager, size)
    assert not any("reference" in b for b in backwards_taken(name, text))


@pytest.mark.parametrize("kind", ["full", "row", "column", "scalar", "periodic", "repeated"])
def test_derivatives_in_float64_by_differences(kind: str) -> None:
    shapes = {"full": (2, 2, 3), "row": (3,), "column": (2, 2, 1), "scalar": ()}
    shapes |= {"periodic": (2, 3), "repeated": (2, 1, 3)}
    sizes = [(2, 2, 2), (3, 2), (3,), shapes[kind], (3,)]
    tensors = [randn(*s, seed=i).requires_grad_() for i, s in enumerate(sizes)]
    call = lambda *t: fused_linear(*t[:3], list(t[3:]), CHAIN)  # noqa: E731
    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)


def test_third_derivative_on_the_kernels(device: str) -> None:
    model, optimized = made(device)
    x = randn(5, 16).float().to(device).requires_grad_()
    ours, theirs = optimized(x).sum(), model(x).sum()
    for _ in range(3):
        (ours,) = torch.autograd.grad(ours.square().sum(), x, create_graph=True)
        (theirs,) = torch.autograd.grad(theirs.square().sum(), x, create_graph=True)
        close(ours, theirs, 1e-3)


def test_backward_after_a_gradient_penalty(device: str) -> None:
    model, optimized = made(device)
    grads = []
    for module in (model, optimized):
        model.zero_grad()
        x = randn(5, 16).float().to(device).requires_grad_()
        out = module(x)
        (gx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.square().mean() + gx.square().sum()).backward()
        grads.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    close(*grads, tolerance=1e-4)


def test_physics_informed_network_trains_as_in_eager_where_compile_refuses(device: str) -> None:
    pinn = cli.load_file(ROOT / "examples" / "training" / "pinn.py")
    curves = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = pinn.Model(2, 32).to(device)
        field = fxfuse.optimize(model) if fuse else model
        curves.append(pinn.train(field, list(model.parameters()), 256, 60))
    assert len(fxfuse.report(field).groups) == pinn.LAYERS
    assert all(g.backward == ("keeps z",) for g in fxfuse.report(field).groups)
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        pinn.train(compiled, list(model.parameters()), 256, 1)


# Modes and transforms ----------------------------------------------------------------------------


def test_functional_transforms_do_not_raise_and_are_eagers(device: str) -> None:
    model, optimized = made(device)
    x, v = (randn(4, 16, seed=i).float().to(device) for i in range(2))
    parameters = dict(model.named_parameters())

    def loss(module: nn.Module, parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    def everything(module: nn.Module) -> list[Any]:
        per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, None, 0))
        return [
            *torch.func.grad(loss, argnums=1)(module, parameters, x).values(),
            *per_sample(module, parameters, x).values(),
            *torch.func.jvp(module, (x,), (v,)),
            torch.func.vjp(module, x)[1](v)[0],
            torch.func.jacfwd(module)(x[0]),
            torch.func.hessian(lambda t: module(t).sum())(x[0]),
        ]

    close(everything(optimized), everything(model), 1e-4)


@since(2, 6, "no torch.amp.GradScaler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_as_eager_does(dtype: torch.dtype, device: str) -> None:
    losses = []
    for fuse in (False, True):
        model, optimized = made(device)
        module = optimized if fuse else model
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        x, target = (randn(32, 16, seed=i).float().to(device) for i in range(2))
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = F.mse_loss(module(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_nothing_is_kept_without_gradients(device: str) -> None:
    _, optimized = made(device)
    x = randn(4, 16).float().to(device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = optimized(x)
        assert not out.requires_grad
        assert out.grad_fn is None
    assert kept_bytes(lambda: optimized.requires_grad_(False)(x)) == 0


# Accumulation ------------------------------------------------------------------------------------

SILU = "t1 = silu acc; store t1"


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """The `.grad` that each product of a weight's gradient was told to add to, or None."""
    found: list[torch.Tensor | None] = []

    def spied(*given: Any) -> torch.Tensor | None:
        found.append(accumulate.accumulation_target(*given))
        return found[-1]

    monkeypatch.setattr(autograd, "accumulation_target", spied)
    return found


def both(
    device: str, transposed: bool = False, dtype: torch.dtype = torch.float32, width: int = 24
) -> tuple[torch.Tensor, torch.Tensor, Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """x and weight of a Linear with SiLU, both of which require a gradient, and the call, fused and
    eager."""
    x, weight = (
        randn(s, width, seed=i).to(device, dtype) for i, s in enumerate((width, 2 * width))
    )
    weight = (weight.t().contiguous() if transposed else weight) / width**0.5
    fused = lambda x, w: fused_linear(x, w, None, [], SILU, transposed)  # noqa: E731
    eager = lambda x, w: F.silu(x @ w if transposed else F.linear(x, w))  # noqa: E731
    return x.requires_grad_(), weight.requires_grad_(), fused, eager


def accumulated(
    function: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, times: int
) -> torch.Tensor:
    """weight.grad after so many backwards, with another gradient coming in at each."""
    weight.grad = None
    for seed in range(times):
        out = function(x, weight)
        out.backward(randn(*out.shape, seed=seed).to(out))
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_are_added_by_their_products(
    dtype: torch.dtype, transposed: bool, device: str, targets: list[torch.Tensor | None]
) -> None:
    x, weight, fused, eager = both(device, transposed, dtype, 768 if device == "cuda" else 96)
    grad = accumulated(fused, x, weight, 1)
    assert targets == [None]
    place, version = grad.data_ptr(), grad._version
    for _ in range(2):
        fused(x, weight).sum().backward()
    assert weight.grad is grad
    assert grad.data_ptr() == place
    assert grad._version > version
    assert all(t is grad for t in targets[1:])
    assert len(targets) == 3
    ours = accumulated(fused, x, weight, 3).clone()
    theirs = accumulated(eager, x, weight, 3).clone()
    truth = accumulated(eager, *doubled([x, weight]), 3)
    no_worse([ours], [theirs], [truth])


def test_no_matrix_is_made_for_a_gradient_that_is_added_to(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    x, weight, fused, _ = both(device, width=768)
    x.requires_grad_(False)
    grad = accumulated(fused, x, weight, 1)
    products: list[torch.Tensor] = []

    def spied(*args: Any, **kwargs: Any) -> torch.Tensor:
        products.append(autograd_product(*args, **kwargs))
        return products[-1]

    autograd_product = autograd.product
    monkeypatch.setattr(autograd, "product", spied)
    fused(x, weight).sum().backward()
    assert [p is grad for p in products] == [True]


@pytest.mark.parametrize("other", ["fused", "eager"])
def test_tied_weights_add_to_gradients_that_are_there(
    other: str, device: str, targets: list[torch.Tensor | None]
) -> None:
    x, weight, fused, eager = both(device)
    tied = {"fused": fused, "eager": eager}[other]
    close(*(
        accumulated(lambda x, w, f=f, g=g: f(x, w) + g(x, w) * g(2 * x, w), x, weight, 3).clone()
        for f, g in ((fused, tied), (eager, eager))
    ))  # fmt: skip
    assert sum(t is not None for t in targets) == 2 * len(targets) // 3


def test_hooks_see_the_gradient_of_one_backward(
    device: str, targets: list[torch.Tensor | None]
) -> None:
    x, weight, fused, eager = both(device)
    seen: list[list[torch.Tensor]] = []
    for function in (fused, eager):
        accumulated(function, x, weight, 1)
        calls: list[torch.Tensor] = []
        seen.append(calls)
        handle = weight.register_hook(lambda g, c=calls: c.append(g.clone()))
        function(x, weight).sum().backward()
        handle.remove()
        handle = weight.register_post_accumulate_grad_hook(
            lambda p, c=calls: c.append(p.grad.clone())
        )
        function(x, weight).sum().backward()
        handle.remove()
    assert [len(calls) for calls in seen] == [2, 2]
    close(*seen)
    assert targets == [None] * 3
    fused(x, weight).sum().backward()
    assert targets[3] is weight.grad


def test_gradients_that_are_asked_for_are_returned_and_not_added(device: str) -> None:
    x, weight, fused, eager = both(device)
    grad = accumulated(fused, x, weight, 1)
    before = grad.clone()
    found = [torch.autograd.grad(f(x, weight).sum(), weight)[0] for f in (fused, eager)]
    close(*found)
    assert found[0] is not grad
    fused(x, weight).sum().backward(inputs=[x])
    assert torch.equal(grad, before)
    fused(x, weight).sum().backward(inputs=[weight])
    close(weight.grad, before + found[1])
    assert weight.grad is grad


def test_gradients_that_are_recorded_are_not_added_in_place(
    device: str, targets: list[torch.Tensor | None]
) -> None:
    x, weight, fused, eager = both(device)
    found = []
    for function in (fused, eager):
        first = accumulated(function, x, weight, 1)
        before = first.clone()
        function(x, weight).square().mean().backward(create_graph=True)
        assert weight.grad is not first
        assert torch.equal(first, before)
        (second,) = torch.autograd.grad(weight.grad.square().sum(), weight)
        found.append([weight.grad.detach(), second])
        function(x, weight).sum().backward()  # onto a gradient that is differentiable
        found[-1].append(weight.grad.detach())
    close(*found, tolerance=1e-4)
    assert not any(t is not None for t in targets)


def test_a_retained_graph_adds_each_time(device: str, targets: list[torch.Tensor | None]) -> None:
    x, weight, fused, eager = both(device)
    found = []
    for function in (fused, eager):
        accumulated(function, x, weight, 1)
        out = function(x, weight).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        found.append(weight.grad.clone())
    close(*found)
    assert [t is not None for t in targets] == [False, True, True]


LAYOUTS = {
    "rows": (lambda g: g.clone(), True),
    "columns": (lambda g: g.t().contiguous().t(), True),
    "part of a buffer": (lambda g: g.new_zeros(3, *g.shape)[1].copy_(g), True),
    "every second column": (lambda g: torch.stack([g, g], 2)[:, :, 0], False),
    "expanded": (lambda g: g[:1].expand(g.shape), False),
    "recorded": (lambda g: g.clone().requires_grad_() * 1, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout_are_added_to(
    layout: str, device: str, targets: list[torch.Tensor | None]
) -> None:
    x, weight, fused, eager = both(device, width=64)
    arrange, taken = LAYOUTS[layout]
    start = randn(*weight.shape, seed=5).to(weight)
    found: list[Any] = []
    for function in (fused, eager):
        weight.grad = arrange(start)
        given = weight.grad
        try:
            function(x, weight).sum().backward()
        except RuntimeError as error:
            found.append(str(error).partition(":")[0])
        else:
            found.append(weight.grad.detach().clone())
            assert weight.grad is given
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        close(*found)
    assert [t is not None for t in targets] == [taken]


def test_what_somebody_could_tell_is_left_to_autograd(
    device: str, targets: list[torch.Tensor | None]
) -> None:
    x, weight, fused, eager = both(device)
    grad = accumulated(fused, x, weight, 1)
    before = grad.clone()
    (once,) = torch.autograd.grad(eager(x, weight).sum(), weight)
    with torch.autograd.detect_anomaly(check_nan=False):
        fused(x, weight).sum().backward()
    fused(x, weight * 1).sum().backward()  # a weight that is no leaf
    out = fused(x, weight).sum()
    weight.requires_grad_(False)
    out.backward()
    close(grad, before + 2 * once)
    assert targets == [None] * 4


def test_a_gradient_that_is_a_factor_is_not_added_to(
    device: str, targets: list[torch.Tensor | None]
) -> None:
    found = []
    for fuse in (True, False):
        x, weight, fused, eager = both(device)
        weight = weight[: x.shape[1]].detach().clone().requires_grad_()
        weight.grad = x.detach()
        (fused if fuse else eager)(x, weight).sum().backward()
        found.append(weight.grad)
    close(*found)
    assert targets == [None]


def test_threads_add_up_on_a_cpu(targets: list[torch.Tensor | None]) -> None:
    x, weight, fused, _ = both("cpu")
    x.requires_grad_(False)
    once = accumulated(fused, x, weight, 1).clone()
    outputs = [fused(x, weight) for _ in range(8)]
    seed = randn(*outputs[0].shape, seed=0).to(x)
    threads = [threading.Thread(target=o.backward, args=(seed,)) for o in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(weight.grad, 9 * once)
    assert targets == [None] * 9


@on_gpu
@pytest.mark.gpu
def test_streams_but_the_default_one_leave_the_addition_to_autograd(
    targets: list[torch.Tensor | None],
) -> None:
    x, weight, fused, _ = both("cuda", width=768)
    once = accumulated(fused, x, weight, 1).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = fused(x, weight)
        out.backward(randn(*out.shape, seed=0).to(out))
    torch.cuda.current_stream().wait_stream(stream)
    close(weight.grad, 2 * once, 1e-4)
    assert targets == [None, None]


@pytest.mark.parametrize("frozen", ["x", "bias", "scale", "none"])
def test_steps_that_accumulate_are_eagers(frozen: str, device: str) -> None:
    model, optimized = made(device)
    leaves = {"x": randn(8, 16, seed=1).float().to(device), "bias": model.linear.bias}
    leaves |= {"scale": model.scale, "weight": model.linear.weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    found = []
    for module in (optimized, model):
        for leaf in leaves.values():
            leaf.grad = None
        for scale in (1.0, 1024.0, 1024.0):  # as a gradient scaler's losses are
            (module(leaves["x"]).square().mean() * scale).backward()
        found.append([leaf.grad for leaf in leaves.values() if leaf.requires_grad])
    close(*found, tolerance=1e-4)


@pytest.mark.parametrize("text", [
    "t1 = add acc, $0; store t1",
    "t1 = add acc, $0; t2 = relu t1; store t2, acc",
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_output_is_written_over_an_operand(text: str, dtype: torch.dtype, device: str) -> None:
    x, weight = (randn(*s, seed=i).to(device, dtype) for i, s in enumerate([(20, 64), (48, 64)]))
    for arrange in (torch.clone, lambda t: t.t().contiguous().t()):
        to = arrange(randn(20, 48, seed=2).to(device, dtype))
        expected = recipes.run(x, weight, None, [to], Static(text))
        version = to._version
        found = recipes.run(x, weight, None, [to], Static(text, in_place=True))
        assert found[0] is to
        assert to._version > version
        close(found, expected)


# What is let go ----------------------------------------------------------------------------------


def products_of(out: torch.Tensor) -> tuple[Any, Any]:
    """The nodes of a fused call: the chain's and the product's."""
    chain: Any = out.grad_fn
    (product,) = (f for f, _ in chain.next_functions if type(f).__name__ == "_ProductBackward")
    return chain, product


@pytest.mark.parametrize(("text", "operand", "alone"), [
    ("t1 = relu acc; store t1", False, True),
    (SILU, False, True),
    ("t1 = mul acc, 2.0; t2 = add t1, $0; store t2", True, True),
    ("t1 = add acc, $0; store t1", False, False),  # dZ is what comes in
    ("t1 = add acc, $0; store t1", True, False),
    ("t1 = add acc, $0; t2 = relu t1; store t2", False, True),
    ("t1 = add acc, $0; t2 = relu t1; store t2", True, False),  # and the operand's gradient
])  # fmt: skip
def test_a_gradient_of_z_that_nobody_shares_is_known(
    text: str, operand: bool, alone: bool, device: str
) -> None:
    x, weight, other = (
        randn(*s, seed=i).float().to(device) for i, s in enumerate([(9, 8), (12, 8), (9, 12)])
    )
    weight.requires_grad_(), other.requires_grad_(operand)
    out = fused_linear(x, weight, None, [other][: parse(text).operand_count], text)
    chain, product = products_of(out)
    noted: list[bool] = []
    product.register_prehook(lambda _: noted.append(chain.link.found.alone))
    for _ in range(2):
        out.backward(torch.ones_like(out), retain_graph=True)
        assert chain.link.found is None
    assert noted == [alone, alone]


def test_a_gradient_of_z_is_let_go_by_the_last_product(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    said: list[str] = []
    autograd_product = autograd.product

    def spied(*args: Any, lets_go: str, **kwargs: Any) -> torch.Tensor:
        said.append(lets_go)
        return autograd_product(*args, lets_go=lets_go, **kwargs)

    monkeypatch.setattr(autograd, "product", spied)
    for transposed, which in ((False, "x"), (True, "weight")):
        x, weight, fused, eager = both(device, transposed)
        fused(x, weight).sum().backward()
        fused(x, weight.detach()).sum().backward()
        fused(x.detach(), weight).sum().backward()
        with torch.autograd.detect_anomaly(check_nan=False):
            fused(x, weight).sum().backward()
        assert said == ["", which, "x", which, "", ""]
        said.clear()
        grads = [x.grad, weight.grad]
        for t in (x, weight):
            t.grad = None
        for _ in range(3):
            eager(x, weight).sum().backward()
        close(grads, [x.grad, weight.grad])


@on_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("precision", ["high", "highest"])
def test_a_backward_peaks_no_higher_than_eagers(precision: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("one plane is Hopper's")
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()).cuda()
    optimized = fxfuse.optimize(model)
    x, seed = (torch.randn(1024, 4096, device="cuda") for _ in range(2))
    x.requires_grad_()

    def peak(module: nn.Module) -> int:
        """The most bytes that the first of two backwards allocates at once."""
        module.zero_grad()
        x.grad = None
        out = module(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.backward(seed, retain_graph=True)
        found = torch.cuda.max_memory_allocated() - before
        out.backward(seed)
        return found

    peaks = [[peak(module) for _ in range(2)][1] for module in (model, optimized)]
    if precision == "high":  # two planes are as large as what they are of
        assert peaks[1] <= 1.01 * peaks[0], peaks
    dz = 2 * seed.double().where(optimized(x) > 0, 0.0)
    truth = [dz @ model[0].weight.double(), dz.t() @ x.double(), dz.sum(0)]
    for ours, exact in zip((x.grad, *(p.grad for p in model.parameters())), truth, strict=True):
        assert (ours - exact).norm() <= (1e-3 if precision == "high" else 1e-6) * exact.norm()


# Training ----------------------------------------------------------------------------------------


def spirals(seed: int = 0, count: int = 768) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of three noisy spirals, and which each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 3
    radius = torch.rand(count, generator=generator) * 0.9 + 0.1
    angle = radius * 5 + label * (2 * torch.pi / 3)
    angle += torch.randn(count, generator=generator) * 0.1
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1) * 2, label


def loss_curve(seed: int, dtype: torch.dtype, fuse: bool, device: str) -> torch.Tensor:
    """Losses of 300 steps of an MLP classifier, averaged over windows of 30."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(
        nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3), nn.Tanh()
    )
    model = model.to(device, dtype)
    if fuse:
        model = fxfuse.optimize(model)
        assert len(fxfuse.report(model).groups) == 3
    points, label = (t.to(device) for t in spirals())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(300):
        batch = torch.arange(step * 64, step * 64 + 64, device=device) % len(points)
        loss = F.cross_entropy(model(points[batch].to(dtype)).float() * 4, label[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses).view(10, 30).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_reaches_eagers_loss_curve(dtype: torch.dtype, device: str) -> None:
    eager = torch.stack([loss_curve(seed, dtype, False, device) for seed in range(5)])
    fused = torch.stack([loss_curve(seed, dtype, True, device) for seed in range(2)])
    assert eager[:, -1].max() < 0.5 * eager[:, 0].min()  # it does learn
    spread = (eager.max(0).values - eager.min(0).values).clamp_min(1e-3)
    assert ((fused - eager[:2]).abs() <= spread).all(), (fused, eager)


# Small steps -------------------------------------------------------------------------------------


def test_a_small_training_step_on_a_cpu_runs_on_torchs_ops(monkeypatch) -> None:
    monkeypatch.setattr(backward, "FEWEST_ON_CPU", 64 * 24)
    recipes.forget()
    text = "t1 = silu acc; t2 = tanh t1; store t2"
    weight, bias = (randn(*s).float().requires_grad_() for s in ((64, 8), (64,)))
    for rows, expected in ((23, "reference"), (24, "cpu")):
        x = randn(rows, 8).float()
        (out,) = [fused_linear(x, weight, bias, [], text, site=f"small {rows}")]
        truth = torch.tanh(F.silu(F.linear(x.double(), weight.double(), bias.double())))
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)
        ours = torch.autograd.grad(out.sum(), (weight, bias))
        for a, b in zip(ours, torch.autograd.grad(truth.sum(), (weight, bias)), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)
        ((route, reason),) = routes_taken(f"small {rows}", text)
        assert route == expected
        assert (reason is not None) == (route == "reference")
    with torch.no_grad():  # without gradients there is nothing to lose
        fused_linear(randn(23, 8).float(), weight, bias, [], text, site="small, no gradient")
    assert routes_taken("small, no gradient", text) == [("cpu", None)]
