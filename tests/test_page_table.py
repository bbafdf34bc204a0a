"""PageTable: lengths, positions, splits, slots and block tables, against a model in plain Python."""

import copy
import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import paged_attn as pa
from paged_attn.errors import FAULT_FIELDS, fault_error

PAGE_SIZE = 4
SEQ_LENS = (9, 0, 1, 4, 23, 0)
NUM_PAGES = 40


def int32(xp, values) -> np.ndarray:
    return xp.asarray(np.array(values, np.int32))


def to_numpy(array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def ragged(xp, *, page_offset=None, page_stride=1, total_len=None, spare: int = 5, first: int = 0) -> pa.PageTable:
    """Requests of SEQ_LENS tokens in shuffled pages; impossible ids before and behind the pages that are used."""
    counts = [-(-length // PAGE_SIZE) for length in SEQ_LENS]
    pairs = zip(SEQ_LENS, counts, strict=True)
    pages = np.random.default_rng(1).permutation(NUM_PAGES)[: sum(counts)]
    return pa.PageTable(
        int32(xp, first + np.concatenate([[0], np.cumsum(counts)])),
        int32(xp, [-77] * first + pages.tolist() + [12345] * spare),
        int32(xp, [length - (count - 1) * PAGE_SIZE if count else 0 for length, count in pairs]),
        page_size=PAGE_SIZE,
        page_offset=None if page_offset is None else int32(xp, page_offset),
        page_stride=page_stride,
        total_len=None if total_len is None else int32(xp, total_len),
    )


def test_a_table_is_frozen(xp) -> None:
    table = ragged(xp, page_offset=[0] * 6, total_len=SEQ_LENS)
    before = {name: getattr(table, name) for name in (*vars(table), "batch_size", "device")}
    for name in before:
        with pytest.raises(AttributeError, match=rf"PageTable\.{name} cannot be assigned: .*make another PageTable"):
            setattr(table, name, table.indices[:1])
    assert all(getattr(table, name) is value for name, value in before.items())


def test_a_table_can_be_copied() -> None:
    table = ragged(np, page_stride=2)
    for other in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert pages_of(other) == pages_of(table)
        assert (other.page_size, other.page_stride, other.total_len) == (PAGE_SIZE, 2, None)


def pages_of(table: pa.PageTable) -> list[list[int]]:
    indptr, indices = to_numpy(table.indptr), to_numpy(table.indices)
    return [indices[begin:end].tolist() for begin, end in pairwise(indptr)]


def tokens_of(table: pa.PageTable) -> list[dict[int, int]]:
    """For each request: position in the sequence -> slot in the pool, token by token, by the words of the docstring."""
    offsets = np.zeros(table.batch_size, int) if table.page_offset is None else to_numpy(table.page_offset)
    last_page_len = to_numpy(table.last_page_len)
    requests = []
    for i, pages in enumerate(pages_of(table)):
        places = {}
        for j, page in enumerate(pages):
            tokens = last_page_len[i] if j == len(pages) - 1 else table.page_size
            first = (offsets[i] + j * table.page_stride) * table.page_size
            places |= {int(first + t): page * table.page_size + t for t in range(tokens)}
        requests.append(places)
    return requests


def test_arrays_are_held_as_they_are(xp) -> None:
    indptr, indices, last_page_len = int32(xp, [0, 1]), int32(xp, [3]), int32(xp, [2])
    table = pa.PageTable(indptr, indices, last_page_len, page_size=4)
    assert table.indptr is indptr
    assert table.indices is indices
    assert table.last_page_len is last_page_len
    assert (table.batch_size, table.page_size, table.page_stride) == (1, 4, 1)
    assert table.page_offset is None
    assert table.total_len is None
    assert table.device == ("cpu" if xp is np else "cuda:0")
    assert repr(table) == f"PageTable(batch_size=1, max_pages=1, page_size=4, device='{table.device}')"


@pytest.mark.parametrize("first", [0, 3])
def test_seq_lens(xp, first: int) -> None:
    """The length by the rule, also of a table whose indptr does not begin at 0 (a slice of a larger one)."""
    table = ragged(xp, first=first)
    assert table.seq_lens.dtype == np.int32
    assert isinstance(table.seq_lens, xp.ndarray)
    assert to_numpy(table.seq_lens).tolist() == list(SEQ_LENS)
    assert [len(tokens) for tokens in tokens_of(table)] == list(SEQ_LENS)


@pytest.mark.parametrize("positions", ["plain", "offset", "stride"])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7])
def test_split_keeps_every_token_in_its_place(xp, num_chunks: int, positions: str) -> None:
    given = {
        "plain": {},
        "offset": {"page_offset": [5, 0, 7, 1, 0, 9], "total_len": [40, 0, 30, 8, 23, 50]},
        "stride": {"page_offset": [1, 2, 0, 1, 2, 0], "page_stride": 3, "total_len": [60, 1, 1, 20, 90, 8]},
    }[positions]
    table = ragged(xp, **given)
    chunks = table.split(num_chunks)
    batch_size = table.batch_size
    assert chunks.batch_size == num_chunks * batch_size
    assert (chunks.page_size, chunks.page_stride, chunks.device) == (table.page_size, table.page_stride, table.device)
    expected, found, pages = tokens_of(table), tokens_of(chunks), pages_of(chunks)
    total_len = SEQ_LENS if table.total_len is None else to_numpy(table.total_len).tolist()
    for i in range(batch_size):
        parts = [found[c * batch_size + i] for c in range(num_chunks)]
        assert sum(len(part) for part in parts) == len(expected[i])
        assert {position: slot for part in parts for position, slot in part.items()} == expected[i]
        count = len(pages_of(table)[i])
        sizes = [(c + 1) * count // num_chunks - c * count // num_chunks for c in range(num_chunks)]
        assert [len(pages[c * batch_size + i]) for c in range(num_chunks)] == sizes
    assert to_numpy(chunks.total_len).tolist() == list(total_len) * num_chunks
    chunks.validate(NUM_PAGES).raise_if_bad()


def test_split_writes_out(xp) -> None:
    """A second batch of the same size goes into the arrays of the first split."""
    chunks = ragged(xp).split(3)
    arrays = (chunks.indptr, chunks.indices, chunks.last_page_len, chunks.page_offset, chunks.total_len)
    other = pa.PageTable(
        int32(xp, range(7)), int32(xp, [8, 6, 4, 2, 0, 1]), int32(xp, [1, 2, 3, 4, 1, 2]), page_size=PAGE_SIZE
    )
    assert other.split(3, out=chunks) is chunks
    assert all(x is y for x, y in zip(arrays, (chunks.indptr, chunks.indices, chunks.last_page_len), strict=False))
    fresh = other.split(3)
    assert tokens_of(chunks) == tokens_of(fresh)
    assert to_numpy(chunks.total_len).tolist() == [1, 2, 3, 4, 1, 2] * 3


@pytest.mark.parametrize("first", [0, 3])
def test_slots(xp, first: int) -> None:
    """Every token of every request, the positions between the pages of a strided table, and those past its end."""
    offset = [1, 2, 0, 1, 2, 0]
    for table in (ragged(xp, first=first), ragged(xp, page_offset=offset, page_stride=3, first=first)):
        expected = [
            (i, position, tokens.get(position // PAGE_SIZE * PAGE_SIZE, -1))
            for i, tokens in enumerate(tokens_of(table))
            for position in range(100)
        ]
        requests, positions, page_begin = (np.array(column) for column in zip(*expected, strict=True))
        slots = table.slots(int32(xp, requests), int32(xp, positions))
        assert slots.dtype == np.int64
        assert isinstance(slots, xp.ndarray)
        wanted = np.where(page_begin < 0, -1, page_begin + positions % PAGE_SIZE)
        np.testing.assert_array_equal(to_numpy(slots), wanted)
        np.testing.assert_array_equal(
            to_numpy(table.slots(requests.astype(np.int32), positions.astype(np.int32))), wanted
        )


@pytest.mark.parametrize("first", [0, 3])
def test_block_tables_come_and_go(xp, first: int) -> None:
    table = ragged(xp, first=first)
    dense = table.to_block_table(7)
    assert dense.dtype == np.int32
    assert isinstance(dense, xp.ndarray)
    assert dense.shape == (table.batch_size, 7)
    assert [[page for page in row if page != -1] for row in to_numpy(dense).tolist()] == pages_of(table)
    poisoned = xp.where(dense < 0, 99999, dense).astype(np.int32)
    wide = xp.full((table.batch_size, 20), -5, np.int32)
    wide[:, 1:15:2] = poisoned  # a view of a larger block table, strided in both axes
    back = pa.PageTable.from_block_table(wide[:, 1:15:2], table.seq_lens, page_size=PAGE_SIZE)
    assert back.batch_size == table.batch_size
    assert back.device == table.device
    assert tokens_of(back) == tokens_of(table)


def test_empty_holds_no_page(xp) -> None:
    table = pa.PageTable.empty(3, 10, page_size=8, device="cpu" if xp is np else "cuda")
    assert isinstance(table.indptr, xp.ndarray)
    assert (table.batch_size, table.page_size, table.indices.shape[0]) == (3, 8, 10)
    assert to_numpy(table.seq_lens).tolist() == [0, 0, 0]
    table.validate(1).raise_if_bad()


def test_an_empty_batch_is_no_error(xp) -> None:
    table = pa.PageTable(int32(xp, [0]), int32(xp, []), int32(xp, []), page_size=4)
    assert table.batch_size == 0
    assert table.seq_lens.shape == (0,)
    assert table.split(3).batch_size == 0
    assert table.slots(int32(xp, []), int32(xp, [])).shape == (0,)
    assert table.to_block_table(5).shape == (0, 5)
    none = pa.PageTable.from_block_table(xp.zeros((0, 3), np.int32), int32(xp, []), page_size=4)
    assert none.batch_size == 0
    table.validate(10).raise_if_bad()


# field, entry, and the value to put there
FAULTS = {
    "decreasing indptr": ("indptr", 2, 2),
    "indptr past indices": ("indptr", 6, 999),
    "negative indptr": ("indptr", 0, -1),
    "page id past the pool": ("indices", 4, NUM_PAGES),
    "negative page id": ("indices", 10, -1),
    "last page of no token": ("last_page_len", 3, 0),
    "last page too long": ("last_page_len", 4, PAGE_SIZE + 1),
    "negative last page": ("last_page_len", 0, -5),
    "negative offset": ("page_offset", 2, -1),
    "negative total length": ("total_len", 5, -2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_validate_finds(xp, fault: str) -> None:
    """Nothing is raised until raise_if_bad, and then field, entry and value are named."""
    field, entry, value = FAULTS[fault]
    table = ragged(xp, page_offset=[0] * 6, total_len=SEQ_LENS)
    table.validate(NUM_PAGES).raise_if_bad()
    getattr(table, field)[entry] = value
    found = table.validate(NUM_PAGES)
    with pytest.raises(pa.PageTableError, match=field) as error:
        found.raise_if_bad()
    assert (error.value.field, error.value.index, error.value.value) == (field, entry, value)
    assert f"{field}[{entry}]" in str(error.value)
    assert str(value) in str(error.value)


def test_validate_reads_nothing_that_is_unused(xp) -> None:
    """Ids outside the used pages and last_page_len of requests without a page may be anything."""
    table = ragged(xp, first=3)
    table.last_page_len[1] = -9
    table.validate(NUM_PAGES).raise_if_bad()


def test_positions_that_do_not_fit_are_found() -> None:
    table = ragged(np, page_offset=[0, 0, 0, 2**29, 0, 0])
    with pytest.raises(pa.PageTableError, match=rf"request 3 ends at position {(2**29) * 4 + 4}.*below 2\*\*31"):
        table.validate(NUM_PAGES).raise_if_bad()


def test_fault_codes_are_those_of_the_kernels() -> None:
    header = Path(__file__).parents[1] / "kernels" / "page_table.cuh"
    enum = re.search(r"enum FaultField \{(.*?)\}", header.read_text(), re.DOTALL)
    assert enum is not None
    assert re.findall(r"FAULT_(\w+),", enum[1]) == [field.upper() for field in FAULT_FIELDS]


def test_fault_codes_have_messages() -> None:
    for code, field in enumerate(FAULT_FIELDS[1:], start=1):
        error = fault_error(code, 17, -3)
        assert (error.field, error.index, error.value) == (field, 17, -3)
        assert field in str(error)
        assert "-3" in str(error)
        assert ";" in str(error)
    with pytest.raises(ValueError, match="field_code is 99"):
        fault_error(99, 0, 0)


def test_positions_beyond_every_integer_are_refused() -> None:
    """The products of five pages, their stride and their size turn round in 64 bits."""
    largest = 2**31 - 1
    arrays = (np.array(x, np.int32) for x in ([0, 5], [0] * 5, [1]))
    table = pa.PageTable(*arrays, page_size=largest, page_stride=largest)
    with pytest.raises(
        pa.PageTableError, match=r"request 0 ends at position 184467\d+, and positions stay below 2\*\*31"
    ):
        table.validate(1).raise_if_bad()
