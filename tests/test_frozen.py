"""What is kept for frozen weights: made once, and anew after every change that shows."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from helpers_torch import since
from torch import nn

from fxfuse import frozen


class Doubled:
    """Makes twice the weight, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return weight * 2


def prepared_right(weight, make, kind="doubled"):
    """Ask for the product, and check that it is of the weight as it is now."""
    product = frozen.prepared(weight, kind, make)
    assert torch.equal(product, weight * 2)
    return product


@pytest.fixture
def layer():
    layer = nn.Linear(4, 3)
    frozen.mark(layer, "weight")
    return layer


def test_nothing_is_kept_for_a_weight_that_is_not_frozen():
    weight, make = nn.Linear(4, 3).weight, Doubled()
    assert prepared_right(weight, make) is not prepared_right(weight, make)
    assert make.count == 2
    assert frozen.kept_bytes(weight) == 0
    assert not frozen.is_marked(weight)


def test_a_frozen_weight_is_made_once_for_each_kind(layer):
    make = Doubled()
    first = prepared_right(layer.weight, make)
    assert prepared_right(layer.weight, make) is first
    other = prepared_right(layer.weight, make, ("doubled", 2))
    assert other is not first
    assert prepared_right(layer.weight, make, ("doubled", 2)) is other
    assert make.count == 2
    assert not frozen.is_marked(layer.bias)


def test_a_buffer_can_be_frozen():
    module, make = nn.Module(), Doubled()
    module.register_buffer("table", torch.rand(3, 3))
    frozen.mark(module, "table")
    assert prepared_right(module.table, make) is prepared_right(module.table, make)
    frozen.mark(module, "nothing")
    frozen.unmark(module, "nothing")


def test_unmarking_frees_what_is_kept(layer):
    make = Doubled()
    product = weakref.ref(prepared_right(layer.weight, make))
    assert product() is not None
    frozen.unmark(layer, "weight")
    assert product() is None
    prepared_right(layer.weight, make)
    prepared_right(layer.weight, make)
    assert make.count == 3


def add_in_place(layer):
    layer.weight.add_(1)


def add_to_a_view(layer):
    layer.weight[0].add_(1)


def add_to_the_detached(layer):
    layer.weight.detach().add_(1)


def load(layer):
    layer.load_state_dict({"weight": torch.rand(3, 4), "bias": torch.rand(3)})


def assign_data(layer):
    layer.weight.data = torch.rand(3, 4)


def assign_transposed_data(layer):
    layer.weight.data = layer.weight.data.clone().t()


def resize(layer):
    layer.weight.requires_grad_(False).resize_(6, 8).copy_(torch.rand(6, 8))


def initialise(layer):
    nn.init.orthogonal_(layer.weight)


def there_and_back(layer):
    """The second cast may well get the address the first one freed."""
    layer.to(torch.float16).to(torch.float32)


def share(layer):
    layer.share_memory()
    layer.weight.add_(1)


EDITS = [
    add_in_place,
    add_to_a_view,
    add_to_the_detached,
    load,
    assign_data,
    assign_transposed_data,
    resize,
    initialise,
    there_and_back,
    share,
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: layer.double(),
    lambda layer: layer.weight.zero_(),
    lambda layer: layer.weight.set_(torch.rand(3, 4)),
    lambda layer: nn.utils.vector_to_parameters(torch.rand(15), layer.parameters()),
    lambda layer: torch._foreach_mul_([layer.weight], 3.0),
]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edit_is_seen(layer, edit, mode):
    make = Doubled()
    prepared_right(layer.weight, make)
    with mode():
        edit(layer)
    prepared_right(layer.weight, make)
    if not layer.weight.is_inference():
        assert prepared_right(layer.weight, make) is prepared_right(layer.weight, make)
        assert make.count == 2


def test_no_cast_there_and_back_at_the_same_address_is_missed(layer):
    make, addresses = Doubled(), set()
    for _ in range(200):
        prepared_right(layer.weight, make)
        addresses.add(layer.weight.data_ptr())
        with torch.no_grad():
            layer.weight.data = torch.rand(3, 4)
    assert len(addresses) < 200, "no address was used twice: the test shows nothing"


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "sgd foreach": functools.partial(torch.optim.SGD, lr=0.1, foreach=True),
    "adam": torch.optim.Adam,
    "adam foreach": functools.partial(torch.optim.Adam, foreach=True),
    "adamw fused": functools.partial(torch.optim.AdamW, fused=True),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_step_is_seen(layer, name):
    try:
        optimizer = OPTIMIZERS[name](layer.parameters())
        layer(torch.rand(2, 4)).sum().backward()
        optimizer.step()
    except RuntimeError as error:
        pytest.skip(f"this torch has no such optimiser on the CPU: {error}")
    make = Doubled()
    for _ in range(3):
        before = prepared_right(layer.weight, make)
        layer(torch.rand(2, 4)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, layer.weight * 2)
    prepared_right(layer.weight, make)
    assert make.count == 4


def test_the_step_of_another_model_costs_nothing(layer):
    make, other = Doubled(), nn.Linear(4, 3)
    prepared_right(layer.weight, make)
    other(torch.rand(2, 4)).sum().backward()
    torch.optim.AdamW(other.parameters()).step()
    prepared_right(layer.weight, make)
    assert make.count == 1


def test_an_edit_through_data_is_not_seen_until_it_is_told(layer):
    """What the promise is about: torch itself does not count these."""
    make = Doubled()
    first = frozen.prepared(layer.weight, "doubled", make)
    layer.weight.data.add_(1)
    assert frozen.prepared(layer.weight, "doubled", make) is first
    frozen.outdate(layer.weight)
    prepared_right(layer.weight, make)
    assert make.count == 2


def test_version_counters_count_what_the_promise_says():
    """The facts of torch that all this rests on."""
    weight = nn.Parameter(torch.zeros(3))
    versions = [weight._version]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            weight.add_(1)
            versions.append(weight._version)
    assert versions == [0, 1, 2]
    weight.data.add_(1)
    assert weight._version == 2
    with torch.inference_mode():
        inference = torch.zeros(3)
    with pytest.raises(RuntimeError, match="version"):
        _ = inference._version


def test_nothing_is_kept_for_an_inference_tensor():
    with torch.inference_mode():
        layer = nn.Linear(4, 3)
    frozen.mark(layer, "weight")
    make = Doubled()
    for _ in range(2):
        with torch.inference_mode():
            prepared_right(layer.weight, make)
            layer.weight.add_(1)
    assert make.count == 2
    assert frozen.kept_bytes(layer.weight) == 0


def test_a_cast_under_inference_mode_makes_an_inference_tensor(layer):
    """The parameter is the same object and has a version counter, which no longer counts."""
    make = Doubled()
    prepared_right(layer.weight, make)
    with torch.inference_mode():
        layer.half()
        prepared_right(layer.weight, make)
        layer.weight.add_(1)
        prepared_right(layer.weight, make)
    assert make.count == 3


def test_what_is_kept_is_an_ordinary_tensor_without_a_graph(layer):
    with torch.inference_mode():
        product = prepared_right(layer.weight, Doubled())
    assert not product.is_inference()
    with torch.no_grad():
        layer.weight.add_(1)
    assert not prepared_right(layer.weight, Doubled()).requires_grad


def test_a_tied_weight_has_one_product_until_its_last_place_goes():
    a, b, make = nn.Linear(4, 3), nn.Linear(4, 3), Doubled()
    b.weight = a.weight
    frozen.mark(a, "weight")
    frozen.mark(b, "weight")
    prepared_right(a.weight, make)
    prepared_right(b.weight, make)
    frozen.unmark(a, "weight")
    prepared_right(a.weight, make)
    assert make.count == 1
    del b
    prepared_right(a.weight, make)
    assert not frozen.is_marked(a.weight)
    assert make.count == 2


def test_marking_twice_is_marking_once(layer):
    make = Doubled()
    prepared_right(layer.weight, make)
    frozen.mark(layer, "weight")
    prepared_right(layer.weight, make)
    assert make.count == 1
    frozen.unmark(layer, "weight")
    frozen.unmark(layer, "weight")
    assert not frozen.is_marked(layer.weight)


def test_a_tensor_that_is_replaced_is_no_longer_frozen(layer):
    make, old = Doubled(), layer.weight
    product = weakref.ref(prepared_right(old, make))
    layer.weight = nn.Parameter(torch.rand(3, 4))
    assert not frozen.is_marked(old)
    assert not frozen.is_marked(layer.weight)
    del old
    gc.collect()
    assert product() is None
    frozen.mark(layer, "weight")
    prepared_right(layer.weight, make)
    prepared_right(layer.weight, make)
    assert make.count == 2


def test_a_new_tensor_with_the_id_of_an_old_one_is_not_frozen(layer, monkeypatch):
    """Python gives the place of a dead object to the next one of its size."""
    stranger, make = nn.Parameter(torch.rand(3, 4)), Doubled()
    monkeypatch.setitem(frozen._marks, id(stranger), frozen._marks[id(layer.weight)])
    assert not frozen.is_marked(stranger)
    prepared_right(stranger, make)
    prepared_right(stranger, make)
    assert make.count == 2


def test_a_cast_frees_what_is_kept_at_once(layer):
    product = weakref.ref(prepared_right(layer.weight, Doubled()))
    layer.half()
    assert product() is None


def test_a_dead_module_leaves_nothing_behind():
    layer, make = nn.Linear(4, 3), Doubled()
    frozen.mark(layer, "weight")
    weight, product = layer.weight, weakref.ref(prepared_right(layer.weight, make))
    gc.collect()
    counts = len(frozen._marks), len(frozen._placed)
    del layer
    gc.collect()
    assert (len(frozen._marks), len(frozen._placed)) == (counts[0] - 1, counts[1] - 1)
    assert product() is None
    assert not frozen.is_marked(weight)


@since(2, 6, "no torch.utils.swap_tensors")
def test_tensors_can_still_be_swapped(layer):
    make = Doubled()
    prepared_right(layer.weight, make)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.rand(3, 4)))
    prepared_right(layer.weight, make)
    prepared_right(layer.weight, make)
    assert make.count == 2


def test_a_copy_of_a_weight_is_another_weight(layer):
    prepared_right(layer.weight, Doubled())
    assert not frozen.is_marked(copy.deepcopy(layer).weight)


def test_nothing_made_during_a_capture_is_kept(layer, monkeypatch):
    make = Doubled()
    with monkeypatch.context() as capture:
        capture.setattr(frozen, "_capturing", lambda weight: True)
        prepared_right(layer.weight, make)
        prepared_right(layer.weight, make)
        assert make.count == 2
    kept = prepared_right(layer.weight, make)
    monkeypatch.setattr(frozen, "_capturing", lambda weight: True)
    assert prepared_right(layer.weight, make) is kept
    assert make.count == 3


@dataclass(frozen=True)
class Planes:
    high: torch.Tensor
    rest: tuple[torch.Tensor, dict[str, torch.Tensor]]
    count: int = 2


def test_bytes_are_those_of_all_tensors_of_a_product(layer):
    def make(weight):
        whole = torch.empty(2, 12, dtype=torch.float16)
        return Planes(whole[0], (whole[1], {"scales": torch.empty(3)}))

    assert frozen.kept_bytes(layer.weight) == 0
    frozen.prepared(layer.weight, "planes", make)
    assert frozen.kept_bytes(layer.weight) == 2 * 12 * 2 + 3 * 4
    frozen.prepared(layer.weight, "doubled", Doubled())
    assert frozen.kept_bytes(layer.weight) == 2 * 12 * 2 + 3 * 4 + 4 * 12


def test_an_error_of_the_maker_reaches_the_caller_and_keeps_nothing(layer):
    def fail(weight):
        raise ValueError("no planes")

    with pytest.raises(ValueError, match="no planes"):
        frozen.prepared(layer.weight, "doubled", fail)
    prepared_right(layer.weight, Doubled())


def test_threads_get_right_products_while_weights_come_and_go():
    layers = [nn.Linear(4, 3) for _ in range(8)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(200):
                layer = layers[(seed + step) % len(layers)]
                frozen.mark(layer, "weight")
                prepared_right(layer.weight, Doubled())
                passing = nn.Linear(4, 3)
                frozen.mark(passing, "weight")
                prepared_right(passing.weight, Doubled())
                if step % 3 == 0:
                    frozen.unmark(layer, "weight")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for layer in layers:
        frozen.unmark(layer, "weight")
    assert not any(frozen.is_marked(layer.weight) for layer in layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_cuda_graph_uses_what_is_kept_and_keeps_nothing():
    layer, make = nn.Linear(4, 3, device="cuda"), Doubled()
    frozen.mark(layer, "weight")
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        inside = frozen.prepared(layer.weight, "doubled", make)
    assert frozen.kept_bytes(layer.weight) == 0
    kept = prepared_right(layer.weight, make)
    with torch.cuda.graph(second):
        assert frozen.prepared(layer.weight, "doubled", make) is kept
        outside = kept + 1
    second.replay()
    assert torch.equal(outside, layer.weight * 2 + 1)
    layer.weight.add_(1)
    first.replay()
    assert torch.equal(inside, layer.weight * 2)
    layer.cpu()
    prepared_right(layer.weight, make)
    assert make.count == 3
