"""Describe and run small problems on libfxfuse_cpu straight through its C interface."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import fxfuse
from fxfuse.library import DTYPES, POINTER_OPERAND, POINTER_OUTPUT, Pointers, ProblemStruct

PREVIOUS = (0, 0)


def slot(index: int) -> tuple[int, int]:
    return (1, index)


def operand(index: int) -> tuple[int, int]:
    return (2, index)


def immediate(index: int) -> tuple[int, int]:
    return (3, index)


@dataclass(frozen=True)
class Step:
    """One instruction: `args` are (source, index) pairs, `values` its immediates."""

    op: str
    args: tuple[tuple[int, int], ...] = (PREVIOUS,)
    values: tuple[float, ...] = ()
    save: int = -1
    store: int = -1


@dataclass(frozen=True)
class Layout:
    """A tensor's memory read as an operand: see fxfuse_operand."""

    data: torch.Tensor
    row_stride: int
    column_stride: int
    repeat: int = 1
    period: int = 1 << 40


def layout(data: torch.Tensor) -> Layout:
    """The layout of a tensor that broadcasts against the matrix: 0-d, [N], [M, 1] or [M, N]."""
    if data.dim() < 2:
        return Layout(data, 0, data.dim())
    return Layout(data, data.stride(0), 0 if data.shape[1] == 1 else data.stride(1))


def path() -> Path:
    """Where the package looks for the library."""
    default = Path(fxfuse.__file__).parent / "lib"
    return Path(os.environ.get("FXFUSE_LIBRARY_DIR", default)) / "libfxfuse_cpu.so"


class Cpu:
    """libfxfuse_cpu, apart from the package's own handling of it."""

    def __init__(self) -> None:
        self.handle = ctypes.CDLL(str(path()))
        for name in ("build_info", "last_error", "opcode_name", "cpu_isa"):
            getattr(self.handle, f"fxfuse_{name}").restype = ctypes.c_char_p
        self.handle.fxfuse_problem_size.restype = ctypes.c_int64
        self.handle.fxfuse_cpu_set_parallel.argtypes = [ctypes.c_void_p]
        count = self.handle.fxfuse_opcode_count()
        self.names = [self.handle.fxfuse_opcode_name(i).decode() for i in range(count)]

    def set_isa(self, name: str) -> bool:
        return self.handle.fxfuse_cpu_set_isa(name.encode()) == 0

    def isa(self) -> str:
        return self.handle.fxfuse_cpu_isa().decode()

    def last_error(self) -> str:
        return self.handle.fxfuse_last_error().decode()

    def problem(
        self,
        steps: Sequence[Step],
        acc: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        operands: Sequence[Layout] = (),
    ) -> tuple[ProblemStruct, Pointers]:
        """The structs of a program over the matrix `acc` [M, N] that stores into `outputs`."""
        problem = ProblemStruct(m=acc.shape[0], n=acc.shape[1], lda=acc.stride(0))
        problem.input_dtype = DTYPES[acc.dtype]
        program = problem.program
        program.instruction_count, program.operand_count = len(steps), len(operands)
        program.output_count = len(outputs)
        program.slot_count = 1 + max(step.save for step in steps)
        pointers = Pointers()
        pointers[0] = acc.data_ptr()
        for target, step in zip(program.instruction, steps, strict=False):
            target.opcode, target.arity = self.names.index(step.op), len(step.args)
            target.save, target.store = step.save, step.store
            for i, (source, index) in enumerate(step.args):
                target.source[i], target.index[i] = source, index
            for i, value in enumerate(step.values):
                target.immediate[i] = value
        for i, given in enumerate(operands):
            target = program.operand[i]
            target.row_stride, target.column_stride = given.row_stride, given.column_stride
            target.repeat, target.period = given.repeat, given.period
            target.dtype = DTYPES[given.data.dtype]
            pointers[POINTER_OPERAND + i] = given.data.data_ptr()
        for i, output in enumerate(outputs):
            program.output[i].row_stride = output.stride(0)
            program.output[i].dtype = DTYPES[output.dtype]
            pointers[POINTER_OUTPUT + i] = output.data_ptr()
        return problem, pointers

    def call(self, problem: ProblemStruct, pointers: Pointers, threads: int = 1) -> int:
        """The status."""
        return self.handle.fxfuse_cpu_run(ctypes.byref(problem), pointers, threads)

    def run(
        self,
        steps: Sequence[Step],
        acc: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        operands: Sequence[Layout] = (),
        threads: int = 1,
    ) -> None:
        status = self.call(*self.problem(steps, acc, outputs, operands), threads)
        assert status == 0, self.last_error()
