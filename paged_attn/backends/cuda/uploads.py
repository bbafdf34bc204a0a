"""Host arrays on their way to a device: asynchronous copies out of pinned memory."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from ... import lifetimes
from .memory import current_device, is_capturing
from .per_thread import PerThread

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


_NO_BLOCK = PinnedBlock(np.empty(0, np.uint8), 0, None)


class Staging:
    """Pinned memory for the uploads of one thread: a block is filled piece by piece, for copies on one stream.

    The block's event is recorded anew after every copy; a full block is used again when the event is over. Blocks that
    a thread leaves when it ends serve other threads, once their copies are over.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._block = _NO_BLOCK
        self._used = 0  # bytes of the block
        self._stream: Any = None  # of the block's copies, held so that no other stream gets its address
        self._full: list[PinnedBlock] = []  # the longest waiting first

    def copy(
        self, parts: Sequence[np.ndarray[Any, Any]], dtype: np.dtype[Any], target: Any, num_bytes: int, stream: Any
    ) -> None:
        """Copies 1-D arrays, one after the other as `dtype` and num_bytes in all, to the device address `target`."""
        is_same = self._stream is not None and stream.ptr == self._stream.ptr
        if not is_same or self._used + num_bytes > self._block.view.size:
            self._next_block(num_bytes)
            self._stream = stream
        begin, end, block = self._used, self._used + num_bytes, self._block
        np.concatenate(parts, out=block.view[begin:end].view(dtype))
        target.copy_from_host_async(block.address + begin, num_bytes, stream)
        block.event.record(stream)
        self._used = -(-end // 16) * 16

    def _next_block(self, num_bytes: int) -> None:
        if self._used:  # the full block is let go first: where no other can be allocated, nothing is written into it
            self._full.append(self._block)
            self._block, self._used = _NO_BLOCK, 0
        for index, block in enumerate(self._full):
            if block.view.size >= num_bytes and _is_over(block.event):
                self._block = self._full.pop(index)
                return
        if (left := _take_idle_block(self._device, num_bytes)) is not None:
            self._block = left
            return
        size = max(SMALLEST_STAGING, 1 << (num_bytes - 1).bit_length())
        memory = cupy.cuda.alloc_pinned_memory(size)
        view = np.frombuffer(memory, np.uint8, size)
        self._block = PinnedBlock(view, memory.ptr, cupy.cuda.Event(disable_timing=True))

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _leave_blocks(self._device, [block for block in (*self._full, self._block) if block.event])


_idle_blocks: dict[str, deque[PinnedBlock]] = {}  # by device


def _take_idle_block(device: str, num_bytes: int) -> PinnedBlock | None:
    """A block of a thread that has ended, if there is one of that size with nothing under way."""
    idle = _idle_blocks.setdefault(device, deque())
    for _ in range(len(idle)):
        try:
            block = idle.popleft()
        except IndexError:  # another thread was faster
            return None
        if block.view.size >= num_bytes and _is_over(block.event):
            return block
        idle.append(block)
    return None


def _leave_blocks(device: str, blocks: list[PinnedBlock]) -> None:
    idle = _idle_blocks.setdefault(device, deque())
    idle.extend(blocks)
    for _ in range(len(idle)):
        if len(idle) <= MOST_IDLE_BLOCKS:
            return
        try:
            block = idle.popleft()
        except IndexError:
            return
        if not _is_over(block.event):  # CuPy would give its memory to others
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


_stagings = PerThread()  # by device
