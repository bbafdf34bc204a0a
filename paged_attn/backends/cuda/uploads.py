"""Host arrays on their way to a device: asynchronous copies out of pinned memory."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from ... import lifetimes
from .memory import current_device, is_capturing

SMALLEST_STAGING = 1 << 20  # bytes: dozens of tables, as each block that is taken anew is asked for its event
MOST_IDLE_BLOCKS = 16  # of pinned memory, that threads have left on a device
_INT32 = np.dtype(np.int32)


def to_backend(array: Any, device: str) -> Any:
    """A host array on the device, by an asynchronous copy out of pinned memory; a device array as it is."""
    return uploader(device)(array) if isinstance(array, np.ndarray) else array


def uploader(device: str) -> Callable[[np.ndarray[Any, Any]], Any]:
    """What copies host arrays to the device on its current stream. TypeError while that captures a CUDA graph."""
    with current_device(device):
        return functools.partial(_upload, device, _upload_stream())


def _upload_stream() -> Any:
    """The current stream, which must not be capturing a CUDA graph."""
    stream = cupy.cuda.get_current_stream()
    if is_capturing(stream):
        raise TypeError(
            "NumPy arrays are to be uploaded while the stream is capturing a CUDA graph, which would replay the copy "
            "of memory that has long been reused; pass CuPy arrays, and keep reserve() and page_table() of a cache "
            "out of the capture"
        )
    return stream


def _upload(device: str, stream: Any, array: np.ndarray[Any, Any]) -> Any:
    with current_device(device):
        target = cupy.empty(array.shape, array.dtype)
        if array.size:
            _staging(device).copy((array.ravel(),), array.dtype, target.data, array.nbytes, stream)
        return target


def upload_together(arrays: Sequence[np.ndarray[Any, Any]], device: str) -> tuple[Any, list[int]]:
    """1-D arrays as int32 on the device, by one copy: their memory, which the caller keeps, and where each begins."""
    stream = _upload_stream()
    *begins, size = itertools.accumulate(map(len, arrays), initial=0)
    memory = cupy.cuda.alloc(4 * size)
    _staging(device).copy(arrays, _INT32, memory, 4 * size, stream)
    return memory, [memory.ptr + 4 * begin for begin in begins]


def int32_addresses(arrays: Sequence[Any], device: str) -> tuple[Any, list[int]]:
    """Where int32 arrays are on the device, 0 for None; those of the host in memory that the caller keeps."""
    host = [array for array in arrays if isinstance(array, np.ndarray)]
    memory, addresses = upload_together(host, device)
    uploaded = iter(addresses)
    return memory, [
        0 if array is None else next(uploaded) if isinstance(array, np.ndarray) else array.data.ptr for array in arrays
    ]


@dataclass
class PinnedBlock:
    view: np.ndarray[Any, Any]  # uint8 [size], which keeps the memory alive
    address: int
    event: Any  # recorded after the last copy out of it


class Staging:
    """Pinned memory for the uploads of one thread: a block is filled piece by piece, for copies on one stream.

    The block's event is recorded anew after every copy. A block that is full, or whose thread has ended, is left to
    whichever thread needs one when the event is over.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._block: PinnedBlock | None = None
        self._used = 0  # bytes of the block
        self._stream: Any = None  # of the block's copies, held so that no other stream gets its address

    def copy(
        self, parts: Sequence[np.ndarray[Any, Any]], dtype: np.dtype[Any], target: Any, num_bytes: int, stream: Any
    ) -> None:
        """Copies 1-D arrays, one after the other as `dtype` and num_bytes in all, to the device address `target`."""
        block = self._block
        if block is None or stream.ptr != self._stream.ptr or self._used + num_bytes > block.view.size:
            self._leave_block()  # before: where no other can be allocated, nothing is written into it
            block, self._stream = _take_block(self._device, num_bytes), stream
            self._block = block
        begin, end = self._used, self._used + num_bytes
        np.concatenate(parts, out=block.view[begin:end].view(dtype))
        target.copy_from_host_async(block.address + begin, num_bytes, stream)
        block.event.record(stream)
        self._used = -(-end // 16) * 16

    def _leave_block(self) -> None:
        idle, block = _idle_blocks.setdefault(self._device, deque()), self._block
        self._block, self._used = None, 0
        if block is not None:
            idle.append(block)
            for _ in itertools.islice(_finished(idle), max(0, len(idle) - MOST_IDLE_BLOCKS)):
                pass  # dropped: CuPy gives its memory to others

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._leave_block()


_idle_blocks: dict[str, deque[PinnedBlock]] = {}  # by device: those that no thread fills, some with copies under way


def _take_block(device: str, num_bytes: int) -> PinnedBlock:
    """A block of that size with nothing under way: an idle one, else a new one."""
    idle = _idle_blocks[device]
    for block in _finished(idle):
        if block.view.size >= num_bytes:
            return block
        idle.append(block)
    size = max(SMALLEST_STAGING, 1 << (num_bytes - 1).bit_length())
    memory = cupy.cuda.alloc_pinned_memory(size)
    return PinnedBlock(np.frombuffer(memory, np.uint8, size), memory.ptr, cupy.cuda.Event(disable_timing=True))


def _finished(idle: deque[PinnedBlock]) -> Iterator[PinnedBlock]:
    """Takes blocks out, the longest waiting first; those with copies under way stay."""
    for block in lifetimes.popped(idle):
        if _is_over(block.event):
            yield block
        else:
            idle.append(block)


def _is_over(event: Any) -> bool:
    """Whether the work before an event is over; asked in a way that disturbs no capture of another thread."""
    with lifetimes.capture_of_others():
        return bool(event.done)


def _staging(device: str) -> Staging:
    staging = _stagings.items.get(device)
    if staging is None:
        staging = _stagings.items[device] = Staging(device)
    return staging


_stagings = lifetimes.PerThread()  # by device
