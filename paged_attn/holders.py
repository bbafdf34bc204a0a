"""PagedKV and PageTable as checks and backends see them: frozen, of arrays of any kind, and unchecked.

A holder keeps what it is given, be it a NumPy or CuPy array or a stand-in without memory, and derives shapes, strides,
devices and addresses when they are asked for. The public classes add the checks and what users do with them.
"""

from functools import cached_property
from typing import Any

import numpy as np

from .frozen import Frozen
from .interop import address_of, device_of
from .layout import Layout
from .lifetimes import Loan


class KVPages(Frozen):
    """K and V pages of one layer: [page, slot, head, dim] (NHD) or [page, head, slot, dim] (HND).

    K and V differ in nothing but their last axes, head_dim and v_head_dim. Strides are those of page, slot and head in
    bytes, whatever the layout; 0 for an axis of extent 1 and for a pool of no page, where nothing is found by them.
    """

    k_pages: Any
    v_pages: Any
    layout: Layout
    writable: bool  # whether append may write: not into JAX arrays, read-only arrays, or K and V in the same memory
    loan: Loan | None  # keeps pages that came by DLPack until the kernels that read them are over

    @cached_property
    def num_pages(self) -> int:
        return int(self.k_pages.shape[0])

    @cached_property
    def page_size(self) -> int:
        """Tokens a page."""
        return int(self.k_pages.shape[self.layout.slot_axis])

    @cached_property
    def num_kv_heads(self) -> int:
        return int(self.k_pages.shape[self.layout.head_axis])

    @cached_property
    def head_dim(self) -> int:
        """Elements of a key and of a query."""
        return int(self.k_pages.shape[3])

    @cached_property
    def v_head_dim(self) -> int:
        """Elements of a value and of an output."""
        return int(self.v_pages.shape[3])

    @cached_property
    def dtype(self) -> np.dtype:
        return self.k_pages.dtype

    @cached_property
    def device(self) -> str:
        """ "cpu" or "cuda:<i>"."""
        return device_of(self.k_pages)

    @cached_property
    def k_strides(self) -> tuple[int, int, int]:
        return self._strides(self.k_pages)

    @cached_property
    def v_strides(self) -> tuple[int, int, int]:
        return self._strides(self.v_pages)

    def _strides(self, pages: Any) -> tuple[int, int, int]:
        shape, strides = pages.shape, pages.strides
        page, slot, head = (
            strides[axis] if shape[axis] > 1 and shape[0] else 0
            for axis in (0, self.layout.slot_axis, self.layout.head_axis)
        )
        return page, slot, head

    @cached_property
    def k_address(self) -> int:
        """Where the pages of K begin on a GPU; 0 on the CPU."""
        return address_of(self.k_pages)

    @cached_property
    def v_address(self) -> int:
        return address_of(self.v_pages)

    @cached_property
    def signature(self) -> tuple[Any, ...]:
        """All that checks and kernels read of the pool but its addresses. Layers with equal signatures pass or fail the
        checks together."""
        extents = self.num_pages, self.page_size, self.num_kv_heads, self.head_dim, self.v_head_dim
        return self.layout, self.dtype, self.device, extents, self.k_strides, self.v_strides


TABLE_ARRAYS = ("indptr", "indices", "last_page_len", "page_offset", "total_len")


class TableArrays(Frozen):
    """Which pages hold the tokens of each request. PageTable says what the arrays mean."""

    indptr: Any
    indices: Any
    last_page_len: Any
    page_size: int
    page_offset: Any = None
    page_stride: int = 1
    total_len: Any = None
    is_split: bool = False  # its rows are chunks of requests, made by PageTable.split
    writable: bool = True  # whether a cache, or split, may write it as its `out`
    loan: Loan | None = None  # keeps arrays that came by DLPack until the kernels that read them are over

    @cached_property
    def batch_size(self) -> int:
        return int(self.last_page_len.shape[0])

    @cached_property
    def device(self) -> str:
        """ "cpu" or "cuda:<i>"."""
        return device_of(self.indptr)
