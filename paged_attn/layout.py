"""How the pages of a KV cache lie in memory, as a tag on the data."""

from enum import StrEnum
from typing import Any

import numpy as np

from .checks import overlaps, pools, scalars
from .frozen import Frozen, set_once
from .interop import address_of, device_of, is_writable, namespace, native, on_device_of
from .lifetimes import Loan, loan_of, reading


class Layout(StrEnum):
    """The order of the axes inside a page.

    NHD: [page, slot, head, dim]    a token's heads lie together
    HND: [page, head, slot, dim]    a head's tokens lie together
    """

    NHD = "NHD"
    HND = "HND"

    @classmethod
    def _missing_(cls, value: object) -> "Layout":
        scalars.as_layout(value)
        raise AssertionError("as_layout accepts what Layout does not")


def as_layout(layout: Layout | str) -> Layout:
    """The Layout of a name. (Layout itself compares whatever it gets, arrays too, with its names.)"""
    return Layout(scalars.as_layout(layout))


class PagedKV(Frozen):
    """The K and V pages of one layer, tagged with their layout: the only door through which a raw pool enters.

    Parameters
    ----------
    k_pages, v_pages: float16, bfloat16, float32 or float64 arrays, [num_pages, page_size, num_kv_heads, head_dim] for
        NHD or [num_pages, num_kv_heads, page_size, head_dim] for HND. Views of larger arrays are welcome: the last axis
        is contiguous, and on a GPU base and strides are multiples of 16 bytes. Nothing is copied. JAX arrays can be
        read but not appended to, because they are immutable.
    layout: the layout that the pool was written in; it has no default.

    A raw pool given a wrong tag cannot be told from a right one where page_size == num_kv_heads.

    Attributes (read-only)
    ----------
    k_pages, v_pages: the pages as NumPy or CuPy arrays.
    num_pages, page_size, num_kv_heads, head_dim, v_head_dim: ints; v_head_dim is V's, head_dim K's and that of q.
    k_strides, v_strides: (page, slot, head) strides in bytes, whatever the layout; 0 for an axis of extent 1, and for a
        pool of no page.
    dtype: np.dtype.    layout: Layout.    device: "cpu" or "cuda:<i>".    writable: whether append may write
        (not into JAX arrays, read-only arrays, or K and V in the same memory).
    signature: all that checks and kernels read of the pool but its addresses, as a tuple: layout, dtype, device,
        (num_pages, page_size, num_kv_heads, head_dim, v_head_dim), k_strides, v_strides. Layers with equal signatures
        pass or fail checks together.
    k_address, v_address: where the pages begin on a GPU; 0 on the CPU.
    loan: what keeps pages that came by DLPack until the kernels that read them are over, or None.

    Raises
    ------
    ValueError: ranks, shapes and strides.
    TypeError: dtypes, and K and V on different devices.
    """

    k_pages: Any
    v_pages: Any
    layout: Layout
    writable: bool
    dtype: np.dtype
    device: str
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    signature: tuple[Any, ...]
    k_address: int
    v_address: int
    loan: Loan | None
    __slots__ = (
        "device",
        "dtype",
        "head_dim",
        "k_address",
        "k_pages",
        "k_strides",
        "layout",
        "loan",
        "num_kv_heads",
        "num_pages",
        "page_size",
        "signature",
        "v_address",
        "v_head_dim",
        "v_pages",
        "v_strides",
        "writable",
    )

    def __init__(self, k_pages: Any, v_pages: Any, *, layout: Layout | str) -> None:
        layout = as_layout(layout)
        k, v = native(k_pages, "k_pages"), native(v_pages, "v_pages")
        pools.check_pool(k, v, layout)
        writable = is_writable(k_pages, k) and is_writable(v_pages, v) and not overlaps.overlap(k, v)
        self._set(k, v, layout, writable, loan_of((k, k_pages), (v, v_pages)))

    @classmethod
    def combined(cls, kv_pages: Any, *, layout: Layout | str) -> "PagedKV":
        """A pool that holds K and V in one array [num_pages, 2, <page>], K first; views, no copy."""
        layout = as_layout(layout)
        pages = native(kv_pages, "kv_pages")
        pools.check_combined(pages, layout)
        k, v = pages[:, 0], pages[:, 1]
        pools.check_pool(k, v, layout)
        kv = cls.__new__(cls)
        writable = is_writable(kv_pages, pages) and not overlaps.overlap(k, v)  # (as they do along a stride of 0)
        kv._set(k, v, layout, writable, loan_of((pages, kv_pages)))
        return kv

    def _set(self, k_pages: Any, v_pages: Any, layout: Layout, writable: bool, loan: Loan | None) -> None:
        """All attributes, of native arrays that have been checked."""
        slot, head = (1, 2) if layout is Layout.NHD else (2, 1)
        shape, dtype, device = k_pages.shape, k_pages.dtype, device_of(k_pages)
        extents = shape[0], shape[slot], shape[head], shape[3], v_pages.shape[3]
        num_pages, page_size, num_kv_heads, head_dim, v_head_dim = extents
        k_strides, v_strides = (_strides(pages, shape, slot, head) for pages in (k_pages, v_pages))
        set_once(self, "k_pages", k_pages)
        set_once(self, "v_pages", v_pages)
        set_once(self, "layout", layout)
        set_once(self, "k_address", address_of(k_pages))
        set_once(self, "v_address", address_of(v_pages))
        set_once(self, "writable", writable)
        set_once(self, "loan", loan)
        set_once(self, "dtype", dtype)
        set_once(self, "device", device)
        set_once(self, "num_pages", num_pages)
        set_once(self, "page_size", page_size)
        set_once(self, "num_kv_heads", num_kv_heads)
        set_once(self, "head_dim", head_dim)
        set_once(self, "v_head_dim", v_head_dim)
        set_once(self, "k_strides", k_strides)
        set_once(self, "v_strides", v_strides)
        set_once(self, "signature", (layout, dtype, device, extents, k_strides, v_strides))

    def to_layout(self, layout: Layout | str) -> "PagedKV":
        """A contiguous copy of the pool in `layout`, on the same device."""
        layout = as_layout(layout)
        with reading(self.loan), on_device_of(self.k_pages):
            return PagedKV(self._copy(self.k_pages, layout), self._copy(self.v_pages, layout), layout=layout)

    def _copy(self, pages: Any, layout: Layout) -> Any:
        bits = pages.view(f"u{self.dtype.itemsize}")  # CuPy copies integers of any size, but not every float
        if layout is not self.layout:
            bits = bits.swapaxes(1, 2)
        return namespace(pages).array(bits, order="C", copy=True).view(self.dtype)

    def __repr__(self) -> str:
        return (
            f"PagedKV(num_pages={self.num_pages}, page_size={self.page_size}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, dtype={self.dtype}, layout={str(self.layout)!r}, device={self.device!r})"
        )


def _strides(pages: Any, shape: tuple[int, ...], slot: int, head: int) -> tuple[int, int, int]:
    """(page, slot, head) strides in bytes; 0 where there is nothing to find by them."""
    if not shape[0]:
        return 0, 0, 0
    strides = pages.strides
    return (
        strides[0] if shape[0] > 1 else 0,
        strides[slot] if shape[slot] > 1 else 0,
        strides[head] if shape[head] > 1 else 0,
    )
