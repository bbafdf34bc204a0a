"""Devices and their memory, on CuPy's current stream."""

from __future__ import annotations

from typing import Any

import cupy

from ...interop import device_index


def empty(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    if cupy.cuda.runtime.getDevice() == device_index(device):
        return cupy.empty(shape, dtype)
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


def is_capturing(stream: Any) -> bool:
    """Whether the stream is capturing a CUDA graph."""
    return bool(cupy.cuda.runtime.streamIsCapturing(stream.ptr))
