"""Load the kernel libraries with ctypes, and describe calls to them.

The structs mirror `kernels/include/fxfuse.h`. A library is used only if its ABI version, struct
size and opcode names agree with this package; otherwise the reference serves, and a warning says
so once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import KernelError, LibraryError
from .lower import MAX_INSTRUCTIONS, MAX_OPERANDS, MAX_OUTPUTS, lower
from .ops import GROUP_OPS, KERNEL_OPS, OPS
from .program import Program
from .vjp import Reduction

ABI_VERSION = 5
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.bool: 3,
    torch.float64: 4,
}
SUMS = {Reduction.NONE: 0, Reduction.ROWS: 1, Reduction.COLUMNS: 2, Reduction.ALL: 3}
ROUTES = {"auto": 0, "pointwise": 1, "portable": 2, "hopper": 3, "skinny": 4}
STATUS_UNSUPPORTED = 2
# Added to a tile's columns in ProblemStruct.tile where warpgroups take turns, where it has 64 rows
# and where pairs of blocks share what they bring of x or of the weight.
TILE_IN_TURNS, TILE_OF_64_ROWS, TILE_SHARES_A, TILE_SHARES_B = 1024, 2048, 4096, 8192
POINTER_OPERAND = 3
POINTER_OUTPUT = POINTER_OPERAND + MAX_OPERANDS
POINTER_ROOTS = POINTER_OUTPUT + MAX_OUTPUTS
POINTER_SPECIAL = POINTER_ROOTS + 2
Pointers = ctypes.c_void_p * (POINTER_SPECIAL + 2)


class InstructionStruct(ctypes.Structure):
    """fxfuse_instruction."""

    _fields_ = (
        ("opcode", ctypes.c_uint16),
        ("save", ctypes.c_int8),
        ("store", ctypes.c_int8),
        ("source", ctypes.c_uint8 * 3),
        ("index", ctypes.c_uint8 * 3),
        ("arity", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8),
        ("immediate", ctypes.c_float * 2),
    )


class OperandStruct(ctypes.Structure):
    """fxfuse_operand."""

    _fields_ = (
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("repeat", ctypes.c_int64),
        ("period", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class OutputStruct(ctypes.Structure):
    """fxfuse_output."""

    _fields_ = (
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("sum", ctypes.c_int32),
    )


class ProgramStruct(ctypes.Structure):
    """fxfuse_program."""

    _fields_ = (
        ("instruction_count", ctypes.c_int32),
        ("operand_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("slot_count", ctypes.c_int32),
        ("instruction", InstructionStruct * MAX_INSTRUCTIONS),
        ("operand", OperandStruct * MAX_OPERANDS),
        ("output", OutputStruct * MAX_OUTPUTS),
        ("immediate_f64", ctypes.c_double * 2 * MAX_INSTRUCTIONS),
    )


class ProblemStruct(ctypes.Structure):
    """fxfuse_problem."""

    _fields_ = (
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("lda", ctypes.c_int64),
        ("ldb", ctypes.c_int64),
        ("input_dtype", ctypes.c_int32),
        ("has_gemm", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("b_transposed", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("route", ctypes.c_int32),
        ("tile", ctypes.c_int32),
        ("program", ProgramStruct),
    )


class SplitStruct(ctypes.Structure):
    """fxfuse_split."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("plane_stride", ctypes.c_int64),
        ("planes", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("source", ctypes.c_void_p),
        ("plane", ctypes.c_void_p),
        ("root", ctypes.c_void_p),
        ("special", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class OperandLayout:
    """How an operand is read at (m, n): `data[((m // repeat) % period) * row + n * column]`."""

    kind: str
    row_stride: int
    column_stride: int
    repeat: int
    period: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Gemm:
    """The product a CUDA problem begins with: A [M, K], B [N, K] or, where `transposed`, [K, N].

    lda, ldb: row strides in elements. bias: its dtype, or None. planes: A and B are so many planes
    of fp16 each, as `split` makes them, or 0.
    """

    k: int
    lda: int
    ldb: int
    bias: torch.dtype | None
    transposed: bool = False
    planes: int = 0


class Library:
    """A loaded kernel library that agrees with this package."""

    def __init__(self, name: str, path: Path, handle: ctypes.CDLL) -> None:
        self.name = name
        self.path = path
        self.handle = handle
        try:
            self._declare()
        except AttributeError as error:  # ctypes finds no such symbol
            raise LibraryError(f"{path} is not a kernel library: {error}") from None
        self._check()
        count = handle.fxfuse_opcode_count()
        names = [handle.fxfuse_opcode_name(i).decode() for i in range(count)]
        self.opcodes = {name: number for number, name in enumerate(names)}
        if set(names) != set(KERNEL_OPS):
            odd = sorted(set(names) ^ set(KERNEL_OPS))
            raise LibraryError(f"{path}: its ops differ from this package's: {', '.join(odd)}")

    def _declare(self) -> None:
        handle = self.handle
        handle.fxfuse_build_info.restype = ctypes.c_char_p
        handle.fxfuse_last_error.restype = ctypes.c_char_p
        handle.fxfuse_opcode_name.restype = ctypes.c_char_p
        handle.fxfuse_problem_size.restype = ctypes.c_int64
        handle.fxfuse_abi_version.restype = ctypes.c_int
        handle.fxfuse_opcode_count.restype = ctypes.c_int

    def _check(self) -> None:
        version = self.handle.fxfuse_abi_version()
        if version != ABI_VERSION:
            raise LibraryError(
                f"{self.path}: built for interface version {version}, this package needs "
                f"{ABI_VERSION}; rebuild the kernels"
            )
        size = self.handle.fxfuse_problem_size()
        if size != ctypes.sizeof(ProblemStruct):
            raise LibraryError(
                f"{self.path}: its problem struct has {size} bytes, this package's "
                f"{ctypes.sizeof(ProblemStruct)}; rebuild the kernels"
            )

    @property
    def build_info(self) -> str:
        """Compiler and architectures the library was built with."""
        return str(self.handle.fxfuse_build_info().decode())

    def problem(
        self,
        program: Program,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        row_stride: int,
        operands: Sequence[OperandLayout],
        output_dtypes: Sequence[torch.dtype],
        gemm: Gemm | None = None,
        route: str = "auto",
        reductions: Sequence[Reduction] = (),
    ) -> ProblemStruct:
        """The problem struct of a program over [rows, columns].

        dtype, row_stride: of the accumulator matrix, or with `gemm` the dtype of its inputs.
        reductions: of each output, where any is summed.
        Raises ProgramError where the program exceeds what a kernel holds.
        """
        problem = ProblemStruct(m=rows, n=columns, input_dtype=DTYPES[dtype], lda=row_stride)
        problem.route = ROUTES[route]
        if gemm is not None:
            problem.k, problem.lda, problem.ldb = gemm.k, gemm.lda, gemm.ldb
            problem.has_gemm, problem.has_bias = 1, int(gemm.bias is not None)
            problem.bias_dtype = DTYPES[gemm.bias or dtype]
            problem.b_transposed, problem.planes = int(gemm.transposed), gemm.planes
        steps = lower(program, in_double(dtype, operands, output_dtypes))
        out = problem.program
        out.instruction_count, out.operand_count = len(steps), len(operands)
        out.output_count = len(output_dtypes)
        out.slot_count = 1 + max(step.save for step in steps)
        for number, step in enumerate(steps):
            slot = out.instruction[number]
            slot.opcode, slot.save, slot.store = self.opcodes[step.op], step.save, step.store
            slot.arity = OPS[step.op].arity
            for i, (source, index) in enumerate(step.sources):
                slot.source[i], slot.index[i] = int(source), index
            for i, value in enumerate(step.immediates):
                slot.immediate[i] = out.immediate_f64[number][i] = value
            if step.op in GROUP_OPS:
                width = columns // int(step.immediates[0])
                slot.immediate[0] = out.immediate_f64[number][0] = width
        for number, layout in enumerate(operands):
            out.operand[number] = OperandStruct(
                layout.row_stride,
                layout.column_stride,
                layout.repeat,
                layout.period,
                DTYPES[layout.dtype],
            )
        for number, output_dtype in enumerate(output_dtypes):
            over = SUMS[reductions[number]] if reductions else 0
            out.output[number] = OutputStruct(columns, DTYPES[output_dtype], over)
        return problem

    def partials(self, problem: ProblemStruct) -> tuple[int, int]:
        """The parts from top to bottom, and from left to right, in which outputs are summed."""
        parts = ctypes.c_int64(), ctypes.c_int64()
        call = f"{self.name}_partials"
        self.check(
            getattr(self.handle, call)(ctypes.byref(problem), *map(ctypes.byref, parts)), call
        )
        return parts[0].value, parts[1].value

    def check(self, status: int, call: str) -> None:
        """Raise KernelError where a call did not return OK."""
        if status:
            raise KernelError(f"{call}: {self.handle.fxfuse_last_error().decode()}")


def enqueue(entry: Callable[..., int], device: int, *arguments: Any) -> int:
    """What `entry(*arguments, stream)` returns, for the current stream of `device`."""
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
    if torch._C._cuda_getDevice() == device:
        return entry(*arguments, stream)
    with torch.cuda.device(device):
        return entry(*arguments, stream)


def in_double(
    dtype: torch.dtype, operands: Sequence[OperandLayout], output_dtypes: Sequence[torch.dtype]
) -> bool:
    """Whether a problem is computed in float64: where its accumulator, an operand or an output is.

    Its sums are float64, too.
    """
    return torch.float64 in (dtype, *output_dtypes, *(o.dtype for o in operands))


def _directory() -> Path:
    return Path(os.environ.get("FXFUSE_LIBRARY_DIR", Path(__file__).parent / "lib"))


def _open(name: str) -> Library:
    path = _directory() / f"lib{name}{'.dylib' if sys.platform == 'darwin' else '.so'}"
    if not path.exists():
        raise LibraryError(f"{path} does not exist; build it with ./scripts/build")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded: {error}") from None
    return Library(name, path, handle)


@functools.lru_cache(maxsize=8)
def find(name: str) -> Library | LibraryError:
    """The kernel library `name` ("fxfuse_cpu" or "fxfuse_cuda"), or why there is none.

    The first time a library is missing or does not fit, a warning says that the reference is used
    in its place.
    """
    try:
        library = _open(name)
    except LibraryError as error:
        warnings.warn(f"fxfuse runs without {name}, on torch ops: {error}", stacklevel=2)
        return error
    if name == "fxfuse_cpu":
        _share_thread_pool(library)
    return library


def _share_thread_pool(library: Library) -> None:
    """Have the library run on the threads torch's OpenMP already keeps.

    A second pool would compete with torch's, whose threads spin for a while after each of its own
    loops.
    """
    entry = _loaded_openmp()
    if entry is not None:
        library.handle.fxfuse_cpu_set_parallel(entry)


def _loaded_openmp() -> ctypes.c_void_p | None:
    """Address of GOMP_parallel in the OpenMP runtime torch has loaded."""
    candidates = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
        loaded = [line.split()[-1] for line in mapped if "omp" in line.rsplit("/", 1)[-1]]
        candidates += [Path(p) for p in dict.fromkeys(loaded)]
    except OSError:
        pass
    for path in candidates:
        try:
            # Already in the process: this only finds the handle.
            runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOW | getattr(os, "RTLD_NOLOAD", 0))
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
