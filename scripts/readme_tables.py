"""Writes the generated parts of README.md: the quickstart's output and the benchmark tables.

A part lies between `<!-- NAME -->` and `<!-- /NAME -->`. `report` is what the code between the
`quickstart` markers prints; `benchmarks:NAME`, `training:NAME` and `fp32:NAME` are made from
benchmarks/NAME.json.

    python scripts/readme_tables.py           rewrite README.md
    python scripts/readme_tables.py --check   fail, and say what is stale, without writing
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "eager": "eager",
    "compile": "torch.compile",
    "compile-max": "max-autotune",
    "gemm": "bare GEMM",
    "fxfuse": "fxfuse",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail when README.md is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = regenerate(text)
    if wanted == text:
        return 0
    if not check:
        readme.write_text(wanted)
        return 0
    lines = difflib.unified_diff(
        text.splitlines(), wanted.splitlines(), "README.md", "generated", lineterm="", n=1
    )
    print("\n".join(lines))
    print("README.md is out of date; run `python scripts/readme_tables.py`", file=sys.stderr)
    return 1


def regenerate(text: str) -> str:
    """Return the README's text with every generated part made anew."""
    sections = {"benchmarks": benchmark_section, "training": training_section, "fp32": fp32_section}
    for kind, section in sections.items():
        for name in re.findall(rf"<!-- {kind}:([\w-]+) -->", text):
            path = ROOT / "benchmarks" / f"{name}.json"
            results = json.loads(path.read_text()) if path.exists() else None
            text = _replace(text, f"{kind}:{name}", section(results))
    if "<!-- report -->" in text:
        text = _replace(text, "report", f"```text\n{quickstart_output(text)}\n```")
    return text


def quickstart_output(text: str) -> str:
    """Return what the README's quickstart prints when run on the CPU. Raises if it fails."""
    match = re.search(r"<!-- quickstart -->\s*```python\n(.*?)```", text, re.DOTALL)
    if match is None:
        raise ValueError("README.md has a report but no <!-- quickstart --> code block")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", match[1]], capture_output=True, text=True, env=environment
    )
    if run.returncode:
        raise RuntimeError(f"the README's quickstart fails:\n{run.stderr}")
    return "\n".join(line.rstrip() for line in run.stdout.rstrip().splitlines())


def benchmark_section(results: dict[str, Any] | None) -> str:
    """Return the tables of one benchmark file as Markdown."""
    if results is None:
        return "Not measured yet."
    parts = [_measured_on(results["environment"])]
    for shape in dict.fromkeys(_shape(entry) for entry in results["models"]):
        entries = [entry for entry in results["models"] if _shape(entry) == shape]
        parts.append(f"{shape}, milliseconds; errors against float64:\n\n{_model_table(entries)}")
    if entry := results["host_overhead"]:
        parts.append(
            f"Host time of one fused call: {entry['fused_call_us']:.1f} µs; of `F.linear` plus "
            f"`F.relu`: {entry['functions_us']:.1f} µs. Called as modules: "
            f"{entry['fxfuse_us']:.1f} µs and {entry['eager_us']:.1f} µs."
        )
    if results["portable"]:
        shares = (
            f"{entry['fraction_of_cublas']:.0%} ({_shape(entry)}, {entry['dtype']})"
            for entry in results["portable"]
        )
        parts.append(f"Portable GEMM with its epilogue against cuBLAS alone: {', '.join(shares)}.")
    if results["optimize"]:
        times = (f"{e['seconds']:.2f} s for {e['linears']}" for e in results["optimize"])
        parts.append(f"`optimize()` by number of Linears: {', '.join(times)}.")
    return "\n\n".join(parts)


def fp32_section(results: dict[str, Any] | None) -> str:
    """Return the table of errors of fp32 products and a word on their speed, as Markdown."""
    if results is None:
        return "Not measured yet."
    deepest = 8192
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for line in results["errors"]:
        if line["k"] == deepest:
            rows.setdefault(line["family"], {})[line["precision"]] = line
    headers = ["x", 'SGEMM ("highest")', "fxfuse", 'TF32 ("high")', "fxfuse"]
    body = [
        [family, *(f"{of[p][who]:.1e}" for p in ("highest", "high") for who in _PEERS)]
        for family, of in rows.items()
    ]
    many = [line for line in results["lines"] if line["m"] >= 128]
    speeds = []
    for name, words in (("auto", "converted at each call"), ("frozen", "frozen")):
        ratios = [line["eager_ms"] / line[f"{name}_ms"] for line in many]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        speeds.append(f"{mean:.1f} times (at least {min(ratios):.1f}) with weights {words}")
    return (
        f"{results['gpu']}, torch {results['torch']}. Error of a product against float64, in norm, "
        f"256 x {deepest} -> 1024:\n\n"
        + tabulate(body, headers, tablefmt="github", disable_numparse=True)
        + f"\n\nLinear and GELU at full precision, {len(many)} shapes of 128 rows or more, eager's "
        f"time over ours, geometric mean: {' and '.join(speeds)}."
    )


_PEERS = ("cublas", "fxfuse")


def training_section(results: dict[str, Any] | None) -> str:
    """Return the table of one training benchmark as Markdown."""
    if results is None:
        return "Not measured yet."
    names = ("eager", "compile", "fxfuse")
    memory = "peak_mb" if results["environment"]["device"] == "cuda" else "kept_mb"
    word = "peak" if memory == "peak_mb" else "kept"
    headers = ["model", "dtype", *(TITLES[n] for n in names)]
    headers += [f"{word} MB: {TITLES[n]}" for n in names]
    headers += [f"error: {TITLES[n]}" for n in ("eager", "fxfuse")]
    body = []
    for entry in results["training"]:
        rows = {row["name"]: row for row in entry["contestants"]}
        cells = [entry["model"].replace("_", "-"), entry["dtype"]]
        cells += [_number(rows.get(n, {}).get("median_ms"), "{:.3g}") for n in names]
        cells += [_number(rows.get(n, {}).get(memory), "{:.0f}") for n in names]
        worst = [max(rows[n].get("gradient_errors", {"": 0}).values()) for n in ("eager", "fxfuse")]
        body.append([*cells, *(f"{e:.1e}" for e in worst)])
    shapes = dict.fromkeys(_shape(entry) for entry in results["training"])
    table = tabulate(body, headers, tablefmt="github", disable_numparse=True)
    return (
        f"{_measured_on(results['environment'])}\n\n{', '.join(shapes)}, milliseconds of forward "
        f"and backward; the largest error of any gradient against float64:\n\n{table}"
    )


def _measured_on(environment: dict[str, Any]) -> str:
    if environment["device"] == "cuda":
        where = f"{environment['gpu']}, CUDA {environment['cuda']}"
    else:
        where = f"{environment['cpu']}, {environment['threads']} threads, {environment['simd']}"
    return f"{where}, torch {environment['torch']}, {environment['date']}; medians."


def _model_table(entries: list[dict[str, Any]]) -> str:
    names = [row["name"] for row in entries[0]["contestants"]]
    headers = ["model", "dtype", *(TITLES[name] for name in names), "eager error", "fxfuse error"]
    body = []
    for entry in entries:
        rows = {row["name"]: row for row in entry["contestants"]}
        times = [_number(rows.get(name, {}).get("median_ms"), "{:.3f}") for name in names]
        errors = [_number(rows.get(n, {}).get("relative_error"), "{:.1e}") for n in _WITH_ERROR]
        body.append([entry["model"].replace("_", "-"), entry["dtype"], *times, *errors])
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


_WITH_ERROR = ("eager", "fxfuse")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _shape(entry: dict[str, Any]) -> str:
    return f"{entry['batch']} x {entry['in_features']} -> {entry['out_features']}"


def _replace(text: str, name: str, content: str) -> str:
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md needs exactly one {start} and one {end}")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{content}\n{end}{after}"


if __name__ == "__main__":
    raise SystemExit(main())
