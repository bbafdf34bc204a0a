"""The kernels of table.cu, run on a CPU by the SIMT shim, against the reference backend and plain Python."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn.backends import reference
from paged_attn.errors import FAULT_FIELDS
from tests.simt.driver import launch
from tests.simt.guarded import Guarded

INT_MAX = 2**31 - 1
SCAN_BYTES = 256

Fault = tuple[str, int, int] | None


def fault_of(status: np.ndarray) -> Fault:
    field = FAULT_FIELDS[int(status["field"])]
    return None if field == "none" else (field, int(status["index"]), int(status["value"]))


def make_table(seed: int, batch: int, page_size: int = 16, longest: int = 9, stride: int = 1) -> SimpleNamespace:
    """A right table with random page ids, and impossible ones behind its end."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, longest + 1, batch)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return SimpleNamespace(
        indptr=indptr,
        indices=np.concatenate([rng.integers(0, 1000, indptr[-1]), [-9, INT_MAX]]).astype(np.int32),
        last_page_len=rng.integers(1, page_size + 1, batch).astype(np.int32),
        page_size=page_size,
        page_offset=rng.integers(0, 99, batch).astype(np.int32) if stride > 1 else None,
        page_stride=stride,
        total_len=rng.integers(0, 999, batch).astype(np.int32) if seed % 2 else None,
        device="cpu",
    )


def noisy(table: SimpleNamespace, seed: int) -> SimpleNamespace:
    """The table with wrong values in some of its arrays."""
    rng = np.random.default_rng(seed)
    fields = vars(table).copy()
    for name in ("indptr", "last_page_len", "page_offset", "total_len"):
        array = fields[name]
        if array is not None and rng.random() < 0.7:
            noise = rng.choice([rng.integers(-(2**31), 2**31, array.size), rng.integers(-3, 40, array.size)])
            fields[name] = np.where(rng.random(array.size) < 0.4, noise, array).astype(np.int32)
    return SimpleNamespace(**fields)


def inputs(guarded: Guarded, table: SimpleNamespace, *names: str) -> dict[str, Any]:
    """A Table with these arrays."""
    arrays = {name: getattr(table, name) for name in names}
    fields = {name: guarded.input(array) for name, array in arrays.items() if array is not None}
    sizes = {"batch": table.last_page_len.size, "num_indices": table.indices.size}
    return {"table": fields | sizes | {"page_size": table.page_size, "page_stride": table.page_stride}}


def outputs(out: SimpleNamespace) -> dict[str, Any]:
    """An OutTable."""
    return {"out": vars(out) | {"num_indices": out.indices.size}}


def filled(guarded: Guarded, size: int, dtype: Any = np.int32) -> np.ndarray:
    return guarded.output(np.full(size, -77, dtype))


def pages_of(table: SimpleNamespace, row: int) -> list[int]:
    """The entries of indices that the row holds; none where it does not lie inside."""
    begin, end = table.indptr[row : row + 2].tolist()
    return list(range(begin, end)) if 0 <= begin <= end <= table.indices.size else []


def clamp(value: int) -> int:
    return min(max(value, 0), INT_MAX)


def seq_len(table: SimpleNamespace, row: int, pages: int) -> int:
    return clamp((pages - 1) * table.page_size + int(table.last_page_len[row])) if pages else 0


# -- seq_lens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_seq_lens(seed: int) -> None:
    batch, page_size = [1, 2, 33, 64, 100][seed % 5], [1, 3, 16, INT_MAX][seed % 4]
    table = make_table(seed, batch, page_size, longest=1 if page_size == INT_MAX else 9)
    wrong = noisy(table, seed)
    for tried in (table, wrong):
        guarded = Guarded()
        out = filled(guarded, batch)
        arrays = inputs(guarded, tried, "indptr", "last_page_len")
        launch("seq_lens", -(-batch // 32), 32, arrays | {"seq_lens": out})
        guarded.check()
        pages = [clamp(n) for n in np.diff(tried.indptr.astype(np.int64)).tolist()]
        assert out.tolist() == [seq_len(tried, i, n) for i, n in enumerate(pages)]
        if tried is table:
            np.testing.assert_array_equal(out, reference.seq_lens(table))


# -- split -------------------------------------------------------------------------------------------------------------


def split(table: SimpleNamespace, num_chunks: int, capacity: int, block: int = 64, parts: int = 1) -> Any:
    guarded = Guarded()
    batch = table.last_page_len.size
    rows = num_chunks * batch
    out = SimpleNamespace(
        indptr=filled(guarded, rows + 1),
        indices=filled(guarded, capacity),
        last_page_len=filled(guarded, rows),
        page_offset=filled(guarded, rows),
        total_len=filled(guarded, rows),
    )
    status = guarded.status()
    fields = inputs(guarded, table, "indptr", "indices", "last_page_len", "page_offset", "total_len")
    fields |= outputs(out) | {"status": status, "num_chunks": num_chunks}
    launch("split_rows", 1, block, fields, SCAN_BYTES)
    launch("split_pages", rows * parts, 32, fields)
    guarded.check()
    return out, fault_of(status)


SPLITS = [
    (seed, batch, num_chunks, stride)
    for seed, (batch, num_chunks, stride) in enumerate(
        (batch, num_chunks, stride) for batch in (1, 3, 40) for num_chunks in (1, 2, 5, 11) for stride in (1, 4)
    )
]


@pytest.mark.parametrize(("seed", "batch", "num_chunks", "stride"), SPLITS)
def test_split(seed: int, batch: int, num_chunks: int, stride: int) -> None:
    table = make_table(seed, batch, page_size=[1, 16, 48][seed % 3], longest=[9, 70][seed % 2], stride=stride)
    rows = num_chunks * batch
    used = int(table.indptr[-1])
    out, fault = split(table, num_chunks, used + 3, block=[32, 128][seed % 2], parts=1 + seed % 3)
    want = SimpleNamespace(
        **{name: np.full(rows, -77, np.int32) for name in ("last_page_len", "page_offset", "total_len")},
        indptr=np.full(rows + 1, -77, np.int32),
        indices=np.full(used + 3, -77, np.int32),
    )
    reference.split_table(table, num_chunks, want)
    assert fault is None
    for name, array in vars(want).items():
        np.testing.assert_array_equal(getattr(out, name), array, err_msg=name)


@pytest.mark.parametrize("seed", range(30))
def test_split_of_anything(seed: int) -> None:
    """A row that does not lie inside the table is empty, what does not fit is cut; the output is a right table."""
    rng = np.random.default_rng(seed)
    batch, num_chunks = int(rng.integers(1, 20)), int(rng.integers(1, 6))
    table = noisy(make_table(seed, batch, stride=1 + 2 * (seed % 2)), seed)
    capacity = [table.indices.size, 7, 0][seed % 3]
    out, fault = split(table, num_chunks, capacity, block=32)
    begin = 0
    wrong = False
    for row in range(num_chunks * batch):
        chunk, request = divmod(row, batch)
        pages = pages_of(table, request)
        wrong |= not pages and bool(table.indptr[request] != table.indptr[request + 1])
        first, last = chunk * len(pages) // num_chunks, (chunk + 1) * len(pages) // num_chunks
        entries = pages[first:last][: capacity - begin]
        wrong |= len(entries) < last - first
        assert out.indptr[row] == begin
        begin += len(entries)
        assert out.indices[begin - len(entries) : begin].tolist() == table.indices[entries].tolist()
        whole = len(entries) == last - first and last == len(pages)
        last_page_len = int(table.last_page_len[request]) if whole else table.page_size
        assert out.last_page_len[row] == (last_page_len if entries else 0)
        offset = 0 if table.page_offset is None else int(table.page_offset[request])
        assert out.page_offset[row] == max(-INT_MAX, min(offset + first * table.page_stride, INT_MAX))
        length = seq_len(table, request, len(pages)) if table.total_len is None else table.total_len[request]
        assert out.total_len[row] == length
    assert out.indptr[-1] == begin
    assert (fault is not None and fault[0] in ("indptr", "max_pages")) if wrong else fault is None


# -- block tables ------------------------------------------------------------------------------------------------------


def from_block_table(block_table: np.ndarray, seq_lens: Any, page_size: int, capacity: int, parts: int = 1) -> Any:
    """block_table may be a view of a larger array."""
    guarded = Guarded()
    batch, width = block_table.shape
    base = block_table if block_table.base is None else block_table.base
    given = np.ndarray(
        (batch, width),
        np.int32,
        guarded.input(base),
        block_table.ctypes.data - base.ctypes.data,
        block_table.strides,
    )
    out = SimpleNamespace(
        indptr=filled(guarded, batch + 1), indices=filled(guarded, capacity), last_page_len=filled(guarded, batch)
    )
    status = guarded.status()
    fields = outputs(out) | {
        "block_table": given,
        "seq_lens": guarded.input(np.array(seq_lens, np.int32)),
        "status": status,
        "row_stride": given.strides[0] // 4,
        "column_stride": given.strides[1] // 4,
        "batch": batch,
        "width": width,
        "page_size": page_size,
    }
    launch("block_table_rows", 1, 32, fields, SCAN_BYTES)
    launch("block_table_pages", batch * parts, 32, fields)
    guarded.check()
    return out, fault_of(status)


@pytest.mark.parametrize("view", ["rows", "columns", "plain"])
@pytest.mark.parametrize("seed", range(8))
def test_from_block_table(seed: int, view: str) -> None:
    rng = np.random.default_rng(seed)
    batch, width, page_size = [1, 2, 40, 100][seed % 4], [1, 5, 70][seed % 3], [1, 3, 16][seed % 3]
    seq_lens = rng.integers(0, width * page_size + 1, batch).astype(np.int32)
    counts = -(-seq_lens // page_size)
    table = rng.integers(0, 999, (batch, width)).astype(np.int32)
    table[np.arange(width) >= counts[:, None]] = -1  # padding is not looked at
    if view == "rows":
        table = np.concatenate([table, np.full((batch, 3), -5, np.int32)], axis=1)[:, :width]
    elif view == "columns":
        table = np.ascontiguousarray(table.T).T
    capacity = int(counts.sum())
    out, fault = from_block_table(table, seq_lens, page_size, capacity + 2, parts=1 + seed % 2)
    want = SimpleNamespace(
        indptr=np.zeros(batch + 1, np.int32),
        indices=np.full(capacity + 2, -77, np.int32),
        last_page_len=np.zeros(batch, np.int32),
    )
    reference.from_block_table(table, seq_lens, page_size, want)
    assert fault is None
    for name, array in vars(want).items():
        np.testing.assert_array_equal(getattr(out, name), array, err_msg=name)


@pytest.mark.parametrize(
    ("seq_lens", "capacity", "fault", "counts"),
    [
        ([5, -1, 8], 9, ("seq_lens", 1, -1), [2, 0, 2]),
        ([5, -(2**31), 8], 9, ("seq_lens", 1, -(2**31)), [2, 0, 2]),
        ([5, 13, 8], 9, ("seq_lens", 1, 13), [2, 3, 2]),
        ([5, INT_MAX, 8], 9, ("seq_lens", 1, INT_MAX), [2, 3, 2]),
        ([5, 12, 8], 6, ("max_pages", 2, 7), [2, 3, 1]),
        ([12, 12, 12], 3, None, [3, 0, 0]),
        ([12, 12, 12], 0, None, [0, 0, 0]),
    ],
)
def test_from_a_wrong_block_table(seq_lens: list[int], capacity: int, fault: Fault, counts: list[int]) -> None:
    block_table = np.arange(9, dtype=np.int32).reshape(3, 3)
    out, found = from_block_table(block_table, seq_lens, 4, capacity)
    assert np.diff(out.indptr).tolist() == counts and out.indptr[0] == 0
    assert found == fault if fault else found is not None and found[0] == "max_pages"
    for row, count in enumerate(counts):
        assert out.indices[out.indptr[row] : out.indptr[row + 1]].tolist() == block_table[row, :count].tolist()
    assert ((out.last_page_len > 0) == (np.array(counts) > 0)).all() and (out.last_page_len <= 4).all()


def test_a_block_table_without_the_page() -> None:
    block_table = np.arange(6, dtype=np.int32).reshape(2, 3)
    block_table[1, 1] = -4
    assert from_block_table(block_table, [12, 4], 4, 6)[1] is None
    assert from_block_table(block_table, [12, 5], 4, 6)[1] == ("block_table", 4, -4)


@pytest.mark.parametrize("seed", range(20))
def test_to_block_table(seed: int) -> None:
    batch, width = [1, 3, 50][seed % 3], [1, 4, 9, 12][seed % 4]
    table = make_table(seed, batch)
    if seed >= 10:
        table = noisy(table, seed)
    guarded = Guarded()
    block_table = guarded.output(np.full((batch, width), -77, np.int32))
    status = guarded.status()
    fields = inputs(guarded, table, "indptr", "indices")
    fields |= {"block_table": block_table, "status": status, "width": width}
    launch("to_block_table", -(-batch * width // 32), 32, fields)
    guarded.check()
    rows = [table.indices[pages_of(table, i)].tolist() for i in range(batch)]
    assert block_table.tolist() == [row[:width] + [-1] * (width - len(row)) for row in rows]
    too_long = any(len(row) > width for row in rows)
    wrong = any(not row and table.indptr[i] != table.indptr[i + 1] for i, row in enumerate(rows))
    assert (fault_of(status) is not None) == (too_long or wrong)
    if seed < 10 and not too_long:
        np.testing.assert_array_equal(block_table, reference.to_block_table(table, width))


# -- slots -------------------------------------------------------------------------------------------------------------


def slots(table: SimpleNamespace, batch_indices: Any, positions: Any) -> tuple[np.ndarray, Fault]:
    guarded = Guarded()
    tokens = len(positions)
    out = filled(guarded, tokens, np.int64)
    status = guarded.status()
    fields = inputs(guarded, table, "indptr", "indices", "page_offset") | {
        "batch_indices": guarded.input(np.array(batch_indices, np.int32)),
        "positions": guarded.input(np.array(positions, np.int32)),
        "slots": out,
        "status": status,
        "page_size": kernels.fast_divide(table.page_size),
        "tokens": tokens,
    }
    launch("table_slots", -(-tokens // 32), 32, fields)
    guarded.check()
    return out, fault_of(status)


@pytest.mark.parametrize("seed", range(24))
def test_slots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, page_size, stride = [1, 5, 30][seed % 3], [1, 3, 16, 48][seed % 4], [1, 4][seed % 2]
    table = make_table(seed, batch, page_size, stride=stride)
    if table.page_offset is not None:
        table.page_offset %= 5
    batch_indices = rng.integers(0, batch, 200).astype(np.int32)
    positions = rng.integers(0, (10 * stride + 5) * page_size, 200).astype(np.int32)
    positions[:2] = 0, INT_MAX
    out, fault = slots(table, batch_indices, positions)
    assert fault is None
    np.testing.assert_array_equal(out, reference.table_slots(table, batch_indices, positions))
    assert (out >= 0).any()


@pytest.mark.parametrize(
    ("request_index", "position", "fault"),
    [
        (-1, 0, ("batch_indices", 1, -1)),
        (2, 0, ("batch_indices", 1, 2)),
        (INT_MAX, 0, ("batch_indices", 1, INT_MAX)),
        (0, -1, ("positions", 1, -1)),
        (0, -(2**31), ("positions", 1, -(2**31))),
        (1, 5, ("indices", 3, -8)),
    ],
)
def test_wrong_tokens_have_no_slot(request_index: int, position: int, fault: Fault) -> None:
    table = SimpleNamespace(
        indptr=np.array([0, 2, 4], np.int32),
        indices=np.array([7, 2**30, 5, -8], np.int32),
        last_page_len=np.array([4, 4], np.int32),
        page_offset=None,
        page_size=4,
        page_stride=1,
    )
    out, found = slots(table, [0, request_index, 1], [6, position, 3])
    assert out.tolist() == [2**32 + 2, -1, 23]
    assert found == fault


@pytest.mark.parametrize("seed", range(10))
def test_slots_of_any_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = noisy(make_table(seed, 6, stride=3), seed)
    batch_indices, positions = rng.integers(-1, 7, 60), rng.integers(-3, 600, 60)
    out, _ = slots(table, batch_indices, positions)
    for slot, request, position in zip(out.tolist(), batch_indices.tolist(), positions.tolist(), strict=True):
        pages = pages_of(table, request) if 0 <= request < 6 and position >= 0 else []
        behind = position // 16 - (0 if not pages else int(table.page_offset[request]))
        held = 0 <= behind and behind % 3 == 0 and behind // 3 < len(pages)
        page = int(table.indices[pages[behind // 3]]) if held else -1
        assert slot == (page * 16 + position % 16 if page >= 0 else -1)


# -- the cache's own table ---------------------------------------------------------------------------------------------


def update_table(
    page_lists: np.ndarray,
    updates: Any,
    starts: Any,
    indptr: Any,
    per_row: dict[str, Any],
    capacity: int,
    max_pages: int,
    page_stride: int = 1,
) -> Any:
    guarded = Guarded()
    arena, status = guarded.output(page_lists), guarded.status()
    index, value = np.array(updates, np.int32).reshape(-1, 2).T
    out = SimpleNamespace(
        indptr=filled(guarded, capacity + 1),
        indices=filled(guarded, max_pages),
        **{name: filled(guarded, capacity) for name in per_row},
    )
    shared = {"page_lists": arena, "status": status, "num_entries": arena.size}
    if index.size:
        arrays = {"update_index": guarded.input(index), "update_value": guarded.input(value)}
        launch("update_page_lists", -(-index.size // 32), 32, shared | arrays | {"num_updates": index.size})
    batch = len(starts)
    fields = outputs(out) | {
        "starts": guarded.input(np.array(starts, np.int32)),
        "indptr": guarded.input(np.array(indptr, np.int32)),
        **dict.fromkeys(("page_offset", "total_len")),
        **{name: guarded.input(np.array(values, np.int32)) for name, values in per_row.items()},
        "batch": batch,
        "capacity": capacity,
        "page_stride": page_stride,
    }
    launch("build_table", max(batch, 1) * 2, 32, shared | fields)
    guarded.check()
    return arena, out, fault_of(status)


@pytest.mark.parametrize("page_stride", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_update_table(seed: int, page_stride: int) -> None:
    rng = np.random.default_rng(seed)
    batch = [0, 1, 7, 40][seed % 4]
    capacity, size = batch + seed % 3, 300
    page_lists = rng.integers(0, 999, size).astype(np.int32)
    counts = rng.integers(0, 7, batch)
    if batch == 1:
        counts[:] = 100
    starts = rng.integers(0, size - 99 * page_stride, batch).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    names = ("last_page_len", "page_offset", "total_len")
    per_row = {name: rng.integers(1, 17, batch).astype(np.int32) for name in names[:page_stride]}  # all, or one
    index = rng.permutation(size)[: 40 * (seed % 2)].astype(np.int32)
    value = rng.integers(1000, 2000, index.size).astype(np.int32)
    arena, out, fault = update_table(
        page_lists, np.stack([index, value], 1), starts, indptr, per_row, capacity, int(indptr[-1]) + 4, page_stride
    )
    want = SimpleNamespace(
        indptr=np.zeros(capacity + 1, np.int32),
        indices=np.full(int(indptr[-1]) + 4, -77, np.int32),
        **{name: np.zeros(capacity, np.int32) for name in per_row},
        page_stride=page_stride,
    )
    reference.update_table(page_lists, index, value, starts, indptr, per_row, want)
    assert fault is None
    np.testing.assert_array_equal(arena, page_lists)
    for name, array in vars(out).items():
        np.testing.assert_array_equal(array, getattr(want, name), err_msg=name)


@pytest.mark.parametrize(
    ("updates", "starts", "indptr", "fault"),
    [
        ([(0, 5), (-1, 6)], [0, 2], [0, 2, 4], ("indices", 1, -1)),
        ([(0, 5), (10, 6)], [0, 2], [0, 2, 4], ("indices", 1, 10)),
        ([], [0, 9], [0, 2, 4], ("indices", 1, 9)),
        ([], [0, -1], [0, 2, 4], ("indices", 1, -1)),
        ([], [0, INT_MAX], [0, 2, 4], ("indices", 1, INT_MAX)),
        ([], [0, 2], [0, 2, 7], ("indptr", 2, 7)),
        ([], [0, 2], [0, 2, 1], ("indptr", 2, 1)),
        ([], [0, 2], [-3, 2, 4], ("indptr", 0, -3)),
    ],
)
def test_a_wrong_update(updates: Any, starts: list[int], indptr: list[int], fault: Fault) -> None:
    page_lists, per_row = np.arange(10, dtype=np.int32), {"last_page_len": [1, 1]}
    assert update_table(page_lists, updates, starts, indptr, per_row, 2, 6)[2] == fault


@pytest.mark.parametrize(("start", "fault"), [(3, None), (4, ("indices", 0, 4)), (12, ("indices", 0, 12))])
def test_pages_of_a_rank_end_within_the_lists(start: int, fault: Fault) -> None:
    """The last of three pages, every third entry, is the last entry; a row without a page may begin behind it."""
    page_lists, per_row = np.arange(10, dtype=np.int32), {"last_page_len": [1, 0]}
    _, out, found = update_table(page_lists, [], [start, 12], [0, 3, 3], per_row, 2, 6, page_stride=3)
    assert found == fault
    if fault is None:
        assert out.indices[:3].tolist() == [3, 6, 9]


# -- whole pages -------------------------------------------------------------------------------------------------------


def copy_pages(storage: np.ndarray, pairs: Any, blocks_a_pair: int = 1) -> tuple[np.ndarray, Fault]:
    """storage [num_layers, num_pages, 2, ...] of 16-bit numbers."""
    guarded = Guarded()
    copied, status = guarded.output(storage, 16), guarded.status()
    source, target = np.array(pairs, np.int32).T
    fields = {
        "storage": copied,
        "source": guarded.input(source),
        "target": guarded.input(target),
        "status": status,
        "layer_units": storage.strides[0] // 16,
        "page_units": storage.strides[1] // 16,
        "num_pages": storage.shape[1],
        "num_pairs": len(pairs),
    }
    launch("copy_pages", (len(pairs) * blocks_a_pair, storage.shape[0]), 32, fields)
    guarded.check()
    return copied, fault_of(status)


def numbered(num_layers: int, num_pages: int, elements: int) -> np.ndarray:
    shape = (num_layers, num_pages, 2, elements)
    return (np.arange(np.prod(shape)) % 65521).astype(np.uint16).reshape(shape)


@pytest.mark.parametrize("blocks_a_pair", [1, 3])
@pytest.mark.parametrize("pairs", [[(0, 4)], [(3, 1), (3, 2), (0, 5)], [(5, 0), (4, 1), (3, 2)]])
@pytest.mark.parametrize(("num_layers", "elements"), [(1, 8), (1, 1000), (3, 16), (4, 264)])
def test_copy_pages(num_layers: int, elements: int, pairs: list[tuple[int, int]], blocks_a_pair: int) -> None:
    storage = numbered(num_layers, 6, elements)
    copied, fault = copy_pages(storage, pairs, blocks_a_pair)
    reference.copy_pages(storage, *np.array(pairs).T)
    assert fault is None
    np.testing.assert_array_equal(copied, storage)


@pytest.mark.parametrize("page", [-1, -(2**31), 6, INT_MAX])
@pytest.mark.parametrize("side", [0, 1])
def test_a_pair_outside_the_pool_is_skipped(page: int, side: int) -> None:
    storage = numbered(2, 6, 16)
    pairs = [[0, 1], [2, 3], [4, 5]]
    pairs[1][side] = page
    copied, fault = copy_pages(storage, pairs)
    storage[:, [1, 5]] = storage[:, [0, 4]]
    np.testing.assert_array_equal(copied, storage)
    assert fault == ("indices", 1, page)
