"""CUDA graphs, and the promises behind them: nothing waits for the device, nothing allocates, nothing moves."""

from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.gpu.answers import assert_right, on_gpu
from tests.gpu.busy import Busy
from tests.gpu.capture import captured, no_allocation

cupy = pytest.importorskip("cupy")

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 16
MAX_BATCH, NUM_PAGES = 6, 96
STEPS = 200
REPLAYS, CHECKED_REPLAYS = 10_000, 50


class Server:
    """A toy server on a real cache: requests join, grow, finish; the host keeps every K and V for the check."""

    def __init__(self, layout: str) -> None:
        self.random = np.random.default_rng(7)
        self.cache = pa.PagedKVCache(
            NUM_PAGES, PAGE, KV_HEADS, DIM,
            layout=layout, dtype="float16", device="cuda",
        )  # fmt: skip
        self.kv = self.cache.layers[0]
        self.history: dict[int, list[np.ndarray]] = {}
        # Rows past the batch have no page, so the table of all rows serves every step.
        self.table = pa.PageTable.empty(MAX_BATCH, NUM_PAGES, page_size=PAGE, device="cuda")
        self.q = cupy.zeros((MAX_BATCH, HEADS, DIM), np.float16)
        self.k, self.v = (cupy.zeros((MAX_BATCH, KV_HEADS, DIM), np.float16) for _ in range(2))
        self.slots = cupy.full(MAX_BATCH, -1, np.int64)
        self.out = cupy.full((MAX_BATCH, HEADS, DIM), np.nan, np.float16)
        self.lse = cupy.full((MAX_BATCH, HEADS), np.nan, np.float32)
        self.plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=MAX_BATCH, max_pages=NUM_PAGES)

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32).astype(np.float16)

    def prepare(self, step: int) -> None:
        """New lengths, K, V and q in the buffers that the graph reads."""
        if step % 11 == 0 and len(self.history) < MAX_BATCH:
            joined = self.cache.new_sequence()
            length = int(self.random.integers(1, 120))
            k, v = self.normal(length, KV_HEADS, DIM), self.normal(length, KV_HEADS, DIM)
            self.cache.append([joined], [length], cupy.asarray(k), cupy.asarray(v))
            self.history[joined] = [k, v]
        if step % 17 == 16 and len(self.history) > 1:
            finished = next(iter(self.history))
            self.cache.free(finished)
            del self.history[finished]
        batch = len(self.history)
        k, v, q = (self.normal(MAX_BATCH, heads, DIM) for heads in (KV_HEADS, KV_HEADS, HEADS))
        self.slots.fill(-1)
        self.slots[:batch] = self.cache.reserve(list(self.history), 1)
        self.cache.page_table(list(self.history), out=self.table)
        for row, sequence in enumerate(self.history):
            old_k, old_v = self.history[sequence]
            self.history[sequence] = [
                np.concatenate([old_k, k[row : row + 1]]),
                np.concatenate([old_v, v[row : row + 1]]),
            ]
        self.k.set(k)
        self.v.set(v)
        self.q.set(q)
        self.out.fill(np.nan)
        self.lse.fill(np.nan)

    def append(self) -> None:
        pa.append(self.kv, self.slots, self.k, self.v)

    def run(self) -> None:
        self.plan.run(self.q, self.kv, out=self.out, lse=self.lse)

    def replan(self) -> None:
        self.plan.plan(self.kv, self.table, HEADS)

    def check(self) -> None:
        out, lse, q = self.out.get(), self.lse.get(), self.q.get()
        batch = len(self.history)
        for row, (k, v) in enumerate(self.history.values()):
            right = np.empty((HEADS, DIM), np.float32)
            _, right_lse = pa.single_decode(q[row], k, v, layout="NHD", out=right, return_lse=True)
            cases.assert_close(out[row], right, lse[row], right_lse, tolerance=cases.OUT_TOLERANCE["float16"])
        assert (out[batch:] == 0).all() and np.isneginf(lse[batch:]).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("planned_in_the_graph", (True, False))
def test_200_decode_steps_replay(layout: str, planned_in_the_graph: bool) -> None:
    server = Server(layout)
    server.prepare(0)
    server.append()
    server.replan()
    server.run()
    server.check()

    def step() -> None:
        server.append()
        if planned_in_the_graph:
            server.replan()
        server.run()

    graph = captured(step)
    for i in range(1, STEPS):
        server.prepare(i)
        if not planned_in_the_graph:
            server.replan()
        cupy.cuda.get_current_stream().synchronize()
        graph.launch()
        server.check()
    server.plan.status()
    pa.status()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_200_decode_steps_in_chunks_replay(layout: str) -> None:
    """KV sequence parallelism on one card: append, split, plan, run and merge_states in one graph."""
    num_chunks, server = 5, Server(layout)
    rows = num_chunks * MAX_BATCH
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=rows, max_pages=NUM_PAGES)
    chunks = server.table.split(num_chunks)
    q = cupy.empty((num_chunks, *server.q.shape), np.float16)
    v, s = cupy.empty(q.shape, np.float32), cupy.empty(q.shape[:-1], np.float32)

    def step() -> None:
        server.append()
        server.table.split(num_chunks, out=chunks)
        plan.plan(server.kv, chunks, HEADS)
        q[...] = server.q
        plan.run(q.reshape(rows, HEADS, DIM), server.kv, out=v.reshape(rows, HEADS, DIM), lse=s.reshape(rows, HEADS))
        pa.merge_states(v.swapaxes(0, 1), s.swapaxes(0, 1), out=server.out, lse=server.lse)

    server.prepare(0)
    step()
    server.check()
    graph = captured(step)
    for i in range(1, STEPS):
        server.prepare(i)
        v.fill(np.nan)
        s.fill(np.nan)
        cupy.cuda.get_current_stream().synchronize()
        graph.launch()
        server.check()
    plan.status()
    pa.status()


class RandomTables:
    """Tables of requests that grow, shrink, run empty, join and leave, over pages of random numbers."""

    MAX_BATCH, MAX_PAGES, NUM_PAGES, MOST_TOKENS = 32, 640, 900, 4000

    def __init__(self, layout: str) -> None:
        self.random = np.random.default_rng(11)
        self.kv_lens = np.zeros(0, np.int64)
        # [indptr, last_page_len, indices] in one array: one upload a step.
        self.ends = (self.MAX_BATCH + 1, 2 * self.MAX_BATCH + 1)
        self.host = np.zeros(self.ends[1] + self.MAX_PAGES, np.int32)
        self.device = cupy.zeros(self.host.shape, np.int32)
        axes = (PAGE, KV_HEADS) if layout == "NHD" else (KV_HEADS, PAGE)
        pools = self.random.standard_normal((2, self.NUM_PAGES, *axes, DIM), np.float32).astype(np.float16)
        self.host_kv = pa.PagedKV(*pools, layout=layout)
        self.kv = pa.PagedKV(*map(cupy.asarray, pools), layout=layout)

    def table(self, arrays: Any) -> pa.PageTable:
        indptr, last_page_len = arrays[: self.ends[0]], arrays[self.ends[0] : self.ends[1]]
        return pa.PageTable(indptr, arrays[self.ends[1] :], last_page_len, page_size=PAGE)

    def change(self) -> None:
        """The next step: most requests grow by a token, and something happens to one of them or to all."""
        random, lens = self.random, self.kv_lens
        lens += (lens > 0) & (random.random(lens.size) < 0.9)
        row = int(random.integers(lens.size)) if lens.size else 0
        match random.integers(40):
            case 0 | 1 if lens.size:
                lens[row] = random.integers(lens[row] + 1)
            case 2 | 3 if lens.size:
                lens[row] = 0
            case 4 | 5 if lens.size:
                lens[row] = self.length()
            case 6 | 7 if lens.size:
                lens = np.delete(lens, row)
            case 8 | 9 | 10 if lens.size < self.MAX_BATCH:
                lens = np.insert(lens, random.integers(lens.size + 1), self.length())
            case 11 if random.random() < 0.1:
                lens = np.array([self.length() for _ in range(random.integers(self.MAX_BATCH + 1))], np.int64)
        while -(-lens // PAGE) @ np.ones_like(lens) > self.MAX_PAGES:
            lens[lens.argmax()] //= 2
        self.kv_lens = lens
        self.write()

    def length(self) -> int:
        return int(self.MOST_TOKENS ** self.random.random())

    def write(self) -> None:
        """The table of kv_lens over pages in random order; rows past the batch are empty, ids past the end no pages."""
        lens, table = self.kv_lens, self.table(self.host)
        pages = -(-lens // PAGE)
        table.indptr[1 : lens.size + 1] = np.cumsum(pages)
        table.indptr[lens.size + 1 :] = table.indptr[lens.size]
        table.last_page_len[:] = 0
        table.last_page_len[: lens.size] = lens - np.maximum(pages - 1, 0) * PAGE
        used = int(table.indptr[-1])
        table.indices[:used] = self.random.permutation(self.NUM_PAGES)[:used]
        table.indices[used:] = np.iinfo(np.int32).max


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_10_000_replays_of_random_tables(layout: str) -> None:
    tables = RandomTables(layout)
    q = tables.random.standard_normal((tables.MAX_BATCH, HEADS, DIM), np.float32).astype(np.float16)
    device_q, table = cupy.asarray(q), tables.table(tables.device)
    out, lse = cupy.empty_like(device_q), cupy.empty(q.shape[:2], np.float32)
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=tables.MAX_BATCH, max_pages=tables.MAX_PAGES)

    def step() -> None:
        plan.plan(tables.kv, table, HEADS)
        plan.run(device_q, tables.kv, out=out, lse=lse)

    def replay(arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tables.device.set(arrays)
        out.fill(np.nan)
        lse.fill(np.nan)
        graph.launch()
        plan.status()
        return out.get(), lse.get()

    step()
    graph = captured(step)
    checked = {*np.linspace(1, REPLAYS - 1, CHECKED_REPLAYS).astype(int).tolist()}
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for i in range(REPLAYS):
        tables.change()
        if i not in checked:
            tables.device.set(tables.host)
            graph.launch()
            continue
        result, result_lse = replay(tables.host)
        right = np.empty(q.shape, np.float32)
        _, right_lse = pa.decode(q, tables.host_kv, tables.table(tables.host), out=right, return_lse=True)
        cases.assert_close(result, right, result_lse, right_lse, tolerance=cases.OUT_TOLERANCE["float16"])
        seen.append((tables.host.copy(), result, result_lse))
    for arrays, result, result_lse in seen:  # what lies between leaves no trace
        again, again_lse = replay(arrays)
        assert (again.view(np.uint16) == result.view(np.uint16)).all()
        assert (again_lse.view(np.uint32) == result_lse.view(np.uint32)).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_prefill_replays_with_other_lengths(layout: str) -> None:
    """One graph of plan and run; then batches of other sizes, query counts and lengths in the same buffers."""
    max_tokens, max_pages, max_batch = 300, 80, 5
    plan = pa.BatchPrefillWithPagedKVCache(max_batch_size=max_batch, max_pages=max_pages, max_tokens=max_tokens)
    table = pa.PageTable.empty(max_batch, max_pages, page_size=PAGE, device="cuda")
    qo_indptr = cupy.zeros(max_batch + 1, np.int32)
    shape = (max_pages, PAGE, KV_HEADS, DIM) if layout == "NHD" else (max_pages, KV_HEADS, PAGE, DIM)
    k_pages, v_pages = cupy.full(shape, np.nan, np.float16), cupy.full(shape, np.nan, np.float16)
    kv = pa.PagedKV(k_pages, v_pages, layout=layout)
    q = cupy.zeros((max_tokens, HEADS, DIM), np.float16)
    out, lse = cupy.empty_like(q), cupy.empty(q.shape[:2], np.float32)

    def step() -> None:
        plan.plan(kv, table, qo_indptr, HEADS)
        plan.run(q, kv, out=out, lse=lse)

    step()
    graph = captured(step)
    shapes = [((100, 0, 33), (100, 7, 5)), ((1,), (1,)), ((64, 17, 16, 128, 1), (60, 17, 16, 128, 40)), ((), ())]
    for number, (kv_lens, q_lens) in enumerate(shapes):
        inputs = cases.build(
            cases.Case(
                f"replay{number}", kv_lens, q_lens=q_lens, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, layout=layout
            )
        )
        batch, used = len(kv_lens), int(inputs.indptr[-1])
        k_pages[: len(inputs.k_pages)] = cupy.asarray(inputs.k_pages)
        v_pages[: len(inputs.v_pages)] = cupy.asarray(inputs.v_pages)
        for target, source in ((table.indptr, inputs.indptr), (qo_indptr, inputs.qo_indptr)):
            target.set(np.pad(source, (0, max_batch + 1 - source.size), "edge"))
        table.indices[:used] = cupy.asarray(inputs.indices[:used])
        table.last_page_len[:batch] = cupy.asarray(inputs.last_page_len)
        q.fill(np.nan)
        q[: len(inputs.q)] = cupy.asarray(inputs.q)
        out.fill(np.nan)
        lse.fill(np.nan)
        cupy.cuda.get_current_stream().synchronize()
        graph.launch()
        rows = len(inputs.q)
        if rows:
            right = np.empty(inputs.q.shape, np.float32)
            _, right_lse = pa.prefill(
                inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), out=right, return_lse=True
            )
            cases.assert_close(out[:rows].get(), right, lse[:rows].get(), right_lse, tolerance=2e-3)
        assert (out[rows:].get() == 0).all() and np.isneginf(lse[rows:].get()).all()
        plan.status()


def test_nothing_waits_for_the_device_and_run_allocates_nothing() -> None:
    """Behind a kernel that keeps the device busy, everything returns while that one still runs."""
    server = Server("NHD")
    server.prepare(0)
    server.append()
    server.replan()
    server.run()
    keys, values = cupy.asarray(server.normal(1, KV_HEADS, DIM)), cupy.asarray(server.normal(1, KV_HEADS, DIM))
    sequences = list(server.history)
    states = server.out.reshape(3, 2, HEADS, DIM)
    logs = server.lse.reshape(3, 2, HEADS)
    merged, merged_lse = cupy.empty((3, HEADS, DIM), np.float16), cupy.empty((3, HEADS), np.float32)
    pa.merge_states(states, logs, out=merged, lse=merged_lse)
    chunks = server.table.split(2)
    # A first round, so that every kernel is compiled.
    server.cache.page_table(sequences)
    server.table.split(2, out=chunks)
    server.table.validate(NUM_PAGES)
    server.cache.append(sequences, 1, keys, values)

    Busy(0)
    cupy.cuda.Device().synchronize()
    busy = Busy(300)
    server.cache.append(sequences, 1, keys, values)
    server.cache.page_table(sequences)
    server.table.split(2, out=chunks)
    server.table.validate(NUM_PAGES)
    with no_allocation():
        server.replan()
        server.append()
        server.run()
        pa.merge_states(states, logs, out=merged, lse=merged_lse)
    assert not busy.is_over(), "a call waited for the device"
    busy.synchronize()


def test_what_cannot_be_captured_raises_before_anything_is_launched() -> None:
    inputs = cases.build(cases.Case("capture", (40, 7), num_qo_heads=HEADS, num_kv_heads=KV_HEADS))
    kv, q = inputs.kv(cupy.asarray), cupy.asarray(inputs.q)
    device_table, host_table = inputs.table(cupy.asarray), inputs.table()

    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, device_table, HEADS)
    with pytest.raises(ValueError, match="max_batch_size"):
        captured(lambda: plan.plan(kv, device_table, HEADS))
    fixed = pa.BatchDecodeWithPagedKVCache(max_batch_size=4, max_pages=64)
    fixed.plan(kv, device_table, HEADS)
    with pytest.raises(TypeError, match="capturing"):
        captured(lambda: fixed.plan(kv, host_table, HEADS))
    assert plan.run(q, kv).shape == q.shape


def test_a_plan_that_fails_leaves_the_step_before() -> None:
    """Its buffers too: an error during a capture is one that a server may survive."""
    few = cases.build(cases.Case("few", (100, 33, 7), num_qo_heads=4, num_kv_heads=2, head_dim=64))
    many = cases.build(cases.Case("many", (50, 20, 9), num_qo_heads=64, num_kv_heads=2, head_dim=128, page_size=8))
    kv, q = few.kv(on_gpu), on_gpu(few.q)
    attention = pa.BatchDecodeWithPagedKVCache(max_batch_size=3, max_pages=64)
    attention.plan(kv, few.table(on_gpu), 4)
    assert_right(few, *attention.run(q, kv, return_lse=True))

    other, table = many.kv(on_gpu), many.table(on_gpu)
    with pytest.raises(ValueError, match="while the stream is capturing"):
        captured(lambda: attention.plan(other, table, 64))

    assert_right(few, *attention.run(q, kv, return_lse=True))
    shorter = pa.PageTable(few.indptr, few.indices, np.ones(3, np.int32), page_size=few.case.page_size)
    attention.plan(kv, shorter, 4)
    right = pa.decode(few.q, few.kv(), shorter)
    cases.assert_close(attention.run(q, kv).get(), right, tolerance=cases.OUT_TOLERANCE["float16"])
