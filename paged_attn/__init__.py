"""Paged attention for CuPy, JAX and NumPy, without PyTorch.

kv = PagedKV(k_pages, v_pages, layout="NHD")
table = PageTable(indptr, indices, last_page_len, page_size=16)
out = decode(q, kv, table)
"""

from .append import append
from .attention import (
    BatchDecodeWithPagedKVCache,
    BatchPrefillWithPagedKVCache,
    decode,
    prefill,
    single_decode,
    single_prefill,
    status,
)
from .cache import PagedKVCache
from .errors import LayoutMismatchError, OutOfPagesError, PageTableError
from .layout import Layout
from .merge import merge_state, merge_states
from .page_table import PageTable
from .paged_kv import PagedKV
from .support import supports
from .warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "BatchDecodeWithPagedKVCache", "BatchPrefillWithPagedKVCache", "Layout", "LayoutMismatchError", "OutOfPagesError",
    "PageTable", "PageTableError", "PagedKV", "PagedKVCache", "__version__", "append", "decode", "merge_state",
    "merge_states", "prefill", "single_decode", "single_prefill", "status", "supports", "warm_up",
]  # fmt: skip
