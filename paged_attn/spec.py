"""All checks and all messages: what may go together, said before anything is launched.

Every function takes native arrays (interop.native) and raises ValueError for shapes and values, TypeError for dtypes
and for mixed libraries and devices, LayoutMismatchError and PageTableError for what their names say. NumPy and CuPy
arrays share the attributes that are read here (shape, dtype, strides), so nothing here imports CuPy.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import LayoutMismatchError, PageTableError
from .interop import FLOAT_DTYPES, check_readable, device_of

if TYPE_CHECKING:
    from .layout import PagedKV
    from .page_table import PageTable

LAYOUTS = ("NHD", "HND")
AXES = {
    "NHD": "[num_pages, page_size, num_kv_heads, head_dim]",
    "HND": "[num_pages, num_kv_heads, page_size, head_dim]",
}
ALIGNMENT = 16  # bytes: what the kernels load at once
MAX_POOL_SPAN = 2**32 * ALIGNMENT  # the kernels count a pool's bytes in 32 bits of that unit
_INT32, _INT64, _FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
_INT_MAX = 2**31 - 1
FLOAT_RANGE = 2.0**-126, 2.0**127  # normal float32 numbers, the largest of them even times log2(e)


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention call computes, checked: the numbers from which a backend makes its kernels and buffers."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    dtype: np.dtype  # of q, k, v and the pool
    layout: str  # "NHD" or "HND"
    device: str  # "cpu" or "cuda:<i>"
    causal: bool
    sm_scale: float
    window_left: int  # keys to the left of a query's own position; -1: all
    logits_soft_cap: float  # 0.0: off
    q_len: int | None  # decode: queries a request; prefill: None

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads


# --------------------------------------------------------------------------------------------------------------------
# Scalars


def as_int(value: Any, name: str, *, minimum: int, maximum: int = _INT_MAX) -> int:
    """`value` as an int of [minimum, maximum]; TypeError for floats, bools and arrays."""
    if type(value) is int and minimum <= value <= maximum:  # the usual one, and a table waits for this
        return value
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an int, got {_shown(value)}; pass {_one_of(value, name, 'int')}")
    if not minimum <= number <= maximum:
        raise ValueError(
            f"{name} is {number}, which is not in [{minimum}, {maximum}]; pass {name} of at least {minimum}"
            if number < minimum
            else f"{name} is {number}, which is more than {maximum}; pass a smaller {name}"
        )
    return number


def as_float(value: Any, name: str, *, rule: str = "", minimum: float = -math.inf) -> float:
    """`value` as a finite float of at least `minimum`; TypeError for strings, bools and arrays."""
    try:
        number = None if isinstance(value, (bool, str, bytes)) or _is_array(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise TypeError(f"{name} must be a float, got {_shown(value)}; pass {_one_of(value, name, 'float')}")
    if not math.isfinite(number) or number < minimum:
        bound = f" and at least {minimum:g}" if minimum > -math.inf else ""
        raise ValueError(f"{name} is {number}, and it must be finite{bound}; {rule or f'pass another {name}'}")
    return number


def _shown(value: Any) -> str:
    """What came instead of a number; of an array its shape, as its values may be many."""
    kind = type(value).__name__
    return f"an array of shape {tuple(value.shape)} ({kind})" if _is_array(value) else f"{value!r} ({kind})"


def _one_of(value: Any, name: str, kind: str) -> str:
    """How to make the number that was wanted."""
    if _is_array(value):
        return f"one {kind}"
    try:
        {"int": int, "float": float}[kind](value)
    except Exception:  # what came is no number, in whatever way
        return "an int" if kind == "int" else "a float"
    return f"{kind}({name})"


def _is_array(value: Any) -> bool:
    return getattr(value, "ndim", 0) > 0


def as_layout(layout: Any) -> str:
    """ "NHD" or "HND"; anything else is a ValueError that shows both."""
    if isinstance(layout, str) and layout in LAYOUTS:
        return str(layout)
    raise ValueError(
        f"layout must be 'NHD' (pages are [page_size, num_kv_heads, head_dim]) or 'HND' "
        f"([num_kv_heads, page_size, head_dim]), got {layout!r}; pass the one that the pool was written in"
    )


def as_base(base: Any) -> float:
    """The base of a logarithm: "e" (or math.e) or 2."""
    if isinstance(base, str) and base == "e":
        return math.e
    if isinstance(base, (int, float, np.number)) and not isinstance(base, bool) and base in (2, math.e):
        return float(base)
    raise ValueError(
        f"base is {base!r}; pass base='e' for natural-log states (paged_attn, JAX, FlashAttention) or base=2"
    )


# --------------------------------------------------------------------------------------------------------------------
# Pieces of array checks


def _check_dtype(array: Any, name: str, wanted: np.dtype, why: str = "") -> None:
    if array.dtype != wanted:
        because = f" ({why})" if why else ""
        kind = f"np.{wanted}" if wanted != FLOAT_DTYPES["bfloat16"] else "ml_dtypes.bfloat16"
        raise TypeError(f"{name} must be {wanted}{because}, got {array.dtype}; pass {name}.astype({kind})")


def _check_float(array: Any, name: str) -> None:
    if array.dtype not in FLOAT_DTYPES.values():
        raise TypeError(
            f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {array.dtype}; pass {name}.astype(np.float16), say"
        )


def _check_shape(array: Any, name: str, wanted: tuple[Any, ...], axes: str) -> None:
    """`wanted` has an int for an extent that is fixed and a name for one that is not."""
    shape = array.shape
    if shape == wanted:
        return
    if len(shape) != len(wanted):
        raise ValueError(f"{name} must have {len(wanted)} axes, {axes}, got {name}.shape={shape}; reshape {name}")
    for extent, want in zip(shape, wanted, strict=True):
        if isinstance(want, int) and extent != want:
            named = ", ".join(str(w) for w in wanted)
            raise ValueError(
                f"{name} must have shape [{named}], {axes}, got {name}.shape={shape}; reshape or slice {name}"
            )


def _check_device(array: Any, name: str, device: str, other: str) -> None:
    found = device_of(array)
    if found != device:
        raise TypeError(
            f"{name} lives on {found} and {other} on {device}; they must be together (nothing is moved by itself): "
            f"pass {_moved(name, device)}"
        )


def _check_metadata_device(array: Any, name: str, device: str) -> None:
    """Metadata lives beside the data, or on the host, from where it is uploaded."""
    found = device_of(array)
    if found not in ("cpu", device):
        raise TypeError(
            f"{name} lives on {found} and kv on {device}; metadata must be a NumPy array or live on kv's device: "
            f"pass {_moved(name, device)}"
        )


def _moved(name: str, device: str) -> str:
    return f"cupy.asnumpy({name})" if device == "cpu" else f"cupy.asarray({name}), made on {device}"


def _check_vector(array: Any, name: str, dtype: np.dtype, length: int | None, meaning: str) -> None:
    """A contiguous 1-D array of metadata: `length` entries, if that is known."""
    found = array.dtype
    if found is not dtype and found != dtype:  # NumPy has one object for each, but not for what comes by DLPack
        raise TypeError(f"{name} must be {dtype}, got {found}; pass {name}.astype(np.{dtype})")
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, {meaning}, got {name}.shape={array.shape}; pass {name}.reshape(-1)")
    if length is not None and array.shape[0] != length:
        raise ValueError(
            f"{name} must have {length} entries, {meaning}, got {array.shape[0]}; make {name} of that length"
        )
    if array.shape[0] > 1 and array.strides[0] != array.dtype.itemsize:
        raise ValueError(
            f"{name} must be contiguous, got a stride of {array.strides[0]} bytes for {dtype}; "
            f"pass np.ascontiguousarray({name})"
        )
    if not isinstance(array, np.ndarray):
        _check_base(array, name, dtype.itemsize)


def _check_strides(array: Any, name: str, *, aligned: bool = True) -> None:
    """The last axis is contiguous. On a GPU base and strides are multiples of 16 bytes where kernels load that much
    at once (`aligned`), else of an element. Strides of axes of extent 1 are free."""
    shape, strides, dtype = array.shape, array.strides, array.dtype
    if 0 in shape:
        return
    if strides[-1] != dtype.itemsize and shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous along its last axis: the stride there is {strides[-1]} bytes, and "
            f"{dtype} has {dtype.itemsize} ({name}.shape={shape}); pass a contiguous copy, np.ascontiguousarray({name})"
        )
    unit = 1
    if not isinstance(array, np.ndarray):
        unit = ALIGNMENT if aligned else dtype.itemsize
        _check_base(array, name, unit)
    for axis, stride in enumerate(strides[:-1]):
        if (stride < 0 or stride % unit) and shape[axis] > 1:
            _refuse_stride(array, name, axis, unit)


def _refuse_stride(array: Any, name: str, axis: int, unit: int) -> None:
    stride = array.strides[axis]
    if stride < 0:
        raise ValueError(
            f"{name} runs backwards along axis {axis}, in steps of {stride} bytes; "
            f"pass a contiguous copy, np.ascontiguousarray({name})"
        )
    raise ValueError(
        f"{name} has a stride of {stride} bytes along axis {axis}, no multiple of {unit} (the kernels load "
        f"{unit} at once; {name}.shape={array.shape}, {array.dtype}); pad the axes inside it to multiples of "
        f"{unit // array.dtype.itemsize} elements, or pass a copy"
    )


def _check_base(array: Any, name: str, unit: int = ALIGNMENT) -> None:
    """A GPU array begins at a multiple of `unit` bytes."""
    if not isinstance(array, np.ndarray) and array.data.ptr % unit:
        raise ValueError(
            f"{name} begins at address {array.data.ptr:#x}, which is no multiple of {unit} bytes (the kernels load "
            f"{unit} at once); pass a view that begins at a multiple of it, or a copy"
        )


def _check_contiguous(array: Any, name: str) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous because it is written whole, got strides {array.strides} for "
            f"{name}.shape={array.shape}; pass an array made by empty_like or a slice of leading rows of one"
        )


# --------------------------------------------------------------------------------------------------------------------
# Memory that is written while other memory is still read. Two arrays overlap where the ranges from their first to their
# last byte do and they are not provably disjoint: K and V interleaved in one pool, or heads of one array by turns, are.
# Shapes and strides of a call may be known to be right; addresses are new each time, so this is asked on every call.

_MOST_WORK = 10_000  # steps of np.shares_memory: far more than strides that divide each other take


def overlap(a: Any, b: Any) -> bool:
    """Whether two arrays overlap."""
    on_host = isinstance(a, np.ndarray)
    if isinstance(b, np.ndarray) is not on_host:
        return False
    if on_host:
        if not np.may_share_memory(a, b):
            return False
    else:
        if a.data.device_id != b.data.device_id:
            return False
        (a_begin, a_end), (b_begin, b_end) = _bounds(a), _bounds(b)
        if a_end <= b_begin or b_end <= a_begin:
            return False
        a, b = np.asarray(_OnHost(a)), np.asarray(_OnHost(b))
    try:
        return np.shares_memory(a, b, max_work=_MOST_WORK)  # type: ignore[arg-type]  # any int is one
    except np.exceptions.TooHardError:
        return True


def _bounds(array: Any) -> tuple[int, int]:
    """The addresses of a GPU array's first byte and of the byte behind its last one."""
    begin = array.data.ptr
    if array.size == 0:
        return begin, begin
    end = begin + array.dtype.itemsize
    for extent, stride in zip(array.shape, array.strides, strict=True):
        if stride > 0:
            end += (extent - 1) * stride
        else:
            begin += (extent - 1) * stride
    return begin, end


class _OnHost:
    """A GPU array's addresses, shape and strides for NumPy, which compares but never reads what is there."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (array.data.ptr, True),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
        }


def _check_apart(
    written: Sequence[tuple[Any, str]],
    read: Sequence[tuple[Any, str]],
    remedy: str = "a {name} with memory of its own, or None",
) -> None:
    """No array that is written (None: there is none) overlaps one that is read, or another that is written."""
    given = [
        (array, name, None if isinstance(array, np.ndarray) else _bounds(array))
        for array, name in (*written, *read)
        if array is not None
    ]
    num_written = sum(array is not None for array, _ in written)
    for place, (array, name, bounds) in enumerate(given[:num_written]):
        for other, other_name, other_bounds in given[place + 1 :]:
            if bounds and other_bounds and (bounds[1] <= other_bounds[0] or other_bounds[1] <= bounds[0]):
                continue
            if overlap(array, other):
                raise ValueError(
                    f"{name} overlaps {other_name} in memory, and one of them is written while the other is in use; "
                    f"pass {remedy.format(name=name)}"
                )


def extents_of(*arrays: Any) -> tuple[int, ...]:
    """For check_apart_of_run and ..._of_append: bytes from the first to the last one of GPU arrays whose strides have
    been checked, 0 for None and for metadata of the host. Nothing for arrays of the host: NumPy compares those."""
    if isinstance(arrays[0], np.ndarray):
        return ()
    return tuple(
        0 if array is None or isinstance(array, np.ndarray) or not array.size else _bounds(array)[1] - array.data.ptr
        for array in arrays
    )


def check_apart_of_run(q: Any, kv: "PagedKV", out: Any, lse: Any, extents: tuple[int, ...]) -> None:
    """out and lse, one of which was given, overlap neither each other nor q nor the pool.

    extents: extents_of(q, k_pages, v_pages, out, lse), made once for all calls with arrays of one form.
    """
    if extents:
        q_size, k_size, v_size, out_size, lse_size = extents
        q_at, k_at, v_at = q.data.ptr, kv.k_address, kv.v_address
        apart, out_at = True, 0
        if out is not None:
            out_at, low = out.data.ptr, -out_size
            apart = not (low < out_at - q_at < q_size or low < out_at - k_at < k_size or low < out_at - v_at < v_size)
        if lse is not None:
            at, low = lse.data.ptr, -lse_size
            apart = apart and not (
                low < at - q_at < q_size
                or low < at - k_at < k_size
                or low < at - v_at < v_size
                or low < at - out_at < out_size
            )
    else:
        may = np.may_share_memory
        k_pages, v_pages = kv.k_pages, kv.v_pages
        apart = (out is None or not (may(out, q) or may(out, k_pages) or may(out, v_pages))) and (
            lse is None
            or not (may(lse, q) or may(lse, k_pages) or may(lse, v_pages) or (out is not None and may(lse, out)))
        )
    if not apart:
        _check_apart(((out, "out"), (lse, "lse")), ((q, "q"), (kv.k_pages, "kv.k_pages"), (kv.v_pages, "kv.v_pages")))


def check_apart_of_append(kv: "PagedKV", slots: Any, k: Any, v: Any, extents: tuple[int, ...] = ()) -> None:
    """The pool overlaps neither k, v nor slots. extents: extents_of(k, v, slots, k_pages, v_pages), if made before."""
    k_pages, v_pages = kv.k_pages, kv.v_pages
    if extents := extents or extents_of(k, v, slots, k_pages, v_pages):
        k_size, v_size, slots_size, k_pool_size, v_pool_size = extents
        k_at, v_at, k_pool, v_pool = k.data.ptr, v.data.ptr, kv.k_address, kv.v_address
        slots_at = slots.data.ptr if slots_size else 0
        apart = not (
            -k_size < k_at - k_pool < k_pool_size
            or -k_size < k_at - v_pool < v_pool_size
            or -v_size < v_at - k_pool < k_pool_size
            or -v_size < v_at - v_pool < v_pool_size
            or -slots_size < slots_at - k_pool < k_pool_size
            or -slots_size < slots_at - v_pool < v_pool_size
        )
    else:
        may = np.may_share_memory
        apart = not any(may(array, k_pages) or may(array, v_pages) for array in (k, v, slots))
    if apart:
        return
    for array, name in ((k, "k"), (v, "v"), (slots, "slots")):
        _check_apart(((array, name),), ((k_pages, "kv.k_pages"), (v_pages, "kv.v_pages")), "{name}.copy()")


# --------------------------------------------------------------------------------------------------------------------
# Pools


def check_kv(kv: Any, call: str) -> None:
    """`kv` is a PagedKV: a raw pool has no layout tag. `call` shows the arguments in their order."""
    if not hasattr(kv, "k_strides"):
        raise TypeError(
            f"kv must be a PagedKV, got {type(kv).__name__}; tag the pool, PagedKV(k_pages, v_pages, layout=...), and "
            f"pass {call}"
        )


def check_operands(kv: Any, table: Any, call: str) -> None:
    """`kv` is a PagedKV and `table` a PageTable."""
    check_kv(kv, call)
    check_table(table, call=call)


def check_pool(k_pages: Any, v_pages: Any, layout: str) -> None:
    """K and V pages of one layer: [page, slot, head, dim] (NHD) or [page, head, slot, dim] (HND), alike."""
    for array, name in ((k_pages, "k_pages"), (v_pages, "v_pages")):
        _check_float(array, name)
        if array.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes, {AXES[layout]} for layout={str(layout)!r}, got {name}.shape={array.shape}; "
                f"pass one layer's pages (a pool of K and V together goes through PagedKV.combined)"
            )
        if 0 in array.shape[1:]:
            raise ValueError(
                f"{name} has an empty axis ({name}.shape={array.shape}, {AXES[layout]}); only num_pages may be 0: "
                f"pass a pool whose page_size, num_kv_heads and head_dim are at least 1"
            )
    if k_pages.shape != v_pages.shape:
        raise ValueError(
            f"v_pages must have the shape of k_pages, got v_pages.shape={v_pages.shape} and "
            f"k_pages.shape={k_pages.shape}; pass K and V of the same layer"
        )
    _check_dtype(v_pages, "v_pages", k_pages.dtype, "as k_pages is")
    _check_device(v_pages, "v_pages", device_of(k_pages), "k_pages")
    for array, name in ((k_pages, "k_pages"), (v_pages, "v_pages")):
        _check_strides(array, name)
        span = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True))
        if span >= MAX_POOL_SPAN and not isinstance(array, np.ndarray):
            raise NotImplementedError(
                f"{name} spans {span} bytes from its first to its last element, and the kernels address "
                f"{MAX_POOL_SPAN} (64 GiB); split the pool, or store each layer by itself"
            )


def check_combined(kv_pages: Any, layout: str) -> None:
    """K and V in one array: [num_pages, 2, ...], K first."""
    if kv_pages.ndim != 5 or kv_pages.shape[1] != 2:
        inner = AXES[layout].removeprefix("[num_pages, ")
        raise ValueError(
            f"kv_pages must be [num_pages, 2, {inner} for layout={str(layout)!r}, got kv_pages.shape={kv_pages.shape}; "
            f"pass K and V on axis 1, or two arrays to PagedKV(k_pages, v_pages, layout=...)"
        )


def _other_layout(layout: str) -> str:
    return "HND" if layout == "NHD" else "NHD"


def _check_page_size(kv: "PagedKV", page_size: int) -> None:
    if kv.page_size == page_size:
        return
    said = (
        f"kv is tagged {kv.layout}, under which k_pages.shape={kv.k_pages.shape} has page_size={kv.page_size} and "
        f"num_kv_heads={kv.num_kv_heads}, but the table has page_size={page_size}"
    )
    right_table = f"pass a table that was made with page_size={kv.page_size}"
    if kv.num_kv_heads != page_size:
        raise LayoutMismatchError(f"{said}; neither layout fits, so {right_table}")
    other = _other_layout(kv.layout)
    raise LayoutMismatchError(
        f"{said}; the shape fits layout {other} (page_size={page_size}, num_kv_heads={kv.page_size}): if the pool was "
        f"written so, tag the pool layout='{other}'; if it was written as {kv.layout}, {right_table}"
    )


# --------------------------------------------------------------------------------------------------------------------
# Tables


def check_table(table: Any, name: str = "table", call: str = "") -> None:
    """`table` is a PageTable. `call` shows the arguments in their order."""
    if not hasattr(table, "page_stride"):
        raise TypeError(
            f"{name} must be a PageTable, got {type(table).__name__}; "
            f"pass PageTable(indptr, indices, last_page_len, page_size=...){f' in {call}' if call else ''}"
        )


def check_table_arrays(
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    page_size: Any,
    page_offset: Any = None,
    page_stride: Any = 1,
    total_len: Any = None,
) -> None:
    """The arrays of a PageTable: int32, 1-D, contiguous, of one library and device, of lengths that agree."""
    as_int(page_size, "page_size", minimum=1)
    as_int(page_stride, "page_stride", minimum=1)
    _check_vector(indptr, "indptr", _INT32, None, "batch_size + 1 offsets into indices")
    if indptr.shape[0] == 0:
        raise ValueError("indptr is empty, and it has batch_size + 1 entries; pass [0] for an empty batch")
    batch_size = indptr.shape[0] - 1
    _check_vector(indices, "indices", _INT32, None, "the page ids of all requests")
    _check_vector(last_page_len, "last_page_len", _INT32, batch_size, "one for each request (len(indptr) - 1)")
    arrays = [(indices, "indices"), (last_page_len, "last_page_len")]
    for array, name in ((page_offset, "page_offset"), (total_len, "total_len")):
        if array is not None:
            _check_vector(array, name, _INT32, batch_size, "one for each request (len(indptr) - 1)")
            arrays.append((array, name))
    device = device_of(indptr)
    for array, name in arrays:
        if device != "cpu" or not isinstance(array, np.ndarray):
            _check_device(array, name, device, "indptr")


def check_table_values(table: "PageTable", num_pages: int | None) -> None:
    """A host table in full, against a pool of `num_pages` pages (None: of any size). A device table is not read."""
    if table.device != "cpu":
        return
    # As unsigned numbers negative ones are too large: one comparison is enough.
    indptr, limit = table.indptr, table.indices.shape[0]
    begins, ends = indptr[:-1].view(np.uint32), indptr[1:].view(np.uint32)
    if (bad := _first((ends < begins) | (ends > limit))) is not None:
        begin, end = int(indptr[bad]), int(indptr[bad + 1])
        place = bad + 1 if 0 <= begin <= limit else 0
        raise PageTableError(
            f"indptr[{place}] = {indptr[place]} gives request {bad} the pages [{begin}, {end}) of indices, which has "
            f"{limit} entries; indptr must not decrease and must stay within [0, {limit}]: correct indptr[{place}]",
            field="indptr",
            index=place,
            value=int(indptr[place]),
        )
    first = int(indptr[0])
    used = table.indices[first : int(indptr[-1])]
    if num_pages is not None and (bad := _first(used.view(np.uint32) >= num_pages)) is not None:
        request = int(np.searchsorted(indptr, first + bad, side="right")) - 1
        page = int(used[bad])
        raise PageTableError(
            f"indices[{first + bad}] = {page} (request {request}) is no page of a pool of num_pages={num_pages}; "
            f"pass page ids in [0, {num_pages})",
            field="indices",
            index=first + bad,
            value=page,
        )
    held = ends > begins
    last = table.last_page_len
    if (bad := _first(held & ((last - 1).view(np.uint32) >= table.page_size))) is not None:
        raise PageTableError(
            f"last_page_len[{bad}] = {last[bad]}, and a request that has pages has 1 <= last_page_len <= "
            f"page_size={table.page_size}; correct last_page_len[{bad}]",
            field="last_page_len",
            index=bad,
            value=int(last[bad]),
        )
    for array, field in ((table.page_offset, "page_offset"), (table.total_len, "total_len")):
        if array is not None and (bad := _first(array < 0)) is not None:
            raise PageTableError(
                f"{field}[{bad}] = {array[bad]}, and it must not be negative; correct {field}[{bad}]",
                field=field,
                index=bad,
                value=int(array[bad]),
            )
    if table.page_offset is None and limit * table.page_stride * table.page_size <= _INT_MAX:
        return
    counts = np.diff(indptr).astype(np.int64)
    offset = 0 if table.page_offset is None else table.page_offset.astype(np.int64)
    # In float64, which is exact up to 2**53 and never turns round.
    end_position = (offset + (counts - 1) * float(table.page_stride)) * table.page_size + last
    if (bad := _first(held & (end_position > _INT_MAX))) is not None:
        field = "indptr" if table.page_offset is None else "page_offset"
        raise PageTableError(
            f"request {bad} ends at position {end_position[bad]:.0f}, and positions stay below 2**31 "
            f"({counts[bad]} pages of {table.page_size} tokens); correct {field}[{bad}]",
            field=field,
            index=bad,
            value=int(end_position[bad]),
        )


def _first(wrong: np.ndarray) -> int | None:
    """Index of the first True, or None."""
    found = int(wrong.argmax()) if wrong.size else 0
    return found if wrong.size and wrong[found] else None


def check_table_out(out: Any, page_size: int, device: str, batch_size: int, num_pages: int) -> None:
    """`out` of PagedKVCache.page_table: a plain table, of this page_size and device, with room for the batch."""
    check_table(out, "out")
    if out.page_offset is not None or out.total_len is not None or out.page_stride != 1:
        raise ValueError(
            f"out has positions of its own (page_offset, total_len or page_stride={out.page_stride}), and a cache "
            f"writes whole sequences; pass a table of PageTable.empty"
        )
    if out.page_size != page_size:
        raise ValueError(
            f"out has page_size={out.page_size}, and the cache has page_size={page_size}; make out with "
            f"page_size={page_size}"
        )
    if out.device != device:
        raise TypeError(f"out lives on {out.device} and the cache on {device}; make out with device={device!r}")
    _check_table_writable(out, "pass a table of PageTable.empty")
    check_apart_of_table(out)
    for field, what, count, capacity in (
        ("max_batch_size", "sequences", batch_size, out.batch_size),
        ("max_pages", "pages", num_pages, out.indices.size),
    ):
        if count > capacity:
            raise PageTableError(
                f"seqs has {count} {what}, more than {field}={capacity} of out; "
                f"make out with PageTable.empty and a larger {field}, or pass fewer sequences",
                field=field,
                value=count,
            )


def _check_table_writable(out: "PageTable", remedy: str) -> None:
    if not out.writable:
        raise ValueError(f"out cannot be written: some of its arrays are JAX arrays or read-only arrays; {remedy}")


def check_split_out(out: Any, table: "PageTable", num_chunks: int) -> None:
    """`out` of PageTable.split: num_chunks * batch_size rows, positions of its own, room for every page."""
    check_table(out, "out")
    rows = num_chunks * table.batch_size
    if out.batch_size != rows:
        raise ValueError(
            f"out has {out.batch_size} rows, and {num_chunks} chunks of a batch of {table.batch_size} are {rows}; "
            f"pass the table that split({num_chunks}) of a batch of this size returned"
        )
    if out.page_offset is None or out.total_len is None:
        raise ValueError(
            "out has no page_offset or no total_len, and the chunks of a sequence need both; "
            "pass a table that split returned, or one made with both arrays"
        )
    if (out.page_size, out.page_stride) != (table.page_size, table.page_stride):
        raise ValueError(
            f"out has page_size={out.page_size} and page_stride={out.page_stride}, and the table has "
            f"{table.page_size} and {table.page_stride}; pass an out made for this table"
        )
    if out.indices.shape[0] < table.indices.shape[0]:
        raise ValueError(
            f"out.indices has {out.indices.shape[0]} entries, fewer than the {table.indices.shape[0]} of the table; "
            f"make it at least as long"
        )
    if out.device != table.device:
        raise TypeError(
            f"out lives on {out.device} and the table on {table.device}; pass an out made by a table on {table.device}"
        )
    _check_table_writable(out, "pass a table that split returned")
    check_apart_of_table(out, table)


def check_apart_of_table(out: "PageTable", *sources: "PageTable") -> None:
    """The arrays of a table that is written overlap neither each other nor those of tables it is written from."""
    names = ("indptr", "indices", "last_page_len", "page_offset", "total_len")
    read = [(getattr(source, name), f"the table's {name}") for source in sources for name in names]
    _check_apart(
        [(getattr(out, name), f"out.{name}") for name in names], read, "an out whose arrays have memory of their own"
    )


def check_block_table(block_table: Any, seq_lens: Any, page_size: int) -> None:
    """block_table int32 [batch, max_pages_per_seq], seq_lens int32 [batch]; host values are checked in full."""
    if block_table.dtype != _INT32:
        raise TypeError(f"block_table must be int32, got {block_table.dtype}; pass block_table.astype(np.int32)")
    _check_shape(block_table, "block_table", ("batch", "max_pages_per_seq"), "[batch, max_pages_per_seq]")
    batch_size, max_pages = block_table.shape
    _check_vector(seq_lens, "seq_lens", _INT32, batch_size, "one for each row of block_table")
    _check_device(seq_lens, "seq_lens", device_of(block_table), "block_table")
    if not isinstance(block_table, np.ndarray):
        return
    if (bad := _first((seq_lens < 0) | (seq_lens > max_pages * page_size))) is not None:
        raise PageTableError(
            f"seq_lens[{bad}] = {seq_lens[bad]}, which is not in [0, {max_pages * page_size}] (block_table has "
            f"{max_pages} pages of {page_size} tokens a row); correct seq_lens[{bad}] or pass a wider block_table",
            field="seq_lens",
            index=bad,
            value=int(seq_lens[bad]),
        )
    pages = -(-seq_lens.astype(np.int64) // page_size)
    wrong = (np.arange(max_pages) < pages[:, None]) & (block_table < 0)
    if (bad := _first(wrong.ravel())) is not None:
        row, column = divmod(bad, max_pages)
        raise PageTableError(
            f"block_table[{row}, {column}] = {block_table[row, column]}, but row {row} has seq_lens[{row}] = "
            f"{seq_lens[row]} tokens in {pages[row]} pages; put the page's id there",
            field="block_table",
            index=row,
            value=int(block_table[row, column]),
        )


def check_block_width(table: "PageTable", max_pages_per_seq: int) -> None:
    """No request of a host table has more pages than a row of its dense form."""
    if table.device == "cpu" and (bad := _first(np.diff(table.indptr) > max_pages_per_seq)) is not None:
        pages = int(table.indptr[bad + 1] - table.indptr[bad])
        raise PageTableError(
            f"max_pages_per_seq is {max_pages_per_seq}, and request {bad} has {pages} pages; "
            f"pass max_pages_per_seq of at least {pages}",
            field="max_pages",
            index=bad,
            value=pages,
        )


def check_token_places(batch_indices: Any, positions: Any, table: "PageTable") -> None:
    """The arguments of PageTable.slots: int32 [n] both, beside the table or on the host, where values are checked."""
    _check_vector(batch_indices, "batch_indices", _INT32, None, "the request of each token")
    _check_vector(positions, "positions", _INT32, batch_indices.shape[0], "one for each entry of batch_indices")
    for array, name in ((batch_indices, "batch_indices"), (positions, "positions")):
        found = device_of(array)
        if found not in ("cpu", table.device):
            raise TypeError(
                f"{name} lives on {found} and the table on {table.device}; pass NumPy or {_moved(name, table.device)}"
            )
    limits = ((batch_indices, "batch_indices", table.batch_size), (positions, "positions", _INT_MAX))
    for array, name, limit in limits:
        if isinstance(array, np.ndarray) and (bad := _first((array < 0) | (array >= limit))) is not None:
            raise PageTableError(
                f"{name}[{bad}] = {array[bad]}, which is not in [0, {limit}); correct {name}[{bad}]",
                field=name,
                index=bad,
                value=int(array[bad]),
            )


# --------------------------------------------------------------------------------------------------------------------
# Attention


def attention_spec(
    kv: "PagedKV",
    table: "PageTable",
    num_qo_heads: Any,
    *,
    q_len: Any,
    causal: Any,
    sm_scale: Any,
    window_left: Any,
    logits_soft_cap: Any,
) -> AttentionSpec:
    """The checked spec of one attention call over `kv` by `table` (check_operands has seen both).

    Parameters
    ----------
    q_len: queries a request (decode), or None (prefill, where qo_indptr says).
    sm_scale: None is 1 / sqrt(head_dim).

    Raises
    ------
    LayoutMismatchError: the pool's shape under its tag has another page_size than the table.
    ValueError, TypeError: as the module says. Values of a host table are for check_table_values.
    """
    _check_page_size(kv, table.page_size)
    if table.device not in ("cpu", kv.device):
        raise TypeError(
            f"table lives on {table.device} and kv on {kv.device}; a table is made of NumPy arrays or lives on kv's "
            f"device: make it from arrays there"
        )
    heads = as_int(num_qo_heads, "num_qo_heads", minimum=1)
    check_heads(kv, heads, f"num_qo_heads={heads}")
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be a bool, got {causal!r} ({type(causal).__name__}); pass True or False")
    scale = 1.0 / math.sqrt(kv.head_dim) if sm_scale is None else _as_scale(sm_scale)
    return AttentionSpec(
        num_qo_heads=heads,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        page_size=kv.page_size,
        num_pages=kv.num_pages,
        dtype=kv.dtype,
        layout=str(kv.layout),
        device=kv.device,
        causal=bool(causal),
        sm_scale=scale,
        window_left=as_int(window_left, "window_left", minimum=-1),
        logits_soft_cap=_as_soft_cap(logits_soft_cap, scale),
        q_len=None if q_len is None else as_int(q_len, "q_len", minimum=1),
    )


def _as_scale(sm_scale: Any) -> float:
    scale = as_float(sm_scale, "sm_scale", rule="pass None for 1/sqrt(head_dim)")
    if scale <= 0:  # a kernel's running maximum would be a minimum
        raise ValueError(f"sm_scale is {scale:g}, and it must be positive; negate q, or pass None for 1/sqrt(head_dim)")
    _check_range(scale, "sm_scale", "multiply q by a part of it, or pass None for 1/sqrt(head_dim)")
    return scale


def _as_soft_cap(logits_soft_cap: Any, sm_scale: float) -> float:
    cap = as_float(logits_soft_cap, "logits_soft_cap", minimum=0.0, rule="pass 0.0 to switch it off")
    if cap > 0:
        _check_range(cap, "logits_soft_cap", "pass 0.0 to switch it off")
        _check_range(sm_scale / cap, "sm_scale / logits_soft_cap", f"pass a logits_soft_cap nearer to {sm_scale=:g}")
    return cap


def _check_range(number: float, name: str, remedy: str) -> None:
    """Positive numbers that are 0 or infinite in float32 would be so in the kernels; every backend refuses them."""
    least, most = FLOAT_RANGE
    if not least <= number <= most:
        raise ValueError(f"{name} is {number:g}, and it must be in [2**-126, 2**127], as float32 holds it; {remedy}")


def check_heads(kv: "PagedKV", num_qo_heads: int, shown: str) -> None:
    """The query heads are a multiple of the KV heads; `shown` is where the number comes from, for the message."""
    heads = kv.num_kv_heads
    if num_qo_heads % heads:
        other = _other_layout(kv.layout)
        retag = (
            f"; or, if k_pages.shape={kv.k_pages.shape} was written as {other} and not as {kv.layout}, tag the pool "
            f"layout='{other}' (page_size={heads}, num_kv_heads={kv.page_size}) and pass a table of that page_size"
        )
        raise ValueError(
            f"q has {num_qo_heads} heads, which is not a multiple of num_kv_heads={heads} ({shown}); "
            f"pass a q with {heads}, {2 * heads}, {3 * heads}, ... heads{'' if num_qo_heads % kv.page_size else retag}"
        )


def check_q(kv: "PagedKV", q: Any, axes: Sequence[str], call: str) -> None:
    """A q from which a one-shot call takes its heads and batch: rank (one of those that `axes` describe) and heads."""
    if q.ndim not in {form.count(",") + 1 for form in axes}:
        raise ValueError(f"q must be {' or '.join(axes)}, got q.shape={q.shape}; reshape q, and pass {call}")
    if q.shape[-2] == 0:
        raise ValueError(f"q has no heads (q.shape={q.shape}); pass a q with {kv.num_kv_heads} heads or a multiple")
    check_heads(kv, q.shape[-2], f"q.shape={q.shape}")


def check_single_kv(k: Any, v: Any, layout: str) -> None:
    """Contiguous K and V of one request: [len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, len, head_dim] (HND)."""
    axes = "[len, num_kv_heads, head_dim]" if layout == "NHD" else "[num_kv_heads, len, head_dim]"
    _check_float(k, "k")
    _check_shape(k, "k", tuple(axes[1:-1].split(", ")), f"for layout={str(layout)!r}")
    _check_shape(v, "v", k.shape, "as k")
    _check_dtype(v, "v", k.dtype, "as k is")


def check_single_q(kv: "PagedKV", q: Any, out: Any, lse: Any) -> None:
    """q and out [num_qo_heads, head_dim], lse [num_qo_heads] of single_decode, which adds an axis to each."""
    _check_shape(q, "q", ("num_qo_heads", kv.head_dim), "[num_qo_heads, head_dim], as k has it")
    if out is not None:
        _check_shape(out, "out", q.shape, "as q gives it")
    if lse is not None:
        _check_shape(lse, "lse", q.shape[:1], "as q without its last axis")


def check_qo_indptr(qo_indptr: Any, batch_size: int, total_rows: int | None, device: str = "cpu") -> None:
    """int32 [batch_size + 1]; host values start at 0, do not decrease and end at total_rows, if that is known."""
    _check_vector(qo_indptr, "qo_indptr", _INT32, batch_size + 1, "batch_size + 1 offsets into the rows of q")
    if not isinstance(qo_indptr, np.ndarray):
        _check_metadata_device(qo_indptr, "qo_indptr", device)
        return
    if qo_indptr[0] != 0:
        raise PageTableError(
            f"qo_indptr[0] = {qo_indptr[0]}, and it must start at 0; pass qo_indptr - qo_indptr[0] and q from there on",
            field="qo_indptr",
            index=0,
            value=int(qo_indptr[0]),
        )
    if (bad := _first(qo_indptr[1:] < qo_indptr[:-1])) is not None:
        raise PageTableError(
            f"qo_indptr[{bad + 1}] = {qo_indptr[bad + 1]} is less than qo_indptr[{bad}] = {qo_indptr[bad]}, so "
            f"request {bad} has a negative number of queries; correct qo_indptr[{bad + 1}]",
            field="qo_indptr",
            index=bad + 1,
            value=int(qo_indptr[bad + 1]),
        )
    if total_rows is not None and qo_indptr[-1] != total_rows:
        raise PageTableError(
            f"qo_indptr ends at {qo_indptr[-1]} and q has {total_rows} rows; pass q[:qo_indptr[-1]] or correct it",
            field="qo_indptr",
            index=batch_size,
            value=int(qo_indptr[-1]),
        )


def check_layer(spec: AttentionSpec, kv: "PagedKV") -> None:
    """One run of a plan: the layer against the spec."""
    check_kv(kv, "run(q, kv)")
    if (
        kv.layout != spec.layout
        or kv.page_size != spec.page_size
        or kv.num_kv_heads != spec.num_kv_heads
        or kv.head_dim != spec.head_dim
        or kv.num_pages < spec.num_pages
        or kv.dtype != spec.dtype
        or kv.device != spec.device
    ):
        _refuse_layer(spec, kv)


def check_arrays(
    spec: AttentionSpec, q: Any, out: Any, lse: Any, rows: tuple[int, ...] | range, remedy: str = "plan anew for it"
) -> None:
    """One run of a plan: q, out and lse against the spec.

    Parameters
    ----------
    q: as the caller gave it: [rows, num_qo_heads, head_dim], or [rows, q_len, num_qo_heads, head_dim] for decode
        (which q_len > 1 demands).
    out: None, or C-contiguous, of q's shape, of q's dtype or float32, on a GPU at a multiple of 16 bytes.
    lse: None, or C-contiguous float32 of q's shape without head_dim.
    rows: the extents that axis 0 of q may have.
    remedy: what else could be done about the shape of q.
    """
    shape = q.shape
    q_len, leading = spec.q_len, shape[:-2]
    good = q_len in (None, 1) if len(leading) == 1 else len(leading) == 2 and leading[1] == q_len
    if not good or leading[0] not in rows or shape[-2] != spec.num_qo_heads or shape[-1] != spec.head_dim:
        _refuse_q_shape(spec, q, rows, remedy)
    _check_dtype(q, "q", spec.dtype, "q and kv share one dtype, and kv has it")
    _check_device(q, "q", spec.device, "kv")
    _check_strides(q, "q")
    _check_results(out, lse, shape, (q.dtype, _FLOAT32), "q", spec.device)
    if out is not None and shape[0]:
        _check_base(out, "out")


def form_of(array: Any) -> tuple[Any, ...] | None:
    """All that checks and kernels read of an array but its address: of two with one form, both are right or wrong."""
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return array.shape, array.strides, array.dtype
    pointer = array.data
    return array.shape, array.strides, array.dtype, pointer.device_id, pointer.ptr % ALIGNMENT


def _refuse_layer(spec: AttentionSpec, kv: "PagedKV") -> None:
    other, wanted = _other_layout(kv.layout), (spec.page_size, spec.num_kv_heads)
    fits, fits_other = (kv.page_size, kv.num_kv_heads) == wanted, (kv.num_kv_heads, kv.page_size) == wanted
    retag = f"the shape fits layout {other}: if the pool was written so, tag the pool layout='{other}'"
    if kv.layout != spec.layout:
        replan = (
            f"if it was written as {kv.layout}, {f'pass kv.to_layout({spec.layout!r}) or ' * fits}plan with this kv"
        )
        raise LayoutMismatchError(
            f"kv has layout {kv.layout} and the plan was made for {spec.layout} (k_pages.shape={kv.k_pages.shape}); "
            f"{f'{retag}; ' if fits_other else ''}{replan}"
        )
    if fits_other and not fits:
        raise LayoutMismatchError(
            f"kv is tagged {kv.layout}, under which k_pages.shape={kv.k_pages.shape} has page_size={kv.page_size} and "
            f"num_kv_heads={kv.num_kv_heads}, but the plan was made for {spec.page_size} and {spec.num_kv_heads}; "
            f"{retag} and pass kv.to_layout({spec.layout!r}); if it was written as {kv.layout}, plan with this kv and "
            f"a table of page_size={kv.page_size}"
        )
    for name in ("page_size", "num_kv_heads"):
        found, expected = getattr(kv, name), getattr(spec, name)
        if found != expected:
            raise LayoutMismatchError(
                f"kv has {name}={found} (k_pages.shape={kv.k_pages.shape}, layout {kv.layout}) and the plan is for "
                f"{name}={expected}; pass a layer like the one that was planned with, or plan with this kv"
            )
    if kv.dtype != spec.dtype:
        raise TypeError(f"kv is {kv.dtype} and the plan was made for {spec.dtype}; plan with this kv")
    if kv.device != spec.device:
        raise TypeError(f"kv lives on {kv.device} and the plan was made for {spec.device}; plan with this kv")
    name, least = ("head_dim", "") if kv.head_dim != spec.head_dim else ("num_pages", "at least ")
    raise ValueError(
        f"kv has {name}={getattr(kv, name)} (k_pages.shape={kv.k_pages.shape}, layout {kv.layout}) and the plan is "
        f"for {least}{getattr(spec, name)}; pass a layer like the one that was planned with, or plan with this kv"
    )


def _refuse_q_shape(spec: AttentionSpec, q: Any, rows: tuple[int, ...] | range, remedy: str) -> None:
    shape = q.shape
    leading = f"0..{rows.stop - 1}" if isinstance(rows, range) else " or ".join(map(str, dict.fromkeys(rows)))
    forms = []
    if spec.q_len in (None, 1):
        forms.append(f"[{leading}, {spec.num_qo_heads}, {spec.head_dim}]")
    if spec.q_len is not None:
        forms.append(f"[{leading}, {spec.q_len}, {spec.num_qo_heads}, {spec.head_dim}]")
    axes = "[rows, num_qo_heads, head_dim]" if spec.q_len is None else "[batch, (q_len,) num_qo_heads, head_dim]"
    also = f", or {remedy}" if shape[-1] == spec.head_dim else ""
    raise ValueError(f"q must have shape {' or '.join(forms)}, {axes}, got q.shape={shape}; reshape q{also}")


def _check_results(
    out: Any, lse: Any, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...], source: str, device: str
) -> None:
    """`out` [*shape] of one of `dtypes` and `lse` float32 [*shape[:-1]], contiguous, on `device`; None passes."""
    if out is not None:
        _check_shape(out, "out", shape, f"as {source} gives it")
        if out.dtype not in dtypes:
            allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
            raise TypeError(f"out must be {allowed}, got {out.dtype}; make it empty(shape, dtype={dtypes[0]})")
        _check_device(out, "out", device, source)
        _check_contiguous(out, "out")
        _check_base(out, "out", out.dtype.itemsize)
    if lse is not None:
        _check_shape(lse, "lse", shape[:-1], f"as {source} without its last axis")
        if lse.dtype != _FLOAT32:
            raise TypeError(f"lse must be float32, got {lse.dtype}; make it empty(shape, dtype=np.float32)")
        _check_device(lse, "lse", device, source)
        _check_contiguous(lse, "lse")
        _check_base(lse, "lse", _FLOAT32.itemsize)


# --------------------------------------------------------------------------------------------------------------------
# Writing and merging


def check_append(kv: "PagedKV", slots: Any, k: Any, v: Any) -> None:
    """New tokens: k, v [tokens, num_kv_heads, head_dim] whatever the layout, slots int64 or int32 [tokens].

    Host slots are checked by value: -1 skips the token, others lie in [0, num_pages * page_size).
    """
    if not kv.writable:
        raise ValueError(
            "kv cannot be written: its pages are JAX arrays or read-only arrays, or its K and V overlap in memory; "
            "keep the pool as NumPy (CPU) or CuPy (GPU) arrays, K and V apart, and let JAX read them through "
            "jax.dlpack.from_dlpack"
        )
    if slots.dtype not in (_INT64, _INT32):
        raise TypeError(f"slots must be int64 or int32, got {slots.dtype}; pass slots.astype(np.int64)")
    _check_vector(slots, "slots", slots.dtype, None, "one slot = page * page_size + offset for each token")
    _check_metadata_device(slots, "slots", kv.device)
    check_new_tokens(kv, k, v, slots.shape[0], slots)
    limit = kv.num_pages * kv.page_size
    if isinstance(slots, np.ndarray) and (bad := _first((slots < -1) | (slots >= limit))) is not None:
        raise PageTableError(
            f"slots[{bad}] = {slots[bad]} is no slot of a pool of {kv.num_pages} pages of {kv.page_size} tokens; "
            f"pass slots in [0, {limit}), or -1 to skip a token",
            field="slots",
            index=bad,
            value=int(slots[bad]),
        )


def check_new_tokens(kv: "PagedKV", k: Any, v: Any, tokens: int, slots: Any = None) -> None:
    """k, v [tokens, num_kv_heads, head_dim], of the pool's dtype and on its device; like slots, not in its memory."""
    for array, name in ((k, "k"), (v, "v")):
        _check_dtype(array, name, kv.dtype, "as kv is")
        wrong_heads = array.ndim == 3 and array.shape[1] != kv.num_kv_heads and array.shape[2] == kv.head_dim
        if wrong_heads and array.shape[1] == kv.page_size:
            other = _other_layout(kv.layout)
            raise LayoutMismatchError(
                f"{name} has {array.shape[1]} heads ({name}.shape={array.shape}), and kv, tagged {kv.layout}, has "
                f"num_kv_heads={kv.num_kv_heads} (k_pages.shape={kv.k_pages.shape}); the shapes fit layout {other} "
                f"(page_size={kv.num_kv_heads}, num_kv_heads={kv.page_size}): if the pool was written so, tag the "
                f"pool layout='{other}'; if it was written as {kv.layout}, pass a {name} of shape "
                f"[{tokens}, {kv.num_kv_heads}, {kv.head_dim}]"
            )
        _check_shape(array, name, (tokens, kv.num_kv_heads, kv.head_dim), "[tokens, num_kv_heads, head_dim]")
        _check_device(array, name, kv.device, "kv")
        _check_strides(array, name)
    check_apart_of_append(kv, slots, k, v)


def check_merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any, base: Any, out: Any, lse: Any) -> float:
    """Two states of the same rows: v [rows, heads, dim], s float32 [rows, heads]. Returns the base as a number."""
    number = as_base(base)
    _check_float(v_a, "v_a")
    _check_shape(v_a, "v_a", ("rows", "heads", "dim"), "[rows, heads, dim]")
    _check_dtype(v_b, "v_b", v_a.dtype, "as v_a is")
    _check_shape(v_b, "v_b", v_a.shape, "as v_a")
    device = device_of(v_a)
    _check_device(v_b, "v_b", device, "v_a")
    for array, name in ((v_a, "v_a"), (v_b, "v_b")):
        _check_strides(array, name, aligned=False)
    for array, name in ((s_a, "s_a"), (s_b, "s_b")):
        _check_dtype(array, name, _FLOAT32)
        _check_shape(array, name, v_a.shape[:-1], "[rows, heads], as v_a without its last axis")
        _check_device(array, name, device, "v_a")
        _check_base(array, name, _FLOAT32.itemsize)
    _check_results(out, lse, v_a.shape, (v_a.dtype, *FLOAT_DTYPES.values()), "v_a", device)
    if out is not None or lse is not None:
        read = [(v_b, "v_b"), (s_b, "s_b")]
        if lse is not None:
            _check_apart([(lse, "lse")], [*read, (v_a, "v_a"), *([] if _is_same(lse, s_a) else [(s_a, "s_a")])])
        if out is not None:
            read += [(s_a, "s_a"), (lse, "lse")]
            _check_apart([(out, "out")], [*read, *([] if _is_same(out, v_a) else [(v_a, "v_a")])])
    return number


def _is_same(a: Any, b: Any) -> bool:
    """Whether an array and another of its shape have their elements at the same places."""
    if a.dtype != b.dtype or any(
        own != other and extent > 1 for own, other, extent in zip(a.strides, b.strides, a.shape, strict=True)
    ):
        return False
    return a.ctypes.data == b.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr == b.data.ptr


def check_merge_states(v: Any, s: Any, base: Any, out: Any, lse: Any) -> float:
    """v [rows, num_states, heads, dim], s float32 [rows, num_states, heads]. Returns the base as a number."""
    number = as_base(base)
    _check_float(v, "v")
    _check_shape(v, "v", ("rows", "num_states", "heads", "dim"), "[rows, num_states, heads, dim]")
    _check_strides(v, "v", aligned=False)
    _check_dtype(s, "s", _FLOAT32)
    _check_shape(s, "s", v.shape[:-1], "[rows, num_states, heads], as v without its last axis")
    device = device_of(v)
    _check_device(s, "s", device, "v")
    _check_base(s, "s", _FLOAT32.itemsize)
    rows, _, heads, dim = v.shape
    _check_results(out, lse, (rows, heads, dim), (v.dtype, *FLOAT_DTYPES.values()), "v without num_states", device)
    _check_apart([(out, "out"), (lse, "lse")], [(v, "v"), (s, "s")])
    return number


# --------------------------------------------------------------------------------------------------------------------
# Sequences of a cache


def as_sequences(seqs: Any, name: str = "seqs") -> np.ndarray:
    """Sequence ids as int64 [n], from a 1-D list or array of ints. Whether they live, a cache knows."""
    return _int_vector(seqs, name)


def check_distinct(ids: np.ndarray, name: str = "seqs") -> None:
    """No sequence twice in int64 [n]."""
    ordered = np.sort(ids)
    if (bad := _first(ordered[1:] == ordered[:-1])) is not None:
        raise ValueError(
            f"{name} holds sequence {ordered[bad]} more than once, and a batch has each sequence once; "
            f"remove the repetition, or fork({ordered[bad]})"
        )


def check_counts(counts: Any, num_sequences: int, name: str = "counts") -> np.ndarray:
    """Tokens to add to each sequence as int64 [num_sequences], none negative."""
    numbers = _int_vector(counts, name)
    if numbers.size != num_sequences:
        raise ValueError(f"{name} has {numbers.size} entries for {num_sequences} sequences; pass one count for each")
    if (bad := _first((numbers < 0) | (numbers > _INT_MAX))) is not None:
        fault = "negative" if numbers[bad] < 0 else f"more than {_INT_MAX}"
        raise ValueError(f"{name}[{bad}] = {numbers[bad]} is {fault}; pass the number of new tokens, 0 or more")
    return numbers


def _int_vector(values: Any, name: str) -> np.ndarray:
    check_readable(values, name)
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {array.shape}; pass a list of ints, [{values!r}] for one")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold ints, got {array.dtype} ({values!r}); pass ints")
    return array.astype(np.int64)


def check_capacities(
    table: "PageTable",
    qo_indptr: Any,
    q_len: int | None,
    *,
    max_batch_size: int | None,
    max_pages: int | None,
    max_tokens: int | None,
) -> None:
    """PageTableError where a step does not fit into a plan, as far as the host can see it; device arrays are cut.

    max_pages counts the pages of all requests together, from indptr[0] to indptr[-1].
    """
    if max_batch_size is not None:
        _check_capacity("max_batch_size", table.batch_size, max_batch_size)
    if max_pages is not None and table.device == "cpu":
        _check_capacity("max_pages", int(table.indptr[-1]) - int(table.indptr[0]), max_pages)
    if max_tokens is not None and q_len is not None:
        _check_capacity("max_tokens", table.batch_size * q_len, max_tokens)
    elif max_tokens is not None and isinstance(qo_indptr, np.ndarray):
        _check_capacity("max_tokens", int(qo_indptr[-1]), max_tokens)


def _check_capacity(name: str, wanted: int, capacity: int) -> None:
    if wanted > capacity:
        raise PageTableError(
            f"this step needs {name}={wanted}, but the plan was made with {name}={capacity}; run fewer requests at "
            f"once or make the plan with a larger {name}",
            field=name,
            value=wanted,
        )
