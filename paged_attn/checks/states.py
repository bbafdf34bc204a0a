"""Partial results of attention that are merged."""

from typing import Any

import numpy as np

from ..interop import FLOAT32, FLOAT_DTYPES, device_of
from .arrays import check_base, check_device, check_dtype, check_float, check_shape, check_strides, check_whole
from .overlaps import check_apart
from .scalars import as_base


def check_merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any, base: Any, out: Any, lse: Any) -> float:
    """Returns the base as a number."""
    number = as_base(base)
    _check_states(v_a, s_a, "v_a", "s_a", ("rows", "heads", "dim"))
    check_dtype(v_b, "v_b", v_a.dtype, "as v_a is")
    check_shape(v_b, "v_b", v_a.shape, "as v_a")
    check_device(v_b, "v_b", device_of(v_a), "v_a")
    _check_states(v_b, s_b, "v_b", "s_b", ("rows", "heads", "dim"))
    _check_results(out, lse, v_a, v_a.shape, "v_a")
    read = [(v_b, "v_b"), (s_b, "s_b")]
    if lse is not None:
        check_apart([(lse, "lse")], [*read, (v_a, "v_a"), *([] if _is_same(lse, s_a) else [(s_a, "s_a")])])
    if out is not None:
        read += [(s_a, "s_a"), (lse, "lse")]
        check_apart([(out, "out")], [*read, *([] if _is_same(out, v_a) else [(v_a, "v_a")])])
    return number


def check_merge_states(v: Any, s: Any, sinks: Any, base: Any, out: Any, lse: Any) -> float:
    """Returns the base as a number."""
    number = as_base(base)
    _check_states(v, s, "v", "s", ("rows", "num_states", "heads", "dim"))
    rows, _, heads, dim = v.shape
    _check_results(out, lse, v, (rows, heads, dim), "v without num_states")
    if sinks is not None:
        device = device_of(v)
        check_whole(sinks, "sinks", (heads,), "one for each head of v", (FLOAT32,), device, "v", is_written=False)
    check_apart([(out, "out"), (lse, "lse")], [(v, "v"), (s, "s"), (sinks, "sinks")])
    return number


def _check_states(v: Any, s: Any, v_name: str, s_name: str, axes: tuple[str, ...]) -> None:
    """v has these axes, s is float32 without the last one."""
    check_float(v, v_name)
    check_shape(v, v_name, axes, f"[{', '.join(axes)}]")
    check_strides(v, v_name, aligned=False)
    check_dtype(s, s_name, FLOAT32)
    check_shape(s, s_name, v.shape[:-1], f"[{', '.join(axes[:-1])}], as {v_name} without its last axis")
    check_device(s, s_name, device_of(v), v_name)
    check_base(s, s_name, FLOAT32.itemsize)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arrays of one shape have every element at the same address."""
    strides = zip(a.strides, b.strides, a.shape, strict=True)
    if a.dtype != b.dtype or any(one != other and extent > 1 for one, other, extent in strides):
        return False
    return a.ctypes.data == b.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr == b.data.ptr


def _check_results(out: Any, lse: Any, v: Any, shape: tuple[int, ...], source: str) -> None:
    """`out` of any float dtype and `lse` float32, where they are given."""
    device = device_of(v)
    if out is not None:
        check_whole(out, "out", shape, f"as {source} gives it", (v.dtype, *FLOAT_DTYPES.values()), device, source)
    if lse is not None:
        check_whole(lse, "lse", shape[:-1], f"as {source} without its last axis", (FLOAT32,), device, source)
