"""Arrays that notice when a kernel leaves them.

The memory behind an array cannot be touched: a read or write there ends the process with the name of the test. What
stands in front of it holds a pattern, which `check` compares, and the same is done to what a kernel must not change.
"""

import ctypes
import mmap
from typing import Any

import numpy as np

_PATTERN = 0xA5
_PAGE = mmap.PAGESIZE
_PROTECT = ctypes.CDLL(None, use_errno=True).mprotect
_PROTECT.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """Makes guarded copies: `inputs` stay as they are, `outputs` may be written. Ends aligned to align bytes."""

    def __init__(self) -> None:
        self._regions: list[tuple[mmap.mmap, np.ndarray, int, int]] = []
        self._inputs: list[tuple[np.ndarray, bytes]] = []

    def output(self, array: Any, align: int | None = None) -> np.ndarray:
        array = np.asarray(array, order="C")
        align = align or array.itemsize
        inside = -(-max(array.nbytes, 1) // _PAGE) * _PAGE
        region = mmap.mmap(-1, inside + 2 * _PAGE)
        memory = np.frombuffer(region, np.uint8)
        start = memory.ctypes.data
        for guard in (start, start + _PAGE + inside):
            if _PROTECT(guard, _PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        begin = (_PAGE + inside - array.nbytes) // align * align
        memory[_PAGE : _PAGE + inside] = _PATTERN
        copy = np.ndarray(array.shape, array.dtype, region, begin)
        copy[...] = array
        self._regions.append((region, memory, begin, begin + array.nbytes))
        return copy

    def input(self, array: Any, align: int | None = None) -> np.ndarray:
        copy = self.output(array, align)
        self._inputs.append((copy, copy.tobytes()))
        return copy

    def status(self) -> np.ndarray:
        """A status word without a fault."""
        return self.output(np.zeros((), np.dtype([("field", "i4"), ("index", "i4"), ("value", "i8")])), 16)

    def check(self) -> None:
        for _, memory, begin, end in self._regions:
            inside = memory[_PAGE : memory.size - _PAGE]
            around = np.concatenate([inside[: begin - _PAGE], inside[end - _PAGE :]])
            assert (around == _PATTERN).all(), "a kernel wrote in front of an array"
        for copy, before in self._inputs:
            assert copy.tobytes() == before, "a kernel wrote to an input"
