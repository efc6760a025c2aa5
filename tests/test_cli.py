"""The command line: what it prints, and what it says about files it cannot use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxfuse import cli

ROOT = Path(__file__).resolve().parent.parent

GOOD = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.linear = nn.Linear(n, n)

    def forward(self, x):
        return torch.relu(self.linear(x))

def get_inputs():
    return [torch.rand(4, 16)]

def get_init_inputs():
    return [16]
"""


@pytest.fixture
def model_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "net.py"
        path.write_text(text)
        return path

    return write


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run the command line, expect it to fail as it should, and return its one line."""
    assert cli.main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fxfuse: error: ")
    return captured.err.removeprefix("fxfuse: error: ").strip()


@pytest.mark.parametrize("command", ["report", "bench"])
def test_missing_file_is_named(command: str, capsys, tmp_path: Path) -> None:
    path = tmp_path / "absent.py"
    assert failure(capsys, command, path) == f"{path}: no such file"


@pytest.mark.parametrize("command", ["report", "bench"])
def test_file_without_model_says_what_is_missing(command: str, capsys, model_file) -> None:
    path = model_file("def get_inputs():\n    return []\n")
    assert failure(capsys, command, path) == (
        f"{path}: does not define Model and get_init_inputs(); "
        "a model file defines Model, get_inputs() and get_init_inputs()"
    )


def test_file_that_does_not_run_gives_its_error(capsys, model_file) -> None:
    path = model_file("import nonexistent_module\n")
    assert failure(capsys, "report", path) == (
        f"{path}: running it raised ModuleNotFoundError: No module named 'nonexistent_module'"
    )


def test_model_that_is_no_module_is_refused(capsys, model_file) -> None:
    path = model_file(
        GOOD.replace("class Model(nn.Module)", "class Net(nn.Module)") + "Model = int\n"
    )
    message = failure(capsys, "report", path)
    assert message == f"{path}: Model is a int, not a torch.nn.Module"


def test_model_that_rejects_its_arguments_is_named(capsys, model_file) -> None:
    path = model_file(GOOD.replace("return [16]", "return []"))
    message = failure(capsys, "report", path)
    assert message.startswith(f"{path}: Model(*get_init_inputs()) raised TypeError: ")


def test_inputs_that_are_no_list_are_refused(capsys, model_file) -> None:
    path = model_file(GOOD.replace("return [torch.rand(4, 16)]", "return 3"))
    assert failure(capsys, "report", path) == f"{path}: get_inputs() returned a int, not a list"


def test_inputs_the_model_cannot_take_are_named(capsys, model_file) -> None:
    path = model_file(GOOD.replace("torch.rand(4, 16)", "torch.rand(4, 15)"))
    message = failure(capsys, "report", path)
    assert message.startswith(f"{path}: Model on get_inputs() raised RuntimeError: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys, model_file) -> None:
    message = failure(capsys, "report", model_file(GOOD), "--device", "cuda")
    assert message == f"--device cuda: torch {torch.__version__} sees no CUDA device"


def test_report_prints_the_chain(capsys, model_file) -> None:
    assert cli.main(["report", str(model_file(GOOD))]) == 0
    assert "relu" in capsys.readouterr().out


def test_report_as_json_is_json(capsys, model_file) -> None:
    assert cli.main(["report", str(model_file(GOOD)), "--json"]) == 0
    assert "relu" in json.dumps(json.loads(capsys.readouterr().out))


def test_bench_names_contestants_and_units(capsys, model_file) -> None:
    path = str(model_file(GOOD))
    assert cli.main(["bench", path, "--contestants", "eager,gemm,fxfuse", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["unit"] == "seconds"
    rows = {row["name"]: row for row in result["contestants"]}
    assert list(rows) == ["eager", "gemm", "fxfuse"]
    assert rows["fxfuse"]["error"] <= rows["eager"]["error"] + 1e-7


def test_unknown_contestant_is_refused(capsys, model_file) -> None:
    message = failure(capsys, "bench", model_file(GOOD), "--contestants", "eager,triton")
    assert message == (
        "--contestants: 'triton' is none of eager, compile, compile-max, gemm, fxfuse"
    )


def test_same_initial_values_in_every_run(model_file) -> None:
    path = model_file(GOOD)
    first, _ = cli.load_model(path)
    second, _ = cli.load_model(path)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert not first.training


def test_dtype_reaches_weights_and_floating_inputs(model_file) -> None:
    text = GOOD.replace("[torch.rand(4, 16)]", "[(torch.rand(4, 16), torch.arange(3))]")
    model, ((x, index),) = cli.load_model(model_file(text), dtype=torch.bfloat16)
    assert (x.dtype, index.dtype) == (torch.bfloat16, torch.int64)
    assert model.linear.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_follow_the_convention_at_any_size(example: Path) -> None:
    module = cli.load_file(example)
    model = module.Model(*module.get_init_inputs(32, 256))
    (x,) = module.get_inputs(4, 32)
    assert model(x).shape == (4, 256)
    assert module.get_init_inputs()[:2] == [8192, 8192]


def test_module_is_a_command(tmp_path: Path) -> None:
    path = tmp_path / "absent.py"
    run = subprocess.run(
        [sys.executable, "-m", "fxfuse", "report", path], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr == f"fxfuse: error: {path}: no such file\n"
