"""What the kernels of wrappers.cu are given, by the shim and by a GPU."""

from pathlib import Path

import numpy as np

from paged_attn import compile as kernels


def wrappers_source() -> str:
    """mma.cuh with all that it includes, and wrappers.cu."""
    return kernels.load_source("mma.cuh") + Path(__file__).with_name("wrappers.cu").read_text(encoding="utf-8")


def warp_arrays(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """a [16, 16], b [16, 8] of small integers (exact in float32), sums [4], and the arrays to be written."""
    random = np.random.default_rng(7)
    a, b = (random.integers(-8, 9, shape).astype(dtype) for shape in ((16, 16), (16, 8)))
    sums = np.zeros(1, "V16")  # aligned to 16
    sums.view(np.float32)[:] = np.arange(1, 5)
    out = {
        "fragment": np.zeros((32, 4, 2), dtype),
        "transposed": np.zeros((32, 4, 2), dtype),
        "turned": np.zeros((32, 2), dtype),
        "c": np.zeros((16, 8), np.float32),
        "counter": np.array([3], np.uint32),
        "tickets": np.zeros(32, np.uint32),
        "loaded": np.zeros(6, np.float32),
        "moved": np.zeros(6, np.float32),
        "places": np.zeros(3, "V16"),
        "shared": np.zeros(8, np.uint32),
    }
    return a, b, sums.view(np.float32), out


def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Every 16-bit pattern, and as many floats: all exponents, ties, neighbours of ties, and the special ones."""
    random = np.random.default_rng(3)
    bits = np.arange(65536).astype(np.uint16)
    x = random.integers(0, 2**32, 65536, np.uint32)
    x[:16384] = random.integers(0x3280_0000, 0x4800_0000, 16384)  # where half has its numbers
    x[4096:12288] = x[4096:12288] & 0xFFFF_F000 | 0x1000  # ties of half
    x[8192:9216] += 1
    x[9216:10240] -= 1
    x[16384:24576] = x[16384:24576] & 0xFFFF_0000 | 0x8000  # ties of bfloat16
    x[20480:21504] += 1
    x[21504:22528] -= 1
    x[-9:] = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520, 2**-24, 2**-25], np.float32).view(np.uint32)
    return bits, x.view(np.float32)


def number_arrays(count: int) -> dict[str, np.ndarray]:
    """The arrays that number_wrappers writes."""
    functions = {name: np.zeros(count, np.float32) for name in ("widened", "exp2", "log2", "tanh")}
    return functions | {"narrowed": np.zeros(count, np.uint16), "packed": np.zeros(count, np.uint32)}
