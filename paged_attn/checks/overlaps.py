"""Memory that is written while other memory is still read.

Two arrays overlap where the ranges from their first to their last byte do and they are not provably disjoint: K and V
interleaved in one pool are disjoint, and so are the odd and the even heads of one array. Shapes and strides of a call
may be known to be right; addresses are new each time, so this is asked on every call.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_MOST_WORK = 10_000  # steps of np.shares_memory: far more than strides that divide each other take


def overlap(a: Any, b: Any) -> bool:
    """Whether two arrays overlap."""
    if isinstance(a, np.ndarray) is not isinstance(b, np.ndarray):
        return False
    if not isinstance(a, np.ndarray):
        (a_begin, a_end), (b_begin, b_end) = _bounds(a), _bounds(b)
        if a.data.device_id != b.data.device_id or a_end <= b_begin or b_end <= a_begin:
            return False
        a, b = np.asarray(_OnHost(a)), np.asarray(_OnHost(b))
    try:
        return np.shares_memory(a, b, max_work=_MOST_WORK)  # type: ignore[arg-type]  # any int is one
    except np.exceptions.TooHardError:
        return True


def _bounds(array: Any) -> tuple[int, int]:
    """The addresses of a GPU array's first byte and of the byte behind its last one."""
    begin = array.data.ptr
    if array.size == 0:
        return begin, begin
    end = begin + array.dtype.itemsize
    for extent, stride in zip(array.shape, array.strides, strict=True):
        if stride > 0:
            end += (extent - 1) * stride
        else:
            begin += (extent - 1) * stride
    return begin, end


class _OnHost:
    """A GPU array's addresses, shape and strides for NumPy, which compares but never reads what is there."""

    def __init__(self, array: Any) -> None:
        interface = {"version": 3, "shape": array.shape, "strides": array.strides}
        interface |= {"data": (array.data.ptr, True), "typestr": f"|V{array.dtype.itemsize}"}
        self.__array_interface__ = interface


OTHER_MEMORY = "a {name} with memory of its own, or None"


def check_apart(
    written: Sequence[tuple[Any, str]], read: Sequence[tuple[Any, str]], remedy: str = OTHER_MEMORY
) -> None:
    """No array that is written (None: there is none) overlaps one that is read, or another that is written."""
    given = [(array, name) for array, name in (*written, *read) if array is not None]
    num_written = sum(array is not None for array, _ in written)
    for i in range(num_written):
        for other in given[i + 1 :]:
            _check_pair(given[i], other, remedy)


def _check_pair(one: tuple[Any, str], other: tuple[Any, str], remedy: str) -> None:
    if overlap(one[0], other[0]):
        name = one[1]
        raise ValueError(
            f"{name} overlaps {other[1]} in memory, and one of them is written while the other is in use; "
            f"pass {remedy.format(name=name)}"
        )


# -- calls that are repeated -------------------------------------------------------------------------------------------

Compared = tuple[tuple[int, int, int, int], ...]


def compared(arrays: Sequence[Any], pairs: Iterable[tuple[int, int]]) -> Compared:
    """Of the index pairs (i, j) of `arrays` those to be compared on every call: (i, j, bytes of i, bytes of j).

    The bytes are those from the first to the last one, of GPU arrays whose strides are not negative; 0 on the host,
    where NumPy compares. Arrays that are None or empty, and host metadata beside GPU arrays, overlap nothing.
    """
    on_host = all(array is None or isinstance(array, np.ndarray) for array in arrays)
    sizes = [
        -1 if array is None or not array.size or isinstance(array, np.ndarray) is not on_host
        else 0 if on_host
        else _bounds(array)[1] - array.data.ptr
        for array in arrays
    ]  # fmt: skip
    return tuple((i, j, sizes[i], sizes[j]) for i, j in pairs if sizes[i] >= 0 and sizes[j] >= 0)


def may_overlap(addresses: Sequence[int], pairs: Compared) -> bool:
    """Whether the ranges of bytes of a pair overlap. addresses: where the arrays that `compared` has seen begin now."""
    for i, j, i_size, j_size in pairs:
        if -i_size < addresses[i] - addresses[j] < j_size:
            return True
    return False


def check_pairs(arrays: Sequence[Any], names: Sequence[str], pairs: Compared, remedy: str = OTHER_MEMORY) -> None:
    """The arrays of these pairs are apart; the first of a pair is the one to be replaced."""
    for i, j, _, _ in pairs:
        _check_pair((arrays[i], names[i]), (arrays[j], names[j]), remedy)
