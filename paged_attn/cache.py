"""PagedKVCache: who owns which page, on the host, in NumPy, for all sequences of a batch at once.

A sequence is a row: its length in tokens, and a list of page ids. The sequences that hold a page are counted, because
forks share pages. On the device is only what the kernels read: the pages, and a copy of all page lists, from which page
tables are made.

Each of several ranks has the lengths, lists and counts of all, and the memory of its own pages alone. What a call does
depends on pages of other ranks (is one shared, is one left), and every rank is told all that the others are told, so
that it need not ask. Pages are numbered through all ranks, beginning with this one: a page below num_pages, or a slot
below num_pages * page_size, is here, and any other is not.

A call that fails changes nothing. Whatever may raise (checks, allocations, copies of pages, uploads, a kernel's first
compilation) comes first and works on what no sequence holds: pages that are still free, entries behind the end of a
list. Then the call commits, by assignments alone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import backends, interop
from .append import append
from .checks import scalars, sequences, tables, tokens
from .interop import Array
from .layout import Layout, as_layout
from .lifetimes import loan_of, reading
from .page_lists import PageLists, resized
from .page_pool import PagePool, share
from .page_table import PageTable
from .paged_kv import PagedKV
from .ragged import ranges
from .support import supports

# A sequence id is (generation << ROW_BITS) | row: a row that is used again gives another id, so a freed id stays freed.
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
NOT_LIVE = (
    "which is no sequence of this cache: it was freed, or it came from elsewhere; "
    "pass an id that new_sequence() or fork() returned and free() has not ended"
)


_Method = TypeVar("_Method", bound=Callable[..., Any])

_NONE = np.zeros(0, np.int64)


class _Reservation(NamedTuple):
    """What `reserve` gives to a batch, prepared and not yet theirs."""

    slots: Any  # int64 [tokens] on the device
    rows: np.ndarray  # [batch]
    longer: np.ndarray  # [batch] their new lengths
    pages: np.ndarray = _NONE  # all that are taken: those that lists grow by, then `copies`
    rows_growing: np.ndarray = _NONE
    added: np.ndarray = _NONE  # pages that each of rows_growing grows by
    staged: np.ndarray = _NONE  # the indices of those in the lists
    rows_copying: np.ndarray = _NONE  # whose last page gives way to a copy
    copied: np.ndarray = _NONE  # that page of each
    copies: np.ndarray = _NONE


def _one_thread_at_a_time(method: _Method) -> _Method:
    """A call while another one is under way, in another thread or from a finaliser, is a RuntimeError."""

    @functools.wraps(method)
    def call(cache: PagedKVCache, *arguments: Any, **options: Any) -> Any:
        if not cache._in_use.acquire(blocking=False):
            raise RuntimeError(
                f"{method.__name__}() was called while another call of this cache is under way, in another thread or "
                f"in what a finaliser interrupted, and a cache serves one thread at a time; put a lock around its "
                f"calls, or make them in one thread"
            )
        try:
            return method(cache, *arguments, **options)
        finally:
            cache._in_use.release()

    return call  # type: ignore[return-value]


class PagedKVCache:
    """Pages of K and V for many sequences and layers, with sharing of prefixes by copy-on-write.

    Parameters
    ----------
    num_pages, page_size, num_kv_heads, head_dim: ints, the extents of every layer's pool; page_size counts tokens.
    layout: Layout or "NHD" or "HND"; it has no default.
    dtype: what K and V are stored in, "float16", "bfloat16", "float32", "float64" or such a NumPy dtype; no default.
    v_head_dim: int, the last axis of V. Default None: head_dim.
    num_layers: int, layers that share the page lists; a page id means the same page in each of them. Default 1.
    device: "cpu", "cuda", "cuda:1", ... Default None: the current CUDA device where there is one, else the CPU.
    rank: int in [0, num_ranks), which pages of a sequence this cache stores. Default 0.
    num_ranks: int, the caches that share the sequences. Default 1: this one stores every page.

    A sequence is the int that `new_sequence` or `fork` returned. A batch of them, `seqs`, is a list of such ints or an
    integer array [batch], without repetition. One that was freed, or is none of this cache, is a ValueError.

    Whatever a call raises (OutOfPagesError, an out-of-memory of the device, anything), every sequence is as it was
    before that call. All work for the device goes on its current stream: use one stream for a cache, or order those
    that you use. A cache serves one thread at a time; a call while another thread is in one is a RuntimeError.

    With several ranks each has a cache, made with the same arguments but for `rank` and `device`, and gets the same
    calls in the same order, with all new tokens. Page j of a sequence is stored on rank (j + first) % num_ranks, where
    `first` goes round by new_sequence(), and a fork has its parent's. Of the P = ceil(L / page_size) pages of a context
    of L tokens a rank stores P // num_ranks, or one more. Ids, lengths, free and shared pages, and OutOfPagesError are
    the same on every rank; slots and page tables are of one. A call that raises on some ranks alone, as for want of a
    device's memory, must be made again there before the next one.

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
        v_head_dim: int | None = None,
        num_layers: int = 1,
        device: Any = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        num_pages, page_size, num_kv_heads, head_dim, v_head_dim, num_layers, num_ranks = (
            scalars.as_int(value, name, minimum=1)
            for value, name in (
                (num_pages, "num_pages"),
                (page_size, "page_size"),
                (num_kv_heads, "num_kv_heads"),
                (head_dim, "head_dim"),
                (head_dim if v_head_dim is None else v_head_dim, "v_head_dim"),
                (num_layers, "num_layers"),
                (num_ranks, "num_ranks"),
            )
        )
        rank = scalars.as_index(rank, "rank", num_ranks)
        scalars.as_int(num_pages * num_ranks, "num_pages * num_ranks", minimum=1)  # page ids are int32
        layout, dtype = as_layout(layout), interop.as_dtype(dtype)
        self._device = interop.resolve_device(device)
        self._backend = backends.of(self._device)
        support = supports("append", device=self._device, dtype=dtype, head_dim=head_dim, v_head_dim=v_head_dim)
        if not support:
            raise NotImplementedError(support.reason)
        rows = (page_size, num_kv_heads) if layout is Layout.NHD else (num_kv_heads, page_size)
        k_size, v_size = page_size * num_kv_heads * head_dim, page_size * num_kv_heads * v_head_dim
        self._storage = self._backend.zeros((num_layers, num_pages, k_size + v_size), dtype, self._device)
        self._layers = tuple(
            PagedKV(
                pages[:, :k_size].reshape(num_pages, *rows, head_dim),
                pages[:, k_size:].reshape(num_pages, *rows, v_head_dim),
                layout=layout,
            )
            for pages in (self._storage[i] for i in range(num_layers))
        )
        self._num_pages, self._page_size, self._num_ranks = num_pages, page_size, num_ranks

        self._pool = PagePool(num_pages, num_ranks)
        self._lists = PageLists(self._backend, self._device)
        self._length = np.zeros(0, np.int64)  # [rows] tokens, reserved ones included
        self._first_rank = np.zeros(0, np.int64)  # [rows] the rank of the first page, counted from this rank
        self._next_first_rank = -rank % num_ranks  # of the sequence that begins next
        self._live_id = np.zeros(0, np.int64)  # [rows] the id of the sequence in this row, -1 where there is none
        self._unused_ids: list[int] = []  # the ids that free rows give next; the last comes first
        self._batch: tuple[bytes, np.ndarray] | None = None  # the last ids that passed the checks, and their rows
        self._set_num_rows(16)
        self._in_use = threading.Lock()  # held by the call that a thread is in

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({len(self._layers)} x {self._layers[0]}: {np.count_nonzero(self._live_id >= 0)} sequences, "
            f"{self.num_free_pages} pages free)"
        )

    @property
    def layers(self) -> tuple[PagedKV, ...]:
        """One PagedKV a layer, always the same objects: views of one [num_layers, num_pages, K and V of a page]."""
        return self._layers

    @property
    def num_pages(self) -> int:
        """Pages of this rank."""
        return self._num_pages

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self._page_size

    @property
    def num_ranks(self) -> int:
        """Caches that share the sequences; the page_stride of their tables."""
        return self._num_ranks

    @property
    def num_free_pages(self) -> int:
        """Free pages of the rank that has the fewest.

        They are enough for sequences that get p, q, ... pages (new ones and copies) if ceil(p / num_ranks) +
        ceil(q / num_ranks) + ... is no more.
        """
        return min(self._pool.num_free)

    @property
    def num_shared_pages(self) -> int:
        """Pages of all ranks that more than one sequence holds."""
        return self._pool.num_shared

    @property
    def device(self) -> str:
        return self._device

    def seq_len(self, seq: int) -> int:
        """Tokens of a sequence, reserved ones included. It holds ceil(seq_len / page_size) pages of all ranks.

        seq: int, the sequence.
        """
        return int(self._length[self._row(seq)])

    @_one_thread_at_a_time
    def new_sequence(self) -> int:
        """The id of a new, empty sequence. It holds no page."""
        seq = self._next_id()
        self._begin(seq, 0, self._next_first_rank)
        self._next_first_rank = (self._next_first_rank + 1) % self._num_ranks
        return seq

    @_one_thread_at_a_time
    def fork(self, seq: int, length: int | None = None) -> int:
        """A new sequence that begins with the first tokens of another one and shares their pages.

        seq: int, the other one.
        length: int in [0, seq_len(seq)], how many tokens. Default None: all.

        It takes no page; the first write into a partly filled page that is shared takes a copy of it.
        Tokens of `seq` that are reserved must have been written (in every layer) before either side reserves again.
        """
        row = self._row(seq)
        length = self._check_length(seq, row, length)
        pages = self._lists.pages(row, 0, self._pages_for(length)).copy()
        forked = self._next_id()
        rows, counts = np.array([forked & ROW_MASK]), np.array([pages.size])
        entries = self._lists.stage(rows, counts, pages)

        self._pool.hold(pages)
        self._lists.commit(rows, counts, entries)
        self._begin(forked, length, self._first_rank[row])
        return forked

    @_one_thread_at_a_time
    def truncate(self, seq: int, length: int) -> None:
        """Drop the last tokens of a sequence, and the pages that only they needed.

        seq: int, the sequence.
        length: int in [0, seq_len(seq)], the tokens that stay.
        """
        row = self._row(seq)
        length = self._check_length(seq, row, length)
        kept = self._pages_for(length)
        dropped = self._lists.pages(row, kept).copy()
        self._length[row] = length
        self._lists.count[row] = kept
        self._pool.release(dropped)

    @_one_thread_at_a_time
    def free(self, seq: int) -> None:
        """End a sequence: pages that no other one holds become free, and the id is refused from now on.

        seq: int, the sequence.
        """
        row = self._row(seq)
        pages = self._lists.pages(row).copy()
        self._batch = None
        self._live_id[row] = -1
        self._length[row] = 0
        self._lists.count[row] = 0
        self._pool.release(pages)
        self._unused_ids.append(int(seq) + (1 << ROW_BITS))

    @_one_thread_at_a_time
    def reserve(self, seqs: Sequence[int] | np.ndarray, counts: int | Sequence[int] | np.ndarray) -> Any:
        """Make sequences longer: slots int64 [sum(counts)] on the cache's device, the tokens of seqs[0] first.

        The slots are for `write` in every layer; slot = page * page_size + offset, or -1 for a token of another rank.

        seqs: ints [batch], the sequences, without repetition.
        counts: int or ints [batch], the tokens that each sequence gets.

        It takes pages as needed. A sequence whose last page is partly filled and shared gets a copy of it (all layers);
        where all sequences that share it are in the batch, the longest of them (of several, the last) keeps the
        original.
        OutOfPagesError (with .wanted and .free) if the pool cannot give that many pages; with several ranks it is about
        the one that lacks the most, and the same on each.
        """
        rows = self._rows(seqs)
        reserved = self._prepare(rows, self._counts(counts, rows.size))
        self._commit(reserved)
        return reserved.slots

    @_one_thread_at_a_time
    def write(self, slots: Array, k: Array, v: Array, layer: int = 0) -> None:
        """Write new tokens into one layer.

        slots: int64 or int32 [tokens], as `reserve` returns them; -1 skips the token, which is another rank's.
        k: [tokens, num_kv_heads, head_dim], of the cache's dtype and on its device.
        v: [tokens, num_kv_heads, v_head_dim].
        layer: int in [0, num_layers). Default 0.
        """
        layer = scalars.as_index(layer, "layer", len(self._layers))
        append(self._layers[layer], slots, k, v)

    @_one_thread_at_a_time
    def append(
        self, seqs: Sequence[int] | np.ndarray, counts: int | Sequence[int] | np.ndarray, k: Array, v: Array
    ) -> None:
        """`reserve` and `write` in one, for a cache of one layer.

        seqs: ints [batch], the sequences, without repetition.
        counts: int or ints [batch], the tokens that each sequence gets.
        k: [sum(counts), num_kv_heads, head_dim], of the cache's dtype and on its device.
        v: [sum(counts), num_kv_heads, v_head_dim].

        Errors are those of `reserve` and `write`.
        """
        if len(self._layers) != 1:
            raise ValueError(
                f"append() is for a cache of one layer, and this one has num_layers={len(self._layers)}; "
                "call reserve(seqs, counts) once and write(slots, k, v, layer=i) for every layer"
            )
        rows = self._rows(seqs)
        counts = self._counts(counts, rows.size)
        native_k, native_v = interop.native(k, "k"), interop.native(v, "v")
        tokens.check_new_tokens(self._layers[0], native_k, native_v, int(counts.sum()))
        reserved = self._prepare(rows, counts)
        with reading(loan_of((native_k, k), (native_v, v))):
            append(self._layers[0], reserved.slots, native_k, native_v)  # into slots that hold no token yet
        self._commit(reserved)

    @_one_thread_at_a_time
    def page_table(self, seqs: Sequence[int] | np.ndarray, out: PageTable | None = None) -> PageTable:
        """The page table of a batch of sequences, reserved tokens included; row i is seqs[i].

        seqs: ints [batch], the sequences, without repetition.
        out: a table of PageTable.empty that is written; the lengths of its arrays are its capacity, and their addresses
            and shapes the same in every step. Default None: a table in new arrays, on the cache's device.

        With `out` a view of its first len(seqs) rows is returned; `out` itself, whose rows past the batch are then
        empty, is what a CUDA graph plans. Entries of `indices` from indptr[-1] on mean nothing. PageTableError if the
        batch has more rows or pages than `out` has room for.

        With several ranks it has the pages of this one, with page_offset, page_stride=num_ranks and total_len=seq_len;
        an `out` must then be made by PageTable.empty(..., positions=True, page_stride=num_ranks), else ValueError.
        """
        rows = self._rows(seqs)
        num_pages, per_row = self._rows_of_table(rows, getattr(out, "page_offset", None) is not None)
        indptr = np.zeros(rows.size + 1, np.int64)
        num_pages.cumsum(out=indptr[1:])
        if out is None:
            table = self._new_table(rows.size, int(indptr[-1]), per_row)
            self._lists.write_table(rows, indptr, per_row, table)
            return table
        tables.check_table_out(out, self._page_size, self._num_ranks, self._device, rows.size, int(indptr[-1]))
        self._lists.write_table(rows, indptr, per_row, out)
        first_rows = {name: getattr(out, name)[: rows.size] for name in per_row}
        return self._table_of({"indptr": out.indptr[: rows.size + 1], "indices": out.indices, **first_rows})

    def _rows_of_table(self, rows: np.ndarray, with_positions: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The pages of this rank that some sequences have, int64 [batch], and what a table says of each."""
        length, num_pages = self._length[rows], self._lists.count[rows]
        if self._num_ranks == 1 and not with_positions:  # the quick way to the same
            last_page_len = np.minimum(length - (num_pages - 1) * self._page_size, length)  # 0 where there is no page
            return num_pages, {"last_page_len": last_page_len}
        page_offset = -self._first_rank[rows] % self._num_ranks
        num_pages = share(num_pages, page_offset, self._num_ranks)
        last = page_offset + (num_pages - 1) * self._num_ranks
        last_page_len = np.minimum(length - last * self._page_size, self._page_size) * (num_pages > 0)
        return num_pages, {"last_page_len": last_page_len, "page_offset": page_offset, "total_len": length}

    def _new_table(self, batch_size: int, num_pages: int, names: Collection[str]) -> PageTable:
        """A table of this size, whose arrays hold nothing yet; they are parts of one, which takes one allocation."""
        begin = batch_size + 1
        memory = self._backend.empty((begin + len(names) * batch_size + num_pages,), np.dtype(np.int32), self._device)
        arrays = {"indptr": memory[:begin]}
        for name in names:
            arrays[name] = memory[begin : begin + batch_size]
            begin += batch_size
        arrays["indices"] = memory[begin:]
        return self._table_of(arrays)

    def _table_of(self, arrays: dict[str, Any]) -> PageTable:
        return PageTable.of_own_arrays(arrays, self._page_size, self._num_ranks, self._device)

    def _prepare(self, rows: np.ndarray, counts: np.ndarray) -> _Reservation:
        """All of a reservation that may raise. It takes free pages, and writes entries of no list."""
        lists, page_size = self._lists, self._page_size
        length, held = self._length[rows], lists.count[rows]
        longer = length + counts
        added = self._pages_for(longer) - held
        (growing,) = added.nonzero()
        page = lists.last_pages(rows)
        copying = self._copying(length, counts, page)
        copied = page[copying]
        pages = copied
        if growing.size or copying.size:
            growth = rows[growing], added[growing]
            first_rank = self._first_rank[growth[0]] + held[growing]  # of the first new page
            pages = self._pool.next_free(first_rank, growth[1], copied)
        new_pages, copies = pages[: pages.size - copying.size], pages[pages.size - copying.size :]
        upload = self._backend.uploader(self._device)  # raises in a graph's capture

        # A new token goes into the last page that its sequence has, into the copy of it, or into one of the new pages.
        page[copying] = copies
        position = ranges(length, counts)
        number = position // page_size  # of the token's page in its sequence
        if np.count_nonzero(counts == 1) == counts.size:  # a decode step: the quick way to the same
            page[growing] = new_pages
        else:
            row = np.repeat(np.arange(rows.size), counts)
            new = number - held[row]  # of those that the sequence gets, below 0: none
            first = added.cumsum() - added
            page = page[row]
            page[new >= 0] = new_pages[(first[row] + new)[new >= 0]]
        slots = (page - number) * page_size + position
        if self._num_ranks > 1:
            slots[slots >= self._num_pages * page_size] = -1
        slots = upload(slots)
        if not pages.size:
            return _Reservation(slots, rows, longer)
        if copying.size and (here := copied < self._num_pages).any():
            self._backend.copy_pages(self._storage, copied[here], copies[here])
        staged = lists.stage(*growth, new_pages)  # last: it may enlarge the arena
        return _Reservation(slots, rows, longer, pages, *growth, staged, rows[copying], copied, copies)

    def _commit(self, reserved: _Reservation) -> None:
        """The sequences have what was prepared for them. Nothing here raises.

        An interrupt may come between two steps. Pages are taken before, and given back after, everything else, so that
        it can lose some, but two sequences never hold one that they do not share.
        """
        if reserved.pages.size:
            self._pool.take(reserved.pages)
        if reserved.copies.size:
            self._lists.replace_last_pages(reserved.rows_copying, reserved.copies)
        if reserved.staged.size:
            self._lists.commit(reserved.rows_growing, reserved.added, reserved.staged)
        self._length[reserved.rows] = reserved.longer
        if reserved.copies.size:
            self._pool.release_copied(reserved.copied)

    def _copying(self, length: np.ndarray, counts: np.ndarray, last_pages: np.ndarray) -> np.ndarray:
        """Of sequences `length` tokens long, which get `counts` more, those that must first copy their last page: the
        indices in the batch."""
        if not self._pool.is_any_shared:
            return _NONE
        (writers,) = ((counts > 0) & (length % self._page_size > 0)).nonzero()
        return writers[self._pool.must_copy(last_pages[writers], length[writers])]

    def _set_num_rows(self, num_rows: int) -> None:
        """Makes room for more sequences; the rows so far stay."""
        old = self._length.size
        self._lists.set_num_rows(num_rows)
        length, first_rank, live_id = (resized(x, num_rows) for x in (self._length, self._first_rank, self._live_id))
        live_id[old:] = -1
        self._unused_ids += range(num_rows - 1, old - 1, -1)
        self._length, self._first_rank, self._live_id = length, first_rank, live_id

    def _next_id(self) -> int:
        """The id that the next sequence gets; there is a row for it."""
        if not self._unused_ids:
            self._set_num_rows(2 * self._length.size)
        return self._unused_ids[-1]

    def _begin(self, seq: int, length: int, first_rank: int) -> None:
        """`seq`, the next id, is a sequence from now on."""
        row = seq & ROW_MASK
        self._length[row], self._first_rank[row], self._live_id[row] = length, first_rank, seq
        self._unused_ids.pop()

    def _pages_for(self, length: Any) -> Any:
        return (length + (self._page_size - 1)) // self._page_size

    def _row(self, seq: int) -> int:
        """The row of a live sequence."""
        seq = scalars.as_int(seq, "seq", minimum=0, maximum=2**63 - 1)
        row = seq & ROW_MASK
        if row >= self._live_id.size or self._live_id[row] != seq:
            raise ValueError(f"seq is {seq}, {NOT_LIVE}")
        return row

    def _rows(self, seqs: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows int64 [batch] of live, distinct sequences."""
        ids = sequences.int_vector(seqs, "seqs")
        content = ids.tobytes()
        if self._batch is not None and self._batch[0] == content:  # ids stay live until free()
            return self._batch[1]
        sequences.check_distinct(ids)
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
            return np.full(batch_size, scalars.as_int(counts, "counts", minimum=0))
        return sequences.check_counts(counts, batch_size)

    def _check_length(self, seq: int, row: int, length: int | None) -> int:
        seq_len = int(self._length[row])
        if length is None:
            return seq_len
        length = scalars.as_int(length, "length", minimum=0)
        if length > seq_len:
            raise ValueError(
                f"length is {length}, but sequence {seq} has {seq_len} tokens; pass at most {seq_len}, "
                f"or reserve({seq}, ...) more first"
            )
        return length
