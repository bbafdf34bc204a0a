"""What a step costs the host, and the eager wall time of a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import BENCH_DECODE, BENCH_PREFILL, Case

from .session import Session
from .timing import no_garbage_collection, spread
from .workload import Workload, random_normal

WARM_UP_CALLS = 20
CALLS_IN_FLIGHT = 16  # between two synchronisations: a full queue would make the host wait
BATCH_SIZE, KV_LEN = 256, 4096
LAYERS = 32


@dataclass(frozen=True)
class Probe:
    """One thing to be timed on the host."""

    name: str
    times: Callable[[int], list[float]]  # microseconds of so many calls

    def __str__(self) -> str:
        return self.name


def measure_host(probe: Probe, session: Session) -> dict[str, Any]:
    """Microseconds on the host."""
    return {"host_us": spread(probe.times(10 * session.reps))}


def host_times(call: Callable[[], object], calls: int) -> list[float]:
    """Microseconds until each of some calls returned, while the device is not waited for."""
    import cupy

    for _ in range(WARM_UP_CALLS):
        call()
    times = []
    with no_garbage_collection():
        for i in range(calls):
            if i % CALLS_IN_FLIGHT == 0:
                cupy.cuda.get_current_stream().synchronize()
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e6)
    return times


def _workload(cases: tuple[Case, ...], name: str) -> Workload:
    import cupy

    return Workload.build(next(case for case in cases if case.name == name), cupy)


def _decode(calls: int, *, run: bool = False, host_table: bool = False) -> list[float]:
    workload = _workload(BENCH_DECODE, "bs64_2k_g4")
    table = workload.table
    if host_table:
        arrays = (workload.indptr, workload.indices, workload.last_page_len)
        table = pa.PageTable(*arrays, page_size=workload.case.page_size)
    attention, heads = pa.BatchDecodeWithPagedKVCache(), workload.case.num_qo_heads
    attention.plan(workload.kv, table, heads)
    out = attention.run(workload.q, workload.kv)
    if run:
        return host_times(lambda: attention.run(workload.q, workload.kv, out=out), calls)
    return host_times(lambda: attention.plan(workload.kv, table, heads), calls)


def _prefill(calls: int, *, run: bool = False) -> list[float]:
    workload = _workload(BENCH_PREFILL, "64x128_on_2048")
    attention, heads = pa.BatchPrefillWithPagedKVCache(), workload.case.num_qo_heads
    attention.plan(workload.kv, workload.table, workload.qo_indptr, heads)
    out = attention.run(workload.q, workload.kv)
    if run:
        return host_times(lambda: attention.run(workload.q, workload.kv, out=out), calls)
    return host_times(lambda: attention.plan(workload.kv, workload.table, workload.qo_indptr, heads), calls)


def _cache(calls: int, *, reserve: bool, page_table: bool, ragged: bool = False) -> list[float]:
    """Steps of 256 sequences of 4096 tokens and more; the pool is narrow, which the host does not notice.

    All take a page in the same step, every 16th; `ragged`: about 16 take one in each.
    """
    steps = WARM_UP_CALLS + calls
    pages = BATCH_SIZE * -(-(KV_LEN + 16 + steps) // 16)
    cache = pa.PagedKVCache(pages, 16, num_kv_heads=1, head_dim=16, layout="NHD", dtype="float16", device="cuda")
    sequences = np.array([cache.new_sequence() for _ in range(BATCH_SIZE)])
    cache.reserve(sequences, KV_LEN + np.arange(BATCH_SIZE) % 16 if ragged else KV_LEN)
    cache.page_table(sequences)

    def step() -> None:
        if reserve:
            cache.reserve(sequences, 1)
        if page_table:
            cache.page_table(sequences)

    return host_times(step, calls)


def _append(calls: int) -> list[float]:
    import cupy

    cache = pa.PagedKVCache(64, 16, num_kv_heads=8, head_dim=128, layout="NHD", dtype="float16", device="cuda")
    slots = cache.reserve([cache.new_sequence()], 64)
    k, v = random_normal(cupy, (2, 64, 8, 128), np.dtype(np.float16), 0)
    return host_times(lambda: pa.append(cache.layers[0], slots, k, v), calls)


def _eager_layer(calls: int, *, per_step: bool = False) -> list[float]:
    """Wall time, device included, of append and decode in each of 32 layers; per_step: reserve, table and plan too."""
    import cupy

    case = next(case for case in BENCH_DECODE if case.name == "bs1_4k_g4")
    steps = calls // 10
    cache = pa.PagedKVCache(
        -(-(case.kv_lens[0] + steps + WARM_UP_CALLS) // 16), 16, case.num_kv_heads, case.head_dim,
        layout="NHD", dtype=case.dtype, num_layers=LAYERS, device="cuda",
    )  # fmt: skip
    sequences = np.array([cache.new_sequence()])
    cache.reserve(sequences, case.kv_lens[0])
    dtype = np.dtype(case.dtype)
    q = random_normal(cupy, (1, case.num_qo_heads, case.head_dim), dtype, 0)
    k, v = random_normal(cupy, (2, 1, case.num_kv_heads, case.head_dim), dtype, 1)
    attention, out, stream = pa.BatchDecodeWithPagedKVCache(), cupy.empty_like(q), cupy.cuda.get_current_stream()

    def marks() -> Iterator[float]:
        """When a step begins, when its layers begin, when they are over on the device."""
        stream.synchronize()
        yield time.perf_counter()
        slots = cache.reserve(sequences, 1)
        attention.plan(cache.layers[0], cache.page_table(sequences), case.num_qo_heads)
        if not per_step:
            stream.synchronize()
        yield time.perf_counter()
        for layer, kv in enumerate(cache.layers):
            cache.write(slots, k, v, layer=layer)
            attention.run(q, kv, out=out)
        stream.synchronize()
        yield time.perf_counter()

    times = []
    with no_garbage_collection():
        for _ in range(WARM_UP_CALLS + steps):
            step_began, layers_began, ended = marks()
            times.append((ended - (step_began if per_step else layers_began)) * 1e6 / LAYERS)
    attention.status()
    return times[WARM_UP_CALLS:]


HOST = (
    Probe("decode run()", lambda calls: _decode(calls, run=True)),
    Probe("decode plan(), device table", _decode),
    Probe("decode plan(), NumPy table", lambda calls: _decode(calls, host_table=True)),
    Probe("prefill run()", lambda calls: _prefill(calls, run=True)),
    Probe("prefill plan(), device table", _prefill),
    Probe("append()", _append),
    Probe("reserve(), 256 x 4k", lambda calls: _cache(calls, reserve=True, page_table=False)),
    Probe("page_table(), 256 x 4k", lambda calls: _cache(calls, reserve=False, page_table=True)),
    Probe("reserve() + page_table(), 256 x 4k", lambda calls: _cache(calls, reserve=True, page_table=True)),
    Probe("the same, ragged", lambda calls: _cache(calls, reserve=True, page_table=True, ragged=True)),
    Probe("a layer of append + decode, bs1_4k, wall", _eager_layer),
    Probe("the same with a 32nd of reserve + table + plan", lambda calls: _eager_layer(calls, per_step=True)),
)
