"""Merging of partial states."""

from __future__ import annotations

import math
from typing import Any

from ...recipes import merge_recipe
from .launch import launch

MAX_GRID_Y = 65535  # and z: CUDA's limit


def merge_states(v: Any, s: Any, out: Any, lse: Any, base: float, sinks: Any = None) -> None:
    rows, num_states, heads, _ = v.shape
    row_major = num_states > 3  # with few states the other order is better, as merge_state has shown
    _merge("merge_states", (v,), {
        "v": v, "s": s, "out": out, "lse": lse,
        "v_row_stride": _stride(v, 0), "v_state_stride": _stride(v, 1), "v_head_stride": _stride(v, 2),
        "s_row_stride": _stride(s, 0), "s_state_stride": _stride(s, 1), "s_head_stride": _stride(s, 2),
        "rows": rows, "num_states": num_states, "heads": heads, "row_major": row_major, "log2_of_base": math.log2(base),
        "sinks": sinks,
    })  # fmt: skip


def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any, out: Any, lse: Any, base: float) -> None:
    rows, heads, _ = v_a.shape
    _merge("merge_state", (v_a, v_b), {
        "v_a": v_a, "v_b": v_b, "s_a": s_a, "s_b": s_b, "out": out, "lse": lse,
        "v_a_row_stride": _stride(v_a, 0), "v_a_head_stride": _stride(v_a, 1),
        "v_b_row_stride": _stride(v_b, 0), "v_b_head_stride": _stride(v_b, 1),
        "s_a_row_stride": _stride(s_a, 0), "s_a_head_stride": _stride(s_a, 1),
        "s_b_row_stride": _stride(s_b, 0), "s_b_head_stride": _stride(s_b, 1),
        "rows": rows, "heads": heads, "log2_of_base": math.log2(base),
    })  # fmt: skip


def _merge(kernel: str, states: tuple[Any, ...], fields: dict[str, Any]) -> None:
    """Row-major: the blocks of a row run one after the other, else the blocks of all rows for the same heads."""
    v, out, rows, heads = states[0], fields["out"], fields["rows"], fields["heads"]
    head_dim, itemsize = v.shape[-1], v.dtype.itemsize
    # The widest load that every row begins on a multiple of: 16 bytes but for odd head_dims and views.
    spots = [head_dim * itemsize, 16]
    spots += [number for array in states for number in (array.data.ptr, *array.strides[:-1])]
    vector = math.gcd(*spots, out.data.ptr // out.dtype.itemsize * itemsize) // itemsize
    recipe = merge_recipe(kernel, heads, head_dim, vector, v.dtype, out.dtype, fields.get("sinks") is not None)
    groups, layers = -(-heads * 32 // recipe.num_threads), -(-rows // MAX_GRID_Y)
    grid = (groups, -(-rows // layers), layers) if fields.get("row_major") else (rows, groups)
    launch(recipe, f"cuda:{v.device.id}", grid, fields)


def _stride(array: Any, axis: int) -> int:
    return array.strides[axis] // array.dtype.itemsize
