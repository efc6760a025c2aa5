"""How exact the kernels' activations are, in each arithmetic, against float64 at dense arguments.

The pointwise route runs them one by one; the chain kernels of the Hopper route get their arguments
through a product with the identity, and have forms of their own for arguments in [-1, 1].
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers_gemm import TILES, run_tile

from fxfuse.fused import forced_route, fused_linear, fused_pointwise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of sm_90",
)

HALVES = [torch.bfloat16, torch.float16]
COLUMNS = 256
TRUTH = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": lambda x: 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5)),
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}
# To where on the left the result is held to a relative error. Beyond, the argument's own rounding
# before the exponential grows with it.
LEFT = {"silu": -80.0, "sigmoid": -80.0, "tanh": -1e4, "gelu": -5.0, "gelu_tanh": -4.0}
# Of the function, as math_device.cuh documents it; of fp32 for the exponent's error on the left.
FUNCTION = {torch.bfloat16: 2**-10.9, torch.float16: 2**-13.9, torch.float32: 2**-18.5}
NEAR = {"silu": 2**-21.5, "sigmoid": 2**-21.5, "tanh": 2**-21.5, "gelu": 2**-21.5}
HIGH = 2**-13.9


@pytest.fixture(autouse=True)
def _precision():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def arguments(dtype, low, high, least=2.0**-14):
    """Every 16-bit float, or as many fp32, of magnitude `least` and more in [low, high], in rows of
    ascending magnitude [M, COLUMNS]; repeated at the end to fill the last."""
    steps = torch.arange(0, 2**15, device="cuda", dtype=torch.int32)
    if dtype == torch.float32:
        magnitude = (steps.to(torch.int64) * 65521 % 2**31).to(torch.int32).view(torch.float32)
    else:
        magnitude = steps.to(torch.int16).view(dtype).float()
    magnitude = magnitude[magnitude.isfinite() & (magnitude >= least)].sort().values
    x = torch.stack([magnitude, -magnitude], 1).flatten()
    x = x[(x >= low) & (x <= high)]
    missing = -len(x) % COLUMNS
    return torch.cat([x, x[-1:].expand(missing)]).reshape(-1, COLUMNS).to(dtype)


def worst(found, truth, dtype):
    """The largest relative error, less what rounding to `dtype` may add; absolute where the result
    is subnormal."""
    info = torch.finfo(dtype)
    rounding = info.eps / 2 if dtype != torch.float32 else 0
    size = truth.abs().clamp_min(info.smallest_normal)
    return ((found.double() - truth).abs() / size).max().item() - rounding


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", TRUTH)
def test_relative_error_of_the_pointwise_kernel(name, dtype):
    x = arguments(dtype, LEFT[name], 1e4)
    found = fused_pointwise(x, [], f"t1 = {name} acc; store t1", site="accuracy")
    assert worst(found, TRUTH[name](x.double()), dtype) <= FUNCTION[dtype]


@pytest.mark.parametrize("name", NEAR)
def test_fp32_is_exact_to_a_few_ulp(name):
    x = arguments(torch.float32, -1.0, 1e4)
    found = fused_pointwise(x, [], f"t1 = {name} acc; store t1", site="accuracy")
    assert worst(found, TRUTH[name](x.double()), torch.float32) <= NEAR[name]


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", TRUTH)
def test_relative_error_of_the_chain_kernels(name, dtype, tile):
    x = arguments(dtype, LEFT[name], 1e4)
    identity = torch.eye(COLUMNS, device="cuda", dtype=dtype)
    outputs = run_tile(x, identity, None, [], f"t1 = {name} acc; store t1", tile, 1)
    assert outputs is not None
    assert worst(outputs[0], TRUTH[name](x.double()), dtype) <= FUNCTION[dtype]


@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_relative_error_in_the_unit_interval(name, dtype):
    x = arguments(dtype, -2.0, 2.0)
    identity = torch.eye(COLUMNS, device="cuda", dtype=dtype)
    program = f"t1 = clamp acc, -1.0, 1.0; t2 = {name} t1; store t2"
    outputs = run_tile(x, identity, None, [], program, 256, 1)
    assert outputs is not None
    truth = TRUTH[name](x.double().clamp(-1, 1))
    assert worst(outputs[0], truth, dtype) <= FUNCTION[dtype]


@hopper
@pytest.mark.parametrize("clamp", [False, True], ids=["any", "unit"])
@pytest.mark.parametrize("name", TRUTH)
def test_relative_error_of_high_precision(name, clamp):
    """fp32 outputs of products of fp16 planes, which hold these arguments exactly."""
    torch.set_float32_matmul_precision("high")
    x = arguments(torch.float16, LEFT[name], 1e4).float()
    identity = torch.eye(COLUMNS, device="cuda")
    program = f"t1 = {name} acc; store t1"
    if clamp:
        program = f"t1 = clamp acc, -1.0, 1.0; t2 = {name} t1; store t2"
    with forced_route("hopper"):
        found = fused_linear(x, identity, None, [], program)
    wide = x.double().clamp(-1, 1) if clamp else x.double()
    assert worst(found, TRUTH[name](wide), torch.float32) <= HIGH
    if name in ("sigmoid", "tanh"):
        assert found.abs().max() <= 1


@hopper
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "clamp", "clamp tanh", "clamp tanh gelu"])
def test_high_precision_is_exact_where_everything_saturates(name):
    """Eager makes no error there, whatever its product's; gelu of 0.76 is a polynomial's."""
    torch.set_float32_matmul_precision("high")
    magnitude = torch.linspace(20, 80, 64 * COLUMNS, device="cuda").reshape(-1, COLUMNS)
    identity = torch.eye(COLUMNS, device="cuda")
    program, truth = [], magnitude.double()
    for i, op in enumerate(name.split(), start=1):
        parameters = ", -1.0, 1.0" if op == "clamp" else ""
        program.append(f"t{i} = {op} {f't{i - 1}' if i > 1 else 'acc'}{parameters}")
        truth = truth.clamp(-1, 1) if op == "clamp" else TRUTH[op](truth)
    with forced_route("hopper"):
        text = "; ".join([*program, f"store t{len(program)}"])
        found = fused_linear(magnitude, identity, None, [], text)
    assert worst(found, truth, torch.float32) <= (2**-16 if "gelu" in name else 2**-22)


@hopper
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", TRUTH)
def test_infinities_and_nans_of_the_chain_kernels(name, tile):
    """Four times 3e38 is infinite; one NaN makes a row NaN."""
    x = torch.zeros(16, COLUMNS, device="cuda", dtype=torch.bfloat16)
    x[0, 3], x[1, 4], x[2, 5], x[3, 6] = 3e38, -3e38, torch.nan, -30.0
    weight = 4 * torch.eye(COLUMNS, device="cuda", dtype=torch.bfloat16)
    outputs = run_tile(x, weight, None, [], f"t1 = {name} acc; store t1", tile, 1)
    assert outputs is not None
    eager = {"gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}
    expected = eager.get(name, TRUTH[name])(F.linear(x, weight))
    torch.testing.assert_close(outputs[0], expected, rtol=2**-7, atol=1e-30, equal_nan=True)
