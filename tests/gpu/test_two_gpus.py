"""The second card of a machine: everything lives, runs and ends there, whichever card is the current one."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.gpu.answers import expected
from tests.gpu.capture import no_allocation

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.two_gpus

DECODE = cases.Case("two_gpus", (130, 0, 1, 33, 700), num_qo_heads=8, num_kv_heads=2, head_dim=64)
PREFILL = cases.Case(
    "two_gpus_prefill", (130, 5, 300), q_lens=(130, 2, 40), num_qo_heads=8, num_kv_heads=2, head_dim=128
)
SECOND = "cuda:1"


@pytest.fixture(params=[0, 1], ids=["first_is_current", "second_is_current"], autouse=True)
def current(request: pytest.FixtureRequest) -> Iterator[int]:
    """The current card, which every call leaves as it was."""
    before = cupy.cuda.runtime.getDevice()
    cupy.cuda.runtime.setDevice(request.param)
    try:
        yield request.param
        assert cupy.cuda.runtime.getDevice() == request.param
    finally:
        cupy.cuda.runtime.setDevice(before)


def on_second(array: np.ndarray) -> Any:
    with cupy.cuda.Device(1):
        return cupy.asarray(array)


def assert_right(inputs: cases.Inputs, out: Any, lse: Any) -> None:
    assert out.device.id == lse.device.id == 1
    right, right_lse = expected(inputs)
    cases.assert_close(out.get(), right, lse.get(), right_lse, tolerance=cases.OUT_TOLERANCE[inputs.case.dtype])


@pytest.mark.parametrize("host_metadata", [False, True])
def test_one_shot_calls(host_metadata: bool) -> None:
    for case in (DECODE, PREFILL):
        inputs = cases.build(case)
        kv, q = inputs.kv(on_second), on_second(inputs.q)
        table = inputs.table() if host_metadata else inputs.table(on_second)
        if case.is_decode:
            assert_right(inputs, *pa.decode(q, kv, table, return_lse=True))
        else:
            indptr = inputs.qo_indptr if host_metadata else on_second(inputs.qo_indptr)
            assert_right(inputs, *pa.prefill(q, indptr, kv, table, return_lse=True))
    pa.status(SECOND)


@pytest.mark.parametrize("host_metadata", [False, True])
def test_plans(host_metadata: bool) -> None:
    for case in (DECODE, PREFILL):
        inputs = cases.build(case)
        kv, q = inputs.kv(on_second), on_second(inputs.q)
        table = inputs.table() if host_metadata else inputs.table(on_second)
        if case.is_decode:
            plan = pa.BatchDecodeWithPagedKVCache()
            plan.plan(kv, table, case.num_qo_heads)
        else:
            plan = pa.BatchPrefillWithPagedKVCache()
            plan.plan(kv, table, inputs.qo_indptr if host_metadata else on_second(inputs.qo_indptr), case.num_qo_heads)
        for _ in range(3):
            assert_right(inputs, *plan.run(q, kv, return_lse=True))
        plan.status()


def test_a_plan_that_moves_to_the_other_card_and_back() -> None:
    inputs = cases.build(DECODE)
    plan = pa.BatchDecodeWithPagedKVCache()
    for device in (0, 1, 0, 1):
        with cupy.cuda.Device(device):
            kv, q, table = inputs.kv(cupy.asarray), cupy.asarray(inputs.q), inputs.table(cupy.asarray)
        plan.plan(kv, table, DECODE.num_qo_heads)
        out = plan.run(q, kv)
        assert out.device.id == device
        cases.assert_close(out.get(), expected(inputs)[0], tolerance=cases.OUT_TOLERANCE["float16"])


def test_the_cache() -> None:
    caches = [pa.PagedKVCache(64, 4, 2, 64, layout="HND", dtype="float16", device=d) for d in ("cpu", SECOND)]
    random = np.random.default_rng(5)
    results = []
    for cache in caches:
        random = np.random.default_rng(5)
        convert = on_second if cache.device == SECOND else np.asarray
        a = cache.new_sequence()
        for count in (9, 1, 3):
            k, v = (convert(random.standard_normal((count, 2, 64)).astype(np.float16)) for _ in range(2))
            cache.append([a], count, k, v)
        b = cache.fork(a, 10)
        cache.append([b, a], [1, 2], k, v)
        q = convert(random.standard_normal((2, 8, 64)).astype(np.float16))
        table = cache.page_table([a, b])
        table.validate(64).raise_if_bad()
        out = pa.PageTable.empty(3, 20, page_size=4, device=cache.device)
        cache.page_table([b], out)
        results.append([pa.decode(q, cache.layers[0], table), table.indices, out.indptr, table.seq_lens])
        moved = cache.layers[0].to_layout("NHD")
        results[-1].append(pa.decode(q, moved, table))
    for host, device in zip(*results, strict=True):
        assert device.device.id == 1
        np.testing.assert_allclose(device.get().astype(np.float32), host.astype(np.float32), rtol=0.01, atol=0.002)


def test_tables_and_merging() -> None:
    inputs = cases.build(DECODE)
    table, host = inputs.table(on_second), inputs.table()
    pairs = [
        (table.seq_lens, host.seq_lens),
        (table.split(2).indptr, host.split(2).indptr),
        (table.to_block_table(50), host.to_block_table(50)),
        (table.slots(np.array([0], np.int32), on_second(np.array([129], np.int32))), None),
    ]
    states, logs = np.ones((3, 2, 8, 64), np.float16), np.zeros((3, 2, 8), np.float32)
    pairs += list(zip(pa.merge_states(on_second(states), on_second(logs)), pa.merge_states(states, logs), strict=True))
    for device, right in pairs:
        assert device.device.id == 1
        if right is not None:
            np.testing.assert_allclose(device.get().astype(np.float32), right.astype(np.float32), rtol=1e-3)


def test_a_graph() -> None:
    inputs = cases.build(DECODE)
    kv, q, table = inputs.kv(on_second), on_second(inputs.q), inputs.table(on_second)
    with cupy.cuda.Device(1):
        out, lse = cupy.empty_like(q), cupy.empty(q.shape[:-1], np.float32)
        stream = cupy.cuda.Stream(non_blocking=True)
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=5, max_pages=80)
    plan.plan(kv, table, DECODE.num_qo_heads)
    plan.run(q, kv, out=out, lse=lse)
    with cupy.cuda.Device(1), stream, no_allocation():
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeGlobal)
        plan.plan(kv, table, DECODE.num_qo_heads)
        plan.run(q, kv, out=out, lse=lse)
        graph = stream.end_capture()
    del plan
    with cupy.cuda.Device(1):
        out.fill(np.nan)
        cupy.cuda.Device(1).synchronize()
        graph.launch(stream)
        stream.synchronize()
    assert_right(inputs, out, lse)


def test_streams_of_the_second_card_are_those_that_count() -> None:
    inputs = cases.build(DECODE)
    kv, q, table = inputs.kv(on_second), on_second(inputs.q), inputs.table(on_second)
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device(1).synchronize()
        with stream:
            out, lse = pa.decode(q, kv, table, return_lse=True)
            stream.synchronize()
    assert_right(inputs, out, lse)


def test_threads_each_with_a_card() -> None:
    inputs = cases.build(DECODE)
    right, wrong = expected(inputs)[0], []

    def serve(device: int) -> None:
        with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
            kv, q = inputs.kv(cupy.asarray), cupy.asarray(inputs.q)
            plan = pa.BatchDecodeWithPagedKVCache()
            for _ in range(20):
                plan.plan(kv, inputs.table(), DECODE.num_qo_heads)
                out = plan.run(q, kv)
                stream.synchronize()
                if not np.allclose(out.get().astype(np.float32), right, rtol=0.01, atol=0.01):
                    wrong.append(device)

    threads = [threading.Thread(target=serve, args=(number % 2,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_faults_belong_to_their_card() -> None:
    with cupy.cuda.Device(1):
        pool = pa.PagedKV(*(cupy.zeros((2, 4, 1, 16), np.float16) for _ in range(2)), layout="NHD")
    pa.append(pool, on_second(np.array([1000])), *(on_second(np.ones((1, 1, 16), np.float16)) for _ in range(2)))
    pa.status("cuda:0")
    with pytest.raises(pa.PageTableError, match=r"slots\[0\] is 1000"):
        pa.status(SECOND)
    pa.status(SECOND)


def test_arrays_on_different_cards_are_refused() -> None:
    inputs = cases.build(DECODE)
    kv = inputs.kv(on_second)
    with cupy.cuda.Device(0):
        q, first = cupy.asarray(inputs.q), inputs.table(cupy.asarray)
    with pytest.raises(TypeError, match="q lives on cuda:0 and kv on cuda:1"):
        pa.decode(q, kv, inputs.table())
    with pytest.raises(TypeError, match="table lives on cuda:0 and kv on cuda:1"):
        pa.decode(on_second(inputs.q), kv, first)


def test_arrays_of_jax(current: int) -> None:
    jax = pytest.importorskip("jax")
    device = jax.devices("gpu")[1]
    inputs = cases.build(DECODE)

    def to_jax(array: np.ndarray) -> Any:
        return jax.device_put(array, device)

    q = to_jax(inputs.q)
    fresh: Callable[[Any], Any] = jax.jit(lambda x: x + jax.numpy.zeros((), x.dtype))
    for _ in range(3):
        given = fresh(q), inputs.kv(to_jax), inputs.table(to_jax)
        cupy.cuda.runtime.setDevice(current)  # which JAX has changed
        out, lse = pa.decode(*given, return_lse=True)
        assert cupy.cuda.runtime.getDevice() == current
        assert isinstance(out, jax.Array) and out.devices() == lse.devices() == {device}
        right, right_lse = expected(inputs)
        cases.assert_close(np.asarray(out), right, np.asarray(lse), right_lse, tolerance=cases.OUT_TOLERANCE["float16"])
