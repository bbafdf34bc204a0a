"""plan_requests, run on a CPU by the SIMT shim, against a loop over requests in plain Python."""

from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn.errors import FAULT_FIELDS
from tests.simt.driver import launch
from tests.simt.guarded import Guarded

INT_MAX = 2**31 - 1
MAX_KV_LEN = INT_MAX - 0xFFFFF
SCAN_BYTES = 256
NO_REQUEST = -1  # total_len of page_table.cuh
REQUEST = kernels.params_dtype(kernels.load_source("plan_requests"), "Request")
FIELDS = ("first_page", "num_pages", "kv_len", "total_len", "page_offset", "first_query", "num_queries", "first_tile")

Fault = tuple[str, int, int]


def make(seed: int, batch: int, **changes: Any) -> dict[str, Any]:
    """The fields of a right table, with what stands behind the end of indices impossible."""
    rng = np.random.default_rng(seed)
    page_size = int(rng.choice([1, 3, 16, 64]))
    counts = rng.integers(0, 9, batch)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_pages = int(indptr[-1]) + 5
    indices = np.concatenate([rng.permutation(num_pages)[: indptr[-1]], [-7, INT_MAX]]).astype(np.int32)
    step = {
        "indptr": indptr,
        "indices": indices,
        "last_page_len": rng.integers(1, page_size + 1, batch).astype(np.int32),
        "page_offset": None,
        "total_len": None,
        "qo_indptr": None,
        "batch": batch,
        "max_batch_size": batch,
        "num_indices": indices.size,
        "max_pages": int(indptr[-1]) + 3,
        "page_size": page_size,
        "page_stride": 1,
        "num_pages": num_pages,
        "q_len": 1,
        "total_rows_limit": INT_MAX,
        "tile_rows": 1,
        "group_size": 1,
    }
    return step | changes


def expected(step: dict[str, Any]) -> tuple[np.ndarray, dict[int, int], list[Fault]]:
    """Requests with the sentinel, the page ids that the step copies (by place), and every fault there is."""
    faults: list[Fault] = []
    page_ids: dict[int, int] = {}
    requests = np.zeros(step["max_batch_size"] + 1, REQUEST)
    batch, queries, tiles = step["batch"], 0, 0
    indptr, qo = step["indptr"].tolist(), None if step["qo_indptr"] is None else step["qo_indptr"].tolist()
    if qo and qo[0] != 0:
        faults.append(("qo_indptr", 0, qo[0]))
    first_of_all = indptr[0] if batch and 0 <= indptr[0] <= indptr[1] <= step["num_indices"] else 0
    for i in range(step["max_batch_size"]):
        kv_len = pages = first = offset = 0
        total_len = NO_REQUEST
        if i < batch:
            offset = 0 if step["page_offset"] is None else int(step["page_offset"][i])
            if offset < 0:
                faults.append(("page_offset", i, offset))
                offset = 0
            known = len(faults)
            begin, end = rows_of(indptr, i, step["num_indices"], "indptr", faults)
            is_wrong = len(faults) > known or not 0 <= indptr[i] <= step["num_indices"]
            begin, end = begin - first_of_all, end - first_of_all
            if end > step["max_pages"]:
                faults.append(("max_pages", i, end))
            if begin < 0 or end > step["max_pages"]:
                begin, end, is_wrong = 0, 0, True
            for place in range(begin, end):
                page = int(step["indices"][first_of_all + place])
                if not 0 <= page < step["num_pages"]:
                    faults.append(("indices", first_of_all + place, page))
                    page = 0
                page_ids[place] = page
            if end > begin and step["num_pages"]:
                last = int(step["last_page_len"][i])
                if not 1 <= last <= step["page_size"]:
                    faults.append(("last_page_len", i, last))
                    last = min(max(last, 1), step["page_size"])
                first, pages = begin, end - begin
                kv_len = (pages - 1) * step["page_size"] + last
                last_page = min(offset + (pages - 1) * step["page_stride"], INT_MAX)
                position = last_page * step["page_size"] + last
                if position > INT_MAX or kv_len > MAX_KV_LEN:
                    faults.append(("indptr" if step["page_offset"] is None else "page_offset", i, position))
                kv_len = min(kv_len, MAX_KV_LEN)
            total_len = kv_len if step["total_len"] is None else int(step["total_len"][i])
            if total_len < 0:
                faults.append(("total_len", i, total_len))
            if total_len < 0 or is_wrong or (end > begin and not step["num_pages"]):
                total_len = NO_REQUEST
        if qo is None:
            first_query, num_queries = i * step["q_len"], step["q_len"]
            queries = first_query + num_queries
        else:
            first_query, num_queries = queries, 0
            if i < batch:
                rows_of(qo, i, step["total_rows_limit"], "qo_indptr", faults)
                end = max(queries, min(max(qo[i + 1], 0), step["total_rows_limit"]))
                num_queries, queries = end - queries, end
        requests[i] = (first, pages, kv_len, total_len, offset, first_query, num_queries, min(tiles, INT_MAX))
        tiles += -(-num_queries * step["group_size"] // step["tile_rows"])
    requests[-1]["total_len"] = NO_REQUEST
    requests[-1]["first_query"], requests[-1]["first_tile"] = queries, min(tiles, INT_MAX)
    return requests, page_ids, faults


def rows_of(indptr: list[int], i: int, limit: int, field: str, faults: list[Fault]) -> tuple[int, int]:
    begin, end = indptr[i], indptr[i + 1]
    if not 0 <= begin <= limit:
        if i == 0:
            faults.append((field, 0, begin))
        return 0, 0
    if not begin <= end <= limit:
        faults.append((field, i + 1, end))
        return 0, 0
    return begin, end


def run(step: dict[str, Any], block: int = 64, parts: int = 1, reverse: bool = False) -> tuple[Any, Any, Fault | None]:
    guarded = Guarded()
    arrays = {
        name: guarded.input(value) if isinstance(value, np.ndarray) else value
        for name, value in step.items()
        if value is not None
    }
    requests = guarded.output(np.full(step["max_batch_size"] + 1, -1, REQUEST), 16)
    page_ids = guarded.output(np.full(step["max_pages"], -99, np.int32))
    status = guarded.status()
    launch(
        "plan_requests",
        grid=1 + step["batch"] * parts,
        block=block,
        params=arrays | {"requests": requests, "page_ids": page_ids, "status": status},
        shared_bytes=SCAN_BYTES,
        reverse=reverse,
    )
    guarded.check()
    field = FAULT_FIELDS[int(status["field"])]
    fault = None if field == "none" else (field, int(status["index"]), int(status["value"]))
    return requests, page_ids, fault


def verify(step: dict[str, Any], **how: Any) -> Fault | None:
    """The kernel does what the loop does, and its fault is one of the loop's."""
    requests, page_ids, fault = run(step, **how)
    want_requests, want_page_ids, faults = expected(step)
    for field in FIELDS:
        np.testing.assert_array_equal(requests[field], want_requests[field], err_msg=field)
    want = np.full(step["max_pages"], -99, np.int32)
    want[list(want_page_ids)] = list(want_page_ids.values())
    np.testing.assert_array_equal(page_ids, want)
    assert fault in faults if faults else fault is None
    return fault


RIGHT = {
    "decode": make(0, 7),
    "decode q_len": make(1, 5, q_len=3, group_size=4, tile_rows=16),
    "padded decode": make(2, 3, max_batch_size=9, q_len=2),
    "one request": make(3, 1),
    "no request": make(4, 0),
    "no request, capacity": make(5, 0, max_batch_size=4),
    "no request, capacity, prefill": make(6, 0, max_batch_size=4, qo_indptr=np.zeros(1, np.int32)),
    "full capacity": make(7, 6, max_pages=int(make(7, 6)["indptr"][-1])),
    "positions": make(8, 4, page_offset=np.array([0, 5, 1000, 3], np.int32), page_stride=4),
    "total_len": make(9, 4, total_len=np.array([0, 5, 10**9, INT_MAX], np.int32)),
    "prefill": make(10, 5, qo_indptr=np.array([0, 3, 3, 200, 201, 330], np.int32), group_size=4, tile_rows=128),
    "padded prefill": make(11, 2, max_batch_size=7, qo_indptr=np.array([0, 65, 66], np.int32), tile_rows=64),
    "several chunks of rows": make(12, 150, qo_indptr=np.arange(0, 151 * 7, 7, dtype=np.int32), tile_rows=5),
    "chunks end with rows": make(13, 128, q_len=2, tile_rows=3),
    "many tiles": make(14, 3, qo_indptr=np.array([0, 2**30, 2**31 - 2, INT_MAX], np.int32), group_size=64, tile_rows=7),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_tables(name: str) -> None:
    step = RIGHT[name]
    assert verify(step) is None
    assert verify(step, block=32, parts=3, reverse=True) is None


def test_some_rows_of_a_larger_table() -> None:
    """indptr need not begin at 0: page ids are copied from indptr[0] on, and capacity counts from there."""
    step = make(15, 8)
    step |= {"indptr": step["indptr"][2:], "last_page_len": step["last_page_len"][2:], "batch": 6}
    begin, end = step["indptr"][[0, -1]].tolist()
    assert begin > 3  # more than the room behind the pages of all rows
    assert verify(step) is None
    step["max_pages"] = end - begin
    assert verify(step, parts=2, reverse=True) is None
    requests, page_ids, _ = run(step)
    assert requests["first_page"][0] == 0
    np.testing.assert_array_equal(page_ids, step["indices"][begin:end])
    step["max_pages"] -= 1
    fault = verify(step)
    assert fault is not None and fault[0] == "max_pages" and fault[2] == end - begin


def test_rows_before_the_first_are_empty() -> None:
    """indptr decreases below its first entry: the row where it does has the fault, and those behind it no pages."""
    step = make(16, 3, indptr=np.array([5, 8, 2, 4], np.int32), indices=np.arange(9, dtype=np.int32))
    step |= {"num_indices": 9, "num_pages": 9, "max_pages": 4}
    assert verify(step) == ("indptr", 2, 2)
    assert run(step)[0]["num_pages"].tolist() == [3, 0, 0, 0]


def test_a_thousand_rows_a_chunk() -> None:
    assert verify(make(20, 1100, q_len=2), block=1024) is None


def changed(array: np.ndarray, at: int, value: int) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize("value", [-(2**31), -1, INT_MAX, 0, 1])
@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_one_wrong_indptr(at: int, value: int) -> None:
    step = make(30, 8)
    step["indptr"] = changed(step["indptr"], at, value)
    verify(step)
    verify(step, block=32, parts=2, reverse=True)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("last_page_len", 0, 1),
        ("last_page_len", -5, 1),
        ("last_page_len", INT_MAX, None),
        ("page_offset", -1, 0),
        ("page_offset", -(2**31), 0),
        ("total_len", -1, NO_REQUEST),
    ],
)
def test_a_wrong_value_is_made_right_and_recorded(field: str, value: int, kept: int | None) -> None:
    step = make(31, 6, page_offset=np.zeros(6, np.int32), total_len=np.full(6, 50, np.int32))
    step["indptr"] = np.array([0, 1, 2, 4, 6, 7, 9], np.int32)[:7]
    step["indices"] = np.arange(12, dtype=np.int32)
    step |= {"num_indices": 12, "max_pages": 9, "num_pages": 12}
    step[field] = changed(step[field], 3, value)
    assert verify(step) == (field, 3, value)
    request = run(step)[0][3]
    if field == "last_page_len":
        assert request["kv_len"] == step["page_size"] + (kept or step["page_size"])
    else:
        assert request[field] == kept


def test_a_value_is_not_looked_at_where_there_is_no_page() -> None:
    step = make(32, 3, indptr=np.zeros(4, np.int32), last_page_len=np.array([-1, 0, INT_MAX], np.int32))
    assert verify(step) is None


@pytest.mark.parametrize("page", [-1, -(2**31), 40, INT_MAX])
def test_a_wrong_page_id_becomes_page_zero(page: int) -> None:
    step = make(33, 4, indptr=np.array([0, 3, 5, 9, 12], np.int32), indices=np.arange(12, dtype=np.int32))
    step |= {"num_indices": 12, "max_pages": 12, "num_pages": 40, "indices": changed(step["indices"], 4, page)}
    assert verify(step, parts=2) == ("indices", 4, page)


def test_an_empty_pool_makes_empty_requests() -> None:
    step = make(34, 3, num_pages=0)
    fault = verify(step)
    assert fault is not None and fault[0] == "indices"
    assert not run(step)[0]["num_pages"].any()


def test_more_pages_than_the_plan_has_room_for() -> None:
    step = make(35, 6, indptr=np.array([0, 2, 4, 6, 8, 10, 12], np.int32), indices=np.arange(12, dtype=np.int32))
    step |= {"num_indices": 12, "num_pages": 12, "max_pages": 9}
    fault = verify(step)
    assert fault in [("max_pages", 4, 10), ("max_pages", 5, 12)]
    assert run(step)[0]["num_pages"].tolist() == [2, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("page_size", "page_offset", "field"),
    [(2**30, None, "indptr"), (16, 2**27, "page_offset"), (16, INT_MAX, "page_offset"), (2**31 - 1, 5, "page_offset")],
)
def test_positions_past_an_int(page_size: int, page_offset: int | None, field: str) -> None:
    step = make(36, 1, indptr=np.array([0, 3], np.int32), indices=np.arange(3, dtype=np.int32))
    step |= {"num_indices": 3, "max_pages": 3, "num_pages": 3, "page_size": page_size, "page_stride": INT_MAX}
    step["last_page_len"] = np.array([page_size], np.int32)
    step["page_offset"] = None if page_offset is None else np.array([page_offset], np.int32)
    fault = verify(step)
    assert fault is not None and fault[0] == field
    assert 0 <= run(step)[0]["kv_len"][0] <= MAX_KV_LEN


@pytest.mark.parametrize(
    "qo_indptr",
    [[1, 3, 5, 9], [-4, 3, 5, 9], [0, 5, 3, 9], [0, -1, 3, 9], [0, INT_MAX, 3, 9], [0, 3, 5, -(2**31)], [7, 6, 5, 4]],
)
def test_wrong_qo_indptr(qo_indptr: list[int]) -> None:
    step = make(37, 3, max_batch_size=5, qo_indptr=np.array(qo_indptr, np.int32), total_rows_limit=1000, tile_rows=2)
    fault = verify(step)
    assert fault is not None and fault[0] == "qo_indptr"
    requests = run(step, reverse=True)[0]
    ends = requests["first_query"][:-1] + requests["num_queries"][:-1]
    assert (requests["first_query"] >= 0).all() and (ends <= requests["first_query"][1:]).all()
    assert requests["first_query"][-1] <= 1000


@pytest.mark.parametrize("seed", range(40))
def test_arrays_of_anything(seed: int) -> None:
    """Several wrong values at once, or nothing but noise: what comes out follows the rules and lies in the arrays."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 40))
    step = make(seed, batch, max_batch_size=batch + int(rng.integers(0, 5)), tile_rows=int(rng.integers(1, 99)))
    if seed % 2:
        step["qo_indptr"] = np.concatenate([[0], np.cumsum(rng.integers(0, 50, batch))]).astype(np.int32)
        step["total_rows_limit"] = int(rng.choice([INT_MAX, 500]))
    step["page_offset"] = rng.integers(0, 99, batch).astype(np.int32)
    step["total_len"] = rng.integers(0, 999, batch).astype(np.int32)
    for field in ("indptr", "indices", "last_page_len", "page_offset", "total_len", "qo_indptr"):
        array = step[field]
        if array is not None and rng.random() < 0.6:
            wrong = rng.random(array.size) < rng.choice([0.1, 1.0])
            noise = rng.choice([rng.integers(-(2**31), 2**31, array.size), rng.integers(-3, 60, array.size)])
            step[field] = np.where(wrong, noise, array).astype(np.int32)
    verify(step, block=32, parts=1 + seed % 3, reverse=bool(seed % 2))
    requests, page_ids, _ = run(step)
    assert (requests["first_page"] + requests["num_pages"] <= step["max_pages"]).all()
    for request in requests[:-1]:
        used = page_ids[request["first_page"] : request["first_page"] + request["num_pages"]]
        assert ((used >= 0) & (used < step["num_pages"])).all()
        assert 0 <= request["kv_len"] <= request["num_pages"] * step["page_size"]
