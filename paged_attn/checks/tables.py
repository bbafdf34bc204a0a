"""Page tables: their arrays, their values where the host has them, and what fits into a plan."""

from typing import Any

import numpy as np

from ..errors import PageTableError
from ..holders import TABLE_ARRAYS, TableArrays
from ..interop import device_of
from .arrays import INT32, check_device, check_metadata_device, check_shape, check_vector, entry, first_true
from .overlaps import check_apart
from .scalars import INT_MAX, as_int


def check_table(table: Any, name: str = "table", call: str = "") -> None:
    """`table` is a PageTable. `call` shows the arguments in their order."""
    if not isinstance(table, TableArrays):
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
    check_vector(indptr, "indptr", INT32, None, "batch_size + 1 offsets into indices")
    if indptr.shape[0] == 0:
        raise ValueError("indptr is empty, and it has batch_size + 1 entries; pass [0] for an empty batch")
    batch_size = indptr.shape[0] - 1
    check_vector(indices, "indices", INT32, None, "the page ids of all requests")
    check_vector(last_page_len, "last_page_len", INT32, batch_size, "one for each request (len(indptr) - 1)")
    arrays = [(indices, "indices"), (last_page_len, "last_page_len")]
    for array, name in ((page_offset, "page_offset"), (total_len, "total_len")):
        if array is not None:
            check_vector(array, name, INT32, batch_size, "one for each request (len(indptr) - 1)")
            arrays.append((array, name))
    device = device_of(indptr)
    for array, name in arrays:
        if device != "cpu" or not isinstance(array, np.ndarray):
            check_device(array, name, device, "indptr")


ANY_PAGE = INT_MAX  # the num_pages of a pool that is not at hand


def check_table_values(table: TableArrays, num_pages: int = ANY_PAGE) -> None:
    """A host table in full, against a pool of `num_pages` pages. A device table is not read."""
    if table.device != "cpu":
        return
    # As unsigned numbers negative ones are too large, and where none decreases the last is the largest: a table that is
    # right takes few comparisons.
    indptr, limit = table.indptr, table.indices.shape[0]
    offsets = indptr.view(np.uint32)
    begins, ends = offsets[:-1], offsets[1:]
    is_wrong = first_true(ends < begins) is not None or (ends.size and ends[-1] > limit)
    if is_wrong and (bad := first_true((ends < begins) | (ends > limit))) is not None:
        begin, end = int(indptr[bad]), int(indptr[bad + 1])
        index = bad + 1 if 0 <= begin <= limit else 0
        raise PageTableError(
            f"indptr[{index}] = {indptr[index]} gives request {bad} the pages [{begin}, {end}) of indices, which has "
            f"{limit} entries; indptr must not decrease and must stay within [0, {limit}]: correct indptr[{index}]",
            **entry("indptr", index, indptr),
        )
    first = int(indptr[0])
    used = table.indices[first : int(indptr[-1])]
    if (bad := first_true(used.view(np.uint32) >= num_pages)) is not None:
        request = int(np.searchsorted(indptr, first + bad, side="right")) - 1
        page = int(used[bad])
        raise PageTableError(
            f"indices[{first + bad}] = {page} (request {request}) is no page of a pool of num_pages={num_pages}; "
            f"pass page ids in [0, {num_pages})",
            **entry("indices", first + bad, table.indices),
        )
    last = table.last_page_len
    wrong = last.view(np.uint32) - 1 >= table.page_size
    if first_true(wrong) is not None and (bad := first_true((ends > begins) & wrong)) is not None:
        raise PageTableError(
            f"last_page_len[{bad}] = {last[bad]}, and a request that has pages has 1 <= last_page_len <= "
            f"page_size={table.page_size}; correct last_page_len[{bad}]",
            **entry("last_page_len", bad, last),
        )
    for array, field in ((table.page_offset, "page_offset"), (table.total_len, "total_len")):
        if array is not None and (bad := first_true(array < 0)) is not None:
            raise PageTableError(
                f"{field}[{bad}] = {array[bad]}, and it must not be negative; correct {field}[{bad}]",
                **entry(field, bad, array),
            )
    if table.page_offset is None and limit * table.page_stride * table.page_size <= INT_MAX:
        return
    counts = np.diff(indptr).astype(np.int64)
    offset = 0 if table.page_offset is None else table.page_offset.astype(np.int64)
    # In float64, which is exact up to 2**53 and never turns round.
    end_position = (offset + (counts - 1) * float(table.page_stride)) * table.page_size + last
    if (bad := first_true((ends > begins) & (end_position > INT_MAX))) is not None:
        field = "indptr" if table.page_offset is None else "page_offset"
        raise PageTableError(
            f"request {bad} ends at position {end_position[bad]:.0f}, and positions stay below 2**31 "
            f"({counts[bad]} pages of {table.page_size} tokens); correct {field}[{bad}]",
            **entry(field, bad, end_position),
        )


def check_table_out(out: Any, page_size: int, num_ranks: int, device: str, batch_size: int, num_pages: int) -> None:
    """`out` of PagedKVCache.page_table: of this page_size and device, with positions if there are several ranks, and
    with room for the batch."""
    check_table(out, "out")
    sizes = f"page_size={page_size}, device={device!r}, positions={num_ranks > 1}, page_stride={num_ranks}"
    remedy = f"make out with PageTable.empty(..., {sizes})"
    has = [name for name in ("page_offset", "total_len") if getattr(out, name) is not None]
    fits = len(has) == 2 or (num_ranks == 1 and not has)
    if out.is_split or not fits:
        raise ValueError(
            f"out has {' and '.join(has) or 'no positions'}, is_split={out.is_split}, and a cache of "
            f"num_ranks={num_ranks} writes whole sequences{' with positions' if num_ranks > 1 else ''}; {remedy}"
        )
    _check_out(out, page_size, num_ranks, device, "the cache", remedy)
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


def check_split_out(out: Any, table: TableArrays, num_chunks: int) -> None:
    """`out` of PageTable.split: num_chunks * batch_size rows, positions, room for every page."""
    remedy = f"pass the table that split({num_chunks}) of a table like this one returned"
    check_table(out, "out")
    rows = num_chunks * table.batch_size
    if out.batch_size != rows:
        raise ValueError(
            f"out has {out.batch_size} rows, and {num_chunks} chunks of a batch of {table.batch_size} are {rows}; "
            f"{remedy}"
        )
    if out.page_offset is None or out.total_len is None:
        raise ValueError(f"out has no page_offset or no total_len, and the chunks of a sequence need both; {remedy}")
    if out.indices.size < table.indices.size:
        raise ValueError(
            f"out.indices has {out.indices.size} entries, fewer than the {table.indices.size} of the table; {remedy}"
        )
    _check_out(out, table.page_size, table.page_stride, table.device, "the table", remedy, table)


def _check_out(
    out: TableArrays, page_size: int, page_stride: int, device: str, source: str, remedy: str, *read: TableArrays
) -> None:
    """What holds for every table that is written: its arrays overlap neither each other nor those that are read."""
    if (out.page_size, out.page_stride) != (page_size, page_stride):
        raise ValueError(
            f"out has page_size={out.page_size} and page_stride={out.page_stride}, and {source} has {page_size} and "
            f"{page_stride}; {remedy}"
        )
    if out.device != device:
        raise TypeError(f"out lives on {out.device} and {source} on {device}; {remedy}")
    if not out.writable:
        raise ValueError(f"out cannot be written: some of its arrays are JAX arrays or read-only arrays; {remedy}")
    of_read = [(getattr(table, name), f"the table's {name}") for table in read for name in TABLE_ARRAYS]
    written = [(getattr(out, name), f"out.{name}") for name in TABLE_ARRAYS]
    check_apart(written, of_read, "an out whose arrays have memory of their own")


def check_block_table(block_table: Any, seq_lens: Any, page_size: int) -> None:
    """block_table int32 [batch, max_pages_per_seq], seq_lens int32 [batch]; host values are checked in full."""
    if block_table.dtype != INT32:
        raise TypeError(f"block_table must be int32, got {block_table.dtype}; pass block_table.astype(np.int32)")
    check_shape(block_table, "block_table", ("batch", "max_pages_per_seq"), "[batch, max_pages_per_seq]")
    batch_size, max_pages = block_table.shape
    check_vector(seq_lens, "seq_lens", INT32, batch_size, "one for each row of block_table")
    check_device(seq_lens, "seq_lens", device_of(block_table), "block_table")
    if not isinstance(block_table, np.ndarray):
        return
    if (bad := first_true((seq_lens < 0) | (seq_lens > max_pages * page_size))) is not None:
        raise PageTableError(
            f"seq_lens[{bad}] = {seq_lens[bad]}, which is not in [0, {max_pages * page_size}] (block_table has "
            f"{max_pages} pages of {page_size} tokens a row); correct seq_lens[{bad}] or pass a wider block_table",
            **entry("seq_lens", bad, seq_lens),
        )
    pages = -(-seq_lens.astype(np.int64) // page_size)
    wrong = (np.arange(max_pages) < pages[:, None]) & (block_table < 0)
    if (bad := first_true(wrong.ravel())) is not None:
        row, column = divmod(bad, max_pages)
        raise PageTableError(
            f"block_table[{row}, {column}] = {block_table[row, column]}, but row {row} has seq_lens[{row}] = "
            f"{seq_lens[row]} tokens in {pages[row]} pages; put the page's id there",
            field="block_table",
            index=row,
            value=int(block_table[row, column]),
        )


def check_block_width(table: TableArrays, max_pages_per_seq: int) -> None:
    """No request of a host table has more pages than a row of its dense form."""
    if table.device == "cpu" and (bad := first_true(np.diff(table.indptr) > max_pages_per_seq)) is not None:
        pages = int(table.indptr[bad + 1] - table.indptr[bad])
        raise PageTableError(
            f"max_pages_per_seq is {max_pages_per_seq}, and request {bad} has {pages} pages; "
            f"pass max_pages_per_seq of at least {pages}",
            field="max_pages",
            index=bad,
            value=pages,
        )


def check_token_positions(batch_indices: Any, positions: Any, table: TableArrays) -> None:
    """The arguments of PageTable.slots: int32 [n] both, beside the table or on the host, where values are checked."""
    check_vector(batch_indices, "batch_indices", INT32, None, "the request of each token")
    check_vector(positions, "positions", INT32, batch_indices.shape[0], "one for each entry of batch_indices")
    limits = ((batch_indices, "batch_indices", table.batch_size), (positions, "positions", INT_MAX))
    for array, name, limit in limits:
        check_metadata_device(array, name, table.device, "the table")
        if isinstance(array, np.ndarray) and (bad := first_true((array < 0) | (array >= limit))) is not None:
            raise PageTableError(
                f"{name}[{bad}] = {array[bad]}, which is not in [0, {limit}); correct {name}[{bad}]",
                **entry(name, bad, array),
            )


def check_capacities(
    table: TableArrays,
    qo_indptr: Any,
    q_len: int | None,
    *,
    max_batch_size: int | None,
    max_pages: int | None,
    max_tokens: int | None = None,
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
