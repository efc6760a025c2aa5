"""The fused call under everything torch can do to it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers_torch import since
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxfuse
from fxfuse import fused, recipes
from fxfuse.fused import fused_linear, fused_pointwise

CHAIN = "t1 = add acc, $0; t2 = silu t1; t3 = mul t2, $1; store t3"
TWO = "t1 = tanh acc; t2 = mul t1, $0; store t2, t1"
RELU = "t1 = relu acc; store t1"


def chain(x, weight, bias, a, b):
    return F.silu(F.linear(x, weight, bias) + a) * b


def tensors(dtype=torch.float32, k=5, n=6, lead=(2, 3), kinds=("full", "row"), grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "full": (*lead, n),
        "row": (n,),
        "column": (*lead, 1),
        "scalar": (),
        "one": (1,),
        "periodic": (lead[-1], n),
        "repeated": (lead[0], 1, n),
    }
    sizes = [(*lead, k), (n, k), (n,), *(shapes[kind] for kind in kinds)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]
    return [t.requires_grad_(grad) for t in made]


class Chain(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        h = self.linear(x)
        return torch.tanh(self.dropout(F.gelu(h) * self.scale) + 1.0)


def optimized(p: float = 0.0):
    torch.manual_seed(0)
    model = Chain(p)
    result = fxfuse.optimize(model)
    assert len(fxfuse.report(result).groups) == 1
    return model, result


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Compiling, exporting, tracing -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_the_call_in_one_graph(training, dynamic):
    torch._dynamo.reset()
    model, result = optimized()
    model.train(training), result.train(training)
    compiled = torch.compile(result, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7, 9):
        x = torch.randn(rows, 5)
        same(compiled(x), model(x))
        with torch.no_grad():
            same(compiled(x), model(x))
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(x).sum().backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        same(p.grad, e)


def test_compile_with_an_active_dropout():
    torch._dynamo.reset()
    model, result = optimized(p=0.5)
    x = torch.randn(64, 5)
    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    dropped = compiled(x)
    assert 0.3 < (dropped == torch.tanh(torch.tensor(1.0))).float().mean() < 0.7
    result.eval(), model.eval()
    same(compiled(x), model(x))


def test_compile_records_the_fused_op():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    _, result = optimized()
    with torch.no_grad():
        torch.compile(result.eval(), fullgraph=True, backend=backend)(torch.randn(2, 5))
    targets = [n.target for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert torch.ops.fxfuse.linear in targets or torch.ops.fxfuse.linear.default in targets


def test_compile_under_autocast_equals_eager():
    torch._dynamo.reset()
    model, result = optimized()
    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert found.dtype == expected.dtype
    same(found, expected, 1e-2)


@pytest.mark.parametrize(
    "strict", [pytest.param(False, marks=since(2, 6, "non-strict export is young")), True]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_export_round_trips(strict, dynamic):
    model, result = optimized()
    model.eval(), result.eval()
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
    program = torch.export.export(
        result, (torch.randn(4, 5),), strict=strict, dynamic_shapes=shapes
    )
    x = torch.randn(9 if dynamic else 4, 5)
    same(program.module()(x), model(x))
    assert any("fxfuse.linear" in str(n.target) for n in program.graph.nodes)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_one_call(mode):
    inputs = tensors()
    traced = make_fx(lambda *t: fused_linear(*t[:3], list(t[3:]), CHAIN), tracing_mode=mode)(
        *inputs
    )
    assert sum("fxfuse" in str(n.target) for n in traced.graph.nodes) == 1
    same(traced(*inputs), chain(*inputs))


def test_symbolic_trace_keeps_the_call():
    _, result = optimized()
    traced = torch.fx.Tracer().trace(torch.fx.GraphModule(result, result.graph))
    assert sum(n.target is fused_linear for n in traced.nodes) == 1


def test_jit_trace_gives_the_right_numbers():
    model, result = optimized()
    traced = torch.jit.trace(result.eval(), (torch.randn(4, 5),))
    x = torch.randn(4, 5)
    same(traced(x), model.eval()(x))


@since(2, 6, "no torch.library.opcheck")
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_passes(grad):
    x, weight, bias, *operands = tensors(grad=grad)
    linear = (x, weight, bias, operands, CHAIN, False, [], "")
    torch.library.opcheck(torch.ops.fxfuse.linear.default, linear)
    viewed = (x, [], "t1 = view acc, 0.0; t2 = relu t1; store t2", [2, -1, 5], "")
    torch.library.opcheck(torch.ops.fxfuse.pointwise.default, viewed)
    torch.library.opcheck(
        torch.ops.fxfuse.linear.default, (x, weight, None, operands[:1], TWO, False, [], "")
    )


# Shapes and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["full", "row", "column", "scalar", "one", "periodic", "repeated"])
def test_every_operand_kind_equals_eager_and_meta(dtype, kind):
    inputs = tensors(dtype, k=32, n=64, lead=(8, 16), kinds=(kind, "row"))
    found = fused_linear(*inputs[:3], inputs[3:], CHAIN)
    truth = chain(*(t.double() for t in inputs))
    eager = chain(*inputs)
    assert found.dtype == eager.dtype
    assert (found.double() - truth).norm() <= 1.05 * (eager.double() - truth).norm() + 1e-6
    on_meta = [t.to("meta") for t in inputs]
    meta = fused_linear(*on_meta[:3], on_meta[3:], CHAIN)
    assert (meta.shape, meta.dtype, meta.device.type) == (found.shape, found.dtype, "meta")


def test_a_meta_call_shares_nothing_with_a_cpu_call():
    inputs = tensors()
    expected = fused_linear(*inputs[:3], inputs[3:], CHAIN)
    assert fused_linear(
        *(t.to("meta") for t in inputs[:3]), [t.to("meta") for t in inputs[3:]], CHAIN
    ).is_meta
    assert torch.equal(fused_linear(*inputs[:3], inputs[3:], CHAIN), expected)
    with pytest.raises((RuntimeError, NotImplementedError)):
        fused_linear(*inputs[:3], [inputs[3].to("meta"), inputs[4]], CHAIN).sum().item()


def test_fake_tensors_have_the_real_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = tensors()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in inputs]
        out = fused_linear(*fake[:3], fake[3:], CHAIN)
    assert out.shape == (2, 3, 6)
    assert type(out).__name__ == "FakeTensor"


@pytest.mark.parametrize("operand", [torch.float32, torch.float64, torch.bool, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixed_dtypes_promote_as_eager_does(dtype, operand):
    x, weight, bias, a, b = tensors(dtype)
    a = (a > 0) if operand == torch.bool else a.to(operand)
    found, expected = fused_linear(x, weight, bias, [a, b], CHAIN), chain(x, weight, bias, a, b)
    assert found.dtype == expected.dtype
    same(found, expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)
    scalar = torch.tensor(0.5, dtype=torch.float64)
    assert fused_linear(x, weight, bias, [scalar, b], CHAIN).dtype == dtype


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset": lambda t: torch.cat([t.flatten(), t.flatten()])[1 : t.numel() + 1].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "weight", "operand"])
def test_any_layout_is_right(layout, which):
    inputs = tensors()
    index = {"x": 0, "weight": 1, "operand": 3}[which]
    inputs[index] = LAYOUTS[layout](inputs[index])
    same(fused_linear(*inputs[:3], inputs[3:], CHAIN), chain(*inputs))
    x = inputs[index]
    same(fused_pointwise(x, [], RELU), torch.relu(x))


def test_expanded_row_operand_of_stride_zero_is_right():
    x, weight, bias, *_ = tensors()
    a, b = torch.randn(2, 1, 1).expand(2, 3, 6), torch.randn(1).expand(6)
    same(fused_linear(x, weight, bias, [a, b], CHAIN), chain(x, weight, bias, a, b))


@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_no_rows(lead, grad):
    x, weight, bias, a, b = tensors(grad=grad, lead=lead or (2,))
    out = fused_linear(x, weight, bias, [a, b], CHAIN)
    assert out.shape == (*lead, 6)
    if grad:
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert not weight.grad.any()


@pytest.mark.parametrize(("k", "n"), [(0, 6), (5, 0), (0, 0), (1, 1)])
def test_no_columns_or_no_depth(k, n):
    inputs = tensors(k=k, n=n)
    same(fused_linear(*inputs[:3], inputs[3:], CHAIN), chain(*inputs))


def test_one_dimension():
    _, weight, bias, _, b = tensors()
    x, a = torch.randn(5), torch.randn(6)
    same(fused_linear(x, weight, bias, [a, b], CHAIN), chain(x, weight, bias, a, b))
    x.requires_grad_()
    fused_linear(x, weight, bias, [a, b], CHAIN).sum().backward()
    assert x.grad.shape == (5,)


def test_a_zero_dimensional_operand_is_read_at_each_call():
    x, weight, bias, *_ = tensors()
    scalar = torch.tensor(2.0)
    before = fused_linear(x, weight, bias, [scalar, scalar], CHAIN)
    scalar.fill_(-1.0)
    after = fused_linear(x, weight, bias, [scalar, scalar], CHAIN)
    same(after, chain(x, weight, bias, scalar, scalar))
    assert not torch.equal(before, after)


def test_an_operand_may_widen_the_result():
    x, weight, bias, _, b = tensors()
    a = torch.randn(4, 2, 3, 6)
    same(fused_linear(x, weight, bias, [a, b], CHAIN), chain(x, weight, bias, a, b))


def test_a_pending_negation_is_seen():
    z = torch.randn(2, 6, dtype=torch.complex64).conj()
    x = z.imag
    assert x.is_neg()
    same(fused_pointwise(x, [], RELU), torch.relu(x))
    same(fused_pointwise(x.resolve_neg(), [], RELU), torch.relu(x))
    add = "t1 = add acc, $0; store t1"
    same(fused_pointwise(torch.ones(2, 6), [x], add), x + 1)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_weights_are_left_to_torch():
    x = torch.randn(3, 6)
    weight = torch.eye(6).to_sparse_csr()
    same(fused_linear(x, weight, None, [], RELU), torch.relu(x))


def test_outputs_never_share_memory_with_inputs():
    x = torch.randn(4, 6, dtype=torch.float64)
    for program in ("t1 = view acc, 0.0; store t1", "t1 = copy acc; store t1"):
        out = fused_pointwise(x, [], program, views=[[2, 2, 6]])
        out.zero_()
        assert x.any()


def test_two_outputs():
    x, weight, bias, a, _ = tensors()
    scaled, plain = fused_linear(x, weight, bias, [a], TWO)
    same(plain, torch.tanh(F.linear(x, weight, bias)))
    same(scaled, plain * a)


def test_transposed_weight():
    x, weight, bias, a, b = tensors()
    found = fused_linear(x, weight.t().contiguous(), bias, [a, b], CHAIN, True)
    same(found, chain(x, weight, bias, a, b))
    same(fused_linear(x, weight.t(), None, [a, b], CHAIN, True), chain(x, weight, None, a, b))


def test_mismatched_weight_raises_as_torch_does():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fused_linear(torch.randn(2, 4), torch.randn(6, 5), None, [], RELU)


# Gradients ---------------------------------------------------------------------------------------

KINDS = ["full", "row", "column", "scalar", "one", "periodic", "repeated"]


def gradients(function, inputs, seed):
    outputs = function(*inputs)
    return torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_eager(kind, dtype):
    inputs = tensors(dtype, kinds=(kind, "row"), grad=True)
    seed = torch.randn(2, 3, 6).to(dtype)
    call = lambda *t: fused_linear(*t[:3], list(t[3:]), CHAIN)  # noqa: E731
    for a, b in zip(gradients(call, inputs, seed), gradients(chain, inputs, seed), strict=True):
        assert a.dtype == b.dtype
        same(a, b, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_by_differences(kind):
    inputs = tensors(torch.float64, k=2, n=3, lead=(2, 2), kinds=(kind, "row"), grad=True)
    call = lambda *t: fused_linear(*t[:3], list(t[3:]), CHAIN)  # noqa: E731
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_the_same_tensor_as_input_weight_and_operand():
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    program = "t1 = tanh acc; t2 = add t1, $0; t3 = mul t2, $1; store t3"
    found = fused_linear(x, x, None, [x, x], program)
    expected = (torch.tanh(x @ x.t()) + x) * x
    same(found, expected)
    same(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("which", range(5))
def test_a_subset_requires_gradients(which):
    inputs = tensors()
    inputs[which].requires_grad_()
    out = fused_linear(*inputs[:3], inputs[3:], CHAIN)
    assert out.requires_grad
    expected = torch.autograd.grad(chain(*inputs).sum(), inputs[which])
    same(torch.autograd.grad(out.sum(), inputs[which]), expected)


def test_only_one_of_two_outputs_is_used():
    x, weight, bias, a = tensors(kinds=("full",), grad=True)
    scaled, plain = fused_linear(x, weight, bias, [a], TWO)
    grads = torch.autograd.grad(plain.sum(), [x, a], allow_unused=True)
    same(grads[0], torch.autograd.grad(torch.tanh(F.linear(x, weight, bias)).sum(), x)[0])
    assert grads[1] is None or not grads[1].any()
    assert scaled.requires_grad


def test_backward_twice_with_retain_graph():
    inputs = tensors(grad=True)
    out = fused_linear(*inputs[:3], inputs[3:], CHAIN).sum()
    out.backward(retain_graph=True)
    first = inputs[1].grad.clone()
    out.backward()
    same(inputs[1].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_gradient_penalty_equals_eager():
    def penalty(function, inputs):
        out = function(*inputs)
        (gx,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(gx.square().sum(), inputs[1:])

    inputs = tensors(torch.float64, grad=True)
    call = lambda *t: fused_linear(*t[:3], list(t[3:]), CHAIN)  # noqa: E731
    same(penalty(call, inputs), penalty(chain, inputs), 1e-10)


def test_a_weight_changed_before_backward_is_an_error_as_in_eager():
    inputs = tensors(grad=True)
    out = fused_linear(*inputs[:3], inputs[3:], CHAIN)
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_under_autocast_keeps_the_forward_dtype():
    inputs = tensors(grad=True)
    expected = torch.autograd.grad(chain(*inputs).sum(), inputs)
    out = fused_linear(*inputs[:3], inputs[3:], CHAIN).sum()
    with torch.autocast("cpu", torch.bfloat16):
        same(torch.autograd.grad(out, inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, result = optimized(p=0.5)
    x = torch.randn(4, 5, requires_grad=True)
    grads = []
    for module in (model, result):
        torch.manual_seed(3)
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad(), setattr(x, "grad", None)
    same(*grads)


def test_dropout_draws_what_eager_draws():
    model, result = optimized(p=0.5)
    x = torch.randn(16, 5)
    outputs = []
    for module in (model, result):
        torch.manual_seed(3)
        outputs.append(module(x))
    same(*outputs)
    routes = fxfuse.report(result).groups[0].routes
    assert any("dropout is active" in route for route in routes)


# Transforms and modes ----------------------------------------------------------------------------


def test_func_grad_vmap_and_jvp():
    model, result = optimized()
    parameters = dict(model.named_parameters())
    x, v = torch.randn(4, 5), torch.randn(4, 5)

    def loss(module, parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    for module in (model, result):
        module.eval()
    grads = [torch.func.grad(loss, argnums=1)(m, parameters, x) for m in (model, result)]
    same(*grads)
    per_sample = [
        torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, None, 0))(m, parameters, x)
        for m in (model, result)
    ]
    same(*per_sample)
    same(*(torch.func.jvp(m, (x,), (v,)) for m in (model, result)))
    same(*(torch.func.jacrev(m)(x) for m in (model, result)))
    same(*(torch.func.hessian(lambda t, m=m: m(t).sum())(x) for m in (model, result)))


def test_compiled_func_grad():
    torch._dynamo.reset()
    model, result = optimized()
    model.eval(), result.eval()
    x = torch.randn(4, 5)
    found = torch.compile(torch.func.grad(lambda t: result(t).sum()), backend="aot_eager")(x)
    same(found, torch.func.grad(lambda t: model(t).sum())(x))
    batched = torch.compile(torch.func.vmap(lambda t: result(t)), backend="aot_eager")(x)
    same(batched, model(x))


def test_forward_mode_differentiation():
    inputs = tensors(torch.float64)
    tangent = torch.randn_like(inputs[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], tangent)
        outs = [fused_linear(dual, *inputs[1:3], inputs[3:], CHAIN), chain(dual, *inputs[1:])]
        found, expected = (torch.autograd.forward_ad.unpack_dual(o).tangent for o in outs)
    same(found, expected, 1e-12)


def test_functional_call_with_other_parameters():
    model, result = optimized()
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(3, 5)
    same(
        torch.func.functional_call(result, other, (x,)),
        torch.func.functional_call(model, other, (x,)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_eager(dtype):
    model, result = optimized()
    x = torch.randn(8, 5)
    with torch.autocast("cpu", dtype):
        found, expected = result(x), model(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert any("autocast" in route for route in fxfuse.report(result).groups[0].routes)


def test_inference_mode():
    model, result = optimized()
    with torch.inference_mode():
        x = torch.randn(3, 5)
        found = result(x)
        assert found.is_inference()
        same(found, model(x))
    same(result(torch.randn(3, 5)).shape, torch.Size([3, 6]))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_call():
    inputs = tensors()
    with Recorder() as recorder:
        found = fused_linear(*inputs[:3], inputs[3:], CHAIN)
    assert "fxfuse.linear.default" in recorder.names
    same(found, chain(*inputs))


def test_function_modes_see_torch_functions():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    inputs = tensors()
    with Mode():
        found = fused_linear(*inputs[:3], inputs[3:], CHAIN)
    assert F.linear in seen
    same(found, chain(*inputs))


def test_a_default_device_does_not_switch_the_kernels_off():
    recipes.forget()
    x, weight, *_ = tensors()
    with torch.device("cpu"):
        fused_linear(x, weight, None, [], RELU, site="here")
    assert fused.routes_taken("here", RELU) == [("cpu", None)]


def test_subclasses_run_on_torch_ops():
    class Tagged(torch.Tensor):
        pass

    recipes.forget()
    x, weight, *_ = tensors()
    out = fused_linear(x.as_subclass(Tagged), weight, None, [], RELU, site="tagged")
    assert type(out) is Tagged
    assert fused.routes_taken("tagged", RELU) == [("reference", "a tensor is a Tagged")]


# Calls over time ---------------------------------------------------------------------------------


def test_repeated_calls_give_the_same_bits():
    _, result = optimized()
    x = torch.randn(33, 5)
    with torch.no_grad():
        first = result(x)
        assert all(torch.equal(first, result(x)) for _ in range(10))


def test_threads_may_share_a_module():
    model, result = optimized()
    inputs = [torch.randn(rows, 5) for rows in range(1, 33)]
    expected = [model(x) for x in inputs]
    failures = []

    def work(order):
        for i in order:
            if not torch.allclose(result(inputs[i]), expected[i], atol=1e-5):
                failures.append(i)

    threads = [
        threading.Thread(target=work, args=(torch.randperm(32).tolist() * 3,)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_changed_weights_are_seen():
    model, result = optimized()
    x = torch.randn(3, 5)

    def check():
        with torch.no_grad():
            same(result(x), model(x))

    check()
    model.linear.weight.data.mul_(2)
    check()
    with torch.no_grad():
        model.scale.fill_(3.0)
    check()
    model.linear.weight.data = torch.randn(6, 5)
    check()
    result.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    check()
    optimizer = torch.optim.SGD(result.parameters(), lr=0.1)
    result(x).sum().backward()
    optimizer.step()
    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_after_optimize(dtype):
    _model, result = optimized()
    x = torch.randn(3, 5)
    before = result(x)
    found = result.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    same(found.float(), before, 5e-2)


def test_the_batch_size_may_change():
    model, result = optimized()
    for rows in (1, 2, 64, 3, 1):
        x = torch.randn(rows, 5)
        same(result(x), model(x))


def test_the_recipe_cache_is_bounded_and_the_report_survives(monkeypatch):
    recipes.forget()
    monkeypatch.setattr(recipes, "_CACHE_LIMIT", 8)
    weight = torch.randn(6, 5)
    for rows in range(1, 40):
        x = torch.randn(rows, 5)
        same(fused_linear(x, weight, None, [], RELU, site="many"), torch.relu(x @ weight.t()))
        assert len(recipes._recipes) <= 8
    assert fused.routes_taken("many", RELU) == [("cpu", None)]


def test_a_copy_of_the_module_works_alone():
    model, result = optimized()
    other = copy.deepcopy(result)
    with torch.no_grad():
        model.linear.weight.zero_()
    x = torch.randn(3, 5)
    assert not torch.allclose(other(x), model(x))
    same(result(x), model(x))
