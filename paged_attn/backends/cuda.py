"""The CUDA backend: CuPy arrays, and the kernels of kernels/ on CuPy's current stream.

Nothing here waits for the device, and nothing looks at what device arrays hold: metadata is cleaned by kernels, and
what was wrong with it stands in a status word until somebody asks (Plan.raise_status, raise_device_status).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from .. import compile, lifetimes, planner, tensor_map
from ..errors import fault_error
from ..interop import FLOAT_DTYPES
from ..spec import check_capacities

if TYPE_CHECKING:
    from ..layout import PagedKV
    from ..page_table import PageTable
    from ..spec import AttentionSpec

STATUS_BYTES = 16  # struct Status {int field; int index; i64 value;}
REQUEST_BYTES, ITEM_BYTES = 32, 64  # structs Request, DecodeItem
SCAN_THREADS = 1024  # the one block of kernels that scan over a batch
SCAN_BYTES = 256  # its shared memory (table_rows.cuh)
THREADS = 256
MOST_ROW_BLOCKS = 1024
APPEND_THREADS = 256
MOST_APPEND_BLOCKS = 4096
MERGE_WARPS = 4
MAX_GRID_Y = 65535  # and z: CUDA's limit
INT_LARGEST = 2**31 - 1
TILES_BYTES = 256 * 4 + SCAN_BYTES  # shared memory of plan_tiles
SPLITS_BYTES = 258 * 4 + SCAN_BYTES + 4  # and of plan_splits
SMALLEST_STAGING = 1 << 16  # bytes
MOST_IDLE_BLOCKS = 16  # of pinned memory, that threads have left on a device
NOWHERE = 2**32 - 1  # a place in units of 16 bytes that no array reaches (load_global.cuh)
_BFLOAT16 = FLOAT_DTYPES["bfloat16"]
_INT32 = np.dtype(np.int32)


# -- what belongs to a thread ----------------------------------------------------------------------------------------


class _Thread(threading.local):
    """What a thread has prepared for itself, by device. It goes when the thread ends.

    Parameters of a launch and pinned memory are written before they are used: another thread must not do so meanwhile.
    """

    def __init__(self) -> None:
        self.staging: dict[str, _Staging] = {}
        self.appends: dict[str, _Append] = {}
        self.launches: dict[tuple[Any, ...], Any] = {}


# -- memory and devices ----------------------------------------------------------------------------------------------


def empty(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    with _on(device):
        return cupy.empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    with _on(device):
        array = cupy.empty(shape, dtype)
        array.data.memset_async(0, array.nbytes)
        return array


def to_backend(array: Any, device: str) -> Any:
    """A host array on the device, by an asynchronous copy out of pinned memory; a device array as it is."""
    return uploader(device)(array) if isinstance(array, np.ndarray) else array


def uploader(device: str) -> Callable[[np.ndarray[Any, Any]], Any]:
    """What copies host arrays to the device on its current stream. TypeError while that captures a CUDA graph."""
    with _on(device):
        return functools.partial(_upload, device, _upload_stream())


def _is_capturing(stream: Any) -> bool:
    """Whether the stream is capturing a CUDA graph."""
    return bool(cupy.cuda.runtime.streamIsCapturing(stream.ptr))


def _upload_stream() -> Any:
    """The current stream, which must not be capturing a CUDA graph."""
    stream = cupy.cuda.get_current_stream()
    if _is_capturing(stream):
        raise TypeError(
            "NumPy arrays are to be uploaded while the stream is capturing a CUDA graph, which would replay the copy "
            "of memory that has long been reused; pass CuPy arrays, and keep reserve() and page_table() of a cache "
            "out of the capture"
        )
    return stream


def _upload(device: str, stream: Any, array: np.ndarray[Any, Any]) -> Any:
    with _on(device):
        target = cupy.empty(array.shape, array.dtype)
        if array.size:
            _staging(device).copy((array.ravel(),), array.dtype, target.data, array.nbytes, stream)
        return target


def _upload_together(arrays: Sequence[np.ndarray[Any, Any]], device: str) -> tuple[Any, list[int]]:
    """1-D arrays as int32 on the device, by one copy: their memory, which the caller keeps, and where each begins."""
    stream = _upload_stream()
    *begins, size = itertools.accumulate(map(len, arrays), initial=0)
    memory = cupy.cuda.alloc(4 * size)
    _staging(device).copy(arrays, _INT32, memory, 4 * size, stream)
    return memory, [memory.ptr + 4 * begin for begin in begins]


def _addresses_of(arrays: Sequence[Any], device: str) -> tuple[Any, list[int]]:
    """Where int32 arrays are on the device, 0 for None; those of the host in memory that the caller keeps."""
    host = [array for array in arrays if isinstance(array, np.ndarray)]
    memory, addresses = _upload_together(host, device)
    uploaded = iter(addresses)
    return memory, [
        0 if array is None else next(uploaded) if isinstance(array, np.ndarray) else array.data.ptr for array in arrays
    ]


class _on:
    """`with _on(device)` makes the device the current one; next to nothing where it already is."""

    __slots__ = ("_index", "_previous")

    def __init__(self, device: str) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._previous = cupy.cuda.runtime.getDevice()
        if self._previous != self._index:
            cupy.cuda.runtime.setDevice(self._index)

    def __exit__(self, *_: object) -> None:
        if self._previous != self._index:
            cupy.cuda.runtime.setDevice(self._previous)


@functools.cache
def _index(device: str) -> int:
    return int(device.removeprefix("cuda:"))


@dataclass
class _PinnedBlock:
    view: np.ndarray[Any, Any]  # uint8 [size], which keeps the memory alive
    address: int
    event: Any  # behind the last copy out of it


_NO_BLOCK = _PinnedBlock(np.empty(0, np.uint8), 0, None)


class _Staging:
    """Pinned memory for the uploads of one thread: a block is filled piece by piece, for copies on one stream.

    The block's event is recorded anew behind every copy; a full block is used again when the event is over. What a
    thread leaves behind, whose copies may be under way, is there for the others.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._block = _NO_BLOCK
        self._used = 0  # bytes of the block
        self._stream: Any = None  # that the block's copies are on, held so that no other gets its address
        self._full: list[_PinnedBlock] = []  # the longest waiting first

    def copy(
        self, parts: Sequence[np.ndarray[Any, Any]], dtype: np.dtype[Any], target: Any, num_bytes: int, stream: Any
    ) -> None:
        """Copies 1-D arrays, one behind the other as `dtype` and num_bytes in all, to the device address `target`."""
        is_same = self._stream is not None and stream.ptr == self._stream.ptr
        if not is_same or self._used + num_bytes > self._block.view.size:
            self._next_block(num_bytes)
            self._stream = stream
        begin, end, block = self._used, self._used + num_bytes, self._block
        np.concatenate(parts, out=block.view[begin:end].view(dtype), casting="same_kind")
        target.copy_from_host_async(block.address + begin, num_bytes, stream)
        block.event.record(stream)
        self._used = -(-end // 16) * 16

    def _next_block(self, num_bytes: int) -> None:
        if self._used:  # the full block is let go first: nothing is written into it where no other can be had
            self._full.append(self._block)
            self._block, self._used = _NO_BLOCK, 0
        for place, block in enumerate(self._full):
            if block.view.size >= num_bytes and _is_over(block.event):
                self._block = self._full.pop(place)
                return
        if (left := _take_idle_block(self._device, num_bytes)) is not None:
            self._block = left
            return
        size = max(SMALLEST_STAGING, 1 << (num_bytes - 1).bit_length())
        memory = cupy.cuda.alloc_pinned_memory(size)
        view = np.frombuffer(memory, np.uint8, size)
        self._block = _PinnedBlock(view, memory.ptr, cupy.cuda.Event(disable_timing=True))

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _leave_blocks(self._device, [block for block in (*self._full, self._block) if block.event])


_idle_blocks: dict[str, deque[_PinnedBlock]] = {}  # by device


def _take_idle_block(device: str, num_bytes: int) -> _PinnedBlock | None:
    """A block of a thread that has ended, if there is one of that size with nothing under way."""
    idle = _idle_blocks.setdefault(device, deque())
    for _ in range(len(idle)):
        try:
            block = idle.popleft()
        except IndexError:  # another thread was faster
            return None
        if block.view.size >= num_bytes and _is_over(block.event):
            return block
        idle.append(block)
    return None


def _leave_blocks(device: str, blocks: list[_PinnedBlock]) -> None:
    idle = _idle_blocks.setdefault(device, deque())
    idle.extend(blocks)
    for _ in range(len(idle)):
        if len(idle) <= MOST_IDLE_BLOCKS:
            return
        try:
            block = idle.popleft()
        except IndexError:
            return
        if not _is_over(block.event):  # CuPy would give its memory to others
            idle.append(block)


def _is_over(event: Any) -> bool:
    """Whether what an event was recorded behind is over; asked in a way that no capture of another thread minds."""
    with lifetimes.capture_of_others():
        return bool(event.done)


def _staging(device: str) -> _Staging:
    staging = _thread.staging.get(device)
    if staging is None:
        staging = _thread.staging[device] = _Staging(device)
    return staging


# -- status words ----------------------------------------------------------------------------------------------------


_device_words: dict[str, Any] = {}
_making_word = threading.Lock()


def _device_status(device: str) -> Any:
    """The status word of calls that have no plan; it keeps its first fault until raise_device_status."""
    word = _device_words.get(device)
    if word is None:
        with _making_word, _on(device):
            word = _device_words.get(device)
            if word is None:
                word = _device_words[device] = _new_device_word(device)
    return word


def _new_device_word(device: str) -> Any:
    """A word of zeros for kernels on any stream: it is made, and waited for, on a stream that has nothing else to do.

    The current stream would be the wrong one: others would not wait for it, and a graph that it captures would clear
    the word at every replay.
    """
    with lifetimes.capture_of_others(), cupy.cuda.Stream(non_blocking=True) as stream:
        word = zeros((STATUS_BYTES,), np.uint8, device)
        stream.synchronize()
    return word


def raise_word(word: Any, *, clear: bool = False) -> None:
    """PageTableError if the status word holds a fault. Waits for all streams of the device, and for a clear word."""
    with _on(f"cuda:{word.device.id}"):
        cupy.cuda.runtime.deviceSynchronize()
        field, index = word[:8].view(np.int32).get().tolist()
        if field:
            (value,) = word[8:].view(np.int64).get().tolist()
            if clear:
                word.data.memset_async(0, STATUS_BYTES)
                cupy.cuda.get_current_stream().synchronize()
            raise fault_error(field, index, value)


def raise_device_status(device: str) -> None:
    raise_word(_device_status(device), clear=True)


# -- launching -------------------------------------------------------------------------------------------------------


def _launch(
    name: str,
    device: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    fields: dict[str, Any],
    *,
    shared_bytes: int = 0,
    **constants: Any,
) -> None:
    """Launch kernel `name` with the fields of its struct; an array gives its address, None is a null pointer."""
    key = name, device, block, shared_bytes, *constants.items()
    prepared = _thread.launches.get(key)
    if prepared is None:
        kernel = compile.kernel(name, device, shared_bytes=shared_bytes, **constants)
        launch = compile.Launch(kernel, block, kernel.params())
        in_order = operator.itemgetter(*launch.params.dtype.names or ())
        prepared = _thread.launches[key] = launch, launch.writer(), in_order
    launch, write, in_order = prepared
    values: list[Any] = []
    for value in in_order(fields):
        kind = type(value)
        if kind is int or kind is float or kind is bool:
            values.append(value)
        elif kind is tuple:
            values += value
        else:
            values.append(0 if value is None else value.data.ptr)
    write(*values)
    stream = cupy.cuda.get_current_stream().ptr
    if isinstance(grid, int):
        launch(stream, grid)
    else:
        launch(stream, *grid)


def _start(launch: compile.Launch, stream: int, grid: int) -> None:
    """A prepared launch on a stream of its kernel's device."""
    index = launch.kernel.device_index
    if cupy.cuda.runtime.getDevice() == index:
        launch(stream, grid)
    else:
        with _on(f"cuda:{index}"):
            launch(stream, grid)


def _row_blocks(rows: int, entries: int) -> int:
    """Blocks for the kernels that give every row the same number: some, where rows are few and long."""
    return rows * max(1, min(-(-entries // (rows * 8 * THREADS)), MOST_ROW_BLOCKS // rows))


def _table_fields(table: PageTable) -> dict[str, Any]:
    """The table's arrays, on its kv's device, as the fields that kernels know them by."""
    return {
        "indptr": table.indptr,
        "indices": table.indices,
        "last_page_len": table.last_page_len,
        "page_offset": table.page_offset,
        "total_len": table.total_len,
        "num_indices": table.indices.size,
        "batch": table.batch_size,
    }


# -- tables ----------------------------------------------------------------------------------------------------------


def seq_lens(table: PageTable) -> Any:
    lens = empty((table.batch_size,), np.int32, table.device)
    if table.batch_size:
        with _on(table.device):
            _launch("seq_lens", table.device, -(-table.batch_size // THREADS), THREADS, {
                "indptr": table.indptr, "last_page_len": table.last_page_len, "seq_lens": lens,
                "batch": table.batch_size, "page_size": table.page_size,
            })  # fmt: skip
    return lens


def split_table(table: PageTable, num_chunks: int, out: PageTable) -> None:
    fields = {
        **_table_fields(table),
        "out_indptr": out.indptr,
        "out_indices": out.indices,
        "out_last_page_len": out.last_page_len,
        "out_page_offset": out.page_offset,
        "out_total_len": out.total_len,
        "status": _device_status(table.device),
        "num_chunks": num_chunks,
        "out_num_indices": out.indices.size,
        "page_size": table.page_size,
        "page_stride": table.page_stride,
    }
    rows = num_chunks * table.batch_size
    with _on(table.device):
        _launch("split_rows", table.device, 1, SCAN_THREADS, fields, shared_bytes=SCAN_BYTES)
        _launch("split_pages", table.device, _row_blocks(rows, out.indices.size), THREADS, fields)


def from_block_table(block_table: Any, seq_lens: Any, page_size: int, out: PageTable) -> None:
    device = out.device
    batch, width = block_table.shape
    fields = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "out_indptr": out.indptr,
        "out_indices": out.indices,
        "out_last_page_len": out.last_page_len,
        "status": _device_status(device),
        "row_stride": block_table.strides[0] // 4,
        "column_stride": block_table.strides[1] // 4,
        "batch": batch,
        "width": width,
        "out_num_indices": out.indices.size,
        "page_size": page_size,
    }
    with _on(device):
        _launch("block_table_rows", device, 1, SCAN_THREADS, fields, shared_bytes=SCAN_BYTES)
        _launch("block_table_pages", device, _row_blocks(batch, out.indices.size), THREADS, fields)


def to_block_table(table: PageTable, max_pages_per_seq: int) -> Any:
    block_table = empty((table.batch_size, max_pages_per_seq), np.int32, table.device)
    if block_table.size:
        with _on(table.device):
            _launch("to_block_table", table.device, -(-block_table.size // THREADS), THREADS, {
                "indptr": table.indptr, "indices": table.indices, "block_table": block_table,
                "status": _device_status(table.device), "batch": table.batch_size,
                "num_indices": table.indices.size, "width": max_pages_per_seq,
            })  # fmt: skip
    return block_table


def table_slots(table: PageTable, batch_indices: Any, positions: Any) -> Any:
    slots = empty(positions.shape, np.int64, table.device)
    if slots.size:
        with _on(table.device):
            _launch("table_slots", table.device, -(-slots.size // THREADS), THREADS, {
                "indptr": table.indptr, "indices": table.indices, "page_offset": table.page_offset,
                "batch_indices": batch_indices, "positions": positions, "slots": slots,
                "status": _device_status(table.device), "page_size": compile.fast_divide(table.page_size),
                "batch": table.batch_size, "num_indices": table.indices.size, "tokens": slots.size,
                "page_stride": table.page_stride,
            })  # fmt: skip
    return slots


def check_table(table: PageTable, num_pages: int) -> Any:
    """The status word that a kernel fills, now or at every replay of a graph."""
    word = zeros((STATUS_BYTES,), np.uint8, table.device)
    fields = {
        **_table_fields(table),
        "status": word,
        "page_size": table.page_size,
        "page_stride": table.page_stride,
        "num_pages": num_pages,
    }
    with _on(table.device):
        stream = cupy.cuda.get_current_stream()
        if _is_capturing(stream):
            lifetimes.keep_with_graph(stream.ptr, word)
        blocks = _row_blocks(table.batch_size, table.indices.size) if table.batch_size else 1
        _launch("check_table", table.device, blocks, THREADS, fields)
    return word


# -- the cache -------------------------------------------------------------------------------------------------------


def update_table(
    page_lists: Any,
    update_index: np.ndarray[Any, Any],
    update_value: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any],
    indptr: np.ndarray[Any, Any],
    last_page_len: np.ndarray[Any, Any],
    out: Any,
) -> None:
    device = out.device
    status = _device_status(device)
    num_updates, num_entries, batch = update_index.size, page_lists.size, starts.size
    with _on(device):
        parts = (update_index, update_value, starts, indptr, last_page_len)
        _memory, (index, value, start, row, last) = _upload_together(parts, device)
        if num_updates:
            fields = {
                "page_lists": page_lists,
                "update_index": index,
                "update_value": value,
                "status": status,
                "num_entries": num_entries,
                "num_updates": num_updates,
            }
            _launch("update_page_lists", device, -(-num_updates // THREADS), THREADS, fields)
        fields = {
            "page_lists": page_lists,
            "starts": start,
            "indptr": row,
            "last_page_len": last,
            "out_indptr": out.indptr,
            "out_last_page_len": out.last_page_len,
            "out_indices": out.indices,
            "status": status,
            "num_entries": num_entries,
            "batch": batch,
            "capacity": out.last_page_len.size,
            "out_num_indices": out.indices.size,
        }
        _launch("build_table", device, _row_blocks(batch, int(indptr[-1])) if batch else 1, THREADS, fields)


def copy_pages(storage: Any, source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    device = f"cuda:{storage.device.id}"
    num_layers, num_pages = storage.shape[:2]
    pairs = to_backend(np.stack([source, target]).astype(np.int32, copy=False), device)
    page_units = storage.strides[1] // 16
    with _on(device):
        _launch("copy_pages", device, (_row_blocks(source.size, source.size * page_units), num_layers), THREADS, {
            "storage": storage, "source": pairs[0], "target": pairs[1], "status": _device_status(device),
            "layer_units": storage.strides[0] // 16, "page_units": page_units, "num_pages": num_pages,
            "num_pairs": source.size,
        })  # fmt: skip


def append(kv: PagedKV, slots: Any, k: Any, v: Any, form: Any) -> None:
    """Write new tokens. form: the same object while nothing but addresses differs from the append before."""
    last = _thread.appends.get(kv.device)
    if last is None:
        last = _thread.appends[kv.device] = _Append(kv.device)
    last.run(kv, slots, k, v, form)


class _Append:
    """The append of one thread on one device: all but addresses stays written while the form is the same."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._form: Any = None
        self._launch: compile.Launch
        self._write: Callable[..., None]
        self._grid = 0

    def run(self, kv: PagedKV, slots: Any, k: Any, v: Any, form: Any) -> None:
        if form is not self._form:
            self._bind(kv, slots, k.strides, v.strides)
            self._form = form
        self._write(k.data.ptr, v.data.ptr, kv.k_address, kv.v_address, slots.data.ptr)
        _start(self._launch, cupy.cuda.get_current_stream(self._launch.kernel.device_index).ptr, self._grid)

    def _bind(self, kv: PagedKV, slots: Any, k_strides: tuple[int, ...], v_strides: tuple[int, ...]) -> None:
        """Write what the form of an append decides."""
        self._form = None
        pieces = kv.num_kv_heads * kv.head_dim // 8
        across = min(APPEND_THREADS, -(-pieces // 32) * 32)
        tokens_a_block = max(1, APPEND_THREADS // across)
        self._launch, self._write, write_rest = self._prepared((across, tokens_a_block), kv.head_dim)
        self._grid = min(-(-slots.size // tokens_a_block), MOST_APPEND_BLOCKS)
        write_rest(
            *_units(kv.k_strides),
            *_units(kv.v_strides),
            *compile.fast_divide(kv.page_size),
            *(stride // 16 for stride in (*k_strides[:2], *v_strides[:2])),
            slots.size,
            kv.num_kv_heads,
            kv.num_pages,
            slots.dtype == _INT32,
        )

    def _prepared(
        self, block: tuple[int, int], head_dim: int
    ) -> tuple[compile.Launch, Callable[..., None], Callable[..., None]]:
        """The launch, and what writes its addresses and all else."""
        key = "append", self._device, block, head_dim
        prepared = _thread.launches.get(key)
        if prepared is None:
            kernel = compile.kernel("append", self._device, HEAD_DIM=head_dim, V_HEAD_DIM=head_dim)
            launch = compile.Launch(kernel, block, kernel.params({"status": _device_status(self._device)}))
            prepared = launch, launch.writer("k", "slots"), launch.writer("k_pool_strides")
            _thread.launches[key] = prepared
        return prepared


_thread = _Thread()


@functools.lru_cache(maxsize=1024)
def _units(strides: tuple[int, int, int]) -> tuple[int, int, int]:
    """(page, slot, head) strides of 16-bit elements in units of 16 bytes."""
    page, slot, head = strides
    return page // 8, slot // 8, head // 8


# -- merging ---------------------------------------------------------------------------------------------------------


def merge_states(v: Any, s: Any, out: Any, lse: Any, base: float) -> None:
    rows, num_states, heads, _ = v.shape
    if not rows * heads:
        return
    row_major = num_states > 3  # with few states the other order is better, as merge_state has shown
    _merge("merge_states", (v,), rows, heads, out, row_major, {
        "v": v, "s": s, "out": out, "lse": lse, "sinks": None,
        "v_row_stride": _stride(v, 0), "v_state_stride": _stride(v, 1), "v_head_stride": _stride(v, 2),
        "s_row_stride": _stride(s, 0), "s_state_stride": _stride(s, 1), "s_head_stride": _stride(s, 2),
        "rows": rows, "num_states": num_states, "heads": heads, "row_major": row_major, "log2_of_base": math.log2(base),
    })  # fmt: skip


def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any, out: Any, lse: Any, base: float) -> None:
    rows, heads, _ = v_a.shape
    if not rows * heads:
        return
    _merge("merge_state", (v_a, v_b), rows, heads, out, False, {
        "v_a": v_a, "v_b": v_b, "s_a": s_a, "s_b": s_b, "out": out, "lse": lse,
        "v_a_row_stride": _stride(v_a, 0), "v_a_head_stride": _stride(v_a, 1),
        "v_b_row_stride": _stride(v_b, 0), "v_b_head_stride": _stride(v_b, 1),
        "s_a_row_stride": _stride(s_a, 0), "s_a_head_stride": _stride(s_a, 1),
        "s_b_row_stride": _stride(s_b, 0), "s_b_head_stride": _stride(s_b, 1),
        "rows": rows, "heads": heads, "log2_of_base": math.log2(base),
    })  # fmt: skip


def _merge(
    name: str, states: tuple[Any, ...], rows: int, heads: int, out: Any, row_major: bool, fields: dict[str, Any]
) -> None:
    """Row-major: the blocks of a row run one after the other, else the blocks of all rows for the same heads."""
    v = states[0]
    head_dim, itemsize = v.shape[-1], v.dtype.itemsize
    # The widest load that every row begins on a multiple of: 16 bytes but for odd head_dims and views.
    spots = [head_dim * itemsize, 16]
    spots += [number for array in states for number in (array.data.ptr, *array.strides[:-1])]
    vector = math.gcd(*spots, out.data.ptr // out.dtype.itemsize * itemsize) // itemsize
    warps = min(MERGE_WARPS, heads)
    groups, layers = -(-heads // warps), -(-rows // MAX_GRID_Y)
    grid = (groups, -(-rows // layers), layers) if row_major else (rows, groups)
    device = f"cuda:{v.device.id}"
    with _on(device):
        _launch(
            name, device, grid, warps * 32, fields,
            HEAD_DIM=head_dim, VEC=vector, BFLOAT16=_BFLOAT16 in (v.dtype, out.dtype),
            V_FLOAT32=v.dtype == np.float32, OUT_FLOAT32=out.dtype == np.float32, SINKS=False,
        )  # fmt: skip


def _stride(array: Any, axis: int) -> int:
    return array.strides[axis] // array.dtype.itemsize


# -- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Launches:
    """What a plan repeats for steps of one shape, and what writes their parameters."""

    plan_requests: compile.Launch
    write_step: Callable[..., None]
    plan_splits: compile.Launch | None  # decode
    splits: Callable[[int], planner.DecodeSplits] | None  # by the batch size
    attend: compile.Launch
    write_addresses: Callable[..., None]
    write_form: Callable[..., None]
    grid: Callable[[int], tuple[int, ...]]  # rows of q -> CTAs, and the last fields of write_form
    hopper: _HopperPrefill | None  # prefill, on a Hopper card


class Plan:
    """One step's metadata in buffers of its own, and the launches that read them.

    With capacities the buffers are made once (by the first update) and never move, unless a later step has more heads
    or larger ones; without, they grow by doubling. A graph that captures the launches keeps the buffers that they have.
    """

    def __init__(
        self,
        device: str,
        *,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
        max_tokens: int | None = None,
        batch_invariant: bool = False,
        one_shot: bool = False,
    ) -> None:
        self._device, self._index = device, _index(device)
        self._max_batch_size, self._max_pages, self._max_tokens = max_batch_size, max_pages, max_tokens
        self._batch_invariant = batch_invariant
        self._one_shot = one_shot
        self._status = _device_status(device) if one_shot else zeros((STATUS_BYTES,), np.uint8, device)
        self._capturable = max_batch_size is not None and max_pages is not None
        self._buffers: dict[str, Any] = {}
        self._last_capture = -1  # whose graph keeps the buffers
        self._shape: Any = None  # what the launches were prepared for
        self._batch_size, self._parts = -1, 0  # of the last step; the blocks that copy its pages
        self._form: Any = None  # of the last run: all but addresses stays written while it is the same
        self._grid = 0
        self._hopper: _HopperPrefill | None = None  # for that form
        self._launches: _Launches

    def update(self, spec: AttentionSpec, table: PageTable, qo_indptr: Any) -> None:
        """Copy and clean a step's table on the device, and prepare the launch that run() repeats."""
        check_capacities(
            table,
            qo_indptr,
            spec.q_len,
            max_batch_size=self._max_batch_size,
            max_pages=self._max_pages,
            max_tokens=self._max_tokens,
        )
        if cupy.cuda.runtime.getDevice() == self._index:
            self._update(spec, table, qo_indptr)
        else:
            with _on(self._device):
                self._update(spec, table, qo_indptr)

    def _update(self, spec: AttentionSpec, table: PageTable, qo_indptr: Any) -> None:
        """The update, with the plan's device as the current one."""
        device, batch_size = self._device, table.batch_size
        stream = cupy.cuda.get_current_stream(self._index)
        is_capturing = _is_capturing(stream)
        if is_capturing:
            self._check_capturable("plan")
        arrays = table.indptr, table.indices, table.last_page_len, table.page_offset, table.total_len, qo_indptr
        if table.device == "cpu" or isinstance(qo_indptr, np.ndarray):
            _memory, addresses = _addresses_of(arrays, device)
        else:
            addresses = [0 if array is None else array.data.ptr for array in arrays]  # as ScheduleParams has them
        num_indices = table.indices.size
        num_requests = batch_size if self._max_batch_size is None else self._max_batch_size
        # Without a capacity there is room to grow: a step with a page more is prepared already.
        max_pages = 1 << num_indices.bit_length() if self._max_pages is None else self._max_pages
        shape = (spec, table.page_stride, num_requests, max_pages)
        if self._shape != shape:
            before = dict(self._buffers)
            try:
                self._launches = self._prepare(*shape)
            except BaseException:
                self._buffers = before  # the step before is still to be run
                raise
            self._shape, self._form, self._batch_size = shape, None, -1
        if not self._one_shot:
            self._status.data.memset_async(0, STATUS_BYTES, stream)
        launches, stream_address = self._launches, stream.ptr
        if is_capturing:
            self._keep_with_graph(stream_address)
        if batch_size != self._batch_size:
            self._parts = _row_blocks(batch_size, max_pages) if batch_size else 0
            if launches.plan_splits and launches.splits:
                splits, params = launches.splits(batch_size), launches.plan_splits.params
                params["batch"], params["extra_items"] = batch_size, splits.extra_items
                params["ragged_ctas"] = splits.ragged_ctas
            self._batch_size = batch_size
        launches.write_step(*addresses, batch_size, num_indices)
        launches.plan_requests(stream_address, 1 + self._parts)
        if launches.hopper:
            launches.hopper.order_tiles(stream_address, 1)
        elif launches.plan_splits:
            launches.plan_splits(stream_address, 1)

    def _prepare(self, spec: AttentionSpec, page_stride: int, num_requests: int, max_pages: int) -> _Launches:
        """The buffers and the launches for steps of this shape: all that does not change from step to step."""
        device = self._device
        requests = self._buffer("requests", (num_requests + 1) * REQUEST_BYTES)
        page_ids = self._buffer("page_ids", max_pages * 4)
        kernel = compile.kernel("plan_requests", device, shared_bytes=SCAN_BYTES)
        params = kernel.params(
            {
                "requests": requests,
                "page_ids": page_ids,
                "status": self._status,
                "max_batch_size": num_requests,
                "max_pages": max_pages,
                "page_size": spec.page_size,
                "page_stride": page_stride,
                "num_pages": spec.num_pages,
                "q_len": spec.q_len or 0,
                "total_rows_limit": INT_LARGEST if self._max_tokens is None else self._max_tokens,
                "tile_rows": planner.prefill_shape(spec.head_dim, spec.head_dim).tile_rows,
                "group_size": spec.group_size,
            }
        )
        plan_requests = compile.Launch(kernel, SCAN_THREADS, params)

        fields = {
            "requests": requests,
            "page_ids": page_ids,
            "positions": {
                "page_size": compile.fast_divide(spec.page_size),
                "page_stride": page_stride,
                "causal": spec.causal,
                "window_left": spec.window_left,
            },
            "num_qo_heads": spec.num_qo_heads,
            "num_kv_heads": spec.num_kv_heads,
            "group_size": compile.fast_divide(spec.group_size),
            "scoring": (spec.sm_scale, spec.logits_soft_cap),
        }
        constants: dict[str, Any] = {
            "HEAD_DIM": spec.head_dim,
            "V_HEAD_DIM": spec.head_dim,
            "BFLOAT16": spec.dtype == _BFLOAT16,
            "SOFT_CAP": spec.logits_soft_cap > 0,
            "SINKS": False,
        }
        kernel_shape: planner.DecodeShape | planner.PrefillShape
        hopper, plan_splits, cluster = None, None, 1
        splits_of: Callable[[int], planner.DecodeSplits] | None = None
        if spec.q_len is None:
            kernel_shape = planner.prefill_shape(spec.head_dim, spec.head_dim)
            name, last = "prefill", "num_tiles"
            fields["num_requests"] = num_requests
            hopper_shape = planner.prefill_hopper_shape(spec.head_dim)
            if hopper_shape and _is_hopper(device):
                ordered = self._buffer("ordered", (num_requests + 1) * REQUEST_BYTES)
                claims = self._buffer("claims", 4)
                is_long = max_pages * spec.page_size >= planner.TMA_OUT_TOKENS * num_requests
                is_long = is_long or self._batch_invariant  # whatever else is in the batch
                hopper = _HopperPrefill(spec, device, hopper_shape, constants, fields, ordered, claims, is_long)
            constants["TILE_ROWS"] = kernel_shape.tile_rows
            grid: Callable[[int], tuple[int, ...]] = functools.partial(_prefill_grid, spec, num_requests)
        else:
            num_pairs = num_requests * spec.num_kv_heads
            kernel_shape = planner.decode_shape(
                spec.q_len, spec.group_size, spec.head_dim, num_pairs, self._batch_invariant, _card(device)
            )
            columns, column_blocks = kernel_shape.columns, kernel_shape.column_blocks
            name, last = "decode", "batch"
            constants |= {"COLUMNS": columns, "WARPS": kernel_shape.warps, "STAGES": kernel_shape.stages}
            splits_of = functools.partial(
                planner.decode_splits,
                num_kv_heads=spec.num_kv_heads,
                shape=kernel_shape,
                batch_invariant=self._batch_invariant,
                max_tokens=max_pages * spec.page_size,
                num_sms=_card(device).num_sms,
            )
            splits = splits_of(num_requests)
            most_items = planner.decode_items(num_requests, splits)
            partials = splits.most_partials * splits.ctas_an_item * columns
            items = self._buffer("items", most_items * ITEM_BYTES)
            fields |= {
                "items": items,
                "num_kv_heads": compile.fast_divide(spec.num_kv_heads),
                "q_len": spec.q_len,
                "column_blocks": compile.fast_divide(column_blocks),
                "num_page_ids": max_pages,
                "partials": self._buffer("partials", partials * (spec.head_dim + 4) * 4),
                "arrivals": self._buffer("arrivals", num_requests * splits.ctas_an_item * 4),
            }
            del fields["requests"]
            cluster = kernel_shape.cluster
            grid = functools.partial(_decode_grid, spec.q_len, splits_of, cluster)
            kernel = compile.kernel("plan_splits", device, shared_bytes=SPLITS_BYTES)
            params = kernel.params(
                {
                    "requests": requests,
                    "items": items,
                    "max_batch_size": num_requests,
                    "max_items": most_items,
                    "positions": fields["positions"],
                    "ctas_an_item": splits.ctas_an_item,
                    "num_sms": _card(device).num_sms,
                    "ctas_at_a_time": splits.ctas_at_a_time,
                    "fixed_splits": splits.fixed_splits,
                }
            )
            plan_splits = compile.Launch(kernel, SCAN_THREADS, params)
        constants["SHARED_BYTES"] = kernel_shape.shared_bytes
        kernel = compile.kernel(name, device, shared_bytes=kernel_shape.shared_bytes, **constants)
        attend = compile.Launch(kernel, kernel_shape.threads, kernel.params(fields), cluster)
        return _Launches(
            plan_requests=plan_requests,
            write_step=plan_requests.writer("indptr", "num_indices"),
            plan_splits=plan_splits,
            splits=splits_of,
            attend=attend,
            write_addresses=attend.writer("q", "lse"),
            write_form=attend.writer("q_row_stride", last),
            grid=grid,
            hopper=hopper,
        )

    def run(self, spec: AttentionSpec, q: Any, kv: PagedKV, out: Any, lse: Any, form: Any) -> None:
        """Attend. form: the same object while nothing but addresses differs from the run before."""
        stream: int = cupy.cuda.get_current_stream(self._index).ptr
        if cupy.cuda.runtime.streamIsCapturing(stream):
            self._check_capturable("run")
            self._keep_with_graph(stream)
        if form is not self._form:
            self._bind(q, kv, out)
            self._form = form
        lse_address = 0 if lse is None else lse.data.ptr
        if self._hopper:
            self._hopper.run(stream, q.data.ptr, kv, out.data.ptr, lse_address)
            return
        launches = self._launches
        launches.write_addresses(q.data.ptr, kv.k_address, kv.v_address, out.data.ptr, lse_address)
        _start(launches.attend, stream, self._grid)

    def _bind(self, q: Any, kv: PagedKV, out: Any) -> None:
        """Write what the form of a run decides."""
        self._form = None
        launches, q_strides, out_strides, out_itemsize = self._launches, q.strides, out.strides, out.dtype.itemsize
        self._hopper = launches.hopper if launches.hopper and launches.hopper.bind(q, kv, out) else None
        self._grid, *extents = launches.grid(q.shape[0])
        launches.write_form(
            q_strides[0] // 2,
            q_strides[1] // 2,
            out_strides[0] // out_itemsize,
            out_strides[1] // out_itemsize,
            *_units(kv.k_strides),
            *_units(kv.v_strides),
            out_itemsize == 4,
            *extents,
        )

    def _check_capturable(self, call: str) -> None:
        if self._one_shot:
            raise ValueError(
                "a one-shot call was made while the stream is capturing a CUDA graph, and what it plans lasts for one "
                "call only; make a BatchDecodeWithPagedKVCache or BatchPrefillWithPagedKVCache with max_batch_size= "
                "and max_pages=, plan and run it once, then capture its plan() and run()"
            )
        if not self._capturable:
            raise ValueError(
                f"{call}() was called while the stream is capturing a CUDA graph, but the plan has no capacity, so "
                f"its buffers may move; make it with max_batch_size= and max_pages="
            )

    def _keep_with_graph(self, stream: int) -> None:
        """The graph that is captured reads the buffers at every replay, also when this plan has others, or is gone."""
        capture = lifetimes.capture_id(stream)
        if capture != self._last_capture:
            lifetimes.keep_with_graph(stream, (self._status, *self._buffers.values()))
            self._last_capture = capture

    def raise_status(self) -> None:
        """PageTableError for the first fault that the last update met. Waits for the device."""
        raise_word(self._status)

    def _buffer(self, name: str, num_bytes: int) -> Any:
        """A buffer of at least num_bytes that stays where it is while it is large enough; it starts as zeros."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < num_bytes:
            if _is_capturing(cupy.cuda.get_current_stream()):
                raise ValueError(
                    f"plan() needs {num_bytes} bytes for its {name} while the stream is capturing a CUDA graph; "
                    f"call plan() once with these shapes before the capture, which makes the buffers"
                )
            size = num_bytes if buffer is None else max(num_bytes, 2 * buffer.nbytes)
            buffer = self._buffers[name] = zeros((max(size, 16),), np.uint8, self._device)
        return buffer


class _HopperPrefill:
    """The launches of prefill_hopper.cu for one plan: the order of its tiles once a step, the kernel once a layer."""

    def __init__(
        self,
        spec: AttentionSpec,
        device: str,
        shape: planner.PrefillShape,
        constants: dict[str, Any],
        fields: dict[str, Any],
        ordered: Any,
        claims: Any,
        is_long: bool,
    ) -> None:
        self._spec, self._device, self._tile_rows = spec, device, shape.tile_rows
        self._num_requests: int = fields["num_requests"]
        self._num_sms = _card(device).num_sms
        tiles = compile.kernel("plan_tiles", device, shared_bytes=TILES_BYTES)
        self.order_tiles = compile.Launch(
            tiles,
            SCAN_THREADS,
            tiles.params(
                {
                    "requests": fields["requests"],
                    "sorted": ordered,
                    "max_batch_size": self._num_requests,
                    "window_left": spec.window_left,
                    "group_size": spec.group_size,
                    "tile_rows": shape.tile_rows,
                }
            ),
        )
        gather = tensor_map.box_tokens(spec.page_size) < tensor_map.LEAST_BOX_TOKENS
        constants = constants | {"SHARED_BYTES": shape.shared_bytes, "GATHER": gather}
        kernel_of = functools.partial(
            compile.kernel, "prefill_hopper", device, shared_bytes=shape.shared_bytes, **constants
        )
        some_out = tensor_map.out_geometry(16, spec.num_qo_heads, spec.head_dim, spec.group_size)
        self._may_send = is_long and some_out is not None  # by TMA
        kernel_of(TMA_OUT=self._may_send)  # now; the other one with the first float32 out
        own = {
            "page_ids": fields["page_ids"],
            "claims": claims,
            "list": {
                "requests": ordered,
                "positions": fields["positions"],
                "group_size": fields["group_size"],
                "num_requests": self._num_requests,
                "num_kv_heads": spec.num_kv_heads,
            },
            "box_tokens": tensor_map.box_tokens(spec.page_size),
            "scoring": fields["scoring"],
        }
        pool_of = _gathered_pool if gather else functools.partial(_mapped_pool, spec.dtype == _BFLOAT16)
        make_layer = functools.partial(_HopperLayer.make, kernel_of, shape.threads, own, pool_of)
        self._layer = functools.lru_cache(maxsize=1024)(make_layer)
        self._q_strides, self._out_form = (0, 0), (0, 0, 0, False)
        self._sends = False
        self._out_geometry: tensor_map.OutGeometry | None = None  # None: too few rows for a box, so none is sent
        self._rows, self._tiles, self._grid = 0, 0, 0

    def bind(self, q: Any, kv: PagedKV, out: Any) -> bool:
        """Take over what the form of a run decides; or say no, where the kernel cannot count in q or in the pool."""
        rows, heads, _ = q.shape
        q_row, q_head = (q.strides[0] // 16 if rows > 1 else 0), (q.strides[1] // 16 if heads > 1 else 0)
        self._sends = self._may_send and out.dtype.itemsize == 2
        layer = self._layer(kv.k_address, kv.v_address, kv.form, self._sends)
        if layer is None or min(q_row, q_head) < 0 or rows * q_row + heads * q_head >= NOWHERE:
            return False
        itemsize = out.dtype.itemsize
        self._q_strides = q_row, q_head
        self._out_form = out.strides[0] // itemsize, out.strides[1] // itemsize, self._spec.num_qo_heads, itemsize == 4
        self._out_geometry = tensor_map.out_geometry(*out.shape, self._spec.group_size)
        self._rows = rows
        self._tiles = _most_tiles(rows * self._spec.group_size, self._tile_rows, self._num_requests)
        self._grid = min(self._num_sms, self._tiles * self._spec.num_kv_heads)
        return True

    def run(self, stream: int, q: int, kv: PagedKV, out: int, lse: int) -> None:
        """Launch, for arrays at these addresses."""
        geometry = self._out_geometry
        layer = self._layer(kv.k_address, kv.v_address, kv.form, self._sends)
        assert layer is not None  # a matter of the form, which bind has seen
        layer.write(q, *self._q_strides, out, lse, 0, *self._out_form)
        layer.tile_list["q_rows"], layer.tile_list["num_tiles"] = self._rows, self._tiles
        if self._sends and geometry is not None and layer.sends_to != (out, geometry):
            layer.out_map["words"] = tensor_map.out_map(out, geometry, self._spec.dtype == _BFLOAT16)
            layer.sends_to = out, geometry
        _start(layer.launch, stream, self._grid)


@dataclass
class _HopperLayer:
    """The launch of prefill_hopper.cu for a layer's pools, and the fields that runs write."""

    launch: compile.Launch
    write: Callable[..., None]  # from "q" to "to"
    tile_list: Any
    out_map: Any
    sends_to: tuple[int, tensor_map.OutGeometry] | None = None  # what out_map is of

    @staticmethod
    def make(
        kernel_of: Callable[..., compile.Kernel],
        threads: int,
        fields: dict[str, Any],
        pool_of: Callable[[int, tuple[int, int, int, int], tuple[int, int, int]], dict[str, Any] | None],
        k: int,
        v: int,
        form: Any,
        tma_out: bool,
    ) -> _HopperLayer | None:
        """For pools at k and v, made once; None where the kernel cannot count in their form."""
        *_, extents, k_strides, v_strides = form
        pools = pool_of(k, extents, k_strides), pool_of(v, extents, v_strides)
        if None in pools:
            return None
        kernel = kernel_of(TMA_OUT=tma_out)
        launch = compile.Launch(kernel, threads, kernel.params(fields | {"k": pools[0], "v": pools[1]}))
        return _HopperLayer(launch, launch.writer("q", "to"), launch.params["list"], launch.params["out_map"])


def _gathered_pool(
    pointer: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int]
) -> dict[str, Any] | None:
    """The fields of the kernel's Pool where threads copy from it."""
    units = _units(strides)
    reach = sum(extent * unit for extent, unit in zip(shape, units, strict=False))
    return {"pages": pointer, "strides": units} if min(units) >= 0 and reach < NOWHERE else None


def _mapped_pool(
    bfloat16: bool, pointer: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int]
) -> dict[str, Any] | None:
    """The fields of the kernel's Pool where TMA copies from it."""
    page, slot, head = strides
    geometry = tensor_map.pool_geometry(*shape, (page * 2, slot * 2, head * 2))
    return None if geometry is None else tensor_map.pool_map(pointer, geometry, bfloat16)


@functools.cache
def _is_hopper(device: str) -> bool:
    return bool(cupy.cuda.Device(_index(device)).compute_capability == "90")


@functools.cache
def _card(device: str) -> planner.Card:
    attributes = cupy.cuda.Device(_index(device)).attributes
    num_sms, shared_bytes = attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerMultiprocessor"]
    return planner.Card(int(num_sms), int(shared_bytes), has_clusters=_is_hopper(device))


def _decode_grid(q_len: int, splits: Callable[[int], planner.DecodeSplits], cluster: int, rows: int) -> tuple[int, int]:
    """CTAs, and the run's batch: items behind those of the batch belong to rows that q does not have."""
    batch = rows // q_len
    return planner.decode_grid(batch, splits(batch), cluster), batch


def _most_tiles(packed_rows: int, tile_rows: int, num_requests: int) -> int:
    """No batch of num_requests requests with so many rows has more tiles; the last is for rows behind the batch."""
    return packed_rows // tile_rows + num_requests + 1


def _prefill_grid(spec: AttentionSpec, num_requests: int, rows: int) -> tuple[int, int, int]:
    """CTAs, and the run's q_rows and num_tiles."""
    tiles = _most_tiles(
        rows * spec.group_size, planner.prefill_shape(spec.head_dim, spec.head_dim).tile_rows, num_requests
    )
    return tiles * spec.num_kv_heads, rows, tiles
