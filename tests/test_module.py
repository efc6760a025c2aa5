"""The optimised module behaves as the original does, whatever is done to it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfuse.capture import capture
from fxfuse.clone import replace_child, replace_children
from fxfuse.module import FusedModule, build_module


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.rand(4))
        self.note = ["kept"]

    @property
    def width(self) -> int:
        return self.linear.out_features

    def double(self, x):
        return self(x) * 2

    def forward(self, x):
        return F.dropout(F.gelu(self.linear(x)) + self.table, 0.5, self.training)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = nn.Linear(4, 4)

    def forward(self, x, mask=None, *, times: int = 1):
        for _ in range(times):
            x = self.out(self.block(x))
        if mask is not None:
            x = x * mask
        return x


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.blocks = nn.ModuleList([self.block, Block()])
        self.plain = [self.block]

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        for block in self.blocks:
            x = block(x)
        return self.plain[0](x)


class WithHook(nn.Module):
    """Overrides what a state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra = 5

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]

    def __getstate__(self):
        state = self.__dict__.copy()
        state["cache"] = None
        return state

    def forward(self, x):
        return self.linear(x)


def optimise(model: nn.Module) -> nn.Module:
    captured = capture(model)
    built = {r.path: build_module(r.module, r.graph, r.optional) for r in captured.regions}
    return replace_children(captured.root, built)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


X = torch.linspace(-2, 2, 8).reshape(2, 4)


def agree(a: nn.Module, b: nn.Module, *args, **kwargs) -> bool:
    """Equal bits in training (same seed) and in evaluation, whichever mode they are in."""
    for mode in (True, False):
        a.train(mode)
        b.train(mode)
        torch.manual_seed(0)
        left = a(X, *args, **kwargs)
        torch.manual_seed(0)
        if not torch.equal(left, b(X, *args, **kwargs)):
            return False
    return True


@pytest.mark.parametrize("make", [Block, Masked, Branching, WithHook])
def test_untouched_graph_gives_eager_bits(make):
    model = make()
    assert agree(model, optimise(model))


def test_is_an_instance_of_both_classes_with_all_its_members():
    model = nn.Sequential(Block(), nn.Linear(4, 4))
    fused = optimise(model)
    assert isinstance(fused, (nn.Sequential))
    assert isinstance(fused, fx.GraphModule)
    assert isinstance(fused, FusedModule)
    assert len(fused) == 2
    assert fused[1] is list(fused)[1]
    block = optimise(Block().eval())
    assert block.width == 4
    assert block.note == ["kept"]
    assert torch.equal(block.double(X), block(X) * 2)
    assert type(block).__name__ == "Block"


def test_repr_is_the_child_tree():
    model = nn.Sequential(Block(), nn.Linear(4, 4))
    assert repr(optimise(model)) == str(optimise(model)) == repr(model)


def test_state_dict_is_identical():
    model = Branching()
    fused = optimise(model)
    ours, theirs = fused.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in ours)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    fused.load_state_dict({name: torch.zeros_like(t) for name, t in theirs.items()})
    assert model.block.linear.weight.abs().sum() == 0


def test_state_dict_overrides_survive():
    model = WithHook()
    fused = optimise(model)
    assert fused.state_dict()["_extra_state"] == {"extra": 5}
    fused.load_state_dict({**model.state_dict(), "_extra_state": {"extra": 7}})
    assert fused.extra == 7
    assert model.extra == 5


def test_train_does_not_reach_the_original():
    model = Branching()
    fused = optimise(model).eval()
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in fused.modules())


def test_training_flag_of_a_submodule_is_live():
    fused = optimise(nn.Sequential(Block()).eval())
    assert torch.equal(fused(X), fused(X))
    fused[0].train()
    assert not torch.equal(fused(X), fused(X))


def test_dead_code_elimination_and_lint_keep_the_flag():
    fused = optimise(Block())
    fused.graph.eliminate_dead_code()
    fused.graph.lint()
    fused.recompile()
    assert "self.training" in fused.code
    assert "def forward" in fused.print_readable(print_output=False)
    plain = fx.GraphModule(fused, fused.graph)
    assert torch.equal(plain.eval()(X), plain(X))


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("make", [Block, Masked, Branching, lambda: nn.Sequential(Block())])
def test_copies_work(make, copier):
    fused = optimise(make())
    other = copier(fused)
    assert type(other).__mro__[1:] == type(fused).__mro__[1:]
    assert other is not fused
    assert agree(fused, other)
    assert list(other.state_dict()) == list(fused.state_dict())
    if copier is not copy.copy:
        shared = {id(p) for p in fused.parameters()} & {id(p) for p in other.parameters()}
        assert not shared


def test_copies_keep_the_guard_and_node_notes():
    fused = optimise(Masked())
    for other in (copy.deepcopy(fused), pickled(fused), pickled(copy.deepcopy(fused))):
        assert agree(fused, other, torch.rand(4))
        notes = [n.meta for n in other.graph.nodes]
        assert notes == [n.meta for n in fused.graph.nodes]


def test_copies_keep_tied_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for other in (copy.deepcopy(optimise(model)), pickled(optimise(model))):
        assert other[0].weight is other[1].weight


def test_getstate_of_the_original_is_used():
    fused = optimise(WithHook())
    assert pickled(fused).cache is None
    assert torch.equal(pickled(fused)(X), fused(X))


def test_graph_with_overloads_survives_pickling():
    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output([graph.call_function(torch.to, ()) if False else relu, slice(None, 2, None)])
    relu.meta["fxfuse"] = {"group": 1}
    fused = build_module(nn.Identity(), graph)
    other = pickled(fused)
    assert torch.equal(other(X)[0], X.relu())
    assert other(X)[1] == slice(None, 2, None)
    assert list(other.graph.nodes)[1].meta == {"fxfuse": {"group": 1}}


@pytest.mark.parametrize("arguments", [{}, {"mask": None}, {"times": 1}])
def test_calls_the_graph_holds_for_run_the_graph(arguments, monkeypatch):
    fused = optimise(Masked())
    monkeypatch.setattr(FusedModule, "own_forward", None)
    fused(X, **arguments)


@pytest.mark.parametrize("arguments", [{"mask": torch.ones(4) * 3}, {"times": 3}])
def test_other_calls_run_the_original_forward(arguments):
    model = Masked()
    assert agree(model, optimise(model), **arguments)
    assert agree(model, optimise(model), torch.ones(4) * 5)


def test_hooks_run_once_per_call():
    model = nn.Sequential(Block(), nn.Linear(4, 4))
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *a: seen.append("root pre"))
    model.register_forward_hook(lambda *a: seen.append("root"))
    model[0].register_forward_hook(lambda *a: seen.append("block"))
    model[1].register_forward_hook(lambda *a: seen.append("linear"))
    model[0].register_full_backward_hook(lambda *a: seen.append("backward"))
    fused = optimise(model)
    fused(X.clone().requires_grad_()).sum().backward()
    assert seen == ["root pre", "block", "linear", "root", "backward"]


def test_hooks_added_later_run():
    fused = optimise(Block())
    seen: list[int] = []
    handle = fused.register_forward_hook(lambda *a: seen.append(1))
    fused(X)
    handle.remove()
    fused(X)
    assert seen == [1]


def test_gradients_are_eager_gradients():
    model = Block().eval()
    fused = optimise(model)
    model(X).sum().backward()
    eager = model.linear.weight.grad.clone()
    model.zero_grad()
    fused(X).sum().backward()
    assert torch.equal(model.linear.weight.grad, eager)


def test_moving_and_casting_work():
    fused = optimise(Masked()).to(torch.bfloat16)
    assert fused(X.bfloat16()).dtype == torch.bfloat16
    assert fused.float().double()(X.double()).dtype == torch.float64
    fused.requires_grad_(False).share_memory()
    assert not any(p.requires_grad for p in fused.parameters())
    names: list[str] = []
    fused.apply(lambda m: names.append(type(m).__name__))
    assert names[-1] == "Masked"


def test_children_inside_untraceable_parent_are_installed_everywhere():
    fused = optimise(Branching())
    assert type(fused) is Branching
    assert isinstance(fused.block, FusedModule)
    assert fused.block is fused.blocks[0] is fused.plain[0]


def test_replace_child_returns_the_new_root():
    new = nn.Linear(4, 4)
    tree = nn.Sequential(Block(), nn.Linear(4, 4))
    assert replace_child(tree, "1", new) is tree
    assert tree[1] is new
    assert replace_child(tree, "", new) is new


def test_class_of_a_fused_module_makes_ordinary_modules():
    fresh = type(optimise(Block()))()
    assert type(fresh) is Block


def test_graph_module_can_be_optimised():
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    fused = optimise(model)
    assert isinstance(fused, FusedModule)
    assert torch.equal(fused(X), model(X))
    assert torch.equal(pickled(fused)(X), model(X))


def test_init_subclass_of_the_original_is_not_called():
    registry: list[type] = []

    class Registered(nn.Module):
        def __init_subclass__(cls) -> None:
            registry.append(cls)

        def forward(self, x):
            return x + 1

    optimise(Registered())
    assert registry == []


def test_own_setattr_of_the_original_is_not_called_without_state():
    class Strict(nn.Module):
        def __init__(self) -> None:
            self.__dict__["allowed"] = True
            super().__init__()

        def __setattr__(self, name, item):
            assert self.__dict__["allowed"]
            super().__setattr__(name, item)

        def forward(self, x):
            return x + 1

    assert torch.equal(optimise(Strict())(X), X + 1)


class Final(type):
    """A metaclass whose classes cannot be derived from."""

    def __new__(mcs, name, bases, members, **_):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(mcs, name, bases, members)


class Sealed(nn.Module, metaclass=Final):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @property
    def width(self) -> int:
        return 4

    def twice(self, x):
        return self(x) * 2

    def forward(self, x, mask=None):
        x = self.linear(x)
        return x if mask is None else x * mask


def test_class_that_cannot_be_derived_from_is_delegated_to():
    model = Sealed()
    fused = optimise(model)
    assert isinstance(fused, fx.GraphModule)
    assert fused.width == 4
    assert torch.equal(fused.twice(X), model(X) * 2)
    assert agree(model, pickled(fused), torch.ones(4) * 2)
    with pytest.raises(AttributeError):
        _ = fused.nothing
