"""Devices and their memory, on CuPy's current stream."""

from __future__ import annotations

import functools
from typing import Any

import cupy


def empty(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    with current_device(device):
        return cupy.empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    with current_device(device):
        array = cupy.empty(shape, dtype)
        array.data.memset_async(0, array.nbytes)
        return array


class current_device:
    """`with current_device(device)` makes the device the current one; almost free where it already is."""

    __slots__ = ("_index", "_previous")

    def __init__(self, device: str) -> None:
        self._index = device_index(device)

    def __enter__(self) -> None:
        self._previous = cupy.cuda.runtime.getDevice()
        if self._previous != self._index:
            cupy.cuda.runtime.setDevice(self._index)

    def __exit__(self, *_: object) -> None:
        if self._previous != self._index:
            cupy.cuda.runtime.setDevice(self._previous)


@functools.cache
def device_index(device: str) -> int:
    return int(device.removeprefix("cuda:"))


def is_capturing(stream: Any) -> bool:
    """Whether the stream is capturing a CUDA graph."""
    return bool(cupy.cuda.runtime.streamIsCapturing(stream.ptr))
