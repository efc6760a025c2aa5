"""The CUDA kernels' own source, run on the host (kernels/cuda/emulation.h): no GPU is needed, but
the build directory of a build with nvcc."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGET = "fxfuse_cuda_emulation"


def built_with_cuda() -> Path | None:
    """The newest build directory that has CUDA in it."""
    caches = sorted(ROOT.glob("build/*/CMakeCache.txt"), key=lambda p: p.stat().st_mtime)
    with_cuda = [c for c in caches if "FXFUSE_CUDA:BOOL=ON" in c.read_text()]
    return with_cuda[-1].parent if with_cuda else None


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_are_right_on_the_host():
    build = built_with_cuda()
    if build is None:
        pytest.skip("there is no build with nvcc")
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    assert cmake is not None
    run(cmake, "--build", build, "--target", TARGET)
    lines = run(build / "cuda" / TARGET).splitlines()
    assert len(lines) > 150
    assert [line for line in lines if not line.startswith("ok")] == []
