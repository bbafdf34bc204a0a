"""PagedKVCache: who owns which page, on the host, in NumPy, for all sequences of a batch at once.

A sequence is a row: its length in tokens, and a list of page ids. Pages are counted by reference, because forks share
them. On the device is only what the kernels read: the pages, a copy of all page lists, and one page table.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from . import attention, backends, interop, spec
from .errors import OutOfPagesError, PageTableError
from .layout import Layout, PagedKV
from .page_table import PageTable

# A sequence id is (generation << ROW_BITS) | row: a row that is used again gives another id, so a freed id stays freed.
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
NOT_LIVE = (
    "which is no sequence of this cache: it was freed, or it came from elsewhere; "
    "pass an id that new_sequence() or fork() returned and free() has not ended"
)


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[0], first[0]+1, ... (count[0] of them), first[1], first[1]+1, ... as one array [sum(count)]."""
    if np.count_nonzero(count == 1) == count.size:  # a decode step: one of each
        return first
    end = count.cumsum()
    return np.repeat(first - end + count, count) + np.arange(end[-1])


def _resized(array: np.ndarray, size: int) -> np.ndarray:
    """A copy of a 1-D array with `size` elements, zeros behind the old ones."""
    copy = np.zeros(size, array.dtype)
    copy[: array.size] = array
    return copy


class _PageLists:
    """The page ids of every sequence, in one flat array (the arena) on the host, and a copy of it on the device.

    Row r owns the extent page_ids[start[r] : start[r] + capacity[r]]; its pages are the first count[r] entries. A list
    that outgrows its extent moves to a new one of twice the size it needs, behind all others; when there is no room
    behind them, all lists move to a new arena. The device gets only the entries that changed.
    """

    def __init__(self, backend: ModuleType, device: str) -> None:
        self._backend, self._device = backend, device
        self.start = np.zeros(0, np.int64)
        self.capacity = np.zeros(0, np.int64)
        self.count = np.zeros(0, np.int64)
        self.page_ids = np.zeros(0, np.int32)
        self._used = 0
        self._changed = np.zeros(0, np.int32)  # [arena size]; the first _num_changed: entries the device has not seen
        self._num_changed = 0
        self._device_page_ids = backend.empty((0,), np.dtype(np.int32), device)

    def set_num_rows(self, num_rows: int) -> None:
        self.start, self.capacity, self.count = (_resized(x, num_rows) for x in (self.start, self.capacity, self.count))

    def pages(self, row: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Pages first to last (excluded) of one row, a view."""
        start = self.start[row]
        return self.page_ids[start + first : start + (self.count[row] if last is None else last)]

    def last_pages(self, rows: np.ndarray) -> np.ndarray:
        return self.page_ids[self.start[rows] + self.count[rows] - 1]

    def replace_last_pages(self, rows: np.ndarray, pages: np.ndarray) -> None:
        entries = self.start[rows] + self.count[rows] - 1
        self.page_ids[entries] = pages
        self._mark_changed(entries)

    def extend(self, rows: np.ndarray, counts: np.ndarray, pages: np.ndarray) -> None:
        """Appends counts[i] pages to rows[i]; `pages` holds those of rows[0] first, then those of rows[1], ..."""
        held = self.count[rows]
        self._make_room(rows, held + counts)
        entries = _ranges(self.start[rows] + held, counts)
        self.page_ids[entries] = pages
        self.count[rows] = held + counts
        self._mark_changed(entries)

    def write_table(self, rows: np.ndarray, indptr: np.ndarray, last_page_len: np.ndarray, out: PageTable) -> None:
        changed = self._changed[: self._num_changed]
        values = self.page_ids[changed]
        self._backend.update_table(self._device_page_ids, changed, values, self.start[rows], indptr, last_page_len, out)
        self._num_changed = 0

    def _make_room(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Sees to it that rows[i] has a capacity of counts[i] or more."""
        short = self.capacity[rows] < counts
        if not short.any():
            return
        old_page_ids = self.page_ids
        if self._used + 2 * int(counts[short].sum()) <= old_page_ids.size:
            rows, counts = rows[short], counts[short]
        else:
            wanted = self.count.copy()
            wanted[rows] = counts
            rows, counts = np.arange(wanted.size), wanted
            size = max(old_page_ids.size, 4 * int(counts.sum()))  # at least half stays free: moving is amortised
            self.page_ids = np.zeros(size, np.int32)
            self._used = self._num_changed = 0
            if size != old_page_ids.size:
                self._changed = np.zeros(size, np.int32)
                self._device_page_ids = self._backend.empty((size,), np.dtype(np.int32), self._device)
        held = self.count[rows]
        end = self._used + np.cumsum(2 * counts)
        start = end - 2 * counts
        entries = _ranges(start, held)
        self.page_ids[entries] = old_page_ids[_ranges(self.start[rows], held)]
        self.start[rows], self.capacity[rows] = start, 2 * counts
        self._used = int(end[-1])
        self._mark_changed(entries)

    def _mark_changed(self, entries: np.ndarray) -> None:
        end = self._num_changed + entries.size
        if end <= self._changed.size:
            self._changed[self._num_changed : end] = entries
            self._num_changed = end
        else:  # more changes than entries: every entry counts as changed
            self._changed[: self._used] = np.arange(self._used)
            self._num_changed = self._used


class PagedKVCache:
    """Pages of K and V for many sequences and layers, with sharing of prefixes by copy-on-write.

    num_pages, page_size, num_kv_heads, head_dim: the extents of every layer's pool; page_size counts tokens.
    layout: Layout or "NHD" / "HND". dtype: what K and V are stored in ("float16", "bfloat16", "float32", ...).
    num_layers: layers that share the page lists; a page id means the same page in each of them.
    device: "cpu", "cuda:<i>", ...; None is the current CUDA device if there is one, else the CPU.
    max_batch_size, max_pages: capacity of the cache's own page table (max_pages counts the pages of all its sequences
        together). With both, its arrays never move, as CUDA graphs need; without, they grow by doubling.

    A sequence is the int that `new_sequence` or `fork` returned. A batch of them, `seqs`, is a list of such ints or an
    integer array [batch], without repetition. One that was freed, or is none of this cache, is a ValueError.
    All work for the device goes on its current stream.

    ValueError, TypeError: extents, layouts and dtypes that cannot be. NotImplementedError: a dtype or head_dim that
    `supports("append", ...)` denies on that device.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layout: Layout | str,
        dtype: Any,
        num_layers: int = 1,
        device: Any = None,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
    ) -> None:
        num_pages, page_size, num_kv_heads, head_dim, num_layers = (
            spec.as_int(value, name, minimum=1)
            for value, name in (
                (num_pages, "num_pages"),
                (page_size, "page_size"),
                (num_kv_heads, "num_kv_heads"),
                (head_dim, "head_dim"),
                (num_layers, "num_layers"),
            )
        )
        if max_batch_size is not None:
            max_batch_size = spec.as_int(max_batch_size, "max_batch_size", minimum=1)
        if max_pages is not None:
            max_pages = spec.as_int(max_pages, "max_pages", minimum=1)
        layout, dtype = Layout(layout), interop.as_dtype(dtype)
        self._device = interop.resolve_device(device)
        self._backend = backends.of(self._device)
        support = attention.supports("append", device=self._device, dtype=dtype, head_dim=head_dim)
        if not support:
            raise NotImplementedError(support.reason)
        page = (page_size, num_kv_heads, head_dim) if layout is Layout.NHD else (num_kv_heads, page_size, head_dim)
        self._storage = self._backend.zeros((num_layers, num_pages, 2, *page), dtype, self._device)
        self._layers = tuple(PagedKV.combined(self._storage[i], layout=layout) for i in range(num_layers))
        self._num_pages, self._page_size = num_pages, page_size

        self._free_pages = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack: the first _num_free are free
        self._num_free = num_pages
        self._references = np.zeros(num_pages, np.int32)
        self._num_references = 0  # their sum

        self._lists = _PageLists(self._backend, self._device)
        self._length = np.zeros(0, np.int64)  # [rows] tokens, reserved ones included
        self._live_id = np.zeros(0, np.int64)  # [rows] the id of the sequence in this row, -1 where there is none
        self._unused_ids: list[int] = []  # the ids that free rows give next; the last comes first
        self._batch: tuple[bytes, np.ndarray] | None = None  # the ids that were last found to be right, and their rows
        self._set_num_rows(16)

        self._max_batch_size, self._max_pages = max_batch_size, max_pages
        self._table = self._empty_table(max_batch_size or 16, max_pages or 256)
        self._cut_tables: dict[int, PageTable] = {}  # by batch size: what page_table returns, made once

    @property
    def layers(self) -> tuple[PagedKV, ...]:
        """One PagedKV a layer, always the same objects: views of one array [num_layers, num_pages, 2, ...], K first."""
        return self._layers

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self._page_size

    @property
    def num_free_pages(self) -> int:
        return self._num_free

    @property
    def num_shared_pages(self) -> int:
        """Pages that more than one sequence holds."""
        return int(np.count_nonzero(self._references > 1))

    @property
    def device(self) -> str:
        return self._device

    @property
    def indptr(self) -> Any:
        """int32 [capacity + 1] on the cache's device, of the last `page_table`; past its batch it stays constant."""
        return self._table.indptr

    @property
    def indices(self) -> Any:
        """int32 [capacity] on the cache's device, of the last `page_table`; entries from indptr[-1] on mean nothing."""
        return self._table.indices

    @property
    def last_page_len(self) -> Any:
        """int32 [capacity] on the cache's device, of the last `page_table`; 0 past its batch."""
        return self._table.last_page_len

    def seq_len(self, seq: int) -> int:
        """Tokens of a sequence, reserved ones included. It holds ceil(seq_len / page_size) pages."""
        return int(self._length[self._row(seq)])

    def new_sequence(self) -> int:
        """The id of a new, empty sequence. It holds no page."""
        if not self._unused_ids:
            self._set_num_rows(2 * self._length.size)
        seq = self._unused_ids.pop()
        self._live_id[seq & ROW_MASK] = seq
        return seq

    def fork(self, seq: int, length: int | None = None) -> int:
        """A new sequence that begins with the first `length` tokens of `seq` (None: all) and shares their pages.

        It takes no page; whoever writes first into a partly filled page that is shared takes a copy of it then.
        Tokens of `seq` that are reserved must have been written (in every layer) before either side reserves again.
        ValueError if length is not in [0, seq_len(seq)].
        """
        row = self._row(seq)
        length = self._check_length(seq, row, length)
        forked = self.new_sequence()
        pages = self._lists.pages(row, 0, self._pages_for(length))
        self._references[pages] += 1
        self._num_references += pages.size
        forked_row = forked & ROW_MASK
        self._lists.extend(np.array([forked_row]), np.array([pages.size]), pages)
        self._length[forked_row] = length
        return forked

    def truncate(self, seq: int, length: int) -> None:
        """Drops the tokens of `seq` from `length` on, and the pages that only they needed.

        ValueError if length is not in [0, seq_len(seq)].
        """
        row = self._row(seq)
        length = self._check_length(seq, row, length)
        kept = self._pages_for(length)
        self._release(self._lists.pages(row, kept))
        self._lists.count[row] = kept
        self._length[row] = length

    def free(self, seq: int) -> None:
        """Ends `seq`: pages that no other sequence holds become free, and the id is refused from now on."""
        row = self._row(seq)
        self._release(self._lists.pages(row))
        self._lists.count[row] = 0
        self._length[row] = 0
        self._live_id[row] = -1
        self._batch = None
        self._unused_ids.append(int(seq) + (1 << ROW_BITS))

    def reserve(self, seqs: Sequence[int] | np.ndarray, counts: int | Sequence[int] | np.ndarray) -> Any:
        """Makes each sequence counts[i] tokens longer and says where they go.

        counts: one int for all sequences, or one for each. Returns slots int64 [sum(counts)] on the cache's device, the
        tokens of seqs[0] first, for `write` in every layer; slot = page * page_size + offset.
        Takes pages as needed. A sequence whose last page is partly filled and shared gets a copy of it (all layers);
        where all sequences that share it are in the batch, the last of them keeps the original.
        OutOfPagesError (with .wanted and .free) if the pool cannot give that many pages: then nothing has changed.
        """
        rows = self._rows(seqs)
        return self._reserve(rows, self._counts(counts, rows.size))

    def write(self, slots: Any, k: Any, v: Any, layer: int = 0) -> None:
        """Writes k, v [tokens, num_kv_heads, head_dim] into slots int64 [tokens] of one layer; -1 skips the token."""
        if not 0 <= layer < len(self._layers):
            raise ValueError(
                f"layer is {layer}, which is no layer of a cache with num_layers={len(self._layers)}; "
                f"pass an int in [0, {len(self._layers)})"
            )
        attention.append(self._layers[layer], slots, k, v)

    def append(
        self, seqs: Sequence[int] | np.ndarray, counts: int | Sequence[int] | np.ndarray, k: Any, v: Any
    ) -> None:
        """`reserve` and `write` in one, for a cache of one layer: k, v [sum(counts), num_kv_heads, head_dim].

        Nothing is reserved if k or v do not fit. Errors are those of `reserve` and `write`.
        """
        if len(self._layers) != 1:
            raise ValueError(
                f"append() is for a cache of one layer, and this one has num_layers={len(self._layers)}; "
                "call reserve(seqs, counts) once and write(slots, k, v, layer=i) for every layer"
            )
        rows = self._rows(seqs)
        counts = self._counts(counts, rows.size)
        k, v = interop.native(k, "k"), interop.native(v, "v")
        skipped = np.full(int(counts.sum()), -1, np.int64)  # stands for the slots, which exist only once reserved
        spec.check_append(self._layers[0], skipped, k, v)
        attention.append(self._layers[0], self._reserve(rows, counts), k, v)

    def page_table(self, seqs: Sequence[int] | np.ndarray, out: PageTable | None = None) -> PageTable:
        """The page table of a batch of sequences, reserved tokens included; row i is seqs[i].

        Writes the cache's own arrays, or those of `out` (as of PageTable.empty: their lengths are its capacity), and
        returns a table of len(seqs) rows over views of them, valid until they are written again. Its `indices` has the
        full capacity, so that address and shape are the same in every step; entries from indptr[-1] on mean nothing.
        Rows of the arrays past the batch are empty: they repeat indptr[-1].
        PageTableError if the batch has more rows or pages than max_batch_size, max_pages or `out` can hold.
        """
        rows = self._rows(seqs)
        num_pages = self._lists.count[rows]
        indptr = np.zeros(rows.size + 1, np.int64)
        num_pages.cumsum(out=indptr[1:])
        length = self._length[rows]
        last_page_len = np.minimum(length - (num_pages - 1) * self._page_size, length)  # 0 where there is no page
        table = self._table_for(rows.size, int(indptr[-1]), out)
        self._lists.write_table(rows, indptr, last_page_len, table)
        if table is not self._table:
            return self._cut(table, rows.size)
        if rows.size not in self._cut_tables:
            self._cut_tables[rows.size] = self._cut(table, rows.size)
        return self._cut_tables[rows.size]

    def _cut(self, table: PageTable, batch_size: int) -> PageTable:
        """The table's first rows, as views."""
        indptr, last_page_len = table.indptr[: batch_size + 1], table.last_page_len[:batch_size]
        return PageTable(indptr, table.indices, last_page_len, page_size=self._page_size)

    def _reserve(self, rows: np.ndarray, counts: np.ndarray) -> Any:
        length = self._length[rows]
        longer = length + counts
        added = self._pages_for(longer) - self._lists.count[rows]
        (growing,) = added.nonzero()
        num_added = int(added[growing].sum()) if growing.size else 0
        copying = self._copying(rows, length, counts)
        wanted = num_added + copying.size
        if wanted > self._num_free:
            raise OutOfPagesError(wanted, self._num_free)
        upload = self._backend.uploader(self._device)  # raises in a graph's capture, before anything has changed
        if wanted:
            pages = self._free_pages[self._num_free - wanted : self._num_free][::-1].copy()
            self._num_free -= wanted
            self._references[pages] = 1
            self._num_references += num_added
            if copying.size:
                shared, copies = self._lists.last_pages(copying), pages[num_added:]
                np.subtract.at(self._references, shared, 1)
                self._lists.replace_last_pages(copying, copies)
                self._backend.copy_pages(self._storage, shared, copies)
            if num_added:
                self._lists.extend(rows[growing], added[growing], pages[:num_added])
        self._length[rows] = longer
        # In the arena's own token count, token t of row r is number start[r] * page_size + t.
        token = _ranges(self._lists.start[rows] * self._page_size + length, counts)
        entry = token // self._page_size
        return upload((self._lists.page_ids[entry] - entry) * self._page_size + token)

    def _copying(self, rows: np.ndarray, length: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Which of the rows, `length` tokens long and about to get `counts` more, must first copy their last page."""
        if self._num_references == self._num_pages - self._num_free:  # no page is shared
            return rows[:0]
        writers = rows[(counts > 0) & (length % self._page_size > 0)]
        pages = self._lists.last_pages(writers)
        is_shared = self._references[pages] > 1
        if not is_shared.any():
            return writers[:0]
        writers, pages = writers[is_shared], pages[is_shared]
        shared, group, num_writers = np.unique(pages, return_inverse=True, return_counts=True)
        order = np.arange(writers.size)
        last_writer = np.zeros(shared.size, np.int64)
        last_writer[group] = order  # of several values for one element NumPy keeps the last
        keeps_original = (num_writers == self._references[shared])[group] & (last_writer[group] == order)
        return writers[~keeps_original]

    def _release(self, pages: np.ndarray) -> None:
        """One sequence lets go of these pages; those that nobody else holds become free."""
        self._references[pages] -= 1
        self._num_references -= pages.size
        freed = pages[self._references[pages] == 0]
        self._free_pages[self._num_free : self._num_free + freed.size] = freed
        self._num_free += freed.size

    def _set_num_rows(self, num_rows: int) -> None:
        """Makes room for more sequences; the rows so far stay."""
        old = self._length.size
        self._lists.set_num_rows(num_rows)
        self._length, self._live_id = _resized(self._length, num_rows), _resized(self._live_id, num_rows)
        self._live_id[old:] = -1
        self._unused_ids += range(num_rows - 1, old - 1, -1)

    def _pages_for(self, length: Any) -> Any:
        return (length + (self._page_size - 1)) // self._page_size

    def _row(self, seq: int) -> int:
        """The row of a live sequence."""
        seq = spec.as_int(seq, "seq", minimum=0, maximum=2**63 - 1)
        row = seq & ROW_MASK
        if row >= self._live_id.size or self._live_id[row] != seq:
            raise ValueError(f"seq is {seq}, {NOT_LIVE}")
        return row

    def _rows(self, seqs: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows int64 [batch] of live, distinct sequences."""
        ids = spec.as_sequences(seqs)
        content = ids.tobytes()
        if self._batch is not None and self._batch[0] == content:  # ids stay live until free()
            return self._batch[1]
        spec.check_distinct(ids)
        rows = ids & ROW_MASK
        # A clipped row never has the id that was asked for; free rows have -1, which a caller could ask for.
        live = (self._live_id.take(rows, mode="clip") == ids) & (ids >= 0)
        if not live.all():
            i = int(np.argmin(live))
            raise ValueError(f"seqs[{i}] is {ids[i]}, {NOT_LIVE}")
        self._batch = content, rows
        return rows

    def _counts(self, counts: int | Sequence[int] | np.ndarray, batch_size: int) -> np.ndarray:
        """counts int64 [batch]."""
        if np.ndim(counts) == 0:
            return np.full(batch_size, spec.as_int(counts, "counts", minimum=0))
        return spec.check_counts(counts, batch_size)

    def _check_length(self, seq: int, row: int, length: int | None) -> int:
        seq_len = int(self._length[row])
        if length is None:
            return seq_len
        length = spec.as_int(length, "length", minimum=0)
        if length > seq_len:
            raise ValueError(
                f"length is {length}, but sequence {seq} has {seq_len} tokens; pass at most {seq_len}, "
                f"or reserve({seq}, ...) more first"
            )
        return length

    def _empty_table(self, max_batch_size: int, max_pages: int) -> PageTable:
        return PageTable.empty(max_batch_size, max_pages, page_size=self._page_size, device=self._device)

    def _table_for(self, batch_size: int, num_pages: int, out: PageTable | None) -> PageTable:
        """The table whose arrays `page_table` writes: `out`, or the cache's own, made larger where it must and may."""
        if out is not None:
            self._check_out(out)
        table = self._table if out is None else out
        rows, pages = table.last_page_len.size, table.indices.size
        if batch_size <= rows and num_pages <= pages:
            return table
        remedy = "make out with PageTable.empty and a larger {}, or pass fewer sequences"
        if out is None:
            remedy = "make the cache with a larger {}, or pass fewer sequences"
            old = rows, pages
            if batch_size > rows and self._max_batch_size is None:
                rows = max(2 * rows, batch_size)
            if num_pages > pages and self._max_pages is None:
                pages = max(2 * pages, num_pages)
            if (rows, pages) != old:
                self._table = self._empty_table(rows, pages)
                self._cut_tables = {}
        for field, what, count, capacity in (
            ("max_batch_size", "sequences", batch_size, rows),
            ("max_pages", "pages", num_pages, pages),
        ):
            if count > capacity:
                raise PageTableError(
                    f"seqs has {count} {what}, more than {field}={capacity} of the table; {remedy.format(field)}",
                    field=field,
                    value=count,
                )
        return self._table

    def _check_out(self, out: PageTable) -> None:
        spec.check_table(out, "out")
        if out.page_offset is not None or out.total_len is not None or out.page_stride != 1:
            raise ValueError(
                f"out has positions of its own (page_offset, total_len or page_stride={out.page_stride}), and a cache "
                f"writes whole sequences; pass a table of PageTable.empty"
            )
        if out.page_size != self._page_size:
            raise ValueError(
                f"out has page_size={out.page_size}, and the cache has page_size={self._page_size}; "
                f"make out with page_size={self._page_size}"
            )
        if out.device != self._device:
            raise TypeError(
                f"out lives on {out.device} and the cache on {self._device}; make out with device={self._device!r}"
            )
