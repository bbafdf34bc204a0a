"""New tokens that are written into a pool."""

from typing import Any

import numpy as np

from ..errors import LayoutMismatchError, PageTableError
from ..holders import KVPages
from . import arrays
from .overlaps import Compared, check_pairs, compared, may_overlap

_APPEND_NAMES = ("slots", "k", "v", "kv.k_pages", "kv.v_pages")
_APPEND_PAIRS = [(i, j) for i in (1, 2, 0) for j in (3, 4)]


def check_append(kv: KVPages, slots: Any, k: Any, v: Any) -> Compared:
    """New tokens: k [tokens, num_kv_heads, head_dim] and v [tokens, num_kv_heads, v_head_dim], whatever the layout,
    slots int64 or int32 [tokens]. Returns which arrays appends like this one have to compare.

    Host slots are checked by value: -1 skips the token, others lie in [0, num_pages * page_size).
    """
    if not kv.writable:
        raise ValueError(
            "kv cannot be written: its pages are JAX arrays or read-only arrays, or its K and V overlap in memory; "
            "keep the pool as NumPy (CPU) or CuPy (GPU) arrays, K and V apart, and let JAX read them through "
            "jax.dlpack.from_dlpack"
        )
    if slots.dtype not in (arrays.INT64, arrays.INT32):
        raise TypeError(f"slots must be int64 or int32, got {slots.dtype}; pass slots.astype(np.int64)")
    arrays.check_vector(slots, "slots", slots.dtype, None, "one slot = page * page_size + offset for each token")
    arrays.check_metadata_device(slots, "slots", kv.device)
    pairs = check_new_tokens(kv, k, v, slots.shape[0], slots)
    limit = kv.num_pages * kv.page_size
    if isinstance(slots, np.ndarray) and (bad := arrays.first_true((slots < -1) | (slots >= limit))) is not None:
        raise PageTableError(
            f"slots[{bad}] = {slots[bad]} is no slot of a pool of {kv.num_pages} pages of {kv.page_size} tokens; "
            f"pass slots in [0, {limit}), or -1 to skip a token",
            **arrays.entry("slots", bad, slots),
        )
    return pairs


def check_new_tokens(kv: KVPages, k: Any, v: Any, tokens: int, slots: Any = None) -> Compared:
    """k and v, of the pool's dtype and on its device; like slots, not in its memory."""
    for array, name, dim_name, dim in ((k, "k", "head_dim", kv.head_dim), (v, "v", "v_head_dim", kv.v_head_dim)):
        arrays.check_dtype(array, name, kv.dtype, "as kv is")
        wrong_heads = array.ndim == 3 and array.shape[1] != kv.num_kv_heads and array.shape[2] == dim
        if wrong_heads and array.shape[1] == kv.page_size:
            other = kv.layout.other
            raise LayoutMismatchError(
                f"{name} has {array.shape[1]} heads ({name}.shape={array.shape}), and kv, tagged {kv.layout}, has "
                f"num_kv_heads={kv.num_kv_heads} (k_pages.shape={kv.k_pages.shape}); the shapes fit layout {other} "
                f"(page_size={kv.num_kv_heads}, num_kv_heads={kv.page_size}): if the pool was written so, tag the "
                f"pool layout='{other}'; if it was written as {kv.layout}, pass a {name} of shape "
                f"[{tokens}, {kv.num_kv_heads}, {dim}]"
            )
        arrays.check_shape(array, name, (tokens, kv.num_kv_heads, dim), f"[tokens, num_kv_heads, {dim_name}]")
        arrays.check_device(array, name, kv.device, "kv")
        arrays.check_strides(array, name)
    pairs = compared((slots, k, v, kv.k_pages, kv.v_pages), _APPEND_PAIRS)
    check_append_apart(kv, slots, k, v, pairs)
    return pairs


def check_append_apart(kv: KVPages, slots: Any, k: Any, v: Any, pairs: Compared) -> None:
    """The pool overlaps none of the others. pairs: those that check_append returned for arrays like these."""
    if kv.k_address:
        slots_address = 0 if slots is None or isinstance(slots, np.ndarray) else slots.data.ptr
        addresses = slots_address, k.data.ptr, v.data.ptr, kv.k_address, kv.v_address
        if not may_overlap(addresses, pairs):
            return
    check_pairs((slots, k, v, kv.k_pages, kv.v_pages), _APPEND_NAMES, pairs, "{name}.copy()")
