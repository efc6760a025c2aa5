"""Which of our CUDA kernels, or cuBLAS, is the fastest for a product, by measurements."""

from __future__ import annotations

# From so many rows of x on do two planes of it and of the weight pay: a frozen weight, any other.
_PLANES_ROWS = {(8, 0): (64, 128), (9, 0): (17, 17), (10, 0): (64, 128)}


def prefers_skinny(m: int, n: int, k: int, frozen_weight: bool = False) -> bool:
    """Whether an fp32 product in fp32 is faster by our kernels for few rows than by cuBLAS, or on
    planes.

    They take up to 32 rows (kSkinnyMaxM). The limits are those of benchmarks/h200_fp32.json,
    measured by scripts/bench_fp32.py: a vector times a small weight is as fast in cuBLAS, and from
    17 rows on planes of a large frozen weight are faster.
    """
    if m > 16:
        return m <= 32 and n * k >= 2**18 and not (frozen_weight and n * k >= 2**22)
    return n * k >= (2**22 if m == 1 else 2**18)


def prefers_planes(
    precision: str,
    m: int,
    n: int,
    k: int,
    frozen_weight: bool,
    capability: tuple[int, int] = (9, 0),
) -> bool:
    """Whether an fp32 product is faster on planes than in cuBLAS, on a GPU of `capability`.

    precision: "high", where planes halve the time of a product in TF32 (390 TFLOP/s on an H200,
    the only GPU that takes it so); "highest", where they take a fifth of that in fp32 (51). They
    cost a read of either matrix and half a write, or a whole one, at 4.1 TB/s, and that pays from
    so many rows of the other on.

    Elsewhere "highest" goes by data sheets, with twice the rows: fp16 products reach 312 TFLOP/s
    where fp32 has 19.5 (sm_80), 2250 where it has 80 (sm_100, of which mma.sync gets a part), so
    that three of them win. The portable route adds up twice as often as Hopper's, so that sums of
    positive terms lose more than cuBLAS's where K is beyond 4096: there cuBLAS stays. The rest
    (8.6, 8.7, 8.9, 12.x) multiply fp16 with sums in fp32 only 2 to 4 times as fast as fp32: three
    products do not pay.
    """
    if precision == "highest":
        if capability not in _PLANES_ROWS:
            return False
        # Of a shorter K cuBLAS's sums in fp32 are the more accurate ones, and a small product is a
        # matter of launches.
        large = k > 64 and n * k >= 2**18
        if capability != (9, 0) and k > 4096:
            return False
        return large and m >= _PLANES_ROWS[capability][0 if frozen_weight else 1]
    return capability == (9, 0) and n >= 768 and m >= (128 if frozen_weight else 768)


def preferred_route(capability: tuple[int, int], m: int, n: int, k: int, bits: int = 16) -> str:
    """The faster of our GEMM ("auto") and cuBLAS plus a pointwise kernel ("cublas").

    bits: of the inputs, 32 for products in TF32. Below sm_90 always ours. On sm_90 the limits are
    those of benchmarks/h200_routes.json, measured by scripts/bench_routes.py.
    """
    if capability[0] != 9:
        return "auto"
    if bits == 32:
        return "auto" if m <= 32 or m * n * k <= 2**27 else "cublas"
    if m > 64 and (n % 8 or (k % 64 and k > 2560)):
        return "cublas"  # our tiles would store by element, or read rows from inside a cache line
    if m < 16 and k >= 16 * n:
        return "cublas"  # all of the time goes into adding up what many blocks have of K
    # Few tiles and a long K: cuBLAS divides K with less to add up, but for the longest.
    few_tiles = m >= 256 and -(-m // 128) * -(-n // 128) <= 64
    return "cublas" if few_tiles and k > 4 * n and (m > 512 or k < 16 * n) else "auto"
