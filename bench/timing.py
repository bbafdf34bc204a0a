"""Times of calls on one GPU, each after a clean flush of the L2 cache and behind a spin; and the read floor."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLUSH_BYTES = 256 * 2**20
SPIN_CYCLES = 2_000_000  # about 1 ms, longer than any timed call's host needs
VECTOR_BYTES = 16
WARM_UP_CALLS = 3
FLOOR_TRIALS = 5


@dataclass(frozen=True)
class Times:
    """Microseconds of repeated calls: on the device between two events, and on the host until the call returned."""

    device: tuple[float, ...]
    host: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """`spread` of the device's times, and the median of the host's."""
        return {**spread(self.device), "host": round(float(np.median(self.host)), 2)}


def spread(microseconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and minimum."""
    low, median, high = np.percentile(microseconds, (10, 50, 90))
    figures = {"median": median, "p10": low, "p90": high, "min": min(microseconds)}
    return {name: round(float(value), 2) for name, value in figures.items()}


class Stopwatch:
    """Times calls on CuPy's current stream of the current device."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._memory = Memory()
        self._written = cupy.empty(FLUSH_BYTES, np.uint8)
        self._read = cupy.empty(FLUSH_BYTES, np.uint8)
        # (unroll, block_size, block_bytes) by the number of bytes (coarse: of its bits) and that of a piece
        self._fastest: dict[tuple[int, int, bool], tuple[int, int, int]] = {}

    def flush(self) -> None:
        """Write 256 MB, then read another 256 MB.

        That leaves nothing of the caller's in the L2 cache, and no dirty line whose write-back a timed call would pay.
        """
        self._memory.write(self._written)
        self._memory.read(self._read, FLUSH_BYTES)

    def interleave(self, calls: Mapping[str, Callable[[], object]], reps: int) -> dict[str, Times]:
        """Every call `reps` times, in turns, so that all see the same clocks.

        The stream spins while the host enqueues the call, so that the events hold device time only.
        """
        cupy = self._cupy
        for call in calls.values():
            for _ in range(WARM_UP_CALLS):
                call()
        cupy.cuda.get_current_stream().synchronize()
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        host: dict[str, list[float]] = {name: [] for name in calls}
        with no_garbage_collection():
            for name, call in itertools.chain.from_iterable(itertools.repeat(tuple(calls.items()), reps)):
                self.flush()
                self._memory.spin()
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

    def read_floor(
        self, buffer: Any, num_bytes: int, pieces: Any = None, piece_bytes: int = 0, *, coarse: bool = False
    ) -> Callable[[], None]:
        """The fastest of a few plain 16-byte-load kernels over the first `num_bytes` of `buffer`, as a call.

        With `pieces` (int32, of piece_bytes each) they read those in that order, as a page table has them. Which kernel
        it is, is measured once for each number of bytes; coarse: once for all between two powers of two.
        """

        def variant(shape: tuple[int, int, int]) -> Callable[[], None]:
            return lambda: self._memory.read(buffer, num_bytes, *shape, pieces, piece_bytes)

        key = (num_bytes.bit_length() if coarse else num_bytes, piece_bytes, coarse)
        if key not in self._fastest:
            shapes = itertools.product((4, 8), (256, 512), (2**15, 2**16, 2**17, 2**18, 2**20))
            variants = {f"{shape}": (shape, variant(shape)) for shape in shapes}
            times = self.interleave({name: call for name, (_, call) in variants.items()}, FLOOR_TRIALS)
            self._fastest[key] = variants[min(times, key=lambda name: times[name].summary()["median"])][0]
        return variant(self._fastest[key])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a timed call would be counted as its host time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
        self,
        buffer: Any,
        num_bytes: int,
        unroll: int = 8,
        block_size: int = 512,
        block_bytes: int = 2**17,
        pieces: Any = None,
        piece_bytes: int = 0,
    ) -> None:
        """Read the first `num_bytes` (a multiple of 16) of `buffer`, or as many bytes in `pieces`."""
        kernel = self._modules[unroll].get_function("read_memory")
        order = (np.uint64(0) if pieces is None else pieces, np.uint32(piece_bytes // VECTOR_BYTES))
        arguments = (buffer, *_vectors(num_bytes, block_bytes), *order, self._sink)
        kernel(*_grid(num_bytes, block_size, block_bytes), arguments)

    def write(self, buffer: Any, block_size: int = 512, block_bytes: int = 2**17) -> None:
        """Write zeros over `buffer`, whose size is a multiple of 16 bytes."""
        kernel = self._modules[8].get_function("write_memory")
        kernel(*_grid(buffer.nbytes, block_size, block_bytes), (buffer, *_vectors(buffer.nbytes, block_bytes)))

    def spin(self, cycles: int = SPIN_CYCLES) -> None:
        """Keep the stream busy for so many cycles of the SM's clock."""
        self._modules[8].get_function("spin")((1,), (1,), (np.int64(cycles),))


def _grid(num_bytes: int, block_size: int, block_bytes: int) -> tuple[tuple[int], tuple[int]]:
    return (-(-num_bytes // block_bytes),), (block_size,)


def _vectors(num_bytes: int, block_bytes: int) -> tuple[np.int64, np.int64]:
    return np.int64(num_bytes // VECTOR_BYTES), np.int64(block_bytes // VECTOR_BYTES)
