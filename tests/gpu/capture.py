"""Capturing CUDA graphs in the strictest way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_allocation() -> Iterator[None]:
    """Inside, an allocation of CuPy's is an error."""
    import cupy

    def refuse(size: int) -> Any:
        raise AssertionError(f"{size} bytes were allocated")

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(refuse)
    try:
        yield
    finally:
        cupy.cuda.set_allocator(before)


def captured(work: Callable[[], None]) -> Any:
    """The graph of what `work` launches, captured in the strictest mode: a synchronisation anywhere is an error."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, no_allocation():
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeGlobal)
        try:
            work()
        finally:
            graph = stream.end_capture()
    return graph
