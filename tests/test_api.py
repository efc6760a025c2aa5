"""`optimize`: what it leaves alone, what it accepts, what it says."""

from __future__ import annotations

import copy
import io
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse import errors, library


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 4)
        self.register_buffer("shift", torch.rand(4))

    def forward(self, x):
        return torch.tanh(self.second(F.relu(self.first(x))) + self.shift)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return torch.relu(self.linear(x) + self.offset)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


def groups(module):
    return len(fxfuse.report(module).groups)


def test_the_original_stays_as_it_was():
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    code, children = type(model).forward, dict(model.named_modules())
    x = torch.randn(3, 4)
    expected = model(x)
    fxfuse.optimize(model)
    assert type(model) is Net
    assert type(model).forward is code
    assert dict(model.named_modules()) == children
    assert "_fxfuse_report" not in vars(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_parameters_are_the_same_objects_under_the_same_names():
    model = Net()
    result = fxfuse.optimize(model)
    assert isinstance(result, torch.fx.GraphModule)
    assert isinstance(result, Net)
    pairs = zip(model.named_parameters(), result.named_parameters(), strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in pairs)
    assert list(result.state_dict()) == list(model.state_dict())
    assert result.shift is model.shift
    assert groups(result) == 2
    x = torch.randn(3, 4)
    torch.testing.assert_close(result(x), model(x))


def test_optimising_twice_is_harmless():
    result = fxfuse.optimize(Net())
    assert fxfuse.optimize(result) is result


def test_an_optimised_part_of_another_model():
    part = fxfuse.optimize(Net())
    model = nn.Sequential(part, nn.Linear(4, 4), nn.GELU())
    result = fxfuse.optimize(model, torch.randn(2, 4))
    assert groups(result) == 3
    x = torch.randn(2, 4)
    torch.testing.assert_close(result(x), model(x))
    assert list(result.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Net, None, "optimize: model is the class Net, not an instance of torch.nn.Module"),
        (3, None, "optimize: model is int, not an instance of torch.nn.Module"),
        (torch.relu, None, "optimize: model is builtin_function_or_method, not an"),
        (nn.Linear(2, 2), {"x": 1}, "optimize: example_inputs is dict, not a tensor or a tuple"),
        (nn.Linear(2, 2), 7, "optimize: example_inputs is int, not a tensor or a tuple"),
    ],
)
def test_wrong_types_are_named(model, inputs, message):
    with pytest.raises(errors.InputError) as error:
        fxfuse.optimize(model, inputs)
    assert message in str(error.value)
    assert isinstance(error.value, TypeError)


def test_a_model_on_two_devices_is_refused():
    model = Net()
    model.second.to("meta")
    with pytest.raises(errors.InputError) as error:
        fxfuse.optimize(model)
    assert "more than one device: first.weight on cpu, second.weight on meta" in str(error.value)


def test_a_model_on_the_meta_device_is_optimised():
    with torch.device("meta"):
        model = Net()
    result = fxfuse.optimize(model)
    assert groups(result) == 2
    assert result(torch.randn(3, 4, device="meta")).shape == (3, 4)


def test_strict_names_the_linear_and_the_reason():
    with pytest.raises(errors.NotFusedError) as error:
        fxfuse.optimize(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), strict=True)
    text = str(error.value)
    assert text.startswith("optimize(strict=True): not fused: 0 ")
    assert "Softmax" in text
    model = fxfuse.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), strict=True)
    assert groups(model) == 1


def test_strict_wants_the_kernel_library(monkeypatch):
    missing = errors.LibraryError("libfxfuse_cpu.so does not exist")
    monkeypatch.setattr(library, "find", lambda name: missing)
    with pytest.raises(errors.LibraryError, match="does not exist"):
        fxfuse.optimize(Net(), strict=True)


@pytest.mark.parametrize("inputs", [torch.randn(3, 4), (torch.randn(3, 4),), [torch.randn(3, 4)]])
def test_example_inputs_tell_the_shapes(inputs):
    report = fxfuse.report(fxfuse.optimize(Net(), inputs))
    assert [(g.shape.m, g.shape.k, g.shape.n) for g in report.groups] == [(3, 4, 8), (3, 8, 4)]


def test_example_inputs_the_model_cannot_take_only_leave_shapes_unknown():
    report = fxfuse.report(fxfuse.optimize(Net(), (torch.randn(3, 4), 1, 2)))
    assert len(report.groups) == 2
    assert "TypeError" in report.shapes_unknown


def check_broadcast_error(error, line):
    text = str(error.value)
    for part in ("linear (test_api.py:", "add of shapes (2, 8) and (3,)", "add -> relu"):
        assert part in text
    assert f"test_api.py:{line}" in text


def test_an_operand_that_does_not_broadcast():
    line = Broken.forward.__code__.co_firstlineno + 1
    with pytest.raises(errors.OperandShapeError) as error:
        fxfuse.optimize(Broken(), torch.randn(2, 4))
    check_broadcast_error(error, line)
    result = fxfuse.optimize(Broken())
    for grad in (True, False):
        with pytest.raises(errors.OperandShapeError) as error, torch.set_grad_enabled(grad):
            result(torch.randn(2, 4))
        check_broadcast_error(error, line)


def test_a_root_that_cannot_be_traced_is_optimised_in_part():
    model = Branching()
    result = fxfuse.optimize(model, torch.randn(3, 4))
    report = fxfuse.report(result)
    assert len(report.groups) == 2
    assert [leaf.path for leaf in report.leaves] == [""]
    assert result is not model
    assert result.net.first.weight is model.net.first.weight
    for sign in (1, -1):
        x = sign * torch.rand(3, 4)
        torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize("make", [Net, Branching])
def test_copies_and_pickles_keep_the_report(make):
    result = fxfuse.optimize(make(), torch.randn(3, 4))
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(result),
        pickle.loads(pickle.dumps(result)),
        torch.load(buffer, weights_only=False),
    )
    x = torch.randn(3, 4)
    for other in copies:
        assert fxfuse.report(other).to_dict() == fxfuse.report(result).to_dict()
        torch.testing.assert_close(other(x), result(x))
        other.state_dict()[next(iter(other.state_dict()))].zero_()
    assert result(x).any()


def test_report_of_anything_else_is_an_error():
    with pytest.raises(errors.InputError, match="report: Net is not a module returned by"):
        fxfuse.report(Net())


def seconds(layers):
    chain = [m for _ in range(layers) for m in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(*chain)
    start = time.process_time()
    result = fxfuse.optimize(model, torch.randn(2, 4))
    spent = time.process_time() - start
    assert groups(result) == layers
    return spent


def test_optimize_takes_linear_time():
    small, large = seconds(250), seconds(1000)
    assert large < 4.0
    assert large < 8 * small + 0.2
