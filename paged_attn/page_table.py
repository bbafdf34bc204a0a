"""Which pages hold the tokens of each request: three int32 arrays, and where the pages stand in their sequences."""

from types import ModuleType
from typing import Any

import numpy as np

from . import backends
from .checks import scalars, tables
from .frozen import Frozen, set_once
from .interop import device_of, is_writable, native, resolve_device
from .lifetimes import Loan, loan_of, reading

_INT32 = np.dtype(np.int32)


class PageTable(Frozen):
    """The pages of a batch of requests. It holds the arrays that it is given, without a copy; attributes are read-only.

    Parameters
    ----------
    indptr: int32 [batch_size + 1]. Request i has the pages indices[indptr[i] : indptr[i + 1]].
    indices: int32 [at least indptr[-1]]. Page ids; what stands past indptr[-1] is never read.
    last_page_len: int32 [batch_size]. Tokens in the last page, in [1, page_size] where there is a page.
    page_size: tokens a page.
    page_offset: None or int32 [batch_size]. Page j of request i holds the tokens of its sequence from position
        (page_offset[i] + j * page_stride) * page_size on; None is 0, the plain table.
    page_stride: 1, or n for a table that holds every n-th page of a sequence.
    total_len: None or int32 [batch_size]. The length from which masks count; None is seq_lens.

    Arrays are NumPy, CuPy, JAX or others with `__dlpack__`, all on one device. Their values are checked where they are
    used: NumPy arrays before anything is launched, device arrays by the kernels.

    Raises
    ------
    ValueError: ranks, lengths and strides.
    TypeError: dtypes other than int32, and arrays on different devices.
    """

    indptr: Any
    indices: Any
    last_page_len: Any
    page_size: int
    page_offset: Any
    page_stride: int
    total_len: Any
    batch_size: int
    device: str
    loan: Loan | None
    writable: bool  # whether a cache, or split, may write it as its `out`
    __slots__ = (
        "batch_size",
        "device",
        "indices",
        "indptr",
        "last_page_len",
        "loan",
        "page_offset",
        "page_size",
        "page_stride",
        "total_len",
        "writable",
    )

    def __init__(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        *,
        page_size: int,
        page_offset: Any = None,
        page_stride: int = 1,
        total_len: Any = None,
    ) -> None:
        given = indptr, indices, last_page_len, page_offset, total_len
        indptr, indices = native(indptr, "indptr"), native(indices, "indices")
        last_page_len = native(last_page_len, "last_page_len")
        page_offset = None if page_offset is None else native(page_offset, "page_offset")
        total_len = None if total_len is None else native(total_len, "total_len")
        tables.check_table_arrays(indptr, indices, last_page_len, page_size, page_offset, page_stride, total_len)
        # What keeps arrays that came by DLPack until the kernels that read them are over.
        loan = loan_of(*zip((indptr, indices, last_page_len, page_offset, total_len), given, strict=True))
        self._set(indptr, indices, last_page_len, int(page_size), device_of(indptr))
        set_once(self, "page_offset", page_offset)
        set_once(self, "page_stride", int(page_stride))
        set_once(self, "total_len", total_len)
        set_once(self, "loan", loan)
        arrays = zip(given, (indptr, indices, last_page_len, page_offset, total_len), strict=True)
        set_once(self, "writable", all(array is None or is_writable(mine, array) for mine, array in arrays))

    def _set(self, indptr: Any, indices: Any, last_page_len: Any, page_size: int, device: str) -> None:
        """All attributes, those of a plain table, of native arrays that are right."""
        set_once(self, "indptr", indptr)
        set_once(self, "indices", indices)
        set_once(self, "last_page_len", last_page_len)
        set_once(self, "page_size", page_size)
        set_once(self, "page_offset", None)
        set_once(self, "page_stride", 1)
        set_once(self, "total_len", None)
        set_once(self, "batch_size", last_page_len.shape[0])
        set_once(self, "device", device)
        set_once(self, "loan", None)
        set_once(self, "writable", True)

    @classmethod
    def empty(cls, max_batch_size: int, max_pages: int, *, page_size: int, device: Any = None) -> "PageTable":
        """A table of max_batch_size requests without a page, with room for max_pages: for `out=`.

        device: None is the current CUDA device where CuPy sees one, else the CPU.
        """
        scalars.as_int(max_batch_size, "max_batch_size", minimum=0)
        scalars.as_int(max_pages, "max_pages", minimum=0)
        scalars.as_int(page_size, "page_size", minimum=1)
        return cls(*_zeros(resolve_device(device), max_batch_size + 1, max_pages, max_batch_size), page_size=page_size)

    @classmethod
    def from_block_table(cls, block_table: Any, seq_lens: Any, *, page_size: int) -> "PageTable":
        """The table of the dense form: block_table int32 [batch, max_pages_per_seq], seq_lens int32 [batch].

        Row i begins with the page ids of request i; what stands past its last page is not read.
        """
        scalars.as_int(page_size, "page_size", minimum=1)
        given = block_table, seq_lens
        block_table, seq_lens = native(block_table, "block_table"), native(seq_lens, "seq_lens")
        tables.check_block_table(block_table, seq_lens, page_size)
        batch_size, max_pages_per_seq = block_table.shape
        device = device_of(block_table)
        arrays = _zeros(device, batch_size + 1, batch_size * max_pages_per_seq, batch_size)
        table = cls(*arrays, page_size=page_size)
        if batch_size:
            with reading(loan_of((block_table, given[0]), (seq_lens, given[1]))):
                backends.of(device).from_block_table(block_table, seq_lens, table.page_size, table)
        return table

    def to_block_table(self, max_pages_per_seq: int) -> Any:
        """The dense form: int32 [batch_size, max_pages_per_seq], -1 where there is no page."""
        scalars.as_int(max_pages_per_seq, "max_pages_per_seq", minimum=0)
        tables.check_table_values(self, None)
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
        total_len, so that attention over it gives a partial result for merge_states. Nothing is read back.

        out: the table that an earlier split of a batch of this size returned; written instead of a new one. Its arrays
            overlap neither each other nor those of this table.
        """
        scalars.as_int(num_chunks, "num_chunks", minimum=1)
        tables.check_table_values(self, None)
        rows = num_chunks * self.batch_size
        if out is None:
            indptr, indices, last_page_len, page_offset, total_len = _zeros(
                self.device, rows + 1, self.indices.shape[0], rows, rows, rows
            )
            out = PageTable(
                indptr,
                indices,
                last_page_len,
                page_size=self.page_size,
                page_offset=page_offset,
                page_stride=self.page_stride,
                total_len=total_len,
            )
        else:
            tables.check_split_out(out, self, num_chunks)
        if rows:
            with reading(self.loan, out.loan):
                self._backend.split_table(self, num_chunks, out)
        return out

    def slots(self, batch_indices: Any, positions: Any) -> Any:
        """Where tokens are stored: int64 [n], page * page_size + offset, as `append` takes them.

        Parameters
        ----------
        batch_indices: int32 [n]. The request of each token.
        positions: int32 [n]. Its position in the whole sequence; slot -1 where this table does not hold its page.
        """
        given = batch_indices, positions
        batch_indices, positions = native(batch_indices, "batch_indices"), native(positions, "positions")
        tables.check_table_values(self, None)
        tables.check_token_places(batch_indices, positions, self)
        upload = self._backend.to_backend
        with reading(self.loan, loan_of((batch_indices, given[0]), (positions, given[1]))):
            return self._backend.table_slots(self, upload(batch_indices, self.device), upload(positions, self.device))

    def validate(self, num_pages: int) -> "Validation":
        """Check every value against a pool of num_pages pages: a host table at once, a device table by a kernel.

        Nothing waits for the device, so that a CUDA graph can hold it; Validation.raise_if_bad does.
        """
        scalars.as_int(num_pages, "num_pages", minimum=0)
        with reading(self.loan):
            return Validation(self._backend, self._backend.check_table(self, num_pages))

    @property
    def _backend(self) -> ModuleType:
        return backends.of(self.device)

    def __repr__(self) -> str:
        return f"PageTable(batch_size={self.batch_size}, page_size={self.page_size}, device={self.device!r})"


def table_of_own_arrays(indptr: Any, indices: Any, last_page_len: Any, page_size: int, device: str) -> PageTable:
    """A plain table of native arrays that paged_attn has made itself. Checks would take as long as all the rest."""
    table = PageTable.__new__(PageTable)
    table._set(indptr, indices, last_page_len, page_size, device)
    return table


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
