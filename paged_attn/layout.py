"""How the pages of a KV cache lie in memory, as a tag on the data."""

from enum import StrEnum
from typing import Any

import numpy as np

from . import spec
from .interop import device_of, is_jax, namespace, native, on_device_of
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
        spec.as_layout(value)
        raise AssertionError("as_layout accepts what Layout does not")


class PagedKV:
    """The K and V pages of one layer, tagged with their layout: the only door through which a raw pool enters.

    Parameters
    ----------
    k_pages, v_pages: float16, bfloat16, float32 or float64 arrays, [num_pages, page_size, num_kv_heads, head_dim] for
        NHD or [num_pages, num_kv_heads, page_size, head_dim] for HND. Views of larger arrays are welcome: the last axis
        is contiguous, and on a GPU base and strides are multiples of 16 bytes. Nothing is copied. JAX arrays can be
        read but not appended to, because they are immutable.
    layout: the layout that the pool was written in; it has no default.

    A raw pool given a wrong tag cannot be told from a right one where page_size == num_kv_heads.

    Attributes
    ----------
    k_pages, v_pages: the pages as NumPy or CuPy arrays.
    num_pages, page_size, num_kv_heads, head_dim: ints.
    k_strides, v_strides: (page, slot, head) strides in elements, whatever the layout; 0 for an axis of extent 1, and
        for a pool of no page.
    dtype: np.dtype.    layout: Layout.    device: "cpu" or "cuda:<i>".    writable: whether append may write.
    form: a tuple of all that checks and kernels read of the pool but its addresses; equal for layers that are alike.
    loan: what keeps pages that came by DLPack until the kernels that read them are over, or None.

    Raises
    ------
    ValueError: ranks, shapes and strides.
    TypeError: dtypes, and K and V on different devices.
    """

    __slots__ = (
        "device",
        "dtype",
        "form",
        "head_dim",
        "k_pages",
        "k_strides",
        "layout",
        "loan",
        "num_kv_heads",
        "num_pages",
        "page_size",
        "v_pages",
        "v_strides",
        "writable",
    )

    def __init__(self, k_pages: Any, v_pages: Any, *, layout: Layout | str) -> None:
        self.layout = Layout(layout)
        self.k_pages, self.v_pages = native(k_pages, "k_pages"), native(v_pages, "v_pages")
        spec.check_pool(self.k_pages, self.v_pages, self.layout)
        self.loan: Loan | None = loan_of((self.k_pages, k_pages), (self.v_pages, v_pages))
        self.writable = _is_writable(k_pages, self.k_pages) and _is_writable(v_pages, self.v_pages)
        self.dtype: np.dtype = self.k_pages.dtype
        self.device = device_of(self.k_pages)
        slot, head = (1, 2) if self.layout is Layout.NHD else (2, 1)
        shape = self.k_pages.shape
        self.num_pages, self.page_size, self.num_kv_heads, self.head_dim = shape[0], shape[slot], shape[head], shape[3]
        self.k_strides, self.v_strides = (
            tuple(
                pages.strides[axis] // pages.dtype.itemsize if shape[axis] > 1 and shape[0] else 0  # nothing is there
                for axis in (0, slot, head)
            )
            for pages in (self.k_pages, self.v_pages)
        )
        extents = self.num_pages, self.page_size, self.num_kv_heads, self.head_dim
        self.form = (self.layout, self.dtype, self.device, extents, self.k_strides, self.v_strides)

    @classmethod
    def combined(cls, kv_pages: Any, *, layout: Layout | str) -> "PagedKV":
        """A pool that holds K and V in one array [num_pages, 2, <page>], K first; views, no copy."""
        layout = Layout(layout)
        pages = native(kv_pages, "kv_pages")
        spec.check_combined(pages, layout)
        kv = cls(pages[:, 0], pages[:, 1], layout=layout)
        kv.writable = _is_writable(kv_pages, pages)
        kv.loan = loan_of((pages, kv_pages))
        return kv

    def to_layout(self, layout: Layout | str) -> "PagedKV":
        """A contiguous copy of the pool in `layout`, on the same device."""
        layout = Layout(layout)
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


def _is_writable(given: Any, pages: Any) -> bool:
    """JAX arrays are immutable, also on a GPU, where their CuPy view does not show it."""
    return not is_jax(given) and (not isinstance(pages, np.ndarray) or pages.flags.writeable)
