"""Imports run one way, and the kernels know neither torch nor Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fxfuse

PACKAGE = Path(fxfuse.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

# Each module may import those before it.
ORDER = """
ambient clone errors formulas frozen module ops preferences proxies timing cli program traits verify
__main__ derivatives norms lower reference schedule simplify vjp spellings tracer capture library
split patterns graphs layout transparent anchors infer groups routes cuda match keep recipes
backward plan torch_ops accumulate autograd fused rewrite freeze report observe api
""".split()  # noqa: SIM905
# Imported where it is needed only: the CUDA routes register themselves with nobody.
LATE = {("routes", "cuda")}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxfuse."):
            names.add(str(node.module).split(".")[1])
    return names


def test_every_module_has_its_place():
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


def test_imports_run_one_way():
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        (name, other)
        for name in ORDER
        for other in imports(PACKAGE / f"{name}.py")
        if other in place and place[other] >= place[name] and (name, other) not in LATE
    ]
    assert wrong == []


def test_kernels_know_neither_torch_nor_python():
    sources = [p for kind in ("*.h", "*.cc", "*.cu", "*.cuh", "*.def") for p in KERNELS.rglob(kind)]
    assert sources
    banned = re.compile(
        r"#include\s*[<\"](torch|ATen|c10|Python\.h|pybind11|nanobind|cutlass|cublas)"
    )
    assert [p for p in sources if banned.search(p.read_text())] == []


def test_files_stay_readable():
    long = {p.name: n for p in PACKAGE.glob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}


def test_every_kernel_awaits_its_turn():
    # One that did not would read what the kernel before it has yet to write.
    for path in sorted((KERNELS / "cuda").glob("*.cu*")):
        if path.name == "tune.cu":  # a program of its own, whose kernels `Launch` does not launch
            continue
        text = path.read_text()
        assert text.count("await_turn();") >= text.count("__global__"), path.name
    assert "await_turn();" in (KERNELS / "cuda" / "hopper_producer.cuh").read_text()
