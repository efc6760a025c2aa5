"""Time the splitting of fp32 matrices into fp16 planes, on the device alone.

Calls are captured in a CUDA graph, rotated over matrices larger than the L2 together, and replayed.
The bytes are those of one read of the matrix and one write of the planes, whatever a kernel does;
the share is of what torch's elementwise kernel moves that negates 1 GB.

    python scripts/bench_split.py [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_routes import device_ms, write_table

from fxfuse import library
from fxfuse.errors import LibraryError
from fxfuse.split import Planes, split

Make = Callable[[], torch.Tensor]


def rows(m: int, k: int) -> Make:
    """A matrix with adjacent columns."""
    return partial(torch.randn, m, k, device="cuda")


def turned(m: int, k: int) -> Make:
    """A matrix with adjacent rows."""
    return lambda: torch.randn(k, m, device="cuda").t()


def unaligned(m: int, k: int) -> Make:
    """Rows at no multiple of 16 bytes."""
    return lambda: torch.randn(m, k + 1, device="cuda")[:, 1:]


CASES: dict[str, tuple[Make, ...]] = {
    "8192x8192": (rows(8192, 8192),),
    "1024x8192": (rows(1024, 8192),),
    "8192x8192 and 1024x8192": (rows(8192, 8192), rows(1024, 8192)),
    "1024x1024": (rows(1024, 1024),),
    "4096x4096": (rows(4096, 4096),),
    "4096x5000": (rows(4096, 5000),),
    "4096x11008": (rows(4096, 11008),),
    "4096x16384": (rows(4096, 16384),),
    "4096x28672": (rows(4096, 28672),),
    "1024x65536": (rows(1024, 65536),),
    "65536x768": (rows(65536, 768),),
    "1048576x64": (rows(1 << 20, 64),),
    "8192x8192 unaligned": (unaligned(8192, 8192),),
    "8192x8191": (rows(8192, 8191),),
    "8192x1024 turned": (turned(8192, 1024),),
    "two 8192x1024 turned": (turned(8192, 1024), turned(8192, 1024)),
    "8192x2048 turned": (turned(8192, 2048),),
    "8192x4096 turned": (turned(8192, 4096),),
    "8192x8192 turned": (turned(8192, 8192),),
    "3072x768 turned": (turned(3072, 768),),
    "768x3072 turned": (turned(768, 3072),),
}


def bandwidth() -> float:
    """Bytes per second, read and written, of an elementwise kernel over 1 GB."""
    source = torch.randn(1 << 28, device="cuda")
    to = torch.empty_like(source)
    calls = [lambda: torch.neg(source, out=to)] * 8
    device_ms(calls)  # a GPU at rest takes a while to reach its clocks
    return 2 * source.nbytes / device_ms(calls) * 1e3


def measure(make: tuple[Make, ...], planes: int) -> tuple[float, int]:
    """Milliseconds of a call, and the bytes it must move."""
    first = [m() for m in make]
    outs = split(*first, planes=planes)
    size = sum(m.numel() * m.element_size() for m in first) + sum(o.plane.nbytes for o in outs)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(64, 2 + 3 * l2 // size)
    given = [first] + [[m() for m in make] for _ in range(count - 1)]
    kept: list[tuple[Planes, ...]] = [outs] * count  # else the graph reuses one result's memory

    def call(i: int) -> None:
        kept[i] = split(*given[i], planes=planes)

    return device_ms([partial(call, i) for i in range(count)]), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    if isinstance(found := library.find("fxfuse_cuda"), LibraryError):
        raise SystemExit(f"nothing to time: {found}")
    torch.manual_seed(0)
    attainable = bandwidth()
    print(f"{torch.cuda.get_device_name()}, elementwise {attainable / 1e9:.0f} GB/s")
    lines = []
    for name, make in CASES.items():
        for planes in (1, 2):
            ms, size = measure(make, planes)
            rate = size / ms * 1e3
            lines.append({"matrices": name, "planes": planes, "ms": ms, "GB/s": rate / 1e9})
            share = rate / attainable
            print(f"{name:26} {planes} {ms:8.4f} ms {rate / 1e9:6.0f} GB/s {share:5.0%}")
    if arguments.json:
        write_table(arguments.json, **{"elementwise GB/s": attainable / 1e9}, lines=lines)


if __name__ == "__main__":
    main()
