"""Times of calls on one GPU, each after a clean flush of the L2 cache; and the read floor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLUSH_BYTES = 256 * 2**20
VECTOR_BYTES = 16
WARM_UP_CALLS = 3
FLOOR_TRIALS = 5


@dataclass(frozen=True)
class Times:
    """Microseconds of repeated calls: on the device between two events, and on the host until the call returned."""

    device: tuple[float, ...]
    host: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Median, 10th and 90th percentile and minimum on the device; median on the host. All in microseconds."""
        low, median, high = np.percentile(self.device, (10, 50, 90))
        figures = {"median": median, "p10": low, "p90": high, "min": min(self.device), "host": np.median(self.host)}
        return {name: round(float(value), 2) for name, value in figures.items()}


class Stopwatch:
    """Times calls on CuPy's current stream of the current device."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._memory = Memory()
        self._written = cupy.empty(FLUSH_BYTES, np.uint8)
        self._read = cupy.empty(FLUSH_BYTES, np.uint8)

    def flush(self) -> None:
        """Write 256 MB, then read another 256 MB.

        That leaves nothing of the caller's in the L2 cache, and no dirty line whose write-back a timed call would pay.
        """
        self._memory.write(self._written)
        self._memory.read(self._read, FLUSH_BYTES)

    def interleave(self, calls: Mapping[str, Callable[[], object]], reps: int) -> dict[str, Times]:
        """Every call `reps` times, in turns, so that all see the same clocks.

        A flush runs longer than the host needs to enqueue the call after it, so the events hold device time only.
        """
        cupy = self._cupy
        for call in calls.values():
            for _ in range(WARM_UP_CALLS):
                call()
        cupy.cuda.get_current_stream().synchronize()
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        host: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(reps):
            for name, call in calls.items():
                self.flush()
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record()
                began = time.perf_counter()
                call()
                host[name].append((time.perf_counter() - began) * 1e6)
                end.record()
                end.synchronize()
                events[name].append((start, end))
        return {
            name: Times(tuple(cupy.cuda.get_elapsed_time(*pair) * 1e3 for pair in pairs), tuple(host[name]))
            for name, pairs in events.items()
        }

    def read_floor(self, buffer: Any, num_bytes: int) -> Callable[[], None]:
        """The fastest of a few plain 16-byte-load kernels over the first `num_bytes` of `buffer`, as a call."""

        def variant(unroll: int, block_size: int, block_bytes: int) -> Callable[[], None]:
            return lambda: self._memory.read(buffer, num_bytes, unroll, block_size, block_bytes)

        variants = {
            f"{shape}": variant(*shape)
            for shape in itertools.product((4, 8), (256, 512), (2**15, 2**16, 2**17, 2**18, 2**20))
        }
        times = self.interleave(variants, FLOOR_TRIALS)
        return variants[min(times, key=lambda name: times[name].summary()["median"])]


class Memory:
    """The kernels of memory.cu."""

    def __init__(self) -> None:
        import cupy

        text = Path(__file__).with_name("memory.cu").read_text()
        self._modules = {
            unroll: cupy.RawModule(code=text, options=("-std=c++17", f"-DUNROLL={unroll}")) for unroll in (4, 8)
        }
        self._sink = cupy.zeros(1, np.uint32)

    def read(
        self, buffer: Any, num_bytes: int, unroll: int = 8, block_size: int = 512, block_bytes: int = 2**17
    ) -> None:
        """Read the first `num_bytes` (a multiple of 16) of `buffer`."""
        kernel = self._modules[unroll].get_function("read_memory")
        kernel(*_grid(num_bytes, block_size, block_bytes), (buffer, *_vectors(num_bytes, block_bytes), self._sink))

    def write(self, buffer: Any, block_size: int = 512, block_bytes: int = 2**17) -> None:
        """Write zeros over `buffer`, whose size is a multiple of 16 bytes."""
        kernel = self._modules[8].get_function("write_memory")
        kernel(*_grid(buffer.nbytes, block_size, block_bytes), (buffer, *_vectors(buffer.nbytes, block_bytes)))


def _grid(num_bytes: int, block_size: int, block_bytes: int) -> tuple[tuple[int], tuple[int]]:
    return (-(-num_bytes // block_bytes),), (block_size,)


def _vectors(num_bytes: int, block_bytes: int) -> tuple[np.int64, np.int64]:
    return np.int64(num_bytes // VECTOR_BYTES), np.int64(block_bytes // VECTOR_BYTES)
