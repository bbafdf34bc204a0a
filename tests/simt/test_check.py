"""check_table, run on a CPU by the SIMT shim: it finds a wrong value wherever it stands, and stays in the arrays."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paged_attn.checks import tables
from paged_attn.errors import FAULT_FIELDS, PageTableError
from tests.simt.driver import launch
from tests.simt.guarded import Guarded

INT_MAX = 2**31 - 1
PAGE_SIZE, NUM_PAGES = 16, 30
# Request 2 has no page; behind the last used entry of indices stands what is not looked at.
RIGHT = {
    "indptr": [0, 3, 4, 4, 9, 20],
    "indices": [*range(20), -1, INT_MAX],
    "last_page_len": [16, 1, -5, 7, 16],
    "page_offset": [0, 9, 0, 1000, 3],
    "total_len": [0, 5, 0, INT_MAX, 99],
}


def table(**changes: Any) -> dict[str, np.ndarray | None]:
    fields = RIGHT | changes
    return {name: None if value is None else np.array(value, np.int32) for name, value in fields.items()}


def check(arrays: dict[str, np.ndarray | None], parts: int = 1, **scalars: int) -> tuple[str, int, int] | None:
    guarded = Guarded()
    status = guarded.status()
    given = {name: guarded.input(array) for name, array in arrays.items() if array is not None}
    batch, num_indices = given["last_page_len"].size, given["indices"].size
    sizes = {"page_size": PAGE_SIZE, "page_stride": 1, "num_pages": NUM_PAGES} | scalars
    num_pages = sizes.pop("num_pages")
    fields = {"table": given | {"batch": batch, "num_indices": num_indices} | sizes, "status": status}
    launch("check_table", batch * parts, 32, fields | {"num_pages": num_pages})
    guarded.check()
    field = FAULT_FIELDS[int(status["field"])]
    return None if field == "none" else (field, int(status["index"]), int(status["value"]))


def wrong(field: str, at: int, value: int) -> dict[str, np.ndarray | None]:
    arrays = table()
    array = arrays[field]
    assert array is not None
    array[at] = value
    return arrays


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"page_offset": None},
        {"total_len": None},
        {"page_offset": None, "total_len": None},
        {"indptr": [0, 0, 0, 0, 0, 0]},
        {"indptr": [20, 20, 20, 20, 20, 22], "indices": [*[-1] * 20, 0, 29], "last_page_len": [0, 0, 0, 0, 1]},
        {"indptr": [0, 22], "indices": [29] * 22, "last_page_len": [16], "page_offset": None, "total_len": None},
        {"indptr": [0, 100], "indices": [0] * 100, "last_page_len": [3], "page_offset": [0], "total_len": [0]},
    ],
)
def test_right_tables(changes: dict[str, Any], parts: int) -> None:
    assert check(table(**changes), parts) is None


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("field", "at", "value"),
    [
        ("indptr", 0, -1),
        ("indptr", 0, 23),
        ("indptr", 1, -(2**31)),
        ("indptr", 3, 3),
        ("indptr", 5, 8),
        ("indptr", 5, 23),
        ("indptr", 5, INT_MAX),
        ("indices", 0, -1),
        ("indices", 8, 30),
        ("indices", 19, INT_MAX),
        ("indices", 11, -(2**31)),
        ("last_page_len", 0, 0),
        ("last_page_len", 1, 17),
        ("last_page_len", 4, -(2**31)),
        ("last_page_len", 3, INT_MAX),
        ("page_offset", 0, -1),
        ("page_offset", 2, -1),  # of a request without a page too
        ("total_len", 4, -(2**31)),
        ("total_len", 2, -1),
    ],
)
def test_one_wrong_value(field: str, at: int, value: int, parts: int) -> None:
    arrays = wrong(field, at, value)
    assert check(arrays, parts) == (field, at, value)
    host_table = SimpleNamespace(device="cpu", page_size=PAGE_SIZE, page_stride=1, **arrays)
    with pytest.raises(PageTableError) as raised:
        tables.check_table_values(host_table, NUM_PAGES)
    assert raised.value.field == field


@pytest.mark.parametrize("parts", [1, 2])
def test_a_begin_that_is_too_large(parts: int) -> None:
    """indptr[2] = 15 > indptr[3]: request 1 may have pages up to there, request 2 ends before it begins."""
    assert check(wrong("indptr", 2, 15), parts) == ("indptr", 3, 4)


@pytest.mark.parametrize(
    ("page_offset", "page_stride", "last_page_len", "field"),
    [
        (None, 2**27, 16, "indptr"),
        ([2**27 - 11], 1, 16, "page_offset"),
        ([2**27 - 11], 1, 15, None),
        ([INT_MAX], 1, 1, "page_offset"),
    ],
)
def test_positions_past_an_int(
    page_offset: list[int] | None, page_stride: int, last_page_len: int, field: str | None
) -> None:
    """A request of 11 pages ends at (page_offset + 10 * page_stride) * 16 + last_page_len, which is below 2^31."""
    arrays = table(indptr=[0, 11], last_page_len=[last_page_len], page_offset=page_offset, total_len=None)
    fault = check(arrays, page_stride=page_stride)
    host_table = SimpleNamespace(device="cpu", page_size=PAGE_SIZE, page_stride=page_stride, **arrays)
    if field is None:
        assert fault is None
        tables.check_table_values(host_table, NUM_PAGES)
    else:
        assert fault is not None and fault[:2] == (field, 0) and fault[2] > INT_MAX
        with pytest.raises(PageTableError):
            tables.check_table_values(host_table, NUM_PAGES)


def test_no_page_is_in_an_empty_pool() -> None:
    fault = check(table(), num_pages=0)
    assert fault is not None and fault[0] == "indices"


def test_the_first_fault_stays() -> None:
    arrays = table(indices=[-1] * 22, last_page_len=[0] * 5)
    assert check(arrays) == ("last_page_len", 0, 0)


@pytest.mark.parametrize("seed", range(30))
def test_noise(seed: int) -> None:
    """Whatever the arrays hold, the kernel ends, stays inside them, and agrees with the host's check."""
    rng = np.random.default_rng(seed)
    arrays = table()
    for field in rng.choice(list(arrays), rng.integers(1, 6), replace=False):
        array = arrays[field]
        assert array is not None
        low, high = [(-(2**31), 2**31), (-2, 25)][rng.integers(2)]
        array[:] = np.where(rng.random(array.size) < 0.3, rng.integers(low, high, array.size), array)
    fault = check(arrays, 1 + seed % 2)
    host_table = SimpleNamespace(device="cpu", page_size=PAGE_SIZE, page_stride=1, **arrays)
    try:
        tables.check_table_values(host_table, NUM_PAGES)
    except PageTableError:
        assert fault is not None
    else:
        assert fault is None
