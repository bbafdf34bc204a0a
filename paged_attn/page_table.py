"""PageTable: which pages hold the tokens of each request, and at which positions of their sequences."""

from types import ModuleType
from typing import Any

import numpy as np

from . import backends
from .checks import scalars, tables
from .holders import TABLE_ARRAYS, TableArrays
from .interop import Array, device_of, is_native, is_writable, native, resolve_device
from .lifetimes import loan_of, reading

_INT32 = np.dtype(np.int32)


class PageTable(TableArrays):
    """The pages of a batch of requests. It holds the arrays that it is given, without a copy; attributes are read-only.

    Parameters
    ----------
    indptr: int32 [batch_size + 1]. Request i has the pages indices[indptr[i] : indptr[i + 1]].
    indices: int32 [at least indptr[-1]]. Page ids; entries past indptr[-1] are never read.
    last_page_len: int32 [batch_size]. Tokens in the last page, in [1, page_size] where there is a page.
    page_size: int, tokens a page.
    page_offset: int32 [batch_size]. Page j of request i holds the tokens of its sequence from position
        (page_offset[i] + j * page_stride) * page_size on. Default None: 0, the plain table.
    page_stride: int. Default 1; n for a table that holds every n-th page of a sequence.
    total_len: int32 [batch_size]. The length from which masks count. Default None: seq_lens.

    Arrays are NumPy, CuPy, JAX or others with `__dlpack__`, all on one device. Their values are checked where they are
    used: NumPy arrays before anything is launched, device arrays by the kernels.

    Raises
    ------
    ValueError: ranks, lengths and strides.
    TypeError: dtypes other than int32, and arrays on different devices.
    """

    def __init__(
        self,
        indptr: Array,
        indices: Array,
        last_page_len: Array,
        *,
        page_size: int,
        page_offset: Array | None = None,
        page_stride: int = 1,
        total_len: Array | None = None,
    ) -> None:
        given = dict(zip(TABLE_ARRAYS, (indptr, indices, last_page_len, page_offset, total_len), strict=True))
        arrays = {name: None if array is None else native(array, name) for name, array in given.items()}
        tables.check_table_arrays(**arrays, page_size=page_size, page_stride=page_stride)
        pairs = list(zip(arrays.values(), given.values(), strict=True))
        self._set(
            **arrays,
            page_size=int(page_size),
            page_stride=int(page_stride),
            writable=all(array is None or is_writable(mine, array) for array, mine in pairs),
            loan=loan_of(*pairs),
        )

    @classmethod
    def of_own_arrays(cls, arrays: dict[str, Any], page_size: int, page_stride: int, device: str) -> "PageTable":
        """A table of native arrays that paged_attn has made. Checks would take as long as all the rest."""
        table = cls.__new__(cls)
        vars(table).update(arrays, page_size=page_size, page_stride=page_stride, device=device)
        return table

    @classmethod
    def empty(
        cls,
        max_batch_size: int,
        max_pages: int,
        *,
        page_size: int,
        device: Any = None,
        positions: bool = False,
        page_stride: int = 1,
    ) -> "PageTable":
        """A table of requests without a page, for `out=` of a cache's page_table.

        max_batch_size: int, the rows that it has.
        max_pages: int, the entries of indices: room for the pages of all requests together.
        page_size: int, tokens a page.
        device: "cpu", "cuda", "cuda:1", ... Default None: the current CUDA device where there is one, else the CPU.
        positions: bool, whether it has page_offset and total_len, as a cache of several ranks writes them. Default
            False.
        page_stride: int, num_ranks of that cache. Default 1.
        """
        scalars.as_int(max_batch_size, "max_batch_size", minimum=0)
        scalars.as_int(max_pages, "max_pages", minimum=0)
        scalars.as_int(page_size, "page_size", minimum=1)
        rows = (max_batch_size,) * (3 if scalars.as_bool(positions, "positions") else 1)
        arrays = zip(TABLE_ARRAYS, _zeros(resolve_device(device), max_batch_size + 1, max_pages, *rows), strict=False)
        return cls(**dict(arrays), page_size=page_size, page_stride=page_stride)

    @classmethod
    def from_block_table(cls, block_table: Array, seq_lens: Array, *, page_size: int) -> "PageTable":
        """The table of the dense form, on the device of block_table.

        block_table: int32 [batch, max_pages_per_seq]; row i begins with the page ids of request i, and entries past its
            last page are not read.
        seq_lens: int32 [batch], tokens of each request.
        page_size: int, tokens a page.
        """
        scalars.as_int(page_size, "page_size", minimum=1)
        pages, lengths = native(block_table, "block_table"), native(seq_lens, "seq_lens")
        tables.check_block_table(pages, lengths, page_size)
        batch_size, max_pages_per_seq = pages.shape
        device = device_of(pages)
        arrays = _zeros(device, batch_size + 1, batch_size * max_pages_per_seq, batch_size)
        table = cls(*arrays, page_size=page_size)
        if batch_size:
            with reading(loan_of((pages, block_table), (lengths, seq_lens))):
                backends.of(device).from_block_table(pages, lengths, table.page_size, table)
        return table

    def to_block_table(self, max_pages_per_seq: int) -> Any:
        """The dense form: int32 [batch_size, max_pages_per_seq], -1 where there is no page.

        max_pages_per_seq: int, at least the pages of the longest request.
        """
        scalars.as_int(max_pages_per_seq, "max_pages_per_seq", minimum=0)
        tables.check_table_values(self)
        tables.check_block_width(self, max_pages_per_seq)
        with reading(self.loan):
            return self._backend.to_block_table(self, max_pages_per_seq)

    @property
    def seq_lens(self) -> Any:
        """Tokens that the pages of each request hold, int32 [batch_size], made anew on the table's device."""
        with reading(self.loan):
            return self._backend.seq_lens(self)

    def split(self, num_chunks: int, out: "PageTable | None" = None) -> "PageTable":
        """Cut every sequence into num_chunks runs of pages: one table of num_chunks * batch_size rows.

        Row c * batch_size + i is chunk c of request i, page-aligned and possibly empty, with its page_offset and
        total_len, so that attention over it gives a partial result for merge_states (which takes the sinks, too).
        Nothing is read back.

        num_chunks: int, at least 1.
        out: the table that an earlier split of a batch of this size returned, which is written. Its arrays overlap
            neither each other nor those of this table. Default None: a new one.
        """
        scalars.as_int(num_chunks, "num_chunks", minimum=1)
        tables.check_table_values(self)
        rows = num_chunks * self.batch_size
        if out is None:
            *plain, page_offset, total_len = _zeros(self.device, rows + 1, self.indices.shape[0], rows, rows, rows)
            positions = {"page_offset": page_offset, "page_stride": self.page_stride, "total_len": total_len}
            out = PageTable(*plain, page_size=self.page_size, **positions)
        else:
            tables.check_split_out(out, self, num_chunks)
        out._set(is_split=True)
        if rows:
            with reading(self.loan, out.loan):
                self._backend.split_table(self, num_chunks, out)
        return out

    def slots(self, batch_indices: Array, positions: Array) -> Any:
        """Where tokens are stored: int64 [n], page * page_size + offset, as `append` takes them.

        batch_indices: int32 [n], the request of each token.
        positions: int32 [n], its position in the whole sequence; slot -1 where this table does not hold its page.
        """
        rows, offsets = native(batch_indices, "batch_indices"), native(positions, "positions")
        tables.check_table_values(self)
        tables.check_token_positions(rows, offsets, self)
        upload = self._backend.to_backend
        with reading(self.loan, loan_of((rows, batch_indices), (offsets, positions))):
            return self._backend.table_slots(self, upload(rows, self.device), upload(offsets, self.device))

    def validate(self, num_pages: int) -> "Validation":
        """Check every value against a pool: a host table at once, a device table by a kernel.

        num_pages: int, the pages of the pool.

        Nothing waits for the device, so that a CUDA graph can hold it; Validation.raise_if_bad does.
        """
        scalars.as_int(num_pages, "num_pages", minimum=0)
        with reading(self.loan):
            return Validation(self._backend, self._backend.check_table(self, num_pages))

    @property
    def _backend(self) -> ModuleType:
        return backends.of(self.device)

    def __repr__(self) -> str:
        if not is_native(self.indptr):  # a leaf without memory
            return f"PageTable(indptr={self.indptr!r}, indices={self.indices!r}, page_size={self.page_size})"
        return (
            f"PageTable(batch_size={self.batch_size}, max_pages={self.indices.shape[0]}, page_size={self.page_size}, "
            f"{'' if self.page_stride == 1 else f'page_stride={self.page_stride}, '}"
            f"{'is_split=True, ' if self.is_split else ''}device={self.device!r})"
        )


class Validation:
    """What PageTable.validate found; in a CUDA graph, what it found at the last replay."""

    __slots__ = ("_backend", "_word")

    def __init__(self, backend: ModuleType, word: Any) -> None:
        self._backend, self._word = backend, word

    def raise_if_bad(self) -> None:
        """PageTableError (field, index, value) if the table held a fault. Waits for the device."""
        self._backend.raise_word(self._word)


def _zeros(device: str, *lengths: int) -> tuple[Any, ...]:
    backend = backends.of(device)
    return tuple(backend.zeros((length,), _INT32, device) for length in lengths)
