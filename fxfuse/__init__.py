"""fxfuse: every Linear of an unmodified PyTorch model, and the pointwise work after it, as one
call into a precompiled kernel."""

from __future__ import annotations

from . import fused
from .api import optimize
from .errors import (
    FileError,
    FxfuseError,
    InputError,
    KernelError,
    LibraryError,
    NotFusedError,
    OperandShapeError,
    ProgramError,
)
from .freeze import freeze, unfreeze
from .report import Report, report
from .verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "FileError",
    "FxfuseError",
    "InputError",
    "KernelError",
    "LibraryError",
    "NotFusedError",
    "OperandShapeError",
    "ProgramError",
    "Report",
    "Verification",
    "freeze",
    "fused",
    "optimize",
    "report",
    "unfreeze",
    "verify",
]
