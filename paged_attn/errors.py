"""The errors of paged_attn, and the codes by which a kernel names the field that was wrong."""

_RULES = {
    "indptr": "indptr does not decrease and stays within [0, len(indices)]",
    "indices": "page ids lie in [0, num_pages)",
    "last_page_len": "a request that has pages has 1 <= last_page_len <= page_size",
    "page_offset": "page_offset is not negative, and positions stay below 2**31",
    "total_len": "total_len is not negative",
    "qo_indptr": "qo_indptr starts at 0, does not decrease and ends at the number of rows of q",
    "slots": "slots lie in [0, num_pages * page_size), or are -1 to skip a token",
    "batch_indices": "batch_indices lie in [0, batch_size)",
    "positions": "positions are not negative",
    "max_pages": "all requests together have at most max_pages pages",
    "max_batch_size": "a batch has at most max_batch_size requests",
    "seq_lens": "seq_lens lie in [0, max_pages_per_seq * page_size]",
    "block_table": "a block table holds a page id >= 0 for each page of a sequence",
}
FAULT_FIELDS = ("none", *_RULES)
"""Index in this tuple == code in a status word == value of `enum FaultField` in kernels/page_table.cuh."""


class LayoutMismatchError(ValueError):
    """Two parties disagree about the layout, the page size or the head count of one pool."""


class PageTableError(ValueError):
    """A page table, `qo_indptr` or slot holds a value that it must not hold.

    Attributes
    ----------
    field: name of the array (one of FAULT_FIELDS), or None.
    index: the request or the entry of that array, or None.
    value: the value of that entry, or None.
    """

    def __init__(
        self, message: str, *, field: str | None = None, index: int | None = None, value: int | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.index, self.value = field, index, value


class OutOfPagesError(ValueError):
    """The pool has fewer free pages than a call wants. Nothing has changed: free or preempt a sequence and retry.

    Attributes
    ----------
    wanted: pages that the call needed.
    free: pages that were free.
    """

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(
            f"the call wants {wanted} pages and {free} are free; free or truncate a sequence and call again, "
            f"or make the cache with a larger num_pages"
        )
        self.wanted, self.free = wanted, free

    def __reduce__(self) -> tuple[type["OutOfPagesError"], tuple[int, int]]:
        return type(self), (self.wanted, self.free)


def fault_error(field_code: int, index: int, value: int) -> PageTableError:
    """The error for a fault that a kernel (or the reference backend) recorded: field, request or entry, value."""
    if not 0 < field_code < len(FAULT_FIELDS):
        raise ValueError(f"field_code is {field_code}, which is no fault code; codes are 1..{len(FAULT_FIELDS) - 1}")
    field = FAULT_FIELDS[field_code]
    entry, remedy = f"{field}[{index}]", f"correct {field} at {index}; its row was made without what is wrong"
    if field.startswith("max_"):
        entry, remedy = f"{field} of the call", f"make the plan, or the table that was written, with a larger {field}"
    elif field == "slots":
        remedy = "correct the slots; the token was not written"
    return PageTableError(f"{entry} is {value}, but {_RULES[field]}; {remedy}", field=field, index=index, value=value)
