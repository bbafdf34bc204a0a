"""append: new tokens into a pool, in place."""

from typing import Any

import numpy as np

from . import backends
from .checks import overlaps, pools, tokens
from .checks.arrays import signatures_of
from .interop import Array, native
from .lifetimes import loan_of, used
from .paged_kv import PagedKV
from .support import check_supported

# The signature of the last append that passed the checks, and its arrays that must not overlap: one tuple, because all
# threads and pools share it. An append like it skips the checks.
_passed: tuple[tuple[Any, ...] | None, overlaps.Compared] = None, ()


def append(kv: PagedKV, slots: Array, k: Array, v: Array) -> None:
    """Write new tokens into the pool, in place.

    Parameters
    ----------
    kv: PagedKV, the pool.
    slots: int64 or int32 [tokens], NumPy or beside the pool; slot = page * page_size + offset, -1 skips the token.
    k: [tokens, num_kv_heads, head_dim], whatever the layout of the pool, of its dtype and on its device. Like v and
        slots it does not overlap the pool.
    v: [tokens, num_kv_heads, v_head_dim].

    Raises
    ------
    ValueError: shapes, a pool that cannot be written; TypeError: dtypes, devices; NotImplementedError: see `supports`.
    PageTableError: a NumPy slot outside the pool. One in a device array is skipped and recorded: `status` raises it.
    """
    global _passed
    pools.check_kv(kv, "append(kv, slots, k, v)")
    native_slots, native_k, native_v = native(slots, "slots"), native(k, "k"), native(v, "v")
    signature = kv.signature, signatures_of((native_slots, native_k, native_v))[0], kv.writable
    passed, pairs = _passed
    if passed is not None and signature == passed:
        signature = passed  # the same object, whose parts the backend compares at once
        tokens.check_append_apart(kv, native_slots, native_k, native_v, pairs)
    else:
        pairs = tokens.check_append(kv, native_slots, native_k, native_v)
        check_supported("append", kv.device, kv.dtype, kv.head_dim, kv.v_head_dim)
        if not isinstance(native_slots, np.ndarray):  # whose values are checked on every call
            _passed = signature, pairs
    if not native_slots.size:
        return
    loan = None
    if native_k is not k or native_v is not v or native_slots is not slots:
        loan = loan_of((native_slots, slots), (native_k, k), (native_v, v))
    backend = backends.of(kv.device)
    try:
        backend.append(kv, backend.to_backend(native_slots, kv.device), native_k, native_v, signature)
    finally:
        if loan is not None or kv.loan is not None:
            used(loan, kv.loan)
