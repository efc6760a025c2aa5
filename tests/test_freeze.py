"""`freeze`: which weights it marks, and that they stay marked whatever is done to the module."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers_torch import TORCH, since
from torch import nn

import fxfuse
from fxfuse import errors, frozen, recipes, routes
from fxfuse.freeze import Weights, count_weights, memory

X = torch.linspace(-2, 2, 8).reshape(2, 4)


def watch(*_):
    """A hook: its module stays a call."""


class Net(nn.Module):
    """Two Linears that fuse, one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
        self.out.register_forward_hook(watch)

    def forward(self, x):
        return F.softmax(self.out(torch.tanh(self.second(F.relu(self.first(x))))), -1)


class Branching(nn.Module):
    """Its forward cannot be traced, those of its children can."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = Net(), nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.other(x)


class Functional(nn.Module):
    """Weights that no Linear holds: a parameter, one stored as [K, N], a buffer, a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4, 4))
        self.c = nn.Parameter(torch.rand(4, 4))
        self.register_buffer("table", torch.rand(4, 4))

    def forward(self, x):
        x = torch.relu(F.linear(x, self.a))
        x = torch.relu(x @ self.b)
        x = torch.relu(x @ self.table.t())
        return torch.relu(F.linear(x, self.c * 2))


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self[2].weight = self[0].weight


MODELS = {
    "net": (Net, {"first.weight", "second.weight"}),
    "branching": (Branching, {"net.first.weight", "net.second.weight", "other.0.weight"}),
    "functional": (Functional, {"a", "b", "table"}),
    "tied": (Tied, {"0.weight", "2.weight"}),
    "nothing fused": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), {"0.weight"}),
}


def marked(module):
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    return {name for name, tensor in tensors if frozen.is_marked(tensor)}


def use(module):
    """Do as kernels do that want the weights in another form; checks that they get it right."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in marked(module):
            product = frozen.prepared(tensor, "doubled", lambda weight: weight * 2)
            assert torch.equal(product, tensor * 2)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_fused_linears_are_frozen(name):
    make, names = MODELS[name]
    model = make()
    module = fxfuse.optimize(model)
    assert marked(module) == set()
    assert fxfuse.freeze(module) is module
    assert marked(module) == names
    assert count_weights(module).frozen == count_weights(module).total
    torch.testing.assert_close(module(X), model(X))
    assert fxfuse.unfreeze(module) is module
    assert marked(module) == set()


@pytest.mark.parametrize("name", MODELS)
def test_optimize_can_freeze(name):
    make, names = MODELS[name]
    model = make()
    module = fxfuse.optimize(model, X, freeze=True)
    assert marked(module) == names
    torch.testing.assert_close(module(X), model(X))


def test_optimize_freezes_what_is_optimised_already():
    module = fxfuse.optimize(Net())
    assert fxfuse.optimize(module, freeze=True) is module
    assert len(marked(module)) == 2
    assert fxfuse.optimize(module) is module
    assert len(marked(module)) == 2


def test_a_model_around_optimised_parts_can_be_frozen():
    model = nn.Sequential(fxfuse.optimize(Net()), nn.Linear(4, 4))
    assert fxfuse.freeze(model) is model
    assert marked(model) == {"0.first.weight", "0.second.weight"}
    assert marked(fxfuse.unfreeze(model)) == set()
    compiled = torch.compile(fxfuse.optimize(Net()))
    assert len(marked(fxfuse.freeze(compiled))) == 2


def test_a_frozen_part_of_another_model_stays_frozen():
    part = fxfuse.optimize(Net(), freeze=True)
    whole = fxfuse.optimize(nn.Sequential(part, nn.Linear(4, 4), nn.GELU()))
    assert marked(whole) == {"0.first.weight", "0.second.weight"}
    del part
    gc.collect()
    assert marked(whole) == {"0.first.weight", "0.second.weight"}
    assert fxfuse.report(whole).weights == Weights(3, 2, 0)
    assert len(marked(fxfuse.freeze(whole))) == 3


def test_memory_is_what_calls_have_made():
    module = fxfuse.optimize(Tied(), freeze=True)
    assert memory(module) == 0
    use(module)
    assert memory(module) == 4 * 4 * 4, "a tied weight has one product"
    fxfuse.unfreeze(module)
    assert memory(module) == 0


def test_freezing_twice_has_everything_made_anew():
    module = fxfuse.freeze(fxfuse.optimize(Net(), freeze=True))
    other = fxfuse.optimize(module.first, freeze=True)
    use(module)
    weight = module.first.weight
    weight.data.add_(1)
    stale = frozen.prepared(weight, "doubled", lambda weight: weight * 2)
    assert not torch.equal(stale, weight * 2)
    fxfuse.freeze(module)
    use(module)
    assert len(marked(module)) == 2
    fxfuse.unfreeze(other)
    assert len(marked(module)) == 2
    fxfuse.unfreeze(fxfuse.unfreeze(module))
    assert marked(module) == set()


def test_a_weight_shared_by_two_frozen_modules_is_frozen_until_the_last_lets_go():
    model = Net()
    a, b = fxfuse.optimize(model, freeze=True), fxfuse.optimize(model, freeze=True)
    use(a)
    assert memory(b) == memory(a) > 0
    fxfuse.unfreeze(a)
    assert memory(b) > 0
    del b
    gc.collect()
    assert marked(a) == marked(model) == set()


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("make", [Net, Branching, Functional])
def test_copies_are_frozen_and_start_with_nothing_kept(make, copier):
    module = fxfuse.optimize(make(), freeze=True)
    use(module)
    kept, names = memory(module), marked(module)
    other = copier(module)
    assert marked(other) == names
    if copier is not copy.copy:
        assert memory(other) == 0
        use(other)
        assert memory(other) == kept
        fxfuse.unfreeze(other)
    if TORCH < (2, 13):
        use(module)  # torch 2.6 makes a storage's Python object anew where it pickles it
    assert memory(module) == kept
    assert marked(module) == names
    other = copier(module)
    del module
    gc.collect()
    assert marked(other) == names
    use(other)
    torch.testing.assert_close(other(X), copy.deepcopy(other)(X))
    other.load_state_dict({k: v + 1 for k, v in other.state_dict().items()}, assign=True)
    assert marked(other) == names


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled])
def test_copies_of_unfrozen_modules_are_not_frozen(copier):
    module = fxfuse.unfreeze(fxfuse.optimize(Net(), freeze=True))
    other = copier(module)
    assert marked(other) == set()
    assert marked(other.double()) == set()
    other.load_state_dict(other.state_dict(), assign=True)
    assert marked(other) == set()


@pytest.fixture(params=["data", "overwrite", "swap"])
def conversion(request):
    """The ways of torch's to give a module's parameters another dtype or device."""
    future = torch.__future__
    setters = {"overwrite": "set_overwrite_module_params_on_conversion"}
    setters["swap"] = "set_swap_module_params_on_conversion"
    setter = getattr(future, setters.get(request.param, ""), lambda value: None)
    if request.param in setters and not hasattr(future, setters[request.param]):
        pytest.skip("this torch has no such setting")
    setter(True)
    yield request.param
    setter(False)


@pytest.mark.parametrize("make", [Net, Branching, Functional])
def test_moving_casting_and_loading_keep_it_frozen(make, conversion):
    module = fxfuse.optimize(make(), freeze=True)
    names = marked(module)
    use(module)
    for change in (
        lambda: module.to(torch.float64),
        lambda: module.half(),
        lambda: module.float(),
        lambda: module.to("cpu"),
        lambda: module.train().eval(),
        lambda: module.requires_grad_(False),
        lambda: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
        lambda: module.load_state_dict(
            {k: v.clone() + 1 for k, v in module.state_dict().items()}, assign=True
        ),
    ):
        change()
        assert marked(module) == names
        use(module)
        assert memory(module) > 0


def test_casting_the_original_is_seen(conversion):
    model = Net()
    module = fxfuse.optimize(model, freeze=True)
    use(module)
    model.double()
    use(module)
    assert marked(module) == {"first.weight", "second.weight"}


def test_a_model_on_the_meta_device_is_frozen_where_it_goes():
    with torch.device("meta"):
        module = fxfuse.optimize(Net(), freeze=True)
    assert len(marked(module)) == 2
    module.to_empty(device="cpu")
    assert len(marked(module)) == 2
    module.load_state_dict(Net().state_dict(), assign=True)
    assert len(marked(module)) == 2
    use(module)


def test_a_weight_replaced_by_hand_is_told_of_and_can_be_frozen():
    module = fxfuse.optimize(Net(), freeze=True)
    module.first.weight = nn.Parameter(torch.rand(8, 4))
    assert marked(module) == {"second.weight"}
    text = str(fxfuse.report(module))
    assert "Weights of the Linears: 2, 1 of them frozen (0.0 MB kept); fxfuse.freeze" in text
    fxfuse.freeze(module)
    assert len(marked(module)) == 2


def test_a_frozen_module_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1), nn.Tanh())
    module = fxfuse.optimize(model, freeze=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        use(module)
        loss = (module.train()(X) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    use(module.eval())
    assert losses[-1] < losses[0] / 10


def test_a_collected_model_leaves_nothing_behind():
    model = Net()
    module = fxfuse.optimize(model, freeze=True)
    use(module)
    gc.collect()
    products = [
        weakref.ref(kept.product)
        for weight in (module.first.weight, module.second.weight)
        for kept in frozen._marks[id(weight)].kept.values()
    ]
    assert len(products) == 2
    counts = len(frozen._marks), len(frozen._placed)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert [p() for p in products] == [None, None]
    assert (len(frozen._marks), len(frozen._placed)) == (counts[0] - 2, counts[1] - 2)
    assert marked(model) == set()


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager")


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda module: module, id="plain"),
        pytest.param(compiled, id="compiled", marks=since(2, 6, "compiled calls get stand-ins")),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_recipes_are_handed_the_frozen_tensor_itself(wrap, mode, monkeypatch):
    """A detached or lifted stand-in would be converted at every call, and nobody would know."""
    seen = []
    prepare = routes.prepare

    def spying(call):
        recipe = prepare(call)

        def run(x, weight, bias, operands):
            seen.append(frozen.is_marked(weight))
            return recipe.run(x, weight, bias, operands)

        return replace(recipe, run=run)

    monkeypatch.setattr(routes, "prepare", spying)
    recipes.forget()
    module = wrap(fxfuse.optimize(Net(), freeze=True))
    with mode():
        module(X)
        module(X)
    recipes.forget()
    assert seen == [True] * 4


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Linear(2, 2), "Linear"),
        (Net(), "Net"),
        (Net, "the class Net"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
@pytest.mark.parametrize("call", [fxfuse.freeze, fxfuse.unfreeze])
def test_anything_else_is_an_error(call, module, what):
    with pytest.raises(errors.InputError) as error:
        call(module)
    assert (
        str(error.value) == f"{call.__name__}: {what} is not a module returned by fxfuse.optimize"
    )


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        model = nn.Sequential(Net())
    module = fxfuse.optimize(model)
    with pytest.raises(errors.InputError) as error:
        fxfuse.freeze(module)
    assert str(error.value) == (
        "freeze: weight 0.first.weight is an inference tensor, which does not count its changes; "
        "make or load the model outside torch.inference_mode"
    )
    assert marked(module) == set()
    with pytest.raises(errors.InputError, match=r"weight 0\.first\.weight is an inference tensor"):
        fxfuse.optimize(model, freeze=True)


def test_the_report_tells():
    module = fxfuse.optimize(Net())
    assert fxfuse.report(module).weights == Weights(2, 0, 0)
    assert "Weights of the Linears: 2, not frozen" in str(fxfuse.report(module))
    fxfuse.freeze(module)
    before = fxfuse.report(module)
    assert "Weights of the Linears: 2, frozen (0.0 MB kept)" in str(before)
    use(module)
    assert fxfuse.report(module).weights == Weights(2, 2, 2 * 4 * 32)
    assert fxfuse.report(module).to_dict()["weights"] == {
        "total": 2,
        "frozen": 2,
        "kept_bytes": 256,
    }
    assert before.weights.kept_bytes == 0
    none = fxfuse.optimize(nn.Sequential(nn.Softmax(-1)), freeze=True)
    assert "Weights of" not in str(fxfuse.report(none))
