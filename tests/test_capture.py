"""Capture: what is traced, what stays a leaf, and why."""

from __future__ import annotations

import collections
import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_torch import since
from torch import fx, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fxfuse.capture import Capture, capture
from fxfuse.clone import clone_tree
from fxfuse.module import build_module


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return F.dropout(F.gelu(self.linear(x)), 0.5, self.training)


class Holder(nn.Module):
    """Calls one module after a Linear, so that the module is not the root."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.first(x)) + 1


def module(forward: Any, **attributes: Any) -> nn.Module:
    """A module with this forward, a Linear `linear` and these attributes."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            for name, item in attributes.items():
                setattr(self, name, item)

    Made.forward = forward
    return Made()


def reasons(captured: Capture) -> dict[str, str]:
    return {leaf.path: leaf.reason for leaf in captured.leaves}


def region_paths(captured: Capture) -> list[str]:
    return [region.path for region in captured.regions]


def targets(graph: fx.Graph, op: str) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == op]


def test_custom_modules_are_traced_through_and_torch_modules_called():
    captured = capture(nn.Sequential(Block(), nn.ReLU(), Block()))
    assert region_paths(captured) == [""]
    assert captured.leaves == ()
    assert targets(captured.regions[0].graph, "call_module") == ["0.linear", "1", "2.linear"]


def test_clone_shares_tensors_and_nothing_else():
    shared = Block()
    model = nn.Sequential(shared, shared, nn.BatchNorm1d(4))
    model.by_name = {"blocks": [shared]}
    clone = clone_tree(model)
    assert clone[0] is clone[1]
    assert clone[0] is not shared
    assert clone.by_name["blocks"][0] is clone[0]
    assert all(a is b for a, b in zip(model.parameters(), clone.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), clone.buffers(), strict=True))
    clone.eval()
    assert model.training
    assert shared.training


@since(2, 6, "no Module.register_load_state_dict_pre_hook")
def test_clone_rebinds_methods_and_state_dict_hooks():
    model = Block()
    model.act = model.forward
    model.register_load_state_dict_pre_hook(lambda m, *_: setattr(m, "loaded", True))
    clone = clone_tree(model)
    assert clone.act.__self__ is clone
    clone.load_state_dict(model.state_dict())
    assert clone.loaded
    assert not hasattr(model, "loaded")


def test_every_node_names_its_source_line_and_module():
    graph = capture(nn.Sequential(Block())).regions[0].graph
    gelu = next(n for n in graph.nodes if n.op == "call_function")
    assert gelu.meta["module_path"] == "0"
    assert gelu.meta["source"].startswith("test_capture.py:")
    assert all(node.meta["source"] for node in graph.nodes)


def test_training_is_a_live_node():
    graph = capture(nn.Sequential(Block())).regions[0].graph
    assert "0.training" in targets(graph, "get_attr")


def test_buffers_and_plain_tensors_are_live_nodes():
    def forward(self, x):
        return x + self.table[:2] + self.plain * next(self.parameters()).to(x.dtype).sum()

    model = module(forward, plain=torch.ones(4))
    model.register_buffer("table", torch.ones(2, 4))
    graph = capture(model).regions[0].graph
    assert set(targets(graph, "get_attr")) >= {"table", "plain"}


def test_tensors_made_in_forward_are_made_at_every_call():
    graph = capture(module(lambda self, x: x + torch.arange(4) + torch.rand(4))).regions[0].graph
    assert torch.arange in targets(graph, "call_function")
    assert torch.rand in targets(graph, "call_function")


def test_math_functions_of_traced_sizes_are_nodes():
    graph = capture(module(lambda self, x: x / math.sqrt(x.size(-1)))).regions[0].graph
    assert math.sqrt in targets(graph, "call_function")
    assert math.sqrt(4.0) == 2.0


def branches_on_value(self, x):
    if x.sum() > 0:
        return x
    return self.linear(x)


def branches_on_training(self, x):
    return self.linear(x) if self.training else x


def swallows(self, x):
    try:
        if x.sum() > 0:
            x = x + 1
    except ValueError:
        pass
    return self.linear(x)


def iterates(self, x):
    return sum(row for row in x)


def measures(self, x):
    return x * len(x)


def converts(self, x):
    return x * int(x.sum())


def writes(self, x):
    self.last = x
    return self.linear(x)


def writes_dict(self, x):
    self.__dict__["last"] = 1
    return self.linear(x)


def appends(self, x):
    self.cache.append(x)
    return self.linear(x)


def assigns(self, x):
    x[0] = 0
    return self.linear(x)


def draws(self, x):
    return self.linear(x) * random.random()


def draws_numpy(self, x):
    return self.linear(x) * float(np.random.rand())


def makes_array(self, x):
    return x + torch.from_numpy(np.ones(4, dtype=np.float32))


def without_grad(self, x):
    with torch.no_grad():
        x = self.linear(x)
    return x + 1


def under_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.linear(x)


def checkpoints(self, x):
    return checkpoint(self.linear, x, use_reentrant=False)


def asks_grad(self, x):
    return self.linear(x) if torch.is_grad_enabled() else x


def asks_type(self, x):
    return self.linear(x) if isinstance(x.sum(), torch.Tensor) else x


def returns_ordered(self, x):
    return collections.OrderedDict(y=self.linear(x))


def stray(self, x):
    return self.hidden[0](x)


REFUSALS = [
    (branches_on_value, "forward branches on a tensor value (test_capture.py:"),
    (branches_on_training, "forward branches on self.training (test_capture.py:"),
    (swallows, "forward branches on a tensor value (test_capture.py:"),
    (iterates, "forward iterates over a traced value (test_capture.py:"),
    (measures, "forward takes len() of a traced value (test_capture.py:"),
    (converts, "forward uses a traced value as a Python number or container (test_capture.py:"),
    (writes, "forward writes the attribute 'last' of a module (test_capture.py:"),
    (writes_dict, "forward changes its attribute 'last'"),
    (appends, "forward changes its attribute 'cache'"),
    (assigns, "forward assigns into a traced value (test_capture.py:"),
    (draws, "forward draws random numbers outside torch's tensor functions"),
    (draws_numpy, "forward draws random numbers outside torch's tensor functions"),
    (makes_array, "forward uses a tensor that is no attribute of a module (test_capture.py:"),
    (without_grad, "forward changes gradient mode, autocast or checkpointing"),
    (under_autocast, "forward changes gradient mode, autocast or checkpointing"),
    (checkpoints, "forward changes gradient mode, autocast or checkpointing"),
    (asks_grad, "forward asks torch.is_grad_enabled() (test_capture.py:"),
    (asks_type, "forward checks the Python type of a traced value (test_capture.py:"),
]


@pytest.mark.parametrize(("forward", "reason"), REFUSALS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("as_root", [True, False])
def test_refusal_is_a_leaf_with_its_reason(forward, reason, as_root):
    inner = module(forward, cache=[])
    model = inner if as_root else Holder(inner)
    before = {m: dict(m.__dict__) for m in model.modules()}
    states = random.getstate(), torch.get_rng_state()
    captured = capture(model)
    path = "" if as_root else "inner"
    assert reasons(captured)[path].startswith(reason)
    assert ("" in region_paths(captured)) != as_root
    assert "inner" not in region_paths(captured)
    assert inner.cache == []
    assert all(m.__dict__ == attributes for m, attributes in before.items())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert "training" not in vars(nn.Module)


def test_failed_submodule_leaves_no_nodes_behind():
    captured = capture(Holder(module(lambda self, x: len(self.linear(x) * self.linear.weight))))
    root = captured.regions[0]
    assert targets(root.graph, "call_module") == ["first", "inner"]
    root.graph.lint()


def test_children_of_an_untraceable_parent_become_regions():
    inner = module(branches_on_value, a=Block(), list=nn.ModuleList([Block(), Block()]))
    captured = capture(Holder(inner))
    assert region_paths(captured) == ["", "inner.a", "inner.list.0", "inner.list.1"]
    assert all(n.meta["module_path"] == "inner.a" for n in captured.regions[1].graph.nodes)


def test_unregistered_module_is_refused():
    reason = reasons(capture(module(stray, hidden=(nn.Linear(4, 4),))))[""]
    assert reason.startswith("forward calls a module that is not a submodule (test_capture.py:")


def test_dict_subclass_that_a_graph_would_flatten_is_refused():
    reason = reasons(capture(module(returns_ordered)))[""]
    assert reason.startswith("forward passes or returns a OrderedDict")


@pytest.mark.parametrize(
    ("register", "reason"),
    [
        (lambda m: m.register_forward_hook(lambda *a: None), "has forward hooks"),
        (lambda m: m.register_forward_pre_hook(lambda *a: None), "has forward pre-hooks"),
        (lambda m: m.register_full_backward_hook(lambda *a: None), "has backward hooks"),
        (lambda m: m.register_full_backward_pre_hook(lambda *a: None), "has backward pre-hooks"),
    ],
)
def test_hooked_modules_are_called_and_captured_inside(register, reason):
    model = nn.Sequential(Block(), nn.Linear(4, 4))
    register(model[0])
    register(model[1])
    captured = capture(model)
    assert reasons(captured) == {"0": reason, "1": reason}
    assert region_paths(captured) == ["", "0"]


def test_global_hooks_keep_every_module_a_call():
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        captured = capture(nn.Sequential(Block()))
    finally:
        handle.remove()
    assert reasons(captured)["0"] == "global module hooks are registered"


def test_parametrised_modules_are_leaves():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4))
    )
    assert reasons(capture(model)) == {"0": "parametrised", "1": "parametrised"}


def test_wrapped_lazy_compiled_and_optimised_modules_are_leaves():
    replaced = Block()
    replaced.forward = lambda x: x
    region = capture(Block()).regions[0]
    model = nn.Sequential(
        torch.jit.script(nn.Sequential(nn.Linear(4, 4))),
        nn.LazyLinear(4),
        nn.DataParallel(Block()),
        replaced,
        build_module(region.module, region.graph),
        torch.compile(Block()),
    )
    assert list(reasons(capture(model)).values()) == [
        "a TorchScript module",
        "lazy, not initialised yet",
        "a distributed wrapper (DataParallel)",
        "forward is replaced on the instance",
        "already optimised",
        "already compiled by torch.compile",
    ]
    assert region_paths(capture(model)) == ["", "2.module"]


def test_attribute_that_fx_needs_is_a_reason():
    assert reasons(capture(module(lambda self, x: x, graph=nn.Linear(4, 4))))[""] == (
        "has an attribute 'graph', a name torch.fx needs"
    )


def masked(self, x, mask=None):
    y = self.linear(x)
    if mask is not None:
        y = y + mask
    return y


def masked_by_child(self, x, mask=None):
    return self.child(x, mask)


def counted(self, x, times: int = 2, scale=1.0, causal: bool = False):
    for _ in range(times):
        x = self.linear(x) * scale
    return x if not causal else -x


def masked_and_needed(self, x, mask):
    return self.linear(x) if mask is None else self.linear(x) + mask


def test_tested_optional_is_held_at_its_default():
    (region,) = capture(module(masked)).regions
    assert region.optional == ("mask",)
    assert targets(region.graph, "placeholder") == ["x", "mask"]


def test_optional_tested_by_a_child_is_held():
    captured = capture(module(masked_by_child, child=module(masked)))
    assert captured.regions[0].optional == ("mask",)
    assert region_paths(captured) == ["", "child"]


def test_optional_that_decides_nothing_is_free():
    def forward(self, x, mask=None):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    assert capture(module(forward)).regions[0].optional == ()


def test_only_optionals_that_decide_something_are_held():
    assert capture(module(counted)).regions[0].optional == ("times", "causal")


def test_required_argument_tested_for_none_is_guarded():
    assert capture(module(masked_and_needed)).regions[0].optional == ("mask",)


def test_known_arguments_of_a_traced_call_need_no_guard():
    def forward(self, x):
        return self.child(x)

    captured = capture(module(forward, child=module(masked)))
    assert region_paths(captured) == [""]
    assert captured.regions[0].optional == ()


def test_none_test_beside_a_call_of_unknown_result_is_refused():
    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=False)
        return y if weights is None else y * 2

    captured = capture(module(forward, attention=nn.MultiheadAttention(4, 1)))
    assert reasons(captured)[""].startswith("forward tests weights for None beside a call")


def test_type_of_an_annotated_tensor_is_known():
    def forward(self, x: torch.Tensor):
        return self.linear(x) if isinstance(x, torch.Tensor) else x

    assert region_paths(capture(module(forward))) == [""]


def test_structured_inputs_and_outputs_are_traced():
    def forward(self, batch, *, flag=1.0):
        a, b = batch["pair"]
        return {"sum": self.linear(a) + b * flag, "list": [a, (b,)]}

    model = module(forward)
    (region,) = capture(model).regions
    batch = {"pair": (torch.ones(4), torch.ones(4))}
    out = build_module(region.module, region.graph, region.optional)(batch, flag=2.0)
    assert torch.equal(out["sum"], model(batch, flag=2.0)["sum"])
    assert type(out["list"]) is list


def test_variadic_and_decorated_forwards_are_refused_or_traced_right():
    def forward(self, x, *rest, scale=1.0):
        return self.linear(x) * scale

    assert "keyword-only arguments after *args" in reasons(capture(module(forward)))[""]
    graded = torch.no_grad()(branches_on_value)
    assert "gradient mode" in reasons(capture(module(graded)))[""]


def test_retrace_is_not_needed_for_failing_submodules(monkeypatch):
    from fxfuse import tracer

    traced = []
    original = tracer.RegionTracer.trace

    def counting(self, root, concrete_args=None):
        traced.append(type(root).__name__)
        return original(self, root, concrete_args)

    monkeypatch.setattr(tracer.RegionTracer, "trace", counting)
    chain: nn.Module = module(branches_on_value)
    for _ in range(10):
        chain = Holder(module(lambda self, x: len(self.child(x)), child=chain))
    captured = capture(chain)
    assert len(traced) == 21
    assert len(captured.regions) == 10


def test_capture_leaves_the_original_deep_copyable_and_equal():
    model = Holder(module(writes))
    twin = copy.deepcopy(model)
    capture(model)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert not hasattr(model.inner, "last")


# pytest rewrites the asserts of this file, so those of the models come from elsewhere.
ASSERTING = """
def asserts(self, x):
    assert x.size(-1) == 4, f"width is {x.size(-1)}"
    y = self.linear(x)
    assert y.dim() == 2
    return y

def asserts_either(self, x):
    assert x.dim() == 2 or x.dim() == 3
    return self.linear(x)
"""


def from_source(name):
    space: dict[str, Any] = {}
    exec(compile(ASSERTING, "model.py", "exec"), space)
    return space[name]


def test_asserts_are_checked_at_every_call():
    (region,) = capture(module(from_source("asserts"))).regions
    fused = build_module(region.module, region.graph)
    fused(torch.ones(2, 4))
    with pytest.raises(AssertionError, match=r"assertion failed \(model.py:"):
        fused(torch.ones(2, 5))
    with pytest.raises(AssertionError):
        fused(torch.ones(4))


def test_assert_of_more_than_one_value_is_a_branch():
    assert reasons(capture(module(from_source("asserts_either"))))[""].startswith(
        "forward branches on a tensor"
    )


def test_custom_autograd_functions_are_refused():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 3

    captured = capture(module(lambda self, x: Double.apply(self.linear(x))))
    assert "gradient mode" in reasons(captured)[""]


def test_in_place_work_on_a_buffer_waits_for_the_call():
    def forward(self, x):
        self.count.add_(1)
        return x * self.count

    model = module(forward)
    model.register_buffer("count", torch.zeros(()))
    (region,) = capture(model).regions
    assert model.count == 0
    build_module(region.module, region.graph)(torch.ones(4))
    assert model.count == 1
