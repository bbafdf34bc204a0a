"""PagedKV: the pages of one layer of a KV cache, tagged with their layout."""

from typing import Any

from .checks import overlaps, pools
from .holders import KVPages
from .interop import Array, is_native, is_writable, namespace, native, on_device_of
from .layout import Layout, as_layout
from .lifetimes import loan_of, reading


class PagedKV(KVPages):
    """The K and V pages of one layer, tagged with their layout: the only door through which a raw pool enters.

    Parameters
    ----------
    k_pages: float16, bfloat16, float32 or float64 [num_pages, page_size, num_kv_heads, head_dim] for NHD or
        [num_pages, num_kv_heads, page_size, head_dim] for HND. A view of a larger array is welcome: the last axis is
        contiguous, and on a GPU base and strides are multiples of 16 bytes. Nothing is copied. A JAX array can be read
        but not appended to, because it is immutable.
    v_pages: like k_pages, and of its dtype; its last axis may be another v_head_dim.
    layout: Layout or "NHD" or "HND", the layout that the pool was written in; it has no default.

    A raw pool given a wrong tag cannot be told from a right one where page_size == num_kv_heads.

    Attributes (read-only)
    ----------
    k_pages, v_pages: the pages as NumPy or CuPy arrays.
    num_pages, page_size, num_kv_heads, head_dim, v_head_dim: ints.
    dtype: np.dtype.    layout: Layout.    device: "cpu" or "cuda:<i>".    writable: whether append may write.

    Raises
    ------
    ValueError: ranks, shapes and strides.
    TypeError: dtypes, and K and V on different devices.
    """

    def __init__(self, k_pages: Array, v_pages: Array, *, layout: Layout | str) -> None:
        layout = as_layout(layout)
        k, v = native(k_pages, "k_pages"), native(v_pages, "v_pages")
        pools.check_pool(k, v, layout)
        writable = is_writable(k_pages, k) and is_writable(v_pages, v) and not overlaps.overlap(k, v)
        loan = loan_of((k, k_pages), (v, v_pages))
        self._set(k_pages=k, v_pages=v, layout=layout, writable=writable, loan=loan)

    @classmethod
    def combined(cls, kv_pages: Array, *, layout: Layout | str) -> "PagedKV":
        """A pool that holds K and V in one array; views, no copy.

        kv_pages: [num_pages, 2, <page>], K first.
        layout: Layout or "NHD" or "HND"; it has no default.
        """
        layout = as_layout(layout)
        pages = native(kv_pages, "kv_pages")
        pools.check_combined(pages, layout)
        kv = cls(pages[:, 0], pages[:, 1], layout=layout)
        kv._set(writable=kv.writable and is_writable(kv_pages, pages), loan=loan_of((pages, kv_pages)))
        return kv

    def to_layout(self, layout: Layout | str) -> "PagedKV":
        """A contiguous copy of the pool, on the same device.

        layout: Layout or "NHD" or "HND", that of the copy.
        """
        layout = as_layout(layout)
        with reading(self.loan), on_device_of(self.k_pages):
            return PagedKV(self._copy(self.k_pages, layout), self._copy(self.v_pages, layout), layout=layout)

    def _copy(self, pages: Any, layout: Layout) -> Any:
        bits = pages.view(f"u{self.dtype.itemsize}")  # CuPy copies integers of any size, but not every float
        if layout is not self.layout:
            bits = bits.swapaxes(1, 2)
        return namespace(pages).array(bits, order="C", copy=True).view(self.dtype)

    def __repr__(self) -> str:
        if not is_native(self.k_pages):  # a leaf without memory
            return f"PagedKV(k_pages={self.k_pages!r}, v_pages={self.v_pages!r}, layout={str(self.layout)!r})"
        v_head_dim = "" if self.v_head_dim == self.head_dim else f"v_head_dim={self.v_head_dim}, "
        read_only = "" if self.writable else ", read-only"
        return (
            f"PagedKV(num_pages={self.num_pages}, page_size={self.page_size}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, {v_head_dim}dtype={self.dtype}, layout={str(self.layout)!r}, "
            f"device={self.device!r}{read_only})"
        )
