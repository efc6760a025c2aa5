"""Everything fxfuse raises on purpose. Messages name the call, the value and the limit."""

from __future__ import annotations


class FxfuseError(Exception):
    """Base class of all fxfuse errors."""


class InputError(FxfuseError, TypeError):
    """An argument of a public call has a type or value that call cannot take."""


class ProgramError(FxfuseError, ValueError):
    """An epilogue program is malformed or exceeds what a kernel can hold."""


class NotFusedError(FxfuseError):
    """`optimize(..., strict=True)` met a Linear that was not fused."""


class OperandShapeError(FxfuseError, RuntimeError):
    """An operand does not broadcast against the matrix a fused call works on."""


class LibraryError(FxfuseError, ImportError):
    """A kernel library is missing, or was built from other sources than this package."""


class KernelError(FxfuseError, RuntimeError):
    """A kernel library refused or failed a call it should have served."""


class FileError(FxfuseError):
    """A model file given on the command line does not follow the convention."""
