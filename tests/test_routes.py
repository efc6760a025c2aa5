"""Which route serves a call, why, and what happens without a kernel library."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import errors, fused, library, recipes
from fxfuse.fused import fused_linear, fused_pointwise
from fxfuse.lower import MAX_OUTPUTS
from fxfuse.ops import KERNEL_OPS

RELU = "t1 = relu acc; store t1"
ADD = "t1 = add acc, $0; store t1"
COMPILER = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="builds a .so")


@pytest.fixture(autouse=True)
def _fresh_recipes():
    recipes.forget()
    yield
    recipes.forget()


def route_of(function, *args, program=RELU):
    function(*args, program, site="here")
    (taken,) = fused.routes_taken("here", program)
    return taken


# Reasons -----------------------------------------------------------------------------------------


def test_float_tensors_on_the_cpu_take_the_cpu_route():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        recipes.forget()
        x, w = torch.randn(2, 3).to(dtype), torch.randn(4, 3).to(dtype)
        assert route_of(fused_linear, x, w, None, []) == ("cpu", None)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # kernels, torch's ops
def test_what_is_kept_for_later_calls_holds_no_tensor(dtype, grad):
    x, w = torch.randn(6, 3, dtype=dtype, requires_grad=grad), torch.randn(4, 3, dtype=dtype)
    added = torch.randn(6, 4, dtype=dtype)
    out = fused_linear(x, w, None, [added], ADD)
    if grad:
        out.sum().backward()
    held = [weakref.ref(t) for t in (x, w, added)]
    del x, w, added, out
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


REASONS = {
    "float64 is computed by torch ops": lambda: (torch.randn(2, 4).double(), [], RELU),
    "operand 0 is torch.int64": lambda: (torch.randn(2, 4), [torch.arange(4)], ADD),
    "an output is torch.float64": lambda: (
        torch.randn(2, 4),
        [torch.ones(4, dtype=torch.float64)],
        ADD,
    ),
    "an operand widens the result": lambda: (torch.randn(2, 4), [torch.ones(3, 2, 4)], ADD),
    "has its negation pending": lambda: (
        torch.randn(2, 4, dtype=torch.complex64).conj().imag,
        [],
        RELU,
    ),
    "prelu with a weight per channel": lambda: (
        torch.randn(2, 3, 4),
        [torch.ones(3)],
        "t1 = prelu acc, $0; store t1",
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_no_kernel_serves_runs_on_the_reference_with_the_reason(reason):
    x, operands, program = REASONS[reason]()
    route, why = route_of(fused_pointwise, x, operands, program=program)
    assert route == "reference"
    assert reason in why


def test_a_program_too_large_for_a_kernel_runs_on_the_reference():
    count = MAX_OUTPUTS + 1
    steps = [f"t{i + 1} = tanh {f't{i}' if i else 'acc'}" for i in range(count)]
    program = "; ".join([*steps, "store " + ", ".join(f"t{i + 1}" for i in range(count))])
    x = torch.randn(2, 4)
    route, reason = route_of(fused_pointwise, x, [], program=program)
    assert route == "reference"
    assert reason == f"program: {count} outputs, a kernel holds at most {MAX_OUTPUTS}"


def test_numbers_as_operands_become_constants():
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    program = "t1 = mul acc, $0; t2 = add t1, $1; t3 = mul t2, $2; store t3"
    shift = torch.randn(4)
    for scale in (2.0, 3, True):
        found = fused_linear(x, w, None, [scale, shift, 0.5], program, site="here")
        torch.testing.assert_close(found, (x @ w.t() * scale + shift) * 0.5)
    assert fused.routes_taken("here", program) == [("cpu", None)]


def test_the_choice_is_made_once_for_equal_layers(monkeypatch):
    prepared = []
    from fxfuse import routes

    original = routes.prepare
    monkeypatch.setattr(routes, "prepare", lambda call: prepared.append(call) or original(call))
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(4, 4), nn.ReLU())])
    with torch.no_grad():
        fxfuse.optimize(model)(torch.randn(2, 4))
    assert len(prepared) == 1


def test_a_forced_route_that_cannot_serve_says_so():
    with fused.forced_route("portable"), pytest.raises(errors.KernelError, match="portable"):
        fused_pointwise(torch.randn(2, 4).double(), [], RELU, site="fc")
    fused_pointwise(torch.randn(2, 4).double(), [], RELU, site="fc")


# Shapes that do not fit --------------------------------------------------------------------------


def test_an_operand_that_does_not_broadcast_is_named():
    program = "t1 = relu acc; t2 = add t1, $0; store t2"
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(errors.OperandShapeError) as error:
        fused_linear(x, w, None, [torch.ones(5)], program, site="fc1 (model.py:12)")
    text = str(error.value)
    assert text.startswith("fc1 (model.py:12): add of shapes (2, 4) and (5,) in relu -> add: ")
    assert isinstance(error.value, RuntimeError)


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(errors.OperandShapeError) as error:
        fused_linear(torch.randn(2, 3), torch.randn(4, 5), None, [], RELU, site="fc (m.py:1)")
    for part in ("fc (m.py:1)", "(2, 3)", "(4, 5)", "cannot be multiplied"):
        assert part in str(error.value)
    with pytest.raises(RuntimeError, match="dtype"):
        fused_linear(torch.randn(2, 3), torch.randn(4, 3).double(), None, [], RELU)


# Kernel libraries that are not there, or not ours ------------------------------------------------


@pytest.fixture
def other_library(monkeypatch, tmp_path):
    """Libraries are looked for in tmp_path, afresh."""
    monkeypatch.setenv("FXFUSE_LIBRARY_DIR", str(tmp_path))
    library.find.cache_clear()
    yield tmp_path
    library.find.cache_clear()


def build(directory, *, version=library.ABI_VERSION, size=None, names=KERNEL_OPS, text=None):
    size = library.ctypes.sizeof(library.ProblemStruct) if size is None else size
    listed = ", ".join(f'"{n}"' for n in names)
    source = directory / "fake.c"
    source.write_text(
        text
        or f"""
        int fxfuse_abi_version(void) {{ return {version}; }}
        long long fxfuse_problem_size(void) {{ return {size}; }}
        const char* fxfuse_build_info(void) {{ return "fake"; }}
        const char* fxfuse_last_error(void) {{ return "fake"; }}
        static const char* names[] = {{ {listed} }};
        int fxfuse_opcode_count(void) {{ return {len(names)}; }}
        const char* fxfuse_opcode_name(int i) {{ return names[i]; }}
        """
    )
    target = directory / "libfxfuse_cpu.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", target, source], check=True)


def check_falls_back(match):
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.warns(UserWarning, match=match) as caught:
        found = fused_linear(x, w, None, [], RELU, site="here")
    assert len(caught) == 1
    assert "fxfuse runs without fxfuse_cpu, on torch ops" in str(caught[0].message)
    assert torch.equal(found, torch.relu(x @ w.t()))
    ((route, reason),) = fused.routes_taken("here", RELU)
    assert route == "reference"
    assert reason.startswith("no kernel library: ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_linear(torch.randn(5, 3), w, None, [], RELU)  # said once
    with pytest.raises(errors.LibraryError, match=match):
        fxfuse.optimize(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), strict=True)


def test_a_missing_library(other_library):
    check_falls_back(r"libfxfuse_cpu.* does not exist; build it with \./scripts/build")


def test_a_file_that_is_no_library(other_library):
    name = "libfxfuse_cpu.dylib" if sys.platform == "darwin" else "libfxfuse_cpu.so"
    (other_library / name).write_text("not a library")
    check_falls_back("cannot be loaded")


@needs_linux
@needs_compiler
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"version": 999}, f"version 999, this package needs {library.ABI_VERSION}; rebuild"),
        ({"size": 8}, "its problem struct has 8 bytes"),
        ({"names": KERNEL_OPS[1:]}, f"its ops differ from this package's: {KERNEL_OPS[0]}$"),
        ({"names": (*KERNEL_OPS, "sinc")}, "its ops differ from this package's: sinc$"),
        ({"text": "int nothing;"}, "is not a kernel library: .*fxfuse_"),
    ],
)
def test_a_library_of_other_sources(other_library, options, match):
    build(other_library, **options)
    check_falls_back(match)


def test_the_library_directory_can_be_set(monkeypatch):
    real = library.find("fxfuse_cpu")
    if isinstance(real, errors.LibraryError):
        pytest.skip("the kernels are not built")
    monkeypatch.setenv("FXFUSE_LIBRARY_DIR", str(real.path.parent))
    library.find.cache_clear()
    found = library.find("fxfuse_cpu")
    assert found.path == real.path
    assert "baseline" in found.build_info


def test_a_kernel_error_tells_the_call_and_the_limit():
    lib = library.find("fxfuse_cpu")
    if isinstance(lib, errors.LibraryError):
        pytest.skip("the kernels are not built")
    from fxfuse.program import parse

    problem = lib.problem(parse(RELU), 2, 4, torch.float32, 4, [], [torch.float32])
    problem.m = -1
    pointers = library.Pointers()
    status = lib.handle.fxfuse_cpu_run(library.ctypes.byref(problem), pointers, 1)
    with pytest.raises(errors.KernelError, match=r"fxfuse_cpu_run.*m=-1"):
        lib.check(status, "fxfuse_cpu_run for relu")
