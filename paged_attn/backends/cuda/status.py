"""Status words: what kernels find wrong with metadata is stored there until a caller asks."""

from __future__ import annotations

import threading
from typing import Any

import cupy
import numpy as np

from ... import lifetimes
from ...errors import fault_error
from ...recipes import struct_bytes
from .memory import current_device, zeros

STATUS_BYTES = struct_bytes("check_table", "Status")


_device_words: dict[str, Any] = {}
_making_word = threading.Lock()


def device_word(device: str) -> Any:
    """The status word of calls that have no plan; it keeps its first fault until raise_device_status.

    It is made, and waited for, on a stream without other work. The current stream would be the wrong one: others would
    not wait for it, and a graph that it captures would clear the word at every replay.
    """
    word = _device_words.get(device)
    if word is None:
        with _making_word, current_device(device), lifetimes.capture_of_others():
            word = _device_words.get(device)
            if word is None:
                with cupy.cuda.Stream(non_blocking=True) as stream:
                    word = zeros((STATUS_BYTES,), np.uint8, device)
                    stream.synchronize()
                _device_words[device] = word
    return word


def raise_word(word: Any, *, clear: bool = False) -> None:
    """PageTableError if the status word holds a fault. Waits for all streams of the device, and for a clear word."""
    with current_device(f"cuda:{word.device.id}"):
        cupy.cuda.runtime.deviceSynchronize()
        field, index = word[:8].view(np.int32).get().tolist()
        if field:
            (value,) = word[8:].view(np.int64).get().tolist()
            if clear:
                word.data.memset_async(0, STATUS_BYTES)
                cupy.cuda.get_current_stream().synchronize()
            raise fault_error(field, index, value)


def raise_device_status(device: str) -> None:
    raise_word(device_word(device), clear=True)
