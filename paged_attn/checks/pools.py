"""Pools: K and V pages of one layer."""

from typing import Any

import numpy as np

from ..errors import LayoutMismatchError
from ..holders import KVPages
from ..interop import device_of
from ..layout import Layout
from ..spec import ALIGNMENT
from .arrays import check_device, check_dtype, check_float, check_strides
from .tables import check_table

MAX_POOL_SPAN = 2**32 * ALIGNMENT  # the kernels count a pool's bytes in 32 bits of that unit


def check_kv(kv: Any, call: str) -> None:
    """`kv` is a PagedKV: a raw pool has no layout tag. `call` shows the arguments in their order."""
    if not isinstance(kv, KVPages):
        raise TypeError(
            f"kv must be a PagedKV, got {type(kv).__name__}; tag the pool, PagedKV(k_pages, v_pages, layout=...), and "
            f"pass {call}"
        )


def check_operands(kv: Any, table: Any, call: str) -> None:
    """`kv` is a PagedKV and `table` a PageTable."""
    check_kv(kv, call)
    check_table(table, call=call)


def check_pool(k_pages: Any, v_pages: Any, layout: Layout) -> None:
    """K and V pages of one layer: [page, slot, head, dim] (NHD) or [page, head, slot, dim] (HND)."""
    for array, name in ((k_pages, "k_pages"), (v_pages, "v_pages")):
        check_float(array, name)
        if array.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes, {layout.axes} for layout={str(layout)!r}, got {name}.shape={array.shape}; "
                f"pass one layer's pages (a pool of K and V together goes through PagedKV.combined)"
            )
        if 0 in array.shape[1:]:
            raise ValueError(
                f"{name} has an empty axis ({name}.shape={array.shape}, {layout.axes}); only num_pages may be 0: "
                f"pass a pool whose page_size, num_kv_heads and head_dim are at least 1"
            )
    if k_pages.shape[:-1] != v_pages.shape[:-1]:
        raise ValueError(
            f"v_pages must have the shape of k_pages (but for the last axis), got v_pages.shape={v_pages.shape} and "
            f"k_pages.shape={k_pages.shape}; pass K and V of the same layer"
        )
    check_dtype(v_pages, "v_pages", k_pages.dtype, "as k_pages is")
    check_device(v_pages, "v_pages", device_of(k_pages), "k_pages")
    for array, name in ((k_pages, "k_pages"), (v_pages, "v_pages")):
        check_strides(array, name)
        span = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True))
        if span >= MAX_POOL_SPAN and not isinstance(array, np.ndarray):
            raise NotImplementedError(
                f"{name} spans {span} bytes from its first to its last element, and the kernels address "
                f"{MAX_POOL_SPAN} (64 GiB); split the pool, or store each layer by itself"
            )


def check_combined(kv_pages: Any, layout: Layout) -> None:
    """K and V in one array: [num_pages, 2, ...], K first."""
    if kv_pages.ndim != 5 or kv_pages.shape[1] != 2:
        raise ValueError(
            f"kv_pages must be [num_pages, 2, {layout.page_axes}] for layout={str(layout)!r}, got "
            f"kv_pages.shape={kv_pages.shape}; "
            f"pass K and V on axis 1, or two arrays to PagedKV(k_pages, v_pages, layout=...)"
        )


def check_page_size(kv: KVPages, page_size: int) -> None:
    if kv.page_size == page_size:
        return
    said = (
        f"kv is tagged {kv.layout}, under which k_pages.shape={kv.k_pages.shape} has page_size={kv.page_size} and "
        f"num_kv_heads={kv.num_kv_heads}, but the table has page_size={page_size}"
    )
    right_table = f"pass a table that was made with page_size={kv.page_size}"
    if kv.num_kv_heads != page_size:
        raise LayoutMismatchError(f"{said}; neither layout fits, so {right_table}")
    other = kv.layout.other
    raise LayoutMismatchError(
        f"{said}; the shape fits layout {other} (page_size={page_size}, num_kv_heads={kv.page_size}): if the pool was "
        f"written so, tag the pool layout='{other}'; if it was written as {kv.layout}, {right_table}"
    )


def refuse_heads(kv: KVPages, num_qo_heads: int, shown: str) -> None:
    """Query heads that are no multiple of the KV heads; `shown` is where their number comes from."""
    heads, other = kv.num_kv_heads, kv.layout.other
    retag = (
        f"; or, if k_pages.shape={kv.k_pages.shape} was written as {other} and not as {kv.layout}, tag the pool "
        f"layout='{other}' (page_size={heads}, num_kv_heads={kv.page_size}) and pass a table of that page_size"
    )
    raise ValueError(
        f"q has {num_qo_heads} heads, which is not a multiple of num_kv_heads={heads} ({shown}); "
        f"pass a q with {heads}, {2 * heads}, {3 * heads}, ... heads{'' if num_qo_heads % kv.page_size else retag}"
    )
