"""Partial results of attention that are merged."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..interop import FLOAT32, FLOAT_DTYPES, device_of
from .arrays import check_base, check_device, check_dtype, check_float, check_shape, check_strides, check_whole
from .overlaps import check_apart
from .scalars import as_base


def check_merge_state(states: Sequence[Any], base: Any, out: Any, lse: Any) -> float:
    """v_a, s_a, v_b, s_b of the same rows: v [rows, heads, dim], s float32 [rows, heads]. Returns the base as a
    number."""
    v_a, s_a, v_b, s_b = states
    number = as_base(base)
    check_float(v_a, "v_a")
    check_shape(v_a, "v_a", ("rows", "heads", "dim"), "[rows, heads, dim]")
    check_dtype(v_b, "v_b", v_a.dtype, "as v_a is")
    check_shape(v_b, "v_b", v_a.shape, "as v_a")
    device = device_of(v_a)
    check_device(v_b, "v_b", device, "v_a")
    for array, name in ((v_a, "v_a"), (v_b, "v_b")):
        check_strides(array, name, aligned=False)
    for array, name in ((s_a, "s_a"), (s_b, "s_b")):
        check_dtype(array, name, FLOAT32)
        check_shape(array, name, v_a.shape[:-1], "[rows, heads], as v_a without its last axis")
        check_device(array, name, device, "v_a")
        check_base(array, name, FLOAT32.itemsize)
    _check_results(out, lse, v_a.shape, v_a.dtype, device, "v_a")
    if out is not None or lse is not None:
        read = [(v_b, "v_b"), (s_b, "s_b")]
        if lse is not None:
            check_apart([(lse, "lse")], [*read, (v_a, "v_a"), *([] if _is_same(lse, s_a) else [(s_a, "s_a")])])
        if out is not None:
            read += [(s_a, "s_a"), (lse, "lse")]
            check_apart([(out, "out")], [*read, *([] if _is_same(out, v_a) else [(v_a, "v_a")])])
    return number


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arrays of one shape have every element at the same address."""
    if a.dtype != b.dtype or any(
        stride_a != stride_b and extent > 1
        for stride_a, stride_b, extent in zip(a.strides, b.strides, a.shape, strict=True)
    ):
        return False
    return a.ctypes.data == b.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr == b.data.ptr


def check_merge_states(v: Any, s: Any, base: Any, sinks: Any, out: Any, lse: Any) -> float:
    """v [rows, num_states, heads, dim], s float32 [rows, num_states, heads], sinks float32 [heads] or None. Returns the
    base as a number."""
    number = as_base(base)
    check_float(v, "v")
    check_shape(v, "v", ("rows", "num_states", "heads", "dim"), "[rows, num_states, heads, dim]")
    check_strides(v, "v", aligned=False)
    check_dtype(s, "s", FLOAT32)
    check_shape(s, "s", v.shape[:-1], "[rows, num_states, heads], as v without its last axis")
    device = device_of(v)
    check_device(s, "s", device, "v")
    check_base(s, "s", FLOAT32.itemsize)
    rows, _, heads, dim = v.shape
    _check_results(out, lse, (rows, heads, dim), v.dtype, device, "v without num_states")
    if sinks is not None:
        check_whole(sinks, "sinks", (heads,), "one for each head of v", (FLOAT32,), device, "v", is_written=False)
    check_apart([(out, "out"), (lse, "lse")], [(v, "v"), (s, "s"), (sinks, "sinks")])
    return number


def _check_results(out: Any, lse: Any, shape: tuple[int, ...], dtype: np.dtype, device: str, source: str) -> None:
    """`out` of any float dtype and `lse` float32, where they are given."""
    if out is not None:
        check_whole(out, "out", shape, f"as {source} gives it", (dtype, *FLOAT_DTYPES.values()), device, source)
    if lse is not None:
        check_whole(lse, "lse", shape[:-1], f"as {source} without its last axis", (FLOAT32,), device, source)
