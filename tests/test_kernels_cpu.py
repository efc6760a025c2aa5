"""libfxfuse_cpu computes what torch computes, for every op, layout, dtype and instruction set."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from helpers_abi import (
    PREVIOUS,
    Cpu,
    Layout,
    Step,
    immediate,
    layout,
    operand,
    path,
    slot,
)
from helpers_programs import POINTWISE_KERNEL_OPS
from helpers_torch import skip_where_torch_differs

from fxfuse.library import ProblemStruct
from fxfuse.lower import MAX_INSTRUCTIONS, MAX_OPERANDS, MAX_OUTPUTS, MAX_SLOTS
from fxfuse.ops import KERNEL_OPS, OPS

pytestmark = pytest.mark.skipif(not path().exists(), reason=f"{path()} is not built")

ISAS = ("baseline", "avx2", "avx512")
PARAMS = {
    "leaky_relu": (0.01,),
    "elu": (1.3,),
    "celu": (1.5,),
    "softplus": (1.5, 20.0),
    "clamp": (-1.0, 1.0),
    "hardshrink": (0.5,),
    "softshrink": (0.5,),
    "threshold": (0.1, 2.0),
    "clamp_grad": (-1.0, 1.0),
    "hardtanh_grad": (-1.0, 1.0),
    "threshold_grad": (0.1,),
}
POSITIVE = {"log", "log2", "log10", "sqrt", "rsqrt", "pow"}
EXTREMES = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-8, 3e-4, 0.1, 0.5, 1.0, 1.5, 2.5, 3.0, 20.0]
EXTREMES += [20.1, 88.0, 88.7, 89.0, 103.0, 104.0, 1e4, 8388608.0, 2e6, 1e19, 3e38, math.inf]
SPECIAL = torch.tensor([*EXTREMES, *(-x for x in EXTREMES), math.nan])


@pytest.fixture(scope="module")
def cpu():
    return Cpu()


@pytest.fixture(params=ISAS)
def on_isa(request, cpu):
    best = cpu.isa()
    if not cpu.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    assert cpu.isa() == request.param
    yield cpu
    cpu.set_isa(best)


def reference(name: str, dtype: torch.dtype, *args: torch.Tensor) -> torch.Tensor:
    """torch's own result, computed in `dtype`."""
    args = [a.to(dtype) for a in args]
    if name == "where":
        args[0] = args[0] != 0
    if name == "prelu":  # torch's knows one weight per channel only
        return torch.where(args[0] > 0, args[0], args[0] * args[1])
    return OPS[name].reference(*args, *PARAMS.get(name, ())).to(dtype)


def apply(cpu: Cpu, name: str, *args: torch.Tensor) -> torch.Tensor:
    out = torch.full(args[0].shape, math.nan)
    sources = (PREVIOUS, *(operand(i) for i in range(len(args) - 1)))
    step = Step(name, sources, PARAMS.get(name, ()), store=0)
    cpu.run([step], args[0], [out], [layout(a) for a in args[1:]])
    return out


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def test_the_library_and_the_table_of_ops_agree(cpu):
    assert sorted(cpu.names) == sorted(KERNEL_OPS)
    assert cpu.handle.fxfuse_problem_size() == ctypes.sizeof(ProblemStruct)
    assert cpu.handle.fxfuse_opcode_name(-1) is None
    assert cpu.handle.fxfuse_opcode_name(len(cpu.names)) is None
    assert b"baseline" in cpu.handle.fxfuse_build_info()


@pytest.mark.parametrize("name", POINTWISE_KERNEL_OPS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_op_is_as_accurate_as_eager(on_isa, name, scale):
    torch.manual_seed(0)
    args = [torch.randn(129, 517) * scale for _ in range(OPS[name].arity)]
    if name in POSITIVE:
        args[0] = args[0].abs()
    if name == "log1p":
        args[0] = args[0].abs() - min(scale, 0.9)
    truth = reference(name, torch.float64, *args)
    eager = error(reference(name, torch.float32, *args), truth)
    got = error(apply(on_isa, name, *args), truth)
    # Half a unit in the last place, uniformly spread, is 2.5e-8: one op may be a fifth of that
    # above eager, whose exp and tanh are correctly rounded nearly everywhere.
    assert got <= eager + (0.6e-8 if on_isa.isa() != "baseline" else 1.5e-8)


def agree(got: torch.Tensor, want: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    """Elementwise: the same infinities and NaN, and finite values within 3e-6 and the slack."""
    finite = got.isfinite() & want.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    return same | finite & ((got - want).abs() <= slack + 3e-6 * want.abs())


@pytest.mark.parametrize("name", POINTWISE_KERNEL_OPS)
def test_special_values_are_torchs(on_isa, name):
    skip_where_torch_differs(name)
    arity = OPS[name].arity
    # lerp's steps overflow where its result does not, and which of them do depends on fused sums.
    special = SPECIAL.where(SPECIAL.abs() != 3e38, 3e37) if name == "lerp" else SPECIAL
    grid = torch.cartesian_prod(*[special] * min(arity, 2)).reshape(-1, min(arity, 2))
    args = [grid[:, i].clone().reshape(1, -1) for i in range(min(arity, 2))]
    if arity == 3:
        args.append(torch.linspace(-2, 2, args[0].shape[1]).reshape(1, -1))
    got = apply(on_isa, name, *args).double()
    # float64 stands in for exact arithmetic: overflow of the result counts, of a step does not.
    truth = reference(name, torch.float64, *args).float().double()
    eager = reference(name, torch.float32, *args).double()
    # tanhshrink cancels in torch's float64; lerp does in any precision.
    slack = torch.full_like(got, 1e-20 if name == "tanhshrink" else 1e-36)
    if name == "lerp":
        slack = 1e-6 * torch.stack([a.double().abs().clamp_max(1e38) for a in args]).amax(0)
    odd = ~(agree(got, truth, slack) | agree(got, eager, slack))
    assert not odd.any(), [(a[odd], got[odd], truth[odd]) for a in args][:1]
    # A difference of equal numbers is +0 to torch; tanhshrink knows on which side of 0 it is.
    zero = (truth == 0) & (got == 0) & (eager == 0) & (arity == 1) & (name != "tanhshrink")
    same_sign = (got.signbit() == truth.signbit()) | (got.signbit() == eager.signbit())
    assert same_sign[zero].all(), args[0][zero & ~same_sign]


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "erf", "hardsigmoid", "softsign", "sin"])
def test_bounded_ops_stay_in_their_bounds(on_isa, name):
    x = torch.cat([torch.linspace(-110, 110, 2**20), torch.linspace(-1.2, 1.2, 2**20)])
    got = apply(on_isa, name, x.reshape(1, -1))
    assert got.min() >= (0 if name.endswith("sigmoid") else -1)
    assert got.max() <= 1


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles_are_reduced_exactly(on_isa, name):
    x = torch.logspace(-3, 38, 4099).reshape(1, -1)
    x = torch.cat([x, -x], 1)
    got, truth = apply(on_isa, name, x), reference(name, torch.float64, x)
    torch.testing.assert_close(got.double(), truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["cast_f16", "cast_bf16"])
def test_casts_round_as_torch_does(on_isa, name):
    bits = torch.arange(-(2**31), 2**31, 4093, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).reshape(1, -1)
    ties = (torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()).reshape(1, -1)
    ties = torch.cat([ties, (ties[:, :-1] + ties[:, 1:]) / 2], 1)
    for values in (x, ties, -ties):
        want = reference(name, torch.float32, values)
        assert torch.equal(apply(on_isa, name, values).nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (700, 1), (5, 64), (33, 1000), (2, 4097)])
def test_every_dtype_is_read_and_written(on_isa, dtype, shape):
    torch.manual_seed(1)
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x.view(-1)[0] = math.nan
    out = torch.empty_like(x)
    on_isa.run([Step("add", (PREVIOUS, operand(0)), store=0)], x, [out], [layout(y)])
    want = (x.float() + y.float()).to(dtype)
    assert torch.equal(out.nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_halves_survive_a_round_trip(on_isa, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1)
    for count in (65536, 65531):  # whole vectors, and a remainder
        out = torch.zeros(1, count, dtype=dtype)
        on_isa.run([Step("copy", store=0)], x[:, :count], [out])
        assert torch.equal(out.isnan(), x[:, :count].isnan())
        keep = ~out.isnan()
        assert torch.equal(out[keep].view(torch.int16), x[:, :count][keep].view(torch.int16))


OPERAND_SHAPES = {
    "scalar": lambda m, n: torch.randn(()),
    "row": lambda m, n: torch.randn(n),
    "column": lambda m, n: torch.randn(m, 1),
    "full": lambda m, n: torch.randn(m, n),
    "padded": lambda m, n: torch.randn(m, n + 5)[:, :n],
    "transposed": lambda m, n: torch.randn(n, m).t(),
}


@pytest.mark.parametrize("kind", OPERAND_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(1, 5), (9, 1), (300, 7), (40, 64), (6, 1024), (5, 3001)])
def test_operands_broadcast(cpu, kind, dtype, shape):
    torch.manual_seed(2)
    x = torch.randn(shape)
    other = OPERAND_SHAPES[kind](*shape)
    other = other > 0 if dtype == torch.bool else other.to(dtype)
    out = torch.empty(shape)
    cpu.run([Step("sub", (PREVIOUS, operand(0)), store=0)], x, [out], [layout(other)])
    assert torch.equal(out, x - other.float())


@pytest.mark.parametrize("columns", [1, 7, 64, 1030])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("time", [1, 6, 50])
def test_operands_repeat_in_rows(cpu, columns, batch, time):
    x = torch.randn(batch, time, columns)
    table, token = torch.randn(time, columns), torch.randn(batch, 1, columns)
    flag = torch.randn(time, 1).half()
    flat = x.reshape(-1, columns)
    operands = [
        Layout(table, columns, 1, period=time),
        Layout(token, columns, 1, repeat=time, period=batch),
        Layout(flag, 1, 0, period=time),
    ]
    steps = [Step("add", (PREVIOUS, operand(0))), Step("mul", (PREVIOUS, operand(1)))]
    steps.append(Step("sub", (PREVIOUS, operand(2)), store=0))
    out = torch.empty_like(flat)
    cpu.run(steps, flat, [out], operands)
    assert torch.equal(out.view_as(x), (x + table) * token - flag.float())


def test_slots_immediates_and_several_outputs(on_isa):
    torch.manual_seed(3)
    x, y = torch.randn(37, 150), torch.randn(37, 150)
    outputs = [torch.empty(37, 150), torch.empty(37, 160)[:, :150].half(), torch.empty(37, 150)]
    steps = [
        Step("add", (PREVIOUS, operand(0)), save=0, store=0),
        Step("sigmoid", save=1),
        Step("mul", (slot(0), PREVIOUS), store=1),
        Step("where", (slot(1), PREVIOUS, immediate(1)), (0.0, 3.0), save=0),
        Step("lerp", (slot(0), slot(1), immediate(0)), (0.25, 0.0), store=2),
    ]
    on_isa.run(steps, x, outputs, [layout(y)])
    s = x + y
    gate = torch.sigmoid(s)
    torch.testing.assert_close(outputs[0], s, rtol=0, atol=0)
    torch.testing.assert_close(outputs[1], (s * gate).half(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(outputs[2], torch.lerp(s * gate, gate, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [7, 1024, 5000])
def test_an_output_may_be_the_accumulator(cpu, dtype, columns):
    x = torch.randn(64, columns).to(dtype)
    want = torch.relu(x.float()).sub(0.5).to(dtype)
    kept = torch.empty_like(x)
    steps = [Step("relu", save=0), Step("sub", (PREVIOUS, immediate(0)), (0.5, 0.0), store=0)]
    steps.append(Step("copy", (slot(0),), store=1))
    cpu.run(steps, x, [x, kept])
    assert torch.equal(x, want)
    assert torch.equal(kept, (kept.relu()))


def test_rows_may_lie_apart_and_gaps_stay_untouched(cpu):
    x, out = torch.randn(50, 40), torch.full((50, 48), -7.0)
    cpu.run([Step("neg", store=0)], x[:, 3:33], [out[:, 8:38]])
    assert torch.equal(out[:, 8:38], -x[:, 3:33])
    assert (out[:, :8] == -7).all()
    assert (out[:, 38:] == -7).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_are_fine(cpu, shape):
    x = torch.empty(shape)
    cpu.run([Step("exp", store=0)], x, [x.clone()])


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("own", [False, True])
def test_threads_do_not_change_a_bit(cpu, threads, own):
    if own:
        cpu.handle.fxfuse_cpu_set_parallel(None)
    x, row = torch.randn(600, 3000), torch.randn(3000)
    steps = [Step("mul", (PREVIOUS, operand(0))), Step("gelu"), Step("tanh", store=0)]
    one, many = torch.empty_like(x), torch.empty_like(x)
    cpu.run(steps, x, [one], [layout(row)], threads=1)
    cpu.run(steps, x, [many], [layout(row)], threads=threads)
    assert torch.equal(one, many)


BAD = {
    "m=-1, expected 0 or more": lambda p, g, i, a: setattr(p, "m", -1),
    "n=-2, expected 0 or more": lambda p, g, i, a: setattr(p, "n", -2),
    "lda=3, expected n or more": lambda p, g, i, a: setattr(p, "lda", 3),
    "input_dtype=3, expected f32": lambda p, g, i, a: setattr(p, "input_dtype", 3),
    "has_gemm=1, expected 0": lambda p, g, i, a: setattr(p, "has_gemm", 1),
    "route=9, expected 0 to 4": lambda p, g, i, a: setattr(p, "route", 9),
    f"instruction_count=0, expected 1 to {MAX_INSTRUCTIONS}": lambda p, g, i, a: setattr(
        g, "instruction_count", 0
    ),
    f"operand_count={MAX_OPERANDS + 1}, expected 0 to {MAX_OPERANDS}": lambda p, g, i, a: setattr(
        g, "operand_count", MAX_OPERANDS + 1
    ),
    f"output_count={MAX_OUTPUTS + 1}, expected 1 to {MAX_OUTPUTS}": lambda p, g, i, a: setattr(
        g, "output_count", MAX_OUTPUTS + 1
    ),
    f"slot_count={MAX_SLOTS + 1}, expected 0 to {MAX_SLOTS}": lambda p, g, i, a: setattr(
        g, "slot_count", MAX_SLOTS + 1
    ),
    "instruction[1].opcode=999": lambda p, g, i, a: setattr(i[1], "opcode", 999),
    "instruction[0].arity=1, expected 2 for add": lambda p, g, i, a: setattr(i[0], "arity", 1),
    "instruction[1].save=2, expected -1": lambda p, g, i, a: setattr(i[1], "save", 2),
    "instruction[1].store=1, expected -1": lambda p, g, i, a: setattr(i[1], "store", 1),
    "instruction[0].source[1]=4": lambda p, g, i, a: i[0].source.__setitem__(1, 4),
    "instruction[0].index[1]=1, expected below 1 (operand)": (
        lambda p, g, i, a: i[0].index.__setitem__(1, 1)
    ),
    "index[0]=0, expected a slot an earlier": lambda p, g, i, a: i[0].source.__setitem__(0, 1),
    "operand[0].dtype=5": lambda p, g, i, a: setattr(g.operand[0], "dtype", 5),
    "operand[0].repeat=0, expected 1 or more": lambda p, g, i, a: setattr(
        g.operand[0], "repeat", 0
    ),
    "operand[0].period=0, expected 1 or more": lambda p, g, i, a: setattr(
        g.operand[0], "period", 0
    ),
    "output[0].dtype=3": lambda p, g, i, a: setattr(g.output[0], "dtype", 3),
    "output[0].row_stride=1, expected n": lambda p, g, i, a: setattr(g.output[0], "row_stride", 1),
    "pointer of A[0] is null": lambda p, g, i, a: a.__setitem__(0, None),
    "pointer of operand[0] is null": lambda p, g, i, a: a.__setitem__(3, None),
    "pointer of output[0] is null": lambda p, g, i, a: a.__setitem__(11, None),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(cpu, message):
    x, y = torch.randn(4, 6), torch.randn(6)
    steps = [Step("add", (PREVIOUS, operand(0)), save=0), Step("relu", store=0)]
    problem, pointers = cpu.problem(steps, x, [torch.empty(4, 6)], [layout(y)])
    BAD[message](problem, problem.program, problem.program.instruction, pointers)
    assert cpu.call(problem, pointers) == 1
    assert cpu.last_error().startswith("fxfuse_cpu_run: ")
    assert message in cpu.last_error()


def test_calls_without_a_problem_or_threads_fail(cpu):
    assert cpu.handle.fxfuse_cpu_run(None, None, 1) == 1
    assert "problem=null" in cpu.last_error()
    x = torch.randn(2, 2)
    problem, pointers = cpu.problem([Step("abs", store=0)], x, [x])
    assert cpu.call(problem, pointers, threads=0) == 1
    assert "threads=0, expected 1 or more" in cpu.last_error()
    assert not cpu.set_isa("mmx")
    assert "name=mmx" in cpu.last_error()
