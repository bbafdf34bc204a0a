"""Memory outlives the kernels that use it: temporaries of JAX, buffers of a plan that is gone, words of a status."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import lifetimes
from tests import cases, child
from tests.gpu.answers import on_gpu
from tests.gpu.busy import Busy
from tests.gpu.capture import captured

cupy = pytest.importorskip("cupy")
jax = pytest.importorskip("jax")

CASE = cases.Case("lifetimes", (70, 33, 128, 1), num_qo_heads=8, num_kv_heads=2, head_dim=64, q_lens=(1, 1, 1, 1))
PAGE_SIZE = CASE.page_size


@pytest.fixture
def to_jax(gpu: Any) -> Callable[[np.ndarray], Any]:
    return lambda array: jax.block_until_ready(jax.device_put(array, gpu))


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes() if not isinstance(array, cupy.ndarray) else array.get().tobytes()


# -- what JAX lends ----------------------------------------------------------------------------------------------------


class Doors:
    """Each way in by which an array of JAX reaches a kernel: what is called, with which arrays, and what it gives."""

    def __init__(self) -> None:
        self.inputs = inputs = cases.build(CASE)
        self.kv, self.table = inputs.kv(on_gpu), inputs.table(on_gpu)
        self.q = on_gpu(inputs.q)
        self.pages = {"k_pages": inputs.k_pages, "v_pages": inputs.v_pages}
        self.arrays = {"indptr": inputs.indptr, "indices": inputs.indices, "last_page_len": inputs.last_page_len}
        random = np.random.default_rng(3)
        self.tokens = {name: random.standard_normal((48, 2, 64)).astype(np.float16) for name in ("k", "v")}
        self.states = {
            "v": random.standard_normal((64, 4, 8, 64)).astype(np.float16),
            "s": random.standard_normal((64, 4, 8)).astype(np.float32),
        }
        self.positions = {"batch_indices": np.array([0, 1, 2], np.int32), "positions": np.array([69, 0, 100], np.int32)}
        self.block_table = {
            "block_table": np.arange(32, dtype=np.int32).reshape(4, 8),
            "seq_lens": np.array([5, 100, 0, 128], np.int32),
        }

    def written(self, call: Callable[[pa.PagedKV], Any]) -> Any:
        pool = pa.PagedKV(*(cupy.zeros((8, 16, 2, 64), np.float16) for _ in range(2)), layout="NHD")
        call(pool)
        return cupy.stack([pool.k_pages, pool.v_pages])

    def from_cache(self, k: Any, v: Any) -> Any:
        cache = pa.PagedKVCache(8, 16, 2, 64, layout="NHD", dtype="float16", device="cuda")
        cache.append([cache.new_sequence()], 48, k, v)
        return cupy.stack([cache.layers[0].k_pages[:3], cache.layers[0].v_pages[:3]])

    def written_by_cache(self, k: Any, v: Any) -> Any:
        cache = pa.PagedKVCache(8, 16, 2, 64, layout="NHD", dtype="float16", device="cuda")
        cache.write(cache.reserve([cache.new_sequence()], 48), k, v)
        return cupy.stack([cache.layers[0].k_pages[:3], cache.layers[0].v_pages[:3]])

    def run(self, q: Any) -> Any:
        plan = pa.BatchDecodeWithPagedKVCache()
        plan.plan(self.kv, self.table, 8)
        return plan.run(q, self.kv, out=cupy.empty(self.inputs.q.shape, np.float16))

    def planned(self, indptr: Any, indices: Any, last_page_len: Any) -> Any:
        plan = pa.BatchDecodeWithPagedKVCache()
        plan.plan(self.kv, pa.PageTable(indptr, indices, last_page_len, page_size=PAGE_SIZE), 8)
        return plan.run(self.q, self.kv)

    def prefilled(self, qo_indptr: Any) -> Any:
        plan = pa.BatchPrefillWithPagedKVCache()
        plan.plan(self.kv, self.table, qo_indptr, 8)
        return plan.run(self.q, self.kv)

    def all(self) -> dict[str, tuple[Callable[..., Any], dict[str, np.ndarray]]]:
        q, kv, table = {"q": self.inputs.q}, self.kv, self.table
        slots = np.arange(48, dtype=np.int64)
        out = cupy.empty(self.inputs.q.shape, np.float16)
        given = lambda *arrays: pa.PageTable(*arrays, page_size=PAGE_SIZE)  # noqa: E731
        kv_tokens, kv_slots = self.tokens, {"slots": slots.astype(np.int32), **self.tokens}
        return {
            "decode q": (lambda q: pa.decode(q, kv, table, out=out).copy(), q),
            "prefill q": (lambda q: pa.prefill(q, self.inputs.qo_indptr, kv, table, out=out).copy(), q),
            "decode pool": (lambda k, v: pa.decode(self.q, pa.PagedKV(k, v, layout="NHD"), table), self.pages),
            "decode table": (lambda *arrays: pa.decode(self.q, kv, given(*arrays)), self.arrays),
            "plan table": (self.planned, self.arrays),
            "plan qo_indptr": (self.prefilled, {"qo_indptr": self.inputs.qo_indptr}),
            "single_decode": (
                lambda q, k, v: pa.single_decode(q, k, v, layout="NHD", out=out[0]).copy(),
                {"q": self.inputs.q[0], **self.tokens},
            ),
            "single_prefill": (
                lambda q, k, v: pa.single_prefill(q, k, v, layout="NHD", out=out).copy(),
                {**q, **self.tokens},
            ),
            "append": (lambda *given: self.written(lambda pool: pa.append(pool, *given)), kv_slots),
            "cache.append": (self.from_cache, kv_tokens),
            "cache.write": (self.written_by_cache, kv_tokens),
            "run q": (self.run, q),
            "merge_states": (
                lambda v, s: pa.merge_states(v, s, out=cupy.empty((64, 8, 64), np.float16))[0],
                self.states,
            ),
            "merge_state": (
                lambda v, s: pa.merge_state(
                    v, s, self.q[:1], cupy.zeros((1, 8), np.float32), out=cupy.empty_like(self.q[:1])
                )[0],
                {"v": self.inputs.q[1:2], "s": np.zeros((1, 8), np.float32)},
            ),
            "merge_state second": (
                lambda v, s: pa.merge_state(
                    self.q[:1], cupy.zeros((1, 8), np.float32), v, s, out=cupy.empty_like(self.q[:1])
                )[0],
                {"v": self.inputs.q[1:2], "s": np.zeros((1, 8), np.float32)},
            ),
            "slots": (table.slots, self.positions),
            "split": (lambda *arrays: given(*arrays).split(2).indices, self.arrays),
            "seq_lens": (lambda *arrays: given(*arrays).seq_lens, self.arrays),
            "to_block_table": (lambda *arrays: given(*arrays).to_block_table(9), self.arrays),
            "from_block_table": (
                lambda *arrays: pa.PageTable.from_block_table(*arrays, page_size=PAGE_SIZE).indices[:15],
                self.block_table,
            ),
            "to_layout": (lambda k, v: pa.PagedKV(k, v, layout="NHD").to_layout("HND").k_pages, self.pages),
        }


DOORS = (
    "append",
    "cache.append",
    "cache.write",
    "decode pool",
    "decode q",
    "decode table",
    "from_block_table",
    "merge_state",
    "merge_state second",
    "merge_states",
    "plan qo_indptr",
    "plan table",
    "prefill q",
    "run q",
    "seq_lens",
    "single_decode",
    "single_prefill",
    "slots",
    "split",
    "to_block_table",
    "to_layout",
)


def temporaries_used_again(arrays: list[np.ndarray], addresses: list[int], gpu: Any) -> int:
    """How many of the addresses JAX gives to new arrays of these forms, full of other values."""
    held = [jax.device_put(np.full_like(array, 3), gpu) for array in arrays for _ in range(8)]
    seen = {jax.block_until_ready(array).unsafe_buffer_pointer() for array in held}  # JAX does not wait for our stream
    return len(seen.intersection(addresses))


def test_every_door_is_tried() -> None:
    assert tuple(sorted(Doors().all())) == DOORS


@pytest.mark.parametrize("door", DOORS)
def test_a_temporary_of_jax_stays_until_the_kernel_that_reads_it_is_over(door: str, gpu: Any, to_jax: Callable) -> None:
    call, arrays = Doors().all()[door]
    right = bits(call(*map(on_gpu, arrays.values())))
    fresh = jax.jit(lambda x: x + jax.numpy.zeros((), x.dtype))
    inputs = [to_jax(array) for array in arrays.values()]
    call(*map(fresh, inputs))  # all is compiled

    def temporaries() -> tuple[list[Any], list[int]]:
        made = [jax.block_until_ready(fresh(array)) for array in inputs]
        return made, [array.unsafe_buffer_pointer() for array in made]

    temporaries_used_again(list(arrays.values()), [], gpu)
    cupy.cuda.Device().synchronize()
    lifetimes.release_finished()
    made, addresses = temporaries()
    del made
    assert temporaries_used_again(list(arrays.values()), addresses, gpu), "the memory would have been used again"

    made, addresses = temporaries()
    busy = Busy()
    result = call(*made)
    del made
    again = temporaries_used_again(list(arrays.values()), addresses, gpu)
    assert not busy.is_over(), "the kernel was late"
    assert not again
    assert bits(result) == right


def test_what_was_lent_is_given_back_when_the_kernels_are_over(gpu: Any, to_jax: Callable) -> None:
    inputs = cases.build(CASE)
    kv, table, out = inputs.kv(on_gpu), inputs.table(on_gpu), cupy.empty(inputs.q.shape, np.float16)
    fresh = jax.jit(lambda x: x + jax.numpy.zeros((), x.dtype))
    q = to_jax(inputs.q)
    most = 0
    for _ in range(2000):
        pa.decode(fresh(q), kv, table, out=out)
        most = max(most, len(lifetimes._waiting))
    cupy.cuda.Device().synchronize()
    pa.decode(fresh(q), kv, table, out=out)
    assert len(lifetimes._waiting) <= 1
    assert most < 1500

    kept = fresh(q)  # a pool that is dropped while nothing reads it is given back at once
    pool = pa.PagedKV(to_jax(inputs.k_pages), to_jax(inputs.v_pages), layout="NHD")
    pa.decode(kept, pool, table, out=out)
    cupy.cuda.Device().synchronize()
    lifetimes.release_finished()
    del pool
    assert not lifetimes._waiting


def test_a_result_that_jax_still_reads_is_not_written_again(gpu: Any, to_jax: Callable) -> None:
    """JAX is busy, so that it reads results late; they are temporaries, and ours is the next call."""
    inputs = cases.build(CASE)
    kv, table = inputs.kv(on_gpu), inputs.table(on_gpu)

    @jax.jit
    def slowly(x: Any) -> Any:
        return jax.lax.fori_loop(0, 400, lambda _, y: y @ y * 1e-3, x)

    doubled = jax.jit(lambda x, _: x * 2)
    qs = [to_jax((inputs.q * scale).astype(np.float16)) for scale in (1.0, -2.0, 3.0)]
    heavy = to_jax(np.ones((4096, 4096), np.float32))
    first = [bits(pa.decode(q, kv, table)) for q in qs]
    right = [bits(np.frombuffer(x, np.float16) * np.float16(2)) for x in first]
    jax.block_until_ready((slowly(heavy), doubled(qs[0], slowly(heavy)[0, 0])))
    cupy.cuda.Device().synchronize()
    late = slowly(heavy)[0, 0]
    found = [doubled(pa.decode(q, kv, table), late) for q in qs]
    was_late = not late.is_ready()
    assert [bits(x) for x in found] == right
    assert was_late


# -- what a graph reads ------------------------------------------------------------------------------------------------


def fill_free_memory() -> list[Any]:
    """Whatever CuPy's pool gives out now, in blocks of all sizes, full of bytes that no index and no number is."""
    return [cupy.full(1 << bits, 0x7F, np.uint8) for bits in range(9, 23) for _ in range(12)]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("planned_in_the_graph", [False, True])
def test_a_graph_keeps_the_buffers_of_a_plan_that_is_gone(kind: str, planned_in_the_graph: bool) -> None:
    inputs = cases.build(CASE)
    kv, table, q = inputs.kv(on_gpu), inputs.table(on_gpu), on_gpu(inputs.q)
    out, qo_indptr = cupy.empty_like(q), on_gpu(inputs.qo_indptr)
    before = len(lifetimes._kept)

    def capture() -> Any:
        capacity = {"max_batch_size": 4, "max_pages": 64}
        if kind == "decode":
            plan = pa.BatchDecodeWithPagedKVCache(**capacity)
            replan = lambda: plan.plan(kv, table, 8)  # noqa: E731
        else:
            plan = pa.BatchPrefillWithPagedKVCache(**capacity, max_tokens=4)
            replan = lambda: plan.plan(kv, table, qo_indptr, 8)  # noqa: E731
        replan()
        plan.run(q, kv, out=out)

        def work() -> None:
            if planned_in_the_graph:
                replan()
            for _ in range(3):
                plan.run(q, kv, out=out)

        return captured(work)

    graph = capture()
    assert len(lifetimes._kept) == before + 1, "once a plan and graph"
    gc.collect()
    poison = fill_free_memory()
    right = pa.decode(inputs.q, inputs.kv(), inputs.table())
    for _ in range(3):
        out.fill(np.nan)
        graph.launch()
        cases.assert_close(out.get(), right, tolerance=cases.OUT_TOLERANCE["float16"])
    del graph, poison
    give_back_everything(before)


def give_back_everything(before: int) -> None:
    """CUDA says on a thread of its own that a graph is gone."""
    end = time.monotonic() + 10
    while len(lifetimes._kept) > before and time.monotonic() < end:
        cupy.cuda.Device().synchronize()
        time.sleep(0.01)
        lifetimes.release_finished()
    assert len(lifetimes._kept) <= before


def test_a_graph_keeps_what_jax_lent_and_the_word_of_a_validation(to_jax: Callable, gpu: Any) -> None:
    inputs = cases.build(CASE)
    table, q = inputs.table(on_gpu), on_gpu(inputs.q)
    pages = [to_jax(inputs.k_pages), to_jax(inputs.v_pages)]
    addresses = [array.unsafe_buffer_pointer() for array in pages]
    kv = pa.PagedKV(*pages, layout="NHD")
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=4, max_pages=64)
    plan.plan(kv, table, 8)
    out, before = cupy.empty(inputs.q.shape, np.float16), len(lifetimes._kept)
    plan.run(q, kv, out=out)
    right = bits(out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        table.validate(1)
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        try:
            plan.run(q, kv, out=out)
            table.validate(1)  # finds page ids that are none, and writes so at every replay
        finally:
            graph = stream.end_capture()
    del kv, pages
    gc.collect()
    cupy.cuda.Device().synchronize()
    lifetimes.release_finished()
    assert not temporaries_used_again([inputs.k_pages, inputs.v_pages], addresses, gpu)
    poison = fill_free_memory()
    out.fill(np.nan)
    cupy.cuda.Device().synchronize()
    graph.launch()
    assert bits(out) == right
    assert all(bool((block == 0x7F).all()) for block in poison)
    del graph
    give_back_everything(before)


def test_an_array_of_jax_is_refused_during_a_capture_which_survives(to_jax: Callable) -> None:
    inputs = cases.build(CASE)
    kv, q, out = inputs.kv(on_gpu), on_gpu(inputs.q), cupy.empty(inputs.q.shape, np.float16)
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=4, max_pages=64)
    plan.plan(kv, inputs.table(on_gpu), 8)
    plan.run(q, kv, out=out)
    right, given = bits(out), to_jax(inputs.q)

    def work() -> None:
        with pytest.raises(
            TypeError, match=r"^q \(.*ArrayImpl\) is to be taken by DLPack while .*q = cupy\.from_dlpack\(q\)"
        ):
            plan.run(given, kv, out=out)
        plan.run(q, kv, out=out)

    graph = captured(work)
    out.fill(0)
    graph.launch()
    assert bits(out) == right


def test_what_cannot_be_kept_is_not_captured() -> None:
    inputs = cases.build(CASE)
    kv, table, q, out = (
        inputs.kv(on_gpu),
        inputs.table(on_gpu),
        on_gpu(inputs.q),
        cupy.empty(inputs.q.shape, np.float16),
    )
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, table, 8)
    plan.run(q, kv, out=out)
    with pytest.raises(ValueError, match=r"run\(\) was called while .* no capacity.*max_batch_size= and max_pages="):
        captured(lambda: plan.run(q, kv, out=out))
    pa.decode(q, kv, table, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        try:
            with pytest.raises(
                ValueError, match=r"a one-shot call was made while .* then capture its plan\(\) and run"
            ):
                pa.decode(q, kv, table, out=out)
        finally:
            stream.end_capture()


# -- status words ------------------------------------------------------------------------------------------------------


def test_the_status_of_a_plan_is_seen_from_every_stream() -> None:
    inputs = cases.build(CASE)
    kv = inputs.kv(on_gpu)
    wrong = pa.PageTable(
        *map(on_gpu, (inputs.indptr, inputs.indices + 10_000, inputs.last_page_len)), page_size=PAGE_SIZE
    )
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, inputs.table(on_gpu), 8)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        Busy(100)
        plan.plan(kv, wrong, 8)
    with pytest.raises(pa.PageTableError, match="indices"):
        plan.status()


def test_a_fault_on_one_stream_is_raised_and_cleared_for_all() -> None:
    pool = pa.PagedKV(*(cupy.zeros((2, 4, 1, 16), np.float16) for _ in range(2)), layout="NHD")
    tokens = cupy.ones((1, 1, 16), np.float16)
    bad = cupy.array([1000])
    pa.append(pool, bad, tokens, tokens)
    with pytest.raises(pa.PageTableError, match="slots"):
        pa.status()
    for _ in range(3):
        with cupy.cuda.Stream(non_blocking=True):
            Busy(50)
            pa.append(pool, bad, tokens, tokens)
        with pytest.raises(pa.PageTableError, match=r"slots\[0\] is 1000"):
            pa.status()
        pa.status()


def test_the_first_append_of_a_process_may_be_captured() -> None:
    """The graph does not clear the status word at every replay (tests/gpu/first_append.py is that process)."""
    said = child.run("tests.gpu.first_append", seconds=120)
    assert said == {"fault_after_replay": True, "clear_after": True, "written": True}


# -- threads -----------------------------------------------------------------------------------------------------------


def test_many_threads_with_streams_of_their_own() -> None:
    """Each with a plan and a cache; host tables and slots, so that all of them upload."""
    inputs = cases.build(CASE)
    right = pa.decode(inputs.q, inputs.kv(), inputs.table())
    wrong: list[str] = []

    def serve() -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            kv, q = inputs.kv(on_gpu), on_gpu(inputs.q)
            plan = pa.BatchDecodeWithPagedKVCache()
            cache = pa.PagedKVCache(64, 16, 2, 64, layout="NHD", dtype="float16", device="cuda")
            seq = cache.new_sequence()
            tokens = cupy.ones((5, 2, 64), np.float16)
            for step in range(20):
                plan.plan(kv, inputs.table(), 8)
                out = plan.run(q, kv)
                cache.append([seq], 5, tokens, tokens)
                stream.synchronize()
                if not np.allclose(out.get().astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01):
                    wrong.append(f"step {step}")
            if cache.page_table([seq]).seq_lens.get().tolist() != [100]:
                wrong.append("length")

    for _ in range(3):
        threads = [threading.Thread(target=serve) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
