"""Page tables on the device: PageTable's methods, and the table that a cache writes."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ... import compile, lifetimes, recipes
from ...holders import TABLE_ARRAYS, TableArrays
from ...interop import device_index
from .launch import launch
from .memory import current_device, empty, is_capturing, zeros
from .status import STATUS_BYTES, device_word
from .uploads import upload_together


def seq_lens(table: TableArrays) -> Any:
    lens = empty((table.batch_size,), np.int32, table.device)
    blocks = -(-table.batch_size // recipes.THREADS)
    launch(recipes.SEQ_LENS, table.device, blocks, _table_fields(table) | {"seq_lens": lens})
    return lens


def split_table(table: TableArrays, num_chunks: int, out: TableArrays) -> None:
    fields = _table_fields(table) | _out_fields(out) | {"num_chunks": num_chunks}
    launch(recipes.SPLIT_ROWS, table.device, 1, fields)
    blocks = recipes.row_blocks(num_chunks * table.batch_size, out.indices.size)
    launch(recipes.SPLIT_PAGES, table.device, blocks, fields)


def from_block_table(block_table: Any, seq_lens: Any, page_size: int, out: TableArrays) -> None:
    batch, width = block_table.shape
    fields = _out_fields(out) | {
        "block_table": block_table, "seq_lens": seq_lens, "status": device_word(out.device), "batch": batch,
        "width": width, "row_stride": block_table.strides[0] // 4, "column_stride": block_table.strides[1] // 4,
        "page_size": page_size,
    }  # fmt: skip
    launch(recipes.BLOCK_TABLE_ROWS, out.device, 1, fields)
    launch(recipes.BLOCK_TABLE_PAGES, out.device, recipes.row_blocks(batch, out.indices.size), fields)


def to_block_table(table: TableArrays, max_pages_per_seq: int) -> Any:
    block_table = empty((table.batch_size, max_pages_per_seq), np.int32, table.device)
    fields = _table_fields(table) | {"block_table": block_table, "width": max_pages_per_seq}
    launch(recipes.TO_BLOCK_TABLE, table.device, -(-block_table.size // recipes.THREADS), fields)
    return block_table


def table_slots(table: TableArrays, batch_indices: Any, positions: Any) -> Any:
    slots = empty(positions.shape, np.int64, table.device)
    fields = _table_fields(table) | {
        "batch_indices": batch_indices, "positions": positions, "slots": slots, "tokens": slots.size,
        "page_size": compile.fast_divide(table.page_size),
    }  # fmt: skip
    launch(recipes.TABLE_SLOTS, table.device, -(-slots.size // recipes.THREADS), fields)
    return slots


def check_table(table: TableArrays, num_pages: int) -> Any:
    """The status word that a kernel fills, now or at every replay of a graph."""
    word = zeros((STATUS_BYTES,), np.uint8, table.device)
    stream = cupy.cuda.get_current_stream(device_index(table.device))
    if is_capturing(stream):
        lifetimes.keep_with_graph(stream.ptr, word)
    blocks = recipes.row_blocks(table.batch_size, table.indices.size) if table.batch_size else 1
    fields = _table_fields(table) | {"status": word, "num_pages": num_pages}
    launch(recipes.CHECK_TABLE, table.device, blocks, fields)
    return word


def update_table(
    page_lists: Any,
    update_index: np.ndarray[Any, Any],
    update_value: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any],
    indptr: np.ndarray[Any, Any],
    per_row: dict[str, np.ndarray[Any, Any]],
    out: Any,
) -> None:
    device = out.device
    status = device_word(device)
    num_updates, num_entries, batch = update_index.size, page_lists.size, starts.size
    with current_device(device):
        parts = (update_index, update_value, starts, indptr, *per_row.values())
        _memory, (index, value, start, row, *uploaded) = upload_together(parts, device)
        launch(recipes.UPDATE_PAGE_LISTS, device, -(-num_updates // recipes.THREADS), {
            "page_lists": page_lists, "update_index": index, "update_value": value, "status": status,
            "num_entries": num_entries, "num_updates": num_updates,
        })  # fmt: skip
        launch(recipes.BUILD_TABLE, device, recipes.row_blocks(batch, int(indptr[-1])) if batch else 1, {
            **_out_fields(out),
            "page_offset": None, "total_len": None, **dict(zip(per_row, uploaded, strict=True)),
            "page_lists": page_lists, "starts": start, "indptr": row, "status": status, "num_entries": num_entries,
            "batch": batch, "capacity": out.last_page_len.size, "page_stride": out.page_stride,
        })  # fmt: skip


def _table_fields(table: TableArrays) -> dict[str, Any]:
    """A table that is read, and the device's status word."""
    sizes = table.batch_size, table.indices.size, table.page_size, table.page_stride
    return {"table": (*_addresses(table), *sizes), "status": device_word(table.device)}


def _out_fields(out: TableArrays) -> dict[str, Any]:
    """A table that is written."""
    return {"out": (*_addresses(out), out.indices.size)}


def _addresses(table: TableArrays) -> list[int]:
    arrays = (getattr(table, name) for name in TABLE_ARRAYS)
    return [0 if array is None else array.data.ptr for array in arrays]


def table_checksum(table: TableArrays, rank: int, num_ranks: int, checksum: Any) -> None:
    """uint64 [1] `checksum` becomes that of the lengths of a table on the device; 0 for one on the host, where ranks
    compare the lengths themselves."""
    device = f"cuda:{checksum.device.id}"
    if table.device == "cpu" or table.total_len is None:
        with current_device(device):
            checksum.data.memset_async(0, checksum.nbytes)
        return
    launch(recipes.TABLE_CHECKSUM, device, 1, {
        "total_len": table.total_len, "page_offset": table.page_offset, "checksum": checksum,
        "batch": table.batch_size, "rank": rank, "num_ranks": num_ranks,
    })  # fmt: skip


def compare_checksums(checksums: Any, rank: int, status: Any) -> None:
    """uint32 [1] `status` becomes 1 + the first rank whose checksum is another than that of `rank`, or 0. checksums:
    uint64 [num_ranks, any], the first of each row."""
    launch(recipes.COMPARE_CHECKSUMS, f"cuda:{checksums.device.id}", 1, {
        "checksums": checksums, "status": status, "stride": checksums.shape[1], "rank": rank,
        "num_ranks": checksums.shape[0],
    })  # fmt: skip
