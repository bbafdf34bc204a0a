"""Memory that is written while other memory is still read.

Two arrays overlap where the ranges from their first to their last byte do and they are not provably disjoint: K and V
interleaved in one pool are disjoint, and so are every other head of one array and the heads between them. Shapes and
strides of a call may be known to be right; addresses are new each time, so this is asked on every call.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..holders import KVPages

_MOST_WORK = 10_000  # steps of np.shares_memory: far more than strides that divide each other take


def overlap(a: Any, b: Any) -> bool:
    """Whether two arrays overlap."""
    on_host = isinstance(a, np.ndarray)
    if isinstance(b, np.ndarray) is not on_host:
        return False
    if on_host:
        if not np.may_share_memory(a, b):
            return False
    else:
        if a.data.device_id != b.data.device_id:
            return False
        (a_begin, a_end), (b_begin, b_end) = bounds_of(a), bounds_of(b)
        if a_end <= b_begin or b_end <= a_begin:
            return False
        a, b = np.asarray(_OnHost(a)), np.asarray(_OnHost(b))
    try:
        return np.shares_memory(a, b, max_work=_MOST_WORK)  # type: ignore[arg-type]  # any int is one
    except np.exceptions.TooHardError:
        return True


def bounds_of(array: Any) -> tuple[int, int]:
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
        self.__array_interface__ = {
            "version": 3,
            "data": (array.data.ptr, True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
        }


def check_apart(
    written: Sequence[tuple[Any, str]],
    read: Sequence[tuple[Any, str]],
    remedy: str = "a {name} with memory of its own, or None",
) -> None:
    """No array that is written (None: there is none) overlaps one that is read, or another that is written."""
    given = [
        (array, name, None if isinstance(array, np.ndarray) else bounds_of(array))
        for array, name in (*written, *read)
        if array is not None
    ]
    num_written = sum(array is not None for array, _ in written)
    for place, (array, name, bounds) in enumerate(given[:num_written]):
        for other, other_name, other_bounds in given[place + 1 :]:
            if bounds and other_bounds and (bounds[1] <= other_bounds[0] or other_bounds[1] <= bounds[0]):
                continue
            if overlap(array, other):
                raise ValueError(
                    f"{name} overlaps {other_name} in memory, and one of them is written while the other is in use; "
                    f"pass {remedy.format(name=name)}"
                )


def extents_of(*arrays: Any) -> tuple[int, ...]:
    """For check_apart_of_run and ..._of_append: bytes from the first to the last one of GPU arrays whose strides have
    been checked, 0 for None and for metadata of the host. Nothing for arrays of the host: NumPy compares those."""
    if isinstance(arrays[0], np.ndarray):
        return ()
    return tuple(
        0 if array is None or isinstance(array, np.ndarray) or not array.size else bounds_of(array)[1] - array.data.ptr
        for array in arrays
    )


def check_apart_of_run(q: Any, kv: KVPages, out: Any, lse: Any, extents: tuple[int, ...]) -> None:
    """out and lse, one of which was given, overlap neither each other nor q nor the pool.

    extents: extents_of(q, k_pages, v_pages, out, lse), made once for all calls with arrays of one form.
    """
    if extents:
        q_size, k_size, v_size, out_size, lse_size = extents
        q_at, k_at, v_at = q.data.ptr, kv.k_address, kv.v_address
        apart, out_at = True, 0
        if out is not None:
            out_at, low = out.data.ptr, -out_size
            apart = not (low < out_at - q_at < q_size or low < out_at - k_at < k_size or low < out_at - v_at < v_size)
        if lse is not None:
            at, low = lse.data.ptr, -lse_size
            apart = apart and not (
                low < at - q_at < q_size
                or low < at - k_at < k_size
                or low < at - v_at < v_size
                or low < at - out_at < out_size
            )
    else:
        may = np.may_share_memory
        k_pages, v_pages = kv.k_pages, kv.v_pages
        apart = (out is None or not (may(out, q) or may(out, k_pages) or may(out, v_pages))) and (
            lse is None
            or not (may(lse, q) or may(lse, k_pages) or may(lse, v_pages) or (out is not None and may(lse, out)))
        )
    if not apart:
        check_apart(((out, "out"), (lse, "lse")), ((q, "q"), (kv.k_pages, "kv.k_pages"), (kv.v_pages, "kv.v_pages")))


def check_apart_of_append(kv: KVPages, slots: Any, k: Any, v: Any, extents: tuple[int, ...] = ()) -> None:
    """The pool overlaps neither k, v nor slots. extents: extents_of(k, v, slots, k_pages, v_pages), if made before."""
    k_pages, v_pages = kv.k_pages, kv.v_pages
    if extents := extents or extents_of(k, v, slots, k_pages, v_pages):
        k_size, v_size, slots_size, k_pool_size, v_pool_size = extents
        k_at, v_at, k_pool, v_pool = k.data.ptr, v.data.ptr, kv.k_address, kv.v_address
        slots_at = slots.data.ptr if slots_size else 0
        apart = not (
            -k_size < k_at - k_pool < k_pool_size
            or -k_size < k_at - v_pool < v_pool_size
            or -v_size < v_at - k_pool < k_pool_size
            or -v_size < v_at - v_pool < v_pool_size
            or -slots_size < slots_at - k_pool < k_pool_size
            or -slots_size < slots_at - v_pool < v_pool_size
        )
    else:
        may = np.may_share_memory
        apart = not any(may(array, k_pages) or may(array, v_pages) for array in (k, v, slots))
    if apart:
        return
    for array, name in ((k, "k"), (v, "v"), (slots, "slots")):
        check_apart(((array, name),), ((k_pages, "kv.k_pages"), (v_pages, "kv.v_pages")), "{name}.copy()")
