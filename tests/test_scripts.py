"""The scripts' Python parts, and the timing helper they share with the command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfuse import timing

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def results() -> dict:
    rows = [
        {"name": "eager", "median_ms": 2.0, "relative_error": 3e-7},
        {"name": "compile", "note": "RuntimeError: no compiler"},
        {"name": "fxfuse", "median_ms": 1.0, "relative_error": 1e-7},
    ]
    size = {"batch": 4, "in_features": 8, "out_features": 16}
    return {
        "environment": {
            "device": "cpu",
            "cpu": "A CPU",
            "threads": 2,
            "simd": "AVX2",
            "torch": "2.13.0",
            "date": "2026-01-31",
        },
        "models": [{"model": "add_relu", "dtype": "float32", **size, "contestants": rows}],
        "host_overhead": None,
        "optimize": [{"linears": 200, "seconds": 0.5}],
        "portable": [],
    }


def test_benchmark_section_shows_times_errors_and_gaps() -> None:
    section = load_script("readme_tables").benchmark_section(results())
    assert "A CPU, 2 threads, AVX2, torch 2.13.0, 2026-01-31; medians." in section
    line = next(line for line in section.splitlines() if "add-relu" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["add-relu", "float32", "2.000", "-", "1.000", "3.0e-07", "1.0e-07"]
    assert "`optimize()` by number of Linears: 0.50 s for 200." in section


def test_training_section_shows_times_memory_and_the_worst_gradient() -> None:
    script = load_script("readme_tables")
    rows = [
        {
            "name": n,
            "median_ms": ms,
            "kept_mb": 8.4,
            "gradient_errors": {"input": e, "weight": 2 * e},
        }
        for n, ms, e in (("eager", 20.0, 1e-6), ("fxfuse", 15.0, 5e-7))
    ]
    rows.append({"name": "compile", "note": "RuntimeError: no compiler"})
    found = results()
    entry = {**found["models"][0], "contestants": rows}
    text = script.training_section({"environment": found["environment"], "training": [entry]})
    assert "| 20 " in text
    assert "2.0e-06" in text
    assert "1.0e-06" in text
    assert "kept MB: fxfuse" in text
    assert script.training_section(None) == "Not measured yet."


def test_readme_parts_are_replaced_between_their_markers() -> None:
    script = load_script("readme_tables")
    text = "a\n<!-- benchmarks:nothing -->\nold\n<!-- /benchmarks:nothing -->\nb\n"
    wanted = text.replace("old", "Not measured yet.")
    assert script.regenerate(text) == wanted
    assert script.regenerate(wanted) == wanted


def test_readme_without_an_end_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="exactly one <!-- benchmarks:x --> and one"):
        load_script("readme_tables").regenerate("<!-- benchmarks:x -->\n")


def test_readme_is_up_to_date() -> None:
    script = ROOT / "scripts" / "readme_tables.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["bench", "bench_training", "demo", "readme_tables"])
def test_script_prints_its_help(name: str) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", "--help"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout


def test_measure_returns_ordered_percentiles_for_every_contestant() -> None:
    calls = {"a": lambda x: x + 1, "b": lambda x: x * 2}
    times = timing.measure(calls, [(torch.ones(4),)], seconds=0.01, min_rounds=3, max_rounds=3)
    assert list(times) == ["a", "b"]
    for one in times.values():
        assert 0 < one.p10 <= one.median <= one.p90
        assert one.runs >= 3


def test_measure_rotates_through_the_input_sets() -> None:
    seen = []
    sets = [(torch.full((1,), float(i)),) for i in range(3)]
    timing.measure({"a": lambda x: seen.append(x.item())}, sets, seconds=0.0, max_rounds=5)
    assert seen[:6] == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]


def test_relative_error_is_the_frobenius_norm_over_all_outputs() -> None:
    truth = (torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
    assert timing.relative_error((torch.tensor([3.0]), torch.tensor([4.0])), truth) == 0.0
    assert timing.relative_error((torch.tensor([3.0]), torch.tensor([4.5])), truth) == 0.1


def test_compare_gives_times_and_errors_and_names_what_failed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    names = ("eager", "gemm", "fxfuse")
    rows = timing.compare(model, broken, (torch.randn(4, 8),), names, rows=2, seconds=0.01)
    eager, gemm, fxfuse = rows
    assert [row.name for row in rows] == list(names)
    assert eager.timing is not None
    assert eager.error is not None
    assert eager.error < 1e-6
    assert gemm.timing is not None
    assert gemm.error is None
    assert fxfuse.timing is None
    assert fxfuse.note == "RuntimeError: no kernel"


def test_bare_gemms_replays_every_gemm_and_nothing_else() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.linear(x)) @ self.weight.T + F.linear(x, self.weight)

    recorder = timing._GemmRecorder()
    with recorder, torch.no_grad():
        Net()(torch.randn(2, 4))
    assert len(recorder.calls) == 3


def test_model_without_a_gemm_has_no_bare_gemm() -> None:
    with pytest.raises(ValueError, match="the model runs no Linear"):
        timing.bare_gemms(nn.ReLU(), [(torch.randn(2, 2),)])


def test_matmul_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with timing.matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
